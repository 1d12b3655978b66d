"""The client of the exchange's REST interface: signed, rate-limited, retried, paginated, read-only.

The types of the responses belong in `answers`. The exchange caches books for 15 s, so a book from here
never fills a gap of the stream. Nothing here changes anything at the exchange.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote, urlsplit

import httpx
import msgspec
import tenacity

from kalshi_platform import __version__, typed_json
from kalshi_platform.exchange import items
from kalshi_platform.exchange.answers import (
    Balance,
    Bucket,
    Event,
    ExchangeStatus,
    Fill,
    Limits,
    Market,
    Orderbook,
    Position,
    Refusal,
    Response,
    Schedule,
    Series,
    Settlement,
    Trade,
    decode_refusal,
)
from kalshi_platform.exchange.errors import (
    CredentialsError,
    ExchangeError,
    ProtocolError,
    RateLimited,
    Unreachable,
)
from kalshi_platform.exchange.frames import DecodeError
from kalshi_platform.exchange.items import ReportUnreadable, log_unreadable
from kalshi_platform.exchange.signing import Credentials, load_signer
from kalshi_platform.loopback import is_loopback
from kalshi_platform.printable import printable
from kalshi_platform.settings import Exchange

T = TypeVar("T")
A = TypeVar("A", bound=Response)


Headers = Mapping[str, str]
"""Headers of a response, from either HTTP library; names are case-insensitive."""
Params = Mapping[str, str | int | Sequence[str] | None]

TIMEOUT = httpx.Timeout(15.0, connect=5.0)
ATTEMPTS = 6
"""With the waits between attempts, this bridges an outage of about 15 s."""

BASIC = Bucket(bucket_capacity=200, refill_rate=200)
"""The documented limit of the lowest tier: 20 requests a second."""
COST_OF_GET = 10

ITEMS_PER_PAGE = 1_000
EVENTS_PER_PAGE = 200
TICKERS_PER_REQUEST = 100
TICKER_CHARACTERS_PER_REQUEST = 4_000
"""Well below the 8 kB at which proxies begin to refuse a URL."""

CHUNK_BYTES = 65_536
MAX_RESPONSE_BYTES = 64 << 20
"""A page of a thousand markets is about 2 MB."""

SIGNIFICANT_SKEW_S = 5.0
"""The exchange accepts signatures up to about 10 s old; its Date header has a resolution of one second."""


class RateLimiter:
    """A token bucket: `take` waits until the request may be sent."""

    def __init__(
        self,
        bucket: Bucket,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._bucket = bucket
        self._tokens = float(bucket.bucket_capacity)
        self._at = clock()

    def set_limit(self, bucket: Bucket) -> None:
        """Change capacity and rate; the tokens at hand are kept."""
        with self._lock:
            self._bucket = bucket

    def take(self, tokens: int = COST_OF_GET) -> None:
        """Take `tokens`, waiting until they are available; callers are served in order."""
        with self._lock:
            now = self._clock()
            gained = (now - self._at) * self._bucket.refill_rate
            self._tokens = min(self._tokens + gained, self._bucket.bucket_capacity) - tokens
            self._at = now
            wait = -self._tokens / self._bucket.refill_rate
        if wait > 0:
            self._sleep(wait)


class RestClient:
    """The exchange's REST resources. Thread-safe; close it, or use it as a context manager.

    Every call raises `CredentialsError` for a wrong key, key file or clock; `Unreachable` and
    `RateLimited` once retries are used up; `ProtocolError` for a response that cannot be read; and
    `ExchangeError` for any other refusal. `signed=False` reads public resources only, without a key;
    `attempts` is the maximum number of attempts per request.
    """

    def __init__(
        self,
        exchange: Exchange,
        *,
        signed: bool = True,
        credentials: Credentials | None = None,
        attempts: int = ATTEMPTS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._exchange = exchange
        if signed and credentials is None:
            credentials = Credentials(exchange.key_id, load_signer(exchange.key_file))
        self._credentials = credentials if signed else None
        self._base = exchange.rest_url.rstrip("/")
        self._base_path = urlsplit(self._base).path
        self._limiter = RateLimiter(BASIC, sleep=sleep)
        self._limits_known = not signed
        self._clock_skew_s: float | None = None
        self._http = httpx.Client(
            timeout=TIMEOUT,
            headers={"User-Agent": f"kalshi-platform/{__version__}"},
            trust_env=not is_loopback(urlsplit(self._base).hostname or ""),  # no proxy to ourselves
        )
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type((RateLimited, Unreachable)),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=8),
            stop=tenacity.stop_after_attempt(attempts),
            sleep=sleep,
            reraise=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __repr__(self) -> str:
        return f"RestClient({self._base!r})"

    @property
    def clock_skew_s(self) -> float | None:
        """This machine's clock minus the exchange's in seconds, from the last response; exact to about 1 s."""
        return self._clock_skew_s

    # -- the exchange --------------------------------------------------------------------------

    def status(self) -> ExchangeStatus:
        """Whether the exchange is up."""
        return self._get("/exchange/status", ExchangeStatus)

    def schedule(self) -> Schedule:
        """Trading hours and maintenance."""
        return self._get("/exchange/schedule", Schedule, inside="schedule")

    def user_data_timestamp(self) -> datetime:
        """The time as of which the portfolio resources are current; they lag behind the exchange."""
        return self._get("/exchange/user_data_timestamp", datetime, inside="as_of_time")

    def account_limits(self) -> Limits:
        """The rate limits of this account."""
        return self._get("/account/limits", Limits)

    # -- markets -------------------------------------------------------------------------------

    def markets(
        self,
        *,
        status: str | None = None,
        series_ticker: str | None = None,
        event_ticker: str | None = None,
        tickers: Iterable[str] | None = None,
        mve_filter: str | None = None,
        min_close_ts: int | None = None,
        min_updated_ts: int | None = None,
        report: ReportUnreadable = log_unreadable,
    ) -> list[Market]:
        """Every matching market that can be read; `report` receives those that cannot.

        `status` is unopened, open, paused, closed or settled. `mve_filter` is only or exclude:
        multivariate combinations are nearly all of the catalogue, so pass "exclude" unless another filter
        narrows the query. Unknown tickers are missing from the result. Times are Unix seconds:
        `min_close_ts` selects markets that close then or later (not combinable with `status`),
        `min_updated_ts` those whose terms or status changed after it (combinable with `mve_filter` only).
        """
        params: Params = {
            "status": status,
            "series_ticker": series_ticker,
            "event_ticker": event_ticker,
            "mve_filter": mve_filter,
            "min_close_ts": min_close_ts,
            "min_updated_ts": min_updated_ts,
            "limit": ITEMS_PER_PAGE,
        }
        if tickers is None:
            return list(self._pages("/markets", Market, "markets", params, report))
        return [
            market
            for batch in _batches(tickers)
            for market in self._pages(
                "/markets", Market, "markets", {**params, "tickers": ",".join(batch)}, report
            )
        ]

    def open_markets(self, series: str | None = None) -> list[Market]:
        """The open markets of a series; without a series, all except multivariate ones."""
        if series is None:
            return self.markets(status="open", mve_filter="exclude")
        return self.markets(status="open", series_ticker=series)

    def unknown_tickers(self, tickers: Iterable[str]) -> set[str]:
        """Those of `tickers` for which the exchange has no market.

        The stream does not show this: an unknown ticker looks like an empty market there.
        """
        wanted = set(tickers)
        return wanted - {market.ticker for market in self.markets(tickers=sorted(wanted))}

    def market(self, ticker: str) -> Market:
        """One market."""
        return self._get(f"/markets/{_path_segment(ticker)}", Market, inside="market")

    def events(
        self,
        *,
        status: str | None = None,
        series_ticker: str | None = None,
        with_nested_markets: bool = False,
    ) -> list[Event]:
        """Every matching event, except multivariate ones."""
        nested = "true" if with_nested_markets else None
        params: Params = {
            "status": status,
            "series_ticker": series_ticker,
            "with_nested_markets": nested,
            "limit": EVENTS_PER_PAGE,
        }
        return list(self._pages("/events", Event, "events", params))

    def series(self, ticker: str) -> Series:
        """One series."""
        return self._get(f"/series/{_path_segment(ticker)}", Series, inside="series")

    def all_series(self, *, category: str | None = None) -> list[Series]:
        """Every series, or those of a category."""
        return self._get("/series", list[Series], {"category": category}, inside="series")

    def orderbook(self, ticker: str, *, depth: int = 0) -> Orderbook:
        """A market's book, up to 15 s old; the `depth` best levels per side, 0 for all."""
        path = f"/markets/{_path_segment(ticker)}/orderbook"
        return self._get(path, Orderbook, {"depth": depth}, inside="orderbook_fp")

    def orderbooks(self, tickers: Iterable[str]) -> dict[str, Orderbook]:
        """The books of many markets, up to 15 s old, by ticker."""
        path = "/markets/orderbooks"
        books = [
            items.read(bytes(raw), _TickerBook, path, log_unreadable)
            for batch in _batches(tickers)
            for raw in self._get(path, list[msgspec.Raw], {"tickers": batch}, inside="orderbooks")
        ]
        return {book.ticker: book.orderbook_fp for book in books if book is not None}

    def trades(
        self, *, ticker: str | None = None, min_ts: int | None = None, max_ts: int | None = None
    ) -> Iterator[Trade]:
        """Trades, newest first; `min_ts` and `max_ts` are Unix seconds."""
        params: Params = {
            "ticker": ticker,
            "min_ts": min_ts,
            "max_ts": max_ts,
            "limit": ITEMS_PER_PAGE,
        }
        return self._pages("/markets/trades", Trade, "trades", params)

    def trades_as_sent(
        self,
        *,
        ticker: str | None = None,
        min_ts: int,
        max_ts: int,
        report: ReportUnreadable = log_unreadable,
    ) -> Iterator[tuple[Trade, bytes]]:
        """As `trades`, each with the JSON text that the exchange sent."""
        path = "/markets/trades"
        params: Params = {
            "ticker": ticker,
            "min_ts": min_ts,
            "max_ts": max_ts,
            "limit": ITEMS_PER_PAGE,
        }
        for raw in self._raw_pages(path, "trades", params):
            trade = items.read(raw, Trade, path, report)
            if trade is not None:
                yield trade, raw

    # -- the portfolio -------------------------------------------------------------------------

    def positions(
        self, *, ticker: str | None = None, event_ticker: str | None = None
    ) -> list[Position]:
        """The account's position in every market that is not settled."""
        params: Params = {"ticker": ticker, "event_ticker": event_ticker, "limit": ITEMS_PER_PAGE}
        return list(self._pages("/portfolio/positions", Position, "market_positions", params))

    def positions_as_sent(self, report: ReportUnreadable) -> list[tuple[Position, str]]:
        """As `positions`, each with the JSON text that the exchange sent."""
        path = "/portfolio/positions"
        decoded = [
            (items.read(raw, Position, path, report), raw)
            for raw in self._raw_pages(path, "market_positions", {"limit": ITEMS_PER_PAGE})
        ]
        return [(position, raw.decode()) for position, raw in decoded if position is not None]

    def fills(
        self,
        *,
        ticker: str | None = None,
        min_ts: int | None = None,
        max_ts: int | None = None,
        report: ReportUnreadable = log_unreadable,
    ) -> Iterator[Fill]:
        """The account's fills that can be read, newest first; times are Unix seconds."""
        params: Params = {
            "ticker": ticker,
            "min_ts": min_ts,
            "max_ts": max_ts,
            "limit": ITEMS_PER_PAGE,
        }
        return self._pages("/portfolio/fills", Fill, "fills", params, report)

    def settlements(
        self, *, ticker: str | None = None, report: ReportUnreadable = log_unreadable
    ) -> Iterator[Settlement]:
        """The account's settlements that can be read, newest first."""
        params: Params = {"ticker": ticker, "limit": ITEMS_PER_PAGE}
        return self._pages("/portfolio/settlements", Settlement, "settlements", params, report)

    def balance(self) -> Balance:
        """The account's balance."""
        return self._get("/portfolio/balance", Balance)

    # -- pagination and transport --------------------------------------------------------------

    def _pages(
        self,
        path: str,
        item: type[A],
        key: str,
        params: Params,
        report: ReportUnreadable = log_unreadable,
    ) -> Iterator[A]:
        for raw in self._raw_pages(path, key, params):
            decoded = items.read(raw, item, path, report)
            if decoded is not None:
                yield decoded

    def _raw_pages(self, path: str, key: str, params: Params) -> Iterator[bytes]:
        """Yield the items of all pages as the exchange sent them."""
        cursor = ""
        seen: set[str] = set()
        while True:
            body = self._fetch(path, {**params, "cursor": cursor or None})
            for raw in self._decode(path, body, list[msgspec.Raw] | None, inside=key) or ():
                yield bytes(raw)
            cursor = self._decode(path, body, str | None, inside="cursor", default="") or ""
            if not cursor:
                return
            if cursor in seen:
                raise ProtocolError(
                    f"GET {path}: the exchange returned the same cursor twice, so its pages do not end."
                    " Try again later."
                )
            seen.add(cursor)

    def _get(
        self, path: str, kind: type[T], params: Params | None = None, *, inside: str | None = None
    ) -> T:
        answer: T = self._decode(path, self._fetch(path, params or {}), kind, inside=inside)
        return answer

    def _decode(
        self, path: str, body: bytes, kind: Any, *, inside: str | None, default: Any = None
    ) -> Any:
        try:
            if inside is None:
                return typed_json.decode(body, kind)
            members = typed_json.decode(body, dict[str, msgspec.Raw])
            if inside not in members and default is None:
                raise ProtocolError(f"GET {path}: the exchange's answer has no {inside!r}.")
            return typed_json.decode(members[inside], kind) if inside in members else default
        except DecodeError as error:
            raise ProtocolError(
                f"GET {path}: the exchange's answer cannot be read: {error}."
            ) from error

    def _fetch(self, path: str, params: Params) -> bytes:
        if not self._limits_known:
            self._limits_known = True
            self._learn_limits()
        return self._retrying(self._request, path, params)

    def _learn_limits(self) -> None:
        try:
            self._limiter.set_limit(self.account_limits().read)
        except (CredentialsError, Unreachable, RateLimited):
            self._limits_known = False
            raise
        except ExchangeError:
            return  # an environment without that resource: the documented lowest limit is safe

    def _request(self, path: str, params: Params) -> bytes:
        self._limiter.take()
        headers = (
            self._credentials.headers("GET", self._base_path + path) if self._credentials else {}
        )
        given = {name: value for name, value in params.items() if value is not None}
        sent = time.time()
        try:
            with self._http.stream(
                "GET", self._base + path, params=given, headers=dict(headers)
            ) as answer:
                body = _read_bounded(path, answer)
        except httpx.TimeoutException as error:
            raise Unreachable(f"The exchange at {self._base} did not answer in time.") from error
        except httpx.TransportError as error:
            raise Unreachable(
                f"The exchange at {self._base} cannot be reached ({error})."
                f" {self._unreachable_remedy()}"
            ) from error
        now_s = (sent + time.time()) / 2
        self._clock_skew_s = clock_skew_s(answer.headers, now_s)
        if answer.status_code == httpx.codes.OK:
            return body
        raise refusal(answer.status_code, body, answer.headers, what=f"GET {path}", now_s=now_s)

    def _unreachable_remedy(self) -> str:
        if self._exchange.simulated:
            return "Start the simulator (kalshi-platform simulate), or set PROD_KEYID and PROD_KEYFILE."
        return "Check the network and KALSHI_REST_URL."


def refusal(
    status: int,
    body: bytes | bytearray,
    headers: Headers,
    *,
    what: str = "the connection",
    now_s: float | None = None,
) -> ExchangeError:
    """The error to raise for an HTTP error response, of a request or of the WebSocket handshake.

    `what` names the refused request; `now_s` is when it was refused, in Unix seconds of this machine's
    clock, for the comparison with the Date header.
    """
    details = decode_refusal(body)
    reason = f" ({details})" if str(details) else ""
    if status == httpx.codes.TOO_MANY_REQUESTS:
        return RateLimited(
            f"The exchange refused {what}: too many requests. Does another program use the same key?"
        )
    if status >= 500:
        return Unreachable(f"The exchange failed on {what} with HTTP {status}{reason}.")
    if httpx.codes.MULTIPLE_CHOICES <= status < httpx.codes.BAD_REQUEST:
        return ExchangeError(
            f"The exchange moved {what} {_redirect_target(headers.get('location', ''))} (HTTP {status}), and"
            " redirects are not followed: headers signed for one server are never sent to another. Check"
            " KALSHI_REST_URL and KALSHI_WS_URL."
        )
    if status in {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}:
        skew_s = clock_skew_s(headers, time.time() if now_s is None else now_s)
        return _access_denied(status, details, what, skew_s)
    if status == httpx.codes.NOT_FOUND:
        return ExchangeError(
            f"The exchange has nothing for {what}{reason}. Check the name, KALSHI_REST_URL and"
            " KALSHI_WS_URL."
        )
    return ExchangeError(f"The exchange refused {what} with HTTP {status}{reason}.")


def _redirect_target(location: str) -> str:
    """A redirect's target without its query string."""
    if not location:
        return "without naming a target"
    return f"to {printable(location.partition('?')[0])[:200]}"


def clock_skew_s(headers: Headers, now_s: float) -> float | None:
    """`now_s` (this machine's clock) minus the exchange's clock in seconds, exact to about 1 s.

    None without a Date header. A cached response left the exchange `Age` seconds ago.
    """
    try:
        date = parsedate_to_datetime(headers["date"])
        age = int(headers.get("age") or 0)
    except (KeyError, ValueError):
        return None
    exchange_s = date.replace(tzinfo=date.tzinfo or UTC).timestamp() + age
    return now_s - (exchange_s + 0.5)  # the header is truncated to whole seconds


def _access_denied(status: int, details: Refusal, what: str, skew_s: float | None) -> ExchangeError:
    """The error for HTTP 401 or 403: final only where the exchange itself refused the key."""
    if details.concerns_key:
        return CredentialsError(_credentials_message(details, what, skew_s))
    reason = f" ({details})" if str(details) else ""
    return Unreachable(
        f"A CDN, proxy or firewall before the exchange denied {what} with HTTP {status}{reason}. The key was"
        " not refused, so the request is retried."
    )


def _credentials_message(details: Refusal, what: str, skew_s: float | None) -> str:
    if details.code == "signature_is_missing_from_headers":
        return f"The exchange requires {what} to be signed. Set PROD_KEYID and PROD_KEYFILE."
    if details.code == "header_timestamp_expired":
        return _clock_message(skew_s)
    if details.details == "INCORRECT_API_KEY_SIGNATURE":
        return (
            "The exchange rejects our signature: the private key in PROD_KEYFILE is not the one that"
            " belongs to PROD_KEYID. Set PROD_KEYFILE to the file that came with the key id."
        )
    return (
        "The exchange does not know PROD_KEYID. Check it, and the environment: demo and production"
        " have keys of their own (KALSHI_REST_URL, KALSHI_WS_URL)."
    )


def _read_bounded(path: str, answer: httpx.Response) -> bytes:
    """The decompressed body of a response. Raises: `ProtocolError` beyond `MAX_RESPONSE_BYTES`."""
    body = bytearray()
    for chunk in answer.iter_bytes(CHUNK_BYTES):
        body += chunk
        if len(body) > MAX_RESPONSE_BYTES:
            raise ProtocolError(
                f"GET {path}: the answer is longer than {MAX_RESPONSE_BYTES >> 20} MiB, and was not read"
                " to its end. Is KALSHI_REST_URL the exchange's?"
            )
    return bytes(body)


class _TickerBook(msgspec.Struct):
    ticker: str
    orderbook_fp: Orderbook


def _clock_message(skew_s: float | None) -> str:
    if skew_s is None or abs(skew_s) < SIGNIFICANT_SKEW_S:
        return (
            "The exchange says that the request was signed too long ago, although the clocks agree"
            " now. Was this machine asleep? Try again."
        )
    where = "ahead of" if skew_s > 0 else "behind"
    return (
        f"This machine's clock is {abs(skew_s):.0f} s {where} the exchange's, which accepts about 10 s."
        " Set it by NTP (timedatectl set-ntp true)."
    )


def _path_segment(name: str) -> str:
    """A name, quoted as one path segment."""
    return quote(name, safe="")


def _batches(tickers: Iterable[str]) -> Iterator[list[str]]:
    """Split tickers, without duplicates, into batches that fit one request."""
    batch: list[str] = []
    characters = 0
    for ticker in dict.fromkeys(tickers):
        length = len(quote(ticker, safe="")) + len("tickers=&")
        if batch and (
            len(batch) == TICKERS_PER_REQUEST or characters + length > TICKER_CHARACTERS_PER_REQUEST
        ):
            yield batch
            batch, characters = [], 0
        batch.append(ticker)
        characters += length
    if batch:
        yield batch

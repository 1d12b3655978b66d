"""The exchange's REST interface, reading only: signed, paced, retried, page after page.

What the answers hold is in answers.py. Books from here are cached by the exchange for 15 s and never
mend a gap of the stream. Nothing here changes anything at the exchange.
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
    Answer,
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
    Schedule,
    Series,
    Settlement,
    Trade,
    read_refusal,
)
from kalshi_platform.exchange.errors import (
    CredentialsError,
    ExchangeError,
    ProtocolError,
    RateLimited,
    Unreachable,
)
from kalshi_platform.exchange.frames import DecodeError
from kalshi_platform.exchange.items import Tell, logged
from kalshi_platform.exchange.signing import Credentials, load_signer
from kalshi_platform.loopback import is_loopback
from kalshi_platform.printable import printable
from kalshi_platform.settings import Exchange

T = TypeVar("T")
A = TypeVar("A", bound=Answer)


Headers = Mapping[str, str]
"""Headers of an answer, whoever read them; names in any case."""
Params = Mapping[str, str | int | Sequence[str] | None]

TIMEOUT = httpx.Timeout(15.0, connect=5.0)
ATTEMPTS = 6
"""With the waits between them, about 15 s of trouble are borne."""

BASIC = Bucket(bucket_capacity=200, refill_rate=200)
"""The documented limit of the lowest tier: 20 requests a second."""
COST_OF_GET = 10

PAGE = 1_000
EVENTS_PAGE = 200
TICKERS_AT_ONCE = 100
TICKER_CHARACTERS_AT_ONCE = 4_000
"""Far below the 8 kB at which proxies begin to refuse a URL."""

PIECE_BYTES = 65_536
LONGEST_ANSWER_BYTES = 64 << 20
"""A page of a thousand markets is some 2 MB."""

WORRYING_SKEW_S = 5.0
"""The exchange takes signatures that are about 10 s old; its Date header knows whole seconds."""


class Pace:
    """A token bucket: `take` waits until the request may go."""

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

    def adopt(self, bucket: Bucket) -> None:
        """Go on at another rate, with what is left of the old one."""
        with self._lock:
            self._bucket = bucket

    def take(self, tokens: int = COST_OF_GET) -> None:
        """Take `tokens`, in the order in which callers come."""
        with self._lock:
            now = self._clock()
            gained = (now - self._at) * self._bucket.refill_rate
            self._tokens = min(self._tokens + gained, self._bucket.bucket_capacity) - tokens
            self._at = now
            wait = -self._tokens / self._bucket.refill_rate
        if wait > 0:
            self._sleep(wait)


class RestClient:
    """The exchange's pages. Threads may share it; close it, or use it as a context manager.

    Every call raises `CredentialsError` for a wrong key, key file or clock; `Unreachable` and
    `RateLimited` once retries are used up; `ProtocolError` for an answer that cannot be read; and
    `ExchangeError` for any other refusal. `signed=False` reads public pages only, without a key;
    `attempts` is how often a request is made at most.
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
        self._pace = Pace(BASIC, sleep=sleep)
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
        """Our clock minus the exchange's, from the last answer; right to about a second."""
        return self._clock_skew_s

    # -- the exchange --------------------------------------------------------------------------

    def status(self) -> ExchangeStatus:
        """Whether the exchange is up."""
        return self._get("/exchange/status", ExchangeStatus)

    def schedule(self) -> Schedule:
        """Trading hours and maintenance."""
        return self._get("/exchange/schedule", Schedule, inside="schedule")

    def user_data_timestamp(self) -> datetime:
        """Up to when the portfolio pages are true; they lag behind the exchange."""
        return self._get("/exchange/user_data_timestamp", datetime, inside="as_of_time")

    def account_limits(self) -> Limits:
        """What this account may ask for."""
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
        tell: Tell = logged,
    ) -> list[Market]:
        """Every market that fits and can be read; `tell` is given what cannot. `status` is unopened, open, paused, closed or settled.

        `mve_filter` only or exclude: multivariate combinations are nearly all of the catalogue, so
        give "exclude" when nothing else narrows the question. Unknown tickers are simply missing.
        Times are Unix seconds: markets that close at `min_close_ts` or later (no status with it), or of
        which something but trading changed after `min_updated_ts` (nothing with it but `mve_filter`).
        """
        params: Params = {
            "status": status,
            "series_ticker": series_ticker,
            "event_ticker": event_ticker,
            "mve_filter": mve_filter,
            "min_close_ts": min_close_ts,
            "min_updated_ts": min_updated_ts,
            "limit": PAGE,
        }
        if tickers is None:
            return list(self._pages("/markets", Market, "markets", params, tell))
        return [
            market
            for some in _batches(tickers)
            for market in self._pages(
                "/markets", Market, "markets", {**params, "tickers": ",".join(some)}, tell
            )
        ]

    def open_markets(self, series: str | None = None) -> list[Market]:
        """The markets of a series that trade now; without one, all but multivariate ones."""
        if series is None:
            return self.markets(status="open", mve_filter="exclude")
        return self.markets(status="open", series_ticker=series)

    def unknown_tickers(self, tickers: Iterable[str]) -> set[str]:
        """Those of `tickers` that the exchange has no market for.

        The stream does not tell: there an unknown ticker looks like an empty market.
        """
        wanted = set(tickers)
        return wanted - {market.ticker for market in self.markets(tickers=sorted(wanted))}

    def market(self, ticker: str) -> Market:
        """One market."""
        return self._get(f"/markets/{_segment(ticker)}", Market, inside="market")

    def events(
        self,
        *,
        status: str | None = None,
        series_ticker: str | None = None,
        with_nested_markets: bool = False,
    ) -> list[Event]:
        """Every event that fits, multivariate ones excepted."""
        nested = "true" if with_nested_markets else None
        params: Params = {
            "status": status,
            "series_ticker": series_ticker,
            "with_nested_markets": nested,
            "limit": EVENTS_PAGE,
        }
        return list(self._pages("/events", Event, "events", params))

    def series(self, ticker: str) -> Series:
        """One series."""
        return self._get(f"/series/{_segment(ticker)}", Series, inside="series")

    def all_series(self, *, category: str | None = None) -> list[Series]:
        """Every series, or those of a category."""
        return self._get("/series", list[Series], {"category": category}, inside="series")

    def orderbook(self, ticker: str, *, depth: int = 0) -> Orderbook:
        """The book of a market, up to 15 s old; `depth` best levels a side, 0 for all."""
        path = f"/markets/{_segment(ticker)}/orderbook"
        return self._get(path, Orderbook, {"depth": depth}, inside="orderbook_fp")

    def orderbooks(self, tickers: Iterable[str]) -> dict[str, Orderbook]:
        """The books of many markets, up to 15 s old, by ticker."""
        path = "/markets/orderbooks"
        found = [
            items.read(bytes(raw), _TickerBook, path, logged)
            for some in _batches(tickers)
            for raw in self._get(path, list[msgspec.Raw], {"tickers": some}, inside="orderbooks")
        ]
        return {one.ticker: one.orderbook_fp for one in found if one is not None}

    def trades(
        self, *, ticker: str | None = None, min_ts: int | None = None, max_ts: int | None = None
    ) -> Iterator[Trade]:
        """Trades, newest first; `min_ts` and `max_ts` are Unix seconds."""
        params: Params = {"ticker": ticker, "min_ts": min_ts, "max_ts": max_ts, "limit": PAGE}
        return self._pages("/markets/trades", Trade, "trades", params)

    def trades_as_sent(
        self, *, ticker: str | None = None, min_ts: int, max_ts: int, tell: Tell = logged
    ) -> Iterator[tuple[Trade, bytes]]:
        """`trades()`, each with the JSON text that the exchange sent."""
        path = "/markets/trades"
        params: Params = {"ticker": ticker, "min_ts": min_ts, "max_ts": max_ts, "limit": PAGE}
        for raw in self._raw_pages(path, "trades", params):
            trade = items.read(raw, Trade, path, tell)
            if trade is not None:
                yield trade, raw

    # -- the portfolio -------------------------------------------------------------------------

    def positions(
        self, *, ticker: str | None = None, event_ticker: str | None = None
    ) -> list[Position]:
        """What we hold of every market that is not settled."""
        params: Params = {"ticker": ticker, "event_ticker": event_ticker, "limit": PAGE}
        return list(self._pages("/portfolio/positions", Position, "market_positions", params))

    def positions_as_sent(self, tell: Tell) -> list[tuple[Position, str]]:
        """`positions()`, each with the JSON text that the exchange sent."""
        path = "/portfolio/positions"
        found = [
            (items.read(raw, Position, path, tell), raw)
            for raw in self._raw_pages(path, "market_positions", {"limit": PAGE})
        ]
        return [(position, raw.decode()) for position, raw in found if position is not None]

    def fills(
        self,
        *,
        ticker: str | None = None,
        min_ts: int | None = None,
        max_ts: int | None = None,
        tell: Tell = logged,
    ) -> Iterator[Fill]:
        """Our fills that can be read, newest first; times are Unix seconds."""
        params: Params = {"ticker": ticker, "min_ts": min_ts, "max_ts": max_ts, "limit": PAGE}
        return self._pages("/portfolio/fills", Fill, "fills", params, tell)

    def settlements(
        self, *, ticker: str | None = None, tell: Tell = logged
    ) -> Iterator[Settlement]:
        """Our settled markets that can be read, newest first."""
        params: Params = {"ticker": ticker, "limit": PAGE}
        return self._pages("/portfolio/settlements", Settlement, "settlements", params, tell)

    def balance(self) -> Balance:
        """Our money."""
        return self._get("/portfolio/balance", Balance)

    # -- below the pages -----------------------------------------------------------------------

    def _pages(
        self, path: str, item: type[A], key: str, params: Params, tell: Tell = logged
    ) -> Iterator[A]:
        for raw in self._raw_pages(path, key, params):
            found = items.read(raw, item, path, tell)
            if found is not None:
                yield found

    def _raw_pages(self, path: str, key: str, params: Params) -> Iterator[bytes]:
        """The items of all pages, as they were sent."""
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
                    f"GET {path}: the exchange gave the same cursor twice, so its pages have no end."
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
        return self._retrying(self._once, path, params)

    def _learn_limits(self) -> None:
        try:
            self._pace.adopt(self.account_limits().read)
        except (CredentialsError, Unreachable, RateLimited):
            self._limits_known = False
            raise
        except ExchangeError:
            return  # an environment without that page: the documented limit is the safe one

    def _once(self, path: str, params: Params) -> bytes:
        self._pace.take()
        headers = (
            self._credentials.headers("GET", self._base_path + path) if self._credentials else {}
        )
        given = {name: value for name, value in params.items() if value is not None}
        sent = time.time()
        try:
            with self._http.stream(
                "GET", self._base + path, params=given, headers=dict(headers)
            ) as answer:
                body = _bounded(path, answer)
        except httpx.TimeoutException as error:
            raise Unreachable(f"The exchange at {self._base} did not answer in time.") from error
        except httpx.TransportError as error:
            raise Unreachable(
                f"The exchange at {self._base} cannot be reached ({error})."
                f" {self._remedy_for_silence()}"
            ) from error
        now_s = (sent + time.time()) / 2
        self._clock_skew_s = clock_skew_s(answer.headers, now_s)
        if answer.status_code == httpx.codes.OK:
            return body
        raise refusal(answer.status_code, body, answer.headers, what=f"GET {path}", now_s=now_s)

    def _remedy_for_silence(self) -> str:
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
    """What an HTTP error answer means, as the error to raise. The WebSocket handshake uses it too.

    `what` was refused; `now_s` is when, Unix seconds of our clock, to compare with the Date header.
    """
    said = read_refusal(body)
    reason = f" ({said})" if str(said) else ""
    if status == httpx.codes.TOO_MANY_REQUESTS:
        return RateLimited(
            f"The exchange refused {what}: too many requests. Does another program use the same key?"
        )
    if status >= 500:
        return Unreachable(f"The exchange failed on {what} with HTTP {status}{reason}.")
    if httpx.codes.MULTIPLE_CHOICES <= status < httpx.codes.BAD_REQUEST:
        return ExchangeError(
            f"The exchange moved {what} {_new_place(headers.get('location', ''))} (HTTP {status}), and"
            " redirects are not followed: what is signed for one server is shown to no other. Check"
            " KALSHI_REST_URL and KALSHI_WS_URL."
        )
    if status in {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}:
        skew_s = clock_skew_s(headers, time.time() if now_s is None else now_s)
        return _denied(status, said, what, skew_s)
    if status == httpx.codes.NOT_FOUND:
        return ExchangeError(
            f"The exchange has nothing for {what}{reason}. Check the name, KALSHI_REST_URL and"
            " KALSHI_WS_URL."
        )
    return ExchangeError(f"The exchange refused {what} with HTTP {status}{reason}.")


def _new_place(location: str) -> str:
    """Where a redirect points, without its query."""
    if not location:
        return "without saying where"
    return f"to {printable(location.partition('?')[0])[:200]}"


def clock_skew_s(headers: Headers, now_s: float) -> float | None:
    """Our clock, `now_s`, minus the exchange's; right to about a second. None: no Date header.

    A cached answer is older than its Date by its Age.
    """
    try:
        date = parsedate_to_datetime(headers["date"])
        age = int(headers.get("age") or 0)
    except (KeyError, ValueError):
        return None
    exchange_s = date.replace(tzinfo=date.tzinfo or UTC).timestamp() + age
    return now_s - (exchange_s + 0.5)  # the header has its fraction cut off


def _denied(status: int, said: Refusal, what: str, skew_s: float | None) -> ExchangeError:
    """What HTTP 401 or 403 means: final is what the exchange itself says of the key, and nothing else."""
    if said.is_of_the_key:
        return CredentialsError(_credentials_sentence(said, what, skew_s))
    reason = f" ({said})" if str(said) else ""
    return Unreachable(
        f"Something before the exchange denied {what} with HTTP {status}{reason}: a CDN, a proxy or a firewall."
        " It did not refuse the key, so it is asked again."
    )


def _credentials_sentence(said: Refusal, what: str, skew_s: float | None) -> str:
    if said.code == "signature_is_missing_from_headers":
        return f"The exchange wants {what} signed. Set PROD_KEYID and PROD_KEYFILE."
    if said.code == "header_timestamp_expired":
        return _clock_sentence(skew_s)
    if said.details == "INCORRECT_API_KEY_SIGNATURE":
        return (
            "The exchange rejects our signature: the private key in PROD_KEYFILE is not the one that"
            " belongs to PROD_KEYID. Set PROD_KEYFILE to the file that came with the key id."
        )
    return (
        "The exchange does not know PROD_KEYID. Check it, and the environment: demo and production"
        " have keys of their own (KALSHI_REST_URL, KALSHI_WS_URL)."
    )


def _bounded(path: str, answer: httpx.Response) -> bytes:
    """The body of an answer, unpacked, unless it has no reasonable end."""
    body = bytearray()
    for piece in answer.iter_bytes(PIECE_BYTES):
        body += piece
        if len(body) > LONGEST_ANSWER_BYTES:
            raise ProtocolError(
                f"GET {path}: the answer is longer than {LONGEST_ANSWER_BYTES >> 20} MiB, and was not read"
                " to its end. Is KALSHI_REST_URL the exchange's?"
            )
    return bytes(body)


class _TickerBook(msgspec.Struct):
    ticker: str
    orderbook_fp: Orderbook


def _clock_sentence(skew_s: float | None) -> str:
    if skew_s is None or abs(skew_s) < WORRYING_SKEW_S:
        return (
            "The exchange says that our request was signed too long ago, although the clocks agree"
            " now. Was this machine asleep? Try again."
        )
    where = "ahead of" if skew_s > 0 else "behind"
    return (
        f"This machine's clock is {abs(skew_s):.0f} s {where} the exchange's, which takes about 10."
        " Set it by NTP (timedatectl set-ntp true)."
    )


def _segment(name: str) -> str:
    """A name as one segment of a path."""
    return quote(name, safe="")


def _batches(tickers: Iterable[str]) -> Iterator[list[str]]:
    """Up to 100 tickers at once, and no more than fit into a URL."""
    batch: list[str] = []
    characters = 0
    for ticker in dict.fromkeys(tickers):
        length = len(quote(ticker, safe="")) + len("tickers=&")
        if batch and (
            len(batch) == TICKERS_AT_ONCE or characters + length > TICKER_CHARACTERS_AT_ONCE
        ):
            yield batch
            batch, characters = [], 0
        batch.append(ticker)
        characters += length
    if batch:
        yield batch

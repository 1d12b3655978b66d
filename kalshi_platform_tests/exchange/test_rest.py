"""The REST client against the simulator, recorded responses, and bad ones."""

from __future__ import annotations

import gzip
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from email.utils import formatdate, parsedate_to_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519

from kalshi_platform.exchange.answers import Bucket, decode_refusal
from kalshi_platform.exchange.errors import (
    CredentialsError,
    ExchangeError,
    ProtocolError,
    RateLimited,
    Unreachable,
)
from kalshi_platform.exchange.rest import (
    ATTEMPTS,
    BASIC,
    TICKERS_PER_REQUEST,
    RateLimiter,
    RestClient,
    clock_skew_s,
    refusal,
)
from kalshi_platform.exchange.signing import Credentials, load_signer
from kalshi_platform.settings import Exchange
from kalshi_platform.simulator.faults import Fault
from kalshi_platform.simulator.server import Simulator
from kalshi_platform_tests.simulator_fixtures import StartSimulator, long_lives

RECORDED = Path(__file__).resolve().parents[3] / "shared" / "frames" / "rest_demo_2026-06-11.jsonl"


def exchange_of(simulator: Simulator, **other: Any) -> Exchange:
    """The simulator, as an `Exchange` of the settings."""
    of = {
        "ws_url": simulator.ws_url,
        "rest_url": simulator.rest_url,
        "key_id": simulator.key_id,
        "key_file": simulator.key_file,
        "simulated": True,
    }
    return Exchange(**{**of, **other})


@pytest.fixture
def client(start_simulator: StartSimulator) -> Iterator[RestClient]:
    """A client of a simulator with 130 markets, without waits between attempts."""
    simulator = start_simulator(markets=130, rate=0, rolling_markets=0)
    with RestClient(exchange_of(simulator), sleep=lambda _: None) as client:
        yield client


# -- pages -------------------------------------------------------------------------------------


def test_every_used_resource_can_be_read(client: RestClient) -> None:
    assert client.status().exchange_active
    assert client.schedule().standard_hours
    assert abs(client.user_data_timestamp().timestamp() - time.time()) < 60
    assert client.account_limits().read == Bucket(bucket_capacity=200, refill_rate=200)
    (first, *_) = client.open_markets()
    assert client.market(first.ticker).ticker == first.ticker
    events = client.events(with_nested_markets=True)
    assert first.event_ticker in {event.event_ticker for event in events}
    assert all(event.markets for event in events)
    series = client.series(events[0].series_ticker)
    assert series in client.all_series()
    assert client.balance().balance_dollars == "100000.0000"
    assert [*client.positions(), *client.fills(), *client.settlements()] == []


def test_all_pages_of_a_list_are_read(client: RestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [market.ticker for market in client.open_markets()]
    monkeypatch.setattr("kalshi_platform.exchange.rest.ITEMS_PER_PAGE", 7)
    assert [market.ticker for market in client.open_markets()] == whole
    assert len(set(whole)) == 130


def test_many_tickers_are_requested_in_batches(client: RestClient) -> None:
    known = [market.ticker for market in client.open_markets()]
    assert len(known) > TICKERS_PER_REQUEST
    found = client.markets(tickers=[*known, *known, *(f"{t}-{'X' * 60}" for t in known)])
    assert sorted(market.ticker for market in found) == sorted(known)
    books = client.orderbooks(known)
    assert list(books) == known
    for ticker in known[:3]:
        assert books[ticker] == client.orderbook(ticker)


def test_a_book_ascends_in_exact_decimals(client: RestClient) -> None:
    book = client.orderbook(client.open_markets()[0].ticker)
    for ladder in (book.yes_dollars, book.no_dollars):
        prices = [Decimal(price) for price, _ in ladder or ()]
        assert prices == sorted(prices)
        assert all(Decimal(size) > 0 for _, size in ladder or ())


def test_unknown_tickers_are_returned(client: RestClient) -> None:
    known = client.open_markets()[0].ticker
    odd = {"NO-SUCH", "A/B C&D=E%,F", "Ü"}
    assert client.unknown_tickers([*odd, known]) == odd
    assert client.unknown_tickers([known]) == client.unknown_tickers([]) == set()


def test_open_markets_belong_to_the_series(client: RestClient) -> None:
    series = client.all_series()
    by_series = {one.ticker: {m.ticker for m in client.open_markets(one.ticker)} for one in series}
    assert sum(map(len, by_series.values())) == 130
    assert client.open_markets("NO-SUCH-SERIES") == []


def test_markets_are_filtered_by_close_and_by_update_time(
    start_simulator: StartSimulator,
) -> None:
    lifetime_s = long_lives(2)
    simulator = start_simulator(markets=6, rate=50, rolling_markets=2, rolling_seconds=lifetime_s)
    with RestClient(exchange_of(simulator)) as client:
        now = int(time.time())
        rolling = {m.ticker for m in client.markets(min_updated_ts=now - 2 * int(lifetime_s))}
        assert len(rolling) == 4, "two that are open, two that come next; the others only traded"
        closing = {m.ticker for m in client.markets(min_close_ts=now + 86_400)}
        assert len(closing) == 4
        assert not closing & rolling


def test_an_unknown_name_is_reported(client: RestClient) -> None:
    with pytest.raises(ExchangeError, match=r"/markets/NO%2FSUCH.*Check the name"):
        client.market("NO/SUCH")


def test_public_pages_need_no_key(start_simulator: StartSimulator, tmp_path: Path) -> None:
    simulator = start_simulator(markets=2, rate=0, rolling_markets=0)
    exchange = exchange_of(simulator, key_file=tmp_path / "missing.pem")
    with RestClient(exchange, signed=False) as client:
        assert len(client.open_markets()) == 2
        with pytest.raises(CredentialsError, match="PROD_KEYID and PROD_KEYFILE"):
            client.balance()
    with pytest.raises(CredentialsError, match=r"missing\.pem does not exist"):
        RestClient(exchange)


# -- failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["rest429:3", "rest500:3"])
def test_a_transient_failure_is_retried(client: RestClient, fault: str) -> None:
    with _faulty(fault) as (start, sleeps), start() as faulty:
        assert faulty.status().exchange_active
    assert len(sleeps) == 3
    assert client.status().exchange_active


@contextmanager
def _faulty(fault: str) -> Iterator[tuple[Callable[[], RestClient], list[float]]]:
    from kalshi_platform.simulator.config import SimulatorConfig
    from kalshi_platform.simulator.server import running

    sleeps: list[float] = []
    config = SimulatorConfig(markets=1, rate=0, rolling_markets=0, faults=(Fault.parse(fault),))
    with running(config) as simulator:
        exchange = exchange_of(simulator)
        yield lambda: RestClient(exchange, signed=False, sleep=sleeps.append), sleeps


@pytest.mark.parametrize(
    ("fault", "kind"), [("rest429:99", RateLimited), ("rest500:99", Unreachable)]
)
def test_a_lasting_failure_is_raised_after_the_retries(
    fault: str, kind: type[ExchangeError]
) -> None:
    with _faulty(fault) as (start, sleeps), start() as faulty, pytest.raises(kind):
        faulty.status()
    assert len(sleeps) == ATTEMPTS - 1


def test_a_wrong_key_is_reported_and_not_retried(
    start_simulator: StartSimulator, tmp_path: Path
) -> None:
    simulator = start_simulator(markets=1, rate=0, rolling_markets=0)
    other = tmp_path / "other.pem"
    other.touch(mode=0o600)
    other.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    sleeps: list[float] = []
    for exchange, sentence in (
        (exchange_of(simulator, key_file=other), "PROD_KEYFILE is not the one"),
        (exchange_of(simulator, key_id="an-unknown-id"), "does not know PROD_KEYID"),
    ):
        with (
            RestClient(exchange, sleep=sleeps.append) as client,
            pytest.raises(CredentialsError, match=sentence) as refused,
        ):
            client.balance()
        assert "an-unknown-id" not in str(refused.value) + repr(client)
    assert sleeps == []


@pytest.mark.parametrize(("off_s", "where"), [(-65, "behind"), (65, "ahead of")])
def test_clock_skew_is_measured(
    start_simulator: StartSimulator, monkeypatch: pytest.MonkeyPatch, off_s: int, where: str
) -> None:
    simulator = start_simulator(markets=1, rate=0, rolling_markets=0)
    exchange = exchange_of(simulator)
    credentials = Credentials(
        exchange.key_id,
        load_signer(exchange.key_file),
        clock_ms=lambda: int((time.time() + off_s) * 1000),
    )
    with RestClient(exchange, credentials=credentials) as client:
        # This machine's clock as the client sees it, whatever the latency of the response.
        monkeypatch.setattr(
            "kalshi_platform.exchange.rest.clock_skew_s",
            lambda headers, now_s: clock_skew_s(
                headers, parsedate_to_datetime(headers["date"]).timestamp() + 0.5 + off_s
            ),
        )
        with pytest.raises(CredentialsError, match=rf" 65 s {where}.*NTP"):
            client.balance()


def test_an_agreeing_clock_shows_no_skew(client: RestClient) -> None:
    asked = time.monotonic()
    client.status()
    assert client.clock_skew_s is not None
    assert abs(client.clock_skew_s) < 2 + time.monotonic() - asked


def test_a_cached_answer_is_as_old_as_its_age() -> None:
    headers = {"date": formatdate(1_000_000, usegmt=True), "age": "12"}
    assert clock_skew_s(headers, 1_000_012.5) == 0
    assert clock_skew_s({}, 0) is None
    assert clock_skew_s({"date": "yesterday"}, 0) is None


def test_an_unreachable_exchange_names_what_to_start(tmp_path: Path) -> None:
    exchange = Exchange("ws://127.0.0.1:9", "http://127.0.0.1:9", "id", tmp_path, simulated=True)
    with (
        RestClient(exchange, signed=False, sleep=lambda _: None) as client,
        pytest.raises(Unreachable, match="kalshi-platform simulate"),
    ):
        client.status()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ('{"error":{"code":"a","message":"b","details":"c"}}', "a: b: c"),
        ('{"code":"a","message":"b","details":"c"}', "a: b: c"),
        ('{"msg":"Parameter validation failed"}', "Parameter validation failed"),
        ('{"error":"too many requests"}', "too many requests"),
        ('{"error":{"code":"a","message":"a"}}', "a"),
        ("<html>\n502 Bad Gateway</html>", "<html> 502 Bad Gateway</html>"),
        ('"odd"', "odd"),
        ("null", "None"),
        ("", ""),
    ],
)
def test_every_shape_of_error_is_read(body: str, text: str) -> None:
    assert str(decode_refusal(body.encode())) == text


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ExchangeError),
        (401, Unreachable),
        (403, Unreachable),
        (404, ExchangeError),
        (429, RateLimited),
        (500, Unreachable),
        (502, Unreachable),
    ],
)
def test_every_status_has_its_error(status: int, kind: type[ExchangeError]) -> None:
    assert type(refusal(status, b"", {})) is kind


@pytest.mark.parametrize(
    "body",
    [
        '{"error":{"code":"header_timestamp_expired","message":"header timestamp expired"}}',
        '{"error":{"code":"signature_is_missing_from_headers","message":"missing"}}',
        '{"error":{"code":"authentication_error","details":"INCORRECT_API_KEY_SIGNATURE"}}',
        '{"error":{"code":"authentication_error","details":"NOT_FOUND"}}',
    ],
)
@pytest.mark.parametrize("status", [401, 403])
def test_the_exchanges_own_refusals_of_a_key_are_final(status: int, body: str) -> None:
    assert type(refusal(status, body.encode(), {})) is CredentialsError


@pytest.mark.parametrize(
    "body",
    [
        "<html><title>403 Forbidden</title><center>CloudFront</center></html>",
        '{"error":{"code":"authentication_error","details":"OVERLOADED"}}',
        '{"error":{"code":"maintenance","details":"NOT_FOUND"}}',
        '{"message":"Forbidden"}',
        "authentication_error NOT_FOUND",
        '["authentication_error","NOT_FOUND"]',
        "",
    ],
)
@pytest.mark.parametrize("status", [401, 403])
def test_any_other_refusal_is_transient_and_reported(status: int, body: str) -> None:
    error = refusal(status, body.encode(), {}, what="GET /markets")
    assert type(error) is Unreachable
    assert f"GET /markets with HTTP {status}" in str(error)
    assert str(decode_refusal(body.encode())) in str(error)


@pytest.mark.parametrize(
    ("headers", "place"),
    [
        (
            {"location": "https://new.example/trade-api/v2?key=s3cr3t"},
            "to https://new.example/trade-api/v2 ",
        ),
        ({"location": "https://x/\r\nforged"}, r"to https://x/\\r\\nforged "),
        ({}, "without naming a target"),
    ],
)
def test_a_redirect_is_reported_with_its_target(headers: dict[str, str], place: str) -> None:
    for status in (301, 302, 307, 308):
        error = refusal(status, b"", headers)
        assert type(error) is ExchangeError
        assert re.search(place, str(error))
        assert "KALSHI_REST_URL and KALSHI_WS_URL" in str(error)
        assert "s3cr3t" not in str(error)


# -- answers that are not the simulator's --------------------------------------------------------


def test_recorded_responses_and_refusals_are_decoded() -> None:
    if not RECORDED.exists():
        pytest.skip(f"the recorded responses are missing: {RECORDED}")
    records = [json.loads(line) for line in RECORDED.read_text("utf-8").splitlines()]
    named = {record["name"]: record for record in records}
    refused = [record for record in records if (record["status"] or 0) >= 400]
    assert len(refused) > 10
    for record in refused:
        details = decode_refusal(json.dumps(record["body"]).encode())
        assert details.code or details.message, record
        error = refusal(record["status"], json.dumps(record["body"]).encode(), {})
        assert isinstance(error, CredentialsError) == (record["status"] == 401)

    bodies: dict[str, Any] = {}
    for record in records:
        if record["status"] == 200 and record["method"] == "GET":
            body = record["body"]
            bodies[urlsplit(record["path"]).path] = {**body, "cursor": ""}
    ticker = named["markets__single"]["body"]["market"]["ticker"]
    with _scripted(lambda path, _: bodies.get(path)) as exchange, _quiet(exchange) as client:
        assert client.status().trading_active
        assert client.account_limits().usage_tier == "basic"
        assert client.market(ticker).yes_bid_dollars == "0.4700"
        assert client.orderbook(ticker).yes_dollars == [("0.4700", "3.00")]
        assert client.markets()[0].price_ranges
        assert client.balance().balance_dollars == "98.0186"
        (position,) = client.positions()
        assert (position.ticker, position.position_fp) == (ticker, "3.00")
        fill = next(client.fills())
        assert fill.fee_cost == "0.017500"
        assert [trade.count_fp for trade in client.trades()][:2] == ["7.77", "10.00"]
        assert list(client.settlements()) == []


def test_pages_without_end_are_an_error() -> None:
    cursors = {"": "a", "a": "b", "b": "a"}

    def answer(_: str, query: dict[str, list[str]]) -> Any:
        return {"markets": [], "cursor": cursors[query.get("cursor", [""])[0]]}

    with (
        _scripted(answer) as exchange,
        _quiet(exchange) as client,
        pytest.raises(ProtocolError, match="same cursor twice"),
    ):
        client.markets()


@pytest.mark.parametrize("cursor", [{}, {"cursor": None}, {"cursor": ""}])
def test_a_list_ends_at_every_form_of_empty_cursor(cursor: dict[str, Any]) -> None:
    with (
        _scripted(lambda *_: {"markets": None, **cursor}) as exchange,
        _quiet(exchange) as client,
    ):
        assert client.markets() == []


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ({"other": 1}, "no 'market'"),
        ({"market": {"ticker": 5}}, r"GET /markets/T.*ticker"),
        ({"market": {"ticker": "T", "event_ticker": "E", "status": "active",
                     "volume_fp": 1.5}}, "volume_fp"),
        (["odd"], "cannot be read"),
    ],
)  # fmt: skip
def test_an_unreadable_response_is_a_protocol_error(answer: Any, sentence: str) -> None:
    with (
        _scripted(lambda *_: answer) as exchange,
        _quiet(exchange) as client,
        pytest.raises(ProtocolError, match=sentence),
    ):
        client.market("T")


def test_the_account_rate_limit_is_respected(start_simulator: StartSimulator) -> None:
    """The limit is read once, before the first request; later requests are paced by it."""
    paths: list[str] = []

    def answer(path: str, _: dict[str, list[str]]) -> Any:
        paths.append(path)
        if path.endswith("/account/limits"):
            bucket = {"bucket_capacity": 10, "refill_rate": 10}
            return {"read": bucket, "write": bucket}
        return {"exchange_active": True, "trading_active": True}

    simulator = start_simulator(markets=1, rate=0, rolling_markets=0)
    slept: list[float] = []
    with _scripted(answer) as scripted:
        exchange = exchange_of(simulator, rest_url=scripted.rest_url)
        with RestClient(exchange, sleep=slept.append) as client:
            # on a stopped clock: time that a busy machine takes would count as waiting
            client._limiter = RateLimiter(BASIC, clock=lambda: 0.0, sleep=slept.append)
            for _ in range(3):
                client.status()
    assert [path.removeprefix("/trade-api/v2") for path in paths] == [
        "/account/limits",
        *["/exchange/status"] * 3,
    ]
    assert slept == [1.0, 2.0]  # one request a second: the first is free, the next two wait


def test_a_token_bucket_allows_a_burst_then_keeps_the_rate() -> None:
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    pace = RateLimiter(Bucket(bucket_capacity=200, refill_rate=200), clock=lambda: now, sleep=sleep)
    times = []
    for _ in range(60):
        pace.take()
        times.append(now)
    assert times[19] == 0
    assert times[20] == pytest.approx(0.05)
    assert times[59] == pytest.approx(2.0)
    now += 100  # a pause accumulates no more than the capacity
    for _ in range(21):
        pace.take()
    assert now == pytest.approx(102.05)


@contextmanager
def _scripted(answer: Callable[[str, dict[str, list[str]]], Any]) -> Iterator[Exchange]:
    """An HTTP server on a real socket with canned responses; None is a 404."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            response = answer(parts.path, parse_qs(parts.query))
            body = response if isinstance(response, bytes) else json.dumps(response).encode()
            self.send_response(404 if response is None else 200)
            if isinstance(response, bytes):
                self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/trade-api/v2"
    try:
        yield Exchange("ws://127.0.0.1", url, "id", Path("none.pem"), simulated=False)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _quiet(exchange: Exchange) -> RestClient:
    return RestClient(exchange, signed=False, sleep=lambda _: None)


@pytest.mark.parametrize("body", [b'{"error":"\x9d"}', b"[" * 100_000, b"\xff\xfe<html>"])
def test_an_error_response_without_json_is_a_refusal(body: bytes) -> None:
    assert isinstance(refusal(400, body, {}), ExchangeError)


def test_an_oversized_response_is_not_read_to_its_end() -> None:
    bomb = gzip.compress(bytes(200 << 20), 9)  # 200 MiB in 200 kB
    with (
        _scripted(lambda *_: bomb) as exchange,
        _quiet(exchange) as client,
        pytest.raises(ProtocolError, match="longer than 64 MiB"),
    ):
        client.status()

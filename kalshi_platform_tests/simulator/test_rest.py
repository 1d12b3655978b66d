"""The REST interface over a real socket: pages, errors in all four shapes, caches, signatures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from kalshi_platform.exchange.signing import Credentials, load_signer
from kalshi_platform.simulator.server import Simulator
from kalshi_platform_tests.simulator_fixtures import StartSimulator

PRIVATE = [
    "/portfolio/balance",
    "/portfolio/positions",
    "/portfolio/fills",
    "/portfolio/orders",
    "/portfolio/settlements",
    "/account/limits",
    "/account/endpoint_costs",
]


@pytest.fixture
def client(simulator: Simulator) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=simulator.rest_url) as client:
        yield client


def get(client: httpx.Client, path: str, **params: Any) -> Any:
    response = client.get(path, params=params)
    assert response.status_code == 200, response.text
    return response.json()


def test_market_data_needs_no_signature_and_the_account_does(
    client: httpx.Client, simulator: Simulator
) -> None:
    credentials = Credentials(simulator.key_id, load_signer(simulator.key_file))
    for path in PRIVATE:
        refused = client.get(path)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "signature_is_missing_from_headers"
        headers = credentials.headers("GET", f"/trade-api/v2{path}")
        assert client.get(path, headers=dict(headers)).status_code == 200
    # the query string is not part of what is signed
    headers = credentials.headers("GET", "/trade-api/v2/portfolio/fills")
    paged = client.get("/portfolio/fills", params={"limit": 5}, headers=dict(headers))
    assert paged.status_code == 200
    for path in ["/exchange/status", "/exchange/schedule", "/exchange/user_data_timestamp"]:
        get(client, path)
    assert get(client, "/historical/cutoff")["market_settled_ts"].endswith("Z")


def test_pages_hold_every_market_once_and_end_with_no_cursor(
    client: httpx.Client, simulator: Simulator
) -> None:
    seen: list[str] = []
    cursor = ""
    while True:
        page = get(client, "/markets", limit=7, cursor=cursor)
        assert len(page["markets"]) <= 7
        seen += [each["ticker"] for each in page["markets"]]
        cursor = page["cursor"]
        if not cursor:
            break
    assert len(seen) == len(set(seen))
    assert set(seen) == set(simulator.books())


def test_a_cursor_that_means_nothing_begins_at_the_beginning(client: httpx.Client) -> None:
    first, garbage = (get(client, "/markets", limit=3, cursor=each) for each in ("", "garbage"))
    assert first["markets"][0]["ticker"] == garbage["markets"][0]["ticker"]


def test_markets_are_found_by_status_series_event_and_ticker(client: httpx.Client) -> None:
    everything = get(client, "/markets", limit=1000)["markets"]
    active = get(client, "/markets", limit=1000, status="open")["markets"]
    assert {each["status"] for each in active} == {"active"}
    assert {each["status"] for each in everything} > {"active"}
    one = active[0]
    event = get(client, "/markets", event_ticker=one["event_ticker"])["markets"]
    assert {each["event_ticker"] for each in event} == {one["event_ticker"]}
    series = get(client, "/markets", series_ticker="KXFED", limit=1000)["markets"]
    assert series
    assert all(listed_series["ticker"].startswith("KXFED-") for listed_series in series)
    wanted = f"{active[0]['ticker']},{active[-1]['ticker']},NO-SUCH"
    found = get(client, "/markets", tickers=wanted)["markets"]
    assert {each["ticker"] for each in found} == {active[0]["ticker"], active[-1]["ticker"]}
    assert get(client, "/markets", mve_filter="only")["markets"] == []
    assert get(client, "/markets", max_close_ts=1)["markets"] == []
    assert get(client, "/markets", min_settled_ts=0)["markets"] == []


def test_a_market_carries_what_a_recorder_needs(client: httpx.Client) -> None:
    for each in get(client, "/markets", limit=1000)["markets"][::9]:
        single = get(client, f"/markets/{each['ticker']}")["market"]
        assert single.keys() == each.keys()
        assert each["price_ranges"][0].keys() == {"start", "end", "step"}
        for name in ("yes_bid_dollars", "no_ask_dollars", "last_price_dollars"):
            assert len(each[name].split(".")[1]) == 4
        assert each["open_time"] < each["close_time"]
    structures = {
        each["price_level_structure"] for each in get(client, "/markets", limit=1000)["markets"]
    }
    assert len(structures) == 4


def test_the_four_shapes_of_an_error_can_be_had(client: httpx.Client, simulator: Simulator) -> None:
    too_many = client.get("/markets", params={"limit": 1001})
    assert (too_many.status_code, list(too_many.json())) == (400, ["msg"])
    flat = client.get("/markets", params={"limit": "many"})
    assert (flat.status_code, set(flat.json())) == (400, {"code", "message", "details"})
    missing = client.get("/markets/NO-SUCH-MARKET")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    simulator.inject("rest429")
    limited = client.get("/exchange/status")
    assert (limited.status_code, limited.json()) == (429, {"error": "too many requests"})
    assert client.get("/exchange/status").status_code == 200


@pytest.mark.parametrize(
    ("path", "params", "named"),
    [
        ("/markets", {"min_volume": 3}, "min_volume"),
        ("/exchange/status", {"limit": 5}, "limit"),
        ("/series/KXFED", {"depth": 1}, "depth"),
        ("/markets", {"status": "opened"}, "'opened' is not one of unopened, open"),
        ("/markets", {"min_close_ts": 0, "min_updated_ts": 0}, "close and updated"),
        ("/markets", {"min_close_ts": 0, "status": "open"}, "close cannot be combined"),
        ("/events", {"status": "opened"}, "'opened' is not one of unopened, open"),
        ("/events", {"with_nested_markets": "yes"}, "with_nested_markets 'yes'"),
        ("/markets", {"limit": ["1", "2"]}, "limit is given 2 times"),
        ("/markets/trades", {"ticker": "A", "max_time": 1}, "max_time"),
        ("/portfolio/positions", {"count_filter": "resting"}, "count_filter 'resting'"),
        ("/portfolio/balance", {"subaccount": 3}, "subaccount '3' does not exist"),
    ],
)
def test_what_a_page_cannot_use_is_refused_by_its_name(
    client: httpx.Client, simulator: Simulator, path: str, params: dict[str, Any], named: str
) -> None:
    credentials = Credentials(simulator.key_id, load_signer(simulator.key_file))
    headers = credentials.headers("GET", f"/trade-api/v2{path}")
    refused = client.get(path, params=params, headers=dict(headers))
    assert refused.status_code == 400
    assert named in refused.json()["details"]


def test_rest_faults_hit_the_next_requests_only(client: httpx.Client, simulator: Simulator) -> None:
    simulator.inject("rest500:2")
    simulator.inject("rest401")
    assert sorted(client.get("/markets").status_code for _ in range(4)) == [200, 401, 500, 500]


def test_events_and_series_are_there(client: httpx.Client) -> None:
    events = get(client, "/events", limit=200, with_nested_markets="true")["events"]
    assert sum(len(event["markets"]) for event in events) > 40
    one = get(client, f"/events/{events[0]['event_ticker']}")
    assert one["event"]["series_ticker"] == events[0]["series_ticker"]
    for each in get(client, "/series")["series"]:
        assert get(client, f"/series/{each['ticker']}")["series"] == each
    assert client.get("/series/NOPE").status_code == 404
    assert client.get("/events", params={"limit": 201}).status_code == 400


def test_a_rest_order_book_ascends_and_depth_keeps_the_best(
    start_simulator: StartSimulator,
) -> None:
    simulator = start_simulator(rate=0)
    books = simulator.books()
    ticker = max(books, key=lambda name: len(books[name].no))
    with httpx.Client(base_url=simulator.rest_url) as client:
        whole = get(client, f"/markets/{ticker}/orderbook")["orderbook_fp"]
        assert whole["no_dollars"] == [list(level) for level in books[ticker].texts()["no"]]
        best = get(client, f"/markets/{ticker}/orderbook", depth=3)["orderbook_fp"]
        assert best["no_dollars"] == whole["no_dollars"][-3:]
        empty = next(name for name, view in books.items() if not view.no and not view.yes)
        nothing = get(client, f"/markets/{empty}/orderbook")["orderbook_fp"]
        assert nothing == {"yes_dollars": [], "no_dollars": []}
        many = client.get("/markets/orderbooks", params={"tickers": [ticker, empty]}).json()
        assert [each["ticker"] for each in many["orderbooks"]] == [ticker, empty]
        assert many["orderbooks"][0]["orderbook_fp"] == whole
        for path, depth in ((f"/markets/{ticker}/orderbook", 101), ("/markets/orderbooks", 0)):
            assert client.get(path, params={"depth": depth}).status_code == 400


def test_a_rest_order_book_is_cached_and_the_truth_is_not(start_simulator: StartSimulator) -> None:
    simulator = start_simulator(markets=1, rolling_markets=0, rate=5_000, rest_cache_seconds=30)
    (ticker,) = simulator.books()
    with httpx.Client(base_url=simulator.rest_url) as client:
        first = client.get(f"/markets/{ticker}/orderbook")
        truth = simulator.books()
        while simulator.books() == truth:
            pass
        second = client.get(f"/markets/{ticker}/orderbook")
    assert first.json() == second.json()
    assert first.headers["x-cache"].startswith("Miss")
    assert second.headers["x-cache"].startswith("Hit")


def test_a_stale_order_book_outlives_its_cache(start_simulator: StartSimulator) -> None:
    simulator = start_simulator(markets=1, rolling_markets=0, rate=5_000, rest_cache_seconds=0)
    (ticker,) = simulator.books()
    with httpx.Client(base_url=simulator.rest_url) as client:
        path = f"/markets/{ticker}/orderbook"
        first = client.get(path).json()
        while client.get(path).json() == first:
            pass
        simulator.inject("stale_rest:60")
        stale = client.get(path).json()
        truth = simulator.books()
        while simulator.books() == truth:
            pass
        assert client.get(path).json() == stale


def test_trades_are_listed_newest_first(start_simulator: StartSimulator) -> None:
    simulator = start_simulator(rate=5_000)
    with httpx.Client(base_url=simulator.rest_url) as client:
        while len(trades := get(client, "/markets/trades", limit=5)["trades"]) < 5:
            pass
        times = [trade["created_time"] for trade in trades]
        assert len({trade["trade_id"] for trade in trades}) == 5
        assert times[0][:19] >= times[-1][:19]
        ticker = trades[0]["ticker"]
        same = get(client, "/markets/trades", ticker=ticker)["trades"]
        assert {each["ticker"] for each in same} == {ticker}
        assert get(client, "/markets/trades", min_ts=2**40)["trades"] == []


def test_the_simulators_own_pages_pause_and_take_faults(
    simulator: Simulator,
) -> None:
    with httpx.Client(base_url=simulator.control_url) as control:
        assert control.post("/pause").json() == {"paused": True}
        page = control.get("/books").json()
        assert page["paused"] is True
        assert page["books"] == control.get("/books").json()["books"]
        for ticker, view in simulator.books().items():
            assert page["books"][ticker]["yes"] == [list(level) for level in view.texts()["yes"]]
            assert page["books"][ticker]["market_id"] == view.market_id
        assert control.post("/resume").json() == {"paused": False}
        assert control.post("/faults", json={"fault": "gap:2"}).json() == {"accepted": ["gap"]}
        both = {"faults": ["rest500", "dial401"]}
        assert control.post("/faults", json=both).json() == {"accepted": ["rest500", "dial401"]}
        for nonsense in ({"fault": "gup"}, {}, {"faults": 3}):
            refused = control.post("/faults", json=nonsense)
            assert refused.status_code == 400
            assert "gap" in refused.json()["error"]
        state = control.get("/state").json()
        assert state["connections"] == []
        assert state["faults"]["rest500"] == 1


def test_an_unknown_page_is_an_error_object(client: httpx.Client) -> None:
    missing = client.get("/weather")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert client.post("/markets").status_code == 405

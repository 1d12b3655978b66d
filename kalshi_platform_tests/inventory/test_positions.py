"""Positions from the exchange: exact, signed, whole, and never flat because a report failed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import httpx
import pytest

from kalshi_platform.exchange import rest as rest_module
from kalshi_platform.exchange.errors import ExchangeError
from kalshi_platform.exchange.rest import RestClient
from kalshi_platform.inventory import positions
from kalshi_platform.inventory.positions import Held, PositionsBehind, Snapshot
from kalshi_platform.settings import Exchange
from kalshi_platform.simulator.book import NO, YES
from kalshi_platform.simulator.exchange import Exchange as Venue
from kalshi_platform.simulator.server import Simulator
from kalshi_platform_tests.inventory.planted import TICKER, Planted, ago
from kalshi_platform_tests.simulator_fixtures import StartSimulator

LONG_AGO_S = 30.0


@pytest.fixture
def simulator(start_simulator: StartSimulator) -> Simulator:
    """Markets in which nothing moves by itself."""
    return start_simulator(markets=6, rate=0.0, rolling_markets=0)


@pytest.fixture
def rest(simulator: Simulator) -> Iterator[RestClient]:
    """A client that gives up at once."""
    with client(simulator) as made:
        yield made


def client(simulator: Simulator) -> RestClient:
    exchange = Exchange(
        simulator.ws_url, simulator.rest_url, simulator.key_id, simulator.key_file, simulated=True
    )
    return RestClient(exchange, attempts=1)


def tickers(simulator: Simulator) -> list[str]:
    return list(simulator.books())


def hold(simulator: Simulator, ticker: str, signed: int, age_s: float = LONG_AGO_S) -> None:
    """Buy 1e-2 contracts, YES positive, at the lowest price, a while ago."""

    def trade(exchange: object) -> None:
        assert isinstance(exchange, Venue)
        market = exchange.market(ticker)
        assert market is not None
        side, name = (YES if signed > 0 else NO), f"order-{time.time_ns()}"
        price = market.listing.grid.prices[0]
        exchange.portfolio.place(
            market, side=side, price=price, qty=abs(signed), client_order_id=name,
            at_ns=exchange.now_ns,
        )  # fmt: skip
        everything = market.book.sizes[side][0]
        market.book.change(side, 0, -everything)
        ts_us = time.time_ns() // 1000 - int(age_s * 1e6)
        exchange.portfolio.spare(market, [(side, 0, -everything)], True, ts_us)

    simulator._call(lambda venue: trade(venue.exchange))


def archive_position(simulator: Simulator, ticker: str) -> None:
    """Remove a market from the report, as the exchange does with old positions."""

    def remove(exchange: object) -> None:
        assert isinstance(exchange, Venue)
        del exchange.portfolio._holdings[ticker]

    simulator._call(lambda venue: remove(venue.exchange))


def by_ticker(found: positions.Report) -> dict[str, Snapshot]:
    return {snapshot.market_ticker: snapshot for snapshot in found.snapshots}


def test_positions_are_exact_and_signed_with_the_raw_answer(
    simulator: Simulator, rest: RestClient
) -> None:
    first, second, third = tickers(simulator)[:3]
    hold(simulator, first, 12_34)
    hold(simulator, second, -5_67)
    hold(simulator, third, 10_00)
    hold(simulator, third, -4_00)
    found = by_ticker(positions.take(rest))
    assert {ticker: each.position for ticker, each in found.items()} == {
        first: Decimal("12.34"),
        second: Decimal("-5.67"),
        third: Decimal("6.00"),
    }
    assert all(each.source == "positions" for each in found.values())
    assert '"position_fp":"-5.67"' in found[second].raw_json
    assert '"exchange_index":0' in found[second].raw_json


def test_every_page_is_read(
    simulator: Simulator, rest: RestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest_module, "ITEMS_PER_PAGE", 2)
    for number, ticker in enumerate(tickers(simulator)):
        hold(simulator, ticker, 100 + number)
    found = by_ticker(positions.take(rest))
    assert sorted(found) == sorted(tickers(simulator))


@pytest.mark.parametrize("fault", ["rest500", "rest429", "rest401"])
def test_a_report_that_fails_raises_and_never_means_flat(
    simulator: Simulator, rest: RestClient, fault: str
) -> None:
    ticker = tickers(simulator)[0]
    hold(simulator, ticker, 100)
    rest.user_data_timestamp()  # the client knows its limits from here on
    known: dict[str, Held | None] = {
        ticker: Held(Decimal(1), datetime.now(UTC) - timedelta(minutes=5))
    }
    for first_pages in range(4):  # the fault hits each page in turn
        seen = positions.take(rest, known)
        assert by_ticker(seen)[ticker].position == 1
        with pytest.raises(ExchangeError):
            _take_with_a_fault(simulator, rest, known, fault, first_pages)


def _take_with_a_fault(
    simulator: Simulator,
    rest: RestClient,
    known: dict[str, Held | None],
    fault: str,
    after_pages: int,
) -> None:
    """Let `after_pages` pages pass, then fail."""
    fetch, passed = rest._fetch, 0

    def counted(path: str, params: rest_module.Params) -> bytes:
        nonlocal passed
        if passed == after_pages:
            simulator.inject(f"{fault}:1")
        passed += 1
        return fetch(path, params)

    rest._fetch = counted  # type: ignore[method-assign]
    try:
        positions.take(rest, known)
    finally:
        del rest._fetch


def test_pages_that_are_older_than_the_last_fill_are_not_taken(
    simulator: Simulator, rest: RestClient
) -> None:
    ticker = tickers(simulator)[0]
    hold(simulator, ticker, 100)
    httpx.post(
        f"{simulator.control_url}/portfolio", json={"frozen": True}, timeout=60
    ).raise_for_status()
    assert by_ticker(positions.take(rest))[ticker].position == 1  # frozen after the fill
    hold(simulator, ticker, 100, age_s=-1.0)
    slept: list[float] = []
    with pytest.raises(PositionsBehind, match="Nothing was written"):
        positions.take(rest, sleep=slept.append)
    assert len(slept) == positions.ATTEMPTS - 1
    httpx.post(
        f"{simulator.control_url}/portfolio", json={"frozen": False}, timeout=60
    ).raise_for_status()


def test_a_market_that_was_just_filled_is_left_for_another_look(
    simulator: Simulator, rest: RestClient
) -> None:
    quiet, busy = tickers(simulator)[:2]
    hold(simulator, quiet, 100)
    now = datetime.now(UTC)  # the report's clock: however long it takes to begin, the fill is new
    hold(simulator, busy, 200, age_s=0.0)
    found = positions.take(rest, attempts=1, clock=lambda: now)
    assert list(by_ticker(found)) == [quiet]
    assert found.left_out == {busy: "it was filled at that moment"}
    later = positions.take(rest, clock=lambda: datetime.now(UTC) + positions.QUIET)
    assert by_ticker(later)[busy].position == 2
    assert later.left_out == {}


def test_a_market_missing_in_the_report_is_flat_only_by_its_fills(
    simulator: Simulator, rest: RestClient
) -> None:
    flat, unknown, never = tickers(simulator)[:3]
    hold(simulator, flat, 300)
    hold(simulator, flat, -300)
    before = datetime.now(UTC) - timedelta(minutes=5)
    known = {flat: Held(Decimal(0), before), unknown: Held(Decimal(7), before), never: None}
    reported = by_ticker(positions.take(rest, known))[flat]
    assert (reported.position, reported.source) == (Decimal(0), "positions")
    archive_position(simulator, flat)
    found = positions.take(rest, known)
    assert {ticker: (each.position, each.source) for ticker, each in by_ticker(found).items()} == {
        flat: (Decimal(0), "absent"),
        never: (Decimal(0), "absent"),
    }
    assert found.left_out == {
        unknown: "the report leaves it out, but no fill or settlement says flat"
    }


def test_a_settled_market_is_flat_by_its_settlement(simulator: Simulator, rest: RestClient) -> None:
    ticker = tickers(simulator)[0]
    hold(simulator, ticker, 100)

    def settle(exchange: object) -> None:
        assert isinstance(exchange, Venue)
        market = exchange.market(ticker)
        assert market is not None
        market.result = "no"
        exchange._settle(market, exchange.now_ns)

    simulator._call(lambda venue: settle(venue.exchange))
    known = {ticker: Held(Decimal(1), datetime.now(UTC) - timedelta(seconds=5))}
    (snapshot,) = positions.take(rest, known).snapshots
    assert (snapshot.market_ticker, snapshot.position) == (ticker, Decimal(0))
    assert snapshot.source == "settlements"
    assert '"yes_count_fp":"1.00"' in snapshot.raw_json


def test_a_report_is_stored_once_and_known_the_next_time(
    planted: Planted, simulator: Simulator, rest: RestClient
) -> None:
    ticker = tickers(simulator)[0]
    hold(simulator, ticker, -12_34)
    planted.decision(ago(10), market_ticker=TICKER)
    known = positions.known_markets(planted.client)
    assert known == {TICKER: None}
    report = positions.take(rest, known)
    positions.store(planted.client, report)
    positions.store(planted.client, report)
    rows = planted.client.query(
        "SELECT market_ticker, pos_filled, source FROM mm_position_snapshots ORDER BY pos_filled"
    ).result_rows
    assert rows == [(ticker, -12.34, "positions"), (TICKER, 0.0, "absent")]
    held = positions.known_markets(planted.client)[ticker]
    assert held is not None
    assert held.position == Decimal("-12.34")

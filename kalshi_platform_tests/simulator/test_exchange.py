"""The exchange over time: markets that roll, and an order flow that the clock moves on."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from kalshi_platform.simulator.catalog import SECOND
from kalshi_platform.simulator.errors import SimulatorError
from kalshi_platform.simulator.exchange import Exchange
from kalshi_platform.simulator.frames import Cleared, Delta, Happening, LifeEvent, Quote, Trade
from kalshi_platform.simulator.market import ACTIVE, FINALIZED, INITIALIZED
from kalshi_platform.simulator.wire import Wire

NOON = 1_795_435_200 * SECOND


def exchange(
    markets: int = 10, rate: float = 500, rolling: int = 2, lifetime: float = 20
) -> Exchange:
    return Exchange(
        markets=markets,
        rate=rate,
        seed=7,
        now_ns=NOON,
        rolling_markets=rolling,
        rolling_seconds=lifetime,
    )


def messages(happenings: list[Happening]) -> list[object]:
    return [
        (type(event).__name__, event.msg(False, Wire.OCTOBER))
        if isinstance(event, Delta)
        else type(event).__name__
        for event in happenings
    ]


def test_events_do_not_depend_on_how_often_the_clock_is_read() -> None:
    one, many = exchange(), exchange()
    at_once = one.advance(NOON + 60 * SECOND)
    bit_by_bit = [
        each for ms in range(37, 60_001, 37) for each in many.advance(NOON + ms * 1_000_000)
    ]
    bit_by_bit += many.advance(NOON + 60 * SECOND)
    assert messages(at_once) == messages(bit_by_bit)
    assert one.books() == many.books()


def test_the_rate_is_that_of_all_deltas_together() -> None:
    busy = exchange(rolling=0, rate=1000)
    busy.advance(NOON + 60 * SECOND)
    assert busy.deltas == pytest.approx(60_000, rel=0.05)


def test_activity_varies_widely_over_markets() -> None:
    busy = exchange(markets=20, rolling=0, rate=1000)
    happened = busy.advance(NOON + 20 * SECOND)
    counts = Counter(event.market.ticker for event in happened if isinstance(event, Delta))
    assert max(counts.values()) > 8 * min(counts.values())


def test_a_rate_of_nothing_leaves_every_book_as_it_is() -> None:
    still = exchange(rate=0, rolling=0)
    before = still.books()
    assert still.advance(NOON + 3600 * SECOND) == []
    assert still.books() == before


def test_the_deltas_rebuild_every_book_and_a_clear_empties_it() -> None:
    lively = exchange()
    books = {ticker: (dict(view.yes), dict(view.no)) for ticker, view in lively.books().items()}
    for each in lively.advance(NOON + 45 * SECOND):
        if isinstance(each, Delta):
            ladder = books.setdefault(each.market.ticker, ({}, {}))[each.side]
            price = each.market.listing.grid.prices[each.level]
            ladder[price] = ladder.get(price, 0) + each.qty
        elif isinstance(each, Cleared):
            books[each.market.ticker] = ({}, {})
    for ticker, view in lively.books().items():
        yes, no = books.get(ticker, ({}, {}))
        assert {price: size for price, size in yes.items() if size} == view.yes
        assert {price: size for price, size in no.items() if size} == view.no


def test_a_rolling_slot_always_has_an_open_and_a_listed_market() -> None:
    rolling = exchange(markets=1, rolling=1, lifetime=15)
    seen = set()
    for second in range(1, 120):
        rolling.advance(NOON + second * SECOND)
        statuses = Counter(market.status for market in rolling.markets())
        assert statuses[ACTIVE] == 1
        assert statuses[INITIALIZED] == 1
        seen |= {market.ticker for market in rolling.markets() if market.status == ACTIVE}
    assert len(seen) == 8


def test_after_the_close_come_late_deltas_then_an_empty_book() -> None:
    rolling = exchange(markets=4, rolling=4, lifetime=10, rate=400)
    happened = rolling.advance(NOON + 300 * SECOND)
    cleared = {event.market.ticker: event for event in happened if isinstance(event, Cleared)}
    assert len(cleared) > 50
    late = 0
    for event in happened:
        if isinstance(event, Delta) and event.market.ticker in cleared:
            after = event.ts_us - event.market.listing.close_ns // 1000
            assert after <= 10_000
            late += after > 0
    assert late, "no delta was in flight at any close"
    for each in cleared.values():
        waited = each.ts_us - each.market.listing.close_ns // 1000
        assert 20_000 <= waited <= 3_200_000
        assert each.market.view().yes == {}
        assert each.market.view().no == {}


def test_scheduled_openings_and_closes_send_no_message() -> None:
    rolling = exchange(markets=1, rolling=1, lifetime=30)
    happened = rolling.advance(NOON + 200 * SECOND)
    life: dict[str, list[str]] = {}
    kinds: Counter[str] = Counter()
    for each in happened:
        if isinstance(each, LifeEvent):
            kinds[each.kind] += 1
            msg = json.loads(each.msg)
            if each.kind == "market_lifecycle_v2":
                life.setdefault(msg["market_ticker"], []).append(msg["event_type"])
    assert kinds["event_lifecycle"] >= 5
    finished = [
        market
        for market in rolling.markets()
        if market.status == FINALIZED and market.ticker in life
    ]
    whole = [list(dict.fromkeys(life[each.ticker])) for each in finished]
    assert ["created", "determined", "settled"] in whole
    assert not {"activated", "deactivated"} & {
        event for events in life.values() for event in events
    }
    assert all(each.result in {"yes", "no"} for each in finished)


def test_some_settlements_are_sent_several_times() -> None:
    rolling = exchange(markets=5, rolling=5, lifetime=5, rate=1)
    settled = Counter(
        json.loads(each.msg)["market_ticker"]
        for each in rolling.advance(NOON + 120 * SECOND)
        if isinstance(each, LifeEvent) and '"settled"' in each.msg
    )
    assert max(settled.values()) > 1
    assert min(settled.values()) == 1


def test_settled_markets_are_forgotten_after_an_hour() -> None:
    rolling = exchange(markets=2, rolling=2, lifetime=60, rate=0)
    rolling.advance(NOON + 6 * 3600 * SECOND)
    assert len(list(rolling.markets())) < 2 * 65


def test_an_opening_markets_first_book_comes_as_deltas() -> None:
    rolling = exchange(markets=1, rolling=1, lifetime=30)
    (coming,) = [market for market in rolling.markets() if market.status == INITIALIZED]
    happened = rolling.advance(coming.listing.open_ns)
    opening = [event for event in happened if isinstance(event, Delta) and event.market is coming]
    assert len(opening) > 10
    assert {each.ts_us for each in opening} == {coming.listing.open_ns // 1000}
    assert coming.status == ACTIVE


def test_the_matches_of_one_order_share_a_time_with_their_deltas() -> None:
    busy = exchange(rolling=0, rate=2000)
    happened = busy.advance(NOON + 10 * SECOND)
    times = {(event.market.ticker, event.ts_us) for event in happened if isinstance(event, Delta)}
    trades = [event for event in happened if isinstance(event, Trade)]
    assert trades
    assert {(trade.market.ticker, trade.ts_us) for trade in trades} <= times
    assert max(Counter((t.market.ticker, t.ts_us) for t in trades).values()) > 1


def test_a_quote_is_the_top_of_the_book() -> None:
    busy = exchange(rolling=0)
    happened = busy.advance(NOON + 10 * SECOND)
    last = {event.market.ticker: event for event in happened if isinstance(event, Quote)}
    for each in last.values():
        msg, view = json.loads(each.wire()), each.market.view()
        best_yes, best_no = max(view.yes, default=0), max(view.no, default=0)
        assert msg["yes_bid_dollars"] == f"{best_yes / 10_000:.4f}"
        assert msg["yes_ask_dollars"] == f"{1 - best_no / 10_000:.4f}"


def test_a_crossed_book_is_crossed_for_real_and_for_a_while() -> None:
    busy = exchange(rolling=0)
    happened = busy.cross(2.0)
    (crossed,) = [market for market in busy.markets() if market.book.crossed]
    assert any(isinstance(event, Delta) and event.market is crossed for event in happened)
    busy.advance(NOON + 1 * SECOND)
    assert crossed.book.crossed
    busy.advance(NOON + 3 * SECOND)
    assert not crossed.book.crossed


def test_an_empty_exchange_has_no_book_to_cross() -> None:
    lonely = exchange(markets=1, rolling=0)
    for market in lonely.markets():
        market.book.clear()
    with pytest.raises(SimulatorError, match="bids on both sides"):
        lonely.cross(1)


def test_order_flow_beyond_the_machines_speed_is_shed_and_counted() -> None:
    busy = exchange(rolling=0, rate=1000)
    busy.advance(NOON + 10 * SECOND, limit=100)
    assert busy.deltas < 1000
    assert busy.shed_seconds > 8


def test_a_closed_market_trades_no_more() -> None:
    rolling = exchange(markets=1, rolling=1, lifetime=10, rate=1000)
    happened = rolling.advance(NOON + 11 * SECOND)
    closed = {
        market.ticker for market in rolling.markets() if market.status not in {ACTIVE, INITIALIZED}
    }
    assert closed
    for event in happened:
        if isinstance(event, Trade) and event.market.ticker in closed:
            assert event.ts_us <= event.market.listing.close_ns // 1000 + 10_000

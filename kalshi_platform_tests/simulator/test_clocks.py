"""The clocks of order-book messages: the same for every client, and true under every fault."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.simulator.catalog import SECOND
from kalshi_platform.simulator.exchange import Exchange
from kalshi_platform.simulator.faults import Fault
from kalshi_platform.simulator.frames import Cleared, Delta, Trade
from kalshi_platform.simulator.market import CLOSED, INITIALIZED
from kalshi_platform.simulator.session import Session
from kalshi_platform.simulator.wire import CURRENT, Wire
from kalshi_platform_tests.properties import examples
from kalshi_platform_tests.simulator.ledger import Ledger

NOON = 1_795_435_200 * SECOND


def exchange(*, now_ns: int = NOON, rolling_markets: int = 0, markets: int = 3) -> Exchange:
    return Exchange(
        markets=markets,
        rate=300,
        seed=3,
        now_ns=now_ns,
        rolling_markets=rolling_markets,
        rolling_seconds=20,
    )


class Client:
    """One connection and what its client makes of it; a client that lost frames asks for the books again."""

    def __init__(self, source: Exchange, wire: Wire = CURRENT) -> None:
        self.tickers = [market.ticker for market in source.markets()]
        self.session = Session(source, random.Random(1), wire=wire)
        self.ledger = Ledger(wire=wire)
        self.actions: dict[tuple[str, int], list[tuple[str, str, str]]] = defaultdict(list)
        self.say("subscribe", channels=["orderbook_delta", "trade", "ticker"])

    def say(self, command: str, **params: Any) -> None:
        params = {"market_tickers": self.tickers, **params}
        self.session.receive(json.dumps({"id": 1, "cmd": command, "params": params}))
        while self.session.busy:
            self.session.work()
        self.listen()

    def listen(self) -> list[dict[str, Any]]:
        heard = [self.ledger.feed(frame) for frame in self.session.take()]
        for frame in heard:
            msg = frame.get("msg", {})
            if frame["type"] == "orderbook_delta" and "clock" in msg:
                key = msg["market_ticker"], msg["clock"]
                self.actions[key].append((msg["side"], msg["price_dollars"], msg["delta_fp"]))
        return heard

    def lose(self) -> None:
        """Lose what was sent since the last look: its numbers are gone, its changes, too."""
        for raw in self.session.take():
            frame = json.loads(raw)
            if "seq" in frame:
                self.ledger.seqs[frame["sid"]] = frame["seq"]
        self.say("update_subscription", sids=[1], action="get_snapshot")


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["wait", "lose", "snapshot", "readd", "reconnect", "own", "cross"]),
        st.integers(0, 1),
    ),
    max_size=10,
)


@examples(60)
@given(STEPS)
def test_clients_agree_on_the_clock_of_every_change(steps: list[tuple[str, int]]) -> None:
    source = exchange()
    clients = [Client(source), Client(source)]
    seen: list[Client] = list(clients)

    def publish(happened: list[Any]) -> None:
        for client in clients:
            client.session.publish(happened)

    for number, (what, at) in enumerate(steps):
        client = clients[at]
        client.listen()
        publish(source.advance(source.now_ns + SECOND // 5))
        if what == "lose":
            client.lose()
        elif what == "snapshot":
            client.say("update_subscription", sids=[1], action="get_snapshot")
        elif what == "readd":
            client.say("update_subscription", sids=[1], action="delete_markets")
            publish(source.advance(source.now_ns + SECOND // 5))
            client.say("update_subscription", sids=[1], action="add_markets")
        elif what == "reconnect":
            client.listen()
            clients[at] = Client(source)
            for ticker, clock in clients[at].ledger.clocks.items():
                same_clock = clock == client.ledger.clocks[ticker]
                assert not same_clock or (
                    clients[at].ledger.books[ticker] == client.ledger.books[ticker]
                )
            seen.append(clients[at])
        elif what == "own":
            market = next(iter(source.markets()))
            side, price = at, market.listing.grid.prices[0]
            source.portfolio.place(
                market, side=side, price=price, qty=100, client_order_id=f"o{number}", at_ns=NOON
            )
            publish(source.happened())
        elif what == "cross":
            publish(source.cross(0.1))
    for client in clients:
        client.listen()
        for market in source.markets():
            assert client.ledger.clocks[market.ticker] == market.clock
            assert client.ledger.view(market.ticker) == market.view()
    for one in seen:
        for other in seen:
            for key in one.actions.keys() & other.actions.keys():
                assert one.actions[key] == other.actions[key], key


def test_deltas_of_one_action_share_a_clock_and_each_trade_skips_one() -> None:
    source = exchange()
    start = {market.ticker: market.clock for market in source.markets()}
    happened = source.advance(NOON + 30 * SECOND)
    actions: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for event in happened:
        if isinstance(event, Delta):
            actions[event.market.ticker].append((event.clock, event.ts_us))
    trades = [event for event in happened if isinstance(event, Trade)]
    assert trades
    for market in source.markets():
        clocks = actions[market.ticker]
        assert clocks == sorted(clocks)
        distinct = {clock for clock, _ in clocks}
        assert len(set(clocks)) == len(distinct), "one action has one time"
        assert len(distinct) < len(clocks), "some actions have several deltas"
        own_trades = sum(trade.market is market for trade in trades)
        assert market.clock == max(distinct)
        assert market.clock - start[market.ticker] == len(distinct) + own_trades


def test_a_market_has_clock_0_until_its_first_change() -> None:
    source = exchange(rolling_markets=2)
    waiting = [market for market in source.markets() if market.status == INITIALIZED]
    assert waiting
    assert {market.clock for market in waiting} == {0}
    client = Client(source)
    assert {client.ledger.clocks[market.ticker] for market in waiting} == {0}
    client.session.publish(source.advance(NOON + 20 * SECOND))
    deltas = [f["msg"] for f in client.listen() if f["type"] == "orderbook_delta"]
    for market in waiting:
        first = next(msg for msg in deltas if msg["market_ticker"] == market.ticker)
        assert first["clock"] == 1


def test_emptying_a_closed_book_is_a_change_unless_it_was_empty() -> None:
    source = exchange(rolling_markets=2)
    client = Client(source)
    happened = source.advance(NOON + 24 * SECOND)
    client.session.publish(happened)
    client.listen()  # the ledger fails if another book comes with a clock that it knows
    cleared = [event.market for event in happened if isinstance(event, Cleared)]
    assert cleared
    for market in cleared:
        assert market.clock == client.ledger.clocks[market.ticker]
        clock, market.status = market.clock, CLOSED
        source._clear(market, source.now_ns)
        assert market.clock == clock, "an empty book has no order to remove"


def test_a_restarted_exchange_goes_on_above_the_old_clocks() -> None:
    before = exchange()
    before.advance(NOON + 10 * SECOND)
    after = exchange(now_ns=NOON + 11 * SECOND)
    for market in before.markets():
        restarted = after.market(market.ticker)
        assert restarted is not None
        assert restarted.clock > market.clock > 0


def test_only_a_reset_lowers_clocks_and_it_leaves_0_alone() -> None:
    source = exchange(rolling_markets=2)
    source.reset_clocks(0)
    for market in source.markets():
        assert market.clock == (0 if market.status == INITIALIZED else 1)


def test_nothing_is_traded_under_maintenance_and_clocks_stay() -> None:
    source = exchange()
    source.advance(NOON + SECOND)
    clocks = {market.ticker: market.clock for market in source.markets()}
    source.maintain(60)
    assert source.maintenance == (NOON + SECOND, NOON + 61 * SECOND)
    assert source.advance(NOON + 61 * SECOND - 1) == []
    assert {market.ticker: market.clock for market in source.markets()} == clocks
    assert source.advance(NOON + 62 * SECOND)
    assert source.shed_seconds == 0


@pytest.mark.parametrize(
    "fault", ["gap:3", "duplicate", "truncated", "negative", "malformed", "unknown_type", "huge:1"]
)
def test_clocks_are_true_on_a_connection_with_a_fault(fault: str) -> None:
    source = exchange()
    healthy, faulty = Client(source), Client(source)
    before = {market.ticker: market.clock for market in source.markets()}
    asked = Fault.parse(fault)
    faulty.session.tamper(asked.name, asked.count)
    happened = source.advance(NOON + 5 * SECOND)
    for client in (healthy, faulty):
        client.session.publish(happened)
    healthy.listen()
    altered = 0
    for raw in faulty.session.take():
        try:
            frame = json.loads(raw)
        except json.JSONDecodeError:
            altered += 1
            continue
        msg = frame["msg"]
        if frame["type"] == "orderbook_snapshot":
            assert msg["clock"] == before[msg["market_ticker"]]
        elif frame["type"] == "orderbook_delta":
            change = msg["side"], msg["price_dollars"], msg["delta_fp"]
            altered += change not in healthy.actions[msg["market_ticker"], msg["clock"]]
    assert altered == (asked.name in {"truncated", "negative", "malformed"})


def test_a_clock_that_fell_is_found_by_a_client_that_looks() -> None:
    source = exchange()
    client = Client(source)
    client.session.tamper("clock_fell", 1)
    client.session.publish(source.advance(NOON + SECOND))
    with pytest.raises(AssertionError, match="clock"):
        client.listen()


def test_the_wire_of_august_has_neither_clock_nor_time_of_sending() -> None:
    source = exchange()
    client = Client(source, Wire.AUGUST)
    client.session.publish(source.advance(NOON + 5 * SECOND))
    client.listen()  # the ledger fails on either
    assert client.ledger.kinds["orderbook_delta"] > 100
    assert client.ledger.kinds["trade"] > 0
    times = {f["msg"]["ts"] for f in client.ledger.frames if f["type"] == "orderbook_delta"}
    assert max(map(len, times)) == len("2026-11-22T12:00:00.123456Z")

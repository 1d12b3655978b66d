"""The exchange's side of a connection, fed by hand: commands in, frames out."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalshi_platform.exchange.drift import examine
from kalshi_platform.simulator.catalog import SECOND
from kalshi_platform.simulator.exchange import Exchange
from kalshi_platform.simulator.session import Session
from kalshi_platform.simulator.wire import Wire
from kalshi_platform_tests.simulator.ledger import SEQUENCED, Ledger

NOON = 1_795_435_200 * SECOND


class Bench:
    """An exchange, one session on it, and a client that keeps the books from its frames."""

    def __init__(self, *, markets: int = 6, use_yes_price: bool = False, seed: int = 1) -> None:
        self.exchange = Exchange(
            markets=markets,
            rate=400,
            seed=seed,
            now_ns=NOON,
            rolling_markets=0,
            rolling_seconds=60,
        )
        self.tickers = [market.ticker for market in self.exchange.markets()]
        self.session = Session(self.exchange, random.Random(seed))
        self.ledger = Ledger(use_yes_price=use_yes_price)

    def say(self, *commands: dict[str, Any]) -> list[dict[str, Any]]:
        """Send commands that are in flight together; returns what comes until all is done."""
        for command in commands:
            self.session.receive(json.dumps(command))
        while self.session.busy:
            self.session.work()
        return self.listen()

    def listen(self) -> list[dict[str, Any]]:
        return [self.ledger.feed(frame) for frame in self.session.take()]

    def wait(self, seconds: float) -> list[dict[str, Any]]:
        happened = self.exchange.advance(self.exchange.now_ns + int(seconds * SECOND))
        self.session.publish(happened)
        return self.listen()

    def subscribe(self, *tickers: str, **params: Any) -> list[dict[str, Any]]:
        channels = ["orderbook_delta"]
        return self.say(
            {
                "id": 1,
                "cmd": "subscribe",
                "params": {"channels": channels, "market_tickers": list(tickers), **params},
            }
        )

    def assert_books_are_right(self, *tickers: str) -> None:
        for ticker in tickers:
            market = self.exchange.market(ticker)
            assert market is not None
            assert self.ledger.view(ticker) == market.view()


def update(action: str | None, *tickers: str, **more: Any) -> dict[str, Any]:
    params: dict[str, Any] = {"sids": [1], **more}
    if action is not None:
        params["action"] = action
    if tickers:
        params["market_tickers"] = list(tickers)
    return {"id": 2, "cmd": "update_subscription", "params": params}


def kinds(frames: list[dict[str, Any]]) -> list[str]:
    return [frame["type"] for frame in frames]


def test_snapshots_count_from_one_after_the_acknowledgement() -> None:
    bench = Bench()
    first, *snapshots = bench.subscribe(*bench.tickers[:3])
    assert first == {
        "type": "subscribed",
        "id": 1,
        "msg": {"channel": "orderbook_delta", "sid": 1},
    }
    assert [(frame["sid"], frame["seq"]) for frame in snapshots] == [(1, 1), (1, 2), (1, 3)]
    bench.assert_books_are_right(*bench.tickers[:3])


def test_deltas_of_all_markets_share_seq_and_rebuild_books() -> None:
    bench = Bench()
    bench.subscribe(*bench.tickers)
    deltas = bench.wait(10)
    assert len({frame["msg"]["market_ticker"] for frame in deltas}) > 3
    assert bench.ledger.seqs[1] == len(bench.tickers) + len(deltas)
    bench.assert_books_are_right(*bench.tickers)


def test_subscribing_again_adds_to_the_sid_and_resends_nothing() -> None:
    bench = Bench()
    a, b, *_ = bench.tickers
    bench.subscribe(a)
    again = bench.subscribe(a, b)
    assert kinds(again) == ["ok", "orderbook_snapshot"]
    ok, snapshot = again
    assert (ok["sid"], ok["seq"], ok["msg"]) == (1, 2, {"market_tickers": sorted([a, b])})
    assert (snapshot["seq"], snapshot["msg"]["market_ticker"]) == (3, b)
    assert kinds(bench.subscribe(a, b)) == ["ok"]


@pytest.mark.parametrize("wire", list(Wire))
def test_no_frame_has_what_the_recorder_does_not_know(wire: Wire) -> None:
    source = Exchange(
        markets=6, rate=400, seed=1, now_ns=NOON, rolling_markets=3, rolling_seconds=10
    )
    session = Session(source, random.Random(1), wire=wire)
    everything = {
        "channels": ["orderbook_delta", "trade", "ticker", "market_lifecycle_v2"],
        "market_tickers": [market.ticker for market in source.markets()],
    }
    commands: list[dict[str, Any]] = [
        {"id": 1, "cmd": "subscribe", "params": everything},
        {"id": 2, "cmd": "subscribe", "params": everything},
        {"id": 3, "cmd": "list_subscriptions"},
        {"id": 4, "cmd": "subscribe"},
        update("get_snapshot"),
    ]
    for command in commands:
        session.receive(json.dumps(command))
        session.work()
    session.publish(source.advance(NOON + 40 * SECOND))
    session.receive(json.dumps({"id": 5, "cmd": "unsubscribe", "params": {"sids": [2]}}))
    session.work()
    session.overflow()
    seen: dict[str, list[Any]] = {}
    for raw in session.take():
        frame = json.loads(raw)
        seen.setdefault(frame["type"], []).extend(examine(frame))
    assert seen == {kind: [] for kind in seen}
    assert seen.keys() >= {
        "subscribed", "ok", "unsubscribed", "error", "orderbook_snapshot", "orderbook_delta",
        "trade", "ticker", "market_lifecycle_v2", "event_lifecycle",
    }  # fmt: skip


def test_the_ticker_list_of_an_ack_can_be_left_out() -> None:
    bench = Bench()
    bench.subscribe(bench.tickers[0])
    (ok, _) = bench.subscribe(bench.tickers[1], skip_ticker_ack=True)
    assert ok["msg"] == {}
    assert ok["seq"] == 2


def test_commands_in_flight_are_answered_in_another_order() -> None:
    orders = set()
    for seed in range(8):
        bench = Bench(seed=seed)
        answers = bench.say(
            *(
                {
                    "id": number,
                    "cmd": "subscribe",
                    "params": {"channels": ["orderbook_delta"], "market_ticker": ticker},
                }
                for number, ticker in enumerate(bench.tickers[:4], 1)
            )
        )
        replies = [frame for frame in answers if "id" in frame]
        assert kinds(replies) == ["subscribed", "ok", "ok", "ok"]
        orders.add(tuple(frame["id"] for frame in replies))
    assert len(orders) > 1


def test_later_snapshots_come_between_deltas_of_earlier_tickers() -> None:
    bench = Bench()
    bench.subscribe(bench.tickers[0])
    bench.session.receive(
        json.dumps(update("add_markets", *bench.tickers[1:], skip_ticker_ack=True))
    )
    seen: list[str] = []
    while bench.session.busy:
        bench.session.work(snapshots=1)
        seen += kinds(bench.listen())
        seen += kinds(bench.wait(1))
    assert seen[0] == "ok"
    last_snapshot = len(seen) - seen[::-1].index("orderbook_snapshot")
    assert "orderbook_delta" in seen[:last_snapshot]
    bench.assert_books_are_right(*bench.tickers)


def test_an_unknown_ticker_is_an_empty_book_and_uses_a_seq() -> None:
    bench = Bench()
    _, snapshot = bench.subscribe("NO-SUCH-MARKET")
    assert snapshot["msg"] == {"market_ticker": "NO-SUCH-MARKET", "market_id": "", "clock": 0}
    assert snapshot["seq"] == 1


def test_get_snapshot_sends_the_books_again_on_the_same_sid() -> None:
    bench = Bench()
    a, b, *_ = bench.tickers
    bench.subscribe(a, b)
    bench.wait(3)
    before = bench.ledger.seqs[1]
    (again,) = bench.say(update("get_snapshot", a))
    assert (again["type"], again["id"], again["seq"]) == ("orderbook_snapshot", 2, before + 1)
    bench.wait(3)
    bench.assert_books_are_right(a, b)


def test_get_snapshot_without_tickers_is_error_14_with_a_seq() -> None:
    bench = Bench()
    bench.subscribe(bench.tickers[0])
    assert bench.say(update("get_snapshot")) == [
        {"type": "error", "sid": 1, "seq": 2, "msg": {"code": 14, "msg": "Market Ticker required"}}
    ]
    assert bench.say(update("get_snapshot", market_ticker=bench.tickers[0]))[0]["seq"] == 3


def test_a_snapshot_without_subscription_brings_no_deltas() -> None:
    bench = Bench()
    a, b, *_ = bench.tickers
    bench.subscribe(a)
    (snapshot,) = bench.say(update("get_snapshot", b))
    assert snapshot["msg"]["market_ticker"] == b
    assert {frame["msg"]["market_ticker"] for frame in bench.wait(10)} == {a}


def test_deleted_markets_return_with_a_new_snapshot() -> None:
    bench = Bench()
    a, b, *_ = bench.tickers
    bench.subscribe(a, b)
    (ok,) = bench.say(update("delete_markets", a))
    assert ok["msg"] == {"market_tickers": [b]}
    assert a not in {frame["msg"]["market_ticker"] for frame in bench.wait(5)}
    assert kinds(bench.say(update("add_markets", a))) == ["ok", "orderbook_snapshot"]
    bench.wait(5)
    bench.assert_books_are_right(a, b)


def test_unsubscribing_uses_a_seq_and_a_new_sid_follows() -> None:
    bench = Bench()
    bench.subscribe(bench.tickers[0])
    (gone,) = bench.say({"id": 9, "cmd": "unsubscribe", "params": {"sids": [1]}})
    assert gone == {"type": "unsubscribed", "id": 9, "sid": 1, "seq": 2}
    assert bench.wait(5) == []
    subscribed, snapshot = bench.subscribe(bench.tickers[0])
    assert subscribed["msg"]["sid"] == 2
    assert (snapshot["sid"], snapshot["seq"]) == (2, 1)


def test_subscriptions_are_listed_as_an_array() -> None:
    bench = Bench()
    bench.subscribe(bench.tickers[0])
    bench.say({"id": 4, "cmd": "subscribe", "params": {"channels": ["ticker", "fill"]}})
    (listed,) = bench.say({"id": 5, "cmd": "list_subscriptions"})
    assert listed == {
        "type": "ok",
        "id": 5,
        "msg": [
            {"channel": "orderbook_delta", "sid": 1},
            {"channel": "ticker", "sid": 2},
            {"channel": "fill", "sid": 3},
        ],
    }


def test_no_side_prices_are_on_the_yes_scale_where_asked() -> None:
    plain, yes_priced = Bench(), Bench(use_yes_price=True)
    ticker = plain.tickers[0]
    _, plain_snapshot = plain.subscribe(ticker, use_yes_price=False)
    _, mirrored = yes_priced.subscribe(ticker, use_yes_price=True)
    assert plain_snapshot["msg"]["yes_dollars_fp"] == mirrored["msg"]["yes_dollars_fp"]
    assert plain_snapshot["msg"]["no_dollars_fp"] != mirrored["msg"]["no_dollars_fp"]
    plain.wait(10)
    yes_priced.wait(10)
    plain.assert_books_are_right(ticker)
    yes_priced.assert_books_are_right(ticker)


def test_the_ticker_channel_has_no_seq_and_the_trade_channel_has() -> None:
    bench = Bench()
    channels = ["ticker", "trade", "market_lifecycle_v2"]
    bench.say({"id": 1, "cmd": "subscribe", "params": {"channels": channels}})
    frames = bench.wait(20)
    assert {"ticker", "trade"} == set(kinds(frames))
    assert all(("seq" in frame) == (frame["type"] == "trade") for frame in frames)
    again = bench.say({"id": 2, "cmd": "subscribe", "params": {"channels": ["ticker"]}})
    assert "seq" not in again[0]


def test_a_filtered_trade_subscription_has_its_markets_only() -> None:
    bench = Bench()
    only = bench.tickers[0]
    params = {"channels": ["trade"], "market_ticker": only}
    bench.say({"id": 1, "cmd": "subscribe", "params": params})
    assert {frame["msg"]["market_ticker"] for frame in bench.wait(30)} == {only}


def test_an_initial_ticker_can_be_asked_for() -> None:
    bench = Bench()
    params = {
        "channels": ["ticker"],
        "market_tickers": bench.tickers[:2],
        "send_initial_snapshot": True,
    }
    frames = bench.say({"id": 1, "cmd": "subscribe", "params": params})
    assert kinds(frames) == ["subscribed", "ticker", "ticker"]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ('{"id":3,"cmd":', 1),
        ({"id": -3, "cmd": "list_subscriptions"}, 11),
        ({"id": 3, "cmd": "subscribe"}, 2),
        ({"id": 3, "cmd": "subscribe", "params": {}}, 3),
        ({"id": 3, "cmd": "unsubscribe", "params": {}}, 4),
        ({"id": 3, "cmd": "update_subscription", "params": {"action": "add_markets"}}, 4),
        ({"id": 3, "cmd": "dance", "params": {}}, 5),
        ({"id": 3, "cmd": "unsubscribe", "params": {"sids": [99]}}, 7),
        ({"id": 3, "cmd": "subscribe", "params": {"channels": ["weather"]}}, 8),
        ({"id": 3, "cmd": "subscribe", "params": {"channels": "trade"}}, 11),
        (
            {
                "id": 3,
                "cmd": "subscribe",
                "params": {"channels": ["trade"], "market_ticker": "A", "market_tickers": ["B"]},
            },
            11,
        ),
        (
            {"id": 3, "cmd": "subscribe", "params": {"channels": ["ticker"], "market_ids": ["A"]}},
            11,
        ),
        (update("add_markets", "A", sids=[1, 2]), 12),
        (update("paint_markets", "A"), 13),
        ({"id": 3, "cmd": "subscribe", "params": {"channels": ["orderbook_delta"]}}, 14),
        (update("add_markets"), 14),
        (update(None, "A"), 15),
    ],
)
def test_a_bad_command_is_answered_with_its_code(command: Any, code: int) -> None:
    bench = Bench()
    bench.subscribe(bench.tickers[0])
    bench.session.receive(command if isinstance(command, str) else json.dumps(command))
    bench.session.work()
    (answer,) = bench.listen()
    assert answer["type"] == "error"
    assert answer["msg"]["code"] == code
    assert "seq" not in answer
    assert answer.get("id", 0) == (0 if isinstance(command, str) else max(command["id"], 0))


def test_too_many_commands_in_a_second_are_error_27() -> None:
    bench = Bench()
    for _ in range(10_000):
        bench.session.receive('{"id":1,"cmd":"list_subscriptions"}')
    assert bench.listen() == []
    bench.session.receive('{"id":2,"cmd":"list_subscriptions"}')
    (answer,) = bench.listen()
    assert (answer["id"], answer["msg"]["code"]) == (2, 27)


def test_a_subscription_holds_so_many_markets_and_no_more() -> None:
    bench = Bench()
    bench.session = Session(bench.exchange, random.Random(1), max_markets=2)
    (refused,) = bench.subscribe(*bench.tickers[:3])
    assert (refused["id"], refused["msg"]["code"]) == (1, 26)
    bench.subscribe(*bench.tickers[:2])
    assert [frame["msg"].get("code") for frame in bench.subscribe(bench.tickers[2])] == [26]
    (refused,) = bench.say(update("add_markets", bench.tickers[2]))
    assert refused["msg"]["code"] == 26
    bench.wait(5)
    bench.assert_books_are_right(*bench.tickers[:2])


def test_a_command_without_an_id_is_answered_without_one() -> None:
    bench = Bench()
    (answer,) = bench.say({"id": 0, "cmd": "list_subscriptions"})
    assert "id" not in answer


_TICKERS = st.lists(st.integers(0, 6), min_size=0, max_size=4)
_STEPS = st.one_of(
    st.tuples(st.just("wait"), st.floats(0.01, 1.0)),
    st.tuples(st.just("work"), st.integers(0, 3)),
    st.tuples(st.just("subscribe"), _TICKERS),
    st.tuples(st.just("add_markets"), _TICKERS),
    st.tuples(st.just("delete_markets"), _TICKERS),
    st.tuples(st.just("get_snapshot"), _TICKERS),
    st.tuples(st.just("unsubscribe"), st.integers(1, 4)),
    st.tuples(
        st.just("channels"), st.lists(st.sampled_from(["trade", "ticker", "fill"]), min_size=1)
    ),
    st.tuples(st.just("list"), st.none()),
)


@given(st.lists(_STEPS, max_size=30), st.booleans(), st.integers(0, 3))
@settings(max_examples=120, deadline=None)
def test_any_commands_keep_seqs_complete_and_books_right(
    steps: list[tuple[str, Any]], use_yes_price: bool, seed: int
) -> None:
    bench = Bench(use_yes_price=use_yes_price, seed=seed)
    names = [*bench.tickers, "UNKNOWN"]
    asked: list[int] = []

    def send(command: str, **params: Any) -> None:
        asked.append(len(asked) + 1)
        bench.session.receive(json.dumps({"id": asked[-1], "cmd": command, "params": params}))

    for what, argument in steps:
        if what == "wait":
            bench.wait(argument)
        elif what == "work":
            bench.session.work(snapshots=argument)
        elif what == "subscribe":
            send(
                "subscribe",
                channels=["orderbook_delta"],
                market_tickers=[names[at] for at in argument],
                use_yes_price=use_yes_price,
            )
        elif what == "channels":
            send("subscribe", channels=argument)
        elif what == "unsubscribe":
            send("unsubscribe", sids=[argument])
        elif what == "list":
            send("list_subscriptions")
        else:
            tickers = [names[at] for at in argument]
            send("update_subscription", sid=1, action=what, market_tickers=tickers)
        bench.listen()  # fails on a hole in seq, a delta without a snapshot, a negative level
    while bench.session.busy:
        bench.session.work()
    bench.wait(0.5)

    # every command is answered, save for an error on a sid, which names no command, and for
    # snapshots whose subscription ended before they could be sent
    scoped = sum(1 for f in bench.ledger.frames if f["type"] == "error" and "sid" in f)
    assert set(bench.ledger.replies) <= set(asked)
    silent = set(asked) - set(bench.ledger.replies)
    wanted_books = sum(1 for what, _ in steps if what == "get_snapshot")
    assert len(silent) <= scoped + wanted_books
    for subscription in bench.session.state():
        sid = subscription["sid"]
        expected = bench.ledger.seqs.get(sid, 0) if subscription["channel"] in SEQUENCED else None
        assert subscription["seq"] == expected
    for ticker in bench.session.live_tickers():
        bench.assert_books_are_right(ticker)

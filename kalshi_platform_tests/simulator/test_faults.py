"""Faults on request: each does what it says, and only a resync repairs what it broke."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from kalshi_platform.simulator.catalog import SECOND
from kalshi_platform.simulator.errors import SimulatorError
from kalshi_platform.simulator.exchange import Exchange
from kalshi_platform.simulator.faults import KINDS, Fault, Target
from kalshi_platform.simulator.session import Session
from kalshi_platform_tests.simulator.ledger import Ledger

NOON = 1_795_435_200 * SECOND


class Line:
    """One subscribed session, with a fault asked for."""

    def __init__(self, fault: str) -> None:
        self.exchange = Exchange(
            markets=5, rate=300, seed=3, now_ns=NOON, rolling_markets=0, rolling_seconds=60
        )
        self.tickers = [market.ticker for market in self.exchange.markets()]
        self.session = Session(self.exchange, random.Random(1))
        params = {"channels": ["orderbook_delta"], "market_tickers": self.tickers}
        self.send({"id": 1, "cmd": "subscribe", "params": params})
        self.before = self.session.take()
        asked = Fault.parse(fault)
        self.session.tamper(asked.name, asked.count)
        self.session.publish(self.exchange.advance(NOON + 5 * SECOND))
        self.after = self.session.take()

    def send(self, command: dict[str, object]) -> None:
        self.session.receive(json.dumps(command))
        while self.session.busy:
            self.session.work()

    def rebuilt(self, frames: list[bytes]) -> Ledger:
        ledger = Ledger()
        for frame in frames:
            ledger.feed(frame)
        return ledger

    def seqs(self) -> list[int]:
        return [json.loads(frame)["seq"] for frame in self.after]


def test_a_gap_loses_deltas_that_changed_the_book_and_their_seqs() -> None:
    line = Line("gap:2")
    seqs = line.seqs()
    assert seqs[0] == 5 + 3, "seqs 6 and 7 are lost"
    assert seqs == list(range(8, 8 + len(seqs)))
    # a client that ignores the hole has wrong books for ever
    ledger = Ledger()
    for frame in line.before:
        ledger.feed(frame)
    ledger.seqs[1] += 2
    wrong = False
    for frame in line.after:
        try:
            ledger.feed(frame)
        except AssertionError:
            wrong = True  # a negative level shows it, too
    books = line.exchange.books()
    assert wrong or any(ledger.view(ticker) != books[ticker] for ticker in line.tickers)
    # and a resync repairs them; a clock proves nothing to a client that went on after the gap
    ledger.clocks.clear()
    params = {"sids": [1], "market_tickers": line.tickers, "action": "get_snapshot"}
    line.send({"id": 2, "cmd": "update_subscription", "params": params})
    for frame in line.session.take():
        ledger.feed(frame)
    assert {ticker: ledger.view(ticker) for ticker in line.tickers} == books


def test_a_duplicate_is_the_same_frame_again() -> None:
    line = Line("duplicate")
    assert line.after[0] == line.after[1]
    line.rebuilt(line.before + line.after[1:])


def test_a_truncated_frame_is_half_a_delta_and_uses_its_seq() -> None:
    line = Line("truncated")
    with pytest.raises(json.JSONDecodeError):
        json.loads(line.after[0])
    assert json.loads(line.after[1])["seq"] == 7


def test_a_malformed_frame_is_extra_and_uses_no_seq() -> None:
    line = Line("malformed:2")
    for frame in line.after[:2]:
        with pytest.raises(json.JSONDecodeError):
            json.loads(frame)
    line.rebuilt(line.before + line.after[2:])


def test_an_unknown_type_uses_a_seq_on_the_order_book_sid() -> None:
    line = Line("unknown_type")
    assert json.loads(line.after[0])["type"] == "orderbook_weather"
    line.rebuilt(line.before + line.after)


def test_a_negative_delta_takes_out_more_than_there_is() -> None:
    line = Line("negative")
    with pytest.raises(AssertionError):
        line.rebuilt(line.before + line.after[:1])
    assert line.seqs() == list(range(6, 6 + len(line.after)))


def test_a_huge_frame_is_above_a_mebibyte_and_true() -> None:
    line = Line("huge:2")
    assert len(line.after[0]) > 2 << 20
    ledger = line.rebuilt(line.before + line.after)
    assert {ticker: ledger.view(ticker) for ticker in line.tickers} == line.exchange.books()


@pytest.mark.parametrize(("fault", "code"), [("error10", 10), ("error25", 25)])
def test_a_terminal_error_uses_a_seq_and_ends_the_subscription(fault: str, code: int) -> None:
    line = Line(fault)
    (last,) = line.after
    error = json.loads(last)
    assert (error["sid"], error["seq"], error["msg"]["code"]) == (1, 6, code)
    line.rebuilt(line.before + line.after)
    line.send({"id": 3, "cmd": "unsubscribe", "params": {"sids": [1]}})
    assert json.loads(line.session.take()[0])["msg"]["code"] == 7


def test_a_fault_waits_for_the_first_subscription() -> None:
    exchange = Exchange(
        markets=2, rate=300, seed=3, now_ns=NOON, rolling_markets=0, rolling_seconds=60
    )
    session = Session(exchange, random.Random(1))
    session.tamper("error10", 0)
    params = {"channels": ["orderbook_delta"], "market_tickers": list(exchange.books())}
    session.receive(json.dumps({"id": 1, "cmd": "subscribe", "params": params}))
    session.work()
    session.publish(exchange.advance(NOON + SECOND))
    kinds = [json.loads(frame)["type"] for frame in session.take()]
    assert kinds[-1] == "error"
    assert kinds.count("error") == 1


def test_a_fault_is_written_as_name_argument_and_time() -> None:
    assert Fault.parse("gap") == Fault("gap", 1, 0)
    assert Fault.parse("gap:3@10") == Fault("gap", 3, 10)
    assert Fault.parse(" hang@2.5 ") == Fault("hang", None, 2.5)


class Beside:
    """A session on trades and life events, with a fault asked for before either is subscribed to."""

    def __init__(self, fault: str) -> None:
        self.exchange = Exchange(
            markets=4, rate=400, seed=3, now_ns=NOON, rolling_markets=2, rolling_seconds=10
        )
        self.session = Session(self.exchange, random.Random(1))
        asked = Fault.parse(fault)
        if asked.target is not Target.EXCHANGE:
            self.session.tamper(asked.name, asked.count)

    def subscribe(self, *channels: str) -> list[dict[str, Any]]:
        for number, channel in enumerate(channels, 1):
            command = {"id": number, "cmd": "subscribe", "params": {"channels": [channel]}}
            self.session.receive(json.dumps(command))
            self.session.work()
        return [json.loads(frame) for frame in self.session.take()]

    def heard(self, seconds: float = 30) -> list[dict[str, Any]]:
        self.session.publish(self.exchange.advance(NOON + int(seconds * SECOND)))
        return [json.loads(frame) for frame in self.session.take()]


@pytest.mark.parametrize("channel", ["trade", "market_lifecycle_v2"])
def test_a_gap_of_an_auxiliary_channel_drops_messages_and_seqs(channel: str) -> None:
    fault = {"trade": "trade_gap:3", "market_lifecycle_v2": "lifecycle_gap:3"}[channel]
    line = Beside(fault)
    line.subscribe("trade", "market_lifecycle_v2")
    seqs: dict[int, list[int]] = {}
    for frame in line.heard():
        seqs.setdefault(frame["sid"], []).append(frame["seq"])
    lossy, whole = (1, 2) if channel == "trade" else (2, 1)
    assert seqs[lossy] == list(range(4, 4 + len(seqs[lossy])))
    assert seqs[whole] == list(range(1, 1 + len(seqs[whole])))


@pytest.mark.parametrize("channel", ["trade", "market_lifecycle_v2"])
def test_a_refused_channel_is_accepted_after_its_refusals(channel: str) -> None:
    fault = {"trade": "trade_refused:2", "market_lifecycle_v2": "lifecycle_refused:2"}[channel]
    line = Beside(fault)
    answers = line.subscribe(channel, channel, channel)
    assert [a["type"] for a in answers] == ["error", "error", "subscribed"]
    assert answers[0]["msg"]["code"] == 8


def test_the_trade_subscription_alone_ends_with_error_10() -> None:
    line = Beside("gap")
    line.subscribe("trade", "market_lifecycle_v2")
    line.session.tamper("trade_error10", 1)
    (end,) = [json.loads(frame) for frame in line.session.take()]
    assert (end["type"], end["sid"], end["msg"]["code"]) == ("error", 1, 10)
    assert {frame["sid"] for frame in line.heard()} == {2}


def test_an_early_close_sends_a_message_and_closes_once() -> None:
    line = Beside("close_early:2")
    line.subscribe("market_lifecycle_v2")
    line.session.publish(line.exchange.close_early(2))
    (message,) = [json.loads(frame)["msg"] for frame in line.session.take()]
    ticker = message["market_ticker"]
    assert message["event_type"] == "close_date_updated"
    assert message["close_ts"] == NOON // SECOND + 2
    line.heard(1.9)
    early = line.exchange.market(ticker)
    assert early is not None
    assert early.status == "active"
    line.heard(2.1)
    assert early.status == "closed"
    events = [
        f["msg"]["event_type"] for f in line.heard(60) if f["msg"].get("market_ticker") == ticker
    ]
    assert events.count("determined") == 1


def test_a_halted_market_sends_deactivated_and_activated() -> None:
    line = Beside("halt:3")
    line.subscribe("market_lifecycle_v2", "trade")
    line.session.publish(line.exchange.halt(3))
    (message,) = [json.loads(frame)["msg"] for frame in line.session.take()]
    ticker = message["market_ticker"]
    halted = line.exchange.market(ticker)
    assert halted is not None
    assert (message["event_type"], halted.status) == ("deactivated", "inactive")
    during = line.heard(2.9)
    assert ticker not in {f["msg"]["market_ticker"] for f in during if f["type"] == "trade"}
    after = [f["msg"] for f in line.heard(3.1) if f["msg"].get("event_type") == "activated"]
    assert [m["market_ticker"] for m in after] == [ticker]
    assert halted.status == "active"


def test_markets_that_merely_traded_are_not_updated_ones() -> None:
    line = Beside("gap")
    before = {market.ticker: market.updated_us for market in line.exchange.markets()}
    line.heard(3)
    assert line.exchange.deltas
    assert all(
        market.updated_us == before.get(market.ticker, market.updated_us)
        for market in line.exchange.markets()
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("gup", "'gup' is unknown. There are: gap, "),
        ("gap:three", "'gap:three' is not NAME"),
        ("gap@", "is not NAME"),
        ("drop:1", "takes no argument"),
        ("", "is not NAME"),
    ],
)
def test_a_fault_that_makes_no_sense_is_answered_in_a_sentence(text: str, says: str) -> None:
    with pytest.raises(SimulatorError, match=says):
        Fault.parse(text)


def test_every_fault_is_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text()
    for name, kind in KINDS.items():
        assert f"| `{name}` |" in text, name
        assert kind.target in Target

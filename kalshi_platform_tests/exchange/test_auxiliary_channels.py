"""Auxiliary channels: every gap is noted, missed spans are reported, and no book is affected."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kalshi_platform.exchange import auxiliary_channel
from kalshi_platform.exchange.auxiliary_channel import LIFECYCLE, TRADES
from kalshi_platform.exchange.session import CHANNEL, Session
from kalshi_platform.journal.kind import Kind
from kalshi_platform_tests import wire

BESIDE = (LIFECYCLE, TRADES)
SIDS = {CHANNEL: 1, LIFECYCLE: 2, TRADES: 3}


def sent(session: Session, now: float) -> list[dict[str, Any]]:
    return [json.loads(command) for command in session.commands(now)]


def reply(kind: str, command_id: int, **more: Any) -> bytes:
    return json.dumps({"type": kind, "id": command_id, **more}).encode()


def answer(session: Session, command: dict[str, Any], now: float, sids: dict[str, int]) -> None:
    """Reply as an exchange that carries out the command."""
    if command["cmd"] == "subscribe":
        (channel,) = command["params"]["channels"]
        msg = {"channel": channel, "sid": sids[channel]}
        session.receive(reply("subscribed", command["id"], msg=msg), now)
    else:
        session.receive(reply("ok", command["id"], sid=command["params"]["sids"][0], msg={}), now)


def talked(session: Session, now: float = 0.0) -> list[dict[str, Any]]:
    """Answer commands until none is due; return them."""
    answered = []
    while commands := sent(session, now):
        for command in commands:
            answer(session, command, now, SIDS)
        answered += commands
    return answered


def ready(*tickers: str, **options: Any) -> Session:
    """A session with all three channels, every book synced."""
    session = Session(tickers, auxiliary=BESIDE, **options)
    talked(session)
    for seq, ticker in enumerate(tickers, 1):
        session.receive(wire.snapshot(ticker, seq, {}, {}), 0.0)
    return session


def life(seq: int, event_type: str = "created", ticker: str = "A-1", **more: Any) -> bytes:
    msg = {"market_ticker": ticker, "event_type": event_type, **more}
    return json.dumps({"type": LIFECYCLE, "sid": 2, "seq": seq, "msg": msg}).encode()


def test_books_are_subscribed_before_lifecycle_and_trades() -> None:
    session = Session(["A-1", "B-2"], auxiliary=BESIDE)
    commands = talked(session)
    assert [c["params"]["channels"] for c in commands] == [[CHANNEL], [LIFECYCLE], [TRADES]]
    assert commands[2]["params"]["market_tickers"] == ["A-1", "B-2"]
    assert "market_tickers" not in commands[1]["params"]
    assert session.take_missed() == []


def test_without_a_market_only_lifecycle_is_subscribed() -> None:
    session = Session([], auxiliary=BESIDE)
    assert [c["params"]["channels"] for c in talked(session)] == [[LIFECYCLE]]
    session.follow(["A-1"])
    assert [c["params"]["channels"] for c in talked(session)] == [[CHANNEL], [TRADES]]


def test_trade_markets_join_and_leave_with_the_books() -> None:
    session = ready("A-1", "B-2")
    session.follow(["B-2", "C-3"])
    commands = [
        (c["params"]["sids"], c["params"]["action"], c["params"]["market_tickers"])
        for c in talked(session, 1.0)
    ]
    assert commands == [
        ([1], "delete_markets", ["A-1"]),
        ([1], "add_markets", ["C-3"]),
        ([3], "delete_markets", ["A-1"]),
        ([3], "add_markets", ["C-3"]),
    ]


@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from(["data", "ok", "drop"])), max_size=80
    )
)
@settings(max_examples=200, deadline=None)
def test_only_a_book_gap_makes_books_stale(
    steps: list[tuple[int, str]],
) -> None:
    session = ready("A-1")
    numbers, seen, named, missing = {1: 1, 2: 0, 3: 0}, {1: 1, 2: 0, 3: 0}, [], {2: 0, 3: 0}
    for now, (sid, what) in enumerate(steps, 1):
        numbers[sid] += 1
        if what == "drop":
            continue
        if numbers[sid] != seen[sid] + 1:
            named.append((sid, seen[sid] + 1, numbers[sid]))
            if sid != 1:
                missing[sid] += numbers[sid] - seen[sid] - 1
        seen[sid] = numbers[sid]
        frame = {
            1: wire.delta("A-1", numbers[1], "yes", 100, 5),
            2: life(numbers[2]),
            3: wire.trade("A-1", numbers[3], 4_800, 5, sid=3),
        }[sid]
        kind = session.receive(wire.ok(numbers[sid], sid=sid) if what == "ok" else frame, now)
        if what == "data":
            assert kind is {1: Kind.DELTA, 2: Kind.CONTROL, 3: Kind.TRADE}[sid]
    notes = [n for n in session.take_notes() if n.kind == "gap"]
    assert [(n.sid, n.detail["expected"], n.detail["got"]) for n in notes] == named
    assert {n.detail["channel"] for n in notes} <= set(SIDS)
    assert session.synced == (0 if any(sid == 1 for sid, *_ in named) else 1)
    lost = session.take_missed()
    assert {2: 0, 3: 0} | {
        SIDS[channel]: sum(missed.missing or 0 for missed in lost if missed.channel == channel)
        for channel in BESIDE
    } == missing
    assert all(missed.since < missed.until and missed.cause == "sequence" for missed in lost)
    assert session.ended is None


def test_a_trade_gap_reports_the_span_of_missed_trades() -> None:
    session = ready("A-1")
    session.receive(wire.trade("A-1", 1, 4_800, 5, sid=3), 10.0)
    session.receive(wire.delta("A-1", 2, "yes", 100, 5), 11.0)
    session.receive(wire.trade("A-1", 4, 4_800, 5, sid=3), 12.0)
    (lost,) = session.take_missed()
    assert (lost.channel, lost.sid, lost.since, lost.until) == (TRADES, 3, 10.0, 12.0)
    assert (lost.cause, lost.missing) == ("sequence", 2)
    assert session.synced == 1
    assert talked(session, 13.0) == []


@pytest.mark.parametrize("channel", BESIDE)
@pytest.mark.parametrize("code", [8, 26])
def test_a_refused_channel_is_noted_and_retried_later(channel: str, code: int) -> None:
    session = Session(["A-1"], auxiliary=BESIDE)
    while commands := sent(session, 0.0):
        for command in commands:
            if command["params"].get("channels") == [channel]:
                msg = {"code": code, "msg": "no"}
                session.receive(reply("error", command["id"], msg=msg), 0.0)
            else:
                answer(session, command, 0.0, SIDS)
    session.receive(wire.snapshot("A-1", 1, {}, {}), 0.0)
    (note,) = session.take_notes()
    assert (note.kind, note.detail["channel"], note.detail["code"]) == ("refused", channel, code)
    assert channel in session.warnings[0]
    assert (session.ended, session.fatal, session.synced) == (None, None, 1)
    assert sent(session, auxiliary_channel.REFUSED_RETRY_S - 1) == []
    again = talked(session, auxiliary_channel.REFUSED_RETRY_S)
    assert [c["params"]["channels"] for c in again] == [[channel]]
    (lost,) = session.take_missed()
    assert (lost.channel, lost.since, lost.until) == (
        channel,
        0.0,
        auxiliary_channel.REFUSED_RETRY_S,
    )


def test_a_busy_reply_is_retried_for_the_same_markets() -> None:
    session = ready("A-1")
    session.follow(["A-1", "B-2"])
    for command in sent(session, 5.0):
        if command["params"]["sids"] == [3]:
            refusal = reply("error", command["id"], msg={"code": 27, "msg": "Too many requests"})
            session.receive(refusal, 5.0)
        else:
            answer(session, command, 5.0, SIDS)
    assert sent(session, 5.5) == []
    (again,) = talked(session, 5.0 + auxiliary_channel.RETRY_S)
    assert (again["params"]["sids"], again["params"]["market_tickers"]) == ([3], ["B-2"])


def test_a_command_without_a_reply_is_sent_again() -> None:
    session = Session(["A-1"], auxiliary=BESIDE)
    answer(session, sent(session, 0.0)[0], 0.0, SIDS)
    first = {tuple(c["params"]["channels"]) for c in sent(session, 0.0)}
    assert first == {(LIFECYCLE,), (TRADES,)}
    session.receive(wire.snapshot("A-1", 1, {}, {}), 0.0)
    assert sent(session, 14.0) == []
    assert sent(session, 16.0) == []  # timed out; sent again after the retry delay
    again = {
        tuple(c["params"]["channels"]) for c in sent(session, 16.0 + auxiliary_channel.RETRY_S)
    }
    assert again == first


@pytest.mark.parametrize("code", [10, 25])
def test_an_ended_trade_subscription_is_begun_again(
    code: int,
) -> None:
    session = ready("A-1", "B-2")
    session.receive(wire.trade("A-1", 1, 4_800, 5, sid=3), 7.0)
    end = {"type": "error", "sid": 3, "seq": 2, "msg": {"code": code, "msg": "x"}}
    session.receive(json.dumps(end).encode(), 9.0)
    (note,) = session.take_notes()
    assert (note.kind, note.sid, note.detail["channel"]) == ("gap", 3, TRADES)
    assert (session.ended, session.synced) == (None, 2)
    assert sent(session, 9.5) == []
    (again,) = sent(session, 9.0 + auxiliary_channel.RETRY_S)
    assert again["params"]["channels"] == [TRADES]
    assert again["params"]["market_tickers"] == ["A-1", "B-2"]
    answer(session, again, 11.0, {TRADES: 4})
    session.receive(wire.trade("A-1", 1, 4_800, 5, sid=4), 12.0)
    (lost,) = session.take_missed()
    assert (lost.sid, lost.since, lost.until, lost.cause) == (4, 9.0, 11.0, "subscription")
    assert not session.has_notes


def test_frames_missed_between_connections_are_reported_once() -> None:
    session = Session([f"T-{n}" for n in range(700)], auxiliary=BESIDE, silent_since=-4.0)
    assert talked(session, 1.0)
    lost = {missed.channel: missed for missed in session.take_missed()}
    assert {(missed.since, missed.until, missed.cause) for missed in lost.values()} == {
        (-4.0, 1.0, "connection")
    }
    assert set(lost) == set(BESIDE)
    assert session.silent_since(99.0) == 99.0
    assert Session(["A-1"], auxiliary=BESIDE).silent_since(99.0) is None
    assert Session(["A-1"], auxiliary=BESIDE, silent_since=-4.0).silent_since(99.0) == -4.0


def test_lifecycle_events_are_kept_and_garbage_is_harmless() -> None:
    session = ready("A-1")
    session.receive(life(1, "close_date_updated", close_ts=1_700_000_000), 1.0)
    session.receive(b'{"type":"market_lifecycle_v2","sid":2,"seq":2,"msg":{"event_type":5}}', 1.0)
    session.receive(life(3, "determined", result="yes"), 1.0)
    assert [(e.market_ticker, e.event_type, e.close_ts) for e in session.lifecycle_events] == [
        ("A-1", "close_date_updated", 1_700_000_000),
        ("A-1", "determined", None),
    ]
    assert not session.has_notes


class Exchange(RuleBasedStateMachine):
    """Markets join and leave while the exchange answers, refuses, ends trades or sends no reply."""

    tickers = st.sets(st.sampled_from([f"T-{n}" for n in range(6)]), min_size=1)

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.session = Session(["T-0"], auxiliary=(TRADES,))
        self.sid = 2
        self.carried: set[str] | None = None
        """The markets on the exchange's trade subscription; None without one."""
        self.wanted = {"T-0"}

    @rule(wanted=tickers)
    def follow(self, wanted: set[str]) -> None:
        self.wanted = wanted
        self.session.follow(sorted(wanted))

    @rule(mood=st.sampled_from(["obeys", "obeys", "busy", "refuses", "silent"]))
    def talk(self, mood: str) -> None:
        self.now += 0.5
        for command in sent(self.session, self.now):
            self.hear(command, mood)

    @rule(seconds=st.sampled_from([1.0, 20.0, 400.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def end(self) -> None:
        if self.carried is not None:
            end = {"type": "error", "sid": self.sid, "msg": {"code": 10, "msg": "x"}}
            self.session.receive(json.dumps(end).encode(), self.now)
            self.carried = None

    def hear(self, command: dict[str, Any], mood: str) -> None:
        params = command["params"]
        if params.get("channels") == [CHANNEL] or params.get("sids") == [1]:
            answer(self.session, command, self.now, {CHANNEL: 1})
            for ticker in params["market_tickers"]:
                self.session.receive(wire.snapshot(ticker, 0, {}, {}), self.now)
            return
        if mood in {"busy", "refuses"}:
            code = 18 if mood == "busy" else 11
            refusal = reply("error", command["id"], msg={"code": code, "msg": mood})
            self.session.receive(refusal, self.now)
            return
        if (
            command["cmd"] == "subscribe"
        ):  # subscribing again is acknowledged with ok on the existing sid
            begins = self.carried is None
            self.sid += begins
            self.carried = (self.carried or set()) | set(params["market_tickers"])
            if mood == "obeys" and begins:
                answer(self.session, command, self.now, {TRADES: self.sid})
            elif mood == "obeys":
                self.session.receive(reply("ok", command["id"], sid=self.sid), self.now)
            return
        if params["sids"] == [self.sid] and self.carried is not None:
            change = set(params["market_tickers"])
            add = params["action"] == "add_markets"
            self.carried = self.carried | change if add else self.carried - change
        if mood == "obeys":
            answer(self.session, command, self.now, {})

    def teardown(self) -> None:
        """After a while without faults the exchange carries exactly the followed markets."""
        for _ in range(12):
            self.now += 100.0
            for command in sent(self.session, self.now):
                self.hear(command, "obeys")
        assert self.carried == self.wanted
        assert self.session.ended is None

    @invariant()
    def the_books_go_on(self) -> None:
        assert self.session.ended is None
        assert self.session.fatal is None


Exchange.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestExchange = Exchange.TestCase

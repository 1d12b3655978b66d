"""The session: sequence numbers per sid across markets, and re-requests of missing snapshots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalshi_platform.exchange import session as rules
from kalshi_platform.exchange.session import Session
from kalshi_platform.journal.kind import Kind
from kalshi_platform_tests import wire

SHARED_FRAMES = Path(__file__).resolve().parents[2].parent / "shared" / "frames"


def subscribed(session: Session, sid: int = 1, *, now: float = 0.0) -> list[dict[str, Any]]:
    """Let the session subscribe; return the commands it sends once it knows its sid."""
    first = commands(session, now)
    assert [c["cmd"] for c in first] == ["subscribe"]
    reply = {
        "type": "subscribed",
        "id": first[0]["id"],
        "msg": {"channel": "orderbook_delta", "sid": sid},
    }
    session.receive(json.dumps(reply).encode(), now)
    return commands(session, now)


def commands(session: Session, now: float) -> list[dict[str, Any]]:
    return [json.loads(c) for c in session.commands(now)]


def gaps(session: Session) -> list[dict[str, Any]]:
    return [n.detail for n in session.take_notes() if n.kind == "gap"]


@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from(["delta", "snapshot", "ok", "drop"])),
        max_size=80,
    )
)
@settings(max_examples=200, deadline=None)
def test_every_sequence_gap_is_reported_exactly(steps: list[tuple[int, str]]) -> None:
    session = Session(["A-1", "B-2"])
    sent = dict.fromkeys((1, 2, 3), 0)
    seen = dict.fromkeys((1, 2, 3), 0)
    expected = []
    for sid, what in steps:
        sent[sid] += 1
        if what == "drop":
            continue
        if sent[sid] != seen[sid] + 1:
            expected.append((sid, seen[sid] + 1, sent[sid]))
        seen[sid] = sent[sid]
        frame = {
            "delta": lambda s, n: wire.delta("A-1", n, "yes", 100, 5, sid=s),
            "snapshot": lambda s, n: wire.snapshot("B-2", n, {}, {}, sid=s),
            "ok": lambda s, n: wire.ok(n, sid=s),
        }[what](sid, sent[sid])
        session.receive(frame, 0.0)
    notes = [n for n in session.take_notes() if n.kind == "gap"]
    of_one_book = {n.detail["cause"] for n in notes if n.market_ticker}
    assert of_one_book <= {rules.OTHER_SUBSCRIPTION}
    named = [(n.sid, n.detail["expected"], n.detail["got"]) for n in notes if not n.market_ticker]
    assert named == expected


def test_acks_and_sid_scoped_errors_consume_numbers() -> None:
    session = Session(["A-1"])
    subscribed(session)
    session.receive(wire.snapshot("A-1", 1, {}, {}), 0)
    session.receive(wire.ok(2), 0)
    session.receive(
        b'{"type":"error","sid":1,"seq":3,"msg":{"code":14,"msg":"Market Ticker required"}}', 0
    )
    session.receive(wire.delta("A-1", 4, "yes", 100, 5), 0)
    session.receive(b'{"id":102,"sid":7,"seq":1,"type":"unsubscribed"}', 0)
    assert gaps(session) == []


def test_frames_without_a_number_are_not_gaps() -> None:
    session = Session(["A-1"])
    subscribed(session)
    for _ in range(3):
        assert (
            session.receive(b'{"type":"ticker","sid":2,"msg":{"market_ticker":"A-1"}}', 0)
            is Kind.CONTROL
        )
    assert gaps(session) == []


def test_a_gap_makes_all_books_stale_until_resynced() -> None:
    session = Session(["A-1", "B-2"])
    subscribed(session)
    session.receive(wire.snapshot("A-1", 1, {}, {}), 0)
    session.receive(wire.snapshot("B-2", 2, {}, {}), 0)
    assert session.synced == 2
    session.receive(wire.delta("A-1", 5, "yes", 100, 5), 10.0)
    assert session.synced == 0
    assert gaps(session) == [
        {"cause": "sequence", "expected": 3, "got": 5, "missing": 2, "channel": "orderbook_delta"}
    ]
    (asked,) = commands(session, 10.0)
    assert asked["params"]["action"] == "get_snapshot"
    assert sorted(asked["params"]["market_tickers"]) == ["A-1", "B-2"]
    session.receive(wire.snapshot("B-2", 6, {}, {}), 10.5)
    assert session.synced == 1
    assert not session.has_notes
    session.receive(wire.snapshot("A-1", 7, {}, {}), 11.0)
    assert session.take_notes() == []  # the note's place is after the snapshot
    (note,) = session.take_notes()
    assert note.kind == "resynced"
    assert note.detail["seconds"] == 1.0
    assert commands(session, 11.5) == []


def test_a_connection_that_follows_another_notes_when_every_book_is_back() -> None:
    session = Session(["A-1", "B-2", "C-3"], reconnects=True)
    subscribed(session)
    session.receive(wire.snapshot("A-1", 1, {}, {}), 1.0)
    session.receive(wire.snapshot("B-2", 2, {}, {}), 1.5)
    assert not session.has_notes
    session.follow(["A-1", "B-2"])  # the last one that is missing is not wanted any more
    assert [n.kind for n in session.take_notes()] == ["left"]
    (note,) = session.take_notes()
    assert (note.kind, note.detail["cause"], note.detail["markets"]) == ("resynced", "connected", 3)


def test_many_gaps_do_not_cause_many_requests() -> None:
    session = Session(["A-1"])
    subscribed(session)
    session.receive(wire.snapshot("A-1", 1, {}, {}), 0)
    seq, asked = 1, 0
    for tick in range(600):  # a gap every 0.1 s for a minute, each closed by the requested snapshot
        now = 1 + tick / 10
        seq += 2
        session.receive(wire.delta("A-1", seq, "yes", 100, 5), now)
        got = commands(session, now)
        asked += len(got)
        if got:
            seq += 1
            session.receive(wire.snapshot("A-1", seq, {}, {}), now)
    assert 2 <= asked <= 10


def test_thousands_of_tickers_share_one_sid() -> None:
    tickers = [f"T-{n}" for n in range(3_210)]
    session = Session(tickers)
    (first,) = commands(session, 0)
    assert first["params"]["use_yes_price"] is False
    assert first["params"]["skip_ticker_ack"] is True
    assert (
        commands(session, 0.1) == []
    )  # it waits for its sid: a second subscribe could be processed first
    session.receive(
        b'{"type":"subscribed","id":1,"msg":{"channel":"orderbook_delta","sid":4}}', 0.2
    )
    rest = commands(session, 0.2)
    assert {c["params"]["action"] for c in rest} == {"add_markets"}
    assert all(c["params"]["sids"] == [4] for c in rest)
    asked = [t for c in [first, *rest] for t in c["params"]["market_tickers"]]
    assert asked == tickers


def test_missing_snapshots_are_re_requested_then_reconnect() -> None:
    session = Session(["A-1"])
    subscribed(session)
    actions = []
    for second in range(1, 120):
        actions += [c["params"]["action"] for c in commands(session, float(second))]
        if session.ended:
            break
    assert actions == ["get_snapshot"] * (rules.REQUESTS_BEFORE_RECONNECT - 1)
    assert session.ended is not None
    assert "no snapshot" in session.ended


@pytest.mark.parametrize("code", [10, 25])
def test_terminal_errors_end_the_connection(code: int) -> None:
    session = Session(["A-1"])
    subscribed(session)
    session.receive(
        json.dumps(
            {"type": "error", "sid": 1, "seq": 1, "msg": {"code": code, "msg": "x"}}
        ).encode(),
        0,
    )
    assert session.ended is not None
    assert commands(session, 1.0) == []


def test_an_unknown_ticker_is_a_warning() -> None:
    session = Session(["NOPE"])
    subscribed(session)
    session.receive(
        b'{"type":"orderbook_snapshot","sid":1,"seq":1,"msg":{"market_ticker":"NOPE","market_id":""}}',
        0,
    )
    (warning,) = session.warnings
    assert "'NOPE'" in warning
    assert "MARKET_TICKERS" in warning
    assert [n.kind for n in session.take_notes()] == ["unknown_market"]


def test_markets_join_and_leave_without_a_reconnect() -> None:
    session = Session(["A-1", "B-2"])
    subscribed(session)
    session.receive(wire.snapshot("A-1", 1, {}, {}), 0)
    session.receive(wire.snapshot("B-2", 2, {}, {}), 0)
    session.follow(["B-2", "C-3"])
    sent = [(c["params"]["action"], c["params"]["market_tickers"]) for c in commands(session, 1.0)]
    assert sent == [("delete_markets", ["A-1"]), ("add_markets", ["C-3"])]
    assert [(n.kind, n.market_ticker) for n in session.take_notes()] == [("left", "A-1")]


def test_replies_with_unknown_ids_are_handled() -> None:
    """A replayed recording has the ids of the client that recorded it."""
    session = Session(["A-1"])
    commands(session, 0)
    session.receive(b'{"type":"subscribed","id":77,"msg":{"channel":"orderbook_delta","sid":1}}', 0)
    session.receive(b'{"type":"ok","id":12,"sid":1,"seq":1,"msg":{"market_tickers":["A-1"]}}', 0)
    session.receive(wire.snapshot("A-1", 2, {}, {}), 0)
    assert session.synced == 1
    assert gaps(session) == []


def test_garbage_is_malformed_and_harmless() -> None:
    session = Session(["A-1"])
    for garbage in (
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"type":5}',
        b'{"type":"ok","seq":"x"}',
        b'{"type":"ok"',
    ):
        assert session.receive(garbage, 0) is Kind.MALFORMED
    assert not session.has_notes


def test_recorded_production_frames_have_no_false_gap() -> None:
    path = SHARED_FRAMES / "ws_orderbook_12_markets_prod_2026-08-07.jsonl"
    if not path.exists():
        pytest.skip("the recorded production frames are not beside this checkout")
    session = Session()
    kinds = [session.receive(line, 0.0) for line in path.read_bytes().splitlines()]
    assert gaps(session) == []
    assert kinds.count(Kind.DELTA) == 245
    assert kinds.count(Kind.SNAPSHOT) == 12
    assert kinds.count(Kind.CONTROL) == 12


def test_a_deleted_line_of_the_recording_is_one_gap() -> None:
    path = SHARED_FRAMES / "ws_orderbook_12_markets_prod_2026-08-07.jsonl"
    if not path.exists():
        pytest.skip("the recorded production frames are not beside this checkout")
    lines = path.read_bytes().splitlines()
    session = Session()
    for line in lines[:100] + lines[103:]:
        session.receive(line, 0.0)
    (gap,) = gaps(session)
    assert gap["missing"] == 3


@pytest.mark.parametrize("code", [[], {}, None, "10", 10.0, [10]])
def test_an_error_of_unknown_form_ends_nothing(code: object) -> None:
    session = Session(["A-1"])
    subscribed(session)
    frame = {"type": "error", "sid": 1, "seq": 1, "msg": {"code": code, "msg": "what"}}
    assert session.receive(json.dumps(frame).encode(), 1.0) is Kind.CONTROL
    assert session.ended is None
    assert len(session.warnings) == 1

"""Capture and loader treat a frame alike: an unreadable one leaves the same books stale in both."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.exchange.columnar import decode
from kalshi_platform.exchange.session import Session
from kalshi_platform.journal.kind import Kind
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.rows import build_rows
from kalshi_platform_tests import wire
from kalshi_platform_tests.exchange.test_session import subscribed
from kalshi_platform_tests.properties import examples

MARKETS = ("A-1", "B-2", "C-3")
CONN = wire.conn_id(1)


@dataclass
class Recording:
    """A session whose frames and notes go into a journal, and the loader's state after it."""

    use_yes_price: bool = False
    records: list[wire.Record] = field(default_factory=list)
    state: BookState = field(default_factory=BookState)
    rows: list[dict[str, object]] = field(default_factory=list)
    """The stream_events so far."""
    seqs: dict[int, int] = field(default_factory=lambda: {1: 0, 2: 0})
    """The last number of each subscription."""

    def __post_init__(self) -> None:
        self.session = Session(MARKETS, use_yes_price=self.use_yes_price)
        subscribed(self.session)
        self.records.append(wire.connected(CONN, wire.NOON_NS, use_yes_price=self.use_yes_price))

    def take(self, frame: bytes) -> None:
        """One frame, as capture journals it: its notes before it."""
        at = wire.NOON_NS + len(self.records)
        kind = self.session.receive(frame, 0.0)
        self._journal_notes(at)
        self.records.append((at, CONN, int(kind), frame))

    def _journal_notes(self, at: int) -> None:
        for note in self.session.take_notes():
            body = wire.note(note.kind, note.detail, sid=note.sid, ticker=note.market_ticker)
            self.records.append((at, CONN, int(Kind.NOTE), body))

    def load(self) -> None:
        """Load the new records and report to capture which books the loader found stale."""
        for _ in range(2):  # the second round includes notes after the last frame
            self._journal_notes(wire.NOON_NS + len(self.records))
        while self.records[self.state.n :]:
            found = wire.blocks(self.records)[0].cut(self.state.n)[1] if self.state.n else None
            blocks = [found] if found is not None else wire.blocks(self.records)
            rows, self.state = build_rows(decode(blocks), self.state)
            self.rows += rows.tables["stream_events"].to_pylist()
            for it in rows.stale_books:
                self.session.mark_book_stale(it.market_ticker, it.cause, dict(it.detail))
            self._journal_notes(wire.NOON_NS + len(self.records))

    @property
    def synced(self) -> set[str]:
        """The books that capture has synced."""
        return {t for t, market in self.session._markets.items() if market.synced}

    @property
    def verified(self) -> set[str]:
        """The books that the loader has synced."""
        return {t for t, book in self.state.books.items() if book.verified}

    def next(self, sid: int = 1) -> int:
        """The next number of a subscription."""
        self.seqs[sid] += 1
        return self.seqs[sid]

    def kinds(self) -> list[object]:
        return [row["kind"] for row in self.rows]

    def gaps(self) -> list[dict[str, object]]:
        return [
            {**json.loads(str(r["detail"])), "ticker": r["market_ticker"]}
            for r in self.rows
            if r["kind"] == "gap"
        ]


def whole(recording: Recording, tickers: Sequence[str] = MARKETS) -> None:
    for ticker in tickers:
        recording.take(wire.snapshot(ticker, recording.next(), {4_000: 500}, {5_500: 100}))
    recording.load()


ODD_SNAPSHOTS = {
    "five decimals": ('"0.4000"', '"0.39995"'),
    "a number": ('"0.4000"', "0.4"),
    "above a dollar": ('"0.4000"', '"1.4000"'),
    "a price twice": ('["0.4000","5.00"]', '["0.4000","5.00"],["0.4000","6.00"]'),
    "a negative size": ('"5.00"', '"-5.00"'),
    "three decimals": ('"5.00"', '"5.005"'),
    "a size of a billion": ('"5.00"', '"1000000000.00"'),
    "no pair": ('["0.4000","5.00"]', '["0.4000"]'),
    "no list": ('[["0.4000","5.00"]]', '"none"'),
}


@pytest.mark.parametrize("what", ODD_SNAPSHOTS)
def test_an_unreadable_snapshot_is_stale_in_capture_and_loader(what: str) -> None:
    before, after = ODD_SNAPSHOTS[what]
    recording = Recording()
    whole(recording)
    recording.next()  # lost
    recording.take(wire.delta("A-1", recording.next(), "yes", 4_000, 100))
    for ticker in MARKETS:
        frame = wire.snapshot(ticker, recording.next(), {4_000: 500}, {5_500: 100})
        if ticker == "B-2":
            assert before.encode() in frame
            frame = frame.replace(before.encode(), after.encode())
        recording.take(frame)
    recording.load()
    assert recording.synced == recording.verified == {"A-1", "C-3"}
    assert "malformed" in recording.kinds()
    assert "resynced" not in recording.kinds()
    asked = [json.loads(c) for c in recording.session.commands(2.0)]
    assert [c["params"]["market_tickers"] for c in asked] == [["B-2"]]
    recording.take(wire.snapshot("B-2", recording.next(), {4_000: 500}, {5_500: 100}))
    recording.load()
    assert recording.synced == recording.verified == set(MARKETS)
    assert recording.kinds().count("resynced") == 1


def test_permanently_unreadable_snapshots_cost_only_their_book() -> None:
    recording = Recording()
    whole(recording, ["A-1", "B-2"])
    odd = b'{"type":"orderbook_snapshot","sid":1,"seq":%d,"msg":{"market_ticker":"C-3","yes":7}}'
    asked, now = 0, 0.0
    for _ in range(3_600):
        now += 1.0
        for command in recording.session.commands(now):
            asked += 1
            assert json.loads(command)["params"]["market_tickers"] == ["C-3"]
            recording.session.receive(odd % recording.next(), now)
    assert recording.session.ended is None
    assert recording.session.synced == 2
    assert 10 < asked < 120  # in an hour


ODD_DELTAS = {
    "five decimals": ('"0.4000"', '"0.41005"'),
    "a number": ('"0.4000"', "0.4"),
    "size of three decimals": ('"1.00"', '"0.005"'),
    "a size of a billion": ('"1.00"', '"-1000000000.00"'),
    "cents without a hundredfold": ('"price_dollars":"0.4000"', '"price":184467440737095517'),
    "a count without a hundredfold": ('"delta_fp":"1.00"', '"delta":184467440737095517'),
    "no side": ('"yes"', '"maybe"'),
    "no size": ('"delta_fp":"1.00",', ""),
}


@pytest.mark.parametrize("what", ODD_DELTAS)
def test_an_unreadable_delta_makes_only_its_book_stale(what: str) -> None:
    before, after = ODD_DELTAS[what]
    recording = Recording()
    whole(recording)
    frame = wire.delta("B-2", recording.next(), "yes", 4_000, 100)
    assert before.encode() in frame
    recording.take(frame.replace(before.encode(), after.encode()))
    recording.load()
    assert recording.synced == recording.verified == {"A-1", "C-3"}
    first = recording.gaps()[0]
    assert (first["cause"], first["seq"], first["ticker"]) == ("malformed_delta", 4, "B-2")
    (asked,) = (json.loads(c) for c in recording.session.commands(2.0))
    assert asked["params"]["action"] == "get_snapshot"


@pytest.mark.parametrize("kind", ["orderbook_delta", "orderbook_snapshot"])
def test_a_frame_without_a_readable_market_makes_its_sid_stale(
    kind: str,
) -> None:
    recording = Recording()
    whole(recording)
    recording.take(b'{"type":"%s","sid":1,"seq":%d,"msg":[]}' % (kind.encode(), recording.next()))
    recording.load()
    assert recording.synced == recording.verified == set()
    assert {"expected": 4, "got": 5}.items() <= recording.gaps()[0].items()


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(
        ["", "yes", "no", "0.4000", "0.41005", "1.00", "-5.00", "0.005", "A-1", "Z-9"]
    )
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
"""Any value, in the place of one that is right."""


def paths(value: object, so_far: tuple[object, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the values of a frame are."""
    items: list[tuple[object, object]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    found = [so_far] if so_far else []
    return found + [path for key, inner in items for path in paths(inner, (*so_far, key))]


@st.composite
def altered(draw: st.DrawFn, frame: bytes) -> bytes:
    """A frame of which one value is another one, or gone, or some bytes are others."""
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(frame) - 1))
        return frame[:at] + draw(st.binary(max_size=3)) + frame[at + draw(st.integers(0, 3)) :]
    whole = json.loads(frame)
    *way, last = draw(st.sampled_from(paths(whole)))
    holder = whole
    for key in way:
        holder = holder[key]
    if draw(st.booleans()):
        holder[last] = draw(anything)
    else:
        del holder[last]
    return json.dumps(whole).encode()


STEPS = (
    *("delta",) * 4,
    *("snapshot",) * 3,
    "odd",
    "odd",
    "lost",
    "repeated",
    "ok",
    "trade",
    "load",
    "follow",
)


@given(data=st.data())
@examples(160)
def test_capture_and_loader_agree_on_synced_books(
    data: st.DataObject,
) -> None:
    draw = data.draw
    recording = Recording()
    for step in draw(st.lists(st.sampled_from(STEPS), max_size=40)):
        ticker, sid = draw(st.sampled_from((*MARKETS, "Z-9"))), draw(st.sampled_from((1, 1, 1, 2)))
        if step == "load":
            recording.load()
        elif step == "follow":
            recording.session.follow(draw(st.sets(st.sampled_from(MARKETS))))
            list(recording.session.commands(0.0))
        elif step == "lost":
            recording.next(sid)
        else:
            seq = recording.seqs[sid] if step == "repeated" else recording.next(sid)
            qty = 100 * draw(st.integers(-3, 3))
            delta = wire.delta(ticker, seq, "yes", 4_000, qty, sid=sid)
            snapshot = wire.snapshot(ticker, seq, {4_000: 500}, {5_500: 100}, sid=sid)
            frame = {
                "ok": wire.ok(seq, sid=sid),
                "trade": wire.trade(ticker, seq, 4_000, 100, sid=sid),
                "snapshot": snapshot,
            }.get(step, delta)
            if step == "odd":
                frame = draw(altered(draw(st.sampled_from((delta, snapshot)))))
            recording.take(frame)
    recording.load()
    assert recording.synced == recording.verified


def test_a_gap_of_one_subscription_leaves_books_of_another_stale_in_both() -> None:
    recording = Recording()
    whole(recording, ["A-1", "B-2"])
    recording.take(wire.snapshot("C-3", recording.next(2), {4_000: 500}, {5_500: 100}, sid=2))
    recording.next()  # lost
    recording.take(wire.delta("A-1", recording.next(), "yes", 4_000, 100))
    recording.load()
    assert recording.synced == recording.verified == set()
    sequence, other = recording.gaps()
    assert (sequence["cause"], sequence["missing"]) == ("sequence", 1)
    assert (other["cause"], other["of"], other["ticker"]) == ("other_subscription", 1, "C-3")


def test_a_snapshot_after_its_market_was_left_does_not_stay_verified() -> None:
    recording = Recording()
    whole(recording, ["A-1", "B-2"])
    recording.session.follow(["A-1", "B-2"])  # the snapshot of C-3 is on its way
    recording.take(wire.snapshot("C-3", recording.next(), {4_000: 500}, {5_500: 100}))
    recording.load()
    assert recording.synced == recording.verified == {"A-1", "B-2"}
    assert recording.kinds().count("left") == 2
    recording.session.follow(MARKETS)
    recording.take(wire.snapshot("C-3", recording.next(), {4_000: 500}, {5_500: 100}))
    recording.load()
    assert recording.synced == recording.verified == set(MARKETS)


# -- the scale of no bids ----------------------------------------------------------------------


def deep(ticker: str, seq: int, *, yes_price: bool) -> bytes:
    """A book of bids at 0.40 and below, and no bids at 0.55 and below, on either scale."""
    no = dict.fromkeys((5500, 5400, 3000, 100), 100)
    quoted = {10_000 - p: q for p, q in no.items()} if yes_price else no
    return wire.snapshot(ticker, seq, {4_000: 500, 100: 900}, quoted)


@pytest.mark.parametrize("asked", [False, True])
def test_no_bids_on_the_other_scale_are_detected_and_read(asked: bool) -> None:
    recording = Recording(use_yes_price=asked)
    for ticker in MARKETS:
        recording.take(deep(ticker, recording.next(), yes_price=not asked))
    recording.load()
    assert recording.gaps()[0]["cause"] == "scale"
    assert recording.gaps()[0]["use_yes_price"] is not asked
    assert "although use_yes_price" in recording.session.warnings[0]
    (asked_for,) = (json.loads(c) for c in recording.session.commands(2.0))
    assert asked_for["params"]["action"] == "get_snapshot"
    for ticker in MARKETS:
        recording.take(deep(ticker, recording.next(), yes_price=not asked))
    quoted = 5_600 if asked else 4_400  # a no bid at 0.56, as the exchange quotes it
    recording.take(wire.delta("A-1", recording.next(), "no", quoted, 700))
    recording.load()
    assert recording.synced == recording.verified == set(MARKETS)
    levels = recording.state.levels.filter(market_ticker="A-1", side="no")
    assert levels["price"].max() == 5_600
    assert set(levels["price"]) == {5_600, 5_500, 5_400, 3_000, 100}
    assert len([g for g in recording.gaps() if g["cause"] == "scale"]) == 1


def test_a_briefly_crossed_book_changes_no_scale() -> None:
    recording = Recording()
    whole(recording)
    recording.take(wire.snapshot("A-1", recording.next(), {4_000: 500}, {6_500: 100}))
    for ticker in MARKETS:
        recording.take(deep(ticker, recording.next(), yes_price=False))
    recording.load()
    assert recording.gaps() == []
    assert recording.session.scale.yes_price is False


def test_a_scale_found_by_other_evidence_is_read_from_there_on() -> None:
    """The books are crossed on neither scale: only a comparison with REST shows which one it is."""
    recording = Recording()

    def shallow(ticker: str) -> None:  # no bids at 0.55 and 0.54
        quoted = {4_500: 100, 4_600: 100}
        recording.take(wire.snapshot(ticker, recording.next(), {4_000: 500}, quoted))

    for ticker in MARKETS:
        shallow(ticker)
    recording.load()
    assert recording.gaps() == []
    recording.session.rescale(1.0, yes_price=True)
    recording.session.rescale(1.0, yes_price=True)  # another round's
    recording.take(wire.delta("A-1", recording.next(), "no", 4_400, 700))
    assert recording.synced == set()
    for ticker in MARKETS:
        shallow(ticker)
    recording.load()
    assert recording.synced == recording.verified == set(MARKETS)
    (gap,) = recording.gaps()
    assert (gap["cause"], gap["use_yes_price"], gap["asked"]) == ("scale", True, False)
    assert recording.kinds().count("resynced") == 1
    levels = recording.state.levels.filter(market_ticker="A-1", side="no")
    assert set(levels["price"]) == {5_500, 5_400}

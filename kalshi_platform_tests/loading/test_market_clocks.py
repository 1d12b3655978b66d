"""The exchange's clocks: which markets a gap or a reconnect left unchanged, and which clocks fell.

A model of the exchange knows of every change whether it was received; the session and the rows are compared with it.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kalshi_platform.analytics import books
from kalshi_platform.archive.coverage import coverage
from kalshi_platform.exchange.columnar import decode
from kalshi_platform.exchange.session import Session
from kalshi_platform.journal.kind import Kind
from kalshi_platform.loading import state_files
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.market_clocks import MarketClocks
from kalshi_platform.loading.rows import Rows, build_rows
from kalshi_platform.schema import DATASETS
from kalshi_platform.utc_hours import HOUR_NS
from kalshi_platform_tests import wire

MARKETS = ("A-1", "B-2", "C-3")
SECOND = wire.SECOND
MONDAY_NS = 1_796_040_000 * SECOND
"""2026-11-30, 12:00 UTC: no maintenance is near."""
THURSDAY_NS = 1_795_680_000 * SECOND
"""2026-11-26, 08:00 UTC, 03:00 Eastern: maintenance begins."""


@dataclass
class Change:
    """One delta of the exchange."""

    market: str
    clock: int
    price: int
    qty: int


@dataclass
class Model:
    """The exchange, its connection to one recorder, and what the recorder's journal holds."""

    at_ns: int = MONDAY_NS
    wire_has_clock: bool = True
    records: list[wire.Record] = field(default_factory=list)
    changes: dict[str, list[Change]] = field(default_factory=lambda: {m: [] for m in MARKETS})
    received: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MARKETS, 0))
    """The changes of each market up to which the recorder has every one."""
    late: dict[str, list[int]] = field(default_factory=lambda: {m: [] for m in MARKETS})
    """The changes received while the book was stale."""
    synced: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)
    expected: dict[int, bool] = field(default_factory=dict)
    """By record of a snapshot that ends a gap: whether its market is unchanged."""
    clocks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MARKETS, 0))
    session: Session | None = None
    frame_record: int = 0
    conn: int = 0
    seq: int = 0
    dropping: int = 0
    asked: list[str] = field(default_factory=list)

    def connect(self) -> None:
        self.disconnect()
        self.conn += 1
        self.seq = self.dropping = 0
        self.records.append(wire.connected(wire.conn_id(self.conn), self.at_ns))
        self.session = Session(MARKETS, reconnects=self.conn > 1)
        self.commands()
        reply = {"type": "subscribed", "id": 1, "msg": {"channel": "orderbook_delta", "sid": 1}}
        self.frame(json.dumps(reply).encode())

    def disconnect(self) -> None:
        if self.session is not None:
            self.note("disconnected", {"cause": "test"})
            self.session = None
            self.synced.clear()
            self.asked.clear()

    def note(self, kind: str, detail: Any, ticker: str = "") -> None:
        record = wire.note(
            kind, detail, sid=1 if ticker or kind != "disconnected" else 0, ticker=ticker
        )
        self.records.append((self.at_ns, wire.conn_id(self.conn), Kind.NOTE, record))

    def frame(self, frame: bytes) -> None:
        """Deliver a frame to the session, and journal it and its notes as capture does."""
        assert self.session is not None
        self.at_ns += SECOND // 100
        kind = self.session.receive(frame, self.at_ns / 1e9)
        for note in self.session.take_notes():
            self.note(note.kind, note.detail, note.market_ticker)
            if note.kind == "gap":
                self.synced -= {note.market_ticker} if note.market_ticker else self.synced
        self.records.append((self.at_ns, wire.conn_id(self.conn), kind, frame))
        self.frame_record = len(self.records) - 1
        for note in self.session.take_notes():
            self.note(note.kind, note.detail, note.market_ticker)

    def commands(self) -> None:
        """Let the session send its commands; it asks for the snapshots of markets."""
        assert self.session is not None
        for command in self.session.commands(self.at_ns / 1e9):
            params = json.loads(command)["params"]
            self.asked += [t for t in params["market_tickers"] if t not in self.asked]

    def send(self, frame: bytes) -> bool:
        """Send a numbered frame; returns whether it arrives."""
        if self.session is None:
            return False
        if self.dropping:
            self.dropping -= 1
            return False
        self.frame(frame)
        return True

    def act(self, market: str, levels: Sequence[tuple[int, int]], step: int) -> None:
        """One action of the exchange: its deltas share a clock."""
        self.clocks[market] += step
        clock = self.clocks[market]
        for price, qty in levels:
            self.changes[market].append(Change(market, clock, price, qty))
            number = len(self.changes[market])
            self.seq += 1
            sent = wire.delta(
                market, self.seq, "yes", price, qty, clock=clock if self.wire_has_clock else None
            )
            arrived = self.send(sent)
            if arrived and market in self.synced and self.received[market] == number - 1:
                self.received[market] = number
            elif arrived:
                self.late[market].append(number)

    def snapshot(self, market: str) -> None:
        """Send a market's snapshot, and judge it as the recorder must."""
        book: Counter[int] = Counter()
        for change in self.changes[market]:
            book[change.price] += change.qty
        self.seq += 1
        clock = self.clocks[market] if self.wire_has_clock else None
        stale = market not in self.synced
        frame = wire.snapshot(market, self.seq, +book, {}, clock=clock)
        if not self.send(frame):
            return
        changes, last = self.changes[market], self.received[market]
        complete_clock = changes[last - 1].clock if last else 0
        missed = [
            number
            for number in range(last + 1, len(changes) + 1)
            if number not in self.late[market] or changes[number - 1].clock != complete_clock
        ]
        if stale and market in self.seen:
            self.expected[self.frame_record] = not missed
        self.seen.add(market)
        self.received[market] = len(changes)
        self.late[market].clear()
        self.synced.add(market)
        if market in self.asked:
            self.asked.remove(market)

    def run(self, steps: Iterable[tuple[Any, ...]]) -> None:
        """Play a sequence of steps; snapshots that were asked for come at last."""
        self.connect()
        for step in steps:
            if step[0] == "act":
                self.act(*step[1:])
            elif step[0] == "drop":
                self.dropping = step[1]
            elif step[0] == "connect":
                self.connect()
            elif self.session is not None:
                self.at_ns += 100 * SECOND
                self.commands()
                if self.asked:
                    self.snapshot(self.asked[step[1] % len(self.asked)])
        self.dropping = 0
        for _ in range(4 * len(MARKETS)):
            self.at_ns += 100 * SECOND
            self.commands()
            for market in list(self.asked):
                self.snapshot(market)


def built(
    records: list[wire.Record], cuts: Iterable[int] = (), state: BookState | None = None
) -> tuple[list[Rows], BookState]:
    after, rows = state or BookState(), []
    for block in wire.blocks(records, cuts):
        more, after = build_rows(decode([block]), after)
        rows.append(more)
    return rows, after


def stream(rows: Iterable[Rows]) -> list[dict[str, Any]]:
    return [
        {**row, "detail": json.loads(row["detail"])}
        for part in rows
        for row in part.tables["stream_events"].to_pylist()
        if row["detail"].startswith("{")
    ]


def of_kind(rows: Iterable[Rows], kind: str) -> list[dict[str, Any]]:
    return [row for row in stream(rows) if row["kind"] == kind]


MARKET = st.sampled_from(MARKETS)
LEVEL = st.tuples(st.sampled_from([1000, 2000, 3000]), st.integers(1, 50))
STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("act"),
            MARKET,
            st.lists(LEVEL, min_size=1, max_size=3, unique_by=lambda level: level[0]),
            st.integers(1, 3),
        ),
        st.tuples(st.just("drop"), st.integers(1, 3)),
        st.tuples(st.just("connect")),
        st.tuples(st.just("snapshot"), st.integers(0, 2)),
    ),
    max_size=40,
)
THREE = [(1000, 1), (2000, 2), (3000, 3)]


@given(STEPS, st.lists(st.integers(1, 120), max_size=3))
@example([("snapshot", 0)] * 3 + [("drop", 1), ("act", "A-1", THREE[:1], 1)], [])
@example(  # the gap cuts an action in two: the clock is the same, and a change is missing
    [("snapshot", 0)] * 3
    + [("act", "A-1", THREE[:1], 1), ("drop", 1), ("act", "A-1", THREE, 1), ("connect",)],
    [5],
)
@settings(max_examples=80, deadline=None)
def test_a_market_is_unchanged_if_and_only_if_nothing_was_missed(
    steps: list[tuple[Any, ...]], cuts: list[int]
) -> None:
    model = Model()
    model.run(steps)
    rows, _ = built(model.records, cuts)
    found = {
        row["record"]: bool(row["detail"].get("unchanged"))
        for row in of_kind(rows, "snapshot")
        if row["record"] in model.expected
    }
    assert found == model.expected
    changed = {r["record"] for r in of_kind(rows, "resynced") if r["market_ticker"]}
    assert changed == {n for n, unchanged in model.expected.items() if not unchanged}
    assert not of_kind(rows, "clock_fell")
    uncut, _ = built(model.records)
    assert stream(rows) == stream(uncut)


@given(STEPS)
@settings(max_examples=30, deadline=None)
def test_without_clocks_nothing_is_called_unchanged_or_changed(
    steps: list[tuple[Any, ...]],
) -> None:
    model = Model(wire_has_clock=False)
    model.run(steps)
    rows, _ = built(model.records)
    assert not [row for row in stream(rows) if "unchanged" in row["detail"]]
    assert not [row for row in stream(rows) if "clock" in row["detail"]]


def test_resynced_carries_the_counts_and_a_row_per_changed_market() -> None:
    model = Model()
    model.run([("snapshot", 0)] * 3)
    model.act("A-1", THREE, 1)
    model.dropping = 1
    model.act("B-2", THREE[:1], 1)
    model.act("A-1", THREE[:1], 1)  # shows the gap
    model.run([])  # the connection is replaced, and every snapshot arrives
    rows, _ = built(model.records)
    summary = [row for row in of_kind(rows, "resynced") if not row["market_ticker"]]
    assert [(row["detail"]["unchanged"], row["detail"]["changed"]) for row in summary] == [(1, 2)]
    assert summary[0]["detail"]["cause"] == "connected"
    assert summary[0]["detail"]["markets"] == 3
    changed = {
        r["market_ticker"]: r["detail"] for r in of_kind(rows, "resynced") if r["market_ticker"]
    }
    assert changed.keys() == {"A-1", "B-2"}
    assert changed["B-2"] | {"seconds": 0} == {
        "unchanged": False,
        "clock": 1,
        "after": 0,
        "seconds": 0,
    }


def test_a_gap_that_is_resynced_has_counts_too() -> None:
    model = Model()
    model.run([("snapshot", 0)] * 3)
    model.dropping = 1
    model.act("B-2", THREE[:1], 1)
    model.act("A-1", THREE[:1], 1)
    model.at_ns += 100 * SECOND
    model.commands()
    for market in MARKETS:
        model.snapshot(market)
    rows, _ = built(model.records)
    [summary] = [
        row
        for row in of_kind(rows, "resynced")
        if not row["market_ticker"] and "got" in row["detail"]
    ]
    assert summary["detail"]["markets"] == 3
    assert (summary["detail"]["unchanged"], summary["detail"]["changed"]) == (1, 2)


CONN = wire.conn_id(1)


def synced(at_ns: int = MONDAY_NS, clock: int | None = 7) -> list[wire.Record]:
    return [
        wire.connected(CONN, at_ns),
        (at_ns, CONN, Kind.SNAPSHOT, wire.snapshot("A-1", 1, {1000: 500}, {}, clock=clock)),
    ]


def deltas(at_ns: int, *clocks: int | None, first_seq: int = 2) -> list[wire.Record]:
    return [
        (at_ns, CONN, Kind.DELTA, wire.delta("A-1", seq, "yes", 2000, 100, clock=clock))
        for seq, clock in enumerate(clocks, first_seq)
    ]


@pytest.mark.parametrize("cut", [(), (2,), (3,), (2, 3, 4)])
@pytest.mark.parametrize(
    ("clocks", "fallen"),
    [
        ((8, 8, 9), None),
        ((7,), 2),  # at its snapshot's
        ((3,), 2),
        ((8, 9, 8), 4),  # below the one before
        ((8, 7, 9), 3),
        ((8, None, 7), None),  # never compared with a frame that has none
        ((None, 1), None),
    ],
)
def test_a_clock_that_falls_makes_the_book_stale(
    clocks: tuple[int | None, ...], fallen: int | None, cut: tuple[int, ...]
) -> None:
    records = synced() + deltas(MONDAY_NS + SECOND, *clocks)
    rows, state = built(records, cut)
    fell = of_kind(rows, "clock_fell")
    assert [row["record"] for row in fell] == ([] if fallen is None else [fallen])
    gaps = [row["record"] for row in of_kind(rows, "gap") if row["detail"]["cause"] == "clock_fell"]
    assert gaps == ([] if fallen is None else [fallen])
    assert state.books["A-1"].verified is (fallen is None)
    requested = [stale.cause for part in rows for stale in part.stale_books]
    assert requested == ([] if fallen is None else ["clock_fell"])


def test_a_snapshot_older_than_the_book_on_its_connection_is_requested_again() -> None:
    records = synced() + deltas(MONDAY_NS, 8, 9)
    late = MONDAY_NS + SECOND
    records.append((late, CONN, Kind.SNAPSHOT, wire.snapshot("A-1", 4, {1000: 500}, {}, clock=8)))
    rows, state = built(records)
    [fell] = of_kind(rows, "clock_fell")
    assert (fell["detail"]["of"], fell["detail"]["clock"], fell["detail"]["after"]) == (
        "snapshot",
        8,
        9,
    )
    assert not state.books["A-1"].verified
    records.append((late, CONN, Kind.SNAPSHOT, wire.snapshot("A-1", 5, {1000: 500}, {}, clock=8)))
    rows, state = built(records)
    assert len(of_kind(rows, "clock_fell")) == 1
    assert state.books["A-1"].verified


@pytest.mark.parametrize(
    ("at_s", "compared"),
    [(-1, True), (0, False), (7_199, False), (7_200, False), (100_000, False)],
)
def test_clocks_are_not_compared_across_maintenance(at_s: int, compared: bool) -> None:
    records = synced(THURSDAY_NS - 10 * SECOND) + deltas(THURSDAY_NS + at_s * SECOND, 3)
    rows, state = built(records)
    assert bool(of_kind(rows, "clock_fell")) is compared
    assert state.books["A-1"].verified is not compared


def test_the_recorded_schedule_replaces_the_default_windows() -> None:
    always: dict[str, Any] = {"weekly": [], "windows": []}
    note = (THURSDAY_NS - 9 * SECOND, CONN, Kind.NOTE, wire.note("schedule", always))
    records = [note, *synced(THURSDAY_NS - 8 * SECOND), *deltas(THURSDAY_NS + SECOND, 3)]
    rows, _ = built(records)
    assert of_kind(rows, "clock_fell")
    window = [{"since": "2026-11-30T11:59:00Z", "until": "2026-11-30T12:00:30Z"}]
    note = (
        MONDAY_NS - 90 * SECOND,
        CONN,
        Kind.NOTE,
        wire.note("schedule", always | {"windows": window}),
    )
    records = [note, *synced(MONDAY_NS - 80 * SECOND), *deltas(MONDAY_NS + 60 * SECOND, 3)]
    for cut in ([], [1], [2], [3]):
        rows, _ = built(records, cut)
        assert not of_kind(rows, "clock_fell")


def reconnected(*, clock: int, at_ns: int = MONDAY_NS + 60 * SECOND) -> list[wire.Record]:
    conn = wire.conn_id(2)
    return [
        wire.started(at_ns),
        wire.connected(conn, at_ns),
        (
            at_ns,
            conn,
            Kind.SNAPSHOT,
            wire.snapshot("A-1", 1, {1000: 500, 2000: 100}, {}, clock=clock),
        ),
    ]


@pytest.mark.parametrize("clock", [8, 9])
def test_a_restarted_recorder_continues_from_the_saved_clocks(clock: int, tmp_path: Any) -> None:
    before = synced() + deltas(MONDAY_NS + SECOND, 8)
    _, state = built(before)
    state_files.save(state, tmp_path / "x.state")
    saved = state_files.load(tmp_path / "x.state")
    records = before + reconnected(clock=clock)
    block = wire.blocks(records, [len(before)])[1]
    rows, _ = build_rows(decode([block]), saved)
    whole, _ = built(records)
    assert stream([rows]) == [r for r in stream(whole) if r["record"] >= len(before)]
    [snapshot] = of_kind([rows], "snapshot")
    assert snapshot["detail"].get("unchanged", False) is (clock == 8)


def test_after_an_earlier_versions_state_clocks_begin_with_the_next_start(tmp_path: Any) -> None:
    before = synced() + deltas(MONDAY_NS + SECOND, 8)
    _, state = built(before)
    path = tmp_path / "x.state"
    state_files.save(state, path)
    older = state_files.load(path)
    older = BookState(**{**vars(older), "clocks": MarketClocks(tracked=False)})
    records = before + reconnected(clock=8) + reconnected(clock=8, at_ns=MONDAY_NS + 90 * SECOND)
    rows, _ = build_rows(decode(wire.blocks(records, [len(before)])[1:]), older)
    proved = [row["detail"].get("unchanged") for row in of_kind([rows], "snapshot")]
    assert proved == [None, True]


END_NS = MONDAY_NS + 3_600 * SECOND
HOUR = datetime.fromtimestamp(MONDAY_NS / 1e9, UTC)


def gap(at_ns: int) -> wire.Record:
    return (at_ns, CONN, Kind.NOTE, wire.note("gap", {"cause": "test"}, sid=1))


def full_book(at_ns: int, seq: int, clock: int, conn: bytes = CONN) -> wire.Record:
    frame = wire.snapshot("A-1", seq, {1000: 500}, {}, clock=clock)
    return (at_ns, conn, Kind.SNAPSHOT, frame)


def reconnect(end_ns: int, begin_ns: int, clock: int) -> list[wire.Record]:
    conn = wire.conn_id(2)
    ended = wire.note("disconnected", {"cause": "test"})
    return [
        (end_ns, CONN, Kind.NOTE, ended),
        wire.connected(conn, begin_ns),
        full_book(begin_ns, 1, clock, conn),
    ]


def in_hour(rows: Iterable[Rows], dataset: str, hour: datetime) -> pa.Table:
    """The rows of a dataset that belong into an hour, as the archive has them."""
    column = DATASETS[dataset].time
    tables = [part.tables[dataset] for part in rows if dataset in part.tables]
    table = pa.concat_tables(tables)
    times = table[column].to_pylist()
    return table.filter(
        pa.array([hour <= at < hour + timedelta(hours=1) for at in times], pa.bool_())
    )


def covered_s(
    rows: Sequence[Rows], hour: datetime, checkpoints: Sequence[dict[str, Any]] = ()
) -> float:
    events = in_hour(rows, "stream_events", hour).to_pylist()
    events.sort(key=lambda row: (row["record"], row["kind"] == "snapshot"))
    found = coverage(
        hour,
        hour + timedelta(hours=1),
        [*checkpoints, *events],
        {CONN_ID: hour + timedelta(hours=1)} | {wire_id(2): hour + timedelta(hours=1)},
    )
    return found.by_market["A-1"]


def wire_id(number: int) -> str:
    return str(uuid.UUID(bytes=wire.conn_id(number)))


CONN_ID = wire_id(1)


def synced_in_analytics(
    rows: Sequence[Rows], hour: datetime, checkpoints: Iterable[pa.Table] = ()
) -> list[bool]:
    found = books.books(
        hour,
        [in_hour(rows, "orderbook_events", hour)],
        checkpoints,
        [in_hour(rows, "stream_events", hour)],
    )
    verified: list[bool] = found.frames.verified.tolist()
    return verified


@pytest.mark.parametrize("reconnects", [False, True])
@pytest.mark.parametrize(("clock", "unchanged"), [(7, True), (8, False)])
def test_an_unchanged_market_is_synced_through_the_gap(
    clock: int, unchanged: bool, reconnects: bool
) -> None:
    at_ns = MONDAY_NS + 600 * SECOND
    after = (
        reconnect(at_ns, at_ns + 60 * SECOND, clock)
        if reconnects
        else [gap(at_ns), full_book(at_ns + 60 * SECOND, 5, clock)]
    )
    rows, _ = built([*synced(), *after])
    assert covered_s(rows, HOUR) == (3_600 if unchanged else 3_540)
    assert synced_in_analytics(rows, HOUR) == ([True, True] if unchanged else [True, False, True])


@pytest.mark.parametrize("reconnects", [False, True])
@pytest.mark.parametrize(("clock", "unchanged"), [(7, True), (8, False)])
def test_an_unchanged_market_is_synced_in_every_hour_of_the_gap(
    clock: int, unchanged: bool, reconnects: bool
) -> None:
    """The gap lasts from 10 s before an hour's end over a whole hour until 10 s after it."""
    since_ns, until_ns = END_NS - 10 * SECOND, END_NS + 3_610 * SECOND
    beat = (END_NS + 5 * SECOND, CONN, Kind.NOTE, wire.note("heartbeat", {}))
    if reconnects:
        records = synced() + reconnect(since_ns, until_ns, clock)
        records.insert(-2, (beat[0], bytes(16), *beat[2:]))
    else:
        records = [*synced(), gap(since_ns), beat, full_book(until_ns, 5, clock)]
    cuts = [
        n
        for n in range(1, len(records))
        if records[n][0] // HOUR_NS != records[n - 1][0] // HOUR_NS
    ]
    rows, states = [], []
    state = BookState()
    for block in wire.blocks(records, cuts):
        states.append(state)
        more, state = build_rows(decode([block]), state)
        rows.append(more)
    missing = 0 if unchanged else 10
    assert covered_s(rows, HOUR) == 3_600 - missing
    verified = synced_in_analytics(rows, HOUR)
    assert verified == ([True] if unchanged else [True, False])
    for i, expected in ((1, 3_600 if unchanged else 0), (2, 3_600 - missing)):
        hour = HOUR + timedelta(hours=i)
        table = state_files.checkpoint(states[i], hour)
        row = table.slice(0, 1).to_pylist()[0]
        assert row["verified"] is False
        opening = {**row, "ingest_ts": hour, "kind": "checkpoint"}
        assert covered_s(rows, hour, [opening]) == expected
    assert synced_in_analytics(rows, hour, [table]) == [unchanged, True]

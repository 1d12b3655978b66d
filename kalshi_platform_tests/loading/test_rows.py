"""Building rows in columns against the reference book, for any stream of frames."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.exchange.book import Book, BookError, delta_change
from kalshi_platform.exchange.columnar import decode
from kalshi_platform.exchange.frames import decode_delta, decode_head, decode_snapshot
from kalshi_platform.journal.kind import Kind
from kalshi_platform.loading import book_state as books
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.rows import Rows, build_rows
from kalshi_platform_tests import wire
from kalshi_platform_tests.properties import examples

TICKERS = ("A-1", "B-2", "C-3")
PRICES = (100, 4_800, 5_200, 9_950)


@dataclass
class Script:
    """Frames that an exchange could send, with the reference books that follow them."""

    records: list[wire.Record] = field(default_factory=list)
    books: dict[str, Book] = field(default_factory=dict)
    sizes: list[tuple[str, str, int, int]] = field(default_factory=list)
    """(ticker, side, price, size) after every event row, in order."""
    conn: bytes = wire.conn_id(1)
    seq: int = 0
    at: int = wire.NOON_NS

    def add(self, kind: int, frame: bytes) -> None:
        self.at += 1_000_000
        self.records.append((self.at, self.conn, kind, frame))


@st.composite
def scripts(draw: st.DrawFn) -> Script:
    """Connections, snapshots, deltas, acks and gaps, in any order that the wire allows."""
    script = Script()
    script.records.append(wire.connected(script.conn, script.at))
    for _ in range(draw(st.integers(1, 40))):
        step = draw(st.sampled_from(["delta"] * 6 + ["snapshot"] * 2 + ["ok", "gap", "reconnect"]))
        ticker = draw(st.sampled_from(TICKERS))
        if step == "reconnect":
            script.add(Kind.NOTE, wire.note("disconnected", {"cause": "test"}))
            script.conn = wire.conn_id(int.from_bytes(script.conn) + 1)
            script.seq = 0
            script.records.append(wire.connected(script.conn, script.at))
            for book in script.books.values():
                book.mark_stale()
            continue
        script.seq += 1
        if step == "gap":
            script.add(
                Kind.NOTE, wire.note("gap", {"expected": script.seq, "got": script.seq + 1}, sid=1)
            )
            for book in script.books.values():
                book.mark_stale()
        elif step == "ok":
            script.add(Kind.CONTROL, wire.ok(script.seq))
        elif step == "snapshot":
            ladders = [
                draw(st.dictionaries(st.sampled_from(PRICES), st.integers(1, 999), max_size=3))
                for _ in range(2)
            ]
            frame = wire.snapshot(ticker, script.seq, *ladders)
            script.add(Kind.SNAPSHOT, frame)
            script.books[ticker] = Book(ticker)
            script.books[ticker].apply_snapshot(decode_snapshot(frame))
            script.sizes += [
                (ticker, side, p, q)
                for side, ladder in zip(("yes", "no"), ladders, strict=True)
                for p, q in sorted(ladder.items())
            ]
        elif ticker in script.books and script.books[ticker] is not None:
            book = script.books[ticker]
            side, price = draw(st.sampled_from(("yes", "no"))), draw(st.sampled_from(PRICES))
            held = book.ladders[side].get(price, 0)
            qty = draw(st.integers(-held, 500).filter(bool))
            if _snapshotted_on(script, ticker):
                frame = wire.delta(ticker, script.seq, side, price, qty)
                script.add(Kind.DELTA, frame)
                size = book.apply_delta(delta_change(decode_delta(frame)))
                script.sizes.append((ticker, side, price, size))
    return script


def _snapshotted_on(script: Script, ticker: str) -> bool:
    return any(
        conn == script.conn
        and kind == Kind.SNAPSHOT
        and decode_snapshot(frame).market_ticker == ticker
        for _, conn, kind, frame in script.records
    )


def run(records: list[wire.Record], cuts: list[int]) -> tuple[list[Rows], BookState]:
    state, out = BookState(), []
    for block in wire.blocks(records, cuts):
        rows, state = build_rows(decode([block]), state)
        out.append(rows)
    return out, state


def gathered(rows: list[Rows], dataset: str) -> list[dict[str, Any]]:
    tables = [r.tables[dataset] for r in rows]
    result: list[dict[str, Any]] = pa.concat_tables(
        [t.unify_dictionaries() for t in tables]
    ).to_pylist()
    return result


@given(scripts(), st.lists(st.integers(1, 60), max_size=4))
@examples(150)
def test_sizes_and_books_equal_the_reference_for_any_split(script: Script, cuts: list[int]) -> None:
    rows, state = run(script.records, cuts)
    events = gathered(rows, "orderbook_events")
    got = [
        (e["market_ticker"], e["side"], int(e["price"] * 10_000), int(e["size"] * 100))
        for e in events
    ]
    assert got == script.sizes
    levels = {
        (r["market_ticker"], r["side"], r["price"]): r["size"]
        for r in state.levels.iter_rows(named=True)
    }
    expected = {
        (ticker, side, price): size
        for ticker, book in script.books.items()
        for side, ladder in book.ladders.items()
        for price, size in ladder.items()
    }
    assert levels == expected


@given(
    scripts(), st.lists(st.integers(1, 60), max_size=4), st.sampled_from([0, books.RECENT_LEVELS])
)
@examples(100)
def test_splitting_a_range_changes_neither_rows_nor_state(
    script: Script, cuts: list[int], kept_apart: int
) -> None:
    whole, state = run(script.records, [])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(books, "RECENT_LEVELS", kept_apart)
        parts, state_in_parts = run(script.records, cuts)
    for dataset in ("orderbook_events", "stream_events"):
        assert gathered(parts, dataset) == gathered(whole, dataset)
    assert state_in_parts.books == state.books
    assert state_in_parts.connections == state.connections
    assert state_in_parts.version == state.version
    assert sorted(state_in_parts.levels.rows()) == sorted(state.levels.rows())


@given(scripts(), st.lists(st.integers(1, 60), max_size=4))
@examples(100)
def test_latest_levels_follows_snapshots_that_drop_levels(script: Script, cuts: list[int]) -> None:
    rows, _ = run(script.records, cuts)
    latest: dict[tuple[str, str, Decimal], Decimal] = {}
    for row in gathered(rows, "latest_levels"):  # what ReplacingMergeTree FINAL keeps
        latest[row["market_ticker"], row["side"], row["price"]] = row["size"]
    now = {(t, s, int(p * 10_000)): int(size * 100) for (t, s, p), size in latest.items() if size}
    assert now == {
        (ticker, side, price): size
        for ticker, book in script.books.items()
        for side, ladder in book.ladders.items()
        for price, size in ladder.items()
    }


@given(scripts(), st.lists(st.integers(1, 60), max_size=4))
@examples(60)
def test_every_frame_is_in_exactly_one_table(script: Script, cuts: list[int]) -> None:
    rows, _ = run(script.records, cuts)
    numbers: dict[tuple[str, int], set[str]] = {}
    for event in gathered(rows, "orderbook_events"):
        numbers.setdefault((event["conn_id"], event["seq"]), set()).add(event["type"])
    for event in gathered(rows, "stream_events"):
        if event["seq"]:
            numbers.setdefault((event["conn_id"], event["seq"]), set()).add(event["kind"])
    import uuid

    sent = {
        (str(uuid.UUID(bytes=conn)), decode_head(frame).seq)
        for _, conn, kind, frame in script.records
        if kind != Kind.NOTE
    }
    assert numbers.keys() == sent
    assert all(len(kinds) == 1 for kinds in numbers.values())


def test_a_negative_level_is_recorded_and_makes_the_book_stale() -> None:
    conn = wire.conn_id(1)
    at = wire.NOON_NS
    records: list[wire.Record] = [
        wire.connected(conn, at),
        (at, conn, Kind.SNAPSHOT, wire.snapshot("A-1", 1, {4_800: 300}, {})),
        (at, conn, Kind.DELTA, wire.delta("A-1", 2, "yes", 4_800, -500)),
        (at, conn, Kind.DELTA, wire.delta("A-1", 3, "yes", 4_800, -100)),
    ]
    (rows,), state = run(records, [])
    events = gathered([rows], "orderbook_events")
    assert [e["size"] for e in events] == [Decimal("3.00"), Decimal("-2.00"), Decimal("-3.00")]
    gaps = [e for e in gathered([rows], "stream_events") if e["kind"] == "gap"]
    assert len(gaps) == 1
    assert "negative_level" in gaps[0]["detail"]
    assert gaps[0]["market_ticker"] == "A-1"
    assert [d.market_ticker for d in rows.stale_books] == ["A-1"]
    assert not state.books["A-1"].verified


def test_a_delta_before_its_snapshot_is_kept_as_a_gap() -> None:
    conn = wire.conn_id(1)
    at = wire.NOON_NS
    records: list[wire.Record] = [
        wire.connected(conn, at),
        (at, conn, Kind.DELTA, wire.delta("A-1", 1, "no", 5_200, 700)),
        (at, conn, Kind.DELTA, wire.delta("A-1", 2, "no", 5_200, 100)),
    ]
    (rows,), state = run(records, [])
    assert [e["size"] for e in gathered([rows], "orderbook_events")] == [
        Decimal("7.00"),
        Decimal("8.00"),
    ]
    assert len([e for e in gathered([rows], "stream_events") if e["kind"] == "gap"]) == 1
    assert rows.tables["latest_levels"].num_rows == 0
    assert not state.books["A-1"].verified


def test_no_bids_on_the_yes_scale_are_converted() -> None:
    conn = wire.conn_id(1)
    at = wire.NOON_NS
    records: list[wire.Record] = [
        wire.connected(conn, at, use_yes_price=True),
        (at, conn, Kind.SNAPSHOT, wire.snapshot("A-1", 1, {4_700: 300}, {5_200: 100})),
        (at, conn, Kind.DELTA, wire.delta("A-1", 2, "no", 5_200, 200)),
    ]
    (rows,), _ = run(records, [])
    assert [(e["side"], e["price"]) for e in gathered([rows], "orderbook_events")] == [
        ("yes", Decimal("0.4700")),
        ("no", Decimal("0.4800")),
        ("no", Decimal("0.4800")),
    ]


def test_a_killed_recorder_is_a_disconnected_row() -> None:
    conn = wire.conn_id(1)
    at = wire.NOON_NS
    records: list[wire.Record] = [
        wire.connected(conn, at),
        (at + wire.SECOND, conn, Kind.SNAPSHOT, wire.snapshot("A-1", 1, {4_700: 300}, {})),
        wire.started(at + 8 * wire.SECOND),
    ]
    for cuts in ([], [1], [2]):
        rows, state = run(records, cuts)
        ends = [e for e in gathered(rows, "stream_events") if e["kind"] == "disconnected"]
        assert len(ends) == 1
        assert '"span_s":7.0' in ends[0]["detail"]
        assert not state.books["A-1"].verified
        assert not state.connections


def test_unreadable_frames_are_kept_whole() -> None:
    conn = wire.conn_id(1)
    at = wire.NOON_NS
    odd = b'{"type":"orderbook_delta","sid":1,"seq":2,"msg":{"market_ticker":"A-1","side":"maybe"}}'
    garbage = b"\xff\xfe not json"
    records: list[wire.Record] = [
        wire.connected(conn, at),
        (at, conn, Kind.SNAPSHOT, wire.snapshot("A-1", 1, {4_700: 300}, {})),
        (at, conn, Kind.DELTA, odd),
        (at, conn, Kind.MALFORMED, garbage),
        (at, conn, Kind.DELTA, wire.delta("A-1", 3, "yes", 4_700, 100)),
    ]
    (rows,), _ = run(records, [])
    malformed = [e for e in gathered([rows], "stream_events") if e["kind"] == "malformed"]
    assert [e["seq"] for e in malformed] == [2, 0]
    assert "maybe" in malformed[0]["detail"]
    assert "base64:" in malformed[1]["detail"]
    assert [e["seq"] for e in gathered([rows], "orderbook_events")] == [1, 3]


def test_the_reference_book_refuses_a_negative_level() -> None:
    book = Book("A-1")
    book.apply_snapshot(decode_snapshot(wire.snapshot("A-1", 1, {100: 5}, {})))
    try:
        book.apply_delta(delta_change(decode_delta(wire.delta("A-1", 2, "yes", 100, -6))))
    except BookError as error:
        assert "-0.01 contracts" in str(error)
    else:
        raise AssertionError("a negative level was accepted")

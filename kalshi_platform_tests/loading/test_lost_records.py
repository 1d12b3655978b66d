"""Lost records of a damaged journal are reported, and no book that depends on them is synced."""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.exchange.columnar import decode_range
from kalshi_platform.exchange.frames import decode_head
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.reader import JournalRange, LogOffset, LostRange
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.rows import Rows, build_rows
from kalshi_platform.loading.state_files import checkpoint, load, save
from kalshi_platform.utc_hours import floor_hour
from kalshi_platform_tests import wire
from kalshi_platform_tests.loading.test_rows import Script, gathered, scripts
from kalshi_platform_tests.properties import examples

SECOND = wire.SECOND
Lost = set[int]


def parts(records: list[wire.Record], lost: Lost, cuts: list[int]) -> Iterator[JournalRange]:
    """The records as read from a journal that has lost some of them."""
    edges = {n for n in range(1, len(records)) if (n in lost) != (n - 1 in lost)}
    for block in wire.blocks(records, [*edges, *cuts]):
        if block.first_n not in lost:
            yield block
            continue
        end = block.first_n + block.rows
        after = next(n for n in range(end, len(records)) if n not in lost)
        yield LostRange(block.first_n, block.rows, records[after][0], LogOffset(0, end, end))


def run(
    records: list[wire.Record], lost: Lost, cuts: list[int] | None = None
) -> tuple[list[Rows], BookState]:
    state, out = BookState(), []
    for part in parts(records, lost, cuts or []):
        rows, state = build_rows(decode_range(part), state)
        out.append(rows)
    return out, state


def gaps(rows: list[Rows]) -> list[dict[str, Any]]:
    """The gap rows that damage made, with their detail's fields."""
    found = [e for e in gathered(rows, "stream_events") if e["kind"] == "gap"]
    all_of = [{**e, **json.loads(e["detail"])} for e in found]
    return [it for it in all_of if it["cause"] == "journal_damaged"]


holes = st.lists(st.tuples(st.integers(0, 45), st.integers(1, 15)), min_size=1, max_size=3)


def within(holes: list[tuple[int, int]], script: Script) -> Lost:
    """Not the last record: a loss at the very end shows only with a later record."""
    lost = {n for begin, length in holes for n in range(begin, begin + length)}
    return lost & set(range(len(script.records) - 1))


@given(scripts(), holes, st.lists(st.integers(1, 60), max_size=3))
@examples(60)
def test_gaps_are_reported_and_only_true_books_are_synced(
    script: Script, holes: list[tuple[int, int]], cuts: list[int]
) -> None:
    lost = within(holes, script)
    rows, state = run(script.records, lost, cuts)
    kept: dict[str, set[int]] = defaultdict(set)
    gone: dict[str, set[int]] = defaultdict(set)
    for n, (_, conn, kind, frame) in enumerate(script.records):
        if kind != Kind.NOTE:
            of = gone if n in lost else kept
            of[str(uuid.UUID(bytes=conn))].add(decode_head(frame).seq)
    stream = gathered(rows, "stream_events")
    named: dict[str, set[int]] = defaultdict(set)
    for e in stream:
        detail = json.loads(e["detail"])
        if e["kind"] == "gap" and "expected" in detail:
            numbers = range(detail["expected"], detail["got"])
            named[e["conn_id"]].update(numbers)
    for connection, seqs in kept.items():
        assert {seq for seq in gone[connection] if seq < max(seqs)} <= named[connection]
        assert not named[connection] & seqs
    frames = {(e["conn_id"], e["seq"]) for e in gathered(rows, "orderbook_events")}
    frames |= {(e["conn_id"], e["seq"]) for e in stream if e["seq"]}
    assert frames == {(of_conn, seq) for of_conn, seqs in kept.items() for seq in seqs}

    levels: dict[str, dict[tuple[str, int], int]] = {}
    for r in state.levels.iter_rows(named=True):
        levels.setdefault(r["market_ticker"], {})[r["side"], r["price"]] = r["size"]
    for ticker, book in state.books.items():
        if book.verified and state.connections[book.conn].has_all_frames(book.sid):
            true = script.books[ticker].ladders
            expected = {(s, p): q for s, ladder in true.items() for p, q in ladder.items()}
            assert levels.get(ticker, {}) == expected


@given(scripts(), holes, st.lists(st.integers(1, 60), max_size=4))
@examples(40)
def test_splitting_damaged_ranges_changes_neither_rows_nor_state(
    script: Script, holes: list[tuple[int, int]], cuts: list[int]
) -> None:
    lost = within(holes, script)
    whole, state = run(script.records, lost)
    parts, in_parts = run(script.records, lost, [n for n in cuts if n not in lost])
    for dataset in ("orderbook_events", "stream_events"):
        assert gathered(parts, dataset) == gathered(whole, dataset)
    assert in_parts.books == state.books
    assert in_parts.connections == state.connections
    assert sorted(in_parts.levels.rows()) == sorted(state.levels.rows())


def recording(conn: bytes = wire.conn_id(1)) -> list[wire.Record]:
    """A connection, two books on sid 1 and trades on sid 2, a frame each second."""
    at = wire.NOON_NS
    frames = [
        (Kind.SNAPSHOT, wire.snapshot("A-1", 1, {4_800: 300}, {})),
        (Kind.SNAPSHOT, wire.snapshot("B-2", 2, {4_700: 100}, {})),
        (Kind.TRADE, wire.trade("A-1", 1, 4_800, 100)),
        (Kind.DELTA, wire.delta("A-1", 3, "yes", 4_800, 100)),
        (Kind.DELTA, wire.delta("A-1", 4, "yes", 4_800, 100)),
        (Kind.TRADE, wire.trade("A-1", 2, 4_800, 100)),
        (Kind.DELTA, wire.delta("B-2", 5, "yes", 4_700, 100)),
        (Kind.SNAPSHOT, wire.snapshot("B-2", 6, {4_700: 200}, {})),
        (Kind.SNAPSHOT, wire.snapshot("A-1", 7, {4_800: 500}, {})),
    ]
    noted = [(at + SECOND * (i + 1), conn, int(kind), f) for i, (kind, f) in enumerate(frames)]
    return [wire.connected(conn, at), *noted]


def test_a_lost_range_is_a_row_and_a_gap_per_subscription() -> None:
    rows, state = run(recording(), {4, 5})
    lost_range, books = gaps(rows)
    assert (lost_range["channel"], lost_range["record"], lost_range["until_record"]) == (
        "journal",
        4,
        6,
    )
    assert lost_range["ingest_ts"].timestamp() == (wire.NOON_NS + 3 * SECOND) / 1e9
    # the trades lost nothing: seq 2 follows 1; the books' next frame is seq 5
    assert (books["sid"], books["expected"], books["got"], books["missing"]) == (1, 3, 5, 2)
    assert books["channel"] == "orderbook_delta"
    assert books["span_s"] == 4.0  # from the last record before the lost range
    reported = [d for r in rows for d in r.stale_books]
    assert {(d.market_ticker, d.cause) for d in reported} == {
        ("A-1", "journal_damaged"),
        ("B-2", "journal_damaged"),
    }
    [back] = [e for e in gathered(rows, "stream_events") if e["kind"] == "resynced"]
    assert json.loads(back["detail"]) == {"expected": 3, "got": 5, "markets": 2, "seconds": 2.0}
    assert all(book.verified for book in state.books.values())


def test_after_a_lost_range_books_are_stale_until_proved(
    tmp_path: Any,
) -> None:
    hour = floor_hour(gathered(run(recording(), set())[0], "stream_events")[0]["ingest_ts"])
    rows, state = run([*recording()[:5], *recording()[5:7]], {5})
    assert not gaps(rows)[1:]  # trades only have come since
    assert state.books["A-1"].verified
    save(state, tmp_path / "state")
    kept = load(tmp_path / "state")
    assert kept.connections == state.connections
    books = checkpoint(kept, hour)
    assert books.num_rows
    assert not any(books["verified"].to_pylist())


def test_lost_end_and_beginning_of_connections_are_handled() -> None:
    first, second = recording(), recording(wire.conn_id(2))
    records = [*first, (first[-1][0], wire.conn_id(1), int(Kind.NOTE), b""), *second]
    lost = {len(first), len(first) + 1, len(first) + 2}  # its end; connected; the first snapshot
    rows, state = run(records, lost)
    stream = gathered(rows, "stream_events")
    [end] = [e for e in stream if e["kind"] == "disconnected"]
    assert end["conn_id"] == str(uuid.UUID(bytes=wire.conn_id(1)))
    assert json.loads(end["detail"])["cause"] == "its end is not in the journal"
    begin = [e for e in stream if e["kind"] == "connected"][-1]
    assert begin["conn_id"] == str(uuid.UUID(bytes=wire.conn_id(2)))
    assert json.loads(begin["detail"]) == {
        "use_yes_price": False,
        "assumed": "its beginning is not in the journal",
    }
    assert {(g["sid"], g["expected"], g["got"]) for g in gaps(rows)[1:]} == {(1, 1, 2)}
    assert set(state.connections) == {begin["conn_id"]}
    assert all(book.verified for book in state.books.values())  # by their later snapshots


def test_a_journal_beginning_within_a_connection_is_loaded() -> None:
    """Its older segments are past their retention, and the loads' states are gone."""
    [_, rest] = wire.blocks(recording(), [5])
    rows, state = build_rows(decode_range(rest), BookState(n=5))
    stream = gathered([rows], "stream_events")
    assert [e["kind"] for e in stream][:2] == ["connected", "gap"]
    named = {(g["sid"], g["expected"], g["got"]) for g in gaps([rows]) if not g["market_ticker"]}
    assert named == {(1, 1, 4), (2, 1, 2)}
    assert rows.tables["orderbook_events"].num_rows == 4
    assert all(book.verified for book in state.books.values())

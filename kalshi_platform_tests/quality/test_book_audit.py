"""The audit finds what differs, and is not fooled by what moved meanwhile or by the exchange's cache."""

from __future__ import annotations

from kalshi_platform.exchange.columnar import decode
from kalshi_platform.journal.kind import Kind
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.rows import build_rows
from kalshi_platform.quality import book_audit
from kalshi_platform_tests import wire

AT = wire.NOON_NS


def recent(*later: wire.Record) -> book_audit.Recent:
    """Two books a minute before AT, and what came later."""
    conn, early = wire.conn_id(1), AT - 60 * wire.SECOND
    records: list[wire.Record] = [
        wire.connected(conn, early),
        (
            early,
            conn,
            Kind.SNAPSHOT,
            wire.snapshot("A-1", 1, {4_800: 1_000, 4_700: 50}, {5_100: 70}),
        ),
        (early, conn, Kind.SNAPSHOT, wire.snapshot("B-2", 2, {1_000: 500}, {})),
        *later,
    ]
    seen, state = book_audit.Recent(), BookState()
    for block in wire.blocks(records, range(1, len(records))):
        rows, state = build_rows(decode([block]), state)
        seen.saw(rows, state)
    return seen


A = {"yes": [("0.4700", "0.50"), ("0.4800", "10.00")], "no": [("0.5100", "0.70")]}
B = {"yes": [("0.1000", "5.00")], "no": []}
SINCE = AT - 20 * wire.SECOND


def test_equal_books_are_equal() -> None:
    found = book_audit.compare(recent(), SINCE, {"A-1": A, "B-2": B})
    assert (found.markets, found.levels, found.mismatches) == (2, 4, ())


def test_a_wrong_size_a_missing_level_and_one_too_many_are_found() -> None:
    theirs = {"yes": [("0.4700", "0.50"), ("0.4800", "10.01")], "no": [("0.5200", "1.00")]}
    found = book_audit.compare(recent(), SINCE, {"A-1": theirs, "B-2": B})
    assert [(m.side, m.price, m.ours, m.theirs) for m in found.mismatches] == [
        ("no", "0.5100", "0.70", "0.00"),
        ("no", "0.5200", "0.00", "1.00"),
        ("yes", "0.4800", "10.00", "10.01"),
    ]


def test_a_level_that_moved_within_the_cache_time_is_not_compared() -> None:
    moved = (
        AT - 5 * wire.SECOND,
        wire.conn_id(1),
        int(Kind.DELTA),
        wire.delta("A-1", 3, "yes", 4_800, 100),
    )
    found = book_audit.compare(recent(moved), SINCE, {"A-1": A})  # theirs is from before
    assert found.mismatches == ()
    assert found.levels == 2


def test_a_level_that_moved_before_it_is_compared() -> None:
    moved = (
        AT - 40 * wire.SECOND,
        wire.conn_id(1),
        int(Kind.DELTA),
        wire.delta("A-1", 3, "yes", 4_800, 100),
    )
    found = book_audit.compare(recent(moved), SINCE, {"A-1": A})
    assert [m.price for m in found.mismatches] == ["0.4800"]


def test_a_book_that_is_not_verified_is_not_compared() -> None:
    gap = (AT, wire.conn_id(1), int(Kind.NOTE), wire.note("gap", {"expected": 3, "got": 4}, sid=1))
    seen = recent(gap)
    assert book_audit.comparable(seen.state, 0) == []
    assert book_audit.compare(seen, SINCE, {"A-1": {"yes": [], "no": []}}).markets == 0


def test_all_markets_get_their_turn() -> None:
    seen = recent()
    assert book_audit.comparable(seen.state, 0) == ["A-1", "B-2"]
    assert book_audit.comparable(seen.state, 1) == ["B-2", "A-1"]

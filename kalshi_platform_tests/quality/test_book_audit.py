"""The book comparison finds differences, and ignores levels that changed meanwhile or are cached."""

from __future__ import annotations

import pytest

from kalshi_platform.exchange.columnar import decode
from kalshi_platform.exchange.numbers import contracts, dollars
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


def test_a_level_changed_within_the_cache_time_is_not_compared() -> None:
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


# -- no bids on another scale than asked for -----------------------------------------------------------

SHALLOW = {
    "A-1": ({4_000: 100, 3_900: 50}, {5_500: 70, 5_400: 30}),
    "B-2": ({1_000: 500}, {8_800: 40}),
    "C-3": ({2_000: 500}, {}),
}
"""Books that are crossed on neither scale."""


def sent(*, yes_price: bool, read_on: bool = False) -> book_audit.Recent:
    """SHALLOW as an exchange quotes it on either scale, and as it was read."""
    conn, early = wire.conn_id(1), AT - 60 * wire.SECOND
    records = [wire.connected(conn, early, use_yes_price=read_on)]
    for seq, (ticker, (yes, no)) in enumerate(SHALLOW.items(), 1):
        quoted = {10_000 - p: q for p, q in no.items()} if yes_price else no
        records.append((early, conn, int(Kind.SNAPSHOT), wire.snapshot(ticker, seq, yes, quoted)))
    seen, state = book_audit.Recent(), BookState()
    rows, state = build_rows(decode(wire.blocks(records)), state)
    seen.saw(rows, state)
    return seen


def shown() -> dict[str, book_audit.Wire]:
    """SHALLOW as REST shows it, whatever the stream does."""
    return {
        ticker: {
            side: [(dollars(p), contracts(q)) for p, q in ladder.items()]
            for side, ladder in zip(("yes", "no"), ladders, strict=True)
        }
        for ticker, ladders in SHALLOW.items()
    }


@pytest.mark.parametrize("read_on", [False, True])
def test_books_that_mirror_the_exchanges_show_the_scale_of_the_stream(read_on: bool) -> None:
    wrong = book_audit.compare(sent(yes_price=not read_on, read_on=read_on), SINCE, shown())
    assert wrong.yes_price is (not read_on)
    assert wrong.mismatches
    right = book_audit.compare(sent(yes_price=read_on, read_on=read_on), SINCE, shown())
    assert (right.yes_price, right.mismatches) == (None, ())


def test_books_that_do_not_all_mirror_the_exchanges_show_no_scale() -> None:
    books = shown()
    books["B-2"] = {**books["B-2"], "no": [("0.1200", "40.00")]}  # as it is read
    found = book_audit.compare(sent(yes_price=True), SINCE, books)
    assert found.yes_price is None
    assert found.mismatches
    books["B-2"] = {**books["B-2"], "no": [("0.8800", "41.00"), ("0.8700", "1.00")]}  # neither way
    assert book_audit.compare(sent(yes_price=True), SINCE, books).yes_price is None
    only_yes = {"C-3": books["C-3"]}
    assert book_audit.compare(sent(yes_price=True), SINCE, only_yes).yes_price is None

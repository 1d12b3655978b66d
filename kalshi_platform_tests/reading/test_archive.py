"""The reader gives what was recorded: every event once and in order, nothing from later, and refusals with a remedy."""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from kalshi_platform.errors import NotCovered, RequestRefused
from kalshi_platform.journal.kind import Kind
from kalshi_platform.reading import Archive, EventKind, MarketBook
from kalshi_platform.schema import MARKET_CATALOG
from kalshi_platform.utc_hours import HOUR as ONE_HOUR
from kalshi_platform_tests import wire
from kalshi_platform_tests.analytics import reference
from kalshi_platform_tests.analytics.test_against_reference import (
    HOUR,
    HOUR_NS,
    JUDGED_LATER,
    Script,
    scripts,
)
from kalshi_platform_tests.properties import examples
from kalshi_platform_tests.reading.written import seal, write

START, END = HOUR - ONE_HOUR, HOUR + ONE_HOUR
US = timedelta(microseconds=1)
Ladders = tuple[dict[int, int], dict[int, int]]


@contextmanager
def archived(records: Sequence[wire.Record]) -> Iterator[Archive]:
    with tempfile.TemporaryDirectory() as folder:
        yield Archive(write(Path(folder), records))


def with_trades(records: Sequence[wire.Record], seed: int) -> list[wire.Record]:
    """The records, with a trade after some of them."""
    rng, found, number = random.Random(seed), [], 0
    for record in records:
        found.append(record)
        if rng.random() < 0.4:
            number += 1
            ticker = rng.choice(("A-1", "B-2"))
            frame = wire.trade(ticker, number, 4_800 + number, 100 * number)
            found.append((record[0], record[1], Kind.TRADE, frame))
    return found


def ladders(book: MarketBook) -> Ladders:
    return dict(book.yes.levels), dict(book.no.levels)


# -- replay ------------------------------------------------------------------------------------


@given(script=scripts())
@examples(60)
def test_a_replay_over_two_hours_has_every_frame_and_its_book(script: Script) -> None:
    states = [
        state
        for hour in (START, HOUR)
        for state in reference.Replay(int(hour.timestamp()) * wire.SECOND).run(script.records)
    ]
    tickers = sorted({state.ticker for state in states})
    if not tickers:
        return
    with archived(script.records) as archive:
        events = [
            (event, ladders(book))
            for event, book in archive.replay(tickers, START, END, allow_gaps=True)
        ]
    for ticker in tickers:
        got = [
            (event.kind.value, event.record, event.ts, found)
            for event, found in events
            if event.ticker == ticker and event.kind in {EventKind.DELTA, EventKind.SNAPSHOT}
        ]
        wanted = [
            (state.cause, state.record, state.ts, (positive(state.yes), positive(state.no)))
            for state in states
            if state.ticker == ticker and state.cause in {"delta", "snapshot"}
        ]
        assert got == wanted
    known = [event.known_us for event, _ in events]
    assert known == sorted(known)


def positive(ladder: dict[int, int]) -> dict[int, int]:
    return {price: size for price, size in ladder.items() if size > 0}


def two_shards() -> tuple[list[wire.Record], list[wire.Record]]:
    """Two recorders over the turn of an hour; the clock of the first is set back by some seconds meanwhile."""
    made = []
    for shard, ticker in enumerate(("A-1", "B-2")):
        conn, at = wire.conn_id(shard + 1), HOUR_NS - 4 * wire.SECOND
        records = [wire.connected(conn, at)]
        records.append(
            (at, conn, Kind.SNAPSHOT, wire.snapshot(ticker, 1, {4_700: 500}, {5_000: 300}))
        )
        for n in range(2, 60):
            at += wire.SECOND // 5 + shard
            if shard == 0 and n == 40:
                at -= 2 * wire.SECOND
            records.append(
                (at, conn, Kind.DELTA, wire.delta(ticker, n, "yes", 4_000 + 10 * n, 100))
            )
            if n % 5 == 0:
                records.append(
                    (at, conn, Kind.TRADE, wire.trade(ticker, n // 5, 4_800, n, number=n))
                )
        made.append(records)
    return made[0], made[1]


def test_shards_merge_with_each_in_the_order_of_its_records(tmp_path: Path) -> None:
    for shard, records in enumerate(two_shards()):
        write(tmp_path, records, shard=shard)
    events = [
        event
        for event, _ in Archive(tmp_path).replay(["B-2", "A-1"], START, END, allow_gaps=True)
        if event.kind is not EventKind.STALE
    ]
    for shard in (0, 1):
        own = [event.record or 0 for event in events if event.shard == shard]
        assert own == sorted(set(own))
        assert len(own) == 59 + 11
    changes = sum(a.shard != b.shard for a, b in pairwise(events))
    assert changes > 30, "the shards are interleaved"
    assert [e.known_us for e in events] == sorted(e.known_us for e in events)
    trade = next(event for event in events if event.kind is EventKind.TRADE)
    assert (trade.side, trade.price, trade.yes_price) == (
        "no",
        Decimal("0.5200"),
        Decimal("0.4800"),
    )
    assert trade.trade_id


def test_a_replay_begins_with_the_books_at_its_start(tmp_path: Path) -> None:
    write(tmp_path, two_shards()[0])
    archive = Archive(tmp_path)
    whole = list(archive.replay("A-1", START, END, trades=False, allow_gaps=True))
    at = HOUR + timedelta(seconds=1)
    replayed = archive.replay("A-1", at, END, trades=False, allow_gaps=True)
    first, book = next(replayed)
    assert (first.kind, first.known_at) == (EventKind.OPENING, at)
    assert ladders(book) == ladders(archive.book("A-1", at - US, allow_gaps=True))
    rest = list(replayed)
    assert [event for event, _ in rest] == [event for event, _ in whole][-len(rest) :]
    assert len(whole) > len(rest) > 30


# -- an instant --------------------------------------------------------------------------------


@given(script=scripts(), offset=st.integers(-8_000_000, 20_000_000))
@examples(60)
def test_the_book_at_an_instant_is_that_of_the_last_frame_by_then(
    script: Script, offset: int
) -> None:
    at = HOUR + offset * US
    us = reference_us(at)
    hour_ns = us // reference.HOUR_US * 3_600 * wire.SECOND
    wanted = {
        state.ticker: state
        for state in reference.Replay(hour_ns).run(script.records)
        if state.clock_us <= us
    }
    with archived(script.records) as archive:
        for ticker, state in wanted.items():
            try:
                book = archive.book(ticker, at, allow_gaps=True)
            except NotCovered:
                continue  # the archive ends before
            assert ladders(book) == (positive(state.yes), positive(state.no))
            yes = sorted(positive(state.yes).items(), reverse=True)
            assert book.bids() == [(reference.price(p), reference.size(q)) for p, q in yes]
            no = sorted(positive(state.no).items(), reverse=True)
            assert book.asks(2) == [(1 - reference.price(p), reference.size(q)) for p, q in no[:2]]
            assert book.bid == next(iter(book.bids(1)), None)
            assert book.ask == next(iter(book.asks(1)), None)
            assert book.to_polars().height == len(yes) + len(no)


def reference_us(at: datetime) -> int:
    return (at - reference.EPOCH) // US


# -- tables ------------------------------------------------------------------------------------


@given(script=scripts(), seed=st.integers(0, 9))
@examples(40)
def test_tables_are_those_of_the_reference_whether_computed_before_or_not(
    script: Script, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = write(Path(folder), with_trades(script.records, seed))
        archive = Archive(store)
        seal(store)
        tickers = followed(archive)
        if not tickers:
            return
        calls: list[Callable[[], pl.DataFrame]] = [
            lambda: archive.top(tickers, START, END, allow_gaps=True),
            lambda: archive.depth(tickers, START, END, allow_gaps=True),
            lambda: archive.imbalance(tickers, START, END, allow_gaps=True),
            lambda: archive.bars(tickers, START, END, every="1s", allow_gaps=True),
        ]
        computed_here = [call() for call in calls]
        seal(store, compute=True)
        for before, call in zip(computed_here, calls, strict=True):
            assert_frame_equal(before, call())


def followed(archive: Archive) -> list[str]:
    """The markets that have a book in some part of the two hours."""

    def has_book(ticker: str) -> bool:
        try:
            archive.top(ticker, START, END, allow_gaps=True)
        except NotCovered:
            return False
        return True

    return [ticker for ticker in ("A-1", "B-2", "C-3") if has_book(ticker)]


@given(script=scripts(kinds=("delta",) * 5 + ("snapshot",)), step=st.sampled_from(["300ms", "1s"]))
@examples(40)
def test_samples_and_bars_are_those_of_the_states(script: Script, step: str) -> None:
    with archived(with_trades(script.records, 1)) as archive:
        start, end = HOUR - timedelta(seconds=8), HOUR + timedelta(seconds=3)
        try:
            replayed = list(archive.replay("A-1", start, end, allow_gaps=True))
        except NotCovered:
            return
        states = states_of(archive, start, end)
        top = archive.top("A-1", start, end, every=step, allow_gaps=True)
        for row in top.to_dicts():
            before = [state for state in states if state[0] <= row["at"]]
            got = (row["yes_bid"], row["yes_bid_size"], row["yes_ask"], row["yes_ask_size"])
            assert got == (before[-1][1] if before else (None,) * 4)
        trades = [e for e, _ in replayed if e.kind is EventKind.TRADE]
        bars = archive.bars("A-1", start, end, every=step, allow_gaps=True).to_dicts()
        assert sum(bar["trades"] for bar in bars) == len(trades)
        assert sum(bar["volume"] for bar in bars) == sum((e.qty for e in trades), Decimal(0))
        begins = start
        for bar in bars:
            own = [e.yes_price for e in trades if begins <= e.known_at < bar["at"]]
            ends = (own[0], max(own), min(own), own[-1]) if own else (None,) * 4
            names = ("trade_open", "trade_high", "trade_low", "trade_close")
            assert tuple(bar[name] for name in names) == ends
            begins = bar["at"]
        assert begins == end


def states_of(archive: Archive, start: datetime, end: datetime) -> list[tuple[datetime, Any]]:
    found = []
    for event, book in archive.replay("A-1", start, end, trades=False, allow_gaps=True):
        bid, ask = book.bid or (None, None), book.ask or (None, None)
        found.append((event.known_at, (*bid, *ask)))
    return found


def quoted(conn: bytes) -> list[wire.Record]:
    """A minute of a market: 0.47 to 0.50 for 15 s, then 0.48 to 0.50, and heartbeats to the minute's end."""
    records = [wire.connected(conn, HOUR_NS)]
    records.append(
        (HOUR_NS, conn, Kind.SNAPSHOT, wire.snapshot("A-1", 1, {4_700: 300}, {5_000: 100}))
    )
    at = HOUR_NS + 15 * wire.SECOND
    records.append((at, conn, Kind.DELTA, wire.delta("A-1", 2, "yes", 4_800, 100)))
    beat = wire.note("heartbeat", {"state": "synced"})
    records += [(HOUR_NS + s * wire.SECOND, conn, Kind.NOTE, beat) for s in (20, 40, 60)]
    return records


def test_bars_weigh_spread_and_imbalance_by_time(tmp_path: Path) -> None:
    archive = Archive(write(tmp_path, quoted(wire.conn_id(1))))
    (bar,) = archive.bars("A-1", HOUR, HOUR + timedelta(minutes=1)).to_dicts()
    assert bar["at"] == HOUR + timedelta(minutes=1)
    assert (bar["open"], bar["close"]) == (Decimal("0.48500"), Decimal("0.49000"))
    assert (bar["high"], bar["low"]) == (Decimal("0.49000"), Decimal("0.48500"))
    assert bar["spread"] == pytest.approx((0.03 * 15 + 0.02 * 45) / 60)
    assert bar["imbalance"] == pytest.approx((0.5 * 15 + 0 * 45) / 60)
    assert bar["verified_s"] == 60


# -- nothing from later ------------------------------------------------------------------------

STATE = ("top", "depth", "imbalance", "ladder")


@given(script=scripts(), data=st.data())
@examples(60)
def test_at_any_instant_nothing_is_seen_of_later(script: Script, data: st.DataObject) -> None:
    """Every method shows at a random instant what it shows of an archive that ends there."""
    at_us = data.draw(st.integers(0, max(script.at - HOUR_NS, 0) // 1000 + 2_000_000))
    at, at_ns = HOUR + at_us * US, HOUR_NS + 1000 * at_us
    beat = (at_ns, bytes(16), int(Kind.NOTE), wire.note("heartbeat", {}))
    made = with_trades(script.records, at_us)
    until = [*(r for r in made if r[0] <= at_ns), beat]
    everything = [*until, *(r for r in made if r[0] > at_ns)]
    with archived(everything) as whole, archived(until) as cut:
        tickers = followed(cut)
        for name in STATE if tickers else ():
            rows = [
                newest(getattr(one, name)(tickers, START, END, allow_gaps=True), at)
                for one in (whole, cut)
            ]
            assert rows[0] == rows[1], name
        for ticker in tickers:
            books = [book_at(one, ticker, at) for one in (whole, cut)]
            if None not in books:  # else a clock that was set back hides the instant
                assert books[0] == books[1]
        if not tickers:
            return
        for name in ("trades", "events"):
            rows = [
                getattr(one, name)(tickers, START, END, allow_gaps=True)
                .filter(pl.col("known_at") <= at)
                .to_dicts()
                for one in (whole, cut)
            ]
            assert rows[0] == rows[1], name
        events = [
            [
                (event, ladders(book))
                for event, book in one.replay(tickers, START, END, allow_gaps=True)
                if event.known_at <= at and event.kind is not EventKind.STALE
            ]
            for one in (whole, cut)
        ]
        assert events[0] == events[1]


def book_at(archive: Archive, ticker: str, at: datetime) -> Ladders | None:
    try:
        return ladders(archive.book(ticker, at, allow_gaps=True))
    except NotCovered:
        return None


def newest(rows: pl.DataFrame, at: datetime) -> dict[str, dict[str, Any]]:
    """Each market's newest row that may be used at an instant, without what is judged later."""
    judged = {*JUDGED_LATER, "record", "shard", "ofi"}
    return {
        row["market_ticker"]: {k: v for k, v in row.items() if k not in judged}
        for row in rows.filter(pl.col("known_at") <= at).to_dicts()
    }


@given(script=scripts(kinds=("delta",) * 5 + ("snapshot",)), seconds=st.integers(0, 20))
@examples(40)
def test_a_bar_uses_nothing_after_its_label(script: Script, seconds: int) -> None:
    at_ns = HOUR_NS + seconds * wire.SECOND
    at = HOUR + timedelta(seconds=seconds)
    beat = (at_ns, bytes(16), int(Kind.NOTE), wire.note("heartbeat", {}))
    made = with_trades(script.records, seconds)
    until = [*(r for r in made if r[0] < at_ns), beat]
    everything = [*until, *(r for r in made if r[0] >= at_ns)]
    with archived(everything) as whole, archived(until) as cut:
        tickers = followed(cut)
        if not tickers:
            return
        bars = [
            one.bars(tickers, START, END, every="1s", allow_gaps=True).filter(pl.col("at") <= at)
            for one in (whole, cut)
        ]
        assert_frame_equal(bars[0], bars[1])


def test_terms_that_were_read_later_are_not_shown(tmp_path: Path) -> None:
    archive = write(tmp_path, quoted(wire.conn_id(1)))
    row: dict[str, Any] = dict.fromkeys(MARKET_CATALOG.arrow.names, "")
    for field in MARKET_CATALOG.arrow:
        if field.nullable:
            row[field.name] = None
    row |= {"market_ticker": "A-1", "price_ranges": [], "as_of": HOUR}
    table = pl.DataFrame([row]).to_arrow().cast(MARKET_CATALOG.arrow)
    archive.write_whole(MARKET_CATALOG.name, "markets.parquet", table, level=1, sorted_by=())
    reader = Archive(archive)
    assert reader.markets("A")["market_ticker"].to_list() == ["A-1"]
    assert reader.markets("B").height == 0
    assert reader.markets(at=HOUR).height == 1
    assert reader.markets(at=HOUR - US).height == 0


# -- coverage and refusals ---------------------------------------------------------------------


def outage(root: Path) -> Archive:
    """Three hours of a market, the second with a gap of two minutes; the fourth hour is missing, the fifth is there."""
    conn, at, seq = wire.conn_id(1), HOUR_NS, 1
    records = [wire.connected(conn, at)]
    records.append((at, conn, Kind.SNAPSHOT, wire.snapshot("KXA-1", 1, {4_700: 300}, {5_000: 100})))
    beat = wire.note("heartbeat", {"state": "synced"})
    for second in range(10, 5 * 3_600, 10):
        at = HOUR_NS + second * wire.SECOND
        if 3 * 3_600 <= second < 4 * 3_600 + 60:
            continue
        seq += 1
        if second == 5_000:
            note = wire.note("gap", {"cause": "sequence"}, sid=1)
            records.append((at, conn, Kind.NOTE, note))
        elif second == 5_120:
            book = wire.snapshot("KXA-1", seq, {4_600: 300}, {5_000: 100})
            records.append((at, conn, Kind.SNAPSHOT, book))
        elif second == 4 * 3_600 + 60:
            conn, seq = wire.conn_id(2), 1
            records.append(wire.connected(conn, at))
            book = wire.snapshot("KXA-1", seq, {4_500: 300}, {5_000: 100})
            records.append((at, conn, Kind.SNAPSHOT, book))
        elif second % 100 == 0:
            records.append((at, conn, Kind.DELTA, wire.delta("KXA-1", seq, "yes", 4_000, 100)))
        else:
            seq -= 1
        records.append((at, conn, Kind.NOTE, beat))
    store = write(root, records)
    seal(store)
    return Archive(store)


@pytest.fixture(scope="module")
def with_outage(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return outage(tmp_path_factory.mktemp("outage"))


FIVE = HOUR + 5 * ONE_HOUR
METHODS = ("top", "depth", "imbalance", "ladder", "trades", "events", "bars", "replay")


def test_coverage_is_without_a_hole_and_says_what_is_missing(with_outage: Archive) -> None:
    rows = with_outage.coverage("KXA-1", HOUR, FIVE).to_dicts()
    assert [row["condition"] for row in rows] == [
        *("synced", "stale", "synced", "missing", "stale", "synced")
    ]
    assert rows[0]["start"] == HOUR
    assert rows[-1]["end"] == FIVE
    assert all(a["end"] == b["start"] for a, b in pairwise(rows))
    assert rows[1]["start"] == HOUR + timedelta(seconds=5_000)
    assert rows[1]["seconds"] == 120


@pytest.mark.parametrize("method", METHODS)
def test_a_span_that_is_not_covered_is_refused_until_it_is_allowed(
    with_outage: Archive, method: str
) -> None:
    call = getattr(with_outage, method)
    with pytest.raises(NotCovered) as refused:
        call("KXA-1", HOUR, FIVE)
    said = str(refused.value)
    assert "KXA-1 is not covered for" in said
    assert "stale from 2026-09-21 16:23:20 to 2026-09-21 16:25:20 UTC" in said
    # both remedies work
    call("KXA-1", HOUR, FIVE, allow_gaps=True)
    match = re.search(r"Ask for (\S+ \S+) to (\S+ \S+) UTC, or pass", said)
    assert match is not None
    start, end = (datetime.fromisoformat(text).replace(tzinfo=UTC) for text in match.groups())
    assert end - start > ONE_HOUR
    call("KXA-1", start, end)


def test_what_is_allowed_is_marked(with_outage: Archive) -> None:
    covered = with_outage.coverage("KXA-1", HOUR, FIVE).filter(pl.col("condition") == "synced")
    spans = [(row["start"], row["end"]) for row in covered.to_dicts()]
    for rows in (
        with_outage.top("KXA-1", HOUR, FIVE, every="30s", allow_gaps=True),
        with_outage.depth("KXA-1", HOUR, FIVE, every="30s", allow_gaps=True),
    ):
        assert rows.height == 600
        for row in rows.to_dicts():
            inside = any(start <= row["at"] < end for start, end in spans)
            # depth is known a second later than the frame
            assert row["verified"] == inside or any(
                timedelta() <= row["at"] - s <= timedelta(seconds=1) for s, _ in spans
            )
    bars = with_outage.bars("KXA-1", HOUR, FIVE, every="1h", allow_gaps=True)
    assert bars["verified_s"].to_list() == pytest.approx(
        [
            sum(max((min(e, h + ONE_HOUR) - max(s, h)).total_seconds(), 0) for s, e in spans)
            for h in (HOUR + n * ONE_HOUR for n in range(5))
        ]
    )
    states = [
        (event.kind, book.verified)
        for event, book in with_outage.replay("KXA-1", HOUR, FIVE, allow_gaps=True)
        if event.kind is not EventKind.DELTA
    ]
    kinds = [kind.value for kind, _ in states]
    assert kinds == ["snapshot", "stale", "snapshot", "stale", "snapshot"]
    assert [verified for _, verified in states] == [True, False, True, False, True]
    assert (
        with_outage.book("KXA-1", HOUR + timedelta(seconds=5_050), allow_gaps=True).verified
        is False
    )
    with pytest.raises(NotCovered, match="allow_gaps=True"):
        with_outage.book("KXA-1", HOUR + timedelta(seconds=5_050))


NAIVE = datetime(2026, 9, 21, 15)  # noqa: DTZ001
WRONG: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
    ("top", (None, HOUR, FIVE), {}, "None is not a ticker"),
    ("top", (b"KXA-1", HOUR, FIVE), {}, "is not a ticker. Give a market's ticker as text"),
    ("top", ([], HOUR, FIVE), {}, "list of tickers is empty"),
    ("top", (["KXA-1", 7], HOUR, FIVE), {}, "7 is not a ticker"),
    ("book", (["KXA-1"], HOUR), {}, "is not a ticker"),
    ("book", ("KXA-1", NAIVE), {}, "without a time zone. Add one"),
    ("book", ("KXA-1", "2026-09-21"), {}, "not an instant. Give a datetime"),
    ("top", ("KXA-1", NAIVE, FIVE), {}, "start is 2026-09-21 15:00:00, without a time zone"),
    ("top", ("KXA-1", HOUR, 7), {}, "end is 7, not an instant"),
    ("top", ("KXA-1", FIVE, HOUR), {}, "Give a start before the end"),
    ("top", ("KXA-1", HOUR, HOUR), {}, "Give a start before the end"),
    ("top", ("KXA-1", HOUR, FIVE), {"every": "1 fortnight"}, "not a duration"),
    ("top", ("KXA-1", HOUR, FIVE), {"every": "0s"}, "not a duration"),
    ("top", ("KXA-1", HOUR, FIVE), {"every": 5}, "not a duration"),
    ("bars", ("KXA-1", HOUR, FIVE), {"every": "1us"}, "18,000,000,000 rows"),
    ("markets", (7,), {}, "no beginning of a ticker"),
    ("top", ("KXA-2", HOUR, FIVE), {}, "KXA-2 is not recorded in .*: KXA-1"),
    (
        "top",
        ("KXA-1", HOUR - timedelta(days=2), HOUR - timedelta(days=1)),
        {},
        "Nothing is recorded of",
    ),
]


@pytest.mark.parametrize(("method", "args", "more", "sentence"), WRONG)
def test_wrong_arguments_are_refused_in_a_sentence(
    with_outage: Archive, method: str, args: Any, more: Any, sentence: str
) -> None:
    with pytest.raises(RequestRefused, match=sentence) as refused:
        list(getattr(with_outage, method)(*args, **more))
    assert "\n" not in str(refused.value)


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestRefused, match=r"is no archive"):
        Archive(7)  # type: ignore[arg-type]
    with pytest.raises(NotCovered, match=r"has no recorded hour\. Give the folder"):
        Archive(tmp_path / "nowhere").top("A", HOUR, FIVE)


# -- numbers and cost --------------------------------------------------------------------------


def test_numbers_are_exact_unless_floats_are_asked_for(with_outage: Archive) -> None:
    end = HOUR + ONE_HOUR
    for method in ("top", "depth", "ladder", "events", "bars"):
        exact = getattr(with_outage, method)("KXA-1", HOUR, end)
        floats = getattr(with_outage, method)("KXA-1", HOUR, end, exact=False)
        decimals = [name for name, kind in exact.schema.items() if kind.is_decimal()]
        assert decimals
        assert all(floats.schema[name] == pl.Float64 for name in decimals)
    book = with_outage.book("KXA-1", end - US, exact=False)
    assert book.bid == (0.47, 3.0)
    assert with_outage.book("KXA-1", end - US).bid == (Decimal("0.4700"), Decimal("3.00"))
    assert with_outage.top("KXA-1", HOUR, end).to_pandas().shape[0] > 0
    assert with_outage.top("KXA-1", HOUR, end).to_arrow().num_rows > 0


def test_the_reader_keeps_files_that_lack_later_columns(tmp_path: Path) -> None:
    store = write(tmp_path, quoted(wire.conn_id(1)))
    for name in ("orderbook_events", "stream_events"):
        for file in store.files(name, HOUR):
            table = pq.read_table(file.path, partitioning=None)
            pq.write_table(table.drop_columns(["shard", "record"]), file.path)
    archive = Archive(store)
    end = HOUR + timedelta(seconds=50)
    assert archive.top("A-1", HOUR, end)["yes_bid"].to_list() == [
        Decimal("0.4700"),
        Decimal("0.4800"),
    ]
    kinds = [event.kind.value for event, _ in archive.replay("A-1", HOUR, end)]
    assert kinds == ["snapshot", "delta"]
    assert archive.events("A-1", HOUR, end)["record"].to_list() == [None] * 3

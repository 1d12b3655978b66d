"""Rebuild an archived hour's books: after every event, or whole at chosen instants.

    books = read(archive_at("data/parquet"), datetime(2026, 11, 22, 14, tzinfo=UTC), ["KXFED-27-T0.5"])
    after_events(books, levels=5)     one row per event: the five best levels of both sides after it
    at_instants(books, instants)      every level of every book at each of the instants

Only the hour's `orderbook_events`, `book_checkpoints` and `stream_events` are read, compacted or not. The
result depends on the rows alone, not on the files. Tables are Arrow: `polars.from_arrow` accepts them. This is the
only module of the package that reads files, besides `hourly`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import TypeVar

import numpy as np
import pyarrow as pa

from kalshi_platform.analytics.books import EVENT_COLUMNS, GROUP_ROWS, Books, books_in_groups
from kalshi_platform.analytics.columns import NO_TIME, Array, Ints, decimals, names, times
from kalshi_platform.analytics.frames import (
    CAUSES,
    NO,
    NONE,
    SECOND_US,
    STALE,
    YES,
    Codes,
)
from kalshi_platform.analytics.ladder import Top, sample_ranges, top_at
from kalshi_platform.archive import Archive
from kalshi_platform.errors import NothingRecorded
from kalshi_platform.exchange.numbers import ONE_DOLLAR
from kalshi_platform.schema import (
    BOOK_CHECKPOINTS,
    NAME,
    ORDERBOOK_EVENTS,
    PLACE,
    PRICE,
    QTY,
    STREAM_EVENTS,
    TIME,
)
from kalshi_platform.utc_hours import floor_hour

T = TypeVar("T")
_SIDES = ["yes", "no"]
_HOUR = timedelta(hours=1)
_LEVELS_MAX = 99


def read(archive: Archive, hour: datetime, tickers: Collection[str] | None = None) -> Books:
    """Read the books of an archived hour.

    Args:
        archive: What `kalshi_platform.archive.archive_at` opens.
        hour: Any instant of the hour, with a time zone.
        tickers: The markets wanted, which reads less; one that the hour does not have is left out. None: all.

    Returns:
        The books, in columns: all frames of a market in their order, and for each level the frames over which it stood.

    Raises:
        ValueError: `hour` has no time zone.
        NothingRecorded: The archive has no file of that hour.
        StoreRefused: A file cannot be read; the sentence names it.
    """
    return next(_read(archive, hour, tickers, rows=None))


def read_in_groups(archive: Archive, hour: datetime, rows: int = GROUP_ROWS) -> Iterator[Books]:
    """Read the books of an archived hour, some markets at a time: for an hour that is too large for memory.

    Args:
        archive: What `kalshi_platform.archive.archive_at` opens.
        hour: Any instant of the hour, with a time zone.
        rows: Rows of one group, about; a single market may have more.

    Returns:
        Groups of books, by ticker. Each is made while the caller uses the one before it.

    Raises:
        ValueError: `hour` has no time zone.
        NothingRecorded: The archive has no file of that hour.
        StoreRefused: A file cannot be read; the sentence names it.
    """
    return ahead(_read(archive, hour, None, rows=rows))


def ahead(items: Iterator[T]) -> Iterator[T]:
    """Make each item in a thread while the caller uses the one before it.

    Args:
        items: The items; None ends them.

    Yields:
        The same items, in their order.
    """
    with ThreadPoolExecutor(1) as worker:
        pending = worker.submit(next, items, None)
        while (item := pending.result()) is not None:
            pending = worker.submit(next, items, None)
            yield item


def _read(
    archive: Archive, hour: datetime, tickers: Collection[str] | None, *, rows: int | None
) -> Iterator[Books]:
    if hour.tzinfo is None:
        raise ValueError(f"the hour {hour} has no time zone; hours of the archive are UTC")
    hour = floor_hour(hour)
    recorded = (ORDERBOOK_EVENTS.name, BOOK_CHECKPOINTS.name, STREAM_EVENTS.name)
    if not any(archive.files(name, hour) for name in recorded):
        raise NothingRecorded(
            f"Nothing is recorded of the hour {hour:%Y-%m-%d %H:00} UTC in {archive}, so nothing can be"
            " computed. Materialise orderbook_events of that hour first."
        )
    # Rows without a market are of all markets: those of a connection, or of the recorder.
    of_stream = None if tickers is None else {*tickers, ""}
    yield from books_in_groups(
        hour,
        archive.read(ORDERBOOK_EVENTS.name, hour, EVENT_COLUMNS, tickers),
        archive.read(BOOK_CHECKPOINTS.name, hour, tickers=tickers),
        archive.read(STREAM_EVENTS.name, hour, tickers=of_stream),
        rows=rows,
    )


def after_events(books: Books, levels: int = 1, tickers: Collection[str] | None = None) -> pa.Table:
    """Make a table of the best levels of both sides after every event.

    One row for each event: a delta, a whole snapshot, the `checkpoint` that is the hour's opening state, or an event
    from which on the book is stale (`verified` is false until the next snapshot). A row takes about 90 bytes, and 64 for
    each level: of many busy markets take a few at a time.

    Args:
        books: The books of an hour, from `read` or `read_in_groups`.
        levels: How many levels of each side, 1 to 99.
        tickers: The markets wanted; None: all.

    Returns:
        A table of the columns below, in dollars and contracts; markets by ticker, events of a market in their order.
        YES asks are the NO bids, each at 1 - its price. Where a side has fewer levels they are null.

            market_ticker, ts, ingest_ts, conn_id, sid, seq, shard, record        as in `spreads`
            cause, verified, known_at                                             as in `spreads`
            yes_bid_1, yes_bid_size_1, yes_ask_1, yes_ask_size_1                  the best
            yes_bid_2, …                                                          one worse, up to `levels`

    Raises:
        ValueError: `levels` is below 1 or above 99.
    """
    if not 1 <= levels <= _LEVELS_MAX:
        raise ValueError(f"levels is {levels}; it goes from 1 to {_LEVELS_MAX}")
    frames = books.frames
    rows = _frames_of(books, tickers)
    book = frames.book[rows]
    table = {
        "market_ticker": names(frames.market[rows], books.tickers),
        "ts": times(frames.ts[rows], frames.ts[rows] != NO_TIME),
        "ingest_ts": times(frames.ingest_us[rows]),
        "conn_id": names(books.book_conn[book], books.conns),
        "sid": pa.array(books.book_sid[book], pa.uint32()),
        "seq": pa.array(frames.seq[rows], pa.uint64()),
        **dict(zip(PLACE, books.places(rows), strict=True)),
        "cause": names(frames.cause[rows].astype(np.int32), CAUSES),
        "verified": pa.array(frames.verified[rows]),
        "known_at": times(frames.clock_us[rows]),
    }
    with ThreadPoolExecutor(2) as pool:  # numpy works without the interpreter's lock
        sides = list(pool.map(lambda side: _side(books, side, rows, levels), (YES, NO)))
    for rank in range(levels):
        for columns in sides:
            table |= columns[rank]
    return pa.table(table)


AT_INSTANTS = pa.schema(
    [
        pa.field("market_ticker", NAME, nullable=False),
        pa.field("at", TIME, nullable=False),
        pa.field("last_event_ts", TIME, nullable=False),
        pa.field("verified", pa.bool_(), nullable=False),
        pa.field("side", NAME),
        pa.field("price", PRICE),
        pa.field("size", QTY),
        pa.field("shard", pa.uint32()),
        pa.field("record", pa.uint64()),
    ]
)
"""The columns of `at_instants`."""


def at_instants(
    books: Books, instants: Iterable[datetime], tickers: Collection[str] | None = None
) -> pa.Table:
    """Make a table of every level of every book at chosen instants: the view `book_at`, for many books at once.

    Events received at that very microsecond count. Of an instant that a clock which was set back showed twice, the
    later state counts.

    Args:
        books: The books of an hour, from `read` or `read_in_groups`.
        instants: Instants of that hour, with a time zone.
        tickers: The markets wanted; None: all.

    Returns:
        A table with the columns of `AT_INSTANTS`, by market, instant, side (yes first) and price. `price` is a bid in
        dollars on its side's own scale, `size` contracts. A book that is empty has one row without side, price and
        size; a market that was not known yet has none. `last_event_ts` is the receive time of the newest event by
        then, `shard` and `record` its place in the journal.

    Raises:
        ValueError: An instant has no time zone, or is not within the hour.
    """
    frames = books.frames
    wanted_us = np.unique(np.array([_us(books, at) for at in instants], dtype=np.int64))
    if not len(frames) or not len(wanted_us):
        return AT_INSTANTS.empty_table()
    market = _markets(books, tickers)
    base = int(frames.shown_us.min())
    span = int(frames.shown_us.max()) - base + 2
    key = frames.market.astype(np.int64) * span + (frames.shown_us - base)
    when = np.tile(wanted_us, len(market))
    market = np.repeat(market, len(wanted_us))
    within = np.clip(when - base, -1, span - 2)
    at = np.searchsorted(key, market * span + within, side="right") - 1
    known = (at >= 0) & (frames.market[at] == market)
    at, when = at[known], when[known]

    # One row for each run and sample that it covers; and one row for each empty book.
    start, end = sample_ranges(books.levels, at)
    run = np.repeat(np.arange(len(start)), end - start)
    sample = np.arange(len(run)) - np.repeat(np.cumsum(end - start) - end, end - start)
    bare = np.flatnonzero(np.bincount(sample, minlength=len(at)) == 0)
    sample = np.concatenate([sample, bare])
    run = np.concatenate([run, np.full(len(bare), NONE)])
    order = np.argsort(sample, kind="stable")
    sample, run = sample[order], run[order]
    has_level = run != NONE
    events_so_far = np.maximum.accumulate(
        np.where(frames.cause != STALE, np.arange(len(frames)), 0)
    )
    last_event = events_so_far[at[sample]]
    return pa.Table.from_arrays(
        [
            names(frames.market[at[sample]], books.tickers),
            times(when[sample]),
            times(frames.ingest_us[last_event]),
            pa.array(frames.verified[at[sample]]),
            names(_run_values(books.levels.ladder % 2, run), _SIDES, has_level),
            decimals(_run_values(books.levels.price, run), PRICE, has_level),
            decimals(_run_values(books.levels.size, run), QTY, has_level),
            *books.places(last_event),
        ],
        schema=AT_INSTANTS,
    )


def _run_values(values: Array, run: Ints) -> Array:
    """Return the values of the runs; any value where there is no run."""
    return values[run] if len(values) else np.zeros(len(run), dtype=values.dtype)


def _us(books: Books, at: datetime) -> int:
    if at.tzinfo is None:
        raise ValueError(f"the instant {at} has no time zone")
    if not books.hour <= at < books.hour + _HOUR:
        raise ValueError(
            f"the instant {at} is not within the hour from {books.hour}; read the hour that it is in"
        )
    return int(books.hour.timestamp()) * SECOND_US + (at - books.hour) // timedelta(microseconds=1)


def _markets(books: Books, tickers: Collection[str] | None) -> Ints:
    if tickers is None:
        return np.arange(len(books.tickers))
    wanted = set(tickers)
    return np.array([i for i, ticker in enumerate(books.tickers) if ticker in wanted], np.int64)


def _frames_of(books: Books, tickers: Collection[str] | None) -> Codes:
    if tickers is None:
        return np.arange(len(books.frames), dtype=np.int32)
    bounds = books.frames.bounds(len(books.tickers))
    rows = [np.arange(bounds[m], bounds[m + 1], dtype=np.int32) for m in _markets(books, tickers)]
    return np.concatenate([np.empty(0, np.int32), *rows])


def _side(books: Books, side: int, rows: Codes, levels: int) -> list[dict[str, pa.Array]]:
    """Return the columns of one side of the YES market, rank by rank."""
    top, latest = _top(books, side, rows, levels)
    name = "ask" if side == NO else "bid"
    found = []
    for rank in range(1, levels + 1):
        price, size = top.price[rank - 1][latest], top.size[rank - 1][latest]
        exists = price != NONE
        found.append(
            {
                f"yes_{name}_{rank}": decimals(
                    ONE_DOLLAR - price if side == NO else price, PRICE, exists
                ),
                f"yes_{name}_size_{rank}": decimals(size, QTY, exists),
            }
        )
    return found


def _top(books: Books, side: int, rows: Codes, levels: int) -> tuple[Top, Array]:
    """Return the best levels of a side at the frames where it changes, and which of those frames holds at each of `rows`."""
    best = books.best_yes if side == YES else books.best_no
    if levels == 1:
        return Top(best.price[None], best.size[None]), rows
    if not len(rows):
        return Top(np.empty((levels, 0), np.int64), np.empty((levels, 0), np.int64)), rows
    frames = books.frames
    runs = books.levels.between(frames.market[rows[0]], frames.market[rows[-1]])
    of_side = runs.ladder % 2 == side
    first = int(rows[0])
    after = int(np.searchsorted(frames.market, frames.market[rows[-1]], side="right"))
    changes = np.append(frames.begins[first:after], False)
    changes[runs.start[of_side] - first] = True
    changes[runs.end[of_side] - first] = True
    fresh = changes[rows - first]
    top = top_at(frames, books.levels, best, side, rows[fresh], count=levels)
    return top, np.cumsum(fresh) - 1

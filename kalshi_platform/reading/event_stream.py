"""Replay: every event of some markets in one order, each with its market's book after it.

An hour is loaded at a time, in columns, while the hour before is iterated. Its books are those of `analytics.books`,
which orders the frames of a market and says where each book becomes stale; here the frames of all markets and their
trades are merged into one order, and each level's change is applied to a book of dictionaries. Events of a shard are in
the order of their journal records. Between shards, which have no common order, the receive time decides, made so that it
never decreases within a shard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.analytics.books import EVENT_COLUMNS, Books, books
from kalshi_platform.analytics.columns import NO_TIME, Array, Ints, microseconds, unscaled
from kalshi_platform.analytics.frames import CHECKPOINT, DELTA, NONE, SNAPSHOT, STALE
from kalshi_platform.analytics.replay import ahead
from kalshi_platform.archive import Archive
from kalshi_platform.reading.arguments import microseconds_of
from kalshi_platform.reading.covered import Condition, Period, RecordedHour
from kalshi_platform.reading.events import Event, EventKind
from kalshi_platform.reading.market_book import MarketBook
from kalshi_platform.schema import BOOK_CHECKPOINTS, ORDERBOOK_EVENTS, STREAM_EVENTS, TRADES

_Events = Iterator[tuple[Event, MarketBook]]
_Edge = tuple[int, int]
TRADE = 4
"""Beside the causes of frames: a trade."""
SLICE = 1 << 16
"""Events that are Python objects at a time."""
_SEQ_BITS = 44
_SIDES = ("yes", "no")
_TRADE_COLUMNS = [
    *("market_ticker", "taker_outcome_side", "yes_price", "no_price", "qty", "trade_id"),
    *("ts", "ingest_ts", "seq", "shard", "record"),
]


_KINDS = np.array(
    [EventKind.OPENING, EventKind.SNAPSHOT, EventKind.DELTA, EventKind.STALE, EventKind.TRADE],
    dtype=object,
)


@dataclass(frozen=True)
class _Columns:
    """Events in columns, in any order or in that of the replay."""

    kind: Array
    market: Array
    """Index into the tickers asked for."""
    shard: Ints
    """NONE where the rows have none."""
    record: Ints
    rank: Array
    """Order within a record: a checkpoint, then what makes a book stale, then the frame."""
    known_us: Ints
    ts_us: Ints
    side: Array
    price: Ints
    qty: Ints
    size: Ints
    frame: Ints
    """Of a frame its number in the hour's books, of a trade its row."""

    def take(self, which: Any) -> _Columns:
        return _Columns(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    def __add__(self, other: _Columns) -> _Columns:
        return _Columns(
            *(
                np.concatenate([getattr(self, name), getattr(other, name)])
                for name in self.__dataclass_fields__
            )
        )


@dataclass(frozen=True)
class _Hour:
    """An hour's events in order, and what the columns point to."""

    columns: _Columns
    levels: _BaseLevels
    trade_ids: pa.ChunkedArray


class _BaseLevels:
    """The levels of the hour's snapshots and checkpoints, by frame."""

    def __init__(self, of: Books) -> None:
        order = np.argsort(of.levels.start, kind="stable")
        self._start = of.levels.start[order]
        self._no = (of.levels.ladder[order] % 2).astype(np.bool_)
        self._price, self._size = of.levels.price[order], of.levels.size[order]

    def at(self, frame: int) -> list[dict[int, int]]:
        """Return the levels of both sides of a snapshot or checkpoint."""
        first, end = np.searchsorted(self._start, [frame, frame + 1])
        found = []
        for side in (False, True):
            here = first + np.flatnonzero(self._no[first:end] == side)
            found.append(
                dict(zip(self._price[here].tolist(), self._size[here].tolist(), strict=True))
            )
        return found


def replay(
    archive: Archive,
    there: Sequence[RecordedHour],
    conditions: Mapping[str, Sequence[Period]],
    start: datetime,
    end: datetime,
    *,
    trades: bool,
    exact: bool,
) -> Iterator[tuple[Event, MarketBook]]:
    """Yield every event of a span with its market's book after it.

    Args:
        archive: The archive.
        there: The span's hours.
        conditions: What each market's book is, over the span; its keys are the markets.
        start: The first instant.
        end: The instant after the last.
        trades: Whether trades are among the events.
        exact: Whether the books' numbers are decimals.

    Returns:
        An iterator of event and book. The book is one object for each market, which the next event changes.
    """
    tickers = sorted(conditions)
    run = _Run(tickers, microseconds_of(start), microseconds_of(end), exact)
    stale = sorted(
        (microseconds_of(period.start), market)
        for market, ticker in enumerate(tickers)
        for period in conditions[ticker]
        if period.condition is not Condition.SYNCED
    )
    hours = ahead(_load(archive, one, tickers, trades=trades) for one in there)
    return chain.from_iterable(run.parts(hours, stale))


class _Run:
    """The state of a replay: the books, and whether its span has begun."""

    def __init__(self, tickers: list[str], start_us: int, end_us: int, exact: bool) -> None:
        self._tickers, self._start_us, self._end_us = tickers, start_us, end_us
        self._books = [MarketBook(ticker, exact=exact) for ticker in tickers]
        self._sides = [side for book in self._books for side in (book.yes, book.no)]
        self._names = np.array(tickers, dtype=object)
        self._begun = False
        self._reached_us = 0

    def parts(self, hours: Iterable[_Hour], stale: Sequence[_Edge]) -> Iterator[_Events]:
        """Yield the span's events in parts, each to be used up before the next is taken.

        `stale`: instants at which a book is no longer covered, and its market.
        """
        for hour in hours:
            last = int(hour.columns.known_us[-1]) if len(hour.columns.kind) else 0
            count = sum(us <= last for us, _ in stale)
            yield from self._of_hour(hour, stale[:count])
            stale = stale[count:]
        yield self._opening()
        yield self._end(stale)

    def _of_hour(self, hour: _Hour, stale: Sequence[_Edge]) -> Iterator[_Events]:
        """Apply an hour, and yield what is of the span."""
        columns = hour.columns
        if not len(columns.kind):
            return
        np.maximum(columns.known_us, self._reached_us, out=columns.known_us)
        if stale:
            columns = _with_stale(columns, stale)
        self._reached_us = int(columns.known_us[-1])
        begin, end = np.searchsorted(columns.known_us, [self._start_us, self._end_us])
        for lo in range(0, begin, SLICE):
            deque(self._apply(hour, columns.take(slice(lo, min(lo + SLICE, begin)))), maxlen=0)
        if begin < end:
            yield self._opening()
        for lo in range(begin, end, SLICE):
            yield self._apply(hour, columns.take(slice(lo, min(lo + SLICE, end))))

    def _opening(self) -> _Events:
        """Yield the books at the span's start, once."""
        if self._begun:
            return
        self._begun = True
        for book in self._books:
            if book.event is not None:
                event = _opening(book.ticker, self._start_us)
                book.event = event
                yield event, book

    def _end(self, stale: Sequence[_Edge]) -> _Events:
        """Yield what makes books stale after the last event."""
        for us, market in stale:
            book = self._books[market]
            if book.verified:
                book.verified = False
                event = Event(EventKind.STALE, book.ticker, None, None, us, None, "", 0, 0, 0, "")
                book.event = event
                yield event, book

    def _apply(self, hour: _Hour, of: _Columns) -> _Events:
        books, sides = self._books, self._sides
        events = self._made(hour, of)
        market, kind = of.market.tolist(), of.kind.tolist()
        ladder = (of.market * 2 + of.side).tolist()
        for made, code, m, s, price, size in zip(
            events, kind, market, ladder, of.price.tolist(), of.size.tolist(), strict=True
        ):
            event, book = made, books[m]
            if code == DELTA:
                side = sides[s]
                levels = side.levels
                if size > 0:
                    levels[price] = size
                    if price > side.best:  # noqa: PLR1730 - a call of max takes three times as long
                        side.best = price
                elif price in levels:
                    del levels[price]
                    if price == side.best:
                        side.best = max(levels, default=NONE)
            elif code == STALE:
                if not book.verified:
                    continue
                book.verified = False
            elif code != TRADE:
                frame, verified = divmod(size, 2)
                yes, no = hour.levels.at(frame)
                if code == CHECKPOINT:
                    held = book.yes.levels == yes and book.no.levels == no
                    if held and book.verified == bool(verified) and book.event is not None:
                        continue
                event = made._replace(size_units=0)
                book.yes.replace(yes)
                book.no.replace(no)
                book.verified = bool(verified)
            book.event = event
            yield event, book

    def _made(self, hour: _Hour, of: _Columns) -> Iterator[Event]:
        """Make the events. Of a base, `size_units` is twice its frame, plus whether it is verified."""
        columns: Any = zip(
            _KINDS[of.kind].tolist(),
            self._names[of.market].tolist(),
            _or_none(of.shard, NONE),
            _or_none(of.record, NONE),
            of.known_us.tolist(),
            _or_none(of.ts_us, NO_TIME),
            _SIDE_NAMES[of.side].tolist(),
            of.price.tolist(),
            of.qty.tolist(),
            of.size.tolist(),
            _trade_ids(hour, of),
            strict=True,
        )
        return map(tuple.__new__, repeat(Event), columns)


_SIDE_NAMES = np.array([*_SIDES, ""], dtype=object)


def _opening(ticker: str, us: int) -> Event:
    return Event(EventKind.OPENING, ticker, None, None, us, None, "", 0, 0, 0, "")


def _or_none(values: Ints, none: int) -> list[int | None]:
    found: list[int | None] = values.tolist()
    if (values == none).any():
        return [None if value == none else value for value in found]
    return found


def _trade_ids(hour: _Hour, of: _Columns) -> Iterator[str] | list[str]:
    if not (of.kind == TRADE).any():
        return repeat("", len(of.kind))
    ids = np.full(len(of.kind), "", dtype=object)
    here = np.flatnonzero(of.kind == TRADE)
    ids[here] = hour.trade_ids.take(pa.array(of.frame[here])).to_pylist()
    found: list[str] = ids.tolist()
    return found


def _with_stale(columns: _Columns, stale: Sequence[_Edge]) -> _Columns:
    """Insert what makes a book stale without a record of it: each before the events of its instant."""
    us = np.array([at for at, _ in stale])
    n = len(us)
    none, zero = np.full(n, NONE), np.zeros(n, np.int64)
    added = _Columns(
        kind=np.full(n, STALE, np.int8),
        market=np.array([market for _, market in stale]),
        shard=none,
        record=none,
        rank=zero,
        known_us=us,
        ts_us=np.full(n, NO_TIME),
        side=np.full(n, 2),
        price=zero,
        qty=zero,
        size=zero,
        frame=none,
    )
    where = np.searchsorted(columns.known_us, us)
    order = np.argsort(
        np.concatenate([np.arange(len(columns.kind)) * 2 + 1, where * 2]), kind="stable"
    )
    return (columns + added).take(order)


# -- loading an hour ---------------------------------------------------------------------------


def _load(archive: Archive, one: RecordedHour, tickers: Sequence[str], *, trades: bool) -> _Hour:
    columns = [*EVENT_COLUMNS, "qty"]
    events = pa.concat_tables(
        [
            _empty(ORDERBOOK_EVENTS.arrow, columns),
            *archive.read(ORDERBOOK_EVENTS.name, one.hour, columns, tickers),
        ]
    )
    of = books(
        one.hour,
        [events],
        archive.read(BOOK_CHECKPOINTS.name, one.hour, tickers=tickers),
        archive.read(STREAM_EVENTS.name, one.hour, tickers={*tickers, ""}),
    )
    of_trades = _empty(TRADES.arrow, _TRADE_COLUMNS)
    if trades:
        of_trades = pa.concat_tables(
            [of_trades, *archive.read(TRADES.name, one.hour, _TRADE_COLUMNS, tickers)]
        )
    together = _of_frames(of, events, tickers) + _of_trades(of_trades, tickers)
    return _Hour(_merged(together), _BaseLevels(of), of_trades["trade_id"])


def _empty(schema: pa.Schema, columns: Sequence[str]) -> pa.Table:
    return pa.schema([schema.field(name) for name in columns]).empty_table()


def _of_frames(of: Books, events: pa.Table, tickers: Sequence[str]) -> _Columns:
    frames = of.frames
    n = len(frames)
    market_of = np.array([tickers.index(ticker) for ticker in of.tickers], np.int64)
    found = {name: np.zeros(n, np.int64) for name in ("side", "price", "qty", "size")}
    row, frame = _rows_of_deltas(of, events)
    found["side"][:] = 2
    side = pc.equal(events["side"].cast(pa.string()), "no").to_numpy().astype(np.int64)
    for name, values in (
        ("side", side),
        ("price", unscaled(events["price"])),
        ("qty", unscaled(events["qty"])),
        ("size", unscaled(events["size"])),
    ):
        found[name][frame] = values[row]
    base = np.flatnonzero(frames.cause <= SNAPSHOT)
    found["size"][base] = base * 2 + frames.verified[base]
    rank = np.full(n, 2, np.int8)
    rank[frames.cause == CHECKPOINT] = 0
    rank[frames.cause == STALE] = 1
    return _Columns(
        kind=frames.cause,
        market=market_of[frames.market] if n else np.empty(0, np.int64),
        shard=of.book_shard[frames.book],
        record=frames.record,
        rank=rank,
        known_us=frames.clock_us,
        ts_us=frames.ts,
        frame=np.arange(n),
        **found,
    )


def _rows_of_deltas(of: Books, events: pa.Table) -> tuple[Ints, Ints]:
    """Return the rows of deltas that the books have, and the frame of each. A subscription counts its frames in `seq`."""
    frames = of.frames
    of_frames = np.flatnonzero(frames.cause == DELTA)
    rows = np.flatnonzero(pc.equal(events["type"].cast(pa.string()), "delta").to_numpy())
    if not len(of_frames):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    begins = np.append(True, frames.book[1:] != frames.book[:-1])
    first = np.flatnonzero(begins)
    number = frames.book[first].astype(np.int64)
    n_conns = len(of.conns)
    triple = ((frames.market[first].astype(np.int64) * n_conns + of.book_conn[number]) << 32) | (
        of.book_sid[number]
    )
    order = np.argsort(triple)
    ticker = _codes(events["market_ticker"], of.tickers)[rows]
    conn = _codes(events["conn_id"], of.conns)[rows]
    sid = events["sid"].to_numpy().astype(np.int64)[rows]
    wanted = ((ticker * n_conns + conn) << 32) | sid
    at = np.minimum(np.searchsorted(triple[order], wanted), len(order) - 1)
    known = triple[order][at] == wanted
    rows, book = rows[known], number[order][at][known]
    seq = events["seq"].to_numpy().astype(np.int64)[rows]
    key = (frames.book[of_frames].astype(np.int64) << _SEQ_BITS) + frames.seq[of_frames]
    sort = np.argsort(key, kind="stable")
    place = np.searchsorted(key[sort], (book << _SEQ_BITS) + seq)
    place = np.minimum(place, len(key) - 1)
    known = key[sort][place] == (book << _SEQ_BITS) + seq
    return rows[known], of_frames[sort[place[known]]]


def _codes(column: pa.ChunkedArray, values: Sequence[str]) -> Ints:
    """Return the place of each text in `values`."""
    place = {value: n for n, value in enumerate(values)}
    parts = [np.empty(0, np.int64)]
    for chunk in column.chunks:
        encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
        codes = np.array([place.get(v, NONE) for v in encoded.dictionary.to_pylist()], np.int64)
        if len(chunk):
            parts.append(codes[encoded.indices.to_numpy(zero_copy_only=False)])
    return np.concatenate(parts)


def _of_trades(table: pa.Table, tickers: Sequence[str]) -> _Columns:
    n = table.num_rows
    yes = pc.equal(table["taker_outcome_side"].cast(pa.string()), "yes").to_numpy()
    price = np.where(yes, unscaled(table["yes_price"]), unscaled(table["no_price"]))
    record = table["record"].cast(pa.int64()).fill_null(NONE).to_numpy()
    shard = table["shard"].cast(pa.int64()).fill_null(NONE).to_numpy()
    return _Columns(
        np.full(n, TRADE, np.int8),
        _codes(table["market_ticker"], tickers),
        shard,
        record,
        np.full(n, 2, np.int8),
        microseconds(table["ingest_ts"]),
        microseconds(table["ts"]),
        (~yes).astype(np.int64),
        price,
        unscaled(table["qty"]),
        np.zeros(n, np.int64),
        np.arange(n),
    )


def _merged(of: _Columns) -> _Columns:
    """Put events into the order of the replay, and make `known_us` never decrease."""
    key = _order_key(of)
    parts = []
    for shard in np.unique(of.shard).tolist():
        rows = np.flatnonzero(of.shard == shard)
        parts.append(rows[np.argsort(key[rows], kind="stable")])
    order = np.concatenate([np.empty(0, np.int64), *parts])
    known = np.concatenate(
        [np.empty(0, np.int64), *(np.maximum.accumulate(of.known_us[rows]) for rows in parts)]
    )
    if len(parts) > 1:
        by_time = np.argsort(known, kind="stable")
        order, known = order[by_time], known[by_time]
    found = of.take(order)
    found.known_us[:] = known
    return found


def _order_key(of: _Columns) -> Ints:
    """Return what a shard's events are ordered by: their record, or receive time before all that have one.

    An event without a record that makes a book stale comes after the frame before it.
    """
    recorded = of.record != NONE
    key: Ints = of.record * 4 + of.rank
    if recorded.all():
        return key
    key = np.where(recorded, key, (of.known_us << 1) - (1 << 62))
    for row in np.flatnonzero(~recorded & (of.kind == STALE)).tolist():
        if row and of.market[row - 1] == of.market[row] and of.kind[row - 1] != TRADE:
            key[row] = key[row - 1] | 3 if recorded[row - 1] else key[row - 1]
    return key

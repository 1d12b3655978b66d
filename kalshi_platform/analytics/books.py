"""Build an hour's order books from its rows: all frames in order, and the runs of frames over which levels stood.

A book is a market on one subscription (conn_id, sid). The order of the rows does not matter. Frames within
a book are ordered by `record`, the journal's number; a market's books of one shard, too; its books of
different shards by their first receive time. A book starts with a checkpoint or a snapshot, which replaces
all levels, even if it is empty; deltas of a subscription before its first snapshot are left out, as in
`book_at`. An event that makes a book stale does so from its record on, unless the market's next snapshot proves by
its clock that nothing was missed. Rows of versions that kept no
records come before those that have one: frames by `seq`, books and stale events by receive time.

Units in this package: prices 1e-4 dollars on the bid scale of the side, sizes 1e-2 contracts, times
µs since the epoch. No I/O: `replay` reads the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.analytics.best import Best, best
from kalshi_platform.analytics.columns import NO_TIME, Array, Bools, Ints, microseconds, unscaled
from kalshi_platform.analytics.frames import (
    CHECKPOINT,
    DELTA,
    MAX_PRICE,
    NO,
    NO_LEVEL,
    NONE,
    SECOND_US,
    SNAPSHOT,
    STALE,
    YES,
    Codes,
    Frames,
    Levels,
    differs,
    running_max,
)
from kalshi_platform.analytics.ladder import SIDES, Side, side_at
from kalshi_platform.schema import CONNECTION_ENDS, PLACE, STALE_EVENTS, UNCHANGED

_KEY = ["conn_id", "sid", "seq", "market_ticker", *PLACE]
EVENT_COLUMNS = ["type", *_KEY, "side", "price", "size", "ts", "ingest_ts"]
"""The columns of orderbook_events that the books are built from."""
GROUP_ROWS = 1 << 20
_SID = (1 << 32) - 1
_WITHOUT_RECORD = -(1 << 62)


@dataclass(frozen=True)
class Books:
    """All books of an hour."""

    hour: datetime
    tickers: list[str]
    conns: list[str]
    book_conn: Codes
    """Connection of each book, into `conns`."""
    book_sid: Ints
    book_shard: Ints
    """NONE where the rows have none."""
    frames: Frames
    levels: Levels
    gaps: int
    """Rows of stream_events of kind gap."""

    @cached_property
    def best_yes(self) -> Best:
        """The best YES bid after every frame."""
        return best(self.levels, YES, len(self.frames))

    @cached_property
    def best_no(self) -> Best:
        """The best NO bid after every frame; the best YES ask is 1 - that."""
        return best(self.levels, NO, len(self.frames))

    def places(self, rows: Array) -> tuple[pa.Array, pa.Array]:
        """Return the columns `shard` and `record` of the frames `rows`; null where their rows have none."""
        record = self.frames.record[rows]
        without = record == NONE
        shard = np.where(without, 0, self.book_shard[self.frames.book[rows]])
        return (
            pa.array(shard.astype(np.uint32), mask=without),
            pa.array(np.where(without, 0, record).astype(np.uint64), mask=without),
        )

    @cached_property
    def seconds(self) -> Codes:
        """The last frame of each second of each market, for seconds with a frame."""
        second = self.frames.clock_us // SECOND_US
        last = np.ones(len(second), dtype=np.bool_)
        last[:-1] = (second[1:] != second[:-1]) | (
            self.frames.market[1:] != self.frames.market[:-1]
        )
        return np.flatnonzero(last).astype(np.int32)

    @cached_property
    def sides(self) -> dict[str, Side]:
        """The bid and the ask side of the YES market at each of `seconds`."""

        def at_seconds(side: int) -> Side:
            best = self.best_yes if side == YES else self.best_no
            return side_at(self.frames, self.levels, best, side, self.seconds)

        with ThreadPoolExecutor(len(SIDES)) as pool:  # numpy works without the interpreter's lock
            return dict(zip(SIDES, pool.map(at_seconds, SIDES.values()), strict=True))


@dataclass(frozen=True)
class _Rows:
    """Rows of levels, and one marker row for each snapshot, in any order; frames are built from them."""

    book: Codes
    place: Ints
    """The order within a book: twice the record, plus one for rows that are not of a checkpoint. Without a record
    it is computed from `seq` and negative."""
    seq: Ints
    side: npt.NDArray[np.int8]
    price: npt.NDArray[np.uint16]
    size: Ints
    ts: Ints
    ingest_us: Ints
    cause: npt.NDArray[np.int8]
    verified: Bools

    def take(self, which: Array) -> _Rows:
        return _Rows(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


def _joined(parts: Sequence[_Rows]) -> _Rows:
    names = _Rows.__dataclass_fields__
    return _Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclass(frozen=True)
class _BookKeys:
    """Market, connection, subscription and shard of each book; markets by ticker, a market's books in their order."""

    market: Ints
    conn: Ints
    sid: Ints
    shard: Ints
    """NONE where the rows have none."""
    tickers: list[str]
    conns: list[str]


class _Codes:
    """Integer codes for texts, in order of first occurrence."""

    def __init__(self) -> None:
        self.codes: dict[str, int] = {}

    def encode(self, column: pa.ChunkedArray) -> Ints:
        """Return the code of each value of a text column, dictionary-encoded or not."""
        parts = [np.empty(0, dtype=np.int64)]
        for chunk in column.chunks:
            encoded = chunk if pa.types.is_dictionary(chunk.type) else chunk.dictionary_encode()
            values = encoded.dictionary.to_pylist()
            indices = encoded.indices.fill_null(0).to_numpy(zero_copy_only=False)
            used = np.flatnonzero(np.bincount(indices, minlength=len(values)))
            codes = np.zeros(max(len(values), 1), dtype=np.int64)
            for i in used[: len(values)].tolist():  # values that no row has get no code
                codes[i] = self.codes.setdefault(values[i], len(self.codes))
            parts.append(codes[indices])
        return np.concatenate(parts)


class _RecordedRows:
    """The rows of an hour as they are read, with a number for each book in order of first occurrence."""

    def __init__(self) -> None:
        self.parts: list[_Rows] = []
        self.stream = _StreamEvents()
        self._tickers, self._conns = _Codes(), _Codes()
        self._books: dict[tuple[int, int, int], int] = {}
        self._shards: dict[int, int] = {}
        """The shard of each connection that has one."""

    def add(self, table: pa.Table, rows_of: Callable[[pa.Table, Codes], _Rows]) -> None:
        if table.num_rows:
            self.parts.append(rows_of(table, self._numbered(table)))

    def _numbered(self, table: pa.Table) -> Codes:
        ticker = self._tickers.encode(table["market_ticker"])
        conn = self._conns.encode(table["conn_id"])
        sid = table["sid"].to_numpy().astype(np.int64)
        self._learn_shards(conn, table["shard"])
        conns = len(self._conns.codes)
        encoded = pa.array(((ticker * conns + conn) << 32) | sid).dictionary_encode()
        key = encoded.dictionary.to_numpy()
        pair = key >> 32
        triples = zip(
            *((pair // conns).tolist(), (pair % conns).tolist(), (key & _SID).tolist()), strict=True
        )
        codes = [self._books.setdefault(triple, len(self._books)) for triple in triples]
        numbers: Codes = np.array(codes, dtype=np.int32)[encoded.indices.to_numpy()]
        return numbers

    def _learn_shards(self, conn: Ints, shard: pa.ChunkedArray) -> None:
        span = pc.min_max(shard).as_py()
        if span["min"] is None:
            return
        known = shard.is_valid().to_numpy()
        if span["min"] == span["max"]:
            self._shards |= dict.fromkeys(np.unique(conn[known]).tolist(), span["min"])
            return
        for number in pc.unique(shard.drop_null()).to_pylist():
            of_shard = known & pc.equal(shard, number).fill_null(False).to_numpy()
            self._shards |= dict.fromkeys(np.unique(conn[of_shard]).tolist(), number)

    def by_book(self) -> tuple[list[_Rows], _BookKeys]:
        """Return the rows with books numbered in their order, and the keys of the books."""
        triples = np.array(list(self._books), dtype=np.int64)
        market = _alphabetic(list(self._tickers.codes))[triples[:, 0]]
        conn = _alphabetic(list(self._conns.codes))[triples[:, 1]]
        sid = triples[:, 2]
        shard = np.array([self._shards.get(c, NONE) for c in triples[:, 1].tolist()], np.int64)
        order = self._order_of_books(market, conn, sid, shard)
        rank = np.empty(len(order), dtype=np.int32)
        rank[order] = np.arange(len(order), dtype=np.int32)
        keys = _BookKeys(
            market[order],
            conn[order],
            sid[order],
            shard[order],
            sorted(self._tickers.codes),
            sorted(self._conns.codes),
        )
        return [replace(part, book=rank[part.book]) for part in self.parts], keys

    def _order_of_books(self, market: Ints, conn: Ints, sid: Ints, shard: Ints) -> Ints:
        """Order a market's books: those without a record first, by receive time; those of a shard by their first
        record, shards among each other by receive time."""
        first = np.full(len(market), np.iinfo(np.int64).max)
        first_us = first.copy()
        for part in self.parts:
            np.minimum.at(first, part.book, part.place)
            np.minimum.at(first_us, part.book, part.ingest_us)
        placed = first >= 0
        for part in self.parts:  # a clock that was set back may show an earlier time afterwards
            begins = placed[part.book] & (part.place == first[part.book])
            first_us[part.book[begins]] = part.ingest_us[begins]
        first[~placed] = 0
        by_record = np.lexsort((first, shard, placed, market))
        of_shard = np.cumsum(
            differs(market[by_record]) | differs(shard[by_record]) | ~placed[by_record]
        )
        first_us[by_record] = running_max(first_us[by_record], of_shard)
        order: Ints = np.lexsort((sid, conn, first, shard, first_us, placed, market))
        return order


def books(
    hour: datetime,
    events: Iterable[pa.Table],
    checkpoints: Iterable[pa.Table] = (),
    stream: Iterable[pa.Table] = (),
) -> Books:
    """Build the books of one hour from the rows of its three datasets, each in any number of tables.

    `events` are rows of orderbook_events (EVENT_COLUMNS suffice), `checkpoints` of book_checkpoints. `stream`
    are rows of stream_events, which have the empty snapshots and the events that make a book stale; without
    them every book with a snapshot counts as verified. Checkpoints take effect at their records.

    Raises ValueError on a price outside of 0 to 6.5535 dollars.
    """
    return next(books_in_groups(hour, events, checkpoints, stream, rows=None))


def books_in_groups(
    hour: datetime,
    events: Iterable[pa.Table],
    checkpoints: Iterable[pa.Table] = (),
    stream: Iterable[pa.Table] = (),
    *,
    rows: int | None = GROUP_ROWS,
) -> Iterator[Books]:
    """Build the books of an hour in groups of markets, by ticker, of about `rows` rows each; a single market may have more.

    Memory is bounded by the rows as they are read, 50 bytes each, and by one group. Every group has all the
    hour's tickers, and the frames of its own markets alone. There is always at least one group.
    """
    start_us = int(hour.timestamp()) * SECOND_US
    found = _RecordedRows()
    for table in checkpoints:
        found.add(table, _checkpoint_rows)
    for table in stream:
        kind = table["kind"].cast(pa.string())
        found.add(table.filter(pc.equal(kind, "snapshot")), _marker_rows)
        found.stream.add(table, kind)
    for table in events:
        found.add(table, _event_rows)
    stream_events = found.stream
    if not found.parts:
        yield _nothing(hour, stream_events.gaps)
        return
    parts, keys = found.by_book()
    del found
    ends = _group_ends(parts, keys, rows)
    for first, last in pairwise([0, *ends]):
        group = parts
        if len(ends) > 1:
            group = [p.take(np.flatnonzero((p.book >= first) & (p.book < last))) for p in parts]
        yield _ordered(hour, _joined(group), keys, stream_events, start_us)


def _group_ends(parts: Sequence[_Rows], keys: _BookKeys, limit: int | None) -> list[int]:
    """Return after which books the groups end: always between two markets."""
    n = len(keys.market)
    if limit is None:
        return [n]
    of_book = np.sum([np.bincount(part.book, minlength=n) for part in parts], axis=0)
    markets = np.append(np.flatnonzero(differs(keys.market)), n)
    before = np.append(0, np.cumsum(of_book))[markets]
    ends: list[int] = []
    begun = 0
    for i in range(1, len(markets)):
        if i == len(markets) - 1 or before[i + 1] - begun > limit:
            ends.append(int(markets[i]))
            begun = before[i]
    return ends


# -- from tables to rows -----------------------------------------------------------------------


def _event_rows(table: pa.Table, book: Codes) -> _Rows:
    kinds, sides = _Codes(), _Codes()
    kinds.codes = {"snapshot": SNAPSHOT, "delta": DELTA}
    sides.codes = {"yes": YES, "no": NO}
    n = table.num_rows
    seq = table["seq"].to_numpy().astype(np.int64)
    return _Rows(
        book,
        _places(table["record"], seq, 1),
        seq,
        sides.encode(table["side"]).astype(np.int8),
        _prices(table["price"]),
        unscaled(table["size"]),
        microseconds(table["ts"]),
        microseconds(table["ingest_ts"]),
        kinds.encode(table["type"]).astype(np.int8),
        np.ones(n, dtype=np.bool_),
    )


def _marker_rows(snapshots: pa.Table, book: Codes) -> _Rows:
    """Make a row without a level for each snapshot, since an empty one has no other row."""
    n = snapshots.num_rows
    seq = snapshots["seq"].to_numpy().astype(np.int64)
    return _Rows(
        book,
        _places(snapshots["record"], seq, 1),
        seq,
        np.full(n, NO_LEVEL, dtype=np.int8),
        np.zeros(n, dtype=np.uint16),
        np.zeros(n, dtype=np.int64),
        np.full(n, NO_TIME),
        microseconds(snapshots["ingest_ts"]),
        np.full(n, SNAPSHOT, dtype=np.int8),
        np.ones(n, dtype=np.bool_),
    )


def _checkpoint_rows(table: pa.Table, book: Codes) -> _Rows:
    n = table.num_rows
    seq = table["seq"].to_numpy().astype(np.int64)
    sides = _Codes()
    sides.codes = {"yes": YES, "no": NO}
    side = sides.encode(table["side"]).astype(np.int8)
    empty = table["side"].is_null().to_numpy()
    return _Rows(
        book,
        _places(table["record"], seq, 0),
        seq,
        np.where(empty, np.int8(NO_LEVEL), side),
        _prices(table["price"]),
        unscaled(table["size"]),
        np.full(n, NO_TIME),
        microseconds(table["ts"]),
        np.full(n, CHECKPOINT, dtype=np.int8),
        table["verified"].to_numpy(),
    )


def _places(record: pa.ChunkedArray, seq: Ints, part: int) -> Ints:
    """Compute `_Rows.place`, with `part` 0 for checkpoints and 1 for frames."""
    if record.null_count == len(record):
        return seq * 2 + (part + _WITHOUT_RECORD)
    places: Ints = record.fill_null(0).to_numpy().astype(np.int64) * 2 + part
    if record.null_count:
        without = record.is_null().to_numpy()
        places[without] = seq[without] * 2 + (part + _WITHOUT_RECORD)
    return places


def _prices(column: pa.ChunkedArray) -> npt.NDArray[np.uint16]:
    price = unscaled(column)
    if len(price) and (price.min() < 0 or price.max() > MAX_PRICE):
        wrong = price.min() if price.min() < 0 else price.max()
        raise ValueError(f"a level has the price {wrong / 1e4}, which no book can have")
    return price.astype(np.uint16)


# -- rows in order -----------------------------------------------------------------------------


def _ordered(
    hour: datetime, rows: _Rows, keys: _BookKeys, stream: _StreamEvents, start_us: int
) -> Books:
    rows = _after_checkpoint(rows, len(keys.market))
    rows = rows.take(np.lexsort((rows.place, _narrow(rows.book, len(keys.market)))))
    rows, frame = _from_base(rows, _frame_numbers(rows))
    if not len(frame):
        return _nothing(hour, stream.gaps)
    first = np.flatnonzero(differs(frame))
    at = rows if len(first) == len(frame) else rows.take(first)
    columns: dict[str, Array] = {
        "book": at.book,
        "place": at.place,
        "seq": at.seq,
        "ts": at.ts,
        "ingest_us": at.ingest_us,
        "clock_us": running_max(at.ingest_us, keys.market[at.book]),
        "cause": at.cause,
        "verified": at.verified,
    }
    unchanged = _UnchangedSpans(columns, keys, stream)
    columns["verified"] = unchanged.verified(columns)
    where, added = _stale_rows(columns, stream.stale, keys, unchanged, start_us)
    if len(where):
        columns = {name: np.insert(columns[name], where, added[name]) for name in columns}
        frame = frame + np.searchsorted(where, frame, side="right").astype(np.int32)
        columns["clock_us"] = running_max(columns["clock_us"], keys.market[columns["book"]])
        stale = np.flatnonzero(columns["cause"] == STALE)
        columns["ingest_us"][stale] = columns["clock_us"][stale]
    frames = _frames(columns, keys.market)
    return Books(
        hour,
        keys.tickers,
        keys.conns,
        keys.conn.astype(np.int32),
        keys.sid.astype(np.int64),
        keys.shard,
        frames,
        _levels(rows, frame, frames),
        stream.gaps,
    )


def _alphabetic(values: list[str]) -> Ints:
    """Return each value's rank in alphabetic order, which does not depend on the order of the rows."""
    rank = np.empty(len(values), dtype=np.int64)
    rank[np.argsort(np.array(values, dtype=object), kind="stable")] = np.arange(len(values))
    return rank


def _after_checkpoint(rows: _Rows, n_books: int) -> _Rows:
    """Leave out rows without a record that the book's checkpoint already contains."""
    is_checkpoint = rows.cause == CHECKPOINT
    if not is_checkpoint.any():
        return rows
    held = np.full(n_books, -1, dtype=np.int64)
    held[rows.book[is_checkpoint]] = rows.seq[is_checkpoint]
    keep = is_checkpoint | (rows.place >= 0) | (rows.seq > held[rows.book])
    return rows if keep.all() else rows.take(keep)


def _frame_numbers(rows: _Rows) -> Codes:
    numbers: Codes = np.cumsum(differs(rows.book) | differs(rows.place), dtype=np.int32)
    return numbers - np.int32(1)


def _from_base(rows: _Rows, frame: Codes) -> tuple[_Rows, Codes]:
    """Leave out the frames of a book before its checkpoint or first snapshot."""
    base = rows.cause <= SNAPSHOT
    first = np.full(int(rows.book.max(initial=-1)) + 1, np.iinfo(np.int32).max, dtype=np.int32)
    np.minimum.at(first, rows.book[base], frame[base])
    keep = frame >= first[rows.book]
    if keep.all():
        return rows, frame
    rows = rows.take(keep)
    return rows, _frame_numbers(rows)


def _stale_rows(
    frames: dict[str, Array],
    stale_events: list[dict[str, Any]],
    keys: _BookKeys,
    unchanged: _UnchangedSpans,
    start_us: int,
) -> tuple[Ints, dict[str, Array]]:
    """Return the positions at which rows of cause `doubt` are inserted, and their columns. As in `archive.coverage`.

    Such a row goes before the frame of its record, because the recorder writes the event when a frame shows
    that others are missing. One without a record goes before the frames of its microsecond. An event that
    concerns a book which is already stale is left out, and one after which nothing was missed.
    """
    if not stale_events:
        return np.empty(0, dtype=np.int64), {}
    index = _BookIndex(frames, keys)
    found = []
    for event in stale_events:
        us = max(_instant_us(event), start_us)
        books, position = index.hit(event, us)
        record = NONE if event["record"] is None else event["record"]
        found.append([position, books, *(np.full(len(books), v) for v in (record, us))])
    where, book, record_, us_ = (np.concatenate(part) for part in zip(*found, strict=True))
    missed = ~unchanged.after(book, record_)
    where, book, record_, us_ = where[missed], book[missed], record_[missed], us_[missed]
    order = np.lexsort((us_, record_, where))
    order = order[_makes_stale(where[order], frames)]
    where, book, record_, us_ = where[order], book[order], record_[order], us_[order]
    return where, {
        "book": book,
        "place": np.where(record_ == NONE, _WITHOUT_RECORD, record_ * 2),
        "seq": np.zeros(len(where), dtype=np.int64),
        "ts": np.full(len(where), NO_TIME),
        "ingest_us": us_,
        "clock_us": us_,
        "cause": np.full(len(where), STALE, dtype=np.int8),
        "verified": np.zeros(len(where), dtype=np.bool_),
    }


def _makes_stale(where: Ints, frames: dict[str, Array]) -> Bools:
    """Whether each stale event, in order, is the first since a frame that made its book synced."""
    not_deltas = np.where(frames["cause"] != DELTA, np.arange(len(frames["cause"])), 0)
    last = np.maximum.accumulate(not_deltas)[where - 1]
    return differs(last) & frames["verified"][last]


class _StreamEvents:
    """The events of an hour that make books stale, and the snapshots that prove their market unchanged meanwhile."""

    def __init__(self) -> None:
        self.stale: list[dict[str, Any]] = []
        self.snapshots: set[tuple[str, int, int]] = set()
        """(market, shard, record)"""
        self.later: set[tuple[str, int]] = set()
        """(market, shard) of those of which a snapshot of a later hour proves it."""

    @property
    def gaps(self) -> int:
        """The number of gaps."""
        return sum(event["kind"] == "gap" for event in self.stale)

    def add(self, stream: pa.Table, kind: pa.ChunkedArray) -> None:
        """Take the events among rows of stream_events."""
        self.stale += stream.filter(pc.is_in(kind, pa.array(STALE_EVENTS))).to_pylist()
        says_so = pc.match_substring(stream["detail"], UNCHANGED)
        of_kind = pc.is_in(kind, pa.array(["snapshot", "resynced"]))
        columns = ["kind", "market_ticker", "shard", "record"]
        for row in stream.filter(pc.and_(says_so, of_kind)).select(columns).to_pylist():
            market = (row["market_ticker"], row["shard"])
            if row["kind"] == "snapshot":
                self.snapshots.add((*market, row["record"]))
            elif row["market_ticker"]:
                self.later.add(market)


class _UnchangedSpans:
    """Finds out after which records a book was stale and missed nothing, by its market's next snapshot."""

    def __init__(self, frames: dict[str, Array], keys: _BookKeys, stream: _StreamEvents) -> None:
        self._any = bool(stream.snapshots or stream.later)
        if not self._any:
            return
        shards = {shard: i for i, shard in enumerate(np.unique(keys.shard).tolist())}
        shard = np.array([shards[number] for number in keys.shard.tolist()], np.int64)
        self._market = keys.market * len(shards) + shard
        """A number for each book's market and shard."""
        market_of = {ticker: i for i, ticker in enumerate(keys.tickers)}

        def number(ticker: str, shard: int) -> int:
            """-1 for a market without rows."""
            known = ticker in market_of and shard in shards
            return market_of[ticker] * len(shards) + shards[shard] if known else NONE

        placed = np.flatnonzero((frames["cause"] == SNAPSHOT) & (frames["place"] >= 0))
        record = frames["place"][placed] >> 1
        self._span = int(record.max(initial=0)) + 2
        self._snapshots = np.sort(self._market[frames["book"][placed]] * self._span + record)
        proved = [
            number(ticker, shard) * self._span + record
            for ticker, shard, record in stream.snapshots
        ]
        self._proves = np.isin(self._snapshots, np.array(proved, np.int64))
        later = [number(ticker, shard) for ticker, shard in stream.later]
        self._later = np.isin(self._market, np.array(later, np.int64))

    def after(self, book: Ints, record: Ints) -> Bools:
        """Whether each book, if it became stale at this record, missed nothing until its market's next snapshot."""
        if not self._any or not len(book):
            return np.zeros(len(book), np.bool_)
        market = self._market[book]
        key = market * self._span + np.minimum(record + 1, self._span - 1)
        at = np.searchsorted(self._snapshots, key)
        inside = at < len(self._snapshots)
        at = np.minimum(at, max(len(self._snapshots) - 1, 0))
        of_market = inside.copy()
        proved = inside.copy()
        if len(self._snapshots):
            of_market &= self._snapshots[at] // self._span == market
            proved &= self._proves[at]
        unchanged: Bools = (record != NONE) & np.where(of_market, proved, self._later[book])
        return unchanged

    def verified(self, frames: dict[str, Array]) -> Bools:
        """Whether each frame's book is synced: a stale checkpoint's is, too, if nothing was missed after it."""
        verified: Bools = frames["verified"]
        stale = np.flatnonzero((frames["cause"] == CHECKPOINT) & ~verified & (frames["place"] >= 0))
        if not self._any or not len(stale):
            return verified
        verified = verified.copy()
        verified[stale] = self.after(frames["book"][stale], (frames["place"][stale] >> 1) - 1)
        return verified


class _BookIndex:
    """Finds the books that a stale event concerns, if they were their market's newest, and their next frames."""

    def __init__(self, frames: dict[str, Array], keys: _BookKeys) -> None:
        self._keys = keys
        self._conn_of = {conn: i for i, conn in enumerate(keys.conns)}
        self._market_of = {ticker: i for i, ticker in enumerate(keys.tickers)}
        self._base_us = int(frames["clock_us"].min())
        self._by_time = _Keys(frames["book"], frames["clock_us"] - self._base_us)
        placed = frames["place"] >= 0
        self._base_place = int(frames["place"][placed].min()) if placed.any() else 0
        rel_place = np.maximum(frames["place"] - self._base_place + 1, 0)
        self._by_place = _Keys(frames["book"], rel_place)
        n = len(keys.market)
        self._begin = np.searchsorted(frames["book"], np.arange(n + 1))
        self._present = self._begin[:-1] < self._begin[1:]
        first = np.minimum(self._begin[:-1], len(frames["book"]) - 1)
        self._from_checkpoint = frames["cause"][first] == CHECKPOINT
        inhabited = np.flatnonzero(self._present)
        before, after = inhabited[:-1], inhabited[1:]
        same = keys.market[before] == keys.market[after]
        before, after = before[same], after[same]
        # from when on, and from which place on if that is of the same shard, another book was the newest
        self._over_us = np.full(n, np.iinfo(np.int64).max)
        self._over_us[before] = frames["clock_us"][first[after]]
        self._over_place = np.full(n, NONE)
        one = (keys.shard[before] == keys.shard[after]) & placed[first[after]]
        self._over_place[before[one]] = rel_place[first[after[one]]]

    def hit(self, event: dict[str, Any], us: int) -> tuple[Ints, Ints]:
        """Return the books that an event makes stale, and the position of their next frame."""
        keys, record = self._keys, event["record"]
        if event["market_ticker"]:
            hit = keys.market == self._market_of.get(event["market_ticker"], NONE)
            if record is not None:
                hit &= (keys.shard == event["shard"]) | (keys.shard == NONE)
        else:
            hit = keys.conn == self._conn_of.get(event["conn_id"], NONE)
            if event["kind"] not in CONNECTION_ENDS:
                hit &= keys.sid == event["sid"]
        newest = self._over_us > us
        if record is not None:
            place = 2 * record + 1 - self._base_place + 1
            newest = np.where(self._over_place == NONE, newest, self._over_place >= place)
        book = np.flatnonzero(hit & self._present & newest)
        first = self._begin[book]
        if record is not None:
            position = self._by_place.find(book, place)
        else:
            position = self._by_time.find(book, us - self._base_us)
            at_once = (position == first) & self._from_checkpoint[book]
            position = np.where(at_once, first + 1, position)
        keep = position > first
        return book[keep], position[keep]


class _Keys:
    """A combined key of book and a number that ascends within each book, for binary search."""

    def __init__(self, book: Array, numbers: Ints) -> None:
        self._span = int(numbers.max()) + 2
        self._keys = book.astype(np.int64) * self._span + numbers

    def find(self, book: Ints, number: int) -> Ints:
        """Return for each book the first row with that number or a greater one, or the row after its last."""
        return np.searchsorted(self._keys, book * self._span + min(max(number, 0), self._span - 1))


def _instant_us(event: dict[str, Any]) -> int:
    """Return when a book became stale: earlier than the event if a connection had been dead before its end was
    recorded, or if frames had been missing before a later one showed it (`span_s`)."""
    at: datetime = event["ingest_ts"]
    us = int(at.timestamp()) * SECOND_US + at.microsecond
    if event["kind"] not in {"disconnected", "gap"}:
        return us
    span_s = float(msgspec.json.decode(event["detail"]).get("span_s", 0.0))
    return us - round(span_s * SECOND_US)


def _frames(columns: dict[str, Array], book_market: Ints) -> Frames:
    cause = columns["cause"]
    not_deltas = np.where(cause != DELTA, np.arange(len(cause)), 0)
    verified = columns["verified"][np.maximum.accumulate(not_deltas)]
    return Frames(
        book_market[columns["book"]].astype(np.int32),
        columns["book"].astype(np.int32),
        columns["seq"],
        np.where(columns["place"] >= 0, columns["place"] >> 1, NONE),
        columns["ts"],
        columns["ingest_us"],
        columns["clock_us"],
        cause,
        verified,
    )


def _levels(rows: _Rows, frame: Codes, frames: Frames) -> Levels:
    level = np.flatnonzero(rows.side != NO_LEVEL)
    at = frame[level]
    # Sorted as one number: ladder, price, and the row, which keeps the order of the frames.
    bits = len(level).bit_length()
    key = frames.market[at].astype(np.int64) * 2 + rows.side[level]
    key = ((key << 16 | rows.price[level]) << bits) | np.arange(len(level))
    key.sort()
    order = key & ((1 << bits) - 1)
    at = at[order]
    size = rows.size[level[order]]
    key >>= bits
    ladder, price = (key >> 16).astype(np.int32), key & MAX_PRICE

    resets = np.append(np.flatnonzero(frames.cause <= SNAPSHOT), len(frames)).astype(np.int32)
    end = resets[np.searchsorted(resets, at, side="right")]
    end[:-1] = np.where(key[1:] == key[:-1], np.minimum(end[:-1], at[1:]), end[:-1])
    stands = (size > 0) & (end > at)
    return Levels(ladder[stands], price[stands], size[stands], at[stands], end[stands])


# -- helpers -----------------------------------------------------------------------------------


def _narrow(codes: Array, bound: int) -> Array:
    """Cast to 16 bits if they suffice: numpy then sorts by radix."""
    return codes.astype(np.uint16 if bound <= 1 << 16 else np.int64)


def _nothing(hour: datetime, gaps: int) -> Books:
    none = np.empty(0, dtype=np.int64)
    codes = np.empty(0, dtype=np.int32)
    flags = np.empty(0, dtype=np.bool_)
    return Books(
        hour,
        [],
        [],
        codes,
        none,
        none,
        Frames(codes, codes, none, none, none, none, none, np.empty(0, dtype=np.int8), flags),
        Levels(codes, none, none, codes, codes),
        gaps,
    )

"""Builds rows for the stores, in columns, from decoded frames and the books before them.

`build_rows` is a pure function of a journal range and the state at its beginning. Splitting a range gives the
same event rows and the same final state, so loading a range twice is harmless. The rules are those of
`exchange.book.Book`, the reference implementation that the tests compare with. The size after an event is
computed as a running sum within (book, snapshot, side, price).

Few events change whether a book is synced: these *transitions* are taken out of the columns and applied one by
one by `_BookTracker`, which keeps connections and books and adds the gap rows that capture could not write.

Decoding belongs in `exchange.columnar`, the state in `book_state`, writing in `sinks`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from operator import itemgetter
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pyarrow as pa

from kalshi_platform.arrow_columns import codes, names, place, prices, quantities, text, times
from kalshi_platform.exchange import columnar_trades
from kalshi_platform.exchange.columnar import STREAM, Decoded
from kalshi_platform.exchange.numbers import ONE_DOLLAR, contracts, dollars
from kalshi_platform.exchange.session import SCALE
from kalshi_platform.journal.reader import UnreadRange
from kalshi_platform.loading import wire_drift
from kalshi_platform.loading.book_state import (
    Book,
    BookState,
    Connection,
    Ladders,
    LostRecords,
    OpenGap,
    ladder_level,
    level_number,
    market_of,
    number_markets,
    with_names,
)
from kalshi_platform.loading.market_clocks import (
    DELTA,
    LEVEL,
    MARKER,
    Judgement,
    MarketClocks,
    RangeClocks,
    same_levels,
)
from kalshi_platform.loading.state_files import checkpoint
from kalshi_platform.schema import (
    BOOK_CHECKPOINTS,
    DATASETS,
    LATEST_LEVELS,
    ORDERBOOK_EVENTS,
    STREAM_EVENTS,
    TRADES,
    ZERO_UUID,
)
from kalshi_platform.utc_hours import HOUR_NS, floor_hour, hour_start_ns, time_of_ns

_StreamRow = tuple[Any, ...]
"""A row of stream_events, as `STREAM` has it."""
CARRIED = -1
RECENT_HOURS = 24
"""How many hours back an unchanged market counts as synced."""


@dataclass(frozen=True)
class StaleBook:
    """A book found to be stale while building rows; capture requests its snapshot."""

    market_ticker: str
    cause: str
    detail: dict[str, object]


@dataclass(frozen=True)
class Rows:
    """The rows of a journal range, in the stores' columns."""

    first_n: int
    end_n: int
    tables: dict[str, pa.Table]
    """By dataset, in the order of writing: orderbook_events, trades, book_checkpoints, stream_events,
    latest_levels. A store that has a range's stream_events also has the datasets before them."""
    stale_books: tuple[StaleBook, ...] = ()
    drift: Mapping[str, int] = field(default_factory=dict)
    """In how many frames of the range each drift of the wire was."""

    @cached_property
    def count(self) -> int:
        """The number of rows of archived datasets; derived tables are not counted."""
        return sum(t.num_rows for name, t in self.tables.items() if DATASETS[name].archived)

    @cached_property
    def bytes(self) -> int:
        """The memory that the tables take, in bytes."""
        return sum(int(table.nbytes) for table in self.tables.values())

    def of(self, datasets: Container[str]) -> Rows:
        """The rows of these datasets only."""
        kept = {name: table for name, table in self.tables.items() if name in datasets}
        return replace(self, tables=kept)


def build_rows(decoded: Decoded, state: BookState, shard: int = 0) -> tuple[Rows, BookState]:
    """Build the rows of one range of a shard's journal; return them and the state after it.

    The range must be cut by `shared_rows.split_at_checkpoints`. Where its first record enters an hour again, or the
    clock was set back, the rows include a checkpoint of the books before it; the checkpoint before a new hour
    is written by the loader.

    Raises: ValueError where the range does not begin where the state ends.
    """
    if decoded.first_n != state.n:
        raise ValueError(
            f"the range begins at record {decoded.first_n}, the state ends at {state.n}"
        )
    if decoded.lost:
        return _lost_rows(decoded, state, shard)
    unread: list[_StreamRow] = []
    if decoded.unread is not None:
        unread, state = _unread_rows(decoded, decoded.unread, state)
    events, numbers = _events(decoded, state)
    markets = _Markets(events, state, numbers)
    events, sized = _with_sizes(events, state, markets)
    clocks = RangeClocks(
        events, markets.of_events, markets.before_each, state.clocks, decoded.stream
    )
    same = same_levels(sized, events, clocks.candidates(), markets.width)
    last_frames = _last_frames(decoded)
    tracker = _BookTracker(
        state, _last_receive_times(last_frames), _Resyncs(clocks, numbers, same, state.hours)
    )
    transitions = _transitions(decoded, events, markets, clocks.falls())
    if incomplete := _incomplete_connections(decoded, state, last_frames):
        transitions = sorted(_first_frames(decoded, incomplete) + transitions, key=itemgetter("n"))
    drifted, wire = _drift_rows(decoded, state)
    happened = [*drifted, *unread, *_repeated_gaps(decoded, state), *tracker.apply(transitions)]
    clock = decoded.clock_after(state.clock)
    tracker.forget(clock.newest_ns)
    extra = pl.DataFrame(happened, schema=STREAM, orient="row")
    snapshots = _snapshot_rows(decoded.snapshots, tracker.unchanged)
    noted = _with_counts(decoded.stream, tracker.counts)
    stream = pl.concat([snapshots, noted, extra]).sort("n", maintain_order=True)
    books = {ticker: tracker.books[ticker] for ticker in markets.touched if ticker in tracker.books}
    final = _final_levels(sized, books, markets)
    changed = _changed_levels(events, sized, final, books, markets)
    rows = Rows(
        decoded.first_n,
        decoded.end_n,
        {
            ORDERBOOK_EVENTS.name: _event_table(events.filter(pl.col("type") >= LEVEL), shard),
            TRADES.name: columnar_trades.table(decoded.trades, shard),
            BOOK_CHECKPOINTS.name: _checkpoint_rows(decoded, state, shard),
            STREAM_EVENTS.name: _stream_table(stream, shard),
            LATEST_LEVELS.name: _latest_table(changed, state),
        },
        tuple(tracker.stale_books),
        wire_drift.counts(decoded.drift, state.wire or wire_drift.WireState()),
    )
    connections = _connections_after(tracker.connections, last_frames)
    return rows, BookState(
        decoded.end_n,
        clock,
        connections,
        tracker.books,
        _numbers_after(numbers, tracker.books),
        _ladders_after(final, tracker.books, state, markets),
        state.partial & connections.keys(),
        tracker.clocks_after(markets.touched, state),
        _hours_after(state.hours, decoded.first_ns),
        wire,
    )


def _drift_rows(
    decoded: Decoded, state: BookState
) -> tuple[list[_StreamRow], wire_drift.WireState | None]:
    """Return (the rows of the wire's drift, what is known of the wire after the range)."""
    known = state.wire
    if known is None:
        if decoded.first_ns // HOUR_NS <= state.version // HOUR_NS:
            return [], None
        known = wire_drift.WireState()
    return wire_drift.rows(decoded.drift, known)


def _lost_rows(decoded: Decoded, state: BookState, shard: int) -> tuple[Rows, BookState]:
    """The rows of a lost range: a gap row. Which connections it concerns shows with their next frames."""
    at = state.version or decoded.clock.newest_ns
    row = _journal_gap(decoded.first_n, at, decoded.first_n, decoded.end_n)
    empty = {
        name: DATASETS[name].arrow.empty_table()
        for name in (ORDERBOOK_EVENTS.name, TRADES.name, BOOK_CHECKPOINTS.name)
    }
    tables = empty | {
        STREAM_EVENTS.name: _stream_table(pl.DataFrame([row], schema=STREAM, orient="row"), shard),
        LATEST_LEVELS.name: LATEST_LEVELS.arrow.empty_table(),
    }
    stale = _after_lost_records(state, at)
    return Rows(decoded.first_n, decoded.end_n, tables), replace(stale, n=decoded.end_n)


def _unread_rows(
    decoded: Decoded, unread: UnreadRange, state: BookState
) -> tuple[list[tuple[Any, ...]], BookState]:
    """Return (a gap row for the unread records of an overlapping segment, the state after them)."""
    at = state.version or decoded.clock.newest_ns
    row = _journal_gap(
        decoded.first_n,
        at,
        unread.first_n,
        unread.end_n,
        segment=unread.segment,
        instead=unread.following,
    )
    return [row], _after_lost_records(state, at)


def _journal_gap(n: int, at_ns: int, first_n: int, end_n: int, **more: str) -> _StreamRow:
    """A gap row at record `n` that names journal records which are not loaded."""
    detail = {
        "cause": DAMAGED,
        "channel": "journal",
        "record": first_n,
        "until_record": end_n,
        **more,
    }
    body = msgspec.json.encode(detail).decode()
    return (n, at_ns, ZERO_UUID, 0, 0, "gap", "", body)


def _after_lost_records(state: BookState, at_ns: int) -> BookState:
    """The state after records were lost: any open connection may have had frames among them."""
    connections = {}
    for conn, connection in state.connections.items():
        lost = connection.lost
        since_ns = lost.since_ns if lost and lost.last else at_ns
        connections[conn] = msgspec.structs.replace(
            connection, lost=LostRecords(since_ns, connection.seqs)
        )
    return replace(state, connections=connections)


def _checkpoint_time(decoded: Decoded, state: BookState) -> datetime | None:
    """The time of the checkpoint due where the clock enters an hour again or was set back; else None."""
    at = state.clock.checkpoint_time(decoded.first_ns)
    return None if at is None or state.clock.is_new_hour(at) else at


def _checkpoint_rows(decoded: Decoded, state: BookState, shard: int) -> pa.Table:
    at = _checkpoint_time(decoded, state)
    return BOOK_CHECKPOINTS.arrow.empty_table() if at is None else checkpoint(state, at, shard)


def _repeated_gaps(decoded: Decoded, state: BookState) -> Iterator[tuple[Any, ...]]:
    """Repeat the gaps of books without a snapshot at a checkpoint, which does not contain these books."""
    if (at := _checkpoint_time(decoded, state)) is None:
        return
    hour_ns = hour_start_ns(floor_hour(at))
    event = {"n": decoded.first_n, "recv_ns": decoded.first_ns}
    for ticker, book in state.books.items():
        if not book.based and state.may_have_rows_in(hour_ns, book):
            body = {"cause": "delta_before_snapshot"}
            yield _row(event, book.conn, book.sid, "gap", body, ticker=ticker)


# -- events ------------------------------------------------------------------------------------


def _events(decoded: Decoded, state: BookState) -> tuple[pl.DataFrame, dict[str, int]]:
    """Merge snapshot markers, their levels and the deltas in record order, on one price scale.

    Also returns the market numbers (column `market`), including those of `state`.
    """
    common = ["n", "recv_ns", "conn", "sid", "seq", "market_id", "market_ticker"]
    no_level = [
        pl.lit(None, pl.String).alias("side"),
        pl.lit(None, pl.Int64).alias("price"),
        pl.lit(0, pl.Int64).alias("qty"),
    ]
    no_time = [
        pl.lit(None, pl.Datetime("us", "UTC")).alias("ts"),
        pl.lit("").alias("client_order_id"),
    ]
    sent = ["clock", "sent_ts"]
    events = pl.concat(
        [
            decoded.snapshots.select(
                *common, *no_level, *no_time, *sent, pl.lit(MARKER, pl.Int8).alias("type")
            ),
            decoded.levels.select(
                *common,
                "side",
                "price",
                "qty",
                *no_time,
                *sent,
                pl.lit(LEVEL, pl.Int8).alias("type"),
            ),
            decoded.deltas.select(
                *common,
                "side",
                "price",
                "qty",
                "ts",
                "client_order_id",
                *sent,
                pl.lit(DELTA, pl.Int8).alias("type"),
            ),
        ]
    ).sort("n", maintain_order=True)
    if (on_yes_scale := _on_yes_scale(decoded, state)) is not None:
        events = events.with_columns(
            pl.when(on_yes_scale & (pl.col("side") == "no"))
            .then(ONE_DOLLAR - pl.col("price"))
            .otherwise(pl.col("price"))
            .alias("price")
        )
    market, numbers = number_markets(events["market_ticker"], state.numbers)
    events = events.with_columns(market.alias("market"))
    return events.with_columns(level_number().alias("level")), numbers


def _on_yes_scale(decoded: Decoded, state: BookState) -> pl.Expr | None:
    """Whether an event's no bids are quoted at 1 - p; None where no connection quotes them so.

    A connection whose beginning is not in the journal is assumed to use the scale that the platform requests.
    """
    opened = {conn: flag for _, conn, flag in _new_connections(decoded.stream)}
    known = {conn: c.use_yes_price for conn, c in state.connections.items()} | opened
    changes = list(_scale_changes(decoded.stream))
    conns = [conn for conn, flag in known.items() if flag]
    if not conns and not changes:
        return None
    on_yes = pl.col("conn").is_in(conns)
    for n, conn, flag in changes:
        from_there = (pl.col("conn") == conn) & (pl.col("n") >= n)
        on_yes = pl.when(from_there).then(pl.lit(flag)).otherwise(on_yes)
    return on_yes


def _scale_changes(stream: pl.DataFrame) -> Iterator[tuple[int, str, bool]]:
    """Yield (record, connection, whether on the YES scale) for each change of scale."""
    of_scale = (pl.col("kind") == "gap") & pl.col("detail").str.contains(SCALE, literal=True)
    for n, conn, detail in stream.filter(of_scale).select("n", "conn", "detail").iter_rows():
        body = msgspec.json.decode(detail)
        if body["cause"] == SCALE:
            yield n, conn, bool(body["use_yes_price"])


def _new_connections(stream: pl.DataFrame) -> Iterator[tuple[int, str, bool]]:
    for n, conn, detail in (
        stream.filter(pl.col("kind") == "connected").select("n", "conn", "detail").iter_rows()
    ):
        yield n, conn, bool(msgspec.json.decode(detail)["use_yes_price"])


class _Markets:
    """Integer codes for the markets, connections and books of the events and of the books before them.

    A book is a market on a connection.
    """

    def __init__(self, events: pl.DataFrame, state: BookState, numbers: dict[str, int]) -> None:
        encoded = events["conn"].to_arrow().dictionary_encode()
        self._conns = {conn: i for i, conn in enumerate(encoded.dictionary.to_pylist())}
        self.touched: list[str] = events["market_ticker"].unique().to_list()
        """The markets with events: few of tens of thousands, so the others are not visited."""
        before = {ticker: state.books[ticker] for ticker in self.touched if ticker in state.books}
        for book in before.values():
            self._conns.setdefault(book.conn, len(self._conns))
        self.numbering = numbers
        market = events["market"]
        conn = pl.Series(encoded.indices).cast(pl.Int64)
        self.of_events = market * len(self._conns) + conn
        """The book code of each event."""
        self.before_each = np.full(len(numbers) and max(numbers.values()) + 1, -1)
        """The book that each touched market had before, by market number; -1 where it had none."""
        self.before_each[self.numbers(before).to_numpy()] = self.books(before)
        marker = events["type"] == MARKER
        self.any_snapshot = bool(marker.any())
        self.renewed = market.filter(marker | (self.of_events != self.before(market))).unique()
        """The markets whose book is replaced in this range: by a snapshot, or on another connection."""

    def before(self, markets: pl.Series) -> pl.Series:
        """The book code that each of these markets had before; -1 where it had none."""
        return pl.Series(self.before_each[markets.to_numpy()], dtype=pl.Int64)

    def books(self, books: Mapping[str, Book]) -> list[int]:
        """The code of each book. Raises: KeyError for a market without events."""
        width = self.width
        return [self.numbering[t] * width + self._conns[book.conn] for t, book in books.items()]

    @property
    def width(self) -> int:
        """The number of connections: a book's code is its market's number times this, plus its connection's."""
        return len(self._conns)

    def numbers(self, tickers: Iterable[str]) -> pl.Series:
        """The numbers of these markets."""
        return pl.Series([self.numbering[ticker] for ticker in tickers], dtype=pl.Int64)


def _with_sizes(
    events: pl.DataFrame, state: BookState, markets: _Markets
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return (the events with `book` and `size`, the size of the level after the event; the working table).

    The working table has a row for each event and, before them, rows of type CARRIED for the levels that
    existed before: those that an event touches, and all levels of a replaced book, so that dropped ones are
    detected. A `ladder` is a book between two snapshots, a `standing` a level of a ladder.
    """
    carried = state.ladders.of(events["level"].drop_nulls(), markets.renewed)
    before = markets.before(carried.select(market_of(pl.col("level"))).to_series())
    carried = carried.select(
        pl.lit(None, pl.UInt32).alias("row"),
        pl.lit(CARRIED, pl.Int8).alias("type"),
        before.alias("book"),
        "level",
        pl.col("size").alias("qty"),
    )
    both = pl.concat(
        [
            carried,
            events.select(
                pl.int_range(pl.len(), dtype=pl.UInt32).alias("row"),
                "type",
                markets.of_events.alias("book"),
                "level",
                "qty",
            ),
        ]
    )
    both = both.with_columns(_ladders(both, any_snapshot=markets.any_snapshot).alias("ladder"))
    both = both.with_columns(ladder_level().alias("standing"))
    both = both.with_columns(pl.col("qty").cum_sum().over("standing").alias("size"))
    sized = both.slice(carried.height)
    return events.with_columns(sized["book"], sized["size"]), both


def _ladders(rows: pl.DataFrame, *, any_snapshot: bool) -> pl.Series:
    """A number for each book between two snapshots; later ones have higher numbers."""
    if not any_snapshot:
        return rows["book"]
    epoch = rows.select(
        (pl.col("type") == MARKER).cast(pl.Int64).cum_sum().over("book")
    ).to_series()
    return codes(rows["book"]) * (1 + rows.height) + epoch  # more than any book's snapshots


# -- which books are synced --------------------------------------------------------------------

CLOCK_FELL = "clock_fell"
"""The kind of a row, and the cause of a gap: a frame's clock is below that of the frames before it."""
DAMAGED = "journal_damaged"
"""The cause of a gap whose frames had been received and are lost from the journal."""
_TRANSITIONS = (
    *("connected", "disconnected", "started", "gap", "left", "unsubscribed", "malformed"),
    "resynced",
)
"""The kinds of stream rows that change the state of connections or books."""


def _transitions(
    decoded: Decoded, events: pl.DataFrame, markets: _Markets, falls: pl.DataFrame
) -> list[dict[str, Any]]:
    """The few events that change whether a book is synced, in record order."""
    columns = ["n", "recv_ns", "conn", "sid", "seq", "kind", "market_ticker", "market_id", "detail"]
    nothing = [pl.lit("").alias("market_id")]
    breaks = decoded.stream.filter(pl.col("kind").is_in(_TRANSITIONS)).with_columns(nothing)
    deltas = events.filter(pl.col("type") == DELTA)
    if markets.renewed.is_empty() and breaks.is_empty():
        first = deltas.clear()  # no new book and no interruption: every delta is of a known book
    else:
        first = deltas.unique(subset="book", keep="first", maintain_order=True)
    below_zero = deltas.filter(pl.col("size") < 0)
    snapshots = decoded.snapshots.with_columns(
        pl.lit("snapshot").alias("kind"), pl.lit("").alias("detail")
    )
    level = pl.format("{}|{}|{}", "side", "price", "size").alias("detail")
    parts = [
        breaks,
        snapshots,
        first.with_columns(pl.lit("delta").alias("kind"), pl.lit("").alias("detail")),
        falls.with_columns(
            pl.lit(CLOCK_FELL).alias("kind"), pl.format("{}|{}", "clock", "after").alias("detail")
        ),
        below_zero.with_columns(pl.lit("below_zero").alias("kind"), level),
    ]
    # Within one frame, "delta" precedes the others: the book must exist before it can become stale.
    return (
        pl.concat([part.select(columns) for part in parts])
        .sort("n", maintain_order=True)
        .to_dicts()
    )


def _incomplete_connections(
    decoded: Decoded, state: BookState, last_frames: list[tuple[str, int, int, int]]
) -> set[str]:
    """Connections of which the journal may lack frames: records were lost, or their beginning is missing."""
    known = state.connections.keys() | {conn for _, conn, _ in _new_connections(decoded.stream)}
    lost = {conn for conn, event in state.connections.items() if event.lost is not None}
    return {conn for conn, _, seq, _ in last_frames if conn in lost or (seq and conn not in known)}


def _first_frames(decoded: Decoded, conns: set[str]) -> list[dict[str, Any]]:
    """The first numbered frame of each sid of these connections, as transitions."""
    columns = ["n", "recv_ns", "conn", "sid", "seq"]
    frames = pl.concat(
        frame.select(columns).filter(pl.col("conn").is_in(conns), pl.col("seq") > 0)
        for frame in (decoded.deltas, decoded.snapshots, decoded.trades, decoded.stream)
    )
    first = frames.sort("n").unique(subset=["conn", "sid"], keep="first", maintain_order=True)
    return [
        {**row, "kind": "first", "market_ticker": "", "market_id": "", "detail": ""}
        for row in first.iter_rows(named=True)
    ]


class _BookTracker:
    """Tracks which connections are open and which books are synced (`verified`)."""

    def __init__(self, state: BookState, last_heard: dict[str, int], resyncs: _Resyncs) -> None:
        self.connections = dict(state.connections)
        self.books = dict(state.books)
        self._version = state.version
        self._last_heard = last_heard
        """The last receive time of each connection in the range."""
        self._resyncs = resyncs
        self._complete_until: dict[str, int] = {}
        """For each book that became stale in the range, the record from which on it is."""
        self._void: set[str] = set()
        """Stale books whose clock before is not known, because it fell."""
        self.stale_books: list[StaleBook] = []
        self.unchanged: set[int] = set()
        """The records of snapshots that prove their market unchanged."""
        self.counts: dict[int, tuple[int, int]] = {}
        """By record of a `resynced` note, how many markets were (unchanged, changed)."""

    def apply(self, transitions: list[dict[str, Any]]) -> Iterator[tuple[Any, ...]]:
        """Apply the transitions in order; yield the stream rows that they require."""
        handlers: Mapping[str, Callable[[dict[str, Any]], Iterable[_StreamRow]]] = {
            "first": self._first_frame,
            "snapshot": self._snapshot,
            "delta": self._first_delta,
            CLOCK_FELL: self._clock_fell,
            "below_zero": self._below_zero,
            "connected": self._connected,
            "disconnected": self._disconnected,
            "started": self._started,
            "left": self._left,
            "malformed": self._malformed,
            "resynced": self._resynced,
            "gap": self._apply_gap,
            "unsubscribed": self._apply_gap,
        }
        for event in transitions:
            yield from handlers[event["kind"]](event)

    def clocks_after(self, touched: Iterable[str], state: BookState) -> MarketClocks:
        """The markets' clocks after the range; `touched`: the markets with events in it."""
        numbers = self._resyncs.numbers
        complete_until = {
            numbers[ticker]: self._complete_until.get(ticker, 0)
            for ticker in touched
            if (book := self.books.get(ticker)) is None or not book.verified
        }
        forgotten = [numbers[ticker] for ticker in state.books.keys() - self.books.keys()]
        return self._resyncs.clocks.after(
            complete_until,
            forgotten,
            [numbers[ticker] for ticker in self._void],
            max(numbers.values(), default=-1) + 1,
        )

    def _snapshot(self, event: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
        """Apply a snapshot: its book is synced, and its clock shows whether the market missed anything."""
        conn, sid, ticker = event["conn"], event["sid"], event["market_ticker"]
        before = self.books.get(ticker)
        judged = self._judged(event, before)
        fell = judged is not None and judged.fell
        stale = fell and before is not None and before.conn == conn
        unchanged = None if judged is None or (before and before.verified) else judged.unchanged
        self.books[ticker] = Book(
            conn,
            sid,
            event["market_id"],
            based=True,
            verified=True,
            unchanged=self._over_the_resync(conn, before, unchanged),
        )
        self._complete_until.pop(ticker, None)
        self._void.discard(ticker)
        if judged is not None and fell:
            yield from self._fell(event, judged.clock, judged.after, "snapshot", stale=stale)
        if judged is not None and before is not None and unchanged is not None and not stale:
            yield from self._resync_rows(event, before, judged)
        yield from self._snapshot_arrived(event, conn, sid)

    def _judged(self, event: dict[str, Any], before: Book | None) -> Judgement | None:
        """The judgement of a snapshot; None where its market's clocks cannot be compared."""
        ticker = event["market_ticker"]
        if before is None or before.left or ticker in self._void:
            return None
        complete_until = event["n"] if before.verified else self._complete_until.get(ticker)
        return self._resyncs.judge(ticker, event["n"], complete_until)

    def _over_the_resync(
        self, conn: str, before: Book | None, unchanged: bool | None
    ) -> bool | None:
        """Whether a market is unchanged over all its snapshots since the gap that is being resynced."""
        connection = self.connections.get(conn)
        if connection is None or not connection.resyncing or unchanged is None:
            return None
        earlier = before.unchanged if before is not None and before.conn == conn else None
        return unchanged and earlier is not False

    def _resync_rows(
        self, event: dict[str, Any], before: Book, judged: Judgement
    ) -> Iterator[tuple[Any, ...]]:
        """Yield a row for a changed market; for an unchanged one a row in each earlier hour of the gap."""
        ticker = event["market_ticker"]
        detail: dict[str, Any] = {"unchanged": judged.unchanged, "clock": judged.clock}
        if not judged.unchanged:
            detail["after"] = judged.after
            if before.stale_ns:
                detail["seconds"] = round((event["recv_ns"] - before.stale_ns) / 1e9, 6)
            yield _row(event, event["conn"], event["sid"], "resynced", detail, ticker=ticker)
            return
        self.unchanged.add(event["n"])
        detail["until"] = time_of_ns(event["recv_ns"]).isoformat()
        for at_ns in self._resyncs.earlier_hours(before.stale_ns, event["recv_ns"]):
            place = {**event, "recv_ns": at_ns}
            yield _row(place, before.conn, before.sid, "resynced", detail, ticker=ticker)

    def _resynced(self, event: dict[str, Any]) -> Iterable[_StreamRow]:
        """Count the markets of a resync that capture noted; earlier versions did it before the last snapshot."""
        if self._resyncs.clocks.active and "cause" in msgspec.json.decode(event["detail"]):
            self.counts[event["n"]] = self._counted(event["conn"])
        return ()

    def _counted(self, conn: str) -> tuple[int, int]:
        """How many markets of a connection were (unchanged, changed) since its resync began, which ends it."""
        found = [0, 0]
        for ticker, book in self.books.items():
            if book.conn == conn and book.unchanged is not None:
                found[0 if book.unchanged else 1] += 1
                self.books[ticker] = msgspec.structs.replace(book, unchanged=None)
        if (connection := self.connections.get(conn)) is not None:
            self.connections[conn] = msgspec.structs.replace(connection, resyncing=False)
        return found[0], found[1]

    def _clock_fell(self, event: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
        """Apply a delta whose clock fell: its synced book is stale."""
        book = self.books.get(event["market_ticker"])
        if book is not None and book.verified and book.conn == event["conn"]:
            clock, after = (int(value) for value in event["detail"].split("|"))
            yield from self._fell(event, clock, after, "delta", stale=True)

    def _fell(
        self, event: dict[str, Any], clock: int, after: int, frame_type: str, *, stale: bool
    ) -> Iterator[tuple[Any, ...]]:
        """Yield a row for a clock that fell; where its book is `stale` for that, a gap as well."""
        ticker = event["market_ticker"]
        detail = {"of": frame_type, "seq": event["seq"], "clock": clock, "after": after}
        yield _row(event, event["conn"], event["sid"], CLOCK_FELL, detail, ticker=ticker)
        if stale:
            self._mark_stale(event, ticker)
            self._void.add(ticker)
            yield self._gap(event, CLOCK_FELL, detail)

    def _started(self, event: dict[str, Any]) -> Iterator[_StreamRow]:
        """Apply a recorder's start: connections that are still open ended unnoticed."""
        for conn in list(self.connections):
            yield from self._end_connection(event, conn, "the recorder ended without closing")

    def _apply_gap(self, event: dict[str, Any]) -> Iterable[_StreamRow]:
        """Apply a gap, or the end of a subscription: mark one market's book or all of the sid's stale."""
        ticker, conn, sid = event["market_ticker"], event["conn"], event["sid"]
        if event["kind"] == "gap" and ticker:
            self._mark_stale(event, ticker)
            return ()
        self._update_scale(event)
        concerned = [t for t, b in self.books.items() if (b.conn, b.sid) == (conn, sid)]
        self._mark_stale(event, *concerned)
        if concerned:
            self._begin_resync(conn)
        return ()

    def _left(self, event: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
        if (book := self.books.get(event["market_ticker"])) is not None:
            ended_ns = book.ended_ns or self._clock_ns(event)
            self._mark_stale(event, event["market_ticker"])
            left = self.books[event["market_ticker"]]
            self.books[event["market_ticker"]] = msgspec.structs.replace(
                left, left=True, ended_ns=ended_ns, unchanged=None
            )
            yield from self._snapshot_arrived(event, book.conn, book.sid)

    def _first_frame(self, event: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
        """Apply the next frame of a sid after lost records, or the first one of a connection without a beginning."""
        conn, sid, got = event["conn"], event["sid"], event["seq"]
        connection = self.connections.get(conn)
        if connection is None:
            yield from self._end_incomplete(event)
            connection = Connection(False, event["recv_ns"], {}, LostRecords(event["recv_ns"], {}))
            body = {"use_yes_price": False, "assumed": "its beginning is not in the journal"}
            yield _row(event, conn, 0, "connected", body)
        if (lost := connection.lost) is None or (sid in connection.seqs and sid not in lost.last):
            return
        expected = lost.last.get(sid, 0) + 1
        left = LostRecords(
            lost.since_ns, {other: seq for other, seq in lost.last.items() if other != sid}
        )
        self.connections[conn] = msgspec.structs.replace(connection, lost=left)
        if got == expected:
            return
        markets = [
            t for t, b in self.books.items() if (b.conn, b.sid) == (conn, sid) and not b.left
        ]
        detail = {
            "cause": DAMAGED,
            "channel": "orderbook_delta" if markets else "journal",
            "expected": expected,
            "got": got,
            "missing": got - expected,
            "span_s": round((event["recv_ns"] - lost.since_ns) / 1e9, 6),
        }
        yield _row(event, conn, sid, "gap", detail)
        self._mark_stale(event, *markets, since_ns=lost.since_ns)
        self.stale_books += [StaleBook(t, DAMAGED, {"record": event["n"]}) for t in markets]
        if markets:
            self._begin_resync(conn)
            connection = self.connections[conn]
            gap = OpenGap(expected, got, event["recv_ns"], len(markets), frozenset(markets))
            gaps = connection.gaps | {sid: gap}
            self.connections[conn] = msgspec.structs.replace(connection, gaps=gaps)

    def _snapshot_arrived(
        self, event: dict[str, Any], conn: str, sid: int
    ) -> Iterator[tuple[Any, ...]]:
        """Close a gap where the last book it waits for got its snapshot or is no longer followed."""
        connection = self.connections.get(conn)
        gap = connection.gaps.get(sid) if connection is not None else None
        if connection is None or gap is None or event["market_ticker"] not in gap.waiting:
            return
        waiting = gap.waiting - {event["market_ticker"]}
        gaps = {other: g for other, g in connection.gaps.items() if other != sid}
        if waiting:
            gaps[sid] = msgspec.structs.replace(gap, waiting=waiting)
        self.connections[conn] = msgspec.structs.replace(connection, gaps=gaps)
        if not waiting:
            detail = {
                "expected": gap.expected,
                "got": gap.got,
                "markets": gap.markets,
                "seconds": round((event["recv_ns"] - gap.since_ns) / 1e9, 6),
            }
            if self._resyncs.clocks.active:
                detail |= _counts(*self._counted(conn))
            yield _row(event, conn, sid, "resynced", detail)

    def _connected(self, event: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
        yield from self._end_incomplete(event)
        flag = bool(msgspec.json.decode(event["detail"])["use_yes_price"])
        resyncing = any(book.based for book in self.books.values())
        self.connections[event["conn"]] = Connection(
            flag, event["recv_ns"], {}, resyncing=resyncing
        )

    def _begin_resync(self, conn: str) -> None:
        if (connection := self.connections.get(conn)) is not None and not connection.resyncing:
            self.connections[conn] = msgspec.structs.replace(connection, resyncing=True)

    def _end_incomplete(self, event: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
        """End connections whose end is in lost records: a shard has one connection at a time, so they ended
        before another began."""
        cause = "its end is not in the journal"
        lost = [conn for conn, open_ in self.connections.items() if open_.lost is not None]
        for conn in lost:
            yield from self._end_connection(event, conn, cause)

    def _end_connection(
        self, event: dict[str, Any], conn: str, cause: str
    ) -> Iterator[tuple[Any, ...]]:
        """End a connection for which no disconnect event was recorded."""
        connection = self.connections[conn]
        last_ns = max(connection.last_recv_ns, self._last_heard.get(conn, 0))
        detail = {
            "cause": cause,
            "last_frame": datetime.fromtimestamp(last_ns // 1_000_000_000, UTC).isoformat(),
            "span_s": round((event["recv_ns"] - last_ns) / 1e9, 6),
        }
        yield _row(event, conn, 0, "disconnected", detail)
        yield from self._unheard_row(event, conn, cause, last_ns)
        self._close(event, conn, last_ns)

    def _disconnected(self, event: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
        """Apply a recorded disconnect; the connection may have been silent before it."""
        body = msgspec.json.decode(event["detail"])
        last_ns = event["recv_ns"]
        if span_s := float(body.get("span_s", 0)):
            last_ns -= round(span_s * 1e9)
            yield from self._unheard_row(event, event["conn"], body["cause"], last_ns)
        self._close(event, event["conn"], last_ns)

    def _unheard_row(
        self, event: dict[str, Any], conn: str, cause: str, last_ns: int
    ) -> Iterator[tuple[Any, ...]]:
        """Yield an `unheard` row for an earlier hour in which the connection had already fallen silent."""
        if conn in self.connections and last_ns // HOUR_NS < event["recv_ns"] // HOUR_NS:
            detail = {"cause": cause, "until": time_of_ns(event["recv_ns"]).isoformat()}
            yield _row({**event, "recv_ns": last_ns}, conn, 0, "unheard", detail)

    def _first_delta(self, event: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
        """Apply the first delta of a book in this range: the book may have no snapshot."""
        known = self.books.get(event["market_ticker"])
        if known is not None and known.conn == event["conn"]:
            return
        self._mark_stale(event, event["market_ticker"])
        self.books[event["market_ticker"]] = Book(
            event["conn"], event["sid"], event["market_id"], based=False, verified=False
        )
        yield self._gap(event, "delta_before_snapshot", {"seq": event["seq"]})

    def _below_zero(self, event: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
        book = self.books.get(event["market_ticker"])
        if book is None or not book.verified or book.conn != event["conn"]:
            return
        side, price, size = event["detail"].split("|")
        detail = {
            "seq": event["seq"],
            "side": side,
            "price": dollars(int(price)),
            "size": contracts(int(size)),
        }
        self._mark_stale(event, event["market_ticker"])
        yield self._gap(event, "negative_level", detail)

    def _malformed(self, event: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
        """Apply an unreadable delta or snapshot: its book, or every book of its sid, is stale."""
        body = msgspec.json.decode(event["detail"])
        if (frame_type := body.get("of")) is None:
            return
        ticker, conn, sid = event["market_ticker"], event["conn"], event["sid"]
        stale = [
            name
            for name in ([ticker] if ticker else list(self.books))
            if (book := self.books.get(name)) is not None
            and book.verified
            and (book.conn, book.sid) == (conn, sid)
        ]
        if not stale:
            return
        detail = {"cause": f"malformed_{frame_type}", "seq": event["seq"], "reason": body["reason"]}
        if not ticker:
            detail |= {"expected": event["seq"], "got": event["seq"] + 1, "missing": 1}
        yield _row(event, conn, sid, "gap", detail, ticker=ticker)
        self._mark_stale(event, *stale)
        self.stale_books += [
            StaleBook(name, detail["cause"], {"seq": event["seq"]}) for name in stale
        ]

    def _update_scale(self, event: dict[str, Any]) -> None:
        """Apply the scale of no bids that a gap of cause `scale` names."""
        connection = self.connections.get(event["conn"])
        body = msgspec.json.decode(event["detail"]) if event["kind"] == "gap" else {}
        if connection is not None and body.get("cause") == SCALE:
            flag = bool(body["use_yes_price"])
            self.connections[event["conn"]] = msgspec.structs.replace(
                connection, use_yes_price=flag
            )

    def _gap(self, event: dict[str, Any], cause: str, detail: dict[str, object]) -> tuple[Any, ...]:
        self.stale_books.append(StaleBook(event["market_ticker"], cause, detail))
        body = {"cause": cause, **detail}
        return _row(event, event["conn"], event["sid"], "gap", body, ticker=event["market_ticker"])

    def _close(self, event: dict[str, Any], conn: str, last_ns: int) -> None:
        """Close a connection that was last heard at `last_ns`."""
        self.connections.pop(conn, None)
        for ticker in [ticker for ticker, book in self.books.items() if book.conn == conn]:
            self._mark_stale(event, ticker, since_ns=last_ns)
            book = self.books[ticker]
            ended_ns = book.ended_ns or self._clock_ns(event)
            self.books[ticker] = msgspec.structs.replace(book, ended_ns=ended_ns, unchanged=None)

    def _clock_ns(self, event: dict[str, Any]) -> int:
        """The receive time of a transition, or the latest before it where the clock was set back."""
        return max(self._version, int(event["recv_ns"]))

    def forget(self, newest_ns: int) -> None:
        """Drop markets that were left in an hour before the latest one and whose connection has ended.

        Until then a checkpoint after the clock was set back may have to include them.
        """
        hour_ns = newest_ns // HOUR_NS * HOUR_NS
        self.books = {
            ticker: book
            for ticker, book in self.books.items()
            if not (book.left and book.conn not in self.connections and book.ended_ns < hour_ns)
        }

    def _mark_stale(
        self, event: dict[str, Any], *tickers: str, since_ns: int | None = None
    ) -> None:
        """Mark synced books stale: complete are the frames before this event's record, those until `since_ns`."""
        for ticker in tickers:
            book = self.books.get(ticker)
            if book is not None and book.verified:
                at_ns = event["recv_ns"] if since_ns is None else since_ns
                self.books[ticker] = msgspec.structs.replace(book, verified=False, stale_ns=at_ns)
                self._complete_until[ticker] = event["n"]


@dataclass(frozen=True)
class _Resyncs:
    """What the clocks of a range prove of its snapshots."""

    clocks: RangeClocks
    numbers: Mapping[str, int]
    """The number of each market."""
    same_levels: Container[int]
    """The records of snapshots that have the levels of the book before."""
    hours: tuple[int, ...]
    """The latest hours with records, in hours since the epoch."""

    def judge(self, ticker: str, n: int, complete_until: int | None) -> Judgement | None:
        """Judge the snapshot of record `n`; see `RangeClocks.judge`."""
        return self.clocks.judge(self.numbers[ticker], n, complete_until, self.same_levels)

    def earlier_hours(self, since_ns: int, until_ns: int) -> list[int]:
        """An instant in each recorded hour from `since_ns` on that is before the hour of `until_ns`."""
        since, until = since_ns // HOUR_NS, until_ns // HOUR_NS
        return [max(since_ns, hour * HOUR_NS) for hour in self.hours if since <= hour < until]


def _counts(unchanged: int, changed: int) -> dict[str, int]:
    return {"unchanged": unchanged, "changed": changed}


def _with_counts(stream: pl.DataFrame, counts: Mapping[int, tuple[int, int]]) -> pl.DataFrame:
    """The stream rows with the counts of unchanged and changed markets in the `resynced` notes."""
    if not counts:
        return stream
    noted = pl.col("n").is_in(list(counts)) & (pl.col("kind") == "resynced")
    details = stream.filter(noted).select("n", "detail").iter_rows()
    counted = {
        n: msgspec.json.encode(msgspec.json.decode(detail) | _counts(*counts[n])).decode()
        for n, detail in details
    }
    return stream.with_columns(
        pl.when(noted)
        .then(pl.col("n").replace_strict(counted, default=None, return_dtype=pl.String))
        .otherwise("detail")
        .alias("detail")
    )


def _hours_after(hours: tuple[int, ...], first_ns: int) -> tuple[int, ...]:
    """The latest hours with records, after a range, which is within one hour."""
    hour = first_ns // HOUR_NS
    return hours if hour in hours else (*hours, hour)[-RECENT_HOURS:]


def _row(
    event: dict[str, Any],
    conn: str,
    sid: int,
    kind: str,
    detail: dict[str, Any],
    *,
    ticker: str = "",
) -> tuple[Any, ...]:
    """A row of stream_events at a transition."""
    body = msgspec.json.encode(detail).decode()
    return (event["n"], event["recv_ns"], conn, sid, 0, kind, ticker, body)


def _last_frames(decoded: Decoded) -> list[tuple[str, int, int, int]]:
    """(connection, sid, last sequence number, last receive time) of the frames of this range."""
    frames = (decoded.deltas, decoded.snapshots, decoded.trades, decoded.stream)
    last = [
        pl.col("n").last(),
        pl.col("seq").max(),
        pl.col("recv_ns").last(),
    ]  # notes have no sequence number
    parts = [frame.group_by("conn", "sid").agg(last) for frame in frames]
    both = pl.concat(parts).sort("n").group_by("conn", "sid", maintain_order=True).agg(last)
    return list(both.drop("n").iter_rows())


def _last_receive_times(last_frames: list[tuple[str, int, int, int]]) -> dict[str, int]:
    """Each connection's last receive time over all sids."""
    newest: dict[str, int] = {}
    for conn, _, _, recv_ns in last_frames:
        newest[conn] = max(newest.get(conn, 0), recv_ns)
    return newest


def _connections_after(
    connections: dict[str, Connection], last_frames: list[tuple[str, int, int, int]]
) -> dict[str, Connection]:
    after = dict(connections)
    for conn, sid, seq, recv_ns in last_frames:
        known = after.get(conn)
        if known is not None:
            seqs = known.seqs | {sid: seq} if seq else known.seqs
            last_ns = max(known.last_recv_ns, recv_ns)
            after[conn] = msgspec.structs.replace(known, last_recv_ns=last_ns, seqs=seqs)
    return after


# -- levels after ------------------------------------------------------------------------------


def _final_levels(sized: pl.DataFrame, books: dict[str, Book], markets: _Markets) -> pl.DataFrame:
    """The last row of every level of `books` (the latest books of the touched markets), including size 0."""
    newest = pl.Series(markets.books(books), dtype=pl.Int64)
    rows = sized.filter(pl.col("book").is_in(newest.implode()))
    if markets.any_snapshot:
        last = rows.group_by("book").agg(pl.col("ladder").max())["ladder"]
        rows = rows.filter((pl.col("type") != MARKER) & pl.col("ladder").is_in(last.implode()))
    return rows.unique(subset="standing", keep="last", maintain_order=True)


def _ladders_after(
    final: pl.DataFrame, books: dict[str, Book], state: BookState, markets: _Markets
) -> Ladders:
    forgotten = markets.numbers(state.books.keys() - books.keys())
    return state.ladders.changed(final, pl.concat([markets.renewed, forgotten]))


def _numbers_after(numbers: dict[str, int], books: dict[str, Book]) -> dict[str, int]:
    if len(numbers) == len(books):  # each book has one
        return numbers
    return {ticker: numbers[ticker] for ticker in books}


def _changed_levels(
    events: pl.DataFrame,
    sized: pl.DataFrame,
    final: pl.DataFrame,
    books: dict[str, Book],
    markets: _Markets,
) -> pl.DataFrame:
    """The changes for `latest_levels`: levels with events, and levels that a snapshot dropped.

    `books`: those of the markets with events.
    """
    based = markets.numbers(ticker for ticker, book in books.items() if book.based).implode()
    columns = ["market_id", "market_ticker", "side", "price", "size", "ts", "recv_ns"]
    touched = final.filter((pl.col("type") != CARRIED) & market_of(pl.col("level")).is_in(based))
    changed = events.select(columns)[touched["row"]]
    if not markets.any_snapshot:  # only a snapshot drops levels
        return changed
    markers = (
        events.filter(pl.col("type") == MARKER)
        .unique(subset="market", keep="last", maintain_order=True)
        .select("market", pl.col("recv_ns").alias("dropped_ns"))
    )
    dropped_levels = (
        sized.filter(pl.col("type") != MARKER)
        .unique(subset="level", keep="last", maintain_order=True)
        .filter(~pl.col("level").is_in(final["level"].implode()))
        .select("level")
        .filter(market_of(pl.col("level")).is_in(based))
    )
    dropped = (
        with_names(dropped_levels, books, markets.numbering)
        .join(markers, on="market", maintain_order="left")
        .select(
            "market_id",
            "market_ticker",
            "side",
            "price",
            pl.lit(0, pl.Int64).alias("size"),
            pl.lit(None, pl.Datetime("us", "UTC")).alias("ts"),
            pl.col("dropped_ns").alias("recv_ns"),
        )
    )
    return pl.concat([changed, dropped])


# -- rows to Arrow -----------------------------------------------------------------------------


def _snapshot_rows(snapshots: pl.DataFrame, unchanged: set[int]) -> pl.DataFrame:
    """One row for each snapshot, so that empty snapshots are recorded, too; with its clock, where it has one."""
    number = pl.col("levels").cast(pl.String)
    clock = pl.concat_str(pl.lit(',"clock":'), pl.col("clock").cast(pl.String)).fill_null("")
    proved = pl.lit("")
    if unchanged:
        is_unchanged = pl.col("n").is_in(list(unchanged))
        proved = pl.when(is_unchanged).then(pl.lit(',"unchanged":true')).otherwise(proved)
    return snapshots.select(
        *["n", "recv_ns", "conn", "sid", "seq"],
        pl.lit("snapshot").alias("kind"),
        "market_ticker",
        pl.concat_str(pl.lit('{"levels":'), number, clock, proved, pl.lit("}")).alias("detail"),
    )


def _event_table(events: pl.DataFrame, shard: int) -> pa.Table:
    kinds = events["type"].replace_strict(
        {LEVEL: "snapshot", DELTA: "delta"}, return_dtype=pl.String
    )
    return pa.Table.from_arrays(
        [
            names(kinds),
            names(events["conn"]),
            events["sid"].to_arrow(),
            events["seq"].to_arrow(),
            names(events["market_id"]),
            names(events["market_ticker"]),
            names(events["side"]),
            prices(events["price"]),
            quantities(events["qty"]),
            quantities(events["size"]),
            events["ts"].to_arrow(),
            times(events["recv_ns"]),
            names(events["client_order_id"]),
            *place(events["n"], shard),
            events["clock"].to_arrow(),
            events["sent_ts"].to_arrow(),
        ],
        schema=ORDERBOOK_EVENTS.arrow,
    )


def _stream_table(stream: pl.DataFrame, shard: int) -> pa.Table:
    return pa.Table.from_arrays(
        [
            times(stream["recv_ns"]),
            names(stream["conn"]),
            stream["sid"].to_arrow(),
            stream["seq"].to_arrow(),
            names(stream["kind"]),
            names(stream["market_ticker"]),
            text(stream["detail"]),
            *place(stream["n"], shard),
        ],
        schema=STREAM_EVENTS.arrow,
    )


def _latest_table(levels: pl.DataFrame, before: BookState) -> pa.Table:
    """Levels for `latest_levels`. `version` is the level's receive time, made monotonic: the book of another
    shard may be newer than this range's beginning and older than its end."""
    version = levels["recv_ns"].clip(lower_bound=before.version).cast(pl.UInt64)
    return pa.Table.from_arrays(
        [
            names(levels["market_id"]),
            names(levels["market_ticker"]),
            names(levels["side"]),
            prices(levels["price"]),
            quantities(levels["size"]),
            levels["ts"].to_arrow(),
            times(levels["recv_ns"]),
            version.to_arrow(),
        ],
        schema=LATEST_LEVELS.arrow,
    )

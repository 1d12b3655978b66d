"""Decoded frames and the books so far to rows for the stores, in columns.

`derive` is a pure function of a journal range and the state at its beginning: cutting a range in
two gives the same event rows and the same state as taking it whole, which is what makes loading
twice harmless. The rules are those of `exchange.book.Book`, the reference that the tests compare
with; here the size after an event is a running sum within (book, snapshot, side, price).
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import msgspec
import polars as pl
import pyarrow as pa

from kalshi_platform.exchange.numbers import ONE_DOLLAR, contracts, dollars
from kalshi_platform.loading import decode_trades
from kalshi_platform.loading.columns import codes, names, prices, quantities, text, times
from kalshi_platform.loading.decode import STREAM, Decoded
from kalshi_platform.storage.schema import LATEST_LEVELS, ORDERBOOK_EVENTS, STREAM_EVENTS, TRADES

LEVELS = pl.Schema(
    {
        "conn": pl.String,
        "market_ticker": pl.String,
        "market_id": pl.String,
        "side": pl.String,
        "price": pl.Int64,
        "size": pl.Int64,
    }
)
LEVEL_KEY = ["market_ticker", "side", "price"]
MARKER, LEVEL, DELTA = 0, 1, 2
CARRY = -1
_PRICES = 1 << 14
"""More than ONE_DOLLAR: prices as digits of a composite key."""


class Book(msgspec.Struct, frozen=True):
    """What is known of one market's newest book, besides its levels."""

    conn: str
    sid: int
    market_id: str
    based: bool
    """It began with a snapshot. A book without one holds only the changes that came since."""
    verified: bool
    """Based, without a gap since, and its connection is open."""
    left: bool = False
    """No longer followed; what still comes is in flight."""


class Connection(msgspec.Struct, frozen=True):
    """An open connection."""

    use_yes_price: bool
    last_recv_ns: int
    seqs: dict[int, int]
    """The last number of each sid."""


@dataclass(frozen=True)
class State:
    """Everything that the rows of the next range depend on."""

    n: int = 0
    """The next journal record."""
    version: int = 0
    """Newest receive time so far, in ns; it never steps back, even where the clock did."""
    connections: dict[str, Connection] = field(default_factory=dict)
    books: dict[str, Book] = field(default_factory=dict)
    """By market ticker."""
    levels: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=LEVELS))
    """Levels of the books, sizes other than 0."""


@dataclass(frozen=True)
class Distrust:
    """A book found to be wrong; capture asks for its snapshot."""

    market_ticker: str
    cause: str
    detail: dict[str, object]


@dataclass(frozen=True)
class Rows:
    """What a journal range comes to, in the stores' own columns."""

    first_n: int
    end_n: int
    tables: dict[str, pa.Table]
    """By dataset, in the order of writing: orderbook_events, trades, stream_events, latest_levels. Where
    a range's stream_events are, its events and trades are, too."""
    distrusted: tuple[Distrust, ...] = ()

    def of(self, datasets: Container[str]) -> Rows:
        """The same, of these datasets only."""
        kept = {name: table for name, table in self.tables.items() if name in datasets}
        return replace(self, tables=kept)


def derive(decoded: Decoded, state: State) -> tuple[Rows, State]:
    """Rows of one journal range, and the state after it.

    Raises ValueError where the range does not begin where the state ends.
    """
    if decoded.first_n != state.n:
        raise ValueError(
            f"the range begins at record {decoded.first_n}, the state ends at {state.n}"
        )
    events = _events(decoded, state)
    renewed = _renewed(events, state)
    sized = _with_sizes(events, state, renewed)
    status = _Status(state)
    extra = pl.DataFrame(
        list(status.follow(_happenings(decoded, sized), _last_heard(decoded))),
        schema=STREAM,
        orient="row",
    )
    stream = pl.concat([_snapshot_rows(decoded.snapshots), decoded.stream, extra]).sort(
        "n", maintain_order=True
    )
    final = _final_levels(sized, status.books)
    version = max(state.version, decoded.newest_recv_ns)
    rows = Rows(
        decoded.first_n,
        decoded.end_n,
        {
            ORDERBOOK_EVENTS.name: _event_table(sized.filter(pl.col("type") >= LEVEL)),
            TRADES.name: decode_trades.table(decoded.trades),
            STREAM_EVENTS.name: _stream_table(stream),
            LATEST_LEVELS.name: _latest_table(_changed_levels(sized, final, status.books), state),
        },
        tuple(status.distrusted),
    )
    connections = _connections_after(status.connections, decoded)
    return rows, State(
        decoded.end_n,
        version,
        connections,
        status.books,
        _levels_after(final, renewed, status.books, state),
    )


# -- events ------------------------------------------------------------------------------------


def _events(decoded: Decoded, state: State) -> pl.DataFrame:
    """Snapshot markers, their levels and the deltas in the journal's order, on one price scale."""
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
    events = pl.concat(
        [
            decoded.snapshots.select(
                *common, *no_level, *no_time, pl.lit(MARKER, pl.Int8).alias("type")
            ),
            decoded.levels.select(
                *common, "side", "price", "qty", *no_time, pl.lit(LEVEL, pl.Int8).alias("type")
            ),
            decoded.deltas.select(
                *common,
                "side",
                "price",
                "qty",
                "ts",
                "client_order_id",
                pl.lit(DELTA, pl.Int8).alias("type"),
            ),
        ]
    ).sort("n", maintain_order=True)
    yes_priced = _yes_priced(decoded, state)
    if yes_priced:
        on_yes_scale = pl.col("conn").is_in(yes_priced) & (pl.col("side") == "no")
        events = events.with_columns(
            pl.when(on_yes_scale)
            .then(ONE_DOLLAR - pl.col("price"))
            .otherwise(pl.col("price"))
            .alias("price")
        )
    return events


def _yes_priced(decoded: Decoded, state: State) -> list[str]:
    """Connections whose no bids are quoted at 1 - p."""
    opened = {conn: flag for _, conn, flag in _opened(decoded.stream)}
    known = {conn: c.use_yes_price for conn, c in state.connections.items()} | opened
    strangers = set(decoded.deltas["conn"].unique()) | set(decoded.snapshots["conn"].unique())
    for conn in strangers - known.keys():
        raise ValueError(
            f"connection {conn} has frames from record {decoded.first_n} on, and no beginning"
        )
    return [conn for conn, flag in known.items() if flag]


def _opened(stream: pl.DataFrame) -> Iterator[tuple[int, str, bool]]:
    for n, conn, detail in (
        stream.filter(pl.col("kind") == "connected").select("n", "conn", "detail").iter_rows()
    ):
        yield n, conn, bool(msgspec.json.decode(detail)["use_yes_price"])


def _renewed(events: pl.DataFrame, state: State) -> pl.Series:
    """The markets whose books begin anew in this range: by a snapshot, or on another connection."""
    known = pl.DataFrame(
        [(ticker, book.conn) for ticker, book in state.books.items()],
        schema={"market_ticker": pl.String, "known_conn": pl.String},
        orient="row",
    )
    return (
        events.group_by("market_ticker", "conn")
        .agg((pl.col("type") == MARKER).any().alias("snapshot"))
        .join(known, on="market_ticker", how="left")
        .filter(pl.col("snapshot") | pl.col("conn").ne_missing(pl.col("known_conn")))
        .get_column("market_ticker")
        .unique()
    )


def _with_sizes(events: pl.DataFrame, state: State, renewed: pl.Series) -> pl.DataFrame:
    """Add `epoch` (snapshots of the book so far) and `size` (the level's size after the event).

    In front, as rows of type CARRY, go the levels that were there before: those that an event
    touches, and of a renewed book all, so that it is seen which ones are gone.
    """
    begins_anew = pl.col("market_ticker").is_in(renewed.implode())
    touched = events.select(LEVEL_KEY).unique()
    steady = state.levels.filter(~begins_anew).join(touched, on=LEVEL_KEY, how="semi")
    carry = pl.concat([state.levels.filter(begins_anew), steady]).select(
        pl.lit(0, pl.UInt64).alias("n"),
        pl.lit(0, pl.Int64).alias("recv_ns"),
        "conn",
        pl.lit(0, pl.UInt32).alias("sid"),
        pl.lit(0, pl.UInt64).alias("seq"),
        "market_id",
        "market_ticker",
        "side",
        "price",
        pl.col("size").alias("qty"),
        pl.lit(None, pl.Datetime("us", "UTC")).alias("ts"),
        pl.lit("").alias("client_order_id"),
        pl.lit(CARRY, pl.Int8).alias("type"),
    )
    both = pl.concat([carry, events])
    both = both.with_columns(_books(both))
    both = both.with_columns(
        (pl.col("type") == MARKER).cast(pl.Int64).cum_sum().over("book").alias("epoch")
    )
    epochs = 1 + both.height  # more than any book's snapshots
    key = (
        (pl.col("book").cast(pl.Int64) * epochs + pl.col("epoch")) * 2
        + (pl.col("side") == "no").cast(pl.Int64)
    ) * _PRICES + pl.col("price")
    both = both.with_columns(key.alias("level"))
    return both.with_columns(pl.col("qty").cum_sum().over("level").alias("size"))


def _books(events: pl.DataFrame) -> pl.Series:
    """A number for each (connection, market): cheaper to group by than their texts."""
    conns = codes(events["conn"])
    return codes(codes(events["market_ticker"]) * conns.len() + conns).alias("book")


# -- which books can be believed ---------------------------------------------------------------

_BREAKS = ("connected", "disconnected", "started", "gap", "left", "unsubscribed")


def _happenings(decoded: Decoded, sized: pl.DataFrame) -> list[dict[str, Any]]:
    """The few events that change what is believed of a book, in order."""
    columns = ["n", "recv_ns", "conn", "sid", "seq", "kind", "market_ticker", "market_id", "detail"]
    nothing = [pl.lit("").alias("market_id")]
    deltas = sized.filter(pl.col("type") == DELTA)
    first = deltas.unique(subset="book", keep="first", maintain_order=True)
    below_zero = deltas.filter(pl.col("size") < 0)
    snapshots = decoded.snapshots.with_columns(
        pl.lit("snapshot").alias("kind"), pl.lit("").alias("detail")
    )
    level = pl.format("{}|{}|{}", "side", "price", "size").alias("detail")
    parts = [
        decoded.stream.filter(pl.col("kind").is_in(_BREAKS)).with_columns(nothing),
        snapshots,
        first.with_columns(pl.lit("delta").alias("kind"), pl.lit("").alias("detail")),
        below_zero.with_columns(pl.lit("below_zero").alias("kind"), level),
    ]
    # Of one frame, "delta" goes before "below_zero": a book is met before it is judged.
    return (
        pl.concat([part.select(columns) for part in parts])
        .sort("n", maintain_order=True)
        .to_dicts()
    )


class _Status:
    """Follows which connections are open and which books are verified."""

    def __init__(self, state: State) -> None:
        self.connections = dict(state.connections)
        self.books = dict(state.books)
        self.distrusted: list[Distrust] = []

    def follow(
        self, happenings: list[dict[str, Any]], last_heard: dict[str, int]
    ) -> Iterator[tuple[Any, ...]]:
        """Take the happenings in order; yields the stream rows that they call for."""
        for it in happenings:
            kind, conn, ticker = it["kind"], it["conn"], it["market_ticker"]
            if kind == "snapshot":
                self.books[ticker] = Book(
                    conn, it["sid"], it["market_id"], based=True, verified=True
                )
            elif kind == "delta":
                yield from self._first_delta(it)
            elif kind == "below_zero":
                yield from self._below_zero(it)
            elif kind == "connected":
                flag = bool(msgspec.json.decode(it["detail"])["use_yes_price"])
                self.connections[conn] = Connection(flag, it["recv_ns"], {})
            elif kind == "disconnected":
                self._close(conn)
            elif kind == "started":
                for open_conn in list(self.connections):
                    yield _killed_row(it, open_conn, self.connections[open_conn], last_heard)
                    self._close(open_conn)
            elif kind == "left":
                book = self.books.get(ticker)
                if book is not None:
                    self.books[ticker] = msgspec.structs.replace(book, verified=False, left=True)
            elif kind == "gap" and ticker:
                self._doubt(ticker)
            elif kind in {"gap", "unsubscribed"}:
                self._doubt(
                    *(t for t, b in self.books.items() if (b.conn, b.sid) == (conn, it["sid"]))
                )

    def _first_delta(self, it: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
        """The first delta of a book in this range: it may be of a book that has no snapshot."""
        known = self.books.get(it["market_ticker"])
        if known is not None and known.conn == it["conn"]:
            return
        self.books[it["market_ticker"]] = Book(
            it["conn"], it["sid"], it["market_id"], based=False, verified=False
        )
        yield self._gap(it, "delta_before_snapshot", {"seq": it["seq"]})

    def _below_zero(self, it: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
        book = self.books.get(it["market_ticker"])
        if book is None or not book.verified or book.conn != it["conn"]:
            return
        side, price, size = it["detail"].split("|")
        detail = {
            "seq": it["seq"],
            "side": side,
            "price": dollars(int(price)),
            "size": contracts(int(size)),
        }
        self.books[it["market_ticker"]] = msgspec.structs.replace(book, verified=False)
        yield self._gap(it, "negative_level", detail)

    def _gap(self, it: dict[str, Any], cause: str, detail: dict[str, object]) -> tuple[Any, ...]:
        self.distrusted.append(Distrust(it["market_ticker"], cause, detail))
        body = msgspec.json.encode({"cause": cause, **detail}).decode()
        return (it["n"], it["recv_ns"], it["conn"], it["sid"], 0, "gap", it["market_ticker"], body)

    def _close(self, conn: str) -> None:
        self.connections.pop(conn, None)
        self._doubt(*(ticker for ticker, book in self.books.items() if book.conn == conn))
        self.books = {t: b for t, b in self.books.items() if not (b.left and b.conn == conn)}

    def _doubt(self, *tickers: str) -> None:
        for ticker in tickers:
            book = self.books.get(ticker)
            if book is not None and book.verified:
                self.books[ticker] = msgspec.structs.replace(book, verified=False)


def _killed_row(
    started: dict[str, Any], conn: str, connection: Connection, last_heard: dict[str, int]
) -> tuple[Any, ...]:
    """The end of a connection that nobody lived to write down."""
    last_ns = max(connection.last_recv_ns, last_heard.get(conn, 0))
    detail = {
        "cause": "the recorder ended without closing",
        "last_frame": datetime.fromtimestamp(last_ns // 1_000_000_000, UTC).isoformat(),
        "span_s": round((started["recv_ns"] - last_ns) / 1e9, 6),
    }
    body = msgspec.json.encode(detail).decode()
    return (started["n"], started["recv_ns"], conn, 0, 0, "disconnected", "", body)


def _last_heard(decoded: Decoded) -> dict[str, int]:
    return {conn: newest for conn, _, _, newest in _heard(decoded)}


def _heard(decoded: Decoded) -> list[tuple[str, int, int, int]]:
    """(connection, sid, last number, last receive time) of the frames of this range."""
    columns = ["n", "conn", "sid", "seq", "recv_ns"]
    frames = (decoded.deltas, decoded.snapshots, decoded.trades, decoded.stream)
    parts = [frame.select(columns) for frame in frames]
    return list(
        pl.concat(parts)
        .sort("n", maintain_order=True)
        .group_by("conn", "sid", maintain_order=True)
        .agg(pl.col("seq").max(), pl.col("recv_ns").last())  # notes have no number
        .iter_rows()
    )


def _connections_after(
    connections: dict[str, Connection], decoded: Decoded
) -> dict[str, Connection]:
    after = dict(connections)
    for conn, sid, seq, recv_ns in _heard(decoded):
        known = after.get(conn)
        if known is not None:
            seqs = known.seqs | {sid: seq} if seq else known.seqs
            after[conn] = Connection(known.use_yes_price, max(known.last_recv_ns, recv_ns), seqs)
    return after


# -- levels after ------------------------------------------------------------------------------


def _final_levels(sized: pl.DataFrame, books: dict[str, Book]) -> pl.DataFrame:
    """The last row of every level of the touched markets' newest books, size 0 included."""
    newest = pl.DataFrame(
        [(ticker, book.conn) for ticker, book in books.items()],
        schema={"market_ticker": pl.String, "conn": pl.String},
        orient="row",
    )
    last = (
        sized.group_by("book")
        .agg(pl.col("market_ticker", "conn").first(), pl.col("epoch").max())
        .join(newest, on=["market_ticker", "conn"], how="semi")
        .select("book", "epoch")
    )
    return (
        sized.filter(pl.col("type") != MARKER)
        .unique(subset="level", keep="last", maintain_order=True)
        .join(last, on=["book", "epoch"], how="semi", maintain_order="left")
    )


def _levels_after(
    final: pl.DataFrame, renewed: pl.Series, books: dict[str, Book], state: State
) -> pl.DataFrame:
    untouched = state.levels.filter(~pl.col("market_ticker").is_in(renewed.implode())).join(
        final, on=LEVEL_KEY, how="anti"
    )
    gone = state.books.keys() - books.keys()
    if gone:
        untouched = untouched.filter(~pl.col("market_ticker").is_in(gone))
    return pl.concat([untouched, final.filter(pl.col("size") != 0).select(LEVELS.names())])


def _changed_levels(
    sized: pl.DataFrame, final: pl.DataFrame, books: dict[str, Book]
) -> pl.DataFrame:
    """What `latest_levels` must learn: levels that events touched, and those that a snapshot dropped."""
    based = [ticker for ticker, book in books.items() if book.based]
    columns = ["market_id", "market_ticker", "side", "price", "size", "ts", "recv_ns"]
    changed = final.filter(pl.col("type") != CARRY)
    changed = changed.select(columns).filter(pl.col("market_ticker").is_in(based))
    markers = (
        sized.filter(pl.col("type") == MARKER)
        .unique(subset="market_ticker", keep="last", maintain_order=True)
        .select("market_ticker", pl.col("recv_ns").alias("dropped_ns"))
    )
    if markers.is_empty():  # nothing but a snapshot drops a level
        return changed
    dropped = (
        sized.filter(pl.col("type") != MARKER)
        .unique(subset=LEVEL_KEY, keep="last", maintain_order=True)
        .join(final, on=LEVEL_KEY, how="anti", maintain_order="left")
        .join(markers, on="market_ticker", maintain_order="left")
        .with_columns(
            pl.lit(0, pl.Int64).alias("size"),
            pl.lit(None, pl.Datetime("us", "UTC")).alias("ts"),
            pl.col("dropped_ns").alias("recv_ns"),
        )
    )
    dropped = dropped.select(columns).filter(pl.col("market_ticker").is_in(based))
    return pl.concat([changed, dropped])


# -- rows to Arrow -----------------------------------------------------------------------------


def _snapshot_rows(snapshots: pl.DataFrame) -> pl.DataFrame:
    """One row for each snapshot, so that an empty one leaves a trace too."""
    return snapshots.select(
        *["n", "recv_ns", "conn", "sid", "seq"],
        pl.lit("snapshot").alias("kind"),
        "market_ticker",
        pl.concat_str(pl.lit('{"levels":'), pl.col("levels").cast(pl.String), pl.lit("}")).alias(
            "detail"
        ),
    )


def _event_table(events: pl.DataFrame) -> pa.Table:
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
        ],
        schema=ORDERBOOK_EVENTS.arrow,
    )


def _stream_table(stream: pl.DataFrame) -> pa.Table:
    return pa.Table.from_arrays(
        [
            times(stream["recv_ns"]),
            names(stream["conn"]),
            stream["sid"].to_arrow(),
            stream["seq"].to_arrow(),
            names(stream["kind"]),
            names(stream["market_ticker"]),
            text(stream["detail"]),
        ],
        schema=STREAM_EVENTS.arrow,
    )


def _latest_table(levels: pl.DataFrame, before: State) -> pa.Table:
    """`version` is each level's own time: the book of another shard may be newer than this range's
    beginning, and older than its end. It does not step back where the clock did."""
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

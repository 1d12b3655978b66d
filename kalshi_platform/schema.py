"""The schema that ClickHouse's tables, the Parquet files and the rows in memory share.

The migrations in `infra/clickhouse_migrations` define the same columns in SQL; a test compares both. Prices
are Decimal(9, 4) dollars, sizes Decimal(18, 2) contracts, times microseconds in UTC, so nothing is rounded.
UUIDs are strings in Arrow and Parquet, UUID in ClickHouse.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

PRICE = pa.decimal128(9, 4)
QTY = pa.decimal128(18, 2)
MID = pa.decimal128(9, 5)
"""A mid price: halfway between two prices, so one decimal more."""
NOTIONAL = pa.decimal128(18, 6)
"""Price times size, exactly."""
TIME = pa.timestamp("us", "UTC")
NAME = pa.dictionary(pa.int32(), pa.string())
"""Strings with few distinct values: dictionary-encoded in memory and in Parquet."""

CONNECTION_ENDS = ("disconnected", "unheard")
"""The kinds of stream_events after which every book of a connection is stale."""
STALE_EVENTS = ("gap", "unsubscribed", "left", *CONNECTION_ENDS)
"""The kinds of stream_events that make books stale, for analytics and coverage."""
UNCHANGED = '"unchanged":true'
"""What the detail of a `snapshot` row says whose clock proves that its market missed nothing while it was stale. A
`resynced` row of one market says the same of the rest of an hour before that of the snapshot."""

ZERO_UUID = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True)
class Column:
    """A column, with its Arrow and its ClickHouse type."""

    name: str
    arrow: pa.DataType
    clickhouse: str
    description: str
    nullable: bool = False


@dataclass(frozen=True)
class Key:
    """The columns that identify a table's row among those of every other insert."""

    clock: str
    """The column by whose day the table is partitioned."""
    columns: tuple[str, ...]
    """Text, integers, UUIDs or decimals; null where the table's column is null."""


@dataclass(frozen=True)
class Dataset:
    """A table in ClickHouse and, where `archived`, a folder of hourly Parquet partitions."""

    name: str
    columns: tuple[Column, ...]
    description: str
    time: str
    """The column that a row's hour, its day's partition and its age are taken from."""
    public: bool
    """Whether `export --public` publishes it, after own orders have been cleared."""
    archived: bool = True
    """In the archive, and for HOT_RETENTION_DAYS in ClickHouse; otherwise in ClickHouse alone, for good."""
    hot: bool = True
    """In ClickHouse; otherwise in the archive alone."""

    @property
    def arrow(self) -> pa.Schema:
        """The Arrow schema, columns in order."""
        return pa.schema([pa.field(c.name, c.arrow, c.nullable) for c in self.columns])


@dataclass(frozen=True, kw_only=True)
class Recorded(Dataset):
    """A dataset that the streamer records: it is sealed, compacted, restored, rebuilt and compared."""

    sort: tuple[str, ...]
    """What a compacted hour is sorted by. Nulls come first: rows without a record go by receive time."""
    identity: tuple[str, ...]
    """The columns that, with `time`, distinguish a row from those of every other insert."""

    @property
    def key(self) -> Key:
        """What a verified insert finds its rows by."""
        return Key(self.time, self.identity)


_UUID = (NAME, "UUID")
_TEXT = (NAME, "LowCardinality(String)")

_TYPE = Column(
    "type",
    NAME,
    "Enum8('snapshot' = 1, 'delta' = 2)",
    "snapshot: a level of a snapshot; delta: a change",
)
_CONN = Column("conn_id", *_UUID, "the connection; sid and seq restart with it")
_SID = Column("sid", pa.uint32(), "UInt32", "subscription on the connection: one per channel")
_SEQ = Column("seq", pa.uint64(), "UInt64", "position on the sid, from 1, shared by its markets")
_MARKET_ID = Column("market_id", *_UUID, "the market's UUID; zero where the exchange sent none")
_TICKER = Column("market_ticker", *_TEXT, "the market's ticker")
_SIDE = Column("side", NAME, "Enum8('yes' = 1, 'no' = 2)", "the bid ladder: yes bids or no bids")
_PRICE = Column("price", PRICE, "Decimal(9, 4)", "bid price in dollars, on the side's own scale")
_TS = Column(
    "ts", TIME, "Nullable(DateTime64(6, 'UTC'))", "exchange time; null where none was sent", True
)
_INGEST = Column(
    "ingest_ts", TIME, "DateTime64(6, 'UTC')", "receive time, from this machine's clock"
)

_SHARD = Column(
    "shard", pa.uint32(), "Nullable(UInt32)", "the shard whose recorder received it", True
)
_RECORD = Column(
    "record",
    pa.uint64(),
    "Nullable(UInt64)",
    "the shard's journal record that the row was built from: the order of receipt.",
    True,
)
_PLACE = (_SHARD, _RECORD)
PLACE = tuple(column.name for column in _PLACE)
"""The origin of a row; null in rows of versions that did not keep it."""
_SENT_TS = Column(
    "sent_ts",
    pa.timestamp("ms", "UTC"),
    "Nullable(DateTime64(3, 'UTC'))",
    "when the exchange queued the frame for sending; null where it did not say",
    True,
)
_SENT = (
    Column(
        "clock",
        pa.uint64(),
        "Nullable(UInt64)",
        "the exchange's clock of the market, the same on every connection; null where none was sent",
        True,
    ),
    _SENT_TS,
)
LATER = (PLACE, tuple(column.name for column in _SENT))
"""Columns that recorded datasets gained later, in groups, oldest first: null in rows of earlier versions."""
_FRAME = ("ingest_ts", "conn_id", "sid", "seq")

ORDERBOOK_EVENTS = Recorded(
    "orderbook_events",
    (
        _TYPE,
        _CONN,
        _SID,
        _SEQ,
        _MARKET_ID,
        _TICKER,
        _SIDE,
        _PRICE,
        Column(
            "qty",
            QTY,
            "Decimal(18, 2)",
            "snapshot: the level's size; delta: the signed change, in contracts",
        ),
        Column("size", QTY, "Decimal(18, 2)", "the level's size after this event, in contracts"),
        _TS,
        _INGEST,
        Column("client_order_id", NAME, "String", "own orders only, else empty"),
        *_PLACE,
        *_SENT,
    ),
    "Every order-book event: one row per level of a snapshot, one per delta.",
    time=_INGEST.name,
    public=True,
    sort=("market_ticker", *PLACE, *_FRAME, "side", "price"),
    identity=("record", "conn_id", "side", "price"),
)

STREAM_EVENTS = Recorded(
    "stream_events",
    (
        _INGEST,
        Column("conn_id", *_UUID, "the connection; zero where there was none"),
        Column("sid", pa.uint32(), "UInt32", "subscription, 0 where none"),
        Column("seq", pa.uint64(), "UInt64", "position on the sid, 0 where none was consumed"),
        Column("kind", *_TEXT, "what came or happened: connected, ok, snapshot, gap, …"),
        Column("market_ticker", *_TEXT, "the market, where there is one"),
        Column("detail", pa.string(), "String", "JSON; the raw frame for malformed and unknown"),
        *_PLACE,
    ),
    "Every other message of the exchange, and every event of the recording itself.",
    time=_INGEST.name,
    public=True,
    # else as in the journal: an end comes after what it ends
    sort=(*PLACE, "ingest_ts"),
    identity=("record", "conn_id", "kind", "market_ticker"),
)

BOOK_CHECKPOINTS = Recorded(
    "book_checkpoints",
    (
        Column(
            "ts",
            TIME,
            "DateTime64(6, 'UTC')",
            "the hour's first instant; where the receive clock was set back, the time it then showed",
        ),
        _CONN,
        _SID,
        Column("seq", pa.uint64(), "UInt64", "the last number of the sid before the instant"),
        _MARKET_ID,
        _TICKER,
        Column("verified", pa.bool_(), "Bool", "no gap since the book's snapshot"),
        Column(
            "side", NAME, "Nullable(Enum8('yes' = 1, 'no' = 2))", "null: the book is empty", True
        ),
        Column("price", PRICE, "Nullable(Decimal(9, 4))", "dollars; null: the book is empty", True),
        Column("size", QTY, "Nullable(Decimal(18, 2))", "contracts; null: the book is empty", True),
        _SHARD,
        Column(
            "record",
            pa.uint64(),
            "Nullable(UInt64)",
            "the shard's first journal record after the instant: the book holds all records before it",
            True,
        ),
    ),
    "Every followed book at the start of an hour: one row per level, at least one per market.",
    time="ts",
    public=True,
    sort=("market_ticker", *PLACE, "side", "price"),
    identity=("record", "conn_id", "market_ticker", "side", "price"),
)

_TRADE_PRICE = (PRICE, "Decimal(9, 4)")
TRADES = Recorded(
    "trades",
    (
        _CONN,
        _SID,
        Column(
            "seq", pa.uint64(), "UInt64", "position on the sid; 0: fetched after a gap, by REST"
        ),
        Column(
            "trade_id",
            pa.string(),
            "String",
            "the exchange's name for the trade; empty if it sent none",
        ),
        _TICKER,
        Column("yes_price", *_TRADE_PRICE, "dollars for a YES contract"),
        Column("no_price", *_TRADE_PRICE, "dollars for a NO contract: 1 - yes_price"),
        Column("qty", QTY, "Decimal(18, 2)", "contracts"),
        Column(
            "taker_outcome_side",
            NAME,
            "Enum8('yes' = 1, 'no' = 2)",
            "the outcome that the taker bought",
        ),
        Column(
            "taker_book_side",
            NAME,
            "Enum8('bid' = 1, 'ask' = 2)",
            "the taker's side of the YES book: bid bought YES, ask bought NO",
        ),
        Column("is_block_trade", pa.bool_(), "Bool", "agreed away from the book"),
        Column("ts", pa.timestamp("ms", "UTC"), "DateTime64(3, 'UTC')", "exchange time"),
        _INGEST,
        *_PLACE,
        _SENT_TS,
    ),
    "Every public trade of the followed markets.",
    time=_INGEST.name,
    public=True,
    sort=("market_ticker", *PLACE, *_FRAME),
    identity=("record", "conn_id", "trade_id"),
)

FRAMES = Recorded(
    "frames",
    (
        Column(
            "recv_ts",
            pa.timestamp("ns", "UTC"),
            "DateTime64(9, 'UTC')",
            "receive time to the nanosecond, from this machine's clock",
        ),
        Column("shard", pa.uint32(), "UInt32", "the shard whose recorder received it"),
        Column("replica", pa.uint32(), "UInt32", "which of the shard's recorders: 0"),
        Column("record", pa.uint64(), "UInt64", "the number of the journal record"),
        Column("conn_id", *_UUID, "the connection; zero where there was none"),
        Column("sid", pa.uint32(), "UInt32", "subscription, 0 where the frame names none"),
        Column("seq", pa.uint64(), "UInt64", "position on the sid, 0 where the frame has none"),
        Column(
            "type",
            *_TEXT,
            "delta, snapshot, trade; control: any other frame; note: of the recorder; malformed: no JSON",
        ),
        Column("frame", pa.binary(), "String", "the bytes as received; of a note its JSON"),
    ),
    "Every journal record, byte for byte: what the hour can be rebuilt from. In the archive alone.",
    time="recv_ts",
    public=True,
    hot=False,
    sort=("shard", "replica", "record"),
    identity=("shard", "replica", "record"),
)

_RANGE = pa.struct([pa.field(name, PRICE, False) for name in ("start", "end", "step")])
_MAYBE_TIME = (TIME, "Nullable(DateTime64(6, 'UTC'))")
MARKET_CATALOG = Dataset(
    "market_catalog",
    (
        _TICKER,
        Column("event_ticker", *_TEXT, "the market's event"),
        Column("series_ticker", *_TEXT, "the event's series: event_ticker up to its first hyphen"),
        Column("title", pa.string(), "String", "the question"),
        Column("yes_sub_title", pa.string(), "String", "what YES stands for"),
        Column("market_type", *_TEXT, "binary or scalar"),
        Column("status", *_TEXT, "initialized, inactive, active, closed, determined, finalized, …"),
        Column("result", *_TEXT, "yes, no, scalar, or empty while it is open"),
        Column("open_time", *_MAYBE_TIME, "when trading begins", True),
        Column("close_time", *_MAYBE_TIME, "when trading ends; may still be moved", True),
        Column("latest_expiration_time", *_MAYBE_TIME, "when it is settled at the latest", True),
        Column("settlement_ts", *_MAYBE_TIME, "when it was settled", True),
        Column(
            "settlement_value",
            PRICE,
            "Nullable(Decimal(9, 4))",
            "what a YES contract paid, dollars",
            True,
        ),
        Column("price_level_structure", *_TEXT, "the price grid's name, an opaque label"),
        Column(
            "price_ranges",
            pa.list_(pa.field("item", _RANGE, False)),
            "Array(Tuple(start Decimal(9, 4), end Decimal(9, 4), step Decimal(9, 4)))",
            "the price grid: from start to end dollars in steps of step",
        ),
        Column(
            "last_price", PRICE, "Nullable(Decimal(9, 4))", "of the last trade, YES dollars", True
        ),
        Column("volume", QTY, "Nullable(Decimal(18, 2))", "contracts traded so far", True),
        Column("open_interest", QTY, "Nullable(Decimal(18, 2))", "contracts outstanding", True),
        Column("as_of", TIME, "DateTime64(6, 'UTC')", "when this was read from the exchange"),
    ),
    "The followed markets: titles, price grids, opening and closing times, results.",
    time="as_of",
    public=False,
    archived=False,
)

LATEST_LEVELS = Dataset(
    "latest_levels",
    (
        _MARKET_ID,
        _TICKER,
        _SIDE,
        _PRICE,
        Column("size", QTY, "Decimal(18, 2)", "contracts; 0: the level is gone"),
        _TS,
        _INGEST,
        Column(
            "version", pa.uint64(), "UInt64", "which row of a level is the newest; never steps back"
        ),
    ),
    "The book now: `FINAL WHERE size > 0`.",
    time=_INGEST.name,
    public=False,
    archived=False,
)

_SECOND = Column(
    "second", TIME, "DateTime64(6, 'UTC')", "the second's first instant, of receive time"
)
_KNOWN_AT = Column(
    "known_at",
    TIME,
    "DateTime64(6, 'UTC')",
    "the first instant, of receive time, at which the row may be used: it is complete by then",
    True,
)
_MAYBE_PRICE = (PRICE, "Nullable(Decimal(9, 4))")
_MAYBE_QTY = (QTY, "Nullable(Decimal(18, 2))")
_MAYBE_RATIO = (pa.float64(), "Nullable(Float64)")

SPREADS = Dataset(
    "spreads",
    (
        _TICKER,
        Column(
            "ts",
            TIME,
            "Nullable(DateTime64(6, 'UTC'))",
            "exchange time; null where none was sent. Rows that share it are of one matching event",
            True,
        ),
        _INGEST,
        _CONN,
        _SID,
        Column(
            "seq", pa.uint64(), "UInt64", "the frame that caused the change; 0 for a stale book"
        ),
        Column(
            "cause",
            NAME,
            "Enum8('checkpoint' = 1, 'snapshot' = 2, 'delta' = 3, 'doubt' = 4)",  # words: ok
            "checkpoint: the hour's opening state; doubt: the book is stale from here on",  # words: ok
        ),
        Column("verified", pa.bool_(), "Bool", "no gap since the book's snapshot"),
        Column("yes_bid", *_MAYBE_PRICE, "best YES bid, dollars; null: no bids", True),
        Column("yes_bid_size", *_MAYBE_QTY, "contracts at the best YES bid", True),
        Column("yes_ask", *_MAYBE_PRICE, "1 - best NO bid, dollars; null: no asks", True),
        Column("yes_ask_size", *_MAYBE_QTY, "contracts at the best YES ask", True),
        Column("spread", *_MAYBE_PRICE, "yes_ask - yes_bid, dollars", True),
        Column("mid", MID, "Nullable(Decimal(9, 5))", "(yes_bid + yes_ask) / 2, dollars", True),
        Column(
            "microprice",
            *_MAYBE_RATIO,
            "mid weighted by the size of the other side (Gatheral and Oomen 2010), dollars",
            True,
        ),
        _KNOWN_AT,
        _SHARD,
        Column(
            "record",
            pa.uint64(),
            "Nullable(UInt64)",
            "the shard's journal record of the frame, or that made the book stale; a checkpoint's first",
            True,
        ),
    ),
    "Every change of a market's best prices or their sizes, with the frame that caused it.",
    time=_INGEST.name,
    public=True,
)


def _depth_of(side: str, best: str) -> tuple[Column, ...]:
    size = (QTY, "Decimal(18, 2)")
    far = "and above" if side == "bid" else "and below"
    sign = "-" if side == "bid" else "+"
    return (
        Column(best, *_MAYBE_PRICE, f"best YES {side}, dollars; null: none", True),
        Column(f"{side}_size", *size, f"contracts at {best}"),
        *(
            Column(f"{side}_size_{c}c", *size, f"contracts at {best} {sign} {c} cents {far}")
            for c in (1, 2, 5, 10)
        ),
        Column(f"{side}_size_all", *size, f"contracts on the whole {side} side"),
        Column(f"{side}_levels", pa.uint32(), "UInt32", f"price levels on the {side} side"),
        Column(
            f"{side}_notional",
            NOTIONAL,
            "Decimal(18, 6)",
            "sum of contracts times YES price over the side, dollars",
        ),
    )


DEPTH = Dataset(
    "depth",
    (
        _TICKER,
        _SECOND,
        Column(
            "verified", pa.bool_(), "Bool", "no gap since the book's snapshot, at the second's end"
        ),
        *_depth_of("bid", "yes_bid"),
        *_depth_of("ask", "yes_ask"),
        _KNOWN_AT,
    ),
    "The resting sizes on both sides of a market, at the end of every second in which they changed.",
    time=_SECOND.name,
    public=True,
)

IMBALANCE = Dataset(
    "imbalance",
    (
        _TICKER,
        _SECOND,
        Column("verified", pa.bool_(), "Bool", "the book was synced during the whole second"),
        Column(
            "imbalance_best",
            *_MAYBE_RATIO,
            "(bid - ask) / (bid + ask) of the sizes at the best, -1 to 1",
            True,
        ),
        Column("imbalance_5_levels", *_MAYBE_RATIO, "the same over the 5 best levels", True),
        Column("imbalance_5c", *_MAYBE_RATIO, "the same within 5 cents of the best", True),
        Column(
            "ofi",
            QTY,
            "Decimal(18, 2)",
            "order-flow imbalance of the second (Cont, Kukanov and Stoikov 2014), contracts",
        ),
        _KNOWN_AT,
    ),
    "Size imbalance and order flow, for every second in which either of them changed.",
    time=_SECOND.name,
    public=True,
)

RECORDED = (ORDERBOOK_EVENTS, STREAM_EVENTS, BOOK_CHECKPOINTS, TRADES, FRAMES)
"""What the streamer writes, hour by hour."""
BUILT = tuple(dataset for dataset in RECORDED if dataset.hot)
"""What is built from frames and is in both stores, which are compared."""

ANALYTICS = (SPREADS, DEPTH, IMBALANCE)
"""The datasets that are computed from an hour of the recording."""

DATASETS = {
    d.name: d
    for d in (
        *RECORDED,
        LATEST_LEVELS,
        *ANALYTICS,
        MARKET_CATALOG,
    )
}

TABLES = tuple(name for name, dataset in DATASETS.items() if dataset.hot)
"""The datasets that have a table in ClickHouse."""

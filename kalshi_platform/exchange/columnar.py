"""Decoding: journal ranges to columns, statelessly. Building rows from them belongs in `loading`.

The fast path decodes all deltas of a range with one call of Arrow's JSON reader and all snapshots with one
call of Polars'. It accepts only the current wire form. Every other frame (legacy forms, unusual decimals,
garbage) takes the slow path, frame by frame, with the decoders of `frames` and `book`; what that cannot
read becomes a `malformed` row with the raw frame. Both paths give the same rows for the same frames. The
messages of `BookError` and `ValueError` are stored in `malformed` rows, so changing one changes recorded rows.
Prices are 1e-4 dollars and sizes 1e-2 contracts, in 64-bit integers, as the wire quoted them.
"""

from __future__ import annotations

import base64
import io
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from kalshi_platform.exchange import columnar_trades, optional_fields
from kalshi_platform.exchange.book import (
    SIDES,
    BookError,
    check_price,
    delta_change,
    snapshot_extents,
    snapshot_ladder,
)
from kalshi_platform.exchange.drift import EXPECTED, KNOWN_TYPES, Drift
from kalshi_platform.exchange.frames import (
    SNAPSHOT_BYTES,
    DecodeError,
    Head,
    Reply,
    decode_delta,
    decode_head,
    decode_reply,
    decode_snapshot,
    market_of,
    sending_ts_ms,
)
from kalshi_platform.exchange.numbers import MOST_QTY, ONE_DOLLAR
from kalshi_platform.exchange.optional_fields import LAST_MS, OptionalFields
from kalshi_platform.journal.clock import ReceiveClock
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.reader import JournalRange, LostRange, RecordRange, UnreadRange
from kalshi_platform.schema import ZERO_UUID


def _schema(*parts: Mapping[str, pl.DataType | type[pl.DataType]]) -> pl.Schema:
    return pl.Schema({name: dtype for part in parts for name, dtype in part.items()})


_FRAME: Mapping[str, type[pl.DataType]] = {
    "n": pl.UInt64,
    "recv_ns": pl.Int64,
    "conn": pl.String,
    "sid": pl.UInt32,
    "seq": pl.UInt64,
}
_MARKET: Mapping[str, type[pl.DataType]] = {"market_id": pl.String, "market_ticker": pl.String}
_SENT: Mapping[str, pl.DataType] = {"clock": pl.UInt64(), "sent_ts": pl.Datetime("ms", "UTC")}
"""The exchange's clock of the market, and when it sent the frame; null where the frame has none."""
DELTAS = _schema(
    _FRAME,
    _MARKET,
    {
        "side": pl.String,
        "price": pl.Int64,
        "qty": pl.Int64,
        "ts": pl.Datetime("us", "UTC"),
        "client_order_id": pl.String,
    },
    _SENT,
)
LEVELS = _schema(_FRAME, _MARKET, {"side": pl.String, "price": pl.Int64, "qty": pl.Int64}, _SENT)
SNAPSHOTS = _schema(_FRAME, _MARKET, _SENT, {"levels": pl.UInt32})
STREAM = _schema(_FRAME, {"kind": pl.String, "market_ticker": pl.String, "detail": pl.String})

_WIRE_DELTA = pa.schema(
    [
        pa.field("sid", pa.uint32()),
        pa.field("seq", pa.uint64()),
        pa.field(
            "msg",
            pa.struct(
                [
                    pa.field("market_ticker", pa.string()),
                    pa.field("market_id", pa.string()),
                    pa.field("side", pa.string()),
                    pa.field("price_dollars", pa.string()),
                    pa.field("delta_fp", pa.string()),
                    pa.field("price", pa.int64()),
                    pa.field("delta", pa.int64()),
                    pa.field("ts", pa.string()),
                    pa.field("ts_ms", pa.int64()),
                    pa.field("client_order_id", pa.string()),
                    pa.field("clock", pa.uint64()),
                ]
            ),
        ),
        pa.field("sending_ts_ms", pa.int64()),
    ]
)
_WIRE_LEVELS = pl.List(pl.List(pl.String))
_WIRE_SNAPSHOT = pl.Schema(
    {
        "sid": pl.UInt32(),
        "seq": pl.UInt64(),
        "sending_ts_ms": pl.Int64(),
        "msg": pl.Struct(
            {
                "market_ticker": pl.String,
                "market_id": pl.String,
                "clock": pl.UInt64,
                "yes_dollars_fp": _WIRE_LEVELS,
                "no_dollars_fp": _WIRE_LEVELS,
                # Only the presence of these matters: they send the frame to the slow path.
                "yes_dollars": pl.List(pl.List(pl.String)),
                "no_dollars": pl.List(pl.List(pl.String)),
                "yes": pl.List(pl.List(pl.Int64)),
                "no": pl.List(pl.List(pl.Int64)),
            }
        ),
    }
)
_MSG = _WIRE_DELTA.field("msg").type
_PRICE_TEXT = r"^[01]\.\d{4}$"
_QTY_TEXT = r"^-?\d{1,9}\.\d{2}$"
_TS_TEXT = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z$"
_ODD_SNAPSHOT = "|".join(
    [
        r'\\|"\s+:|"(?:market_ticker|market_id)":[^"]|[\[,][^"\[\]]',
        r'"(?:clock|sending_ts_ms)":(?:[^0-9]|[0-9]+[^0-9,}]|[0-9]{19})',
        *(
            f'"{key}":.*"{key}":'
            for key in (
                *("sid", "seq", "sending_ts_ms", "msg", "market_ticker", "market_id", "clock"),
                *("yes_dollars_fp", "no_dollars_fp"),
            )
        ),
    ]
)
"""What Polars' reader accepts and the slow path refuses: numbers in place of strings, strings, fractions and
null in place of whole numbers (or numbers of more than 63 bits), and duplicate keys in any spelling. (Arrow's
reader refuses them.) Costs 0.3 µs per kB."""
_UUID_TEXT = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"

KEPT_BYTES_OF_LARGE = 1 << 16
"""Bytes kept in a row of a frame that is too large for one; the journal has the whole frame."""


@dataclass(frozen=True)
class Decoded:
    """Decoded records by type. `n` is the record number; every record is in exactly one frame."""

    first_n: int
    end_n: int
    deltas: pl.DataFrame
    levels: pl.DataFrame
    """One row per level of the snapshots."""
    snapshots: pl.DataFrame
    """One row per snapshot, empty ones included."""
    trades: pl.DataFrame
    stream: pl.DataFrame
    """Everything else, notes and malformed frames included."""
    first_ns: int
    """Receive time of the first record."""
    clock: ReceiveClock
    """Receive times of the last and of the newest record."""
    lost: bool = False
    """The records are a `LostRange`; the times are those of the next record."""
    drift: Drift = field(default_factory=Drift)
    """What the frames have that is not known, and what they lack."""
    unread: UnreadRange | None = None
    """Unread records of the preceding segment, reported with this range."""

    def clock_after(self, before: ReceiveClock) -> ReceiveClock:
        """The clock at the end of the range, given the one at its beginning. A lost range leaves it unchanged."""
        if self.lost:
            return before
        return ReceiveClock(self.clock.last_ns, max(before.newest_ns, self.clock.newest_ns))


def decode_lost_range(lost_range: LostRange) -> Decoded:
    """An empty `Decoded` in place of the lost records."""
    return Decoded(
        lost_range.first_n,
        lost_range.first_n + lost_range.rows,
        pl.DataFrame(schema=DELTAS),
        pl.DataFrame(schema=LEVELS),
        pl.DataFrame(schema=SNAPSHOTS),
        pl.DataFrame(schema=columnar_trades.TRADES),
        pl.DataFrame(schema=STREAM),
        lost_range.until_ns,
        ReceiveClock(lost_range.until_ns, lost_range.until_ns),
        lost=True,
    )


def decode_range(part: JournalRange) -> Decoded:
    """Decode one range of the journal."""
    return decode_lost_range(part) if isinstance(part, LostRange) else decode([part])


def decode(ranges: Sequence[RecordRange]) -> Decoded:
    """Decode consecutive record ranges together."""
    table = pa.Table.from_batches([records.batch for records in ranges])
    first_n = ranges[0].first_n
    records = pl.DataFrame(
        {
            "n": pl.int_range(first_n, first_n + table.num_rows, dtype=pl.UInt64, eager=True),
            "recv_ns": pl.Series(table["recv_ns"]),
            "conn": _uuids(table["conn"]),
            "kind": pl.Series(table["kind"]),
            "frame": pl.Series(table["frame"]),
        }
    )
    kind = pl.col("kind")
    drift = [Drift() for _ in range(4)]
    deltas, bad_deltas = _deltas(records.filter(kind == Kind.DELTA), drift[0])
    snapshots, levels, bad_snapshots = _snapshots(records.filter(kind == Kind.SNAPSHOT), drift[1])
    trades, bad_trades = columnar_trades.trades(
        records.filter(kind == Kind.TRADE),
        lambda trades, schema: _read(trades, schema, "trade", drift[2]),
        _malformed_row,
        STREAM,
    )
    others = records.filter(~kind.is_in([Kind.DELTA, Kind.SNAPSHOT, Kind.TRADE]))
    drift[3].examine(others.filter(pl.col("kind") == Kind.CONTROL))
    stream = pl.DataFrame(
        [_stream_row(record) for record in others.iter_rows(named=True)],
        schema=STREAM,
        orient="row",
    )
    return Decoded(
        first_n,
        first_n + table.num_rows,
        deltas,
        levels,
        snapshots,
        trades,
        pl.concat([stream, bad_deltas, bad_snapshots, bad_trades]).sort("n"),
        table["recv_ns"][0].as_py(),
        ReceiveClock(table["recv_ns"][-1].as_py(), pc.max(table["recv_ns"]).as_py()),
        drift=Drift.merged(drift),
        unread=ranges[0].unread,
    )


def _uuids(column: pa.ChunkedArray) -> pl.Series:
    encoded = column.cast(pa.binary()).combine_chunks().dictionary_encode()
    names = pl.Series(
        [str(uuid.UUID(bytes=value)) for value in encoded.dictionary.to_pylist()], dtype=pl.String
    )
    return names.gather(pl.Series(encoded.indices))


# -- deltas ------------------------------------------------------------------------------------


def _deltas(records: pl.DataFrame, drift: Drift) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return (deltas, malformed rows)."""
    if records.is_empty():
        return pl.DataFrame(schema=DELTAS), pl.DataFrame(schema=STREAM)
    wire = _read(records, _WIRE_DELTA, "orderbook_delta", drift)
    if wire is None:
        return _delta_frames(records)
    msg = _message(wire)
    sent = {field.name: msg.field(i) for i, field in enumerate(_MSG)}
    price = _each_value(sent["price_dollars"], lambda text: _units(text, _PRICE_TEXT))
    qty = _each_value(sent["delta_fp"], lambda text: _units(text, _QTY_TEXT))
    wide = records.select("n", "recv_ns", "conn").with_columns(
        pl.Series("sid", wire["sid"]),
        pl.Series("seq", wire["seq"]),
        _each_value(sent["market_ticker"], lambda text: text).alias("market_ticker"),
        _each_value(pc.fill_null(sent["market_id"], ""), _uuid_or_null).alias("market_id"),
        _each_value(
            sent["side"], lambda text: text.replace_strict(SIDES, SIDES, default=None)
        ).alias("side"),
        price.alias("price"),
        qty.alias("qty"),
        _exchange_times(sent["ts"], sent["ts_ms"]).alias("ts"),
        _each_value(pc.fill_null(sent["client_order_id"], ""), lambda text: text).alias(
            "client_order_id"
        ),
        pl.Series("clock", sent["clock"]),
        pl.Series("sending_ts_ms", wire["sending_ts_ms"]),
        pl.Series("no_time", pc.and_(pc.is_null(sent["ts"]), pc.is_null(sent["ts_ms"]))),
        pl.Series("cents", sent["price"]),
        pl.Series("count", sent["delta"]),
        pl.Series("no_price_text", pc.is_null(sent["price_dollars"])),
        pl.Series("no_qty_text", pc.is_null(sent["delta_fp"])),
    )
    wide = wide.with_columns(
        _SENT_TS,
        pl.when("no_price_text").then(_hundreds("cents")).otherwise("price").alias("price"),
        pl.when("no_qty_text").then(_hundreds("count")).otherwise("qty").alias("qty"),
    )
    plain = (
        pl.all_horizontal(pl.col(_NEEDED).is_not_null())
        & (pl.col("ts").is_not_null() | pl.col("no_time"))
        & _HAS_SENT_TS
        & pl.col("price").is_between(0, ONE_DOLLAR)
        & (pl.col("market_ticker") != "")
    )
    is_plain = wide.select(plain.alias("plain"))["plain"]
    good = wide.filter(is_plain).select(DELTAS.names()).cast(DELTAS)
    if bool(is_plain.all()):
        return good, pl.DataFrame(schema=STREAM)
    slow, malformed = _delta_frames(records.filter(~is_plain))
    return pl.concat([good, slow]).sort("n"), malformed


def _hundreds(column: str) -> pl.Expr:
    """Return a hundred times each whole number; null if that is MOST_QTY or more, or overflows."""
    most = (MOST_QTY - 1) // 100
    return pl.when(pl.col(column).is_between(-most, most)).then(pl.col(column) * 100)


def _each_value(texts: pa.Array, convert: Callable[[pl.Series], pl.Series]) -> pl.Series:
    """Apply `convert` to each text, once per distinct value."""
    encoded = texts.dictionary_encode()
    return convert(pl.Series(encoded.dictionary)).gather(pl.Series(encoded.indices))


def _units(text: pl.Series, pattern: str) -> pl.Series:
    """A decimal's digits as one integer; null where the text does not match `pattern`."""
    digits = text.str.replace(".", "", literal=True).cast(pl.Int64, strict=False)
    return digits.set(~text.str.contains(pattern), None)


def _uuid_or_null(text: pl.Series) -> pl.Series:
    """The market's UUID, zero where none was sent; null where the text is not a UUID."""
    known = text.set(text == "", ZERO_UUID)
    return known.set(~known.str.contains(_UUID_TEXT), None)


_NEEDED = [name for name in DELTAS.names() if name not in {"ts", *_SENT}]
_SENT_TS = pl.col("sending_ts_ms").cast(_SENT["sent_ts"]).alias("sent_ts")
_HAS_SENT_TS = pl.col("sending_ts_ms").is_between(0, LAST_MS).fill_null(value=True)
"""Whether the time of sending can be read, or none was sent."""


def _exchange_times(text: pa.Array, unix_ms: pa.Array) -> pl.Series:
    """The times of `ts`, and of `ts_ms` where there is no `ts`; null where neither can be read."""
    times = _times(text)
    if not text.null_count:
        return times
    whole = pl.Series(unix_ms)
    in_ms = whole.set(~whole.is_between(0, LAST_MS), None) * 1000
    return in_ms.cast(pl.Datetime("us", "UTC")).zip_with(pl.Series(pc.is_null(text)), times)


def _times(text: pa.Array) -> pl.Series:
    """RFC 3339 times in UTC; null where the text does not match `_TS_TEXT`."""
    series = pl.Series(text)
    unusual = ~series.str.contains(_TS_TEXT)
    if unusual.any():
        text = pc.if_else(unusual.to_arrow(), pa.scalar(None, pa.string()), text)
    try:
        return pl.Series(text.cast(pa.timestamp("us", "UTC")))
    except pa.ArrowInvalid:  # a date that does not exist, such as the 31st of February
        return series.set(unusual, None).str.to_datetime(
            "%Y-%m-%dT%H:%M:%S%.fZ", time_unit="us", time_zone="UTC", strict=False
        )


def _delta_frames(records: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The slow path, frame by frame; returns (deltas, malformed rows)."""
    rows: list[tuple[Any, ...]] = []
    stream: list[tuple[Any, ...]] = []
    for record in records.iter_rows(named=True):
        try:
            head, delta = decode_head(record["frame"]), decode_delta(record["frame"])
            change = delta_change(delta)
            check_price(change.side, change.price)
            if not delta.market_ticker:
                raise BookError("the delta names no market")
        except (*DecodeError, BookError) as error:
            stream.append(_malformed_row(record, str(error), book_frame="delta"))
            continue
        optional = OptionalFields(record, head, delta.market_ticker)
        rows.append(
            (
                *_frame_columns(record, head),
                optional.read("market_id", delta.market_id, optional_fields.market_id, ZERO_UUID),
                delta.market_ticker,
                change.side,
                change.price,
                change.qty,
                optional.read("ts", delta, optional_fields.exchange_time, None),
                optional.read(
                    "client_order_id", delta.client_order_id, optional_fields.client_order_id, ""
                ),
                *_sent(optional, delta.clock, record["frame"]),
            )
        )
        stream += optional.rows
    return (
        pl.DataFrame(rows, schema=DELTAS, orient="row"),
        pl.DataFrame(stream, schema=STREAM, orient="row"),
    )


def _sent(optional: OptionalFields, clock: object, frame: bytes) -> tuple[Any, Any]:
    """The columns of `_SENT`, on the slow path."""
    return (
        optional.read("clock", clock, optional_fields.clock, None),
        optional.read("sending_ts_ms", sending_ts_ms(frame), optional_fields.unix_ms, None),
    )


# -- snapshots ---------------------------------------------------------------------------------


def _snapshots(
    records: pl.DataFrame, drift: Drift
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Return (snapshots, their levels, malformed rows)."""
    if records.is_empty():
        return (
            pl.DataFrame(schema=SNAPSHOTS),
            pl.DataFrame(schema=LEVELS),
            pl.DataFrame(schema=STREAM),
        )
    readable = bool((records["frame"].bin.size() <= SNAPSHOT_BYTES).all())
    wire = _ndjson(records["frame"], _WIRE_SNAPSHOT) if readable else None
    if wire is None:
        drift.examine(records, expected=True)
        return _snapshot_frames(records)
    wide = records.select("n", "recv_ns", "conn").hstack(wire.unnest("msg"))
    for path in EXPECTED["orderbook_snapshot"]:
        has = wide[path.removeprefix("msg.")].is_not_null()
        drift.expect("orderbook_snapshot", path, wide, has)
    market_id = pl.col("market_id").fill_null("")
    wide = wide.with_columns(
        pl.when(market_id == "").then(pl.lit(ZERO_UUID)).otherwise(market_id).alias("market_id"),
        _matches(records["frame"], _ODD_SNAPSHOT).alias("odd"),
        _SENT_TS,
    )
    # Each key of a frame that is not odd ends with these two bytes, and nothing else does.
    keys = records["frame"].cast(pl.String).str.count_matches('":', literal=True)
    known = wire.unnest("msg").select(2 + pl.sum_horizontal(pl.all().is_not_null()))  # type, msg
    drift.examine(records.filter(wide["odd"].fill_null(value=True) | (keys != known.to_series())))
    legacy = pl.any_horizontal(pl.col("yes_dollars", "no_dollars", "yes", "no").is_not_null())
    plain = (
        ~legacy
        & ~pl.col("odd")
        & pl.col("seq").is_not_null()
        & pl.col("sid").is_not_null()
        & (pl.col("market_ticker") != "")
        & pl.col("market_id").str.contains(_UUID_TEXT)
        & _HAS_SENT_TS
    ).fill_null(value=False)
    head = [*_FRAME, *_MARKET, *_SENT]
    levels = pl.concat(
        [
            wide.filter(plain)
            .select(*head, pl.lit(side).alias("side"), pl.col(f"{side}_dollars_fp").alias("level"))
            .drop_nulls("level")
            .explode("level", empty_as_null=False)
            for side in SIDES
        ]
    )
    price, qty = (
        pl.col("level").list.get(0, null_on_oob=True),
        pl.col("level").list.get(1, null_on_oob=True),
    )
    levels = levels.with_columns(
        price.map_batches(lambda text: _units(text, _PRICE_TEXT), pl.Int64).alias("price"),
        qty.map_batches(lambda text: _units(text, _QTY_TEXT), pl.Int64).alias("qty"),
        (pl.col("level").list.len() == 2).fill_null(value=False).alias("pair"),
    )
    odd_level = ~(
        pl.col("pair") & pl.col("price").is_between(0, ONE_DOLLAR) & (pl.col("qty") > 0)
    ).fill_null(value=False)
    twice = pl.struct("n", "side", "price").is_duplicated()
    odd = levels.filter(odd_level | twice)["n"].unique()
    good = plain & ~pl.col("n").is_in(odd.implode())
    is_good = wide.select(good.alias("good"))["good"]
    levels = levels.filter(~pl.col("n").is_in(odd.implode())).select(LEVELS.names()).cast(LEVELS)
    counts = levels.group_by("n").agg(pl.len().cast(pl.UInt32).alias("levels"))
    snapshots = (
        wide.filter(is_good)
        .select(head)
        .cast(_schema(_FRAME, _MARKET, _SENT))
        .join(counts, on="n", how="left", maintain_order="left")
        .with_columns(pl.col("levels").fill_null(0))
    )
    if bool(is_good.all()):
        return snapshots, levels.sort("n", maintain_order=True), pl.DataFrame(schema=STREAM)
    slow_snapshots, slow_levels, malformed = _snapshot_frames(records.filter(~is_good))
    return (
        pl.concat([snapshots, slow_snapshots]).sort("n"),
        pl.concat([levels, slow_levels]).sort("n", maintain_order=True),
        malformed,
    )


def _snapshot_frames(records: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """The slow path: frame by frame, legacy forms included."""
    snapshots: list[tuple[Any, ...]] = []
    levels: list[tuple[Any, ...]] = []
    stream: list[tuple[Any, ...]] = []
    for record in records.iter_rows(named=True):
        try:
            head, snapshot = decode_head(record["frame"]), decode_snapshot(record["frame"])
            snapshot_extents(snapshot)
            ladders = [(side, snapshot_ladder(snapshot, side)) for side in SIDES]
        except (*DecodeError, BookError) as error:
            stream.append(_malformed_row(record, str(error), book_frame="snapshot"))
            continue
        optional = OptionalFields(record, head, snapshot.market_ticker)
        market = optional.read(
            "market_id", snapshot.market_id, optional_fields.market_id, ZERO_UUID
        )
        frame = (*_frame_columns(record, head), market, snapshot.market_ticker)
        sent = _sent(optional, snapshot.clock, record["frame"])
        rows = [
            (*frame, side, price, size, *sent)
            for side, ladder in ladders
            for price, size in ladder.items()
        ]
        levels.extend(rows)
        snapshots.append((*frame, *sent, len(rows)))
        stream += optional.rows
    return (
        pl.DataFrame(snapshots, schema=SNAPSHOTS, orient="row"),
        pl.DataFrame(levels, schema=LEVELS, orient="row"),
        pl.DataFrame(stream, schema=STREAM, orient="row"),
    )


# -- everything else ---------------------------------------------------------------------------


def _stream_row(record: dict[str, Any]) -> tuple[Any, ...]:
    if record["kind"] == Kind.NOTE:
        note = msgspec.json.decode(record["frame"])
        detail = msgspec.json.encode(note["detail"]).decode()
        return (
            record["n"],
            record["recv_ns"],
            record["conn"],
            note["sid"],
            0,
            note["kind"],
            note["market_ticker"],
            detail,
        )
    if record["kind"] == Kind.MALFORMED:
        return _malformed_row(record, "not a JSON object with a type")
    try:
        head, reply = decode_head(record["frame"]), decode_reply(record["frame"])
    except DecodeError as error:
        return _malformed_row(record, str(error))
    if head.type == "subscribed" and isinstance(reply.msg, dict):
        head.sid = _subscribed_sid(reply.msg)  # the gap check looks for the beginning of each sid
    return (
        *_frame_columns(record, head),
        head.type if head.type in KNOWN_TYPES else "unknown",
        _ticker_of(reply),
        _text(record["frame"]),
    )


def _subscribed_sid(message: Mapping[str, Any]) -> int:
    sid = message.get("sid")
    return sid if isinstance(sid, int) and 0 < sid < 1 << 32 else 0


def _ticker_of(reply: Reply) -> str:
    ticker = reply.msg.get("market_ticker") if isinstance(reply.msg, dict) else None
    return ticker if isinstance(ticker, str) else ""


def _malformed_row(record: dict[str, Any], reason: str, *, book_frame: str = "") -> tuple[Any, ...]:
    """A row with the raw frame; its sequence number counts where the head could be read.

    Of a frame that is too large for a snapshot it keeps the beginning, and its length as `bytes`.

    `book_frame`: delta or snapshot, where the frame leaves its book stale from here on.
    """
    try:
        head = decode_head(record["frame"])
    except DecodeError:
        head = Head("")
    frame = record["frame"]
    size = {"bytes": len(frame)} if len(frame) > SNAPSHOT_BYTES else {}
    text = _text(frame[:KEPT_BYTES_OF_LARGE] if size else frame)
    detail = {"reason": reason, "frame": text} | size | ({"of": book_frame} if book_frame else {})
    body = msgspec.json.encode(detail).decode()
    ticker = market_of(record["frame"]) if book_frame else ""
    return (*_frame_columns(record, head), "malformed", ticker, body)


def _frame_columns(record: dict[str, Any], head: Head) -> tuple[Any, ...]:
    return (record["n"], record["recv_ns"], record["conn"], head.sid, head.seq)


def _text(frame: bytes) -> str:
    """The frame as text; bytes that are not UTF-8 as base64 with the prefix `base64:`."""
    try:
        return frame.decode().rstrip("\n")
    except UnicodeDecodeError:
        return "base64:" + base64.b64encode(frame).decode()


def _matches(frames: pl.Series, pattern: str) -> pl.Series:
    return frames.cast(pl.String).str.contains(pattern)


def _read(records: pl.DataFrame, schema: pa.Schema, name: str, drift: Drift) -> pa.Table | None:
    """Decode the frames of one type as `_json` does, and find out what is not known of them."""
    wire = _json(records["frame"], _with_known_fields(schema), "error")
    if wire is None:
        wire = _json(records["frame"], schema, "ignore")
        drift.examine(records, expected=wire is None)
        if wire is None:
            return None
    else:
        wire = wire.drop_columns(["type", "id"])
    of_stream = pl.Series(
        wire["seq"].is_valid()
    )  # a trade that was fetched by REST has other fields
    message = _message(wire)
    for path in EXPECTED[name]:
        inner = path.removeprefix("msg.")
        column = wire[inner] if inner == path else message.field(inner)
        if not column.null_count:
            drift.expect_all(name, path, int(records["n"][0]))
            continue
        frames = records.with_columns(pl.Series("sid", wire["sid"]))
        has = pl.Series(column.is_valid())
        if wire["seq"].null_count:
            frames, has = frames.filter(of_stream), has.filter(of_stream)
        drift.expect(name, path, frames, has)
    return wire


def _message(wire: pa.Table) -> pa.StructArray:
    """The `msg` of all frames, which the reader returns in one chunk; joining chunks would copy it."""
    column = wire["msg"]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _with_known_fields(schema: pa.Schema) -> pa.Schema:
    """The schema with the fields that are known and not read, so that any other field is an error."""
    message = pa.struct([*schema.field("msg").type, pa.field("subaccount", pa.int64())])
    others = [each for each in schema if each.name != "msg"]
    unread = [pa.field("type", pa.string()), pa.field("id", pa.int64())]
    return pa.schema([*others, *unread, pa.field("msg", message)])


def _json(frames: pl.Series, schema: pa.Schema, unexpected: str) -> pa.Table | None:
    """Decode all frames in one call; None where one does not have the expected shape.

    `unexpected`: what a field that the schema does not have does, "ignore" or "error". Each frame is one JSON value, because capture decoded its head. UTF-8 is checked first: the reader
    accepts any bytes as text.
    """
    data = frames.to_arrow()
    text = data.buffers()[2][: int(pc.sum(pc.binary_length(data)).as_py())]
    if not _is_text(text):
        return None
    try:
        table = pj.read_json(
            pa.BufferReader(text),
            read_options=pj.ReadOptions(use_threads=False, block_size=max(text.size, 1)),
            parse_options=pj.ParseOptions(
                explicit_schema=schema, unexpected_field_behavior=unexpected
            ),
        )
    except pa.ArrowInvalid:
        return None
    return table if table.num_rows == len(frames) else None


def _is_text(data: pa.Buffer) -> bool:
    if np.frombuffer(data, np.uint8).max(initial=0) < 0x80:
        return True
    try:
        data.to_pybytes().decode()
    except UnicodeDecodeError:
        return False
    return True


def _ndjson(frames: pl.Series, schema: pl.Schema) -> pl.DataFrame | None:
    """As `_json`, with Polars' reader, which handles nested lists."""
    lines = b"\n".join(frames.to_list())
    try:
        table = pl.read_ndjson(io.BytesIO(lines), schema=schema)
    except pl.exceptions.PolarsError:
        return None
    return table if table.height == len(frames) else None

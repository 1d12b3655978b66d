"""Decoding of trade frames to columns, statelessly: the trade channel's part of `columnar`.

As for deltas, a fast path decodes the current wire form in columns. The slow path, frame by frame, also
decodes the integer cents from before March 2026 and trades that were backfilled over REST (they have no
`seq`). What that cannot read becomes a `malformed` row with the raw frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pyarrow as pa

from kalshi_platform.arrow_columns import names, place, prices, quantities, text, times
from kalshi_platform.exchange.book import SIDES
from kalshi_platform.exchange.frames import (
    DecodeError,
    Head,
    decode_head,
    decode_trade,
    sending_ts_ms,
)
from kalshi_platform.exchange.frames import Trade as TradeFrame
from kalshi_platform.exchange.numbers import ONE_DOLLAR, cents_units, price_units, qty_units
from kalshi_platform.exchange.optional_fields import LAST_MS, OptionalFields, unix_ms
from kalshi_platform.schema import TRADES as DATASET

BOOK_SIDES = ("bid", "ask")
"""The taker's side of the book: bid bought YES, ask bought NO."""
Malformed = Callable[[dict[str, Any], str], tuple[Any, ...]]

TRADES = pl.Schema(
    {
        "n": pl.UInt64(),
        "recv_ns": pl.Int64(),
        "conn": pl.String(),
        "sid": pl.UInt32(),
        "seq": pl.UInt64(),
        "trade_id": pl.String(),
        "market_ticker": pl.String(),
        "yes_price": pl.Int64(),
        "no_price": pl.Int64(),
        "qty": pl.Int64(),
        "taker_outcome_side": pl.String(),
        "taker_book_side": pl.String(),
        "is_block_trade": pl.Boolean(),
        "ts_ms": pl.Int64(),
        "sent_ts": pl.Datetime("ms", "UTC"),
    }
)
"""Prices are 1e-4 dollars, qty 1e-2 contracts, ts_ms the exchange's time in Unix milliseconds; sent_ts is null
where the frame has none."""

_TEXTS = (
    "trade_id",
    "market_ticker",
    "yes_price_dollars",
    "no_price_dollars",
    "count_fp",
    "taker_outcome_side",
    "taker_book_side",
    "ticker",
    "taker_side",
    "created_time",
)
_INTEGERS = ("ts_ms", "ts", "yes_price", "no_price", "count")
"""Includes fields that only the slow path uses, so that a wrong type is malformed on both paths."""
WIRE = pa.schema(
    [
        pa.field("sid", pa.uint32()),
        pa.field("seq", pa.uint64()),
        pa.field(
            "msg",
            pa.struct(
                [
                    *(pa.field(name, pa.string()) for name in _TEXTS),
                    pa.field("is_block_trade", pa.bool_()),
                    *(pa.field(name, pa.int64()) for name in _INTEGERS),
                ]
            ),
        ),
        pa.field("sending_ts_ms", pa.int64()),
    ]
)
_PRICE_TEXT = r"^[01]\.\d{4}$"
_QTY_TEXT = r"^\d{1,14}\.\d{2}$"


class TradeError(ValueError):
    """A trade frame that cannot be read."""


def trades(
    records: pl.DataFrame,
    read_json: Callable[[pl.DataFrame, pa.Schema], pa.Table | None],
    malformed: Malformed,
    stream: pl.Schema,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Decode journal records of kind TRADE; return (trades, malformed rows).

    `read_json` and `malformed` are the JSON reader and the row builder of `columnar`; `stream` is the
    schema of malformed rows.
    """
    if records.is_empty():
        return pl.DataFrame(schema=TRADES), pl.DataFrame(schema=stream)
    wire = read_json(records, WIRE)
    if wire is None:
        return _frames(records, malformed, stream)
    wide = (
        records.select("n", "recv_ns", "conn")
        .hstack(pl.DataFrame(wire).unnest("msg"))
        .with_columns(
            _units("yes_price_dollars", _PRICE_TEXT).alias("yes_price"),
            _units("no_price_dollars", _PRICE_TEXT).alias("no_price"),
            _units("count_fp", _QTY_TEXT).alias("qty"),
            pl.col("is_block_trade").fill_null(value=False),
            pl.col("sending_ts_ms").cast(TRADES["sent_ts"]).alias("sent_ts"),
        )
    )
    plain = pl.all_horizontal(
        pl.col("sid", "seq").is_not_null(),
        pl.col("trade_id", "market_ticker") != "",
        pl.col("yes_price", "no_price").is_between(0, ONE_DOLLAR),
        pl.col("qty") > 0,
        pl.col("taker_outcome_side").is_in(SIDES),
        pl.col("taker_book_side").is_in(BOOK_SIDES),
        pl.col("ts_ms").is_between(0, LAST_MS),
        pl.col("sending_ts_ms").is_between(0, LAST_MS).fill_null(value=True),
    ).fill_null(value=False)
    is_plain = wide.select(plain.alias("plain"))["plain"]
    good = wide.filter(is_plain).select(TRADES.names()).cast(TRADES)
    if bool(is_plain.all()):
        return good, pl.DataFrame(schema=stream)
    slow, unreadable = _frames(records.filter(~is_plain), malformed, stream)
    return pl.concat([good, slow]).sort("n"), unreadable


def _units(column: str, pattern: str) -> pl.Expr:
    text = pl.col(column)
    return pl.when(text.str.contains(pattern)).then(
        text.str.replace(".", "", literal=True).cast(pl.Int64, strict=False)
    )


def _frames(
    records: pl.DataFrame, malformed: Malformed, stream: pl.Schema
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The slow path: frame by frame."""
    rows: list[tuple[Any, ...]] = []
    unreadable: list[tuple[Any, ...]] = []
    for record in records.iter_rows(named=True):
        try:
            head, trade = decode_head(record["frame"]), decode_trade(record["frame"])
            row = _row(record, head, trade)
        except (*DecodeError, ValueError) as error:
            unreadable.append(malformed(record, str(error)))
            continue
        optional = OptionalFields(record, head, trade.market_ticker or trade.ticker or "")
        sent = optional.read("sending_ts_ms", sending_ts_ms(record["frame"]), unix_ms, None)
        rows.append((*row, sent))
        unreadable += optional.rows
    return (
        pl.DataFrame(rows, schema=TRADES, orient="row"),
        pl.DataFrame(unreadable, schema=stream, orient="row"),
    )


def _row(record: Mapping[str, Any], head: Head, trade: TradeFrame) -> tuple[Any, ...]:
    """The columns of TRADES except `sent_ts`. Raises: ValueError."""
    ticker = trade.market_ticker or trade.ticker
    if not ticker:
        raise TradeError("the trade has no market_ticker")
    yes = _price("yes_price", trade.yes_price_dollars, trade.yes_price)
    no = _price("no_price", trade.no_price_dollars, trade.no_price)
    if yes is None and no is None:
        raise TradeError("the trade has no price")
    if trade.count_fp is not None:
        qty = qty_units(trade.count_fp)
    elif trade.count is not None:
        qty = cents_units(trade.count)
    else:
        raise TradeError("the trade has no count")
    if qty <= 0:
        raise TradeError(f"count {qty / 100:.2f} is not above zero")
    outcome = trade.taker_outcome_side or trade.taker_side
    if outcome not in SIDES:
        raise TradeError(f"taker side {outcome and outcome[:40]!r} is neither yes nor no")
    # Sent since May 2026; before, a taker who bought YES was the bid by definition.
    book_side = trade.taker_book_side or BOOK_SIDES[SIDES.index(outcome)]
    if book_side not in BOOK_SIDES:
        raise TradeError(f"taker_book_side {book_side[:40]!r} is neither bid nor ask")
    return (
        record["n"],
        record["recv_ns"],
        record["conn"],
        head.sid,
        head.seq,
        trade.trade_id or "",
        ticker,
        ONE_DOLLAR - no if yes is None and no is not None else yes,
        ONE_DOLLAR - yes if no is None and yes is not None else no,
        qty,
        outcome,
        book_side,
        trade.is_block_trade or False,
        _time_ms(trade),
    )


def _price(name: str, dollars: str | None, cents: int | None) -> int | None:
    price = None if cents is None else cents_units(cents)
    if dollars is not None:
        price = price_units(dollars)
    if price is not None and not 0 <= price <= ONE_DOLLAR:
        raise TradeError(f"{name} {price} is outside 0 to {ONE_DOLLAR}")
    return price


def _time_ms(trade: TradeFrame) -> int:
    if trade.ts_ms is not None:
        at_ms = trade.ts_ms
    elif trade.ts is not None:
        at_ms = trade.ts * 1000
    elif trade.created_time is not None:
        at = datetime.fromisoformat(trade.created_time)
        if at.tzinfo is None:
            raise TradeError(f"created_time {trade.created_time[:40]!r} has no time zone")
        at_ms = (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(milliseconds=1)
    else:
        raise TradeError("the trade has no time")
    if not 0 <= at_ms <= LAST_MS:
        raise TradeError(f"the trade's time {at_ms} is no Unix time in milliseconds")
    return at_ms


def table(trades_frame: pl.DataFrame, shard: int) -> pa.Table:
    """Convert decoded trades of a shard's journal to the stores' columns."""
    if trades_frame.is_empty():
        return DATASET.arrow.empty_table()
    return pa.Table.from_arrays(
        [
            names(trades_frame["conn"]),
            trades_frame["sid"].to_arrow(),
            trades_frame["seq"].to_arrow(),
            text(trades_frame["trade_id"]),
            names(trades_frame["market_ticker"]),
            prices(trades_frame["yes_price"]),
            prices(trades_frame["no_price"]),
            quantities(trades_frame["qty"]),
            names(trades_frame["taker_outcome_side"]),
            names(trades_frame["taker_book_side"]),
            trades_frame["is_block_trade"].to_arrow(),
            pa.array(trades_frame["ts_ms"].to_numpy(), pa.int64()).cast(
                DATASET.arrow.field("ts").type
            ),
            times(trades_frame["recv_ns"]),
            *place(trades_frame["n"], shard),
            trades_frame["sent_ts"].to_arrow(),
        ],
        schema=DATASET.arrow,
    )

"""Hand-made frames and journal batches, for tests of code that reads them."""

from __future__ import annotations

import itertools
import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from kalshi_platform.exchange.numbers import ONE_DOLLAR, contracts, dollars
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.reader import NO_CONNECTION, SCHEMA, LogOffset, RecordRange

Record = tuple[int, bytes, int, bytes]
"""(recv_ns, conn, kind, frame)"""

SECOND = 1_000_000_000
NOON_NS = 1_790_000_000 * SECOND  # a fixed instant in 2026
Levels = Mapping[int, int]


def conn_id(number: int) -> bytes:
    """A connection's UUID, equal in every run."""
    return uuid.UUID(int=number).bytes


def market_id(ticker: str) -> str:
    """A market's UUID, equal in every run."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, ticker))


def delta(
    ticker: str,
    seq: int,
    side: str,
    price: int,
    qty: int,
    *,
    sid: int = 1,
    clock: int | None = None,
) -> bytes:
    """A delta frame in the current form; price in 1e-4 dollars, qty in 1e-2 contracts."""
    body: dict[str, Any] = {
        "market_ticker": ticker,
        "market_id": market_id(ticker),
        "price_dollars": dollars(price),
        "delta_fp": contracts(qty),
        "side": side,
        "ts": "2026-08-07T06:46:28.97871Z",
        "ts_ms": 1786085188978,
    }
    if clock is not None:
        body["clock"] = clock
    return _frame("orderbook_delta", sid, seq, body)


def snapshot(
    ticker: str, seq: int, yes: Levels, no: Levels, *, sid: int = 1, clock: int | None = None
) -> bytes:
    """A snapshot frame; the key of an empty side is absent, prices ascend."""
    body: dict[str, Any] = {"market_ticker": ticker, "market_id": market_id(ticker)}
    if clock is not None:
        body["clock"] = clock
    for side, levels in (("yes", yes), ("no", no)):
        if levels:
            body[f"{side}_dollars_fp"] = [
                [dollars(p), contracts(q)] for p, q in sorted(levels.items())
            ]
    return _frame("orderbook_snapshot", sid, seq, body)


def trade_id(number: int) -> str:
    """A trade's id, equal in every run."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"trade {number}"))


def trade(ticker: str, seq: int, yes: int, qty: int, *, sid: int = 2, number: int = 0) -> bytes:
    """A trade frame in the current form; `yes` in 1e-4 dollars, `qty` in 1e-2 contracts."""
    body = {
        "trade_id": trade_id(number or seq),
        "market_ticker": ticker,
        "yes_price_dollars": dollars(yes),
        "no_price_dollars": dollars(ONE_DOLLAR - yes),
        "count_fp": contracts(qty),
        "taker_side": "no",
        "taker_outcome_side": "no",
        "taker_book_side": "ask",
        "is_block_trade": False,
        "ts": 1786085188,
        "ts_ms": 1786085188978,
    }
    return _frame("trade", sid, seq, body)


def ok(seq: int, *, sid: int = 1) -> bytes:
    """An acknowledgement, which consumes a sequence number."""
    return _frame("ok", sid, seq, {"market_tickers": []})


def note(kind: str, detail: Mapping[str, Any], *, sid: int = 0, ticker: str = "") -> bytes:
    """A journal note."""
    return json.dumps(
        {"kind": kind, "sid": sid, "market_ticker": ticker, "detail": dict(detail)}
    ).encode()


def connected(conn: bytes, at_ns: int, *, use_yes_price: bool = False) -> Record:
    """The note with which a connection begins."""
    return (at_ns, conn, Kind.NOTE, note("connected", {"use_yes_price": use_yes_price}))


def started(at_ns: int) -> Record:
    """The note that a recorder writes when it opens the journal."""
    return (at_ns, NO_CONNECTION, Kind.NOTE, note("started", {}))


def batch(records: Sequence[Record]) -> pa.RecordBatch:
    """Journal records as an Arrow batch in the journal's schema."""
    columns = zip(*records, strict=True) if records else [[], [], [], []]
    arrays = [pa.array(list(c), f.type) for c, f in zip(columns, SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def blocks(records: Sequence[Record], cuts: Iterable[int] = ()) -> list[RecordRange]:
    """The records as ranges, cut at the given record numbers."""
    edges = sorted({0, len(records), *(c for c in cuts if 0 < c < len(records))})
    return [
        RecordRange(
            start, batch(records[start:end]), (LogOffset(0, start, start),), LogOffset(0, end, end)
        )
        for start, end in itertools.pairwise(edges)
    ]


def _frame(kind: str, sid: int, seq: int, body: Mapping[str, Any]) -> bytes:
    frame = {"type": kind, "sid": sid, "seq": seq, "msg": dict(body)}
    return json.dumps(frame, separators=(",", ":")).encode() + b"\n"

"""Traces: rows that show whether a store holds given journal records, without writing to it.

A trace follows from its record alone, without the books before it. Querying a store for one belongs in `sinks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kalshi_platform.exchange.columnar import Decoded, decode
from kalshi_platform.journal import reader
from kalshi_platform.journal.reader import JournalError, RecordRange
from kalshi_platform.loading.shared_rows import chunks, until_record
from kalshi_platform.schema import ORDERBOOK_EVENTS, STREAM_EVENTS, TRADES

MAX_RECORDS = 4_096
"""How many records before or after a log offset are searched for traces."""


@dataclass(frozen=True)
class Trace:
    """A row of this dataset with these values."""

    dataset: str
    record: int
    conn: str
    sid: int
    seq: int
    market_ticker: str
    recv_ns: int


def last_before(folder: Path, n: int) -> list[Trace]:
    """The last record before `n` of each dataset, within `MAX_RECORDS`."""
    first = max(n - MAX_RECORDS, reader.oldest_offset(folder).n)
    by_dataset: dict[str, Trace] = {}
    for records in _ranges_near(folder, first, n):
        by_dataset |= {t.dataset: t for t in _traces(decode([records]), last=True)}
    return list(by_dataset.values())


def first_from(folder: Path, n: int) -> list[Trace]:
    """The first record from `n` on of each dataset, within `MAX_RECORDS`."""
    by_dataset: dict[str, Trace] = {}
    for records in _ranges_near(folder, n, n + MAX_RECORDS):
        by_dataset = {t.dataset: t for t in _traces(decode([records]), last=False)} | by_dataset
    return list(by_dataset.values())


def _ranges_near(folder: Path, first: int, until: int) -> Iterator[RecordRange]:
    if first >= until:
        return
    try:
        near = until_record(until, reader.read(folder, reader.offset_of(folder, first)))
        yield from (part for part in chunks(near) if isinstance(part, RecordRange))
    except JournalError:
        return  # the loader reports damage; the records before it suffice here


def _traces(decoded: Decoded, *, last: bool) -> Iterator[Trace]:
    columns = ["n", "conn", "sid", "seq", "market_ticker", "recv_ns"]
    for dataset, frame in (
        (ORDERBOOK_EVENTS.name, decoded.deltas),
        (TRADES.name, decoded.trades),
        (STREAM_EVENTS.name, decoded.stream),
    ):
        rows = frame.select(columns)
        for row in (rows.tail(1) if last else rows.head(1)).iter_rows():
            yield Trace(dataset, *row)

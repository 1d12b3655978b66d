"""What journal records leave in a store, to find out whether a store holds them without writing to it.

A trace is a row that follows from a record alone, without the books before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kalshi_platform.exchange.columnar import Decoded, decode
from kalshi_platform.journal import reader
from kalshi_platform.journal.reader import JournalError, RecordRange
from kalshi_platform.loading.shared_rows import chunks, up_to
from kalshi_platform.schema import ORDERBOOK_EVENTS, STREAM_EVENTS, TRADES

NEAR_RECORDS = 4_096
"""So many records before or after a place are looked at."""


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


def before(folder: Path, n: int) -> list[Trace]:
    """The last record before `n` of each dataset, as far as the journal has one near."""
    first = max(n - NEAR_RECORDS, reader.oldest_offset(folder).n)
    found: dict[str, Trace] = {}
    for block in _blocks(folder, first, n):
        found |= {trace.dataset: trace for trace in _traces(decode([block]), last=True)}
    return list(found.values())


def following(folder: Path, n: int) -> list[Trace]:
    """The first record from `n` on of each dataset, as far as the journal has one near."""
    found: dict[str, Trace] = {}
    for block in _blocks(folder, n, n + NEAR_RECORDS):
        found = {trace.dataset: trace for trace in _traces(decode([block]), last=False)} | found
    return list(found.values())


def _blocks(folder: Path, first: int, until: int) -> Iterator[RecordRange]:
    if first >= until:
        return
    try:
        near = up_to(until, reader.read(folder, reader.offset_of(folder, first)))
        yield from (stretch for stretch in chunks(near) if isinstance(stretch, RecordRange))
    except JournalError:
        return  # the load reports damage; what was read before it is enough here


def _traces(found: Decoded, *, last: bool) -> Iterator[Trace]:
    columns = ["n", "conn", "sid", "seq", "market_ticker", "recv_ns"]
    for dataset, frame in (
        (ORDERBOOK_EVENTS.name, found.deltas),
        (TRADES.name, found.trades),
        (STREAM_EVENTS.name, found.stream),
    ):
        rows = frame.select(columns)
        for row in (rows.tail(1) if last else rows.head(1)).iter_rows():
            yield Trace(dataset, *row)

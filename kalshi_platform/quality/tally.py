"""Add up what the journal, ClickHouse or the archive holds of each subscription.

`tally_journal` and `tally_stores` read it, batch by batch or hour by hour; `proof` compares the results.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import polars as pl

from kalshi_platform.exchange.columnar_numbers import U64, NumberSet

Subscription = tuple[str, int]
"""(conn_id, sid)"""

DELTA, TRADE, SNAPSHOT, OTHER = 0, 1, 2, 3
"""Kinds of numbered frames."""
NOT_FRAMES = ("gap", "resynced", "connected", "disconnected")
"""Kinds of stream events that are no frames of the exchange: the recorder wrote them."""


@dataclass
class Tally:
    """The rows that the journal or a store holds of one subscription."""

    placed: NumberSet = field(default_factory=NumberSet)
    """Sequence numbers of rows that have their journal record."""
    unplaced: NumberSet = field(default_factory=NumberSet)
    """Sequence numbers of rows of versions that did not keep it."""
    records: NumberSet = field(default_factory=NumberSet)
    rows: int = 0
    """Numbered rows; a snapshot counts once."""
    kinds: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    """`rows` by kind: DELTA, TRADE, SNAPSHOT, OTHER."""
    missing_levels: int = 0
    doubled_levels: int = 0
    gaps: list[tuple[int, int]] = field(default_factory=list)
    """(first, end) of the sequence numbers that each gap row names."""
    begins: datetime | None = None
    """Receive time of the first row."""
    begun: bool = False
    """Whether the row of the subscription's start is there."""

    @property
    def seqs(self) -> NumberSet:
        """All sequence numbers."""
        if not self.unplaced:
            return self.placed
        both = NumberSet()
        both.update(self.placed)
        both.update(self.unplaced)
        return both

    @property
    def repeated(self) -> int:
        """Frames with a number that an earlier record had: the exchange sent it again."""
        return len(self.records) - len(self.placed)

    @property
    def doubled(self) -> int:
        """Rows that are stored more than once, as in lossless_proof.sql."""
        return self.rows - len(self.seqs) - self.repeated + self.doubled_levels


@dataclass
class Holdings:
    """The rows that the journal or a store holds of all subscriptions."""

    subscriptions: defaultdict[Subscription, Tally] = field(
        default_factory=lambda: defaultdict(Tally)
    )
    opened: set[str] = field(default_factory=set)
    """Connections whose `connected` row is there."""
    records: defaultdict[int, NumberSet] = field(default_factory=lambda: defaultdict(NumberSet))
    """By shard, the journal records that have any row at all, numbered or not."""

    def add(self, rows: pl.DataFrame) -> None:
        """Add numbered rows: conn, sid, seq, record (null: not known), kind, ingest_ts."""
        for (conn, sid), rows_of in rows.group_by("conn", "sid"):
            tally = self.subscriptions[str(conn), int(str(sid))]
            placed = rows_of.filter(pl.col("record").is_not_null())
            tally.placed.add(_u64(placed["seq"]))
            tally.records.add(_u64(placed["record"]))
            if placed.height < rows_of.height:
                tally.unplaced.add(_u64(rows_of.filter(pl.col("record").is_null())["seq"]))
            tally.rows += rows_of.height
            counts = np.bincount(rows_of["kind"].to_numpy(), minlength=4)
            tally.kinds = [a + int(b) for a, b in zip(tally.kinds, counts, strict=True)]
            self._begins(tally, rows_of["ingest_ts"].min())

    def add_records(self, shard: pl.Series, record: pl.Series) -> None:
        """Add the journal records that rows name, numbered or not; null: not known."""
        for number in shard.drop_nulls().unique():
            self.records[number].add(_u64(record.filter(shard == number).drop_nulls()))

    def add_gaps(self, gaps: Iterable[tuple[str, int, int, int]]) -> None:
        """Add the sequence numbers that gap rows name: (conn, sid, expected, got)."""
        for conn, sid, expected, got in gaps:
            if got > expected:
                self.subscriptions[conn, sid].gaps.append((expected, got))

    def update(self, other: Holdings) -> None:
        """Add everything that `other` holds."""
        for subscription, added in other.subscriptions.items():
            tally = self.subscriptions[subscription]
            for numbers, more in (
                (tally.placed, added.placed),
                (tally.unplaced, added.unplaced),
                (tally.records, added.records),
            ):
                numbers.update(more)
            tally.rows += added.rows
            tally.kinds = [a + b for a, b in zip(tally.kinds, added.kinds, strict=True)]
            tally.missing_levels += added.missing_levels
            tally.doubled_levels += added.doubled_levels
            tally.gaps += added.gaps
            tally.begun |= added.begun
            self._begins(tally, added.begins)
        self.opened |= other.opened
        for shard, numbers in other.records.items():
            self.records[shard].update(numbers)

    def compress_idle(self) -> None:
        """Compress the numbers of subscriptions to which nothing was added lately."""
        for tally in self.subscriptions.values():
            for numbers in (tally.placed, tally.unplaced, tally.records):
                numbers.compress_idle()
        for numbers in self.records.values():
            numbers.compress_idle()

    def begins(self, conn: str) -> datetime | None:
        """Return the receive time of a connection's first numbered row."""
        return min(
            (
                t.begins
                for (c, _), t in self.subscriptions.items()
                if c == conn and t.begins is not None
            ),
            default=None,
        )

    @staticmethod
    def _begins(tally: Tally, first: object) -> None:
        if isinstance(first, datetime):
            tally.begins = first if tally.begins is None else min(tally.begins, first)


def _u64(values: pl.Series) -> U64:
    return values.cast(pl.UInt64).to_numpy()

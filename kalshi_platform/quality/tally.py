"""What one place holds of each subscription: the journal, ClickHouse or the archive.

Places are read hour by hour and added up here. Whether that is all there should be is judged in `proof`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np
import polars as pl

from kalshi_platform.exchange.columnar_numbers import U64, Numbers

Subscription = tuple[str, int]
"""(conn_id, sid)"""

DELTA, TRADE, SNAPSHOT, OTHER = 0, 1, 2, 3
"""What a numbered frame is."""
NOT_FRAMES = ("gap", "resynced", "connected", "disconnected")
"""Kinds of stream events that happened to the recording: no frame of the exchange."""


@dataclass
class Tally:
    """What a place holds of one subscription."""

    placed: Numbers = field(default_factory=Numbers)
    """The numbers of rows that name their journal record."""
    unplaced: Numbers = field(default_factory=Numbers)
    """The numbers of rows of versions that did not."""
    records: Numbers = field(default_factory=Numbers)
    rows: int = 0
    """Numbered rows; of a snapshot its own row alone."""
    kinds: list[int] = field(default_factory=lambda: [0, 0, 0, 0])
    """`rows` by what they are: DELTA, TRADE, SNAPSHOT, OTHER."""
    missing_levels: int = 0
    doubled_levels: int = 0
    gaps: list[tuple[int, int]] = field(default_factory=list)
    """(first, end) of the numbers that each gap row names."""
    begins: datetime | None = None
    """Receive time of the first row."""
    begun: bool = False
    """Whether the row of the subscription's beginning is there."""

    @property
    def seqs(self) -> Numbers:
        """All numbers."""
        if not self.unplaced:
            return self.placed
        both = Numbers()
        both.update(self.placed)
        both.update(self.unplaced)
        return both

    @property
    def repeated(self) -> int:
        """Frames with a number that another record had before: the exchange sent it again."""
        return len(self.records) - len(self.placed)

    @property
    def doubled(self) -> int:
        """Rows that are there more than once. As in lossless_proof.sql."""
        return self.rows - len(self.seqs) - self.repeated + self.doubled_levels


@dataclass
class Place:
    """What a place holds of all subscriptions."""

    of: defaultdict[Subscription, Tally] = field(default_factory=lambda: defaultdict(Tally))
    opened: set[str] = field(default_factory=set)
    """Connections of which the row of their beginning is there."""
    records: defaultdict[int, Numbers] = field(default_factory=lambda: defaultdict(Numbers))
    """By shard, the journal records that left any row at all, numbered or not."""

    def add(self, rows: pl.DataFrame) -> None:
        """Add numbered rows: conn, sid, seq, record (null: not known), kind, ingest_ts."""
        for (conn, sid), its in rows.group_by("conn", "sid"):
            tally = self.of[str(conn), int(str(sid))]
            placed = its.filter(pl.col("record").is_not_null())
            tally.placed.add(_u64(placed["seq"]))
            tally.records.add(_u64(placed["record"]))
            if placed.height < its.height:
                tally.unplaced.add(_u64(its.filter(pl.col("record").is_null())["seq"]))
            tally.rows += its.height
            counts = np.bincount(its["kind"].to_numpy(), minlength=4)
            tally.kinds = [a + int(b) for a, b in zip(tally.kinds, counts, strict=True)]
            self._begins(tally, its["ingest_ts"].min())

    def add_records(self, shard: pl.Series, record: pl.Series) -> None:
        """Add the journal records that rows name, numbered or not; null: not known."""
        for number in shard.drop_nulls().unique():
            self.records[number].add(_u64(record.filter(shard == number).drop_nulls()))

    def add_gaps(self, gaps: Iterable[tuple[str, int, int, int]]) -> None:
        """Add what gap rows name: (conn, sid, expected, got)."""
        for conn, sid, expected, got in gaps:
            if got > expected:
                self.of[conn, sid].gaps.append((expected, got))

    def update(self, other: Place) -> None:
        """Add all that another one has."""
        for of, its in other.of.items():
            tally = self.of[of]
            for mine, more in (
                (tally.placed, its.placed),
                (tally.unplaced, its.unplaced),
                (tally.records, its.records),
            ):
                mine.update(more)
            tally.rows += its.rows
            tally.kinds = [a + b for a, b in zip(tally.kinds, its.kinds, strict=True)]
            tally.missing_levels += its.missing_levels
            tally.doubled_levels += its.doubled_levels
            tally.gaps += its.gaps
            tally.begun |= its.begun
            self._begins(tally, its.begins)
        self.opened |= other.opened
        for shard, numbers in other.records.items():
            self.records[shard].update(numbers)

    def rest(self) -> None:
        """Compress what was not added to lately."""
        for tally in self.of.values():
            for numbers in (tally.placed, tally.unplaced, tally.records):
                numbers.rest()
        for numbers in self.records.values():
            numbers.rest()

    def begins(self, conn: str) -> datetime | None:
        """The receive time of a connection's first numbered row."""
        return min(
            (t.begins for (of, _), t in self.of.items() if of == conn and t.begins is not None),
            default=None,
        )

    @staticmethod
    def _begins(tally: Tally, first: object) -> None:
        if isinstance(first, datetime):
            tally.begins = first if tally.begins is None else min(tally.begins, first)


def _u64(values: pl.Series) -> U64:
    return values.cast(pl.UInt64).to_numpy()

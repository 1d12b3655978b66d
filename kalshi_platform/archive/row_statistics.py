"""Statistics of a dataset's rows: count, checksum, markets and time span. No files are read here.

Manifests, hour reports and the comparison of files are computed from these.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.archive import checksum
from kalshi_platform.arrow_columns import microseconds
from kalshi_platform.schema import Dataset


class RowStatistics:
    """Accumulates statistics of a dataset's tables; independent of their order and split."""

    def __init__(self, dataset: Dataset) -> None:
        self._time = dataset.time
        self.content = checksum.Content()
        self.by_market: Counter[str] = Counter()
        """Number of rows per market; the empty ticker stands for rows without one."""
        self.first: datetime | None = None
        """The earliest time of a row; None without rows."""
        self.last: datetime | None = None
        """The latest time of a row; None without rows."""

    def add(self, table: pa.Table) -> None:
        """Add a table, which must have all columns of the dataset."""
        if not table.num_rows:
            return
        self.content += checksum.content(table)
        if "market_ticker" in table.column_names:
            for entry in table["market_ticker"].value_counts().to_pylist():
                self.by_market[entry["values"]] += entry["counts"]
        span = pc.min_max(microseconds(table[self._time])).as_py()
        self.first = span["min"] if self.first is None else min(self.first, span["min"])
        self.last = span["max"] if self.last is None else max(self.last, span["max"])

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.content.rows

    @property
    def checksum(self) -> str:
        """The rows' checksum as a manifest has it: 16 hexadecimal digits."""
        return checksum.text(self.content.total)

    @property
    def markets(self) -> int:
        """The number of markets with rows."""
        return len(self.by_market.keys() - {""})

    def __eq__(self, other: object) -> bool:
        """Whether both have the same rows, including `shard` and `record`."""
        if not isinstance(other, RowStatistics):
            return NotImplemented
        return (self.content, self.by_market) == (other.content, other.by_market)

    __hash__ = None  # type: ignore[assignment]  # it is mutable

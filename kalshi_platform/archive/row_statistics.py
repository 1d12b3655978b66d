"""What the rows of a dataset come to: their number, checksum, markets and time span.

A manifest, a report of an hour and the comparison of two files are all made of this. No files are read here.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.archive import checksum
from kalshi_platform.schema import Dataset


class RowStatistics:
    """Statistics of tables of one dataset, in any order and cut anywhere."""

    def __init__(self, dataset: Dataset) -> None:
        self._time = dataset.time
        self.content = checksum.Content()
        self.by_market: Counter[str] = Counter()
        """Rows of each market; the empty ticker is of rows without one."""
        self.first: datetime | None = None
        """The oldest time of a row; None without rows."""
        self.last: datetime | None = None
        """The newest."""

    def add(self, table: pa.Table) -> None:
        """Count another table in; it has all columns of the dataset."""
        if not table.num_rows:
            return
        self.content += checksum.content(table)
        for entry in table["market_ticker"].value_counts().to_pylist():
            self.by_market[entry["values"]] += entry["counts"]
        span = pc.min_max(table[self._time]).as_py()
        self.first = span["min"] if self.first is None else min(self.first, span["min"])
        self.last = span["max"] if self.last is None else max(self.last, span["max"])

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.content.rows

    @property
    def checksum(self) -> str:
        """The rows' checksum as a manifest has it: 16 hexadecimal digits."""
        return checksum.text(self.content.total)

    @property
    def markets(self) -> int:
        """How many markets have rows."""
        return len(self.by_market.keys() - {""})

    def __eq__(self, other: object) -> bool:
        """Whether both are of the same rows, `shard` and `record` included."""
        if not isinstance(other, RowStatistics):
            return NotImplemented
        return (self.content, self.by_market) == (other.content, other.by_market)

    __hash__ = None  # type: ignore[assignment]  # it grows

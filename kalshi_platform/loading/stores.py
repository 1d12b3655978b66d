"""The two stores that the load writes to. Writing a journal range twice leaves each as once.

Neither knows the other: ClickHouse may be away for an hour while Parquet goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Protocol

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.loading import hours
from kalshi_platform.loading.derive import Rows
from kalshi_platform.loading.hours import HourReport
from kalshi_platform.settings import Settings
from kalshi_platform.storage import archive, clickhouse
from kalshi_platform.storage.archive import HOUR
from kalshi_platform.storage.schema import BOOK_CHECKPOINTS, DATASETS, LATEST_LEVELS, Dataset

log = logging.getLogger(__name__)


class Store(Protocol):
    """Where rows go. Every method may be called again with the same arguments, to no effect."""

    name: str
    datasets: frozenset[str]
    """What it takes of the rows."""

    def write(self, first_n: int, end_n: int, rows: Sequence[Rows]) -> None:
        """Make the rows of journal records first_n to end_n - 1 durable.

        Raises `StoreUnavailable` where another try may help, `StoreRefused` where none will.
        """

    def begin_hour(self, hour: datetime, checkpoint: pa.Table, n: int) -> None:
        """Record `n` is the first of `hour`; every earlier record has been written."""


class ClickHouseStore:
    """Inserts with deterministic tokens: a range that was inserted is not inserted again."""

    name = "clickhouse"
    datasets = frozenset(DATASETS)

    def __init__(self, settings: Settings, journal_id: str, log_comment: str = "") -> None:
        self._settings = settings
        self._journal_id = journal_id
        self._log_comment = clickhouse.comment(log_comment)  # of who makes it; a thread will use it
        self._client: clickhouse.Client | None = None

    def write(self, first_n: int, end_n: int, rows: Sequence[Rows]) -> None:
        """One insert per table. `latest_levels` goes last: it is never ahead of the events."""
        for name in rows[0].tables:
            table = concatenated([r.tables[name] for r in rows])
            if name == LATEST_LEVELS.name and len(rows) > 1:
                table = _last_of_each_level(table)
            self._insert(name, table, f"{self._journal_id}:{first_n}-{end_n}:{name}")

    def begin_hour(self, hour: datetime, checkpoint: pa.Table, n: int) -> None:
        """The books at the hour's first instant, for `book_at`."""
        token = f"{self._journal_id}:{n}:{hour:%Y-%m-%dT%H}:{BOOK_CHECKPOINTS.name}"
        self._insert(BOOK_CHECKPOINTS.name, checkpoint, token)

    def _insert(self, name: str, table: pa.Table, token: str) -> None:
        if not table.num_rows:
            return
        if self._client is None:
            self._client = clickhouse.connect(self._settings, log_comment=self._log_comment)
        clickhouse.insert_arrow(self._client, name, table, token)


class ParquetStore:
    """One file per hour that the range touches, named for the range."""

    name = "parquet"
    datasets = frozenset(name for name, dataset in DATASETS.items() if dataset.archived)

    def __init__(self, root: Path, shard: int, report: Callable[[HourReport], None]) -> None:
        self._root = root
        self._shard = shard
        self._report = report
        self._open_hour_reported: datetime | None = None
        self.bytes_written = 0

    def write(self, first_n: int, end_n: int, rows: Sequence[Rows]) -> None:
        """Write the range's files; an hour that was sealed before is sealed anew."""
        touched: set[datetime] = set()
        for name in rows[0].tables:
            table = concatenated([r.tables[name] for r in rows])
            for hour, part in by_hour(table):
                self._write_part(DATASETS[name], hour, first_n, end_n, part)
                touched.add(hour)
        for hour in sorted(touched):
            if hours.is_sealed(self._root, hour):
                with archive.changing(self._root):
                    self._seal(hour)
            elif hour != max(touched):
                self._seal(hour)
            elif self._open_hour_reported != hour:
                self._open_hour_reported = hour
                self._report(hours.describe(self._root, hour, complete=False))

    def _write_part(
        self, dataset: Dataset, hour: datetime, first_n: int, end_n: int, rows: pa.Table
    ) -> None:
        """Write an hour's part; rows that a compaction has taken in already are there."""
        name = archive.part_name(self._shard, first_n, end_n)
        late = hours.is_sealed(self._root, hour)
        with archive.changing(self._root) if late else nullcontext():
            manifest = archive.read_manifest(self._root, dataset.name, hour) if late else None
            if manifest is None or name not in manifest.merged:
                path = archive.hour_folder(self._root, dataset.name, hour) / name
                self.bytes_written += archive.write(path, [rows], dataset.arrow)

    def begin_hour(self, hour: datetime, checkpoint: pa.Table, n: int) -> None:
        """Write the checkpoint, then seal every hour that this journal has passed."""
        if checkpoint.num_rows:
            self._write_part(BOOK_CHECKPOINTS, hour, n, n, checkpoint)
        passed = {h for name in hours.RECORDED for h in archive.hours(self._root, name) if h < hour}
        for earlier in sorted(passed):
            if not hours.is_sealed(self._root, earlier):
                self._seal(earlier)

    def _seal(self, hour: datetime) -> None:
        report = hours.seal(self._root, hour)
        log.info("Sealed %s: %s", f"{hour:%Y-%m-%d %H:00}", _brief(report))
        self._report(report)


def concatenated(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables one below the other, with one dictionary a column."""
    joined = pa.concat_tables(tables)
    return joined.unify_dictionaries() if len(tables) > 1 else joined


def _last_of_each_level(table: pa.Table) -> pa.Table:
    """Of rows in order, the last of each level: the only one that matters."""
    keys = pl.DataFrame(
        {
            "ticker": pl.Series(table["market_ticker"].cast(pa.string())),
            "side": pl.Series(table["side"].cast(pa.string())),
            "price": pl.Series(table["price"]),
        }
    ).with_row_index()
    last = keys.unique(subset=["ticker", "side", "price"], keep="last", maintain_order=True)
    return table.take(last["index"].to_arrow())


def by_hour(table: pa.Table) -> list[tuple[datetime, pa.Table]]:
    """The table cut by the hour of `ingest_ts`; mostly one piece."""
    if not table.num_rows:
        return []
    span = pc.min_max(table["ingest_ts"]).as_py()
    hour, last = archive.floor_hour(span["min"]), archive.floor_hour(span["max"])
    if hour == last:
        return [(hour, table)]
    pieces = []
    while hour <= last:
        inside = pc.and_(
            pc.greater_equal(
                table["ingest_ts"], pa.scalar(hour, table.schema.field("ingest_ts").type)
            ),
            pc.less(
                table["ingest_ts"], pa.scalar(hour + HOUR, table.schema.field("ingest_ts").type)
            ),
        )
        piece = table.filter(inside)
        if piece.num_rows:
            pieces.append((hour, piece))
        hour += HOUR
    return pieces


def _brief(report: HourReport) -> str:
    return ", ".join(f"{d.dataset} {d.rows:,} rows" for d in report.datasets) or "nothing"

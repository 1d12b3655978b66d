"""Compute an hour's analytics from its archived files and write them to both stores.

    <root>/<dataset>/date=YYYY-MM-DD/hour=HH/hour.parquet, _manifest.json

The rows, their order and the file's bytes depend on the hour's recorded rows alone. Writing an hour
again replaces it: in the archive by a rename, in ClickHouse by replacing the hour's partition, so
that a kill at any instant leaves the old hour or the new one. The formulas are in the datasets' own modules.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime

import pyarrow as pa

from kalshi_platform.analytics import replay
from kalshi_platform.analytics.activity import Activity
from kalshi_platform.analytics.computed import COMPUTED
from kalshi_platform.archive import Archive, File, Manifest, Part, batches, checksum, hours
from kalshi_platform.archive.hours import DatasetHour, HourReport
from kalshi_platform.archive.row_statistics import RowStatistics
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.clickhouse import partitions
from kalshi_platform.loading.presence import known_archive
from kalshi_platform.schema import ANALYTICS, Dataset
from kalshi_platform.settings import Settings

log = logging.getLogger(__name__)

FILE = "hour.parquet"
INSERT_ROWS = 1 << 20
"""Rows of one insert, which ClickHouse holds in memory."""


@dataclass(frozen=True)
class Computed:
    """A computed hour: its activity, and the report on its datasets."""

    activity: Activity
    report: HourReport


def compute_hour(
    settings: Settings, hour: datetime, wanted: Collection[str] = tuple(COMPUTED)
) -> Computed:
    """Compute the `wanted` datasets of an hour from its archived files and write them.

    A group of markets is computed while the group before is written, so that memory does not grow with the
    hour. An hour that is not sealed is computed as it is, and reported as not complete. The report has
    the datasets with rows; one without rows leaves neither file nor partition. Raises
    `StoreRefused` and `StoreUnavailable` as the stores do; datasets written until then are whole.
    """
    archive = known_archive(settings)
    complete = hours.is_sealed(
        archive, hour
    )  # before reading, so that an hour sealed meanwhile counts as not complete
    content = ""
    if complete:
        content = hours.content_of(archive.read_manifest(name, hour) for name in hours.BOOKS_FROM)
    activity = Activity(hour)
    outputs = [_Output(archive, d, hour) for d in ANALYTICS if d.name in wanted]
    with ExitStack() as files:
        for tables in replay.ahead(
            _tables(archive, hour, [output.dataset.name for output in outputs], activity)
        ):
            for output, table in zip(outputs, tables, strict=True):
                output.add(table, files)
    reports = [
        output.report(complete=complete, gaps=activity.gaps, content=content) for output in outputs
    ]
    if settings.use_clickhouse:
        for output in outputs:
            name = output.dataset.name
            client = clickhouse.connect(settings, log_comment=f"{name} {hour:%Y-%m-%dT%H}")
            try:
                replace_hour(client, output.dataset, hour, output.written())
            finally:
                client.close()
    with_rows = tuple(report for report in reports if report is not None)
    return Computed(activity, HourReport(hour, complete, with_rows))


def _tables(
    archive: Archive, hour: datetime, names: list[str], activity: Activity
) -> Iterator[list[pa.Table]]:
    """Yield the rows of the named datasets, one group of markets at a time."""
    for books in replay.read_in_groups(archive, hour):
        activity.add(books)
        yield [COMPUTED[name](books) for name in names]


# -- the archive -------------------------------------------------------------------------------


class _Output:
    """A dataset's file of the hour while it is written, and the statistics of its rows so far."""

    def __init__(self, archive: Archive, dataset: Dataset, hour: datetime) -> None:
        self.dataset = dataset
        self._archive, self._hour = archive, hour
        self._write: Callable[[pa.Table], None] | None = None
        self._statistics = RowStatistics(dataset)

    def add(self, table: pa.Table, files: ExitStack) -> None:
        """Write the rows of a group of markets; the file appears when `files` is closed."""
        if not table.num_rows:
            return
        if self._write is None:
            writing = self._archive.writing(self.dataset.name, self._hour, FILE, self.dataset.arrow)
            self._write = files.enter_context(writing)
        self._write(table)
        self._statistics.add(table)

    def written(self) -> Iterator[pa.Table]:
        """Yield the file's rows."""
        if self._statistics.rows:
            yield from batches(self._file, self.dataset.arrow, INSERT_ROWS)

    @property
    def _file(self) -> File:
        """The file, once it has appeared."""
        files = self._archive.files(self.dataset.name, self._hour)
        return next(file for file in files if file.name == FILE)

    def report(self, *, complete: bool, gaps: int, content: str) -> DatasetHour | None:
        """Write the manifest beside the file and return the same as a report; without rows, remove both."""
        name = self.dataset.name
        if not self._statistics.rows:
            self._archive.remove_hour(name, self._hour)
            return None
        report = DatasetHour(
            dataset=name,
            hour=self._hour,
            complete=complete,
            rows=self._statistics.rows,
            files=1,
            bytes=self._file.bytes,
            markets=self._statistics.markets,
            gaps=gaps,
            verified_seconds=None,
            coverage=None,
            first=self._statistics.first,
            last=self._statistics.last,
            checksum=self._statistics.checksum,
            path=self._archive.where(name, self._hour),
        )
        self._archive.write_manifest(_manifest(report, content))
        return report


def _manifest(report: DatasetHour, content: str) -> Manifest:
    return Manifest(
        dataset=report.dataset,
        hour=report.hour.isoformat(),
        complete=report.complete,
        rows=report.rows,
        bytes=report.bytes,
        markets=report.markets,
        gaps=report.gaps,
        verified_seconds=None,
        coverage=None,
        first=report.first.isoformat() if report.first else None,
        last=report.last.isoformat() if report.last else None,
        checksum=report.checksum,
        parts=[Part(FILE, report.rows, report.bytes)],
        computed_from=content,
    )


# -- ClickHouse --------------------------------------------------------------------------------


def replace_hour(
    client: clickhouse.Client, dataset: Dataset, hour: datetime, tables: Iterable[pa.Table]
) -> None:
    """Replace the rows that ClickHouse has of the dataset's hour by those of `tables`, atomically.

    They are first collected in a staging table. A killed run may have left one behind, so it is created
    again each time, and no row in it can be doubled or missing.
    """
    # the partition's id: the hour in seconds since the epoch
    partition = str(int(hour.timestamp()))
    staging = f"{dataset.name}_staging_{hour:%Y%m%d%H}"
    rows = 0
    with partitions.replacing(client, dataset.name, partition, staging) as collected:
        for table in tables:
            if table.num_rows:
                summed = checksum.text(checksum.rows_checksum(table))
                token = f"{dataset.name}:{hour:%Y-%m-%dT%H}:{rows}:{summed}"
                clickhouse.insert_arrow(client, collected, table, token)
                rows += table.num_rows

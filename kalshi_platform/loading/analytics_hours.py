"""An hour's analytics, computed from its archived files and written to both stores.

    <root>/<dataset>/date=YYYY-MM-DD/hour=HH/hour.parquet, _manifest.json

The rows, their order and the file's bytes follow from the hour's recorded rows alone. Writing an hour
again replaces it whole: in the archive by a rename, in ClickHouse by replacing the hour's partition, so
that a kill at any instant leaves the old hour or the new one. Formulas are in `kalshi_platform.analytics`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.analytics import replay
from kalshi_platform.analytics.books import Books
from kalshi_platform.analytics.depth import depth
from kalshi_platform.analytics.imbalance import imbalance
from kalshi_platform.analytics.spreads import spreads
from kalshi_platform.loading import hours
from kalshi_platform.loading.hours import DatasetHour, HourReport
from kalshi_platform.settings import Settings
from kalshi_platform.storage import archive, checksum, clickhouse
from kalshi_platform.storage.archive import Manifest, Part
from kalshi_platform.storage.schema import (
    ANALYTICS,
    DEPTH,
    IMBALANCE,
    SPREADS,
    Dataset,
)

log = logging.getLogger(__name__)

FILE = "hour.parquet"
INSERT_ROWS = 1 << 20
"""Rows of one insert: what ClickHouse holds in memory at once."""
COMPUTED: dict[str, Callable[[Books], pa.Table]] = {
    SPREADS.name: spreads,
    DEPTH.name: depth,
    IMBALANCE.name: imbalance,
}


@dataclass(frozen=True)
class Computed:
    """An hour as it was computed: its books, its rows by dataset, and the report on them."""

    books: Books
    tables: dict[str, pa.Table]
    report: HourReport


def compute_hour(
    settings: Settings, hour: datetime, wanted: Collection[str] = tuple(COMPUTED)
) -> Computed:
    """Compute the `wanted` datasets of an hour from its archived files and write them.

    An hour that is not sealed is computed as it is, and said not to be complete. The report has the
    datasets that have rows; one without rows leaves neither file nor partition. Raises `StoreRefused`
    and `StoreUnavailable` as the stores do; what was written until then is whole.
    """
    root = settings.archive_dir
    complete = hours.is_sealed(root, hour)  # before reading: what is sealed later is read later
    of_hour = replay.read(root, hour)
    tables: dict[str, pa.Table] = {}
    reports = []
    for dataset in ANALYTICS:
        if dataset.name not in wanted:
            continue
        table = COMPUTED[dataset.name](of_hour)
        tables[dataset.name] = table
        report = _archive(root, dataset, of_hour, table, complete=complete)
        if report is not None:
            reports.append(report)
        if settings.use_clickhouse:
            client = clickhouse.connect(settings, log_comment=f"{dataset.name} {hour:%Y-%m-%dT%H}")
            try:
                replace_hour(client, dataset, hour, table)
            finally:
                client.close()
    return Computed(of_hour, tables, HourReport(hour, complete, tuple(reports)))


# -- the archive -------------------------------------------------------------------------------


def _archive(
    root: Path, dataset: Dataset, of_hour: Books, table: pa.Table, *, complete: bool
) -> DatasetHour | None:
    hour = of_hour.hour
    folder = archive.hour_folder(root, dataset.name, hour)
    if not table.num_rows:
        for path in (*archive.files(root, dataset.name, hour), folder / archive.MANIFEST):
            path.unlink(missing_ok=True)
        return None
    with ThreadPoolExecutor(1) as beside:  # both take their time, and neither holds the other up
        summed = beside.submit(checksum.rows_checksum, table)
        size = archive.write(folder / FILE, [table], dataset.arrow)
    span = pc.min_max(table[_clock(dataset)]).as_py()
    report = DatasetHour(
        dataset=dataset.name,
        hour=hour,
        complete=complete,
        rows=table.num_rows,
        files=1,
        bytes=size,
        markets=len(pc.unique(table["market_ticker"].combine_chunks().indices)),
        gaps=of_hour.gaps,
        verified_seconds=None,
        coverage=None,
        first=span["min"],
        last=span["max"],
        checksum=checksum.text(summed.result()),
        path=str(folder),
    )
    archive.write_manifest(root, _manifest(report))
    return report


def _manifest(it: DatasetHour) -> Manifest:
    return Manifest(
        dataset=it.dataset,
        hour=it.hour.isoformat(),
        complete=it.complete,
        rows=it.rows,
        bytes=it.bytes,
        markets=it.markets,
        gaps=it.gaps,
        verified_seconds=None,
        coverage=None,
        first=it.first.isoformat() if it.first else None,
        last=it.last.isoformat() if it.last else None,
        checksum=it.checksum,
        parts=[Part(FILE, it.rows, it.bytes)],
    )


def _clock(dataset: Dataset) -> str:
    return "ingest_ts" if dataset is SPREADS else "second"


# -- ClickHouse --------------------------------------------------------------------------------


def replace_hour(
    client: clickhouse.Client, dataset: Dataset, hour: datetime, table: pa.Table
) -> None:
    """Put `table` in the place of whatever ClickHouse has of the dataset's hour, at one instant.

    The rows are collected in a table of their own first. It may have been left behind by a run that was
    killed; it is made anew each time, so nothing in it can be doubled or missing.
    """
    partition = str(
        int(hour.timestamp())
    )  # the partition's id: the hour in seconds since the epoch
    staging = f"{dataset.name}_staging_{hour:%Y%m%d%H}"
    with clickhouse.translated():
        if not table.num_rows:
            client.command(f"ALTER TABLE {dataset.name} DROP PARTITION ID '{partition}'")
            return
        client.command(f"DROP TABLE IF EXISTS {staging} SYNC")
        client.command(f"CREATE TABLE {staging} AS {dataset.name}")
    for first in range(0, table.num_rows, INSERT_ROWS):
        piece = table.slice(first, INSERT_ROWS)
        token = f"{dataset.name}:{hour:%Y-%m-%dT%H}:{first}:{checksum.text(checksum.rows_checksum(piece))}"
        clickhouse.insert_arrow(client, staging, piece, token)
    with clickhouse.translated():
        client.command(
            f"ALTER TABLE {dataset.name} REPLACE PARTITION ID '{partition}' FROM {staging}"
        )
        client.command(f"DROP TABLE IF EXISTS {staging} SYNC")

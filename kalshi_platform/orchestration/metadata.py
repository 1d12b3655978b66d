"""Partition keys, column schemas and metadata of the hourly assets, as the UI shows them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import UTC, date, datetime
from typing import TYPE_CHECKING

import dagster as dg
from dagster import MetadataValue

from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import open_archive
from kalshi_platform.errors import SettingsError, StoreError
from kalshi_platform.schema import Dataset

if TYPE_CHECKING:
    from kalshi_platform.archive.hours import DatasetHour, HourReport


log = logging.getLogger(__name__)


EARLIEST = date(2018, 1, 1)
"""A day before the exchange's first. An older folder is no recording, and would make millions of partitions."""


def _begins() -> date:
    """The first day of the partitions: ARCHIVE_BEGINS, else the archive's first day, else today.

    Every process that loads the code location calls this, so nothing in the archive may make it fail: only names
    of folders are read, and if that fails, the partitions begin today.
    """
    today = datetime.now(UTC).date()
    try:
        settings = platform_settings.load()
    except SettingsError:
        return today  # the first run reports it
    if settings.archive_begins is not None:
        return settings.archive_begins
    try:
        first = open_archive(settings).first_day() or today
    except (StoreError, OSError) as error:  # OSError also for unreachable object storage
        log.warning(
            "Partitions begin today, until this is loaded again. Set ARCHIVE_BEGINS. %s", error
        )
        return today
    return min(max(first, EARLIEST), today)


HOURS = dg.HourlyPartitionsDefinition(
    start_date=f"{_begins():%Y-%m-%d}-00:00",
    timezone="UTC",
    end_offset=1,  # the hour that is still open is a partition too
)


def partition_key(hour: datetime) -> str:
    """The partition key of the hour that starts at `hour`. Raises `ValueError` for a naive datetime."""
    if hour.tzinfo is None:
        raise ValueError(f"{hour!r} has no time zone")
    return hour.astimezone(UTC).strftime(HOURS.fmt)


def hour_of(key: str) -> datetime:
    """The start of a partition's hour in UTC."""
    return datetime.strptime(key, HOURS.fmt).replace(tzinfo=UTC)


def column_schema(dataset: Dataset) -> dg.TableSchema:
    """The dataset's columns with ClickHouse's types, for the UI."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                name=column.name,
                type=column.clickhouse,
                description=column.description,
                constraints=dg.TableColumnConstraints(nullable=column.nullable),
            )
            for column in dataset.columns
        ]
    )


def materializations(report: HourReport, source: str) -> Iterator[dg.AssetMaterialization]:
    """One materialisation event per dataset of the hour."""
    for dataset in report.datasets:
        yield dg.AssetMaterialization(
            asset_key=dataset.dataset,
            partition=partition_key(report.hour),
            description=_sentence(dataset),
            metadata=hour_metadata(dataset, source),
        )


def hour_metadata(hour: DatasetHour, source: str) -> dict[str, MetadataValue]:
    """Metadata of one dataset's hour. Unknown values are left out, not zero."""
    known: dict[str, MetadataValue] = {
        "dagster/row_count": MetadataValue.int(hour.rows),
        "complete": MetadataValue.bool(hour.complete),
        "source": MetadataValue.text(source),
        "rows": MetadataValue.int(hour.rows),
        "markets": MetadataValue.int(hour.markets),
        "gaps": MetadataValue.int(hour.gaps),
    }
    if hour.coverage is not None:
        known["coverage (%)"] = MetadataValue.float(round(100 * hour.coverage, 3))
    if hour.verified_seconds is not None:
        known["verified (s)"] = MetadataValue.float(round(hour.verified_seconds, 3))
    if hour.first is not None:
        known["first"] = MetadataValue.timestamp(hour.first)
    if hour.last is not None:
        known["last"] = MetadataValue.timestamp(hour.last)
    return known | {
        "bytes": MetadataValue.int(hour.bytes),
        "files": MetadataValue.int(hour.files),
        "path": MetadataValue.path(hour.path),
        "checksum": MetadataValue.text(hour.checksum),
    }


def rebuilt_metadata(report: HourReport) -> dict[str, MetadataValue]:
    """Metadata that says what an hour was rebuilt from."""
    source = report.rebuilt_from or "nothing: the archive's files are as they were"
    return {"rebuilt from": MetadataValue.text(source)}


def nothing_metadata(source: str, reason: str) -> dict[str, MetadataValue]:
    """Metadata of an hour without rows and files.

    Such an hour is materialised, too: a backfill counts a partition without a materialisation as failed even if
    its run succeeded, and an hour that was not recorded is no failure.
    """
    return {
        "dagster/row_count": MetadataValue.int(0),
        "rows": MetadataValue.int(0),
        "files": MetadataValue.int(0),
        "source": MetadataValue.text(source),
        "reason": MetadataValue.text(reason),
    }


def reported_rows(instance: dg.DagsterInstance, dataset: str, key: str) -> int:
    """The rows of a dataset's hour as last reported to Dagster; 0 if it never was."""
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=dg.AssetKey(dataset), asset_partitions=[key]), limit=1
    ).records
    event = records[0].asset_materialization if records else None
    rows = event.metadata.get("rows") if event is not None else None
    return int(str(rows.value)) if rows is not None else 0


def _sentence(hour: DatasetHour) -> str:
    state = "sealed" if hour.complete else "still open"
    return (
        f"{hour.rows:,} rows of {hour.markets:,} markets, {hour.gaps:,} gaps; the hour is {state}."
    )

"""Compaction in Dagster: the job, and its schedule. What it does is in archive/compaction.py.

An hour keeps its rows, so it is observed and not materialised anew: nothing downstream runs for it.

No `from __future__ import annotations` in modules that define ops: Dagster reads the types.
"""

from datetime import datetime
from typing import TYPE_CHECKING

import dagster as dg
from dagster import MetadataValue

from kalshi_platform.errors import PlatformError
from kalshi_platform.orchestration.metadata import partition_key
from kalshi_platform.orchestration.resources import KalshiResource

if TYPE_CHECKING:
    from kalshi_platform.archive.compaction import Compacted
    from kalshi_platform.errors import StoreError


@dg.op(description="Every sealed hour that still has parts becomes one sorted file per dataset.")
def compact_hours(context: dg.OpExecutionContext, platform: KalshiResource) -> None:
    """Compact what is pending; hours that are refused are told at the end, after all the others."""
    from kalshi_platform.archive import compaction
    from kalshi_platform.loading.presence import known_archive

    compacted: list[Compacted] = []
    refusals: list[str] = []

    def done(it: "Compacted") -> None:
        compacted.append(it)
        context.log.info(
            f"{it.dataset} {it.hour:%Y-%m-%d %H:00} UTC: {it.rows:,} rows, {it.files_before} files to 1,"
            f" {it.bytes_before:,} bytes to {it.bytes_after:,}"
        )
        context.log_event(_observation(it))

    def refused(hour: datetime, error: "StoreError") -> None:
        refusals.append(str(error))
        context.log.warning(f"{hour:%Y-%m-%d %H:00} UTC was not compacted: {error}")

    try:
        archive = known_archive(platform.settings())
        wanted = compaction.pending(archive)
        context.log.info(f"{len(wanted)} sealed hours in {archive} have parts.")
        compaction.compact(archive, wanted, done, refused)
    except PlatformError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error
    summary: dict[str, MetadataValue] = {
        "hours": MetadataValue.int(len({it.hour for it in compacted})),
        "rows": MetadataValue.int(sum(it.rows for it in compacted)),
        "files before": MetadataValue.int(sum(it.files_before for it in compacted)),
        "files after": MetadataValue.int(len(compacted)),
        "bytes before": MetadataValue.int(sum(it.bytes_before for it in compacted)),
        "bytes after": MetadataValue.int(sum(it.bytes_after for it in compacted)),
    }
    if refusals:
        raise dg.Failure(
            description=f"{len(refusals)} of {len(wanted)} hours were not compacted: {refusals[0]}",
            metadata=summary | {"not compacted": MetadataValue.json(refusals)},
            allow_retries=False,
        )
    context.add_output_metadata(summary)


def _observation(it: "Compacted") -> dg.AssetObservation:
    return dg.AssetObservation(
        asset_key=it.dataset,
        partition=partition_key(it.hour),
        description=f"Compacted: {it.files_before} files became one, with the same rows.",
        metadata={
            "compacted": MetadataValue.bool(True),
            "rows": MetadataValue.int(it.rows),
            "files before": MetadataValue.int(it.files_before),
            "files": MetadataValue.int(1),
            "bytes before": MetadataValue.int(it.bytes_before),
            "bytes": MetadataValue.int(it.bytes_after),
            "bytes per row": MetadataValue.float(round(it.bytes_after / it.rows, 3)),
            "checksum": MetadataValue.text(it.checksum),
        },
    )


@dg.job(description="The archive's sealed hours, one sorted file each. Safe beside every reader.")
def parquet_compaction() -> None:
    """One step: `compact_hours`."""
    compact_hours()


parquet_compaction_schedule = dg.ScheduleDefinition(
    name="parquet_compaction_schedule",
    job=parquet_compaction,
    cron_schedule="20 * * * *",  # the hour's checks and analytics have read its parts by then
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
)

JOBS = (parquet_compaction,)
SCHEDULES = (parquet_compaction_schedule,)

"""The compaction job and its schedule; the compaction itself is in archive/compaction.py.

A compacted hour keeps its rows, so it is reported as an observation, not as a materialisation: nothing
downstream runs for it.

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
    """Compact every pending hour; the run fails at the end if any was refused."""
    from kalshi_platform.archive import compaction
    from kalshi_platform.loading.presence import known_archive

    compacted: list[Compacted] = []
    refusals: list[str] = []

    def done(hour: "Compacted") -> None:
        compacted.append(hour)
        context.log.info(
            f"{hour.dataset} {hour.hour:%Y-%m-%d %H:00} UTC: {hour.rows:,} rows, {hour.files_before} files to 1,"
            f" {hour.bytes_before:,} bytes to {hour.bytes_after:,}"
        )
        context.log_event(_observation(hour))

    def refused(hour: datetime, error: "StoreError") -> None:
        refusals.append(str(error))
        context.log.warning(f"{hour:%Y-%m-%d %H:00} UTC was not compacted: {error}")

    try:
        archive = known_archive(platform.settings())
        pending = compaction.pending(archive)
        context.log.info(f"{len(pending)} sealed hours in {archive} have parts.")
        compaction.compact(archive, pending, done, refused)
    except PlatformError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error
    summary: dict[str, MetadataValue] = {
        "hours": MetadataValue.int(len({hour.hour for hour in compacted})),
        "rows": MetadataValue.int(sum(hour.rows for hour in compacted)),
        "files before": MetadataValue.int(sum(hour.files_before for hour in compacted)),
        "files after": MetadataValue.int(len(compacted)),
        "bytes before": MetadataValue.int(sum(hour.bytes_before for hour in compacted)),
        "bytes after": MetadataValue.int(sum(hour.bytes_after for hour in compacted)),
    }
    if refusals:
        raise dg.Failure(
            description=f"{len(refusals)} of {len(pending)} hours were not compacted: {refusals[0]}",
            metadata=summary | {"not compacted": MetadataValue.json(refusals)},
            allow_retries=False,
        )
    context.add_output_metadata(summary)


def _observation(compacted: "Compacted") -> dg.AssetObservation:
    return dg.AssetObservation(
        asset_key=compacted.dataset,
        partition=partition_key(compacted.hour),
        description=f"Compacted: {compacted.files_before} files became one, with the same rows.",
        metadata={
            "compacted": MetadataValue.bool(True),
            "rows": MetadataValue.int(compacted.rows),
            "files before": MetadataValue.int(compacted.files_before),
            "files": MetadataValue.int(1),
            "bytes before": MetadataValue.int(compacted.bytes_before),
            "bytes": MetadataValue.int(compacted.bytes_after),
            "bytes per row": MetadataValue.float(round(compacted.bytes_after / compacted.rows, 3)),
            "checksum": MetadataValue.text(compacted.checksum),
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

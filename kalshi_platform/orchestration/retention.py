"""The daily job `retention`: deletes expired data and measures the rest.

Each part runs even if another failed; the run then fails and names the failed parts. Dagster's own history is
deleted in `history.py`. The journal is pruned every ten minutes by its streamer, which alone knows what the
stores have; here it is only measured.

No `from __future__ import annotations` in modules that define ops: Dagster reads the types.
"""

from collections.abc import Callable, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster import MetadataValue

from kalshi_platform.errors import PlatformError
from kalshi_platform.orchestration.resources import KalshiResource

if TYPE_CHECKING:
    from kalshi_platform.settings import Settings

WITHIN_S = 1200.0
"""Seconds for deleting runs; the rest is deleted tomorrow. The runs of a year take a few days."""


@dg.op(name="let_go", description="Deletes expired data, and measures what is kept.")
def apply_retention(context: dg.OpExecutionContext, platform: KalshiResource) -> None:
    """Apply every retention, one part after the other."""
    settings = platform.settings()
    metadata: dict[str, MetadataValue] = {}
    failures: list[str] = []
    parts: Mapping[str, Callable[[], Mapping[str, Any]]] = {
        "Dagster's history": lambda: _history(context.instance, settings),
        "ClickHouse": lambda: _hot_tables(settings, context.log.warning),
        "the archive's replaced hours": lambda: _replaced_hours(settings),
        "frames": lambda: _frames(settings),
        "what is kept": lambda: _kept(settings),
    }
    for name, part in parts.items():
        try:
            metadata |= part()
        except (PlatformError, OSError) as error:
            failures.append(f"{name}: {error}")
            context.log.error(failures[-1])
    if failures:
        raise dg.Failure(description=" ".join(failures), metadata=metadata, allow_retries=False)
    context.add_output_metadata(metadata)


def _history(instance: dg.DagsterInstance, settings: "Settings") -> Mapping[str, Any]:
    """Delete old Dagster history."""
    from kalshi_platform.orchestration import history

    days = timedelta(days=settings.dagster_run_retention_days)
    purged = history.purge(instance, datetime.now(UTC) - days, WITHIN_S)
    return {
        "runs deleted": MetadataValue.int(purged.runs),
        "old runs kept for what they made": MetadataValue.int(purged.kept),
        "old runs left for tomorrow": MetadataValue.int(purged.left),
        "check results deleted": MetadataValue.int(purged.check_results),
        "bytes of run files deleted": MetadataValue.int(purged.files_bytes),
    }


def _hot_tables(settings: "Settings", notify: Callable[[str], None]) -> Mapping[str, Any]:
    """Apply HOT_RETENTION_DAYS if it is set, so that a new value needs no restart."""
    from kalshi_platform.clickhouse import hot_retention as hot
    from kalshi_platform.clickhouse import migrations
    from kalshi_platform.clickhouse.client import connect

    if not settings.use_clickhouse:
        return {}
    with closing(connect(settings, log_comment="retention")) as client:
        changed = migrations.update_retention(client, settings, notify=notify)
        kept = hot.in_words(hot.kept(client).values())
    return {
        "kept in ClickHouse": MetadataValue.text(kept),
        "tables whose retention changed": MetadataValue.text(
            "; ".join(map(str, changed)) or "none"
        ),
    }


def _replaced_hours(settings: "Settings") -> Mapping[str, Any]:
    """Delete the hours that a compaction has replaced."""
    from kalshi_platform.archive import ASIDE, compaction, open_archive
    from kalshi_platform.errors import StoreUnavailable
    from kalshi_platform.health.metrics import folder_bytes

    aside = settings.archive_dir / ASIDE
    before = folder_bytes(aside)
    if not before:
        return {"bytes of replaced hours deleted": MetadataValue.int(0)}
    try:
        compaction.sweep(open_archive(settings))
    except StoreUnavailable:
        return {}  # a compaction holds the lock, and deletes them itself
    freed = max(before - folder_bytes(aside), 0)
    return {"bytes of replaced hours deleted": MetadataValue.int(freed)}


def _frames(settings: "Settings") -> Mapping[str, Any]:
    """Delete the archive's frames of hours older than FRAMES_RETENTION_DAYS."""
    from kalshi_platform.loading.frames_retention import delete_expired
    from kalshi_platform.loading.presence import known_archive

    if not settings.frames_retention_days:
        return {}
    before = datetime.now(UTC) - timedelta(days=settings.frames_retention_days)
    hours = delete_expired(known_archive(settings), before)
    return {"hours of frames deleted": MetadataValue.int(len(hours))}


def _kept(settings: "Settings") -> Mapping[str, Any]:
    """Sizes and growth rates, each of which the UI plots over time."""
    from kalshi_platform.health import growth

    metadata: dict[str, Any] = {}
    found = growth.measure(settings)
    for item in found:
        metadata[f"{item.name} (bytes)"] = MetadataValue.int(item.bytes)
        if item.per_day is not None:
            metadata[f"{item.name} (bytes a day)"] = MetadataValue.int(round(item.per_day))
    same_disk = [item for item in found if growth.on_disk_of(item, settings.data_dir)]
    free = growth.free_bytes(settings.data_dir)
    metadata["free (bytes)"] = MetadataValue.int(free)
    until = growth.days_until_full(same_disk, free)
    if until is not None:
        metadata["days until the disk is full"] = MetadataValue.float(until)
    return metadata


@dg.job(
    description=(
        "Deletes old runs, check results, replaced hours and frames (FRAMES_RETENTION_DAYS), applies"
        " HOT_RETENTION_DAYS, and measures"
        " what is kept. docs/operations.md says what is kept how long."
    )
)
def retention() -> None:
    """One step: `apply_retention`."""
    apply_retention()


retention_schedule = dg.ScheduleDefinition(
    name="retention_schedule",
    job=retention,
    cron_schedule="37 3 * * *",  # away from the hourly schedules
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
)

JOBS = (retention,)
SCHEDULES = (retention_schedule,)

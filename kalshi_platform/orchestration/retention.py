"""`retention`: once a day, what is past its time goes, and what is kept is measured.

Each part is tried even if another failed; the run then fails and says which. How Dagster's own history
is let go is in `history.py`. The journal is pruned by its streamer every ten minutes, which alone knows
what the stores have: here it is measured only.

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
"""Time for deleting runs; what is left goes tomorrow. A year of them is gone after a few days."""


@dg.op(description="Lets go of what is past its retention, and measures what is kept.")
def let_go(context: dg.OpExecutionContext, platform: KalshiResource) -> None:
    """Everything that has a retention, one part after the other."""
    settings = platform.settings()
    metadata: dict[str, MetadataValue] = {}
    failures: list[str] = []
    parts: Mapping[str, Callable[[], Mapping[str, Any]]] = {
        "Dagster's history": lambda: _history(context.instance, settings),
        "ClickHouse": lambda: _hot_tables(settings, context.log.warning),
        "the archive's replaced hours": lambda: _replaced_hours(settings),
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
    from kalshi_platform.orchestration import history

    days = timedelta(days=settings.dagster_run_retention_days)
    gone = history.let_go(instance, datetime.now(UTC) - days, WITHIN_S)
    return {
        "runs deleted": MetadataValue.int(gone.runs),
        "old runs kept for what they made": MetadataValue.int(gone.kept),
        "old runs left for tomorrow": MetadataValue.int(gone.left),
        "check results deleted": MetadataValue.int(gone.check_results),
        "bytes of run files deleted": MetadataValue.int(gone.files_bytes),
    }


def _hot_tables(settings: "Settings", notify: Callable[[str], None]) -> Mapping[str, Any]:
    """Apply HOT_RETENTION_DAYS, where it is set: nothing has to be restarted for it."""
    from kalshi_platform.clickhouse import hot_retention as hot
    from kalshi_platform.clickhouse import migrations
    from kalshi_platform.clickhouse.client import connect

    if not settings.use_clickhouse:
        return {}
    with closing(connect(settings, log_comment="retention")) as client:
        changed = migrations.keep(client, settings, notify=notify)
        kept = hot.in_words(hot.kept(client).values())
    return {
        "kept in ClickHouse": MetadataValue.text(kept),
        "tables whose retention changed": MetadataValue.text(
            "; ".join(map(str, changed)) or "none"
        ),
    }


def _replaced_hours(settings: "Settings") -> Mapping[str, Any]:
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
        return {}  # a compaction is at work, and does the same
    freed = max(before - folder_bytes(aside), 0)
    return {"bytes of replaced hours deleted": MetadataValue.int(freed)}


def _kept(settings: "Settings") -> Mapping[str, Any]:
    """Sizes and rates: the UI draws each number over the days."""
    from kalshi_platform.health import growth

    metadata: dict[str, Any] = {}
    found = growth.measure(settings)
    for each in found:
        metadata[f"{each.name} (bytes)"] = MetadataValue.int(each.bytes)
        if each.per_day is not None:
            metadata[f"{each.name} (bytes a day)"] = MetadataValue.int(round(each.per_day))
    here = [each for each in found if growth.on_disk_of(each, settings.data_dir)]
    free = growth.free_bytes(settings.data_dir)
    metadata["free (bytes)"] = MetadataValue.int(free)
    until = growth.days_until_full(here, free)
    if until is not None:
        metadata["days until the disk is full"] = MetadataValue.float(until)
    return metadata


@dg.job(
    description=(
        "Lets go of old runs, check results and replaced hours, applies HOT_RETENTION_DAYS, and measures"
        " what is kept. docs/operations.md says what stays how long."
    )
)
def retention() -> None:
    """One step: `let_go`."""
    let_go()


retention_schedule = dg.ScheduleDefinition(
    name="retention_schedule",
    job=retention,
    cron_schedule="37 3 * * *",  # between two hours' work
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
)

JOBS = (retention,)
SCHEDULES = (retention_schedule,)

"""The recorded datasets as assets: hours that the streamer reports, and that can be rebuilt.

The rebuild itself is in loading/rebuild.py.

No `from __future__ import annotations` in modules that define ops: Dagster reads the types.
"""

from collections.abc import Iterator

import dagster as dg

from kalshi_platform.errors import PlatformError
from kalshi_platform.orchestration.metadata import (
    HOURS,
    column_schema,
    hour_metadata,
    hour_of,
    nothing_metadata,
    rebuilt_metadata,
    reported_rows,
)
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.schema import (
    FRAMES,
    LATEST_LEVELS,
    ORDERBOOK_EVENTS,
    RECORDED,
    Dataset,
)

REBUILD_POOL = "rebuild"
"""Rebuilds run one at a time: two of one hour would do the same work twice."""

_OWNER = ["team:recording"]


def _spec(dataset: Dataset) -> dg.AssetSpec:
    return dg.AssetSpec(
        dataset.name,
        description=dataset.description,
        group_name="recording",
        kinds={"clickhouse", "parquet"} if dataset.hot else {"parquet"},
        owners=_OWNER,
        tags={"layer": "raw"},
        metadata={
            "dagster/column_schema": column_schema(dataset),
            "dagster/table_name": dataset.name,
            "docs": dg.MetadataValue.path("docs/data.md"),
        },
        skippable=True,  # an hour with no data is missing, not empty
    )


@dg.multi_asset(
    name="recorded_hour",
    specs=[_spec(dataset) for dataset in RECORDED],
    partitions_def=HOURS,
    can_subset=True,
    pool=REBUILD_POOL,
    backfill_policy=dg.BackfillPolicy.multi_run(),
    description=(
        "An hour of the recording. The streamer reports it; materialise it to rebuild it from the"
        " journal while that is kept, else from the archive's frames, else from ClickHouse. The rows stay the same,"
        " and columns of later versions are filled; `rebuilt from` says what was used."
        " The hour that is still open is described as it is now."
    ),
)
def recorded_hour(
    context: dg.AssetExecutionContext, platform: KalshiResource
) -> Iterator[dg.MaterializeResult[None]]:
    """Rebuild one hour, once for all selected datasets."""
    hour = hour_of(context.partition_key)
    try:
        report = platform.rebuild(hour)
        source = platform.source
    except PlatformError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error
    wanted = {key.to_user_string() for key in context.selected_asset_keys}
    for dataset in report.datasets:
        if dataset.dataset in wanted:
            yield dg.MaterializeResult(
                asset_key=dataset.dataset,
                metadata=hour_metadata(dataset, source) | rebuilt_metadata(report),
            )
    reason = (
        f"No rows of this dataset in the hour {context.partition_key} UTC."
        if report.datasets
        else f"Nothing is recorded of the hour {context.partition_key} UTC."
    )
    for name in sorted(wanted - {dataset.dataset for dataset in report.datasets}):
        rows = reported_rows(context.instance, name, context.partition_key)
        if rows and not (name == FRAMES.name and platform.frames_expired(hour)):
            raise dg.Failure(
                description=f"{name} had {rows:,} rows in the hour {context.partition_key} UTC, and neither"
                " the archive nor a journal nor ClickHouse has them now. Restore the archive from a"
                " backup (docs/operations.md).",
                allow_retries=False,
            )
        context.log.warning("%s: %s", name, reason)
        yield dg.MaterializeResult(asset_key=name, metadata=nothing_metadata(source, reason))


latest_levels = dg.AssetSpec(
    LATEST_LEVELS.name,
    description=f"{LATEST_LEVELS.description} ClickHouse only; the streamer keeps it current.",
    deps=[ORDERBOOK_EVENTS.name],
    group_name="recording",
    kinds={"clickhouse"},
    owners=_OWNER,
    tags={"layer": "live"},
    metadata={
        "dagster/column_schema": column_schema(LATEST_LEVELS),
        "dagster/table_name": LATEST_LEVELS.name,
        "docs": dg.MetadataValue.path("docs/data.md"),
    },
)

ASSETS = (recorded_hour, latest_levels)

"""Spreads, depth and imbalance as assets, computed automatically for each recorded hour.

The formulas are in `kalshi_platform/analytics`; here are the assets, their automation and their metadata.

No `from __future__ import annotations` in modules that define ops: Dagster reads the types.
"""

import base64
from collections.abc import Iterator
from typing import TYPE_CHECKING

import dagster as dg
from dagster import AutomationCondition, MetadataValue

from kalshi_platform.errors import NothingRecorded, PlatformError, StoreUnavailable
from kalshi_platform.orchestration.metadata import (
    HOURS,
    column_schema,
    hour_metadata,
    hour_of,
    nothing_metadata,
    reported_rows,
)
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.schema import (
    ANALYTICS,
    BOOK_CHECKPOINTS,
    ORDERBOOK_EVENTS,
    STREAM_EVENTS,
    Dataset,
)

if TYPE_CHECKING:
    from datetime import datetime

    import pyarrow as pa

    from kalshi_platform.analytics.activity import Activity

ANALYTICS_POOL = "analytics"
"""Hours are computed one at a time: each may use both cores and a gigabyte of memory."""
RETRIES, RETRY_S = 5, 20.0
"""Retries while a store is unavailable: after 20 s, then doubled each time, ten minutes in all."""
PREVIEW_ROWS = 10
DOCS = "docs/reading-the-archive.md"

# `eager` alone takes only the latest hour and would skip late and rebuilt hours. The hour in which a recording
# begins has no checkpoints but must be computed, too.
WHEN_AN_HOUR_LANDS = (
    AutomationCondition.eager()
    .without(AutomationCondition.in_latest_time_window())
    .replace(
        "any_deps_missing",
        AutomationCondition.any_deps_missing().allow(
            dg.AssetSelection.assets(ORDERBOOK_EVENTS.name)
        ),
    )
)


def _spec(dataset: Dataset) -> dg.AssetSpec:
    return dg.AssetSpec(
        dataset.name,
        deps=[ORDERBOOK_EVENTS.name, BOOK_CHECKPOINTS.name, STREAM_EVENTS.name],
        description=f"{dataset.description} Formulas: kalshi_platform/analytics/{dataset.name}.py.",
        group_name="analytics",
        kinds={"clickhouse", "parquet"},
        owners=["team:research"],
        tags={"layer": "derived"},
        metadata={
            "dagster/column_schema": column_schema(dataset),
            "dagster/table_name": dataset.name,
            "docs": MetadataValue.path(DOCS),
        },
        automation_condition=WHEN_AN_HOUR_LANDS,
        skippable=True,  # an hour in which no market had a book is missing, not empty
    )


@dg.multi_asset(
    name="analytics_hour",
    specs=[_spec(dataset) for dataset in ANALYTICS],
    partitions_def=HOURS,
    can_subset=True,
    pool=ANALYTICS_POOL,
    backfill_policy=dg.BackfillPolicy.multi_run(),
    description=(
        "An hour of spreads, depth and imbalance, computed from that hour's recorded files alone. It runs"
        " automatically when an hour lands or is rebuilt, and is deterministic. The open hour is computed"
        " as it is, is marked as not complete, and is computed again when sealed."
    ),
)
def analytics_hour(
    context: dg.AssetExecutionContext, platform: KalshiResource
) -> Iterator[dg.MaterializeResult[None]]:
    """Compute one hour, once for all selected datasets."""
    from kalshi_platform.analytics.hourly import compute_hour  # loads Arrow and numpy

    wanted = {key.to_user_string() for key in context.selected_asset_keys}
    try:
        computed = compute_hour(platform.settings(), hour_of(context.partition_key), wanted)
    except NothingRecorded as error:
        if reported_rows(context.instance, ORDERBOOK_EVENTS.name, context.partition_key):
            raise dg.Failure(description=str(error), allow_retries=False) from error
        yield from _nothing(context, platform, wanted, str(error))
        return
    except StoreUnavailable as error:
        context.log.warning(str(error))
        raise dg.RetryRequested(RETRIES, RETRY_S * 2**context.retry_number) from error
    except PlatformError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error
    busiest = computed.activity.busiest()
    for report in computed.report.datasets:
        table = _rows_of(platform, report.dataset, computed.activity.hour, busiest)
        yield dg.MaterializeResult(
            asset_key=report.dataset,
            metadata={
                "plot": _picture(report.dataset, computed.activity, table),
                **hour_metadata(report, platform.source),
                "preview": _preview(busiest[:1], table),
            },
        )
    empty = wanted - {report.dataset for report in computed.report.datasets}
    yield from _nothing(context, platform, empty, "No market had a book in this hour.")


def _nothing(
    context: dg.AssetExecutionContext, platform: KalshiResource, names: set[str], reason: str
) -> Iterator[dg.MaterializeResult[None]]:
    """Report an hour without rows for these datasets."""
    for name in sorted(names):
        context.log.warning("%s: %s", name, reason)
        yield dg.MaterializeResult(
            asset_key=name, metadata=nothing_metadata(platform.source, reason)
        )


def _rows_of(
    platform: KalshiResource, dataset: str, hour: "datetime", tickers: list[str]
) -> "pa.Table":
    """The hour's rows of some markets, read back from the archive."""
    import pyarrow as pa

    from kalshi_platform.archive import open_archive

    archive = open_archive(platform.settings())
    return pa.concat_tables(archive.read(dataset, hour, tickers=tickers))


def _picture(dataset: str, activity: "Activity", table: "pa.Table") -> MetadataValue:
    from kalshi_platform.analytics.plots import plot

    encoded = base64.b64encode(plot(dataset, activity, table)).decode()
    return MetadataValue.md(f"![{dataset}](data:image/png;base64,{encoded})")


def _preview(tickers: list[str], table: "pa.Table") -> MetadataValue:
    """The last rows of these markets in the hour."""
    import pyarrow as pa
    import pyarrow.compute as pc

    rows = table.filter(pc.is_in(table["market_ticker"].cast(pa.string()), pa.array(tickers)))
    last = rows.slice(max(rows.num_rows - PREVIEW_ROWS, 0)).to_pylist()
    return MetadataValue.table(
        records=[
            dg.TableRecord({k: v if isinstance(v, bool) else _text(v) for k, v in row.items()})
            for row in last
        ],
        schema=dg.TableSchema([dg.TableColumn(name) for name in table.column_names]),
    )


def _text(value: object) -> str:
    return "" if value is None else str(value)


analytics_automation = dg.AutomationConditionSensorDefinition(
    "analytics_automation",
    target=dg.AssetSelection.groups("analytics"),
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=60,
    description="Computes spreads, depth and imbalance of every hour that lands, also late ones.",
)

ASSETS = (analytics_hour,)

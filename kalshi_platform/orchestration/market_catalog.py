"""The asset `market_catalog`: the followed markets, read from the exchange every hour.

How the markets are read and stored is in recorder/market_catalog.py.

No `from __future__ import annotations` in modules that define ops: Dagster reads the types.
"""

import time
from collections import Counter
from typing import TYPE_CHECKING

import dagster as dg
from dagster import MetadataValue

from kalshi_platform.errors import PlatformError
from kalshi_platform.orchestration.metadata import column_schema
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.schema import MARKET_CATALOG

if TYPE_CHECKING:
    import pyarrow as pa

PREVIEW_ROWS = 20
PREVIEWED = (
    "market_ticker",
    "title",
    "status",
    "open_time",
    "close_time",
    "price_level_structure",
    "last_price",
    "volume",
    "result",
)


@dg.asset(
    name=MARKET_CATALOG.name,
    group_name="recording",
    kinds={"clickhouse", "parquet"},
    owners=["team:recording"],
    tags={"layer": "raw"},
    metadata={
        "dagster/column_schema": column_schema(MARKET_CATALOG),
        "dagster/table_name": MARKET_CATALOG.name,
        "docs": MetadataValue.path("docs/data.md"),
    },
    description=(
        f"{MARKET_CATALOG.description} Read from the exchange's REST interface; a market stays in it for"
        " good, and is read again until it is finalized."
    ),
)
def market_catalog(platform: KalshiResource) -> dg.MaterializeResult[None]:
    """Read the selected markets from the exchange, and store the catalogue."""
    from kalshi_platform.exchange.rest import RestClient
    from kalshi_platform.recorder import market_catalog as catalogue

    settings = platform.settings()
    try:
        with RestClient(settings.exchange) as rest:
            catalog = catalogue.take(settings, rest)
        file = catalogue.store(settings, catalog)
    except PlatformError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error
    statuses = Counter(catalog.known["status"].to_pylist())
    return dg.MaterializeResult(
        metadata={
            "dagster/row_count": MetadataValue.int(catalog.known.num_rows),
            "markets": MetadataValue.int(catalog.known.num_rows),
            "read": MetadataValue.int(catalog.read.num_rows),
            "new": MetadataValue.int(catalog.new),
            "statuses": MetadataValue.json(dict(sorted(statuses.items()))),
            "as of": MetadataValue.timestamp(catalog.as_of),
            "source": MetadataValue.text(platform.source),
            "path": MetadataValue.path(file.path),
            "preview": _preview(catalog.read),
        }
    )


def _preview(read: "pa.Table") -> MetadataValue:
    """The most traded markets of those that were read."""
    rows = read.select(PREVIEWED).sort_by([("volume", "descending"), ("close_time", "ascending")])
    return MetadataValue.table(
        records=[
            dg.TableRecord({name: "" if v is None else str(v) for name, v in row.items()})
            for row in rows.slice(0, PREVIEW_ROWS).to_pylist()
        ],
        schema=dg.TableSchema(columns=[dg.TableColumn(name) for name in PREVIEWED]),
    )


market_catalog_job = dg.define_asset_job(
    "market_catalog_job",
    selection=dg.AssetSelection.assets(MARKET_CATALOG.name),
    description="The followed markets, read from the exchange.",
)
market_catalog_schedule = dg.ScheduleDefinition(
    name="market_catalog_schedule",
    job=market_catalog_job,
    cron_schedule="5 * * * *",  # markets that open on the hour have opened by then
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
)

READ_EVERY_S = 3_900.0
"""Age in seconds from which the sensor reads the catalogue: the schedule reads it each hour."""
TRY_AGAIN_S = 300.0
"""Shortest interval in seconds between two starts of the job, whatever their result."""


@dg.sensor(
    name="market_catalog_at_start",
    job=market_catalog_job,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Reads the markets at the first start, and when the schedule has missed its hour.",
)
def market_catalog_at_start(context: dg.SensorEvaluationContext) -> dg.SensorResult:
    """Request a run if the catalogue is missing or old, and no run has just begun.

    The cursor is the time when it was read, so that most ticks need not query Dagster's databases.
    """
    now = time.time()
    if context.cursor and 0.0 <= now - float(context.cursor) < READ_EVERY_S:
        return _skip(f"Read {now - float(context.cursor):.0f} s ago, or since.", context.cursor)
    event = context.instance.get_latest_materialization_event(dg.AssetKey(MARKET_CATALOG.name))
    if event is not None and now - event.timestamp < READ_EVERY_S:
        return _skip(f"Read {now - event.timestamp:.0f} s ago.", repr(event.timestamp))
    runs = context.instance.get_run_records(
        dg.RunsFilter(job_name=market_catalog_job.name), limit=1
    )
    if runs and now - runs[0].create_timestamp.timestamp() < TRY_AGAIN_S:
        return _skip("A run of the job has just begun.")
    return dg.SensorResult(run_requests=[dg.RunRequest()])


def _skip(reason: str, cursor: str | None = None) -> dg.SensorResult:
    return dg.SensorResult(skip_reason=dg.SkipReason(reason), cursor=cursor)


ASSETS = (market_catalog,)
JOBS = (market_catalog_job,)
SCHEDULES = (market_catalog_schedule,)
SENSORS = (market_catalog_at_start,)

"""`market_catalog` in Dagster: what the followed markets are, read from the exchange every hour.

No `from __future__ import annotations` in modules that define ops: Dagster reads the types.
"""

from collections import Counter
from typing import TYPE_CHECKING

import dagster as dg
from dagster import MetadataValue

from kalshi_platform.errors import PlatformError
from kalshi_platform.orchestration.metadata import column_schema
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.storage.schema import MARKET_CATALOG

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
    """Read the markets that the settings name, and write what is known of them."""
    from kalshi_platform.exchange.rest import RestClient
    from kalshi_platform.loading import market_catalog as catalogue

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
    """The most traded of the markets that were read."""
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
    description="What the followed markets are, read from the exchange.",
)
market_catalog_schedule = dg.ScheduleDefinition(
    name="market_catalog_schedule",
    job=market_catalog_job,
    cron_schedule="5 * * * *",  # what opens on the hour has opened
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
)

ASSETS = (market_catalog,)
JOBS = (market_catalog_job,)
SCHEDULES = (market_catalog_schedule,)

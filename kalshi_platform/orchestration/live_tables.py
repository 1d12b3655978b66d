"""Observations of the live tables: rows, newest row, rate.

The streamer and the engines write their rows outside of Dagster's runs, so the UI would otherwise show nothing
about them. Whether the rows are right is decided by checks, not here.

No `from __future__ import annotations` in modules that define ops: Dagster reads the types.
"""

from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING

import dagster as dg
from dagster import MetadataValue

from kalshi_platform.errors import PlatformError
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.schema import LATEST_LEVELS

if TYPE_CHECKING:
    from kalshi_platform.clickhouse.client import Client

EVERY_S = 300
TIMEOUT_S = 10
"""Seconds without data after which a query is abandoned: a sensor has a minute."""
TIME_COLUMNS: Mapping[str, str] = {
    LATEST_LEVELS.name: LATEST_LEVELS.time,
    "mm_decisions": "ts",
    "mm_order_actions": "ts",
    "mm_order_responses": "ts",
}
"""The observed tables, with the column that holds a row's time."""


@dg.sensor(
    name="live_tables",
    minimum_interval_seconds=EVERY_S,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Observes the tables that the streamer and the engines write: rows, newest, rate.",
)
def live_tables(context: dg.SensorEvaluationContext, platform: KalshiResource) -> dg.SensorResult:
    """Report one observation for each of the tables that exist."""
    from kalshi_platform.clickhouse.client import connect

    settings = platform.settings()
    if not settings.use_clickhouse:
        return dg.SensorResult(skip_reason=dg.SkipReason("USE_CLICKHOUSE=0: there are no tables."))
    patient = settings.model_copy(update={"clickhouse_timeout_seconds": TIMEOUT_S})
    try:
        with closing(connect(patient, log_comment="live_tables")) as client:
            return dg.SensorResult(asset_events=list(observations(client)))
    except PlatformError as error:
        return dg.SensorResult(skip_reason=dg.SkipReason(str(error)))


def observations(client: "Client") -> Iterator[dg.AssetObservation]:
    """The current state of each table; missing tables are left out."""
    from kalshi_platform.clickhouse.client import translated

    with translated():
        found = client.query(
            "SELECT name FROM system.tables WHERE database = currentDatabase() AND name IN {names:Array(String)}",
            parameters={"names": list(TIME_COLUMNS)},
        )
        for name in sorted(str(row[0]) for row in found.result_rows):
            column = TIME_COLUMNS[name]
            rows, newest, age_s, recent = client.query(
                f"SELECT count(), max({column}), dateDiff('second', max({column}), now()),"  # noqa: S608
                f" countIf({column} > now() - INTERVAL 5 MINUTE) FROM {name}"  # constants, no user text
            ).result_rows[0]
            metadata: dict[str, MetadataValue] = {
                "dagster/row_count": MetadataValue.int(rows),
                "rows a minute": MetadataValue.float(recent / 5),
            }
            if rows:
                metadata["newest"] = MetadataValue.timestamp(newest.timestamp())
                metadata["age of the newest (s)"] = MetadataValue.int(age_s)
            yield dg.AssetObservation(name, metadata=metadata)


SENSORS = (live_tables,)

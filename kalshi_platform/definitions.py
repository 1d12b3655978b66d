"""The Dagster code location: collects the definitions of `orchestration`.

Importing it opens no file and no connection.
"""

from __future__ import annotations

import dagster as dg

from kalshi_platform.orchestration import (
    analytics,
    checks,
    compaction,
    console,
    inventory,
    live_tables,
    market_catalog,
    retention,
)
from kalshi_platform.orchestration.alerts import alerts
from kalshi_platform.orchestration.recorded_tables import ASSETS
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.orchestration.sensors import streamer_supervisor
from kalshi_platform.orchestration.streamer import stream_orderbook

console.configure()

defs = dg.Definitions(
    assets=[*ASSETS, *market_catalog.ASSETS, *analytics.ASSETS, *inventory.ASSETS],
    asset_checks=[*checks.CHECKS, *inventory.CHECKS],
    jobs=[
        stream_orderbook,
        *market_catalog.JOBS,
        *checks.JOBS,
        *compaction.JOBS,
        *inventory.JOBS,
        *retention.JOBS,
    ],
    schedules=[
        *market_catalog.SCHEDULES,
        *checks.SCHEDULES,
        *compaction.SCHEDULES,
        *inventory.SCHEDULES,
        *retention.SCHEDULES,
    ],
    sensors=[
        streamer_supervisor,
        analytics.analytics_automation,
        alerts,
        *market_catalog.SENSORS,
        *live_tables.SENSORS,
    ],
    resources={"platform": KalshiResource()},
    executor=dg.in_process_executor,  # one process per run: Arrow's threads use the cores
)

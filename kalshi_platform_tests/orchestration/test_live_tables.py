"""Observations of the tables that no Dagster run writes."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import dagster as dg

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.orchestration import live_tables
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform_tests.clickhouse.tables import prepare
from kalshi_platform_tests.ports import free_ports


def tick(instance: dg.DagsterInstance, overrides: dict[str, str]) -> dg.SensorResult:
    with dg.build_sensor_context(
        instance=instance, resources={"platform": KalshiResource(overrides=overrides)}
    ) as context:
        result = live_tables.live_tables(context)
    assert isinstance(result, dg.SensorResult)
    return result


def test_each_live_table_is_observed_with_rows_and_age(
    instance: dg.DagsterInstance, tmp_path: Path, clickhouse_url: str, clickhouse_database: str
) -> None:
    overrides = {
        "kalshi_data_dir": str(tmp_path),
        "clickhouse_url": clickhouse_url,
        "clickhouse_database": clickhouse_database,
        "hot_retention_days": "36500",
    }
    settings = platform_settings.load(_env_file=None, **overrides)
    prepare(settings)
    client = clickhouse.connect(settings)
    client.command(
        "INSERT INTO mm_decisions (ts, market_ticker) VALUES (now64(3) - 7, 'A-1'), (now64(3) - 7000, 'A-1')"
    )
    events = tick(instance, overrides).asset_events
    shown = {event.asset_key.to_user_string(): event.metadata for event in events}
    assert set(shown) == set(live_tables.TIME_COLUMNS)
    decisions = shown["mm_decisions"]
    assert decisions["dagster/row_count"].value == 2
    assert 6 <= int(str(decisions["age of the newest (s)"].value)) < 60
    assert decisions["rows a minute"].value == 1 / 5
    newest = float(str(decisions["newest"].value))
    assert abs(datetime.now(UTC).timestamp() - 7 - newest) < 60
    assert shown["mm_order_actions"]["dagster/row_count"].value == 0
    assert "newest" not in shown["mm_order_actions"]


def test_a_clickhouse_that_is_away_is_a_reason_to_skip(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    (port,) = free_ports(1)
    overrides = {
        "kalshi_data_dir": str(tmp_path),
        "clickhouse_url": f"http://127.0.0.1:{port}",
    }
    result = tick(instance, overrides)
    assert not result.asset_events
    assert str(port) in str(result.skip_reason)

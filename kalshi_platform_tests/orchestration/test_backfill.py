"""A backfill by the daemon over several hours, one of which was not recorded."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.test_utils import create_test_daemon_workspace_context
from dagster._core.workspace.load_target import ModuleTarget
from dagster._daemon.backfill import execute_backfill_iteration
from dagster._daemon.run_coordinator.queued_run_coordinator_daemon import QueuedRunCoordinatorDaemon

from kalshi_platform.orchestration.metadata import partition_key
from kalshi_platform_tests.analytics.recording import HOUR, record_hour

PATIENCE_S = 150.0
UNRECORDED = "2026-09-21-12:00"


@pytest.fixture
def instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dg.DagsterInstance]:
    """An instance whose runs are processes of their own, as under `up`."""
    monkeypatch.setenv("KALSHI_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("USE_CLICKHOUSE", "0")
    home = tmp_path / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    with dg.DagsterInstance.get() as made:
        yield made


def carried_out(instance: dg.DagsterInstance, asset: str, hours: list[str]) -> BulkActionStatus:
    """Request a backfill as the UI does, and run the daemon's loops until it has ended."""
    key = dg.AssetKey(asset)
    log = logging.getLogger(__name__)
    with create_test_daemon_workspace_context(
        ModuleTarget("kalshi_platform.definitions", None, None, "kalshi_platform"), instance
    ) as workspace:
        graph = workspace.create_request_context().asset_graph
        backfill: Any = PartitionBackfill.from_asset_partitions(
            backfill_id="asked",
            asset_graph=graph,
            partition_names=hours,
            asset_selection=[key],
            backfill_timestamp=time.time(),
            tags={},
            dynamic_partitions_store=instance,
            all_partitions=False,
            title=None,
            description=None,
            run_config=None,
        )
        instance.add_backfill(backfill)
        queue = QueuedRunCoordinatorDaemon(interval_seconds=1)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            list(execute_backfill_iteration(workspace, log))
            list(queue.run_iteration(workspace))
            found = instance.get_backfill("asked")
            assert found is not None
            if found.status is not BulkActionStatus.REQUESTED:
                return found.status
            assert time.monotonic() < deadline, found.status
            time.sleep(0.5)


def test_a_backfill_over_an_hour_that_was_not_recorded_completes(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    record_hour(tmp_path / "data" / "parquet")
    hours = [UNRECORDED, partition_key(HOUR)]
    assert carried_out(instance, "spreads", hours) is BulkActionStatus.COMPLETED_SUCCESS
    events = instance.fetch_materializations(dg.AssetKey("spreads"), limit=10).records
    rows = {
        str(event.partition_key): event.asset_materialization.metadata["rows"].value
        for event in events
        if event.asset_materialization is not None
    }
    assert set(rows) == set(hours)
    assert rows[UNRECORDED] == 0
    assert rows[partition_key(HOUR)] != 0

"""The compaction job on a real archive and a real Dagster instance."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pytest

from kalshi_platform.archive import LocalArchive, hours, part_name, write_durably
from kalshi_platform.orchestration.compaction import (
    parquet_compaction,
    parquet_compaction_schedule,
)
from kalshi_platform.orchestration.metadata import partition_key
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.schema import STREAM_EVENTS, ZERO_UUID
from kalshi_platform.utc_hours import floor_hour
from kalshi_platform_tests.archived import paths

HOUR = floor_hour(datetime.now(UTC)) - timedelta(hours=2)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An archive of one sealed hour in three parts."""
    for n in range(3):
        row = {
            "ingest_ts": HOUR + timedelta(minutes=n),
            "conn_id": ZERO_UUID,
            "sid": 0,
            "seq": 0,
            "kind": "heartbeat",
            "market_ticker": "",
            "detail": "{}",
        }
        path = LocalArchive(tmp_path / "parquet").folder(STREAM_EVENTS.name, HOUR)
        table = pa.Table.from_pylist([row], schema=STREAM_EVENTS.arrow)
        write_durably(path / part_name(0, n, n + 1), [table], STREAM_EVENTS.arrow)
    hours.seal(LocalArchive(tmp_path / "parquet"), HOUR)
    return tmp_path / "parquet"


def run(instance: dg.DagsterInstance, root: Path) -> dg.ExecuteInProcessResult:
    platform = KalshiResource(
        overrides={"kalshi_data_dir": str(root.parent), "use_clickhouse": "0"}
    )
    return parquet_compaction.execute_in_process(
        instance=instance, resources={"platform": platform}, raise_on_error=False
    )


def test_the_job_compacts_hours_and_only_observes_them(
    instance: dg.DagsterInstance, root: Path
) -> None:
    result = run(instance, root)
    assert result.success
    (event,) = [e for e in result.all_events if e.event_type_value == "ASSET_OBSERVATION"]
    observed = event.asset_observation_data.asset_observation
    assert observed.asset_key == dg.AssetKey(STREAM_EVENTS.name)
    assert observed.partition == partition_key(HOUR)
    assert observed.metadata["files before"].value == 3
    assert instance.get_latest_materialization_event(dg.AssetKey(STREAM_EVENTS.name)) is None
    (path,) = paths(root, STREAM_EVENTS.name, HOUR)
    assert path.name.startswith(hours.COMPACTED)
    again = run(instance, root)
    assert again.success
    assert not [e for e in again.all_events if e.event_type_value == "ASSET_OBSERVATION"]


def test_an_hour_that_is_refused_fails_the_run_with_its_sentence(
    instance: dg.DagsterInstance, root: Path
) -> None:
    paths(root, STREAM_EVENTS.name, HOUR)[0].unlink()
    result = run(instance, root)
    assert not result.success
    (failed,) = result.get_step_failure_events()
    failure = failed.step_failure_data.user_failure_data
    assert failure is not None
    assert "its manifest says 3" in str(failure.description)


def test_the_schedule_is_hourly_and_runs_by_default() -> None:
    assert parquet_compaction_schedule.default_status == dg.DefaultScheduleStatus.RUNNING
    assert parquet_compaction_schedule.cron_schedule == "20 * * * *"

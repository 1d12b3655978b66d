"""`retention` on a real instance on disk: old history is deleted for good, the latest state is kept."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster import DagsterRunStatus as Status
from dagster._core.instance import RUNLESS_RUN_ID
from dagster._core.storage.event_log.schema import SqlEventLogStorageTable as Events
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from sqlalchemy import select

from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.client import connect
from kalshi_platform.orchestration import history
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.orchestration.retention import retention
from kalshi_platform.orchestration.streamer import stream_orderbook

HOURS = dg.HourlyPartitionsDefinition(start_date="2026-11-01-00:00", timezone="UTC")
KEY = dg.AssetKey("recorded")
CHECK = dg.AssetCheckKey(KEY, "sound")
SOON = timedelta(seconds=5)


@dg.asset(partitions_def=HOURS)
def recorded() -> dg.MaterializeResult[None]:
    return dg.MaterializeResult(metadata={"rows": 1})


@dg.asset_check(asset="recorded")
def sound() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=True)


@dg.op
def work() -> None:
    return None


@dg.job
def nothing_lasting() -> None:
    work()


DEFS = dg.Definitions(
    assets=[recorded],
    asset_checks=[sound],
    jobs=[
        nothing_lasting,
        dg.define_asset_job("record", dg.AssetSelection.assets("recorded")),
        dg.define_asset_job("check", dg.AssetSelection.checks(sound)),
    ],
)


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance on disk, as `up` creates it."""
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as made:
        yield made


def run(instance: dg.DagsterInstance, job: str, hour: str | None = None) -> str:
    found = DEFS.resolve_job_def(job)
    return found.execute_in_process(instance=instance, partition_key=hour).run_id


def purge(instance: dg.DagsterInstance, within_s: float = 60.0) -> history.Purged:
    """Purge as if every finished run were old."""
    return history.purge(instance, datetime.now(UTC) + SOON, within_s)


def shard(instance: dg.DagsterInstance, run_id: str) -> Path:
    storage = instance.event_log_storage
    assert isinstance(storage, SqliteEventLogStorage)
    return Path(storage.path_for_shard(run_id))


def test_a_run_without_results_is_deleted_with_events_and_file(
    instance: dg.DagsterInstance,
) -> None:
    run_id = run(instance, "nothing_lasting")
    assert shard(instance, run_id).exists()
    purged = purge(instance)
    assert (purged.runs, purged.kept, purged.left) == (1, 0, 0)
    assert purged.files_bytes > 100_000
    assert instance.get_run_by_id(run_id) is None
    assert not shard(instance, run_id).exists()


def test_every_partition_stays_materialised(
    instance: dg.DagsterInstance,
) -> None:
    hours = ["2026-11-02-00:00", "2026-11-02-01:00"]
    first = [run(instance, "record", hour) for hour in hours]
    again = run(instance, "record", hours[0])
    before = instance.get_status_by_partition(KEY, hours, HOURS)
    purged = purge(instance)
    assert (purged.runs, purged.kept) == (1, 2)
    assert instance.get_run_by_id(first[0]) is None
    assert instance.get_run_by_id(first[1]) is not None
    assert instance.get_run_by_id(again) is not None
    assert instance.get_materialized_partitions(KEY) == set(hours)
    assert instance.get_status_by_partition(KEY, hours, HOURS) == before


def test_only_the_latest_result_of_a_check_is_kept(
    instance: dg.DagsterInstance,
) -> None:
    runs = [run(instance, "check") for _ in range(4)]
    purged = purge(instance)
    assert (purged.runs, purged.kept, purged.check_results) == (3, 1, 3)
    history_of = instance.event_log_storage.get_asset_check_execution_history(CHECK, limit=10)
    assert [event.run_id for event in history_of] == [runs[-1]]


def test_what_is_not_old_and_what_has_not_finished_is_left_alone(
    instance: dg.DagsterInstance,
) -> None:
    young = run(instance, "nothing_lasting")
    streaming = instance.create_run_for_job(stream_orderbook, status=Status.STARTED)
    an_hour_ago = datetime.now(UTC) - timedelta(hours=1)
    assert history.purge(instance, an_hour_ago, 60.0).runs == 0
    assert purge(instance).runs == 1
    assert instance.get_run_by_id(young) is None
    assert instance.get_run_by_id(streaming.run_id) is not None


def test_of_old_observations_the_latest_of_each_asset_stays(instance: dg.DagsterInstance) -> None:
    for number in range(3):
        for asset in ("one", "other"):
            instance.report_runless_asset_event(
                dg.AssetObservation(asset, metadata={"number": number})
            )
    purge(instance)
    for asset in ("one", "other"):
        kept = instance.fetch_observations(dg.AssetKey(asset), limit=10).records
        assert [
            r.asset_observation.metadata["number"].value for r in kept if r.asset_observation
        ] == [2]
    storage = instance.event_log_storage
    assert isinstance(storage, SqliteEventLogStorage)
    with storage.run_connection(RUNLESS_RUN_ID) as connection:
        assert len(connection.execute(select(Events.c.id)).fetchall()) == 2


def test_what_the_time_is_not_enough_for_is_left_and_said(instance: dg.DagsterInstance) -> None:
    for _ in range(3):
        run(instance, "nothing_lasting")
    purged = purge(instance, within_s=-1.0)
    assert (purged.runs, purged.left) == (0, 3)
    assert purge(instance).left == 0


def test_orphaned_files_are_deleted_and_new_ones_kept(
    instance: dg.DagsterInstance,
) -> None:
    run_id = run(instance, "nothing_lasting")
    instance.delete_run(run_id)  # and then killed, before its file was removed
    orphan = shard(instance, run_id)
    purge(instance)
    assert orphan.exists()  # it might be about to be recorded
    long_ago = time.time() - 2 * history.ORPHAN_S
    os.utime(orphan, (long_ago, long_ago))
    purge(instance)
    assert not orphan.exists()


def test_what_an_old_run_printed_goes_even_where_the_run_stays(
    instance: dg.DagsterInstance,
) -> None:
    kept = run(instance, "record", "2026-11-02-00:00")
    folder = Path(instance.storage_directory()) / kept
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "out").write_text("said long ago")
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (1e9, 1e9))
    purge(instance)
    assert instance.get_run_by_id(kept) is not None
    assert not folder.exists()


def retained(
    instance: dg.DagsterInstance, overrides: Mapping[str, str], *, good: bool = True
) -> dict[str, Any]:
    """Run the job; returns its metadata."""
    found = retention.execute_in_process(
        instance=instance,
        resources={"platform": KalshiResource(overrides=dict(overrides))},
        raise_on_error=False,
    )
    assert found.success == good
    if not good:
        failed = found.failure_data_for_node("let_go")
        assert failed is not None
        assert failed.user_failure_data is not None
        return {"failure": failed.user_failure_data.description}
    (output,) = [event.step_output_data for event in found.all_events if event.is_successful_output]
    return {name: value.value for name, value in output.metadata.items()}


def test_the_job_reports_deletions_and_applies_new_days(
    instance: dg.DagsterInstance, clickhouse_url: str, clickhouse_database: str, tmp_path: Path
) -> None:
    overrides = {
        "kalshi_data_dir": str(tmp_path / "data"),
        "clickhouse_url": clickhouse_url,
        "clickhouse_database": clickhouse_database,
    }
    settings = KalshiResource(overrides=overrides).settings()
    migrations.migrate(settings)
    run(instance, "nothing_lasting")
    values = retained(instance, overrides | {"hot_retention_days": "5"})
    assert values["runs deleted"] == 0  # it is not seven days old
    assert "orderbook_events" in values["tables whose retention changed"]
    assert values["free (bytes)"] > 0
    assert values["ClickHouse (bytes)"] >= 0
    with closing(connect(settings)) as client:
        ddl = client.command("SHOW CREATE TABLE orderbook_events")
    assert "toIntervalDay(5)" in str(ddl)
    again = retained(instance, overrides | {"hot_retention_days": "5"})
    assert again["tables whose retention changed"] == "none"


def test_an_unreachable_clickhouse_fails_only_its_part(
    instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    overrides = {"kalshi_data_dir": str(tmp_path), "clickhouse_url": "http://127.0.0.1:9"}
    values = retained(instance, overrides, good=False)
    assert values["failure"].startswith("ClickHouse: ClickHouse at http://127.0.0.1:9 cannot")

"""The code location and the files at the root that lead to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml  # type: ignore[import-untyped]
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.scheduler.instigation import TickStatus

from kalshi_platform.errors import SettingsError
from kalshi_platform.orchestration.host.home import prepare, shipped
from kalshi_platform.settings import Settings

LOAD = """
import json, sys, threading
before = threading.active_count()
from kalshi_platform.definitions import defs
repository = defs.get_repository_def()
repository.load_all_definitions()
print(json.dumps({
    "assets": sorted(key.to_user_string() for key in repository.asset_graph.get_all_asset_keys()),
    "jobs": sorted(job for job in repository.job_names if not job.startswith("__")),
    "schedules": {s.name: s.default_status.value for s in repository.schedule_defs},
    "sensors": {s.name: s.default_status.value for s in repository.sensor_defs},
    "loaded": sorted({"polars", "chdb", "clickhouse_connect", "websockets"} & set(sys.modules)),
    "threads": threading.active_count() - before,
}))
"""


def test_the_code_location_loads_without_settings_or_files(
    tmp_path: Path,
) -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(loaded.stdout) == {
        "assets": [
            "book_checkpoints",
            "depth",
            "frames",
            "imbalance",
            "latest_levels",
            "market_catalog",
            "mm_decisions",
            "mm_order_actions",
            "mm_order_responses",
            "mm_position_snapshots",
            "orderbook_events",
            "spreads",
            "stream_events",
            "trades",
        ],
        "jobs": [
            "inventory_qa",
            "market_catalog_job",
            "mm_position_snapshots_job",
            "order_book_checks",
            "parquet_compaction",
            "retention",
            "stream_orderbook",
        ],
        "schedules": {
            "inventory_qa_schedule": "RUNNING",
            "market_catalog_schedule": "RUNNING",
            "mm_position_snapshots_schedule": "RUNNING",
            "order_book_checks_schedule": "RUNNING",
            "parquet_compaction_schedule": "RUNNING",
            "retention_schedule": "RUNNING",
        },
        "sensors": {
            "alerts": "RUNNING",
            "analytics_automation": "RUNNING",
            "live_tables": "RUNNING",
            "market_catalog_at_start": "RUNNING",
            "streamer_supervisor": "RUNNING",
        },
        "loaded": [],
        "threads": 0,
    }
    assert list(tmp_path.iterdir()) == []


def test_workspace_yaml_names_the_module_of_the_definitions() -> None:
    target = yaml.safe_load(shipped("workspace.yaml").read_text())["load_from"][0]["python_module"]
    assert target == {
        "module_name": "kalshi_platform.definitions",
        "location_name": "kalshi_platform",
    }


def test_dagster_keeps_everything_in_the_data_folder(tmp_path: Path) -> None:
    data = tmp_path / "somewhere else"
    home = prepare(data, tmp_path / "code.sock", 7)
    with dg.DagsterInstance.from_config(str(home.folder)) as instance:
        assert not instance.telemetry_enabled
        assert not instance.nux_enabled
        limits = instance.get_concurrency_config().run_queue_config
        assert limits is not None
        assert [limit["key"] for limit in limits.tag_concurrency_limits] == ["kalshi/shard"]
    config = yaml.safe_load((home.folder / "dagster.yaml").read_text())
    for section in ("local_artifact_storage", "compute_logs"):
        assert config[section]["config"]["base_dir"].startswith(str(data / "dagster"))
    assert config["storage"]["sqlite"]["base_dir"] == str(data / "dagster" / "storage")


def test_every_shard_has_a_place_of_its_own_among_the_runs(tmp_path: Path) -> None:
    def places(shards: int) -> int:
        home = prepare(tmp_path / str(shards), tmp_path / "code.sock", 7, shards)
        config = yaml.safe_load((home.folder / "dagster.yaml").read_text())
        return int(config["concurrency"]["runs"]["max_concurrent_runs"])

    assert places(5) == places(1) + 4


def test_ticks_stay_as_long_as_the_settings_say(tmp_path: Path) -> None:
    prepare(tmp_path, tmp_path / "code.sock", 3)
    with dg.DagsterInstance.from_config(str(tmp_path / "dagster")) as instance:
        for kind in InstigatorType:
            days = instance.get_tick_retention_settings(kind)
            assert (days[TickStatus.SKIPPED], days[TickStatus.SUCCESS]) == (1, 3)


def test_dagster_dev_and_up_share_history_and_retention() -> None:
    root = yaml.safe_load(shipped("dagster.yaml").read_text())
    ticks = Settings.model_fields["dagster_tick_retention_days"].default
    for kind in root["retention"].values():
        assert kind["purge_after_days"] == {"skipped": 1, "success": ticks, "failure": ticks}
    assert root["storage"]["sqlite"]["base_dir"] == "data/dagster/storage"


def test_a_data_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    in_the_way = tmp_path / "data"
    in_the_way.write_text("a file")
    with pytest.raises(SettingsError, match=r"KALSHI_DATA_DIR is .*data"):
        prepare(in_the_way, tmp_path / "code.sock", 7)


def test_every_asset_has_description_owner_and_documentation() -> None:
    from kalshi_platform.definitions import defs

    for spec in defs.resolve_all_asset_specs():
        name = spec.key.to_user_string()
        assert spec.description, name
        assert spec.group_name in {"recording", "analytics", "inventory"}, name
        assert spec.owners, name
        assert spec.kinds, name
        assert spec.tags["layer"] in {"raw", "derived", "live"}, name
        assert spec.metadata["dagster/column_schema"].columns, name
        page = shipped("dagster.yaml").parent / str(spec.metadata["docs"].value)
        assert page.is_file(), f"{name} is described in {page}, which is not there"

"""Dagster as `infra/` deploys it, on a real Postgres: code server, daemon and streamer as processes of
their own, with the files that go into the image. What is missing of a container is the container.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml  # type: ignore[import-untyped]
from dagster import DagsterRunStatus as Status

from kalshi_platform.simulator.server import Simulator
from kalshi_platform_tests.infra import postgres
from kalshi_platform_tests.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
INFRA = ROOT / "infra" / "dagster"

needs_postgres = pytest.mark.skipif(postgres.why_not() is not None, reason=str(postgres.why_not()))


def test_all_settings_but_the_storages_equal_one_machine() -> None:
    one, many = (
        yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in (ROOT / "dagster.yaml", INFRA / "dagster.yaml")
    )
    stored = {"storage", "local_artifact_storage", "compute_logs"}
    assert {k: v for k, v in one.items() if k not in stored} == {
        k: v for k, v in many.items() if k not in stored
    }
    assert one.keys() == many.keys()


@pytest.fixture(scope="module")
def postgres_port() -> Iterator[int]:
    """The port of a Postgres of this module."""
    with postgres.running() as port:
        yield port


@pytest.fixture
def home(tmp_path: Path, postgres_port: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DAGSTER_HOME of the deployed files; the environment is the code location's."""
    folder = tmp_path / "home"
    shutil.copytree(INFRA, folder)
    for made in re.findall(r"/opt/dagster/(\S+)", (ROOT / "infra/docker/Dockerfile").read_text()):
        (folder / made).mkdir()
    [port] = free_ports(1)
    workspace = folder / "workspace.yaml"
    workspace.write_text(workspace.read_text().replace("port: 4000", f"port: {port}"))
    values = {
        "DAGSTER_HOME": folder,
        "DAGSTER_LOCAL_DIR": tmp_path / "local",
        "DAGSTER_PG_HOST": "127.0.0.1",
        "DAGSTER_PG_PORT": postgres_port,
        "DAGSTER_PG_DB": postgres.DATABASE,
        "DAGSTER_PG_USERNAME": postgres.USER,
        "DAGSTER_PG_PASSWORD": postgres.PASSWORD,
        "KALSHI_CODE_HOST": "127.0.0.1",
        "KALSHI_DATA_DIR": tmp_path / "data",
        "USE_CLICKHOUSE": "0",
        "CODE_PORT": port,
    }
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    return folder


@contextmanager
def process(log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that leads a process group, as a container's first process does."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield child
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait(10)


def eventually(label: str, found: Callable[[], Any], seconds: float = 180.0) -> Any:
    """Wait until `found` returns something; returns that."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds:.0f} s: {label}")


@needs_postgres
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_signal_to_the_group_ends_the_streamer_in_order(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    start_simulator: Callable[..., Simulator],
) -> None:
    simulator = start_simulator(markets=3, rate=20)
    for name, value in {
        "PROD_KEYID": simulator.key_id,
        "PROD_KEYFILE": str(simulator.key_file),
        "KALSHI_WS_URL": simulator.ws_url,
        "KALSHI_REST_URL": simulator.rest_url,
        "MARKET_TICKERS": ",".join(simulator.books()),
    }.items():
        monkeypatch.setenv(name, value)
    deployed = sorted(home.rglob("*"))
    health = tmp_path / "data" / "journal" / "shard-0" / "health.json"

    def state() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(health.read_bytes()) if health.exists() else {}
        return found

    with ExitStack() as stack:
        code = stack.enter_context(
            process(
                tmp_path / "code.log",
                *("kalshi_platform.orchestration.host.code_server", "api", "grpc"),
                *("--host", "127.0.0.1"),
                *("--port", os.environ["CODE_PORT"]),
                *("--module-name", "kalshi_platform.definitions"),
            )
        )
        ask = [sys.executable, "-m", "dagster", "api", "grpc-health-check", "--port"]
        eventually(
            "the health check of the Compose file passes",
            lambda: (
                subprocess.run(
                    [*ask, os.environ["CODE_PORT"]], check=False, capture_output=True
                ).returncode
                == 0
            ),
        )
        workspace = ("--workspace", str(home / "workspace.yaml"))
        stack.enter_context(process(tmp_path / "daemon.log", "dagster._daemon", "run", *workspace))
        instance = stack.enter_context(dg.DagsterInstance.get())
        assert type(instance.run_storage).__name__ == "PostgresRunStorage"
        eventually(
            "the supervisor's run records",
            lambda: state().get("state") == "streaming" and state()["frames"],
        )
        (run,) = instance.get_runs(dg.RunsFilter(job_name="stream_orderbook"))
        assert run.status is Status.STARTED
        key = dg.AssetKey("orderbook_events")
        eventually("the open hour is reported", lambda: instance.get_materialized_partitions(key))

        os.killpg(code.pid, signal.SIGTERM)  # what `tini -g` does
        code.wait(90)
        assert state()["state"] == "stopped"
        assert state()["lag_frames"] == 0
        ended = instance.get_run_by_id(run.run_id)
        assert ended is not None
        assert ended.is_finished
    assert sorted(home.rglob("*")) == deployed  # it may be read-only


@needs_postgres
@pytest.mark.slow
def test_a_materialised_partition_is_kept_in_postgres(home: Path) -> None:
    partitions = dg.HourlyPartitionsDefinition("2026-11-20-00:00")

    @dg.asset(partitions_def=partitions, pool="kalshi")
    def hourly(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        return dg.MaterializeResult(metadata={"rows": len(context.partition_key)})

    for partition in ("2026-11-20-14:00", "2026-11-20-15:00", "2026-11-20-15:00"):
        with dg.DagsterInstance.get() as instance:  # a process each time, as far as Dagster sees
            assert dg.materialize([hourly], partition_key=partition, instance=instance).success
    with dg.DagsterInstance.get() as instance:
        assert instance.get_materialized_partitions(hourly.key) == {
            "2026-11-20-14:00",
            "2026-11-20-15:00",
        }
        records = instance.fetch_materializations(hourly.key, limit=10).records
        assert len(records) == 3
    assert home.is_dir()

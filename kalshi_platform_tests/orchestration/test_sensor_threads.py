"""A waiting sensor delays no other, since each has its own thread in the daemon."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.scheduler.instigation import TickStatus
from dagster._core.test_utils import create_test_daemon_workspace_context
from dagster._core.workspace.load_target import PythonFileTarget
from dagster._daemon.controller import create_daemon_of_type
from dagster._daemon.daemon import SensorDaemon

from kalshi_platform.definitions import defs
from kalshi_platform.orchestration.host.home import prepare

TWO_SENSORS = """
import time
from pathlib import Path
import dagster as dg

released = Path(__file__).with_name("released")

@dg.sensor(minimum_interval_seconds=1, default_status=dg.DefaultSensorStatus.RUNNING, job_name="job")
def waits():
    deadline = time.monotonic() + 55
    while not released.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return dg.SkipReason("waited")

@dg.sensor(minimum_interval_seconds=1, default_status=dg.DefaultSensorStatus.RUNNING, job_name="job")
def ticks():
    return dg.SkipReason("ticked")

@dg.op
def op(): pass

@dg.job
def job(): op()

defs = dg.Definitions(sensors=[waits, ticks], jobs=[job])
"""


def test_there_is_a_thread_for_each_sensor(tmp_path: Path) -> None:
    home = prepare(tmp_path, tmp_path / "code.sock", 7).folder
    sensors = list(defs.get_repository_def().sensor_defs)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        settings = instance.get_sensor_settings()
    assert settings["use_threads"]
    assert settings["num_workers"] >= len(sensors)


@pytest.mark.slow
def test_a_waiting_sensor_does_not_delay_the_others(tmp_path: Path) -> None:
    home = prepare(tmp_path, tmp_path / "code.sock", 7).folder
    code = tmp_path / "two_sensors.py"
    code.write_text(TWO_SENSORS)
    over = threading.Event()
    target = PythonFileTarget(
        str(code), attribute=None, working_directory=None, location_name="two"
    )
    with (
        dg.DagsterInstance.from_config(str(home)) as instance,
        create_test_daemon_workspace_context(target, instance) as workspace,
    ):
        daemon = create_daemon_of_type(SensorDaemon.daemon_type(), instance)

        def evaluate() -> None:
            with daemon:
                for _ in daemon.core_loop(workspace, over):
                    if over.is_set():
                        return

        thread = threading.Thread(target=evaluate)
        thread.start()
        try:
            origins = {
                sensor.name: (
                    sensor.get_remote_origin_id(),
                    sensor.get_remote_origin().get_selector().get_id(),
                )
                for location in workspace.create_request_context().code_locations
                for repository in location.get_repositories().values()
                for sensor in repository.get_sensors()
            }

            def evaluated(name: str) -> list[TickStatus]:
                return [tick.status for tick in instance.get_ticks(*origins[name])]

            deadline = time.monotonic() + 50
            while evaluated("ticks").count(TickStatus.SKIPPED) < 2:
                assert time.monotonic() < deadline, (evaluated("ticks"), evaluated("waits"))
                time.sleep(0.05)
            assert evaluated("waits") == [TickStatus.STARTED]
        finally:
            (tmp_path / "released").touch()
            over.set()
            thread.join(90)

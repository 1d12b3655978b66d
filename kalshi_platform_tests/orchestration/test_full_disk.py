"""With a full disk the supervisor leaves the streamer alone, and nothing is lost."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster import DagsterRunStatus as Status

from kalshi_platform import settings as platform_settings
from kalshi_platform.commands import doctor
from kalshi_platform.exchange.frames import decode_head
from kalshi_platform.health import health_report, metrics
from kalshi_platform.journal import reader
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.segment import Disk
from kalshi_platform.journal.writer import Writer
from kalshi_platform.orchestration import alerts, supervisor
from kalshi_platform.orchestration.host.home import prepare
from kalshi_platform.orchestration.observation import read_health
from kalshi_platform.orchestration.sensors import streamer_supervisor
from kalshi_platform.recorder import streamer
from kalshi_platform.settings import Settings
from kalshi_platform_tests.simulator_fixtures import StartSimulator
from kalshi_platform_tests.small_disk import fill, make_room, small_disk

RUN = """
import sys
import dagster as dg
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.orchestration.streamer import stream_orderbook
with dg.DagsterInstance.from_config(sys.argv[1]) as instance:
    stream_orderbook.execute_in_process(
        instance=instance, resources={"platform": KalshiResource()}, raise_on_error=False
    )
"""


def until(condition: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, why
        time.sleep(0.05)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path, megabytes=64) as mounted:
        yield mounted


@pytest.mark.slow
def test_a_streamer_with_a_full_disk_is_left_alone(
    disk: Path,
    tmp_path: Path,
    start_simulator: StartSimulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulator = start_simulator(markets=8, rate=400.0, rolling_markets=0)
    given = {
        "KALSHI_DATA_DIR": str(disk / "data"),
        "USE_CLICKHOUSE": "0",
        "KALSHI_WS_URL": simulator.ws_url,
        "KALSHI_REST_URL": simulator.rest_url,
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = platform_settings.load(_env_file=None)
    settings.exchange.key_file.parent.mkdir(parents=True)
    shutil.copy(simulator.key_file, settings.exchange.key_file)
    home = prepare(tmp_path / "dagster-data", tmp_path / "code.sock", 7).folder
    # So that staleness would show within the test:
    monkeypatch.setattr(supervisor, "HEALTH_S", 3.0)  # it reports once a second
    for name in ("DURABLE_S", "START_S"):
        monkeypatch.setattr(supervisor, name, 1.0)

    def report() -> dict[str, Any]:
        return health_report.read(settings.journal_dir()) or {}

    run = subprocess.Popen([sys.executable, "-c", RUN, str(home)], env={**os.environ, **given})
    try:
        until(lambda: report().get("journal_records", 0) > 500, "nothing was recorded")
        fill(disk)
        until(lambda: report()["state"] == "blocked", "the full disk was not noticed")
        with dg.DagsterInstance.from_config(str(home)) as instance:
            cursor, over = None, time.monotonic() + 4.0
            while time.monotonic() < over:
                cursor, reason = tick(instance, settings, cursor)
                assert "is left alone. No space is left for the journal" in reason
                assert run.poll() is None
                time.sleep(0.25)
            assert [entry.status for entry in instance.get_runs()] == [Status.STARTED]
        held = report()
        assert time.time() - held["updated_ns"] / 1e9 < 5.0
        assert held["journal_backlog_bytes"] > 0
        assert_everyone_says_blocked(settings)

        make_room(disk)
        until(lambda: report()["state"] == "streaming", "it did not go on")
        reached = held["frames"]
        until(lambda: report()["journal_records"] > reached, "what was held was not written")
    finally:
        run.send_signal(signal.SIGINT)
        run.wait(60)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        assert [entry.status for entry in instance.get_runs()] == [Status.CANCELED]
    assert report()["state"] == "stopped"
    assert not health_report.memory_path(settings.journal_dir()).exists()
    assert_no_number_is_missing(settings)


def test_a_disk_that_does_not_answer_stops_no_health_report(
    tmp_path: Path, start_simulator: StartSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulator = start_simulator(markets=2, rate=50.0, rolling_markets=0)
    settings = platform_settings.load(
        _env_file=None,
        kalshi_data_dir=tmp_path,
        use_clickhouse=False,
        kalshi_ws_url=simulator.ws_url,
        kalshi_rest_url=simulator.rest_url,
    )
    settings.exchange.key_file.parent.mkdir(parents=True)
    shutil.copy(simulator.key_file, settings.exchange.key_file)
    folder = settings.journal_dir()
    answers = threading.Event()
    answers.set()
    sync, save = os.fdatasync, health_report.Publisher.save

    def slow_sync(fd: int) -> None:
        answers.wait(60)
        sync(fd)

    def slow_save(publisher: health_report.Publisher, report: bytes) -> None:
        answers.wait(60)
        save(publisher, report)

    slow = functools.partial(Writer, disk=Disk(fdatasync=slow_sync))
    monkeypatch.setattr(streamer, "Writer", slow)
    monkeypatch.setattr(health_report.Publisher, "save", slow_save)
    monkeypatch.setattr(streamer, "BLOCKED_S", 0.5)
    recording = streamer.Streamer(settings)
    recording.start()
    try:
        until(lambda: recording.health().journal_records > 50, "nothing was recorded")
        answers.clear()
        until(lambda: (health_report.read(folder) or {})["state"] == "blocked", "it was not said")
        for _ in range(6):
            time.sleep(0.5)
            seen = read_health(folder)
            assert seen is not None
            assert seen.holds
            assert time.time() - seen.updated < 2.0
            assert "has not accepted frames received" in (seen.trouble or "")
        answers.set()
        until(lambda: recording.health().state == "streaming", "it did not go on")
    finally:
        answers.set()
        assert recording.stop(60.0)
    assert_no_number_is_missing(settings)


def tick(
    instance: dg.DagsterInstance, settings: Settings, cursor: str | None
) -> tuple[str | None, str]:
    """One tick of the supervisor: its cursor, and its reason for doing nothing."""
    from kalshi_platform.orchestration.resources import KalshiResource

    with (
        pytest.MonkeyPatch.context() as brief,
        dg.build_sensor_context(
            instance=instance, cursor=cursor, resources={"platform": KalshiResource()}
        ) as context,
    ):
        brief.setattr("kalshi_platform.orchestration.sensors.WATCH_S", 0.0)
        result = streamer_supervisor(context)
    assert isinstance(result, dg.SensorResult)
    assert not result.run_requests
    assert result.skip_reason is not None
    return result.cursor, result.skip_reason.skip_message or ""


def assert_everyone_says_blocked(settings: Settings) -> None:
    (condition,) = alerts.feed(settings, time.time())
    assert condition.title == "Feed of shard 0: disk"
    assert "No space is left for the journal" in condition.sentence
    assert "kill -9" not in condition.sentence
    check, _ = doctor.CHECKS["streamer"]
    finding = check(settings)
    assert finding.mark is doctor.Mark.BAD
    assert finding.text.startswith("The disk does not accept writes: ")
    families = {entry.name: entry for entry in metrics.registry(settings).collect()}
    (verdict,) = families["kalshi_feed_verdict"].samples
    assert (verdict.labels["cause"], verdict.value) == ("disk", 2.0)
    assert [s.value for s in families["kalshi_streamer_up"].samples] == [1.0]


def assert_no_number_is_missing(settings: Settings) -> None:
    """Check that there was one connection, and that each subscription's sequence numbers have no gap."""
    folder = settings.journal_dir()
    numbers: dict[int, list[int]] = {}
    connections = 0
    for block in reader.record_ranges(folder, reader.oldest_offset(folder)):
        kinds = block.batch.column("kind").to_pylist()
        for kind, frame in zip(kinds, block.batch.column("frame").to_pylist(), strict=True):
            if kind == Kind.NOTE:
                connections += b'"kind":"connected"' in frame
            elif kind in {Kind.DELTA, Kind.SNAPSHOT}:
                head = decode_head(frame)
                numbers.setdefault(head.sid, []).append(head.seq)
    assert connections == 1
    assert numbers
    for found in numbers.values():
        assert found == list(range(found[0], found[0] + len(found)))

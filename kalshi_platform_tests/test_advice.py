"""Every remedy that a health verdict names is executed here, and the feed records again."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.commands import doctor
from kalshi_platform.health import health_report, verdict
from kalshi_platform.health.verdict import ALERTS, DOCTOR, Judgement, Profile
from kalshi_platform.journal import reader
from kalshi_platform.journal.writer import Writer
from kalshi_platform.orchestration import alerts
from kalshi_platform.recorder import capture
from kalshi_platform.recorder.streamer import Streamer
from kalshi_platform.settings import Settings
from kalshi_platform_tests.journal.faulty_disk import FaultyDisk
from kalshi_platform_tests.simulator_fixtures import StartSimulator

MARKETS = 3


@pytest.fixture(autouse=True)
def _no_maintenance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "maintenance", lambda _: False)


@pytest.fixture
def exchange(start_simulator: StartSimulator, tmp_path: Path) -> Iterator[tuple[Settings, Any]]:
    """Settings of a recorder without ClickHouse, and its exchange."""
    simulator = start_simulator(markets=MARKETS, rate=50.0, rolling_markets=0)
    settings = platform_settings.load(
        _env_file=None,
        kalshi_data_dir=tmp_path / "data",
        use_clickhouse=False,
        kalshi_ws_url=simulator.ws_url,
        kalshi_rest_url=simulator.rest_url,
    )
    settings.exchange.key_file.parent.mkdir(parents=True)
    shutil.copy(simulator.key_file, settings.exchange.key_file)
    yield settings, simulator


@contextmanager
def recording(settings: Settings) -> Iterator[Streamer]:
    streamer = Streamer(settings)
    streamer.start()
    try:
        yield streamer
    finally:
        streamer.stop(10.0)


def judge(streamer: Streamer, profile: Profile = DOCTOR, later_s: float = 0.0) -> Judgement:
    report = msgspec.to_builtins(streamer.health())
    now = datetime.now(UTC) + timedelta(seconds=later_s)
    return verdict.judge(report, None, now, profile)


def until(holds: Callable[[], bool], describe: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.02)


def becomes(streamer: Streamer, cause: str) -> Judgement:
    until(lambda: judge(streamer).cause == cause, lambda: (judge(streamer), streamer.health()))
    return judge(streamer)


def test_no_books_the_streamer_requests_snapshots_itself(exchange: tuple[Settings, Any]) -> None:
    settings, simulator = exchange
    simulator.inject("slow:1.5")
    with recording(settings) as streamer:
        sentence = becomes(streamer, "no books").sentence
        assert f"0 of {MARKETS} books are synced" in sentence
        assert "The streamer requests snapshots itself" in sentence
        becomes(streamer, "recording")
        until(lambda: streamer.health().synced == MARKETS, streamer.health)


def test_silent_the_streamer_reconnects_itself(
    exchange: tuple[Settings, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict, "HEARD_S", 0.5)
    monkeypatch.setattr(capture, "LIVENESS_S", 1.5)
    settings, simulator = exchange
    with recording(settings) as streamer:
        becomes(streamer, "recording")
        simulator.inject("hang")
        assert "The streamer reconnects by itself" in becomes(streamer, "silent").sentence
        becomes(streamer, "recording")
        until(lambda: streamer.health().connections == 2, streamer.health)


def test_a_slow_disk_is_freed_and_nothing_is_lost(
    exchange: tuple[Settings, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()
    free.set()
    disk = FaultyDisk({}, delay=functools.partial(free.wait, 60)).disk
    monkeypatch.setattr(
        "kalshi_platform.recorder.streamer.Writer", functools.partial(Writer, disk=disk)
    )
    settings, _ = exchange
    with recording(settings) as streamer:
        becomes(streamer, "recording")
        free.clear()
        until(lambda: bool(streamer.health().trouble), streamer.health)
        slow = judge(streamer, ALERTS, later_s=verdict.SLOW_S)
        assert slow.cause == "disk slow"
        stuck = judge(streamer, DOCTOR, later_s=DOCTOR.durable_s - 1.0)
        assert stuck.cause == "writer stuck"
        for found in (slow, stuck):
            assert "Use a faster disk, or find what else writes there" in found.sentence
        free.set()  # the operator freed the disk
        becomes(streamer, "recording")
    kept = sum(
        b.batch.num_rows
        for b in reader.record_ranges(
            settings.journal_dir(), reader.oldest_offset(settings.journal_dir())
        )
    )
    assert kept == streamer.health().journal_records


def test_no_report_a_running_streamer_writes_it_again(exchange: tuple[Settings, Any]) -> None:
    settings, _ = exchange
    path = settings.journal_dir() / health_report.FILE

    def judged() -> Judgement:
        return alerts._judge(settings, 0, time.time())[0][0]

    with recording(settings) as streamer:
        becomes(streamer, "recording")
    path.write_bytes(b"{")
    assert judged().cause == "no report"
    assert "A running streamer writes it each second." in judged().sentence
    found = doctor._reported(settings, 0)
    assert (found.mark, found.remedy) == (
        doctor.Mark.BAD,
        "remove it; a running streamer writes it each second",
    )
    with recording(settings) as streamer:
        becomes(streamer, "recording")
        until(lambda: judged().cause == "recording", judged)
    path.write_bytes(b"{")
    path.unlink()  # as `doctor` says
    assert doctor._reported(settings, 0).mark is not doctor.Mark.BAD
    with recording(settings) as streamer:
        becomes(streamer, "recording")
        until(lambda: doctor._reported(settings, 0).mark is doctor.Mark.GOOD, judged)


def test_not_started_the_named_command_records_the_shard(
    exchange: tuple[Settings, Any], tmp_path: Path
) -> None:
    alone, _ = exchange
    settings = alone.model_copy(update={"stream_shards": 2})
    advised = verdict.never_run(1)
    assert advised.cause == "not started"
    found = re.search(r"`kalshi-platform ([^`]+)`", advised.sentence)
    assert found
    environment = {
        **os.environ,
        "KALSHI_HOME": str(tmp_path),
        "KALSHI_DATA_DIR": str(settings.data_dir),
        "KALSHI_WS_URL": settings.exchange.ws_url,
        "KALSHI_REST_URL": settings.exchange.rest_url,
        "USE_CLICKHOUSE": "0",
        "STREAM_SHARDS": "2",
    }
    argv = [sys.executable, "-m", "kalshi_platform", *found[1].split()]
    with recording(settings) as first:
        becomes(first, "recording")
        assert health_report.read(settings.journal_dir(1)) is None
        second = subprocess.Popen(argv, env=environment, stderr=subprocess.DEVNULL)
        try:

            def judged() -> Judgement:
                report = health_report.read(settings.journal_dir(1))
                return verdict.judge_shard(report, 1, 2, None, datetime.now(UTC), profile=DOCTOR)[0]

            until(lambda: judged().cause == "recording", judged)
        finally:
            second.terminate()
            assert second.wait(30) == 0

"""Shards as processes: the exchange on one side, two stores on the other, kills and changes between."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner

from kalshi_platform.archive import LocalArchive, compaction, hours, watermarks
from kalshi_platform.commands.stream import command
from kalshi_platform.errors import SettingsError, StoreError
from kalshi_platform.health import health_report, monitored_shards
from kalshi_platform.journal import reader
from kalshi_platform.journal.kind import Kind
from kalshi_platform.recorder.sharding import share
from kalshi_platform.recorder.streamer import Streamer
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import floor_hour
from kalshi_platform_tests.recorder.test_streamer import (
    _environment,
    assert_lossless,
    latest,
    query,
    settings_for,
    truth,
    wait_for,
    wait_for_the_last_frames,
)
from kalshi_platform_tests.simulator_fixtures import StartSimulator

__all__ = ["settings_for"]  # the fixture

SECOND = 1_000_000_000
WITH_CLOCK = """
import sys, time, types
real, path, known = time.time_ns, sys.argv.pop(1), [0, 0]
def shifted():
    now = real()
    if now - known[0] > 50_000_000:
        known[:] = now, int(open(path).read())
    return now + known[1]
time.time_ns = shifted
from kalshi_platform.exchange import signing
signing.time = types.SimpleNamespace(time_ns=real)  # the exchange uses the real clock
from kalshi_platform.commands.main import run
run()
"""
"""A `kalshi-platform` process whose journal clock the test sets."""


class Clock:
    """The time that the processes of a test see."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set(datetime.now(UTC))

    def set(self, to: datetime) -> None:
        """Set the time to `to`."""
        offset = int(to.timestamp() * 1e9) - time.time_ns()
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(str(offset))
        temporary.replace(self.path)


def shard(settings: Settings, number: int, clock: Clock, log: Path) -> subprocess.Popen[bytes]:
    """Start `stream --shard N` with the test's clock."""
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-c", WITH_CLOCK, str(clock.path), "stream", "--shard", str(number)],
            env={**_environment(settings), "STREAM_SHARDS": str(settings.stream_shards)},
            stderr=out,
        )


def health(settings: Settings, number: int, key: str) -> Any:
    return (health_report.read(settings.journal_dir(number)) or {}).get(key, 0)


def synced(settings: Settings, number: int, process: subprocess.Popen[bytes]) -> Any:
    """The number of synced books in this process's health report; its predecessor's report is ignored."""
    report = health_report.read(settings.journal_dir(number)) or {}
    return report.get("synced") if report.get("pid") == process.pid else None


def deltas(settings: Settings) -> int:
    """Deltas in all journals."""
    return sum(
        block.batch.column("kind").to_pylist().count(int(Kind.DELTA))
        for number in watermarks.shards(settings.journals_dir)
        for block in reader.record_ranges(
            settings.journal_dir(number), reader.oldest_offset(settings.journal_dir(number))
        )
    )


def assert_nothing_lost(settings: Settings) -> None:
    assert query(settings, "SELECT count() FROM orderbook_events WHERE type = 'delta'") == [
        (deltas(settings),)
    ]
    assert_lossless(settings)


@pytest.mark.timeout(600)
def test_an_hour_waits_for_a_killed_shard(
    tmp_path: Path, start_simulator: StartSimulator, settings_for: Callable[..., Settings]
) -> None:
    simulator = start_simulator(markets=12, rate=600.0, rolling_markets=0)
    settings = settings_for(simulator, stream_shards=2)
    root, journals = settings.archive_dir, settings.journals_dir
    shares = [share(sorted(simulator.books()), number, 2) for number in (0, 1)]
    turn = floor_hour(datetime.now(UTC)) - timedelta(hours=3)
    ends = turn - timedelta(hours=1)
    clock = Clock(tmp_path / "clock")
    clock.set(turn - timedelta(minutes=5))
    logs = [tmp_path / f"{number}.log" for number in (0, 1)]
    processes = [shard(settings, number, clock, logs[number]) for number in (0, 1)]
    try:
        for number in (0, 1):
            wait_for(
                lambda k=number: synced(settings, k, processes[k]) == len(shares[k]),  # type: ignore[misc]
                f"the books of shard {number}",
            )
        # the note of its connection must be on the disk before the kill
        wait_for(lambda: health(settings, 1, "journal_records") > 100, "what shard 1 has kept")
        processes[1].kill()
        processes[1].wait()
        clock.set(turn - timedelta(seconds=1))
        wait_for(
            lambda: watermarks.watermark_of(journals, 0).before == turn, "shard 0 past the hour"
        )
        time.sleep(1.0)
        assert not hours.is_sealed(LocalArchive(root), ends)
        assert watermarks.blocking_shards(journals, ends) == [1]
        processes[1] = shard(settings, 1, clock, logs[1])
        wait_for(lambda: hours.is_sealed(LocalArchive(root), ends), "the seal")
        wait_for(lambda: synced(settings, 1, processes[1]) == len(shares[1]), "shard 1's books")
        simulator.pause()
        wait_for_the_last_frames(settings, simulator)
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        statuses = [process.wait(timeout=60) for process in processes]
    logged = "\n".join(log.read_text() for log in logs)
    assert statuses == [0, 0], logged
    assert logged.count(f"Hour {ends:%Y-%m-%d %H:00} UTC (sealed)") == 1
    assert_nothing_lost(settings)
    assert latest(settings) == truth(simulator, set(simulator.books()))
    events = pl.read_parquet(f"{root}/orderbook_events/**/*.parquet", hive_partitioning=False)
    by_conn = events.cast({"conn_id": pl.String, "market_ticker": pl.String}).group_by("conn_id")
    found = by_conn.agg(pl.col("market_ticker").unique())["market_ticker"].to_list()
    assert sorted(sorted(tickers) for tickers in found) == sorted([*shares, shares[1]])
    kinds = dict(query(settings, "SELECT kind, count() FROM stream_events GROUP BY kind"))
    assert kinds["connected"] == kinds["disconnected"] == 3
    # the first hour is compacted to the same rows, and sealed hours stay as they are
    before = hours.describe(LocalArchive(root), ends, complete=True)
    assert [d.checksum for d in before.datasets] == [
        getattr(LocalArchive(root).read_manifest(d.dataset, ends), "checksum", "")
        for d in before.datasets
    ]
    compaction.compact(LocalArchive(root), [ends], lambda _: None, _raise)
    after = hours.describe(LocalArchive(root), ends, complete=True)
    assert [(d.rows, d.checksum) for d in after.datasets] == [
        (d.rows, d.checksum) for d in before.datasets
    ]


@contextmanager
def streaming(*streamers: Streamer) -> Iterator[None]:
    try:
        for streamer in streamers:
            streamer.start()
        yield
    finally:
        for streamer in streamers:
            streamer.stop(60.0)


@pytest.mark.timeout(600)
def test_changing_the_number_of_shards_loses_nothing(
    start_simulator: StartSimulator, settings_for: Callable[..., Settings]
) -> None:
    simulator = start_simulator(markets=12, rate=400.0, rolling_markets=0)
    two = settings_for(simulator, stream_shards=2)
    one = settings_for(simulator, stream_shards=1)
    away = settings_for(simulator, stream_shards=2, clickhouse_url="http://127.0.0.1:9")

    # Shard 1 ends while ClickHouse is unreachable for it: only its journal has what it recorded.
    first, second = Streamer(two, 0), Streamer(away, 1)
    with streaming(first, second):
        wait_for(lambda: first.health().synced + second.health().synced == 12, "all books")
        time.sleep(1.0)
    assert second.health().stores["clickhouse"].lag > 0
    assert monitored_shards.left_over(one.journals_dir, 1, one.stores) == [1]

    # One shard records all markets; the other one's journal is drained.
    alone, drain = Streamer(one, 0), Streamer(one, 1)
    with streaming(alone):
        wait_for(lambda: alone.health().synced == 12, "all books in one shard")
        time.sleep(0.5)
        with streaming(drain):
            wait_for(lambda: drain.drained, "the drain")
        assert drain.health().state == "stopped"
    assert monitored_shards.left_over(one.journals_dir, 1, one.stores) == []

    # Two shards again.
    first, second = Streamer(two, 0), Streamer(two, 1)
    with streaming(first, second):
        wait_for(lambda: first.health().synced + second.health().synced == 12, "all books again")
        simulator.pause()
        wait_for_the_last_frames(two, simulator)
    assert latest(two) == truth(simulator, set(simulator.books()))
    assert_nothing_lost(two)
    kinds = Counter(dict(query(two, "SELECT kind, count() FROM stream_events GROUP BY kind")))
    assert kinds["connected"] == kinds["disconnected"] == 5
    assert kinds["gap"] == 0


@pytest.mark.timeout(600)
def test_stream_runs_one_process_per_shard_and_ends_all(
    start_simulator: StartSimulator, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    simulator = start_simulator(markets=10, rate=300.0, rolling_markets=0)
    settings = settings_for(simulator, stream_shards=2, use_clickhouse=False)
    environment = {**_environment(settings), "STREAM_SHARDS": "2", "USE_CLICKHOUSE": "0"}
    argv = [sys.executable, "-m", "kalshi_platform", "stream"]
    log = tmp_path / "stream.log"
    with log.open("wb") as out:
        process = subprocess.Popen(argv, env=environment, stderr=out)
    wait_for(lambda: sum(health(settings, k, "synced") for k in (0, 1)) == 10, "all books")
    pids = [health(settings, number, "pid") for number in (0, 1)]
    assert len({process.pid, *pids}) == 3
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0, log.read_text()  # shards that take 10 s are killed
    assert [health(settings, number, "state") for number in (0, 1)] == ["stopped", "stopped"]
    assert log.read_text().count("all that was received is stored") == 2
    with log.open("wb") as out:
        process = subprocess.Popen(argv, env=environment, stderr=out)
    wait_for(lambda: health(settings, 1, "pid") not in (0, pids[1]), "the second start")
    wait_for(lambda: health(settings, 1, "state") == "streaming", "frames")
    os.kill(health(settings, 1, "pid"), signal.SIGKILL)
    assert process.wait(timeout=60) == 1
    assert "shard 1 (killed by SIGKILL)" in log.read_text()
    assert health(settings, 0, "state") == "stopped"


def test_a_shard_that_never_existed_is_refused(
    start_simulator: StartSimulator,
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = settings_for(start_simulator(markets=2), use_clickhouse=False)
    with pytest.raises(SettingsError, match="There is no shard 3: STREAM_SHARDS is 1"):
        Streamer(settings, 3).start()
    assert not settings.journal_dir(3).exists()
    monkeypatch.setenv("STREAM_SHARDS", "0")
    refused = CliRunner().invoke(command, [])
    assert isinstance(refused.exception, SettingsError)
    assert "STREAM_SHARDS" in str(refused.exception)


def _raise(_: datetime, error: StoreError) -> None:
    raise error

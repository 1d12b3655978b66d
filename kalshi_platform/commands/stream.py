"""`stream`: record in the foreground, without Dagster: one shard, or a process for each shard."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import click

from kalshi_platform import logs
from kalshi_platform import settings as platform_settings
from kalshi_platform.archive.hours import HourReport
from kalshi_platform.errors import PlatformError
from kalshi_platform.health import monitored_shards
from kalshi_platform.processes import describe_exit
from kalshi_platform.recorder.streamer import Health, Streamer
from kalshi_platform.settings import Settings

log = logging.getLogger(__name__)

STATUS_S = 10.0
DRAIN_S = 7.0
END_S = 9.5
"""Seconds from SIGTERM until the processes of the shards are killed."""


@click.command()
@click.option(
    "--shard",
    type=click.IntRange(0),
    help="Record one shard of STREAM_SHARDS in this process. A shard that is no longer configured is"
    " drained: the rest of its journal is loaded, and the command ends.  [default: all, a process each]",
)
@click.option("--parent", type=int, hidden=True, help="End when this is no longer the parent.")
def command(shard: int | None, parent: int | None) -> None:
    """Capture and load in the foreground, without Dagster.

    SIGTERM or Ctrl-C: stop reading, flush what was received to both stores, exit 0 within 10 s. If the
    disk does not accept what was received, it exits 1 and says how much is lost.
    """
    settings = platform_settings.load()
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    shards = _shards(settings) if shard is None else [shard]
    if len(shards) > 1:
        _record_all(shards, stopping)
        return
    if parent is not None and settings.log_format == "text":
        _prefix_log(shards[0])
    with logs.bound(shard=shards[0]):
        _record(settings, shards[0], stopping, parent)


def _prefix_log(shard: int) -> None:
    """Prefix each log line with the shard, since several processes share a terminal. JSON lines have it anyway."""
    formatter = logs.TextFormatter(logs.TEXT.replace("%(message)s", f"shard {shard}: %(message)s"))
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)


def _shards(settings: Settings) -> list[int]:
    """The configured shards, and former ones that are not drained."""
    return monitored_shards.supervised(
        settings.journals_dir, settings.stream_shards, settings.stores
    )


# -- one shard, in this process ----------------------------------------------------------------


def _record(
    settings: Settings, shard: int, stopping: threading.Event, parent: int | None = None
) -> None:
    """Record one shard until a signal, its drain or a failure, and log its state."""
    streamer = Streamer(settings, shard)
    streamer.start()
    if settings.exchange.simulated:
        log.info("No exchange key: recording the bundled simulator. The data is simulated.")
    failure = None
    waited = STATUS_S
    while not (stopping.is_set() or streamer.drained or failure is not None):
        report = streamer.next_report(timeout_s=0.5)
        if report is not None:
            log.info("%s", _hour(report))
        failure = streamer.failure()
        waited += 0.5
        if waited >= STATUS_S:
            waited = 0.0
            log.info("%s", _status(streamer.health()))
        if parent is not None and os.getppid() != parent:
            log.warning("The parent process of all shards is gone; this one ends too.")
            break
    complete = streamer.stop(DRAIN_S)
    failure = failure or streamer.loss
    if failure is not None:
        raise (
            failure if isinstance(failure, PlatformError) else RuntimeError("recording ended")
        ) from failure
    if complete:
        log.info("Stopped; all that was received is stored.")
    else:
        log.warning("Stopped; %s", _left(streamer.health()))


def _status(health: Health) -> str:
    line = (
        f"{health.state}: {health.frames:,} frames, {health.synced}/{health.markets} books,"
        f" {health.gaps} gaps, {health.lag_frames:,} not loaded yet"
    )
    return f"{line}. {health.trouble}" if health.trouble else line


def _hour(report: HourReport) -> str:
    state = "sealed" if report.complete else "open"
    rows = ", ".join(f"{d.dataset} {d.rows:,}" for d in report.datasets)
    return f"Hour {report.hour:%Y-%m-%d %H:00} UTC ({state}): {rows}"


def _left(health: Health) -> str:
    behind = {name: store.lag for name, store in health.stores.items() if store.lag}
    waiting = ", ".join(f"{lag:,} records wait for {name}" for name, lag in behind.items())
    if not waiting:
        return "not everything was stored in time; see the log above. The next start resumes from the journal."
    return f"{waiting}. They are in the journal, and loaded at the next start."


# -- all shards, a process each ----------------------------------------------------------------


def _record_all(shards: Sequence[int], stopping: threading.Event) -> None:
    """Run a process per shard until a signal, or until one fails: then all end, so that a service manager restarts them."""
    log.info("Shards %s, a process each.", ", ".join(map(str, shards)))
    children = {shard: _spawn(shard) for shard in shards}
    failed: dict[int, int] = {}
    while not (stopping.wait(0.2) or failed or all(c.poll() == 0 for c in children.values())):
        failed = {shard: status for shard, child in children.items() if (status := child.poll())}
    for child in children.values():
        child.terminate()
    deadline = time.monotonic() + END_S
    for shard, child in children.items():
        try:
            status = child.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            child.kill()
            status = child.wait()
        if status not in {0, -signal.SIGTERM}:  # SIGTERM: it had not installed its handler yet
            failed[shard] = status
    if failed:
        failures = ", ".join(f"shard {k} ({describe_exit(status)})" for k, status in failed.items())
        raise PlatformError(f"All shards were ended because of {failures}. Its log is above.")


def _spawn(shard: int) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "kalshi_platform", "stream"]
    options = ["--shard", str(shard), "--parent", str(os.getpid())]
    return subprocess.Popen([*argv, *options])  # noqa: S603

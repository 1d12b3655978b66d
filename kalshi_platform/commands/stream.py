"""`stream`: capture and load in the foreground, without Dagster."""

from __future__ import annotations

import logging
import signal
import threading

import click

from kalshi_platform import logs
from kalshi_platform import settings as platform_settings
from kalshi_platform.errors import PlatformError
from kalshi_platform.loading.hours import HourReport
from kalshi_platform.settings import Settings
from kalshi_platform.streamer import Health, Streamer

log = logging.getLogger(__name__)

STATUS_S = 10.0
DRAIN_S = 7.0


@click.command()
def command() -> None:
    """Capture and load in the foreground, without Dagster.

    SIGTERM or Ctrl-C: stop reading, flush what was received to both stores, exit 0 within 10 s.
    """
    settings = platform_settings.load()
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    with logs.bound(shard=0):
        _stream(settings, stopping)


def _stream(settings: Settings, stopping: threading.Event) -> None:
    streamer = Streamer(settings)
    streamer.start()
    if settings.exchange.simulated:
        log.info("No exchange key: recording the bundled simulator. The data is simulated.")
    failure = None
    waited = STATUS_S
    while not stopping.is_set() and failure is None:
        report = streamer.next_report(timeout_s=0.5)
        if report is not None:
            log.info("%s", _hour(report))
        failure = streamer.failure()
        waited += 0.5
        if waited >= STATUS_S:
            waited = 0.0
            log.info("%s", _status(streamer.health()))
    complete = streamer.stop(DRAIN_S)
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
    what = ", ".join(f"{lag:,} records wait for {name}" for name, lag in behind.items())
    return f"{what or 'the last write did not end in time'}. They are in the journal, and loaded at the next start."

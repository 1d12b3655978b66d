"""A streamer that does what the test says, at the very seam where ops ask for the real one.

What the real one does is tested in its own room and, under Dagster, in `commands/test_up.py`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, ClassVar, cast

from kalshi_platform.archive.hours import DatasetHour, HourReport
from kalshi_platform.errors import PlatformError
from kalshi_platform.orchestration.resources import KalshiResource

if TYPE_CHECKING:
    from kalshi_platform.recorder.streamer import Health, Streamer

HOUR = datetime(2026, 11, 20, 14, tzinfo=UTC)
DATASETS = ("orderbook_events", "stream_events", "book_checkpoints", "trades", "frames")


def hour_report(
    hour: datetime = HOUR,
    *,
    complete: bool = True,
    rows: int = 1000,
    datasets: tuple[str, ...] = DATASETS,
) -> HourReport:
    """An hour report, as the archive makes it."""
    return HourReport(
        hour=hour,
        complete=complete,
        datasets=tuple(
            DatasetHour(
                dataset=name,
                hour=hour,
                complete=complete,
                rows=rows,
                files=1,
                bytes=4096,
                markets=12,
                gaps=1,
                verified_seconds=3599.0,
                coverage=0.99972,
                first=hour,
                last=hour.replace(minute=59),
                checksum="abc",
                path=f"/archive/{name}/date={hour:%Y-%m-%d}/hour={hour:%H}",
            )
            for name in datasets
        ),
    )


class StandInStreamer:
    """A scripted streamer: returns reports, fails, hangs or is interrupted on command."""

    def __init__(self, *reports: HourReport) -> None:
        self.reports = deque(reports)
        self.on_stop: list[HourReport] = []
        self.when_dry: Callable[[StandInStreamer], None] = lambda _: None
        self.when_stopping: Callable[[StandInStreamer], None] = lambda _: None
        self.refuses: PlatformError | None = None
        self.fault: BaseException | None = None
        self.loss: PlatformError | None = None
        self.stopped = threading.Event()
        self.drained = False

    def start(self) -> None:
        if self.refuses is not None:
            raise self.refuses

    def next_report(self, timeout_s: float) -> HourReport | None:
        if self.reports:
            return self.reports.popleft()
        if not self.stopped.is_set():
            self.when_dry(self)
            time.sleep(min(timeout_s, 0.02))
        return None

    def failure(self) -> BaseException | None:
        return self.fault

    def health(self) -> Health:
        return cast(
            "Health",
            SimpleNamespace(
                state="streaming",
                frames=1,
                lag_frames=0,
                last_frame_ns=1,
                last_durable_ns=0,
                trouble=None,
            ),
        )

    def stop(self, timeout_s: float = 10.0) -> bool:
        self.when_stopping(self)
        self.reports.extend(self.on_stop)
        self.on_stop = []
        self.stopped.set()
        return True


def interrupt(_: StandInStreamer) -> None:
    """Interrupt the op, as Terminate in the UI and SIGTERM do."""
    os.kill(os.getpid(), signal.SIGINT)


class StandInPlatform(KalshiResource):
    """The platform with stand-ins for streaming and rebuilding.

    Dagster makes its own copy from the config, so what a test prepares is the class's.
    """

    streamers: ClassVar[deque[StandInStreamer]] = deque()
    hours: ClassVar[dict[datetime, HourReport | PlatformError]] = {}
    rebuilt: ClassVar[list[datetime]] = []

    def streamer(self, shard: int, shards: int) -> Streamer:
        return cast("Streamer", self.streamers.popleft())

    def is_sealed(self, hour: datetime) -> bool:
        found = self.hours.get(hour)
        return isinstance(found, PlatformError) or (found is not None and found.complete)

    def describe(self, hour: datetime) -> HourReport:
        found = self.hours[hour]
        if isinstance(found, PlatformError):
            raise found
        return found

    def rebuild(self, hour: datetime) -> HourReport:
        self.rebuilt.append(hour)
        return self.describe(hour)

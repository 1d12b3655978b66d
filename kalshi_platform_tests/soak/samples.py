"""Sample the platform every few seconds: memory and CPU by role, lag, rate, disk, markets."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from kalshi_platform.simulator.server import Simulator
from kalshi_platform_tests.chaos.up import Platform, program_of

CAMPAIGN = "exchange simulator and this campaign"
OTHERS = "runs and helpers"
FRESH_S = 5.0
"""A streamer with an older report is being restarted."""


@dataclass(frozen=True)
class Sample:
    """One sample. Memory is resident, MiB; CPU is seconds since the start."""

    at: float
    """Seconds since the epoch."""
    mib: dict[str, float]
    """By role; a role without a process is left out."""
    cpu_s: dict[str, float]
    lag: dict[str, int]
    """Journalled records that a store lacks, of all shards that report."""
    late_s: dict[str, float]
    """Age of the oldest of them, of the shard that is further behind."""
    sent: int
    """Deltas of the exchange since its start."""
    journalled: int
    """Records in all journals."""
    journal_bytes: int
    disk_bytes: int
    """The whole data folder, the journal included."""
    open_markets: int
    followed: int


class Sampler:
    """Samples in a thread of its own, until `stop`."""

    def __init__(
        self,
        platform: Platform,
        simulator: Simulator,
        every_s: float,
        say: Callable[[Sample], None],
    ) -> None:
        self._it, self._simulator, self._every_s, self._say = platform, simulator, every_s, say
        self.samples: list[Sample] = []
        self.seen_open: dict[str, int] = {}
        """By market, the number of samples at which it was open."""
        self.first_open: frozenset[str] = frozenset()
        """Markets open at the first sample."""
        self._failure: BaseException | None = None
        self._failed = threading.Event()
        self._spent: dict[str, float] = defaultdict(float)
        self._last: dict[tuple[int, float], float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def sleep_until(self, at: float) -> None:
        """Sample until `until`, seconds since the epoch. Raises the error that ended the sampling early."""
        if self._failed.wait(max(at - time.time(), 0.0)) and self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End."""
        self._over.set()
        self._thread.join()
        self.sleep_until(0.0)

    def _run(self) -> None:
        try:
            while not self._over.wait(self._every_s):
                self.samples.append(self._look())
                self._say(self.samples[-1])
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            self._failure = error
            self._failed.set()

    def _look(self) -> Sample:
        now = time.time()
        fresh = [h for h in self._it.healths() if h and now - h["updated_ns"] / 1e9 < FRESH_S]
        open_markets = self._simulator.open_markets()
        self.first_open = self.first_open or open_markets
        for ticker in open_markets:
            self.seen_open[ticker] = self.seen_open.get(ticker, 0) + 1
        stores = [(name, h, s) for h in fresh for name, s in h["stores"].items()]
        names = sorted({name for name, _, _ in stores})
        late = {name: [_late_s(h, s) for n, h, s in stores if n == name] for name in names}
        mib = self._processes()
        return Sample(
            at=now,
            mib=mib,
            cpu_s=dict(self._spent),
            lag={name: sum(s["lag"] for n, _, s in stores if n == name) for name in names},
            late_s={name: max(ages) for name, ages in late.items()},
            sent=self._simulator.state()["deltas"],
            journalled=sum(h["journal_records"] for h in self._it.healths() if h),
            journal_bytes=_size(self._it.settings.journals_dir),
            disk_bytes=_size(self._it.data),
            open_markets=len(open_markets),
            followed=sum(h["markets"] for h in fresh),
        )

    def _processes(self) -> dict[str, float]:
        """Return resident memory by role, and add up the CPU since the last sample."""
        shard_of = {pid: shard for shard, pid in self._it.streamers().items()}
        mib: dict[str, float] = defaultdict(float)
        seen: dict[tuple[int, float], float] = {}
        for process in [*self._it.family(), psutil.Process()]:
            try:
                with process.oneshot():
                    key = (process.pid, process.create_time())
                    times, resident = process.cpu_times(), process.memory_info().rss
                    role = self._role(process, shard_of)
            except psutil.Error:
                continue
            mib[role] += resident / 2**20
            seen[key] = times.user + times.system
            self._spent[role] += seen[key] - self._last.get(key, 0.0)
        self._last = seen
        return dict(mib)

    def _role(self, process: psutil.Process, shard_of: dict[int, int]) -> str:
        if process.pid == os.getpid():
            return CAMPAIGN
        if process.pid in shard_of:
            return f"streamer of shard {shard_of[process.pid]}"
        if self._it.process is not None and process.pid == self._it.process.pid:
            return "up"
        return program_of(process) or OTHERS


def _late_s(report: Mapping[str, Any], store: Mapping[str, Any]) -> float:
    """Return the age of the oldest record that a store lacks; before its first write, the streamer's uptime."""
    since = store["loaded_ns"] or report["started_ns"]
    return (report["updated_ns"] - since) / 1e9 if store["lag"] else 0.0


def _size(folder: Path) -> int:
    """Return the bytes of all files; files that vanish meanwhile count 0."""
    total = 0
    for directory, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(Path(directory) / name).st_size
            except FileNotFoundError:
                continue
    return total

"""Two faults at a time: each must be reported once, by its name and in the promised time, and closed when it is over.

A recorder in this process (a real streamer, exchange, embedded ClickHouse, archive, and a disk that can stand still)
is looked at as the sensor `alerts` does. `make nights` draws pairs with all times as they are: about ten minutes each.
The suite runs some with every time shortened (`SHORT`), by the same code.
"""

from __future__ import annotations

import argparse
import functools
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec

from kalshi_platform import settings as platform_settings
from kalshi_platform.embedded_clickhouse import running as clickhouse
from kalshi_platform.exchange.connection import LIVENESS_S
from kalshi_platform.health import incidents, verdict
from kalshi_platform.health.incidents import Event, Ledger, Mailbox, Notice
from kalshi_platform.journal.writer import Writer
from kalshi_platform.loading.loader import PARQUET_PACE
from kalshi_platform.orchestration import alerts
from kalshi_platform.recorder import capture
from kalshi_platform.recorder import streamer as streamer_module
from kalshi_platform.recorder.streamer import Streamer
from kalshi_platform.settings import Settings
from kalshi_platform.simulator.config import SimulatorConfig
from kalshi_platform.simulator.server import Simulator
from kalshi_platform_tests.between import Between, between
from kalshi_platform_tests.clickhouse.tables import prepare
from kalshi_platform_tests.journal.faulty_disk import FaultyDisk
from kalshi_platform_tests.ports import free_ports

MARKETS, RATE = 4, 20.0
FOR_EVER_S = 1e9
CHANNEL = "night"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Times:
    """The promised times: how long a fault may last before it is an incident, and how often the sensor looks."""

    profile: verdict.Profile = verdict.ALERTS
    behind_s: Mapping[str, float] = field(default_factory=lambda: dict(verdict.BEHIND_S))
    error_s: float = alerts.FEED_ERROR_S
    warn_s: float = alerts.FEED_WARN_S
    calm_s: float = incidents.CALM_S
    tick_s: float = alerts.TICK_S
    liveness_s: float = LIVENESS_S
    blocked_s: float = streamer_module.BLOCKED_S
    parquet_s: float = PARQUET_PACE.seconds
    slack_s: float = 30.0
    """Allowance for a busy machine, added to the promise."""


SHORT = Times(
    profile=replace(
        verdict.ALERTS, durable_s=2.0, connect_s=3.0, task_s=1.0, books_s=3.0, report_s=10.0
    ),
    behind_s={"clickhouse": 5.0, "parquet": 15.0},
    error_s=0.5,
    warn_s=4.0,
    calm_s=1.0,
    tick_s=0.2,
    liveness_s=8.0,
    blocked_s=1.0,
    parquet_s=0.5,
    slack_s=30.0,
)


@contextmanager
def at(times: Times) -> Iterator[None]:
    """Apply these times to the platform in this process, within the context."""
    judge_shard = functools.partial(verdict.judge_shard, profile=times.profile)
    with ExitStack() as held:
        for module, name, value in (
            (verdict, "judge_shard", judge_shard),
            (alerts, "FEED_ERROR_S", times.error_s),
            (alerts, "FEED_WARN_S", times.warn_s),
            (incidents, "CALM_S", times.calm_s),
            (capture, "LIVENESS_S", times.liveness_s),
            (streamer_module, "BLOCKED_S", times.blocked_s),
            (
                streamer_module,
                "PARQUET_PACE",
                replace(PARQUET_PACE, seconds=times.parquet_s),
            ),
        ):
            held.enter_context(mock.patch.object(module, name, value))
        held.enter_context(mock.patch.dict(verdict.BEHIND_S, times.behind_s))
        yield


class Scene:
    """A recorder and its dependencies, each of which can be removed and restored."""

    def __init__(self, folder: Path, way: Between) -> None:
        self._folder, self._way = folder, way
        (port,) = free_ports(1)
        self._config = SimulatorConfig(
            port=port,
            markets=MARKETS,
            rolling_markets=0,
            rate=RATE,
            heartbeat_seconds=0.5,
            key_file=folder / "key.pem",
        )
        self._exchange = self._opened()
        self._disk = threading.Event()
        self._disk.set()
        self.settings: Settings = platform_settings.load(
            _env_file=None,
            kalshi_data_dir=folder / "data",
            clickhouse_url=way.url,
            clickhouse_database="night",
            hot_retention_days=36_500,
            kalshi_ws_url=self._exchange.ws_url,
            kalshi_rest_url=self._exchange.rest_url,
        )
        key = self.settings.exchange.key_file
        key.parent.mkdir(parents=True)
        shutil.copy(self._exchange.key_file, key)
        prepare(self.settings)
        disk = FaultyDisk({}, delay=functools.partial(self._disk.wait, FOR_EVER_S)).disk
        with mock.patch.object(streamer_module, "Writer", functools.partial(Writer, disk=disk)):
            self.streamer = Streamer(self.settings)
            self.streamer.start()

    def _opened(self) -> Simulator:
        exchange = Simulator(self._config)
        exchange.start()
        return exchange

    def clickhouse(self, *, present: bool) -> None:
        """Let ClickHouse accept connections and not answer, until it is restored."""
        (self._way.open.set if present else self._way.open.clear)()

    def exchange(self, *, present: bool) -> None:
        """Make the exchange unreachable, until it is restored."""
        if present:
            self._exchange = self._opened()
        else:
            self._exchange.stop()

    def archive(self, *, present: bool) -> None:
        """Unmount the disk, until it is restored."""
        root, away = self.settings.archive_dir, self._folder / "away"
        (away if present else root).rename(root if present else away)

    def disk(self, *, present: bool) -> None:
        """Let the journal's disk take nothing, until it is restored."""
        (self._disk.set if present else self._disk.clear)()

    @property
    def well(self) -> bool:
        """Whether everything is recorded and both stores have taken rows."""
        health = self.streamer.health()
        return (
            health.trouble is None
            and health.synced == MARKETS
            and all(store.committed_ns for store in health.stores.values())
        )

    def end(self) -> None:
        """Restore everything, and end the recorder."""
        self._disk.set()
        self._way.open.set()
        self.streamer.stop(20.0)
        self._exchange.stop()


@dataclass(frozen=True)
class Fault:
    """A fault: a dependency that is removed."""

    cause: str
    """The cause that reports it."""
    take: Callable[..., None]
    """Of a scene, with `there`."""
    promised_s: Callable[[Times], float]
    """Time from its start to its incident, without the sensor's interval."""
    hidden_by: frozenset[str] = frozenset()
    """Causes that hide it: nothing is read while the disk takes nothing, and a store lacks no frame that
    never came."""


FAULTS = (
    Fault(
        "clickhouse behind",
        Scene.clickhouse,
        lambda t: t.behind_s["clickhouse"] + t.warn_s,
        frozenset({"disk", "disconnected"}),
    ),
    Fault("parquet behind", Scene.archive, lambda t: t.error_s + 5.0),
    Fault(
        "disconnected",
        Scene.exchange,
        lambda t: t.liveness_s + t.profile.connect_s + t.error_s,
        frozenset({"disk"}),
    ),
    Fault("disk", Scene.disk, lambda t: t.blocked_s + t.error_s),
)
PAIRS = tuple(combinations(FAULTS, 2))


class Watch:
    """What the sensor `alerts` would report."""

    def __init__(self, settings: Settings, times: Times) -> None:
        self._settings, self._times = settings, times
        self._ledger = Ledger()
        self.notices: list[Notice] = []

    def tick(self) -> None:
        """Look once, then wait until the next look."""
        now = time.time()
        found = list(alerts.feed(self._settings, now))
        seen = incidents.observe(self._ledger, found, [CHANNEL], now, FOR_EVER_S)
        self.notices += seen.mailboxes[CHANNEL].waiting
        self._ledger = msgspec.structs.replace(seen, mailboxes={CHANNEL: Mailbox()})
        time.sleep(self._times.tick_s)

    def until(self, holds: Callable[[], bool], seconds: float) -> bool:
        """Look until the condition holds; False after the timeout."""
        ends = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > ends:
                return False
            self.tick()
        return True

    def has_opened(self, cause: str) -> bool:
        """Whether an incident of this cause was reported."""
        return cause in self.count(Event.OPENED)

    def count(self, event: Event) -> Counter[str]:
        """Count the notices of this event by cause."""
        return Counter(
            notice.condition.key.rpartition(":")[2]
            for notice in self.notices
            if notice.event is event
        )


@dataclass(frozen=True)
class Night:
    """The result of two faults."""

    causes: tuple[str, str]
    opened: Mapping[str, int]
    resolved: Mapping[str, int]
    late: tuple[str, ...]
    """What was not reported, or not closed, in time."""

    @property
    def sound(self) -> bool:
        """Whether each was reported once, by its name, in time, and closed, and nothing else was."""
        once = dict.fromkeys(self.causes, 1)
        return not self.late and self.opened == once and self.resolved == once


def night(scene: Scene, pair: Sequence[Fault], times: Times, dice: random.Random) -> Night:
    """Cause both faults, one soon after the other; end them when both were reported."""
    watch = Watch(scene.settings, times)
    late: list[str] = []
    if not watch.until(lambda: scene.well, 120.0 + times.slack_s):
        late.append(f"not well before: {scene.streamer.health()}")
    pair = dice.sample(pair, 2)
    for fault in pair:
        fault.take(scene, present=False)
        watch.until(lambda: False, dice.uniform(0.0, 2.0 * times.tick_s))
    causes = frozenset(fault.cause for fault in pair)
    shown = [fault for fault in pair if not fault.hidden_by & causes]
    hidden = [fault for fault in pair if fault.hidden_by & causes]
    for some in (shown, hidden):  # what hides the other is given back first
        for fault in some:
            promised_s = fault.promised_s(times) + 2 * times.tick_s + times.slack_s
            if not watch.until(functools.partial(watch.has_opened, fault.cause), promised_s):
                late.append(f"{fault.cause} was not reported")
        for fault in some:
            fault.take(scene, present=True)
    if not watch.until(
        lambda: watch.count(Event.RESOLVED).keys() >= causes, 120.0 + times.calm_s + times.slack_s
    ):
        late.append("not all were closed")
    return Night(
        (pair[0].cause, pair[1].cause),
        dict(watch.count(Event.OPENED)),
        dict(watch.count(Event.RESOLVED)),
        tuple(late),
    )


def run(
    folder: Path,
    server: str,
    pairs: Sequence[Sequence[Fault]],
    times: Times,
    *,
    seed: int,
    say: Say,
) -> list[Night]:
    """Run the pairs one after the other, on one recorder in an empty folder, with the ClickHouse at `server`."""
    dice, found = random.Random(seed), []
    with between(server) as way, at(times):
        scene = Scene(folder, way)
        try:
            for pair in pairs:
                began = time.monotonic()
                found.append(night(scene, pair, times, dice))
                verdict = "sound" if found[-1].sound else f"NOT SOUND: {found[-1]}"
                say(
                    f"{' and '.join(found[-1].causes)}: {verdict} ({time.monotonic() - began:.0f} s)"
                )
        finally:
            scene.end()
    return found


def main() -> None:
    """`make nights`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=len(PAIRS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="with every time shortened")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it, too, ends what was started
    dice = random.Random(given.seed)
    drawn: list[Any] = dice.sample(PAIRS, len(PAIRS)) * (1 + given.pairs // len(PAIRS))
    with (
        tempfile.TemporaryDirectory(prefix="nights-") as folder,
        clickhouse(Path(folder) / "clickhouse") as server,
    ):
        found = run(
            Path(folder),
            server,
            drawn[: given.pairs],
            SHORT if given.short else Times(),
            seed=given.seed,
            say=functools.partial(print, flush=True),
        )
    sys.exit(0 if all(night.sound for night in found) else 1)


if __name__ == "__main__":
    main()

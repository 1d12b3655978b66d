"""`make bench`: every figure that the platform promises, section by section, each beside its reference.

Writes `docs/performance.json`, and from it `docs/performance.md` with its plot, after each section: a run
that ends early has written what it measured, and `--section` measures one again. Ends with 1 where a
promise is not kept. `--quick` takes a fraction of the frames and of the time; it writes nothing.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import click
import psutil
from rich.console import Console
from rich.table import Table

from kalshi_platform.exchange.frames import decode_delta, decode_head
from kalshi_platform_tests.benchmarks import (
    analytics,
    engine,
    feed,
    inventory,
    live_views,
    memory,
    pipeline,
    reading,
    report,
    stages,
    stored,
    whole,
)
from kalshi_platform_tests.benchmarks.figures import Curve, Figure, Section, line, number
from kalshi_platform_tests.benchmarks.pipeline import Recorded
from kalshi_platform_tests.journal import slow_disk

MARKETS, MANY, FEW, WIDEST = 500, 5_000, 50, 50_000
RATE = 10_000.0
"""Frames a second: the exchange's busiest minute, with room."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    frames: int
    scaling_frames: int
    steady_s: float
    soak_s: float
    away_s: float
    idle_s: float
    events: int
    rows: int
    decisions: int
    day_events: int


FULL = Size(5_000_000, 3_000_000, 60, 600, 300, 120, 5_000_000, 50_000_000, 5_000_000, 3_000_000)
QUICK = Size(500_000, 300_000, 15, 30, 20, 20, 1_000_000, 5_000_000, 500_000, 300_000)


class Bench:
    """Measures section by section, and prints each figure when it is measured."""

    def __init__(
        self, size: Size, folder: Path, flow: tuple[Path, Path] | None, say: Callable[[str], None]
    ) -> None:
        """`flow`: a recorded flow and its receive times, for the bytes of an event."""
        self._size = size
        self._folder = folder
        self._flow = flow
        self._say = say
        self._curves: list[Curve] = []
        self.sections: dict[str, Callable[[], list[Figure]]] = {
            "start": self._start,
            "stages": self._stages,
            "recorder": self._recorder,
            "frames": self._frames,
            "latency": self._latency,
            "scaling": self._scaling,
            "analytics": self._analytics,
            "reading": self._reading,
            "live views": self._live_views,
            "audit": self._audit,
            "idle": self._idle,
            "bytes": self._bytes,
            "memory": lambda: self._memory(MARKETS, self._size.soak_s),
            "memory, many markets": lambda: self._memory(MANY, self._size.soak_s),
            "50,000 markets": self._widest,
            "slow disk": self._slow_disk,
            "snapshot storm": self._storm,
            "memory, ClickHouse away": lambda: self._memory(MARKETS, self._size.away_s, away=True),
        }

    def measure(self, name: str) -> Section:
        """Measure one section."""
        self._curves = []
        load, stolen = os.getloadavg()[0], Stolen()
        self._say(name)
        figures = self.sections[name]()
        for figure in figures:
            self._say(line(figure))
        at = f"{datetime.now(UTC):%Y-%m-%d %H:%M}"
        return Section(name, at, machine(), load, stolen.share(), figures, self._curves)

    def _start(self) -> list[Figure]:
        return [whole.first_row(), engine.figure()]

    def _stages(self) -> list[Figure]:
        deltas = self._deltas(MARKETS)
        return [*self._decoding(deltas), *stages.figures(deltas, MARKETS)]

    def _recorder(self) -> list[Figure]:
        deltas = self._deltas(MARKETS)
        bare = pipeline.bare_loop(deltas, self._size.frames, MARKETS)
        return _throughput(bare, pipeline.record(deltas, self._size.frames, MARKETS))

    def _frames(self) -> list[Figure]:
        """The recorder with frames in the archive and without, in turns: the better of two runs each."""
        runs: dict[str, list[Recorded]] = {"0": [], "1": []}
        for kept in ("0", "1", "0", "1"):
            environment = {"KEEP_FRAMES": kept}
            it = pipeline.record(
                self._deltas(MARKETS), self._size.frames, MARKETS, environment=environment
            )
            runs[kept].append(it)
        without, with_frames = (
            max(runs[kept], key=lambda it: it.frames_per_second) for kept in ("0", "1")
        )
        ratio = with_frames.frames_per_second / without.frames_per_second
        beside = f"{number(with_frames.frames_per_second)} of {number(without.frames_per_second)} frames/s"
        what = "the recorder with frames in the archive"
        peak = max(it.peak_mib for it in runs["1"])
        return [
            Figure(what, with_frames.frames_per_second, "frames/s"),
            Figure(f"{what} against none", ratio, "times", at_least=0.9, beside=beside),
            Figure(f"{what}, CPU of the streamer", with_frames.streamer_us, "µs for each frame"),
            Figure(f"{what}, memory at full speed", peak, "MiB at most", at_most=memory.BOUND_MIB),
        ]

    def _latency(self) -> list[Figure]:
        frames = int(RATE * self._size.steady_s)
        return _delays(pipeline.record(self._deltas(MARKETS), frames, MARKETS, RATE))

    def _analytics(self) -> list[Figure]:
        return analytics.figures(self._size.events)

    def _reading(self) -> list[Figure]:
        return reading.figures(self._size.day_events)

    def _live_views(self) -> list[Figure]:
        return live_views.figures(self._size.rows)

    def _audit(self) -> list[Figure]:
        return inventory.figures(self._size.decisions)

    def _idle(self) -> list[Figure]:
        return [whole.idle(self._deltas(MARKETS), FEW, self._size.idle_s)]

    def _bytes(self) -> list[Figure]:
        if self._flow is None:
            self._say("no recorded flow is here: bytes for each event are not measured")
            return []
        return stored.figures(*self._flow)

    def _memory(self, markets: int, seconds: float, *, away: bool = False) -> list[Figure]:
        soak = memory.soak(self._deltas(markets), markets, RATE, seconds, away=away)
        self._curves = [Curve(soak.what, soak.seconds, soak.mib)]
        return soak.figures()

    def _widest(self) -> list[Figure]:
        """50,000 markets on one connection."""
        deltas, what = self._deltas(WIDEST), f"{WIDEST:,} markets on one connection"
        it = pipeline.record(deltas, int(RATE * self._size.steady_s), WIDEST, RATE)
        return [
            Figure(f"memory, {what}", it.peak_mib, "MiB at most", at_most=memory.BOUND_MIB),
            Figure(
                f"lost connection to all books synced, {what}",
                pipeline.resync_s(deltas, WIDEST),
                "s",
            ),
            *_delays(it, f"{what}, "),
        ]

    def _slow_disk(self) -> list[Figure]:
        """Each sync of a file takes 40 ms longer."""
        environment = slow_disk.environment(self._folder)
        if environment is None:
            self._say("no C compiler is here: the slow disk is not measured")
            return []
        frames = int(RATE * self._size.steady_s)
        it = pipeline.record(self._deltas(MARKETS), frames, MARKETS, RATE, environment=environment)
        delay = it.delays_ms["journal"]
        what = f"receive to durable in the journal, longest at {RATE:,.0f} frames/s and {slow_disk.SYNC_MS} ms a sync"
        beside = f"p50 {number(delay['p50'])}, p99 {number(delay['p99'])} ms"
        return [Figure(what, delay["max"], "ms", at_most=1_000.0, beside=beside)]

    def _storm(self) -> list[Figure]:
        """Midway, a snapshot of each of 5,000 markets."""
        path = self._folder / "storm.bin"
        frames = int(RATE * self._size.steady_s)
        feed.write_deltas(path, frames, MANY, storm_at=frames // 2)
        it = pipeline.record(path, frames, MANY, RATE, snapshots=MANY)
        what = f"a storm of {MANY:,} snapshots of {2 * len(feed.STORM_LEVELS)} levels"
        return [
            Figure(f"memory, {what}", it.peak_mib, "MiB at most", at_most=memory.BOUND_MIB),
            *(
                Figure(f"receive to {place}, longest, {what}", it.delays_ms[at]["max"], "ms")
                for at, place in (("journal", "durable"), ("clickhouse", "visible"))
            ),
        ]

    def _deltas(self, markets: int) -> Path:
        """The frames of so many markets, laid out once."""
        path = self._folder / f"deltas-{markets}.bin"
        if not path.exists():
            frames = max(self._size.frames, int(RATE * self._size.soak_s))
            self._say(f"laying out {frames:,} deltas of {markets:,} markets")
            feed.write_deltas(path, frames, markets)
        return path

    def _decoding(self, deltas: Path) -> list[Figure]:
        """Measure msgspec alone, for comparison."""
        frames = feed.payloads(deltas, 200_000)
        results = []
        for what, decode in (("the head", decode_head), ("all of it", decode_delta)):
            began = time.perf_counter()
            for frame in frames:
                decode(frame)
            rate = len(frames) / (time.perf_counter() - began)
            results.append(Figure(f"msgspec alone, {what}", rate, "frames/s"))
        mean = sum(map(len, frames)) / len(frames)
        return [*results, Figure("a delta as JSON", mean, "bytes")]

    def _scaling(self) -> list[Figure]:
        cost = []
        for markets in (FEW, MANY):
            it = pipeline.record(self._deltas(markets), self._size.scaling_frames, markets)
            cost.append(it.streamer_us + it.clickhouse_us)
        return [
            Figure(
                f"cost of an event, {MANY:,} markets against {FEW}",
                cost[1] / cost[0],
                "times",
                at_most=1.3,
                beside=f"{cost[0]:.1f} and {cost[1]:.1f} µs of CPU",
            )
        ]


def _throughput(bare: float, recorded: Recorded) -> list[Figure]:
    beside = f"{number(recorded.frames_per_second)} of {number(bare)} frames/s"
    ratio = recorded.frames_per_second / bare
    return [
        Figure("the bare receive loop", bare, "frames/s"),
        Figure("the recorder, socket to both stores", recorded.frames_per_second, "frames/s"),
        Figure("the recorder against the bare loop", ratio, "times", at_least=0.5, beside=beside),
        Figure("the same, CPU of the streamer", recorded.streamer_us, "µs for each frame"),
        Figure("the same, CPU of ClickHouse", recorded.clickhouse_us, "µs for each frame"),
        Figure("the same, CPU of the sender", recorded.feeder_us, "µs for each frame"),
    ]


def _delays(it: Recorded, of: str = "") -> list[Figure]:
    def one(place: str, what: str, at_most: float) -> Figure:
        delay = it.delays_ms[place]
        beside = f"p50 {number(delay['p50'])}, longest {number(delay['max'])} ms"
        return Figure(what, delay["p99"], "ms", at_most=at_most, beside=beside)

    at = f"{of}p99 at {RATE:,.0f} frames/s"
    return [
        one("journal", f"receive to durable in the journal, {at}", 100.0),
        one("clickhouse", f"receive to visible in ClickHouse, {at}", 1_000.0),
    ]


class Stolen:
    """Processor time that the host gave to other guests while it was requested here, which worsens the figures."""

    def __init__(self) -> None:
        self._began = psutil.cpu_times()

    def share(self) -> float:
        """Share of the requested processor time since the start; 0 if the system does not report it."""
        now = psutil.cpu_times()
        spent = {name: getattr(now, name) - getattr(self._began, name) for name in now._fields}
        stolen = spent.get("steal", 0.0)
        wanted = sum(spent.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
        return float(stolen / (stolen + wanted)) if stolen else 0.0


def machine() -> str:
    """Describe the machine."""
    memory_gib = psutil.virtual_memory().total / 2**30
    libraries = ("chdb", "dagster", "polars", "pyarrow", "websockets")
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    return (
        f"{os.cpu_count()} cores, {memory_gib:.0f} GiB, {platform.system()} {platform.machine()},"
        f" Python {platform.python_version()}, {versions}"
    )


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="A fraction of it all, for a look.")
@click.option(
    "--section",
    "names",
    multiple=True,
    help="Measure this section alone; the page keeps what it has of the others. May be repeated.",
)
@click.option(
    "--recorded",
    nargs=2,
    type=click.Path(path_type=Path, exists=True),
    help="A recorded flow, for the bytes of an event: frames, and the receive time of each.",
)
def main(quick: bool, names: tuple[str, ...], recorded: tuple[Path, Path] | None) -> None:
    """Measure, print, write."""
    console = Console() if sys.stdout.isatty() else Console(width=160)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        bench = Bench(QUICK if quick else FULL, Path(folder), recorded, console.log)
        if unknown := [name for name in names if name not in bench.sections]:
            raise click.BadParameter(
                f"{unknown[0]!r} is no section; there are: {', '.join(bench.sections)}"
            )
        measured = []
        for name in names or bench.sections:
            measured.append(bench.measure(name))
            if not quick:
                report.write(measured[-1], list(bench.sections))
    table = Table("what", "measured", "", "promised", "", "beside", title=machine())
    figures = [figure for section in measured for figure in section.figures]
    for it in figures:
        verdict = {True: "kept", False: "[red]NOT KEPT[/]", None: ""}[it.holds]
        table.add_row(it.what, number(it.value), it.unit, it.bound, verdict, it.beside)
    console.print(table)
    sys.exit(1 if any(figure.holds is False for figure in figures) else 0)


if __name__ == "__main__":
    main()

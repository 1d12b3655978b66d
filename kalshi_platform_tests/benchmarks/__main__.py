"""`make bench`: every figure that the platform promises, beside its reference, in one run.

Writes `docs/performance.md` with its plot, and ends with 1 where a promise is not kept. `--quick` takes
a fraction of the frames and of the time, for a look; it writes nothing.
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
    report,
    stages,
    stored,
    whole,
)
from kalshi_platform_tests.benchmarks.figures import Figure, line, number
from kalshi_platform_tests.benchmarks.memory import Soak
from kalshi_platform_tests.benchmarks.pipeline import Recorded

MARKETS, MANY, FEW = 500, 5_000, 50
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


FULL = Size(5_000_000, 3_000_000, 60, 600, 300, 120, 5_000_000, 50_000_000, 5_000_000)
QUICK = Size(500_000, 300_000, 15, 30, 20, 20, 1_000_000, 5_000_000, 500_000)


@dataclass(frozen=True)
class Results:
    """Everything that was measured."""

    figures: list[Figure]
    recorded: Recorded
    soaks: list[Soak]


class Bench:
    """Measures in a fixed order, saying what it is at."""

    def __init__(self, size: Size, folder: Path, say: Callable[[str], None]) -> None:
        self._size = size
        self._folder = folder
        self._say = say
        self._figures: list[Figure] = []

    def run(self, recorded_flow: tuple[Path, Path] | None) -> Results:
        """All of it."""
        size = self._size
        self._say("make run to the first row")
        self._keep([whole.first_row()])
        self._keep([engine.figure()])
        deltas = self._deltas(MARKETS, max(size.frames, int(RATE * size.soak_s)))
        self._keep(self._decoding(deltas))
        self._say("each stage alone")
        self._keep(stages.figures(deltas, MARKETS))
        self._say(f"the bare loop and the recorder, {size.frames:,} frames, {MARKETS} markets")
        bare = pipeline.bare_loop(deltas, size.frames, MARKETS)
        recorded = pipeline.record(deltas, size.frames, MARKETS)
        self._keep(_throughput(bare, recorded))
        self._say(f"delays at {RATE:,.0f} frames/s for {size.steady_s:.0f} s")
        self._keep(_delays(pipeline.record(deltas, int(RATE * size.steady_s), MARKETS, RATE)))
        self._say(f"{FEW} markets, then {MANY}")
        self._keep([self._scaling()])
        self._say(f"an hour of {size.events:,} events: spreads, depth, imbalance, replay")
        self._keep(analytics.figures(size.events))
        self._say(f"live views over {size.rows:,} events")
        self._keep(live_views.figures(size.rows))
        self._say(f"the inventory audit over {size.decisions:,} decisions")
        self._keep(inventory.figures(size.decisions))
        self._say("idle")
        self._keep([whole.idle(deltas, FEW, size.idle_s)])
        if recorded_flow is None:
            self._say("no recorded flow is here: bytes for each event are not measured")
        else:
            self._keep(stored.figures(*recorded_flow))
        soaks = []
        many = self._deltas(MANY, int(RATE * size.soak_s))
        for path, markets, seconds, away in (
            (deltas, MARKETS, size.soak_s, False),
            (many, MANY, size.soak_s, False),
            (deltas, MARKETS, size.away_s, True),
        ):
            self._say(f"memory over {seconds:.0f} s, {markets} markets")
            soaks.append(memory.soak(path, markets, RATE, seconds, away=away))
            self._keep(soaks[-1].figures())
        return Results(self._figures, recorded, soaks)

    def _keep(self, figures: list[Figure]) -> None:
        """Add and print them at once: a run that is ended early has printed what it measured."""
        for figure in figures:
            self._say(line(figure))
        self._figures += figures

    def _deltas(self, markets: int, frames: int) -> Path:
        path = self._folder / f"deltas-{markets}.bin"
        self._say(f"laying out {frames:,} deltas of {markets:,} markets")
        feed.write_deltas(path, frames, markets)
        return path

    def _decoding(self, deltas: Path) -> list[Figure]:
        """What msgspec alone takes, for comparison."""
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

    def _scaling(self) -> Figure:
        frames = self._size.scaling_frames
        cost = []
        for markets in (FEW, MANY):
            path = self._deltas(markets, max(frames, int(RATE * self._size.soak_s)))
            it = pipeline.record(path, frames, markets)
            cost.append(it.streamer_us + it.clickhouse_us)
        return Figure(
            f"cost of an event, {MANY:,} markets against {FEW}",
            cost[1] / cost[0],
            "times",
            at_most=1.3,
            beside=f"{cost[0]:.1f} and {cost[1]:.1f} µs of CPU",
        )


def _throughput(bare: float, recorded: Recorded) -> list[Figure]:
    beside = f"{number(recorded.frames_per_second)} of {number(bare)} frames/s"
    ratio = recorded.frames_per_second / bare
    return [
        Figure("the bare receive loop", bare, "frames/s"),
        Figure("the recorder, socket to both stores", recorded.frames_per_second, "frames/s"),
        Figure("the recorder against the bare loop", ratio, "times", at_least=0.5, beside=beside),
    ]


def _delays(it: Recorded) -> list[Figure]:
    def one(place: str, what: str, at_most: float) -> Figure:
        delay = it.delays_ms[place]
        beside = f"p50 {number(delay['p50'])}, longest {number(delay['max'])} ms"
        return Figure(what, delay["p99"], "ms", at_most=at_most, beside=beside)

    at = f"p99 at {RATE:,.0f} frames/s"
    return [
        one("journal", f"receive to durable in the journal, {at}", 100.0),
        one("clickhouse", f"receive to visible in ClickHouse, {at}", 1_000.0),
    ]


class Stolen:
    """Processor time that the host gave to others while it was wanted here: figures are that much worse."""

    def __init__(self) -> None:
        self._began = psutil.cpu_times()

    def share(self) -> float:
        """Of the processor time that was wanted since the beginning; 0 where the system does not tell."""
        now = psutil.cpu_times()
        spent = {name: getattr(now, name) - getattr(self._began, name) for name in now._fields}
        stolen = spent.get("steal", 0.0)
        wanted = sum(spent.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq"))
        return float(stolen / (stolen + wanted)) if stolen else 0.0


def machine(stolen: float) -> str:
    """What this ran on; `stolen`: see `Stolen`."""
    memory_gib = psutil.virtual_memory().total / 2**30
    libraries = ("chdb", "dagster", "polars", "pyarrow", "websockets")
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    return (
        f"{os.cpu_count()} cores, {memory_gib:.0f} GiB, {platform.system()} {platform.machine()},"
        f" Python {platform.python_version()}, {versions}, {datetime.now(UTC):%Y-%m-%d};"
        f" the host gave {stolen:.0%} of the processor time that was wanted to others"
    )


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="A fraction of it all, for a look.")
@click.option(
    "--recorded",
    nargs=2,
    type=click.Path(path_type=Path, exists=True),
    help="A recorded flow, for the bytes of an event: frames, and the receive time of each.",
)
def main(quick: bool, recorded: tuple[Path, Path] | None) -> None:
    """Measure, show, write."""
    console = Console() if sys.stdout.isatty() else Console(width=160)
    stolen = Stolen()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        results = Bench(QUICK if quick else FULL, Path(folder), console.log).run(recorded)
    ran_on = machine(stolen.share())
    table = Table("what", "measured", "", "promised", "", "beside", title=ran_on)
    for it in results.figures:
        verdict = {True: "kept", False: "[red]NOT KEPT[/]", None: ""}[it.holds]
        table.add_row(it.what, number(it.value), it.unit, it.bound, verdict, it.beside)
    console.print(table)
    if not quick:
        report.write(results.figures, results.recorded, results.soaks, ran_on)
    sys.exit(1 if any(it.holds is False for it in results.figures) else 0)


if __name__ == "__main__":
    main()

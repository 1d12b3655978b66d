"""Memory of the streamer at a steady rate, also while ClickHouse is away, and that nothing is lost.

`python -m kalshi_platform.benchmarks.memory --seconds 3600 --away` is an hour of it: ClickHouse is killed
at the start and comes back at the end; every frame must then be in both stores once.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import click

from kalshi_platform.benchmarks import feed
from kalshi_platform.benchmarks.figures import Figure, show
from kalshi_platform.benchmarks.pipeline import Recorder, feeding
from kalshi_platform.storage.embedded import running

SAMPLE_S = 1.0
BOUND_MIB = 600.0
FLAT = 1.1
"""The last fifth of the time may need a tenth more than the second fifth did."""


@dataclass(frozen=True)
class Soak:
    """Resident memory over time."""

    what: str
    seconds: list[float]
    mib: list[float]
    health: dict[str, object]

    @property
    def growth(self) -> float:
        """Last fifth over second fifth, medians."""
        fifth = max(len(self.mib) // 5, 1)
        return statistics.median(self.mib[-fifth:]) / statistics.median(self.mib[fifth : 2 * fifth])

    def figures(self) -> list[Figure]:
        """Peak and growth."""
        return [
            Figure(f"memory, {self.what}", max(self.mib), "MiB at most", at_most=BOUND_MIB),
            Figure(f"memory, {self.what}: growth", self.growth, "times", at_most=FLAT),
        ]


def soak(path: Path, markets: int, rate: float, seconds: float, *, away: bool = False) -> Soak:
    """Record `rate` frames a second for so long; `away`: with ClickHouse killed soon after the start."""
    frames = int(rate * seconds)
    what = f"{markets:,} markets, {seconds:,.0f} s at {rate:,.0f} frames/s"
    with tempfile.TemporaryDirectory(prefix="bench-") as name, ExitStack() as stack:
        folder = Path(name)
        feeder = stack.enter_context(feeding(path, markets, rate, frames))
        url = stack.enter_context(running(folder / "clickhouse"))
        it = Recorder(folder, feeder, url)
        stack.callback(it.close)
        feeder.hear()
        began = time.monotonic()
        at, mib = [], []
        port = urlsplit(url).port or 0
        if away:
            what += ", ClickHouse away"
            url.process.kill()
        while (now := time.monotonic() - began) < seconds:
            it.health()
            at.append(now)
            mib.append(it.seen.memory_info().rss / 2**20)
            time.sleep(SAMPLE_S)
        if away:
            stack.enter_context(running(folder / "clickhouse", port=port))
        it.wait_for(frames)
        it.check(frames, it.stop())
        return Soak(what, at, mib, it.last)


@click.command(help=__doc__)
@click.option("--markets", default=500, show_default=True)
@click.option("--rate", default=10_000.0, show_default=True, help="Frames a second.")
@click.option("--seconds", default=600.0, show_default=True)
@click.option("--away", is_flag=True, help="Without ClickHouse meanwhile.")
def main(markets: int, rate: float, seconds: float, away: bool) -> None:
    """Lay out the frames, record them, look at the memory, count the rows."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = Path(folder) / "deltas.bin"
        feed.write_deltas(path, int(rate * seconds), markets)
        show(soak(path, markets, rate, seconds, away=away).figures())


if __name__ == "__main__":
    main()

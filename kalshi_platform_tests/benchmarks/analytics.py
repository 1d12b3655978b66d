"""How fast an hour's spreads, depth and imbalance are computed, and how fast it is replayed.

`python -m kalshi_platform_tests.benchmarks.analytics`

The hour is synthetic: `--markets` books that walk at random, `--events` deltas spread over the hour
with a few markets taking most of them, written to an archive of its own as the streamer writes it.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import pyarrow as pa

from kalshi_platform import settings as platform_settings
from kalshi_platform.analytics import replay
from kalshi_platform.analytics.books import Books
from kalshi_platform.analytics.columns import decimals, times
from kalshi_platform.analytics.computed import COMPUTED
from kalshi_platform.analytics.hourly import compute_hour
from kalshi_platform.archive import LocalArchive, part_name
from kalshi_platform.schema import NAME, ORDERBOOK_EVENTS, PRICE, QTY, ZERO_UUID
from kalshi_platform_tests.benchmarks.figures import Figure, show

HOUR = datetime(2026, 11, 22, 14, tzinfo=UTC)
PARTS = 12
LEVELS = 5
FLOOR = 1_000_000.0
"""Events a second that are promised for each."""
PEAK_GIB = 2.0


def synthetic_hour(
    root: Path, events: int, markets: int, seed: int = 1, hour: datetime = HOUR
) -> None:
    """Write an hour of `events` rows: snapshots of every book, then deltas around a walking mid."""
    random = np.random.default_rng(seed)
    weight = 1 / np.arange(1, markets + 1) ** 0.8
    depth = np.arange(1, 41)
    n = events - markets * 2 * len(depth)
    market = random.choice(markets, n, p=weight / weight.sum())
    walk = np.cumsum(random.integers(-1, 2, n)) // 200  # cents, shared by all: the mid
    mid = 50 + (walk % 41) - 20 + market % 5
    side = random.integers(0, 2, n)
    away = np.minimum(random.geometric(0.25, n), 40)
    own = np.where(side == 0, mid, 100 - mid)
    price = np.clip(own - away, 1, 99) * 100
    size = np.where(random.random(n) < 0.3, 0, random.integers(1, 500_000, n))
    book = np.tile(np.concatenate([50 - depth, 50 - depth]).clip(1) * 100, markets)
    head = np.repeat(np.arange(markets), 2 * len(depth))
    us = int(hour.timestamp()) * 1_000_000
    at = np.sort(random.integers(us + 1_000_000, us + 3_600_000_000, n))
    columns = {
        "type": np.concatenate([np.zeros(len(head), np.int32), np.ones(n, np.int32)]),
        "market": np.concatenate([head, market]).astype(np.int32),
        "seq": np.concatenate([head + 1, markets + 1 + np.arange(n)]),
        "side": np.concatenate([np.tile(np.repeat([0, 1], len(depth)), markets), side]).astype(
            np.int32
        ),
        "price": np.concatenate([book, price]),
        "size": np.concatenate([random.integers(1, 500_000, len(head)), size]),
        "at": np.concatenate([np.full(len(head), us), at]),
    }
    total = len(columns["seq"])
    edges = np.linspace(0, total, PARTS + 1).astype(int)
    tickers = pa.array([f"KXBENCH-26NOV22-T{i:05d}" for i in range(markets)])
    for start, end in pairwise(edges.tolist()):
        cut = {name: values[start:end] for name, values in columns.items()}
        same = pa.array(np.zeros(end - start, np.int32))
        table = pa.Table.from_arrays(
            [
                pa.DictionaryArray.from_arrays(cut["type"], pa.array(["snapshot", "delta"])),
                pa.DictionaryArray.from_arrays(same, pa.array([ZERO_UUID])),
                pa.array(np.ones(end - start), pa.uint32()),
                pa.array(cut["seq"], pa.uint64()),
                pa.DictionaryArray.from_arrays(same, pa.array([ZERO_UUID])),
                pa.DictionaryArray.from_arrays(cut["market"], tickers),
                pa.DictionaryArray.from_arrays(cut["side"], pa.array(["yes", "no"])),
                decimals(cut["price"], PRICE),
                decimals(cut["size"], QTY),
                decimals(cut["size"], QTY),
                times(cut["at"], cut["type"] == 1),
                times(cut["at"]),
                pa.DictionaryArray.from_arrays(same, pa.array([""])).cast(NAME),
                pa.repeat(pa.scalar(0, pa.uint32()), end - start),
                pa.array(np.arange(start, end), pa.uint64()),
            ],
            schema=ORDERBOOK_EVENTS.arrow,
        )
        LocalArchive(root).write(
            ORDERBOOK_EVENTS.name, hour, part_name(0, start, end), [table], table.schema
        )


@dataclass(frozen=True)
class Measured:
    """Duration and memory of one computation, in a process of its own."""

    seconds: float
    peak_gib: float
    """The process's greatest resident memory, interpreter and libraries included."""


def _timed(work: Callable[[Path], object], root: Path) -> Measured:
    began = time.perf_counter()
    work(root)
    took = time.perf_counter() - began
    return Measured(took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def _compute(root: Path, datasets: Sequence[str]) -> None:
    own = platform_settings.load(parquet_dir=root, use_clickhouse=False)
    compute_hour(own, HOUR, datasets)


def _replay(root: Path, work: Callable[[Books], object]) -> None:
    for of in replay.read_in_groups(LocalArchive(root), HOUR):
        work(of)


_INSTANTS = [HOUR + timedelta(minutes=m) for m in range(60)]
WORK: dict[str, Callable[[Path], object]] = {
    **{name: partial(_compute, datasets=[name]) for name in COMPUTED},
    "all three at once": partial(_compute, datasets=list(COMPUTED)),
    "replay, best after every event": partial(_replay, work=replay.after_events),
    f"replay, {LEVELS} levels after every event": partial(
        _replay, work=partial(replay.after_events, levels=LEVELS)
    ),
    "replay, whole books at 60 instants": partial(
        _replay, work=partial(replay.at_instants, instants=_INSTANTS)
    ),
}
"""From archive to archive; the replays from archive to Arrow tables in memory."""


def figures(events: int = 5_000_000, markets: int = 1_000) -> list[Figure]:
    """Each dataset and each replay: events/s and peak memory."""
    found = []
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        synthetic_hour(root, events, markets)
        for name, work in WORK.items():
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                measured = process.submit(_timed, work, root).result()
            asked = None if name == "all three at once" else FLOOR
            found.append(Figure(name, events / measured.seconds, "events/s", at_least=asked))
            found.append(Figure(f"{name}: peak memory", measured.peak_gib, "GiB", at_most=PEAK_GIB))
    return found


@click.command(help=__doc__)
@click.option("--events", default=5_000_000, show_default=True)
@click.option("--markets", default=1_000, show_default=True)
def main(events: int, markets: int) -> None:
    """Write the hour, then time each computation in a process of its own."""
    show(figures(events, markets))


if __name__ == "__main__":
    main()

"""How fast an hour's spreads, depth and imbalance are made: `python -m kalshi_platform.benchmarks.analytics`.

The hour is synthetic: `--markets` books that walk at random, `--events` deltas spread over the hour
with a few markets taking most of them, written to an archive of its own as the streamer writes it.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import pyarrow as pa

from kalshi_platform import settings as platform_settings
from kalshi_platform.analytics.columns import decimals, times
from kalshi_platform.loading.analytics_hours import COMPUTED, compute_hour
from kalshi_platform.storage import archive
from kalshi_platform.storage.schema import NAME, ORDERBOOK_EVENTS, PRICE, QTY, ZERO_UUID

HOUR = datetime(2026, 11, 22, 14, tzinfo=UTC)
PARTS = 12


def synthetic_hour(root: Path, events: int, markets: int, seed: int = 1) -> None:
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
    us = int(HOUR.timestamp()) * 1_000_000
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
            ],
            schema=ORDERBOOK_EVENTS.arrow,
        )
        folder = archive.hour_folder(root, ORDERBOOK_EVENTS.name, HOUR)
        archive.write(folder / archive.part_name(0, start, end), [table], table.schema)


def measure(root: Path, dataset: str) -> tuple[float, int, int, float]:
    """Seconds, rows, bytes and peak GiB of one dataset, from archive to archive, in this process."""
    own = platform_settings.load(parquet_dir=root, use_clickhouse=False)
    began = time.perf_counter()
    (report,) = compute_hour(own, HOUR, [dataset]).report.datasets
    took = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return took, report.rows, report.bytes, peak


@click.command(help=__doc__)
@click.option("--events", default=5_000_000, show_default=True)
@click.option("--markets", default=1_000, show_default=True)
def main(events: int, markets: int) -> None:
    """Write the hour, then time each dataset in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        synthetic_hour(root, events, markets)
        for name in COMPUTED:
            with ProcessPoolExecutor(1, mp_context=spawn) as process:
                took, rows, size, peak = process.submit(measure, root, name).result()
            click.echo(
                f"{name:10} {took:6.2f} s  {events / took:10,.0f} events/s  peak {peak:.2f} GiB"
                f"  {rows:,} rows  {size / 2**20:,.1f} MiB"
            )


if __name__ == "__main__":
    main()

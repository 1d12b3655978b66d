"""Memory of the streamer at a steady rate, also while ClickHouse is away, and that nothing is lost.

`python -m kalshi_platform_tests.benchmarks.memory --seconds 3600 --away` is an hour of it: ClickHouse is killed
at the start and comes back at the end; every frame must then be in both stores once.

`python -m kalshi_platform_tests.benchmarks.memory --markets 20000 --levels 180` is an hour's end with so many
levels in each book: a snapshot of every market before it and one delta after it are in the journal, and both
loads take them in, in a process of their own. A second process is asked to end while the books are written.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import urlsplit

import click
import psutil
import pyarrow as pa

from kalshi_platform import allocators
from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import open_archive
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.clickhouse import migrations
from kalshi_platform.embedded_clickhouse import running
from kalshi_platform.exchange.numbers import dollars
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.writer import Writer
from kalshi_platform.loading.loader import CLICKHOUSE_PACE, PARQUET_PACE, Loader
from kalshi_platform.loading.shared_rows import SharedRows
from kalshi_platform.loading.sinks import ClickHouseSink, ParquetSink
from kalshi_platform.schema import BOOK_CHECKPOINTS
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import HOUR, hour_of_ns, hour_start_ns
from kalshi_platform_tests.benchmarks import feed
from kalshi_platform_tests.benchmarks.figures import Figure, show
from kalshi_platform_tests.benchmarks.pipeline import Recorder, feeding

SAMPLE_S = 1.0
BOUND_MIB = 600.0
FLAT = 1.1
"""The last fifth of the time may use a tenth more than the second fifth."""


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


# -- an hour's end -----------------------------------------------------------------------------

HOUR_END_PATIENCE_S = 1_800.0


@dataclass(frozen=True)
class HourEnd:
    """How a loader passed an hour's end, sampled by its process every 20 ms."""

    seconds: float
    begun_mib: float
    """Resident before the first record."""
    peak_mib: float
    silent_s: dict[str, float]
    """The longest time in which a store took nothing, neither a range nor a batch of the checkpoint."""
    waited_s: dict[str, float]
    """The longest time without a new range: a checkpoint is written between two."""
    ended: bool
    """Whether everything was loaded."""
    end_s: float
    """From the request to end to the end of both loaders."""


def hour_end(markets: int, levels: int) -> list[Figure]:
    """Load a snapshot of every market and an hour's end, whole and with an end in the middle."""
    what = f"{markets:,} markets of {levels:,} levels over an hour's end"
    whole, stopped = (_loaded(markets, levels, stops=stops) for stops in (False, True))
    return [
        Figure(f"memory, {what}", whole.peak_mib, "MiB at most", at_most=BOUND_MIB),
        Figure(f"memory, {what}: before", whole.begun_mib, "MiB"),
        Figure(f"load, {what}", whole.seconds, "s"),
        *(
            Figure(f"{store}, {what}: longest time without {without}", seconds[store], "s")
            for without, seconds in (("a commit", whole.silent_s), ("a range", whole.waited_s))
            for store in seconds
        ),
        Figure(f"end while the books are written, {what}", stopped.end_s, "s", at_most=10.0),
    ]


def _loaded(markets: int, levels: int, *, stops: bool) -> HourEnd:
    with tempfile.TemporaryDirectory(prefix="bench-") as name, ExitStack() as stack:
        url = stack.enter_context(running(Path(name) / "clickhouse"))
        settings = platform_settings.load(
            kalshi_data_dir=Path(name), clickhouse_url=str(url), hot_retention_days=36_500
        )
        migrations.migrate(settings)
        process = stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
        process.submit(write_hour_end, settings.journal_dir(), markets, levels).result()
        allocators.return_freed_memory()  # what is set in the environment
        loads = stack.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
        found = loads.submit(_load_hour_end, settings, stops=stops).result()
        if not stops:
            hour = hour_of_ns(feed.START_US * 1000) + HOUR
            _check_checkpoint(settings, hour, markets, markets * levels)
        return found


def write_hour_end(folder: Path, markets: int, levels: int) -> None:
    """A journal of a snapshot for each market, 10 s before an hour's end, and a delta after it."""
    writer = Writer(folder)
    conn = uuid.uuid4().bytes
    at = hour_start_ns(hour_of_ns(feed.START_US * 1000) + HOUR) - 10_000_000_000
    writer.note("started", {}, recv_ns=at)
    writer.note("connected", {"use_yes_price": False}, conn=conn, recv_ns=at)
    yes, no = (
        ",".join(f'["{dollars(100 + 10 * n)}","{1 + n}.00"]' for n in range(count))
        for count in (levels - levels // 2, levels // 2)
    )
    for market in range(markets):
        head = f'"market_ticker":"{feed.ticker(market)}","market_id":"{feed.market_id(market)}"'
        body = f'{{{head},"yes_dollars_fp":[{yes}],"no_dollars_fp":[{no}]}}'
        frame = f'{{"type":"orderbook_snapshot","sid":1,"seq":{market + 1},"msg":{body}}}'
        writer.append(at, conn, Kind.SNAPSHOT, frame.encode())
        if market % 500 == 499:
            writer.submit()
            writer.wait_durable(writer.next_n, 60.0)
    head = f'"market_ticker":"{feed.ticker(0)}","market_id":"{feed.market_id(0)}"'
    body = f'{{{head},"price_dollars":"0.0100","delta_fp":"1.00","side":"yes"}}'
    frame = f'{{"type":"orderbook_delta","sid":1,"seq":{markets + 1},"msg":{body}}}'
    writer.append(at + 11_000_000_000, conn, Kind.DELTA, frame.encode())
    writer.submit()
    writer.wait_durable(writer.next_n, 60.0)
    writer.close()


class _Hot(ClickHouseSink):
    """Counts the batches of checkpoints that it took."""

    taken = 0

    def begin_hour(self, hour: datetime, books: Iterator[pa.Table], n: int) -> None:
        super().begin_hour(hour, _counted(self, books), n)


class _Cold(ParquetSink):
    """The same."""

    taken = 0

    def begin_hour(self, hour: datetime, books: Iterator[pa.Table], n: int) -> None:
        super().begin_hour(hour, _counted(self, books), n)


def _counted(store: _Hot | _Cold, books: Iterator[pa.Table]) -> Iterator[pa.Table]:
    for batch in books:
        yield batch
        store.taken += 1


class _Longest:
    """Return the longest time in which a value did not change."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last: object = None
        self._since = time.monotonic()

    def look(self, at: object) -> None:
        now = time.monotonic()
        self.seconds = max(self.seconds, now - self._since)
        if at != self._last:
            self._last, self._since = at, now


def _load_hour_end(settings: Settings, *, stops: bool) -> HourEnd:
    """Load the journal into both stores; `stops`: until the books are being written, then end."""
    allocators.return_freed_memory()
    folder = settings.journal_dir()
    writer = Writer(folder)
    derivation = SharedRows(folder)
    cold = _Cold(open_archive(settings), 0, lambda _: None)
    hot = _Hot(settings, str(writer.id))
    loads: dict[Loader, _Cold | _Hot] = {
        Loader(folder, writer, cold, PARQUET_PACE, shared_rows=derivation): cold,
        Loader(folder, writer, hot, CLICKHOUSE_PACE, shared_rows=derivation): hot,
    }
    process = psutil.Process()
    before = peak = process.memory_info().rss
    began = time.monotonic()
    silent = {load.name: _Longest() for load in loads}
    waited = {load.name: _Longest() for load in loads}
    for load in loads:
        load.start()
        if not stops:
            load.drain()
    while time.monotonic() < began + HOUR_END_PATIENCE_S:
        peak = max(peak, process.memory_info().rss)
        for load, store in loads.items():
            if load.lag or load.committed is None:
                silent[load.name].look((load.committed_ns, store.taken))
                waited[load.name].look(load.committed_ns)
        if all(load.committed and not load.lag for load in loads):
            break
        if stops and (cold.taken or hot.taken):
            break
        time.sleep(SAMPLE_S / 50)
    asked = time.monotonic()
    for load in loads:
        load.drain()
    ended = [load.join(0.1 if stops else 60.0) for load in loads]
    while any(load.alive for load in loads):
        time.sleep(0.01)
    done = time.monotonic()
    writer.close()
    for load in loads:
        if load.failure is not None:
            raise load.failure
    return HourEnd(
        asked - began,
        before / 2**20,
        peak / 2**20,
        {name: longest.seconds for name, longest in silent.items()},
        {name: longest.seconds for name, longest in waited.items()},
        all(ended),
        done - asked,
    )


def _check_checkpoint(settings: Settings, hour: datetime, markets: int, levels: int) -> None:
    """Both stores have each level of each book once, at the hour's beginning."""
    client = clickhouse.connect(settings)
    hot = client.query(
        "SELECT count(), uniqExact(market_ticker) FROM book_checkpoints WHERE ts = {hour:DateTime64(6, 'UTC')}",
        parameters={"hour": hour},
    ).result_rows[0]
    client.close()
    cold = sum(
        table.num_rows
        for table in open_archive(settings).read(BOOK_CHECKPOINTS.name, hour, ["side"])
    )
    if (tuple(hot), cold) != ((levels, markets), levels):
        raise RuntimeError(f"of {levels} levels ClickHouse has {hot}, Parquet {cold}")


@click.command(help=__doc__)
@click.option("--markets", default=500, show_default=True)
@click.option("--rate", default=10_000.0, show_default=True, help="Frames a second.")
@click.option("--seconds", default=600.0, show_default=True)
@click.option("--away", is_flag=True, help="Without ClickHouse meanwhile.")
@click.option(
    "--levels", default=0, help="Load an hour's end with so many levels in each book instead."
)
def main(markets: int, rate: float, seconds: float, away: bool, levels: int) -> None:
    """Prepare the frames, record them, sample the memory, count the rows."""
    if levels:
        show(hour_end(markets, levels))
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = Path(folder) / "deltas.bin"
        feed.write_deltas(path, int(rate * seconds), markets)
        show(soak(path, markets, rate, seconds, away=away).figures())


if __name__ == "__main__":
    main()

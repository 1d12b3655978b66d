"""How fast the reader answers: `python -m kalshi_platform_tests.benchmarks.reading`.

The archive is a made-up day of `--events` deltas of `--markets` markets in 24 sealed hours: frames of the wire, decoded,
built into rows and written as the loader does it, compacted, with spreads, depth and imbalance computed. The same
archive is read once more from an object store on this machine.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median

import click
import polars as pl
from pyarrow import fs

from kalshi_platform import settings as platform_settings
from kalshi_platform.analytics.hourly import compute_hour
from kalshi_platform.archive import LocalArchive, compaction, hours, part_name
from kalshi_platform.exchange.columnar import decode
from kalshi_platform.exchange.numbers import ONE_DOLLAR, contracts, dollars
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.reader import LogOffset, RecordRange
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.rows import build_rows
from kalshi_platform.loading.sinks import by_hour
from kalshi_platform.loading.state_files import checkpoint
from kalshi_platform.reading import Archive
from kalshi_platform.schema import BOOK_CHECKPOINTS, DATASETS
from kalshi_platform_tests import wire
from kalshi_platform_tests.benchmarks.figures import Figure, show
from kalshi_platform_tests.object_store import BUCKET, KEY, KEY_ID, object_store

DAY = datetime(2026, 11, 22, tzinfo=UTC)
HEARTBEAT_NS = 10 * wire.SECOND
RECORDED_TABLES = ("orderbook_events", "stream_events", "trades")
ITERATED = 300_000.0
"""Events a second that a replay is promised to give."""
TIMES = 5


class Market:
    """A book that trades around a mid that walks at random; one delta or trade at a time."""

    def __init__(self, ticker: str, rng: random.Random) -> None:
        self.ticker, self._rng = ticker, rng
        self._name = f'"market_ticker":"{ticker}","market_id":"{wire.market_id(ticker)}"'
        self.mid = rng.randrange(30, 70)
        self.levels = {
            "yes": {p * 100: 10_000 + 700 * p for p in range(self.mid - 20, self.mid)},
            "no": {p * 100: 10_000 + 500 * p for p in range(80 - self.mid, 100 - self.mid)},
        }

    def snapshot(self, seq: int) -> bytes:
        return wire.snapshot(self.ticker, seq, self.levels["yes"], self.levels["no"])

    def delta(self, seq: int, us: int) -> bytes:
        rng = self._rng
        if rng.random() < 0.002:
            self.mid = min(max(self.mid + rng.choice((-1, 1)), 25), 75)
        side = rng.choice(("yes", "no"))
        best = (self.mid if side == "yes" else 100 - self.mid) - 1
        price = max(best - int(rng.expovariate(0.4)), 1) * 100
        ladder = self.levels[side]
        held = ladder.get(price, 0)
        qty = -held if held and rng.random() < 0.3 else rng.randrange(100, 50_000)
        ladder[price] = held + qty
        if not ladder[price]:
            del ladder[price]
        at = f'"ts":"{_rfc3339(us)}","ts_ms":{us // 1000}'
        return (
            f'{{"type":"orderbook_delta","sid":1,"seq":{seq},"msg":{{{self._name},"price_dollars":"{dollars(price)}",'
            f'"delta_fp":"{contracts(qty)}","side":"{side}",{at}}}}}\n'
        ).encode()

    def trade(self, seq: int, number: int, us: int) -> bytes:
        side = self._rng.choice(("yes", "no"))
        price = (self.mid if side == "yes" else self.mid - 1) * 100
        return (
            f'{{"type":"trade","sid":2,"seq":{seq},"msg":{{"trade_id":"{wire.trade_id(number)}","market_ticker":"{self.ticker}",'
            f'"yes_price_dollars":"{dollars(price)}","no_price_dollars":"{dollars(ONE_DOLLAR - price)}","count_fp":"5.00",'
            f'"taker_side":"{side}","taker_outcome_side":"{side}","taker_book_side":"{"bid" if side == "yes" else "ask"}",'
            f'"is_block_trade":false,"ts":{us // 1_000_000},"ts_ms":{us // 1000}}}}}\n'
        ).encode()


def _rfc3339(us: int) -> str:
    whole, fraction = divmod(us, 1_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(whole))}.{fraction:06d}Z"


def day_archive(
    root: Path, events: int, markets: int, *, n_hours: int = 24, first: datetime = DAY
) -> list[str]:
    """Write `n_hours` sealed and computed hours with `events` deltas in all; return the tickers."""
    rng = random.Random(1)
    books = [Market(f"KXBENCH-26NOV22-T{n:05d}", rng) for n in range(markets)]
    weights = [1 / (n + 1) ** 0.8 for n in range(markets)]
    conn, seq, trades = wire.conn_id(1), 0, 0
    at = int(first.timestamp()) * wire.SECOND - 5 * wire.SECOND
    beat = (conn, Kind.NOTE, wire.note("heartbeat", {"state": "synced", "frames": 1}))
    records: list[wire.Record] = [wire.connected(conn, at)]
    for book in books:
        seq += 1
        records.append((at, conn, Kind.SNAPSHOT, book.snapshot(seq)))
    state, n = BookState(), 0
    own = platform_settings.load(_env_file=None, parquet_dir=root, use_clickhouse=False)
    archive = LocalArchive(root)
    for k in range(n_hours):
        begin = int((first + k * timedelta(hours=1)).timestamp()) * wire.SECOND
        state, n = _write(archive, records, n, state)
        table = checkpoint(state, first + k * timedelta(hours=1))
        archive.write(
            BOOK_CHECKPOINTS.name,
            first + k * timedelta(hours=1),
            part_name(0, n, n),
            [table],
            table.schema,
        )
        records, next_beat = [], begin
        per_hour = events // n_hours
        for i, book in enumerate(rng.choices(books, weights, k=per_hour)):
            at = begin + 3_600 * wire.SECOND * i // per_hour
            while next_beat <= at:
                records.append((next_beat, *beat))
                next_beat += HEARTBEAT_NS
            seq += 1
            us = at // 1000 - 4_000
            records.append((at, conn, Kind.DELTA, book.delta(seq, us)))
            if rng.random() < 0.02:
                trades += 1
                records.append((at, conn, Kind.TRADE, book.trade(trades, trades, us)))
            if len(records) > 200_000:
                state, n = _write(archive, records, n, state)
                records = []
    _write(archive, records, n, state)
    for k in range(n_hours):
        hour = first + k * timedelta(hours=1)
        hours.seal(archive, hour)
        list(compaction.compact_hour(archive, hour))
        compute_hour(own, hour)
    return [book.ticker for book in books]


def _write(
    archive: LocalArchive, records: list[wire.Record], first_n: int, state: BookState
) -> tuple[BookState, int]:
    """Build rows from journal records, and write them as one part of each hour."""
    block = RecordRange(
        first_n,
        wire.batch(records),
        (LogOffset(0, first_n, first_n),),
        LogOffset(0, first_n + len(records), first_n + len(records)),
    )
    rows, state = build_rows(decode([block]), state)
    end = first_n + len(records)
    for dataset in RECORDED_TABLES:
        for hour, piece in by_hour(rows.tables[dataset], "ingest_ts"):
            archive.write(
                dataset, hour, part_name(0, first_n, end), [piece], DATASETS[dataset].arrow
            )
    return state, end


def figures(events: int = 3_000_000, markets: int = 50) -> list[Figure]:
    """Top of book of a market's day against a scan by hand, from a disk and from an object store; and replays."""
    with tempfile.TemporaryDirectory() as folder, object_store() as store:
        root = Path(folder) / "archive"
        tickers = day_archive(root, events, markets)
        found = [*_against_a_scan(str(root), tickers, {}, at_most=1.5, where="")]
        found += [_iterated(root, tickers[:1]), _iterated(root, tickers, at_least=ITERATED)]
        fs.copy_files(
            str(root),
            f"{BUCKET}/day",
            source_filesystem=fs.LocalFileSystem(),
            destination_filesystem=store.files(),
        )
        options = {
            "aws_endpoint_url": store.url,
            "aws_region": "us-east-1",
            "aws_access_key_id": KEY_ID,
            "aws_secret_access_key": KEY,
        }
        own = {"S3_ENDPOINT_URL": store.url, "KALSHI_DATA_DIR": folder}
        with _environment({**{name.upper(): text for name, text in options.items()}, **own}):
            where = ", from an object store"
            found += _against_a_scan(f"s3://{BUCKET}/day", tickers, options, None, where)
    return found


def _against_a_scan(
    location: str, tickers: list[str], options: dict[str, str], at_most: float | None, where: str
) -> list[Figure]:
    """Time the day of a market of average size: the reader's, and what a person would write for it."""
    ticker = tickers[len(tickers) // 5]
    end = DAY + timedelta(days=1)

    def by_hand() -> int:
        rows = pl.scan_parquet(f"{location}/spreads/**/*.parquet", storage_options=options or None)
        rows = rows.filter(pl.col("market_ticker") == ticker).sort("known_at", maintain_order=True)
        return rows.collect().height

    archive = Archive(location)

    def reader() -> int:
        return archive.top(ticker, DAY, end).height

    hand, ours = _median_s(by_hand), _median_s(reader)
    beside = f"{1000 * ours:.0f} and {1000 * hand:.0f} ms"
    what = f"a market-day as top of book, against a scan by hand{where}"
    return [Figure(what, ours / hand, "times", at_most=at_most, beside=beside)]


def _median_s(work: Callable[[], int]) -> float:
    took = []
    for _ in range(TIMES):
        began = time.perf_counter()
        assert work() > 0
        took.append(time.perf_counter() - began)
    return median(took)


def _iterated(root: Path, tickers: list[str], at_least: float | None = None) -> Figure:
    """Iterate a day's replay."""
    began, events = time.perf_counter(), 0
    for _ in Archive(root).replay(tickers, DAY, DAY + timedelta(days=1)):
        events += 1
    rate = events / (time.perf_counter() - began)
    what = f"replay of a day of {len(tickers)} market{'s'[: len(tickers) > 1]}, iterated in Python"
    return Figure(what, rate, "events/s", at_least=at_least)


@contextmanager
def _environment(more: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@click.command(help=__doc__)
@click.option("--events", default=3_000_000, show_default=True)
@click.option("--markets", default=50, show_default=True)
def main(events: int, markets: int) -> None:
    """Write the day, then time the reader on it."""
    show(figures(events, markets))


if __name__ == "__main__":
    main()

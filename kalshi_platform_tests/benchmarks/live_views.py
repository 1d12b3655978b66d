"""How long the live views take on a full table: `python -m kalshi_platform_tests.benchmarks.live_views`.

An embedded ClickHouse of its own is filled with `--rows` order-book events of the last 24 hours over
`--markets` markets, a tenth of them in the busiest one, with hourly checkpoints, heartbeats and the book
now. `book_at` is asked for markets and instants drawn at random, for the busiest market at random
instants, and for a market that has no row: what that takes is planning, not reading. The promised median is
of the random draw; the busiest market has up to an hour of a tenth of all events to read, and stands beside
it. Every other question is asked once, and then eleven times on the clock. All in ms, transport and client
included.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.client import Client, connect
from kalshi_platform.embedded_clickhouse import running
from kalshi_platform.settings import Settings
from kalshi_platform_tests.benchmarks.figures import Figure, show

TIMES = 11
SAMPLES = 300
"""Of book_at: enough for the 99th percentile to be more than the one slowest."""
PATIENCE_S = 30.0
BUSIEST = "KXBENCH-T00000"
NOT_THERE = "KXBENCH-NONE"
LIMIT_MS, P50_MS, P99_MS, FRESH_MS = 100.0, 20.0, 100.0, 1000.0
_BATCH = 5_000_000
_ZERO = "toUUID('00000000-0000-0000-0000-000000000001')"

_EVENTS = f"""
INSERT INTO orderbook_events
SELECT
    'delta', {_ZERO}, 1, number, {_ZERO},
    'KXBENCH-T' || leftPad(toString(toUInt32({{markets:UInt32}} * pow(rand(1) / 4294967296, 3))), 5, '0'),
    if(rand(2) % 2, 'yes', 'no'),
    toDecimal32((35 + rand(3) % 15) / 100, 4),
    toDecimal64(rand(4) % 1000, 2),
    toDecimal64(if(rand(5) % 10 < 3, 0, rand(6) % 100000), 2),
    at, at, '', 0, number
FROM
(
    SELECT number,
        now64(6, 'UTC') - toIntervalMicrosecond(toUInt64(86400e6 * (1 - number / {{rows:UInt64}}))) AS at
    FROM numbers({{first:UInt64}}, {{count:UInt64}})
)
"""
_LEVELS = """
SELECT
    'KXBENCH-T' || leftPad(toString(intDiv(number, 80)), 5, '0') AS market_ticker,
    if(number % 2, 'yes', 'no') AS side,
    toDecimal32((number % 80 - number % 2) / 200 + 0.05, 4) AS price,
    toDecimal64(1 + rand() % 100000, 2) AS size
FROM numbers({markets:UInt64} * 80)
"""
_LATEST = f"""
INSERT INTO latest_levels (market_id, market_ticker, side, price, size, ingest_ts, version)
SELECT {_ZERO}, market_ticker, side, price, size, now64(6, 'UTC'), 1 FROM ({_LEVELS})
"""
_CHECKPOINTS = f"""
INSERT INTO book_checkpoints
SELECT ts, {_ZERO}, 1,
    greatest(0, toInt64({{rows:UInt64}} * (1 - dateDiff('second', ts, now('UTC')) / 86400))) AS seq,
    {_ZERO}, market_ticker, true, side, price, size, 0, seq
FROM (SELECT *, toStartOfHour(now('UTC')) - toIntervalHour(arrayJoin(range(24))) AS ts FROM ({_LEVELS}))
"""
_HEARTBEATS = f"""
INSERT INTO stream_events
SELECT now64(6, 'UTC') - toIntervalSecond(10 * number), {_ZERO}, 0, 0, 'heartbeat', '', '{{}}', 0, {{rows:UInt64}} - number
FROM numbers(8640)
"""
_CHANGE = f"""
INSERT INTO latest_levels (market_id, market_ticker, side, price, size, ingest_ts, version)
SELECT {_ZERO}, '{BUSIEST}', 'yes', toDecimal32(0.0001, 4), {{size:UInt32}}, now64(6, 'UTC') AS at, toUnixTimestamp64Micro(at)
"""
QUESTIONS = {
    "top_of_book, all": "SELECT * FROM top_of_book",
    "top_of_book, one market": "SELECT * FROM top_of_book WHERE market_ticker = {ticker:String}",
    "live_depth, all": "SELECT * FROM live_depth",
    "live_depth, one market": "SELECT * FROM live_depth WHERE market_ticker = {ticker:String}",
    "live_imbalance, all": "SELECT * FROM live_imbalance",
    "live_imbalance, one market": "SELECT * FROM live_imbalance WHERE market_ticker = {ticker:String}",
    "rolling_stats, 1 minute": "SELECT * FROM rolling_stats(ticker = {ticker:String}, minutes = 1)",
    "rolling_stats, 5 minutes": "SELECT * FROM rolling_stats(ticker = {ticker:String}, minutes = 5)",
}
"""Each of the busiest market, the worst case."""
SEEN = "SELECT bid_levels, bid_size_all FROM live_depth WHERE market_ticker = {ticker:String}"
BOOK_AT = "SELECT * FROM book_at(ticker = {ticker:String}, at = {at:DateTime64(6, 'UTC')})"


def fill(client: Client, rows: int, markets: int) -> None:
    """Events, checkpoints and the book now."""
    for first in range(0, rows, _BATCH):
        given = {
            "rows": rows,
            "first": first,
            "count": min(_BATCH, rows - first),
            "markets": markets,
        }
        client.command(_EVENTS, parameters=given)
    for statement in (_LATEST, _CHECKPOINTS, _HEARTBEATS):
        client.command(statement, parameters={"rows": rows, "markets": markets})


def ask(client: Client, question: str, parameters: dict[str, object] | None = None) -> float:
    """How long an answer takes, in ms."""
    began = time.perf_counter()
    client.query(question, parameters=parameters)
    return 1000 * (time.perf_counter() - began)


def _percentiles(name: str, took: Sequence[float], median_ms: float | None) -> list[Figure]:
    hundredths = statistics.quantiles(took, n=100)
    return [
        Figure(f"{name}: median", statistics.median(took), "ms", at_most=median_ms),
        Figure(f"{name}: 99th percentile", hundredths[98], "ms", at_most=P99_MS),
    ]


def measure(client: Client, markets: int, seed: int = 1) -> list[Figure]:
    """Run every query on a filled database."""
    found = []
    rng = random.Random(seed)
    now = datetime.now(UTC)
    everyone = [f"KXBENCH-T{number:05d}" for number in range(markets)]
    asked = {
        "book_at, any market, any instant": (everyone, P50_MS),
        "book_at, the busiest market": ([BUSIEST], None),
    }
    for name, (tickers, median_ms) in asked.items():
        took = []
        for _ in range(SAMPLES):
            at = now - timedelta(seconds=rng.uniform(0, 23 * 3600))
            took.append(ask(client, BOOK_AT, {"ticker": rng.choice(tickers), "at": at}))
        found += _percentiles(name, took, median_ms)
    floors = {"book_at, a market without a row": BOOK_AT, "SELECT 1": "SELECT 1"}
    for name, question in floors.items():
        took = [ask(client, question, {"ticker": NOT_THERE, "at": now}) for _ in range(SAMPLES)]
        found.append(Figure(f"{name}: median", statistics.median(took), "ms"))
    for name, question in QUESTIONS.items():
        ask(client, question, {"ticker": BUSIEST})  # the first fills the caches
        took = [ask(client, question, {"ticker": BUSIEST}) for _ in range(TIMES)]
        found += [
            Figure(f"{name}: median", statistics.median(took), "ms"),
            Figure(f"{name}: slowest of {TIMES}", max(took), "ms", at_most=LIMIT_MS),
        ]
    return [
        *found,
        Figure("a change is seen in live_depth after", _freshness(client), "ms", at_most=FRESH_MS),
    ]


def _freshness(client: Client) -> float:
    """Return the longest of some times from sending a change to an answer that has it, in ms."""
    slowest = 0.0
    busiest = {"ticker": BUSIEST}
    for size in range(1, TIMES + 1):
        before = client.query(SEEN, parameters=busiest).first_row
        began = time.perf_counter()
        client.command(_CHANGE, parameters={"size": size})
        while client.query(SEEN, parameters=busiest).first_row == before:
            if time.perf_counter() - began > PATIENCE_S:
                raise RuntimeError("a change of the book did not show in live_depth")
        slowest = max(slowest, 1000 * (time.perf_counter() - began))
    return slowest


def prepared(settings: Settings, rows: int, markets: int) -> Client:
    """A client of a database that holds the made-up events."""
    migrations.migrate(settings)
    client = connect(settings)
    fill(client, rows, markets)
    return client


def figures(rows: int = 50_000_000, markets: int = 1_000) -> list[Figure]:
    """Fill, then query."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder) / "clickhouse") as url:
        settings = platform_settings.load(clickhouse_url=url, clickhouse_database="bench")
        client = prepared(settings, rows, markets)
        try:
            return measure(client, markets)
        finally:
            client.close()


@click.command(help=__doc__)
@click.option("--rows", default=50_000_000, show_default=True)
@click.option("--markets", default=1_000, show_default=True)
def main(rows: int, markets: int) -> None:
    """Fill, query, and print."""
    show(figures(rows, markets))


if __name__ == "__main__":
    main()

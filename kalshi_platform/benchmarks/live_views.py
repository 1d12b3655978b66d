"""How long the live views take on a full table: `python -m kalshi_platform.benchmarks.live_views`.

An embedded ClickHouse of its own is filled with `--rows` order-book events of the last 24 hours over
`--markets` markets, a tenth of them in the busiest one, with hourly checkpoints and the book now. Each
question is then asked eleven times; the median and the slowest are shown, in ms, transport included.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import click

from kalshi_platform import settings as platform_settings
from kalshi_platform.storage import migrations
from kalshi_platform.storage.clickhouse import Client, connect
from kalshi_platform.storage.embedded import running

TIMES = 11
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
    at, at, ''
FROM
(
    SELECT number,
        now64(6, 'UTC') - toIntervalMicrosecond(toUInt64(86400e6 * (1 - number / {{rows:UInt64}}))) AS at
    FROM numbers({{first:UInt64}}, {{count:UInt64}})
)
"""  # noqa: S608 - a constant
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
"""  # noqa: S608 - a constant
_CHECKPOINTS = f"""
INSERT INTO book_checkpoints
SELECT toStartOfHour(now('UTC')) - toIntervalHour(arrayJoin(range(24))), {_ZERO}, 1, 0, {_ZERO}, market_ticker, true, side, price, size
FROM ({_LEVELS})
"""  # noqa: S608 - a constant
QUESTIONS = {
    "top_of_book, all": "SELECT * FROM top_of_book",
    "top_of_book, one market": "SELECT * FROM top_of_book WHERE market_ticker = 'KXBENCH-T00000'",
    "live_depth, all": "SELECT * FROM live_depth",
    "live_depth, one market": "SELECT * FROM live_depth WHERE market_ticker = 'KXBENCH-T00000'",
    "live_imbalance, all": "SELECT * FROM live_imbalance",
    "live_imbalance, one market": "SELECT * FROM live_imbalance WHERE market_ticker = 'KXBENCH-T00000'",
    "rolling_stats, 1 minute": "SELECT * FROM rolling_stats(ticker = 'KXBENCH-T00000', minutes = 1)",
    "rolling_stats, 5 minutes": "SELECT * FROM rolling_stats(ticker = 'KXBENCH-T00000', minutes = 5)",
    "book_at, now": "SELECT * FROM book_at(ticker = 'KXBENCH-T00000', at = now64(6))",
}  # each of the busiest market, the worst case


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
    for statement in (_LATEST, _CHECKPOINTS):
        client.command(statement, parameters={"markets": markets})


@click.command(help=__doc__)
@click.option("--rows", default=50_000_000, show_default=True)
@click.option("--markets", default=1_000, show_default=True)
def main(rows: int, markets: int) -> None:
    """Fill, then ask."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder) / "clickhouse") as url:
        settings = platform_settings.load(clickhouse_url=url, clickhouse_database="bench")
        migrations.migrate(settings)
        client = connect(settings)
        began = time.perf_counter()
        fill(client, rows, markets)
        click.echo(f"{rows:,} events of {markets:,} markets in {time.perf_counter() - began:.0f} s")
        for name, question in QUESTIONS.items():
            took = []
            for _ in range(TIMES):
                began = time.perf_counter()
                client.query(question)
                took.append(1000 * (time.perf_counter() - began))
            click.echo(
                f"{name:28} median {statistics.median(took):6.0f} ms, slowest {max(took):6.0f}"
            )
        client.close()


if __name__ == "__main__":
    main()

"""How long the inventory audit takes: `python -m kalshi_platform_tests.benchmarks.inventory`.

An embedded ClickHouse of its own is filled with `--rows` decisions of the last two hours over 100 markets and
two engines, and with the actions, answers, fills and snapshots that belong to them. In every tenth market
something is wrong for nine seconds of every two minutes: some 37,000 rows, some hundred breaks. `qa` runs as a
process of its own, its start included; the Dagster checks are run one by one in this process.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import click
import dagster as dg

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.client import Client, connect
from kalshi_platform.embedded_clickhouse import running
from kalshi_platform.orchestration import inventory
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.settings import Settings
from kalshi_platform_tests.benchmarks.figures import Figure, show

MARKETS = 100
SPAN_S = 6_600
"""What the decisions are spread over: within the look-back of the checks."""
QA_S, CHECK_S = 15.0, 3.0
FEW = 33_000
"""Decisions of the table on which each asset check is run alone; every market has a fault."""
_BATCH = 1_000_000

# Of a market's forty decisions: a bid of 10 rests for twenty, is filled, and is held for ten; an ask of 10
# rests for five, is filled, and nothing rests for five.
_STEPS = """
    SELECT
        number,
        number % {markets:UInt32}                               AS market,
        intDiv(number, {markets:UInt32})                        AS loop,
        loop % 40                                               AS step,
        'KXBENCH-T' || leftPad(toString(market), 3, '0')        AS ticker,
        'engine-' || toString(market % 2)                       AS engine,
        fromUnixTimestamp64Milli({begin_ms:Int64}
            + toInt64(number * ({span_s:UInt32} * 1000 / {rows:UInt64})), 'UTC') AS at
    FROM numbers({first:UInt64}, {count:UInt64})
"""
_DECISIONS = f"""
INSERT INTO mm_decisions (ts, decision_id, engine_instance_id, engine_version, market_ticker,
    bb_px, ba_px, mid, spread, fair, inv_before, inv_after_est, params_json, pos_filled, pos_open_exposure,
    pos_total_est, open_orders_count, open_yes_bid_size, open_yes_ask_size, inv_convention)
SELECT at, generateUUIDv4(), engine, '1.0', ticker, 0.44, 0.47, 0.455, 0.03, 0.455,
    if(wrong AND fault = 3, held + 4, held), if(wrong AND fault = 3, held + 4, held + resting), '{{}}',
    if(wrong AND fault = 0, held + 3, held) AS filled,
    if(wrong AND fault = 1, resting + 7, resting) AS exposure,
    if(wrong AND fault = 2, filled + exposure + 5, filled + exposure),
    if(wrong AND fault = 1, 0, resting != 0),
    greatest(resting, 0.), greatest(-resting, 0.), 'yes_positive'
FROM
(
    SELECT *,
        if(step >= 20 AND step < 35, 10., 0.)                   AS held,
        multiIf(step < 20, 10., step >= 30 AND step < 35, -10., 0.) AS resting,
        {{wrong_every:UInt32}} > 0 AND market % greatest({{wrong_every:UInt32}}, 1) = 0
            AND toUnixTimestamp(at) % 120 < 9       AS wrong,
        intDiv(market, greatest({{wrong_every:UInt32}}, 1)) % 4                                  AS fault
    FROM ({_STEPS})
)
"""
_ACTIONS = f"""
INSERT INTO mm_order_actions (ts, action_id, decision_id, engine_instance_id, engine_version,
    market_ticker, client_order_id, action_type, side, api_side, price, price_cents, size, request_json)
SELECT at - toIntervalMillisecond(2), 'a' || toString(number), generateUUIDv4(), engine, '1.0', ticker,
    'o' || toString(number), 'place', if(step = 0, 'bid', 'ask'), 'yes', 0.45, 45, 10,
    '{{"client_order_id":"o' || toString(number) || '"}}'
FROM ({_STEPS}) WHERE step IN (0, 30)
"""
_RESPONSES = f"""
INSERT INTO mm_order_responses (ts, action_id, engine_instance_id, engine_version, market_ticker,
    client_order_id, status, exchange_order_id, latency_ms, response_json)
SELECT at + toIntervalMillisecond(if(step IN (0, 30), 20, -1)), 'a' || toString(order), engine, '1.0', ticker,
    'o' || toString(order), if(step IN (0, 30), 'resting', 'executed'), 'x' || toString(order), 20, '{{}}'
FROM
(
    SELECT *, number - {{markets:UInt32}} * multiIf(step = 20, 20, step = 35, 5, 0) AS order
    FROM ({_STEPS}) WHERE step IN (0, 20, 30, 35)
)
"""
_FILLS = f"""
INSERT INTO mm_fills (ts, engine_instance_id, engine_version, market_ticker, exchange_order_id,
    client_order_id, side, price, price_cents, size, decision_id, fill_id, raw_json)
SELECT at - toIntervalMillisecond(1), engine, '1.0', ticker, 'x' || toString(order), 'o' || toString(order),
    if(step = 20, 'yes', 'no'), 0.45, 45, 10, generateUUIDv4(), 'f' || toString(number), '{{}}'
FROM
(
    SELECT *, number - {{markets:UInt32}} * if(step = 20, 20, 5) AS order
    FROM ({_STEPS}) WHERE step IN (20, 35)
)
"""
_SNAPSHOTS = f"""
INSERT INTO mm_position_snapshots (ts, engine_instance_id, engine_version, market_ticker, pos_filled,
    avg_cost, source, raw_json)
SELECT at + toIntervalMillisecond(1), 'platform', '1.0', ticker, if(step >= 20 AND step < 35, 10, 0), 0.45,
    'positions', '{{}}'
FROM ({_STEPS})
WHERE loop % greatest(1, intDiv({{rows:UInt64}} * 300, {{markets:UInt32}} * {{span_s:UInt32}})) = 0
"""


def fill(client: Client, rows: int, markets: int, wrong_every: int) -> None:
    """Two hours of two engines, up to now; every n-th market has a fault, with 0 none."""
    now_ms = int(time.time() * 1000)
    for first in range(0, rows, _BATCH):
        given = {
            "rows": rows,
            "markets": markets,
            "wrong_every": wrong_every,
            "first": first,
            "count": min(_BATCH, rows - first),
            "span_s": SPAN_S,
            "begin_ms": now_ms - SPAN_S * 1000,
        }
        for statement in (_SNAPSHOTS, _FILLS, _ACTIONS, _RESPONSES, _DECISIONS):
            client.command(statement, parameters=given)


def prepared(
    settings: Settings, rows: int, *, markets: int = MARKETS, wrong_every: int = 10
) -> None:
    """A database that holds them."""
    migrations.migrate(settings)
    with closing(connect(settings)) as client:
        fill(client, rows, markets, wrong_every)


def qa(settings: Settings, *flags: str) -> float:
    """Return how long `qa` takes, including its process's start, in seconds. Raises if it audits nothing."""
    url = urlsplit(settings.clickhouse_url)
    argv = [sys.executable, "-m", "kalshi_platform.qa.mm_inventory_qa", "--host", str(url.hostname)]
    argv += ["--port", str(url.port), "--database", settings.clickhouse_database, *flags]
    began = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    if done.returncode not in {0, 2}:
        raise RuntimeError(f"qa did not judge: {done.stderr}")
    return took


def asset_checks(settings: Settings) -> dict[str, float]:
    """How long each Dagster check takes alone, in seconds."""
    found = {}
    platform = KalshiResource(
        overrides={
            "clickhouse_url": settings.clickhouse_url,
            "clickhouse_database": settings.clickhouse_database,
        }
    )
    for key in inventory.inventory_checks.check_keys:
        defs = dg.Definitions(
            assets=inventory.ASSETS,
            asset_checks=inventory.CHECKS,
            jobs=[dg.define_asset_job("one", selection=dg.AssetSelection.checks(key))],
            resources={"platform": platform},
            executor=dg.in_process_executor,
        )
        job = defs.resolve_job_def("one")
        with dg.DagsterInstance.ephemeral() as instance:
            began = time.perf_counter()
            job.execute_in_process(instance=instance)
            found[key.name] = time.perf_counter() - began
    return found


def figures(rows: int = 5_000_000) -> list[Figure]:
    """Fill, then audit."""
    with tempfile.TemporaryDirectory() as folder, running(Path(folder) / "clickhouse") as url:
        many = platform_settings.load(clickhouse_url=url, clickhouse_database="bench_many")
        prepared(many, rows)
        of = f"qa, {rows:,} decisions"
        found = [
            Figure(of, qa(many), "s"),
            Figure(f"{of}: --all --explain", qa(many, "--all", "--explain"), "s", at_most=QA_S),
        ]
        few = platform_settings.load(clickhouse_url=url, clickhouse_database="bench_few")
        prepared(few, FEW, wrong_every=1)
        took = asset_checks(few)
    slowest = max(took, key=lambda name: took[name])
    return [
        *found,
        Figure(
            f"slowest asset check, {FEW:,} decisions",
            took[slowest],
            "s",
            at_most=CHECK_S,
            beside=f"{slowest}; together {sum(took.values()):.1f} s",
        ),
    ]


@click.command(help=__doc__)
@click.option("--rows", default=5_000_000, show_default=True)
def main(rows: int) -> None:
    """Fill, audit, and print."""
    show(figures(rows))


if __name__ == "__main__":
    main()

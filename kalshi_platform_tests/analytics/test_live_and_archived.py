"""The archive's values at an hour's end equal the live views' values of the book."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import polars as pl
import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.analytics.hourly import compute_hour
from kalshi_platform.archive import LocalArchive
from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.client import connect
from kalshi_platform.recorder.streamer import Streamer
from kalshi_platform.simulator.server import Simulator
from kalshi_platform_tests.archived import paths
from kalshi_platform_tests.simulator_fixtures import StartSimulator

BOOK = ["yes_bid", "bid_size", "bid_size_5c", "bid_size_all", "bid_levels", "bid_notional"]
BOOK += [name.replace("bid", "ask") for name in BOOK]


def test_the_last_depth_and_imbalance_equal_the_live_views(
    tmp_path: Path,
    clickhouse_url: str,
    clickhouse_database: str,
    start_simulator: StartSimulator,
) -> None:
    simulator: Simulator = start_simulator(markets=12, rate=800.0, rolling_markets=0)
    settings = platform_settings.load(
        kalshi_data_dir=tmp_path,
        clickhouse_url=clickhouse_url,
        clickhouse_database=clickhouse_database,
        kalshi_ws_url=simulator.ws_url,
        kalshi_rest_url=simulator.rest_url,
    )
    settings.exchange.key_file.parent.mkdir(parents=True)
    shutil.copy(simulator.key_file, settings.exchange.key_file)
    migrations.migrate(settings)
    streamer = Streamer(settings)
    streamer.start()
    deadline = time.monotonic() + 120
    while streamer.health().synced < 12 or streamer.health().frames < 2_000:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    simulator.inject("gap")
    before = streamer.health().frames
    while streamer.health().frames < before + 500:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert streamer.stop(60), "not everything is in both stores"

    hours = LocalArchive(settings.archive_dir).hours("orderbook_events")
    for hour in hours:
        compute_hour(settings, hour)
    client = connect(settings)
    try:
        live = pl.DataFrame(
            client.query_arrow(
                f"SELECT market_ticker, {', '.join(BOOK)} FROM live_depth ORDER BY market_ticker"
            )
        )
        ratios = "imbalance_best, imbalance_5_levels, imbalance_5c"
        live_ratios = client.query(
            f"SELECT market_ticker, {ratios} FROM live_imbalance ORDER BY market_ticker"
        ).result_rows
        # The views of the same instant, from the archive's tables in ClickHouse.
        last_ratios = client.query(
            f"SELECT market_ticker, {ratios} FROM imbalance ORDER BY market_ticker, second DESC"
            " LIMIT 1 BY market_ticker"
        ).result_rows
        (tops,) = client.query(
            "SELECT countIf((t.yes_bid, t.yes_ask, t.yes_bid_size) IS DISTINCT FROM (s.1, s.2, s.3))"
            " FROM top_of_book AS t INNER JOIN (SELECT market_ticker,"
            " argMax((yes_bid, yes_ask, yes_bid_size), (ingest_ts, seq)) AS s FROM spreads"
            " GROUP BY market_ticker) AS l USING (market_ticker)"
        ).result_rows
    finally:
        client.close()
    depth = pl.concat(pl.read_parquet(paths(settings.archive_dir, "depth", hour)) for hour in hours)
    last = depth.sort("market_ticker", "second").group_by("market_ticker").last()
    assert last.height == live.height == 12
    for name in BOOK:
        got = dict(last.select("market_ticker", pl.col(name).cast(pl.Float64)).iter_rows())
        wanted = dict(live.select("market_ticker", pl.col(name).cast(pl.Float64)).iter_rows())
        assert got == wanted, name
    assert [row[0] for row in last_ratios] == [row[0] for row in live_ratios]
    for (_, *got_ratios), (_, *live_now) in zip(last_ratios, live_ratios, strict=True):
        assert got_ratios == pytest.approx(live_now, rel=1e-14)  # the view divides rounded sums
    assert tops == (0,)

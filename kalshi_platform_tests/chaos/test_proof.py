"""The campaigns' proof: it finds nothing in a good recording, and everything that is done to one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.settings import Settings
from kalshi_platform_tests.chaos.proof import DELTAS, LIVES, TRADES, compare
from kalshi_platform_tests.recorder.test_streamer import (
    settings_for,
    streaming,
    wait_for,
    wait_for_the_last_frames,
)
from kalshi_platform_tests.simulator_fixtures import StartSimulator

__all__ = ["settings_for"]  # the fixture


def parts(settings: Settings, dataset: str) -> list[Path]:
    return sorted((settings.archive_dir / dataset).glob("**/*.parquet"))


def test_a_recording_is_sound_until_a_row_is_lost_or_doubled(
    start_simulator: StartSimulator, settings_for: Callable[..., Settings]
) -> None:
    simulator = start_simulator(markets=12, rate=800.0, rolling_markets=4, rolling_seconds=20.0)
    settings = settings_for(simulator)
    with streaming(settings) as streamer:
        wait_for(lambda: streamer.health().synced >= 12, "the books")
        simulator.inject("gap:2")
        wait_for(lambda: streamer.health().gaps > 0, "the gap")
        time.sleep(6.0)  # one market closes, and another opens
        simulator.pause()
        wait_for(lambda: streamer.health().synced == streamer.health().markets, "the last books")
        wait_for_the_last_frames(settings, simulator, simulator.open_markets())
    good = compare(settings, simulator)
    assert good.sound, good
    assert good.gaps == 1
    assert min(good.kept[what].journalled for what in (DELTAS, TRADES, LIVES)) > 0

    trades = parts(settings, "trades")[0]
    aside = trades.with_suffix(".aside")
    trades.rename(aside)
    cold_lost = compare(settings, simulator)
    assert cold_lost.kept[TRADES].lost > 0
    assert cold_lost.verdict == "not whole"
    assert not cold_lost.sound
    aside.rename(trades)

    copy = shutil.copy(trades, trades.with_name(trades.name.replace("part-0-", "part-7-")))
    cold_doubled = compare(settings, simulator)
    assert cold_doubled.doubled > 0
    assert cold_doubled.verdict == "not whole"
    assert not cold_doubled.sound
    Path(copy).unlink()

    client = clickhouse.connect(settings)
    one = "(conn_id, seq) = (SELECT conn_id, max(seq) - 1 FROM orderbook_events WHERE type = 'delta' GROUP BY conn_id)"
    client.command(f"INSERT INTO orderbook_events SELECT * FROM orderbook_events WHERE {one}")
    hot_doubled = compare(settings, simulator)
    assert hot_doubled.doubled > 0
    assert hot_doubled.verdict == "not whole"
    client.command(f"ALTER TABLE orderbook_events DELETE WHERE {one}", {"mutations_sync": 1})
    hot_lost = compare(settings, simulator)
    assert (hot_lost.lost, hot_lost.unexplained, hot_lost.verdict) == (1, 1, "not whole")

    client.command("TRUNCATE TABLE latest_levels")
    assert compare(settings, simulator).books_differ > 0

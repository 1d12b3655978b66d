"""The whole pipeline while markets join and leave, with trades: note exactly once."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from kalshi_platform.settings import Settings
from kalshi_platform.simulator.server import Simulator
from kalshi_platform_tests.recorder.test_streamer import (
    archived,
    assert_lossless,
    query,
    settings_for,
    streaming,
    wait_for,
)
from kalshi_platform_tests.simulator_fixtures import StartSimulator

__all__ = ["settings_for"]

Trade = tuple[str, str, Decimal, Decimal, Decimal, str, str, bool, datetime]


@pytest.fixture(autouse=True)
def _brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings for markets that are open for seconds and an exchange without a REST cache."""
    monkeypatch.setattr("kalshi_platform.recorder.market_selection.REFRESH_S", 0.5)
    monkeypatch.setattr("kalshi_platform.recorder.universe.LEAVE_AFTER_S", 4.0)
    monkeypatch.setattr("kalshi_platform.recorder.universe.CACHED_S", 0.0)
    # Trades in flight when a connection ended lie within the margin before its last frame; trades that REST
    # lists within the margin after the span must have arrived over the stream when REST is queried.
    monkeypatch.setattr("kalshi_platform.recorder.trade_backfill.MARGIN_S", 1)
    monkeypatch.setattr("kalshi_platform.recorder.trade_backfill.DELAY_S", 4.0)
    monkeypatch.setattr("kalshi_platform.exchange.auxiliary_channel.REFUSED_RETRY_S", 1.0)


def ledger(simulator: Simulator) -> dict[str, Trade]:
    """The exchange's own trades, by trade id."""
    return {
        name: (
            name,
            t["ticker"],
            Decimal(t["yes_price_dollars"]),
            Decimal(t["no_price_dollars"]),
            Decimal(t["count_fp"]),
            t["taker_outcome_side"],
            t["taker_book_side"],
            t["is_block_trade"],
            _milliseconds(datetime.fromisoformat(t["created_time"])),
        )
        for name, t in simulator.trades().items()
    }


def _milliseconds(at: datetime) -> datetime:
    return at.replace(microsecond=at.microsecond // 1000 * 1000)


COLUMNS = (
    "trade_id, market_ticker, yes_price, no_price, qty, taker_outcome_side, taker_book_side,"
    " is_block_trade, ts"
)


def recorded(settings: Settings) -> list[Trade]:
    """The trades of both stores, which must agree row by row."""
    hot = [tuple(row) for row in query(settings, f"SELECT {COLUMNS} FROM trades")]
    cold = archived(settings, "trades").select(COLUMNS.split(", ")).rows()
    assert sorted(map(repr, hot)) == sorted(map(repr, map(_utc, cold)))
    assert len({row[0] for row in hot}) == len(hot), "a trade is there twice"
    return hot


def _utc(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*row[:-1], row[-1].astimezone(UTC))


def kinds(settings: Settings) -> dict[str, int]:
    sql = "SELECT kind, count() FROM stream_events GROUP BY kind"
    return dict(query(settings, sql))


def has_lifecycle_subscription(settings: Settings) -> bool:
    """Whether the exchange has acknowledged the lifecycle subscription."""
    sql = (
        "SELECT count() FROM stream_events"
        " WHERE kind = 'subscribed' AND detail LIKE '%market_lifecycle_v2%'"
    )
    return query(settings, sql) != [(0,)]


def wait_for_trades(settings: Settings, trades: set[str]) -> None:
    """Wait until ClickHouse has these trades: trades in flight when a recording ends are not recorded."""
    sql = "SELECT trade_id FROM trades"
    wait_for(lambda: trades <= {name for (name,) in query(settings, sql)}, "the last trades")


def recovered(settings: Settings) -> list[dict[str, Any]]:
    sql = "SELECT detail FROM stream_events WHERE kind = 'recovered' ORDER BY ingest_ts"
    return [json.loads(detail) for (detail,) in query(settings, sql)]


@pytest.mark.timeout(600)
def test_markets_join_and_leave_without_a_gap(
    start_simulator: StartSimulator, settings_for: Callable[..., Settings]
) -> None:
    # A market is announced one lifetime before it opens: the machine may be busy for that long.
    simulator = start_simulator(markets=16, rolling_markets=12, rolling_seconds=6.0, rate=600.0)
    settings = settings_for(simulator)
    with streaming(settings) as streamer:
        wait_for(lambda: streamer.health().synced >= 16, "books")
        wait_for(lambda: streamer.health().trades > 0, "trades, which are subscribed to after them")
        first = set(simulator.books())
        settled = set(simulator.trades())
        wait_for(
            lambda: (
                len(set(simulator.books()) - first) > 36
                and len(ledger(simulator)) > len(settled) + 300
            ),
            "several generations",
        )
        health = streamer.health()
        simulator.pause()
        traded = ledger(simulator)
        # Markets that joined during recording joined before their first trade.
        expected = {n for n, t in traded.items() if n not in settled or t[1] not in first}
        wait_for_trades(settings, expected)
    assert (health.connections, health.gaps) == (1, 0)
    joined = {t for (t,) in query(settings, "SELECT DISTINCT market_ticker FROM orderbook_events")}
    assert len(joined - first) >= 20, "several generations came"
    assert kinds(settings)["left"] >= 12
    stored = {row[0]: row for row in recorded(settings)}
    assert expected <= stored.keys()
    assert stored == {n: traded[n] for n in stored}
    assert len(expected) > 300
    assert kinds(settings)["market_lifecycle_v2"] >= 20
    assert_lossless(settings)


def test_a_market_is_followed_before_it_opens_with_few_queries(
    start_simulator: StartSimulator,
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The clock and lifecycle events suffice: REST is queried once, at the start."""
    monkeypatch.setattr("kalshi_platform.recorder.market_selection.REFRESH_S", 600.0)
    # A market is announced once, one lifetime before it opens, and joined five seconds before.
    simulator = start_simulator(markets=4, rolling_markets=4, rolling_seconds=8.0, rate=200.0)
    settings = settings_for(simulator)
    with streaming(settings) as streamer:
        wait_for(lambda: streamer.health().synced >= 4, "books")
        wait_for(lambda: has_lifecycle_subscription(settings), "the lifecycle subscription")
        first = set(simulator.books())
        sql = "SELECT DISTINCT market_ticker FROM trades"
        wait_for(
            lambda: len({ticker for (ticker,) in query(settings, sql)} - first) >= 3,
            "trades of markets that were not listed yet",
        )
    first_seen = dict(
        query(
            settings,
            "SELECT market_ticker, min(ingest_ts) FROM stream_events WHERE kind = 'snapshot'"
            " GROUP BY market_ticker",
        )
    )
    opened = dict(
        query(settings, "SELECT market_ticker, min(ts) FROM trades GROUP BY market_ticker")
    )
    later = opened.keys() - first
    assert len(later) >= 2
    assert all(first_seen[ticker] < opened[ticker] for ticker in later)
    assert streamer.health().connections == 1
    assert_lossless(settings)


def test_early_close_and_halt_are_applied_from_events(
    start_simulator: StartSimulator,
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kalshi_platform.recorder.universe.LEAVE_AFTER_S", 2.0)
    simulator = start_simulator(markets=4, rolling_markets=2, rate=100.0)
    settings = settings_for(simulator)
    with streaming(settings) as streamer:
        wait_for(lambda: streamer.health().synced == 4, "books")
        wait_for(lambda: has_lifecycle_subscription(settings), "the lifecycle subscription")
        simulator.inject("halt:1")
        simulator.inject("close_early:1")
        wait_for(lambda: streamer.health().markets == 3, "the close")
        time.sleep(1.5)
    events = [
        json.loads(detail)["msg"]["event_type"]
        for (detail,) in query(
            settings, "SELECT detail FROM stream_events WHERE kind = 'market_lifecycle_v2'"
        )
    ]
    assert {"deactivated", "activated", "close_date_updated"} <= set(events)
    assert kinds(settings)["left"] == 1
    assert_lossless(settings)


@pytest.mark.parametrize(
    ("fault", "gaps"), [("trade_gap:5", 1), ("trade_error10", 1), ("drop", 0), ("trade_refused", 0)]
)
def test_missed_trades_are_backfilled_and_books_stay_synced(
    fault: str,
    gaps: int,
    start_simulator: StartSimulator,
    settings_for: Callable[..., Settings],
) -> None:
    simulator = start_simulator(markets=8, rate=400.0, rolling_markets=0)
    if fault == "trade_refused":
        simulator.inject(fault)
    settings = settings_for(simulator)
    with streaming(settings) as streamer:
        wait_for(lambda: streamer.health().synced == 8, "books")
        if fault != "trade_refused":
            wait_for(lambda: streamer.health().trades > 20, "trades")
            simulator.inject(fault)
        else:
            wait_for(lambda: "refused" in kinds(settings), "the refusal")
        settled = set(simulator.trades())
        before = streamer.health().trades
        wait_for(lambda: streamer.health().trades > before + 40, "trades after the fault")
        wait_for(lambda: bool(recovered(settings)), "those that were missed")
        simulator.pause()
        wait_for_trades(settings, simulator.trades().keys() - settled)
        assert streamer.health().synced == 8
    stored = {row[0]: row for row in recorded(settings)}
    traded = ledger(simulator)
    assert traded.keys() - settled <= stored.keys()
    assert stored == {n: traded[n] for n in stored}
    happened = kinds(settings)
    assert happened.get("gap", 0) == gaps
    closed = "kind = 'resynced' AND JSONExtractString(detail, 'cause') = 'gap'"
    assert query(settings, f"SELECT count() FROM stream_events WHERE {closed}") == [(0,)]
    back = closed.replace("gap", "connected")
    judged = "JSONExtractUInt(detail, 'unchanged') + JSONExtractUInt(detail, 'changed')"
    resynced = query(settings, f"SELECT {judged} FROM stream_events WHERE {back}")
    assert resynced == ([(8,)] if fault == "drop" else [])  # each market has a clock
    assert sum(note["trades"] for note in recovered(settings)) > 0
    assert query(settings, "SELECT count() FROM trades WHERE seq = 0") == [
        (sum(note["trades"] for note in recovered(settings)),)
    ]
    assert_lossless(settings)


def test_trades_between_two_starts_are_backfilled(
    start_simulator: StartSimulator, settings_for: Callable[..., Settings]
) -> None:
    simulator = start_simulator(markets=6, rate=400.0, rolling_markets=0)
    settings = settings_for(simulator)
    with streaming(settings) as streamer:
        wait_for(lambda: streamer.health().trades > 20, "trades")
        settled = set(simulator.trades())
    time.sleep(2.0)
    with streaming(settings) as streamer:
        wait_for(lambda: streamer.health().trades > 20, "trades")
        wait_for(lambda: bool(recovered(settings)), "those that were missed")
        simulator.pause()
        wait_for_trades(settings, simulator.trades().keys() - settled)
    stored = {row[0]: row for row in recorded(settings)}
    traded = ledger(simulator)
    assert traded.keys() - settled <= stored.keys()
    assert stored == {n: traded[n] for n in stored}
    assert [note["cause"] for note in recovered(settings)] == ["connection"]
    assert_lossless(settings)


def test_refused_channels_do_not_affect_books(
    start_simulator: StartSimulator, settings_for: Callable[..., Settings]
) -> None:
    simulator = start_simulator(markets=6, rolling_markets=4, rolling_seconds=3.0, rate=300.0)
    simulator.inject("lifecycle_refused:2")
    simulator.inject("trade_refused:2")
    settings = settings_for(simulator)

    def joined() -> set[str]:
        sql = "SELECT DISTINCT market_ticker FROM orderbook_events"
        return {ticker for (ticker,) in query(settings, sql)}

    with streaming(settings) as streamer:
        wait_for(lambda: streamer.health().synced >= 6, "books")
        wait_for(lambda: streamer.health().trades > 20, "trades, at last")
        wait_for(lambda: has_lifecycle_subscription(settings), "life events, at last")
        first = set(simulator.books())
        simulator.inject("lifecycle_gap:3")
        wait_for(lambda: streamer.health().gaps > 0, "the gap")
        wait_for(lambda: len(joined() - first) >= 4, "markets that came since")
        wait_for(lambda: "market_lifecycle_v2" in kinds(settings), "life events after the gap")
        health = streamer.health()
    assert health.connections == 1
    happened = kinds(settings)
    assert happened["refused"] == 4
    assert happened["market_lifecycle_v2"] > 0
    assert len(joined() - first) >= 4
    assert_lossless(settings)


def test_a_changed_market_file_is_applied_while_recording(
    start_simulator: StartSimulator, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    simulator = start_simulator(markets=6, rate=200.0, rolling_markets=0)
    tickers = sorted(simulator.books())
    file = tmp_path / "tickers.txt"
    file.write_text("\n".join(tickers[:2]))
    settings = settings_for(simulator, market_file=file)
    with streaming(settings) as streamer:
        wait_for(lambda: streamer.health().synced == 2, "books")
        aside = tmp_path / "aside.txt"
        aside.write_text("\n".join(["# others", *tickers[1:5]]))
        shutil.move(aside, file)
        wait_for(lambda: streamer.health().synced == 4, "the file's markets")
        file.unlink()
        time.sleep(1.5)
        assert streamer.health().markets == 4
    left = query(settings, "SELECT market_ticker FROM stream_events WHERE kind = 'left'")
    assert left == [(tickers[0],)]
    assert streamer.health().connections == 1
    assert_lossless(settings)


def test_a_minimum_volume_excludes_quiet_markets(
    start_simulator: StartSimulator, settings_for: Callable[..., Settings]
) -> None:
    simulator = start_simulator(markets=12, rate=2_000.0, rolling_markets=0)
    wait_for(lambda: len(simulator.trades()) > 150, "trades")
    simulator.pause()
    volumes: dict[str, Decimal] = {}
    for trade in ledger(simulator).values():
        volumes[trade[1]] = volumes.get(trade[1], Decimal(0)) + trade[4]
    floor = int(sorted(volumes.values())[len(volumes) // 2])
    wanted = {ticker for ticker, volume in volumes.items() if volume >= floor}
    assert 0 < len(wanted) < 12
    settings = settings_for(simulator, market_all=True, market_min_volume=floor)
    with streaming(settings) as streamer:
        wait_for(lambda: streamer.health().synced == len(wanted), "books")
    seen = query(settings, "SELECT market_ticker FROM stream_events WHERE kind = 'snapshot'")
    assert {ticker for (ticker,) in seen} == wanted

"""The whole pipeline on real parts, WebSocket to journal to ClickHouse and Parquet: each record exactly once."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import client
from kalshi_platform.clickhouse.client import Client
from kalshi_platform.embedded_clickhouse import running
from kalshi_platform.errors import PlatformError
from kalshi_platform.exchange.book import Book, delta_change
from kalshi_platform.exchange.frames import decode_delta, decode_head, decode_snapshot
from kalshi_platform.exchange.numbers import contracts, dollars
from kalshi_platform.health import health_report, verdict
from kalshi_platform.journal import reader
from kalshi_platform.journal.reader import JournalError
from kalshi_platform.recorder.streamer import Health, Streamer
from kalshi_platform.settings import Settings
from kalshi_platform.simulator.book import NO
from kalshi_platform.simulator.exchange import Exchange
from kalshi_platform.simulator.server import Simulator
from kalshi_platform.simulator.venue import Venue
from kalshi_platform_tests.clickhouse.tables import prepare
from kalshi_platform_tests.orchestration.test_checks import resource, run_checks
from kalshi_platform_tests.ports import free_ports
from kalshi_platform_tests.simulator_fixtures import StartSimulator

ROOT = Path(__file__).resolve().parents[2]
FRAMES = ROOT.parent / "shared" / "frames"
PROOF = ROOT / "infra" / "queries" / "lossless_proof.sql"
Level = tuple[str, str, str, str]


@pytest.fixture
def settings_for(
    tmp_path: Path, clickhouse_url: str, clickhouse_database: str
) -> Callable[..., Settings]:
    """Settings for a simulator and a migrated test database."""
    prepared = False

    def make(simulator: Simulator, **more: Any) -> Settings:
        nonlocal prepared
        given: dict[str, Any] = {
            "kalshi_data_dir": tmp_path / "data",
            "clickhouse_url": clickhouse_url,
            "clickhouse_database": clickhouse_database,
            "kalshi_ws_url": simulator.ws_url,
            "kalshi_rest_url": simulator.rest_url,
            "hot_retention_days": 36_500,
            **more,
        }
        settings = platform_settings.load(**given)
        key_file = settings.exchange.key_file
        key_file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(simulator.key_file, key_file)
        if (
            settings.use_clickhouse
            and not prepared
            and "clickhouse_url" not in more
            and "clickhouse_password" not in more
        ):
            prepare(settings)
            prepared = True
        return settings

    return make


@contextmanager
def streaming(settings: Settings) -> Iterator[Streamer]:
    streamer = Streamer(settings)
    streamer.start()
    try:
        yield streamer
    finally:
        streamer.stop(60.0)  # the limit of 10 s is tested on processes


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 90.0) -> None:
    """The time is for a machine that has other things to do: processes take long to come up there."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.05)


def wait_until_loaded(streamer: Streamer, store: str = "clickhouse") -> None:
    """Wait until a store has what has been received so far, which includes books of this connection.

    The lag proves nothing: it is 0 before the first frame, and behind a busy machine it is never small.
    """
    wait_for(lambda: streamer.health().frames > 500, "frames")
    received_ns = streamer.health().last_frame_ns
    wait_for(
        lambda: streamer.health().stores[store].loaded_ns >= received_ns, f"{store} to load them"
    )


_clients: dict[tuple[str, str], Client] = {}


def client_of(settings: Settings) -> Client:
    """A client of the test's database, cached: connecting costs more than a query."""
    key = (settings.clickhouse_url, settings.clickhouse_database)
    if key not in _clients:
        for former in _clients.values():
            former.close()
        _clients.clear()
        _clients[key] = client.connect(settings)
    return _clients[key]


def query(settings: Settings, sql: str) -> list[Any]:
    return list(client_of(settings).query(sql).result_rows)


def archived(settings: Settings, dataset: str) -> pl.DataFrame:
    return pl.read_parquet(
        f"{settings.archive_dir}/{dataset}/**/*.parquet", hive_partitioning=False
    )


def journalled(settings: Settings) -> list[tuple[int, bytes]]:
    """(kind, frame) of every record of the journal."""
    folder = settings.journal_dir()
    return [
        (kind, frame)
        for block in reader.record_ranges(folder, reader.oldest_offset(folder))
        for kind, frame in zip(
            block.batch.column("kind").to_pylist(),
            block.batch.column("frame").to_pylist(),
            strict=True,
        )
    ]


def latest(settings: Settings) -> set[Level]:
    sql = "SELECT market_ticker, side, toString(price), toString(size) FROM latest_levels FINAL WHERE size > 0"
    return {(t, s, f"{Decimal(p):.4f}", f"{Decimal(q):.2f}") for t, s, p, q in query(settings, sql)}


def truth(simulator: Simulator, tickers: set[str]) -> set[Level]:
    return {
        (ticker, side, dollars(price), contracts(size))
        for ticker, book in simulator.books().items()
        if ticker in tickers
        for side, ladder in (("yes", book.yes), ("no", book.no))
        for price, size in ladder.items()
    }


def wait_for_the_last_frames(
    settings: Settings, simulator: Simulator, tickers: Collection[str] | None = None
) -> None:
    """Wait until ClickHouse has the books of the paused exchange: all, or those of `tickers`.

    Frames still in flight when a recording ends are not recorded, and the books would differ.
    """
    markets = set(simulator.books() if tickers is None else tickers)
    last = truth(simulator, markets)
    wait_for(
        lambda: {level for level in latest(settings) if level[0] in markets} == last,
        "the last frames",
    )


def proved(settings: Settings) -> list[dict[str, Any]]:
    """Run the lossless proof: it must find nothing unnamed and nothing twice."""
    with client.translated():
        proof = client_of(settings).query(PROOF.read_text().strip().rstrip(";"))
    rows = [dict(zip(proof.column_names, row, strict=True)) for row in proof.result_rows]
    assert rows
    assert [r for r in rows if r["unexplained_holes"] or r["doubled"]] == []
    return rows


def assert_lossless(settings: Settings) -> None:
    """The lossless proof finds nothing, and the two stores agree row by row."""
    proved(settings)
    for dataset in ("orderbook_events", "stream_events"):
        count = archived(settings, dataset).height
        assert query(settings, f"SELECT count() FROM {dataset}") == [(count,)]
    names, numbers = ["conn_id", "market_ticker", "side"], ["sid", "seq", "price", "qty", "size"]
    cold = archived(settings, "orderbook_events").select(pl.col(names).cast(pl.String), *numbers)
    assert cold.is_duplicated().sum() == 0
    shown = ", ".join([*(f"toString({name}) AS {name}" for name in names), *numbers])
    found = client_of(settings).query_arrow(f"SELECT {shown} FROM orderbook_events")
    hot = pl.DataFrame(pl.from_arrow(found))
    assert hot.schema == cold.schema
    assert_frame_equal(hot, cold, check_row_order=False, check_exact=True)


def reference(lines: list[bytes]) -> tuple[list[tuple[Any, ...]], set[Level]]:
    """Every event row and the final books of a recording, computed with the reference book."""
    books: dict[str, Book] = {}
    rows: list[tuple[Any, ...]] = []
    for line in lines:
        head = decode_head(line)
        if head.type == "orderbook_snapshot":
            snapshot = decode_snapshot(line)
            book = books.setdefault(snapshot.market_ticker, Book(snapshot.market_ticker))
            book.apply_snapshot(snapshot)
            for side, ladder in book.ladders.items():
                rows += [
                    (head.seq, book.market_ticker, side, dollars(p), contracts(q), contracts(q))
                    for p, q in ladder.items()
                ]
        elif head.type == "orderbook_delta":
            delta = decode_delta(line)
            change = delta_change(delta)
            size = books[delta.market_ticker].apply_delta(change)
            rows.append(
                (
                    head.seq,
                    delta.market_ticker,
                    change.side,
                    dollars(change.price),
                    contracts(change.qty),
                    contracts(size),
                )
            )
    final = {
        (ticker, side, dollars(p), contracts(q))
        for ticker, book in books.items()
        for side, ladder in book.ladders.items()
        for p, q in ladder.items()
    }
    return sorted(rows), final


@pytest.mark.parametrize(
    "name", ["ws_orderbook_12_markets_prod_2026-08-07.jsonl", "ws_legacy_cents_2025-11-30.jsonl.gz"]
)
def test_recorded_frames_are_stored_exactly_in_both_stores(
    name: str, start_simulator: StartSimulator, settings_for: Callable[..., Settings]
) -> None:
    path = FRAMES / name
    if not path.exists():
        pytest.skip("the recorded frames are not beside this checkout")
    lines = (
        gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
    ).splitlines()
    expected, final = reference(lines)
    simulator = start_simulator(replay=path)
    tickers = {row[1] for row in expected}
    settings = settings_for(simulator, market_tickers=tuple(sorted(tickers)))
    with streaming(settings) as streamer:
        wait_for(lambda: streamer.health().frames >= len(lines), "all frames")
    sql = "SELECT seq, market_ticker, side, price, qty, size FROM orderbook_events"
    hot = sorted(
        (s, t, d, f"{p:.4f}", f"{q:.2f}", f"{z:.2f}") for s, t, d, p, q, z in query(settings, sql)
    )
    assert hot == expected
    cold = archived(settings, "orderbook_events").select(
        "seq", "market_ticker", "side", "price", "qty", "size"
    )
    assert (
        sorted((s, t, d, f"{p:.4f}", f"{q:.2f}", f"{z:.2f}") for s, t, d, p, q, z in cold.rows())
        == expected
    )
    assert query(settings, "SELECT count() FROM stream_events WHERE kind = 'gap'") == [(0,)]
    assert latest(settings) == final


def test_the_exchanges_clock_and_time_of_sending_are_in_both_stores(
    start_simulator: StartSimulator, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    whole = FRAMES / "ws_made_2026-10_a.jsonl"
    if not whole.exists():
        pytest.skip("the made frames are not beside this checkout")
    lines = whole.read_bytes().splitlines()
    end = next(n for n, line in enumerate(lines) if n and b'"type":"subscribed"' in line)
    first = tmp_path / "first_connection.jsonl"
    first.write_bytes(b"\n".join(lines[:end]) + b"\n")
    expected = sorted(
        (
            frame["seq"],
            frame["msg"]["market_ticker"],
            frame["msg"]["clock"],
            frame["sending_ts_ms"],
            frame["msg"].get("ts_ms"),
        )
        for frame in map(json.loads, lines[1:end])
    )
    simulator = start_simulator(replay=first)
    settings = settings_for(simulator, market_tickers=tuple(sorted({row[1] for row in expected})))
    with streaming(settings) as streamer:
        wait_for(lambda: streamer.health().frames >= end, "all frames")
    sql = (
        "SELECT DISTINCT seq, market_ticker, clock, toUnixTimestamp64Milli(sent_ts),"
        " toUnixTimestamp64Milli(toDateTime64(ts, 3)) FROM orderbook_events"
    )
    assert sorted(query(settings, sql)) == expected
    cold = archived(settings, "orderbook_events").select(
        "seq",
        pl.col("market_ticker").cast(pl.String),
        "clock",
        pl.col("sent_ts").dt.epoch("ms"),
        pl.col("ts").dt.epoch("ms"),
    )
    assert sorted(cold.unique().rows()) == expected
    assert_lossless(settings)


def test_books_recover_from_drops_gaps_and_garbage(
    start_simulator: StartSimulator, settings_for: Callable[..., Settings]
) -> None:
    simulator = start_simulator(markets=16, rate=1_500.0, rolling_markets=0)
    settings = settings_for(simulator)
    faults = [
        "gap:3",
        "drop",
        "malformed",
        "negative",
        "unknown_type",
        "error25",
        "truncated",
        "gap",
        "huge:2",
        "close",
    ]
    # The counter that a fault raises at once. Frames alone do not show that the fault has happened: they
    # arrive while it is still in flight, and the next fault, such as a reset, could cancel it.
    leaves = {
        "drop": "connections",
        "error25": "connections",
        "close": "connections",
        "gap": "gaps",
        "truncated": "gaps",
        "negative": "gaps",
        "malformed": "malformed",
    }
    with streaming(settings) as streamer:
        wait_for(lambda: streamer.health().synced == 16, "books")

        def met_and_recovered(fault: str, before: Health) -> bool:
            trace = leaves.get(fault.partition(":")[0])
            if trace is not None and getattr(streamer.health(), trace) <= getattr(before, trace):
                return False
            now = streamer.health()
            return now.frames > before.frames + 300 and now.synced == 16

        for fault in faults:
            seen = streamer.health()
            simulator.inject(fault)
            wait_for(
                lambda f=fault, s=seen: met_and_recovered(f, s),  # type: ignore[misc]
                f"recovery from {fault}",
            )
        simulator.pause()
        wait_for_the_last_frames(settings, simulator)
    kinds = dict(query(settings, "SELECT kind, count() FROM stream_events GROUP BY kind"))
    assert kinds["connected"] == kinds["disconnected"] == 4
    assert kinds["gap"] >= 3
    assert kinds["resynced"] >= 3
    assert kinds["malformed"] >= 2
    assert kinds["unknown"] >= 1
    assert latest(settings) == truth(simulator, set(simulator.books()))
    assert_lossless(settings)


def test_stopping_under_load_stores_everything_received(
    start_simulator: StartSimulator, settings_for: Callable[..., Settings]
) -> None:
    simulator = start_simulator(markets=30, rate=8_000.0)
    settings = settings_for(simulator)
    process = subprocess.Popen(
        [sys.executable, "-m", "kalshi_platform", "stream"],
        env=_environment(settings),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for(lambda: _frames(settings) > 20_000, "frames")
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, log
    assert "all that was received is stored" in log  # said only where it took no more than 7 s
    deltas = sum(kind == 1 for kind, _ in journalled(settings))
    assert deltas > 15_000
    assert query(settings, "SELECT count() FROM orderbook_events WHERE type = 'delta'") == [
        (deltas,)
    ]
    assert_lossless(settings)


@pytest.mark.timeout(600)
def test_kill_9_loses_and_duplicates_no_journalled_record(
    start_simulator: StartSimulator, settings_for: Callable[..., Settings]
) -> None:
    simulator = start_simulator(markets=12, rate=2_000.0, rolling_markets=0)
    settings = settings_for(simulator)
    dice = random.Random(7)
    for _ in range(6):
        before = _records(settings)
        process = subprocess.Popen(
            [sys.executable, "-m", "kalshi_platform", "stream"],
            env=_environment(settings),
            stderr=subprocess.DEVNULL,
        )
        try:
            _wait_for_recording(settings, process.pid, before)
            time.sleep(dice.uniform(0.0, 1.5))
        finally:
            process.kill()
            process.wait()
    with streaming(settings) as streamer:
        wait_for(lambda: streamer.health().synced == 12, "books")
        simulator.pause()
        wait_for_the_last_frames(settings, simulator)
    deltas = sum(kind == 1 for kind, _ in journalled(settings))
    assert query(settings, "SELECT count() FROM orderbook_events WHERE type = 'delta'") == [
        (deltas,)
    ]
    assert latest(settings) == truth(simulator, set(simulator.books()))
    kinds = dict(query(settings, "SELECT kind, count() FROM stream_events GROUP BY kind"))
    assert kinds["started"] == 7
    assert kinds["connected"] == kinds["disconnected"]
    killed = query(
        settings,
        "SELECT detail FROM stream_events WHERE kind = 'disconnected' AND detail LIKE '%ended without closing%'",
    )
    assert len(killed) == 6
    assert all(json.loads(detail)["span_s"] > 0 for (detail,) in killed)
    assert_lossless(settings)


@pytest.mark.timeout(600)
def test_clickhouse_catches_up_exactly_once_after_an_outage(
    start_simulator: StartSimulator, settings_for: Callable[..., Settings]
) -> None:
    simulator = start_simulator(markets=8, rate=1_000.0)
    away = settings_for(simulator, clickhouse_url="http://127.0.0.1:9")  # nothing listens there
    streamer = Streamer(away)
    streamer.start()
    wait_for(lambda: streamer.health().stores["parquet"].committed_ns > 0, "the first file")
    wait_for(
        lambda: streamer.health().frames > 500, "frames"
    )  # the file may be older than they are
    wait_for(lambda: streamer.health().stores["clickhouse"].trouble is not None, "the trouble")
    health = streamer.health()
    assert health.stores["clickhouse"].trouble is not None
    assert "127.0.0.1:9" in health.stores["clickhouse"].trouble
    assert not health.stores["clickhouse"].refused
    assert streamer.stop() is False
    assert archived(away, "orderbook_events").height > 0
    back = settings_for(simulator)
    with streaming(back) as streamer:
        wait_until_loaded(streamer)
    assert_lossless(back)


def test_a_wrong_password_is_reported_and_costs_no_frame(
    start_simulator: StartSimulator, settings_for: Callable[..., Settings]
) -> None:
    simulator = start_simulator(markets=8, rate=500.0)
    wrong = settings_for(simulator, clickhouse_password="not-the-password")
    streamer = Streamer(wrong)
    streamer.start()
    wait_for(lambda: streamer.health().stores["clickhouse"].trouble is not None, "the refusal")
    store = streamer.health().stores["clickhouse"]
    assert store.refused
    assert store.trouble is not None
    assert "CLICKHOUSE_PASSWORD" in store.trouble
    assert "not-the-password" not in store.trouble
    streamer.stop(3.0)
    right = settings_for(simulator)
    with streaming(right) as streamer:
        wait_until_loaded(streamer)
    assert_lossless(right)


def test_an_abandoned_capture_is_not_reported_as_stored(
    start_simulator: StartSimulator, settings_for: Callable[..., Settings]
) -> None:
    simulator = start_simulator(markets=4, rate=500.0, rolling_markets=0)
    settings = settings_for(simulator)
    streamer = Streamer(settings)
    streamer.start()
    wait_until_loaded(streamer)
    assert streamer._loop is not None
    held, released = threading.Event(), threading.Event()

    def hang() -> None:
        held.set()
        released.wait(60.0)

    streamer._loop.call_soon_threadsafe(hang)
    assert held.wait(60.0)
    assert streamer.stop(5.0) is False
    released.set()
    assert streamer._capturing is not None
    streamer._capturing.join()
    with streaming(settings) as streamer:
        wait_until_loaded(streamer)
    ends = query(
        settings, "SELECT count() FROM stream_events WHERE detail LIKE '%ended without closing%'"
    )
    assert ends == [(1,)]
    assert_lossless(settings)


def test_a_second_streamer_is_refused(
    start_simulator: StartSimulator, settings_for: Callable[..., Settings]
) -> None:
    simulator = start_simulator(markets=4)
    settings = settings_for(simulator, use_clickhouse=False)
    with streaming(settings), pytest.raises(JournalError, match="Another streamer"):
        Streamer(settings).start()


def test_a_damaged_journal_stops_loaders_not_recording(
    start_simulator: StartSimulator,
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kalshi_platform.loading.loader.RESTART_S", 0.5)
    simulator = start_simulator(markets=4, rate=200.0)
    settings = settings_for(simulator)
    recorded_only = settings.model_copy(update={"use_clickhouse": False})
    for _ in range(2):
        with streaming(recorded_only) as streamer:
            wait_for(lambda: streamer.health().deltas > 500, "books")
    # Parquet has it all and would not look back: both begin with what is damaged.
    shutil.rmtree(settings.journal_dir() / "load")
    shutil.rmtree(settings.archive_dir)
    segment = reader.segment_path(settings.journal_dir(), 0)
    whole = segment.read_bytes()
    segment.write_bytes(whole[: len(whole) // 2])

    with streaming(settings) as streamer:
        wait_for(lambda: all(s.refused for s in streamer.health().stores.values()), "the damage")
        begun = streamer.health().frames
        wait_for(lambda: streamer.health().frames > begun + 500, "more frames")
        health = streamer.health()
        assert streamer.failure() is None
        assert health.connections == 1
        assert health.synced == health.markets == 4
        assert "is good up to record" in str(health.trouble)
        assert {name for s in health.stores.values() for name in s.errors} == {"damage"}
        assert all(s.lag > 500 for s in health.stores.values())
        segment.write_bytes(whole)
        wait_for(lambda: streamer.health().trouble is None, "the loads to go on")
        wait_until_loaded(streamer)
    assert_lossless(settings)


def test_lost_records_are_reported_and_the_rest_is_loaded(
    start_simulator: StartSimulator,
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """On an open connection: ClickHouse recovers after the journal was damaged meanwhile."""
    monkeypatch.setattr("kalshi_platform.loading.loader.RESTART_S", 0.5)
    monkeypatch.setattr("kalshi_platform.loading.loader.REFUSED_RETRY_S", 0.5)
    monkeypatch.setattr("kalshi_platform.journal.writer.SEGMENT_BYTES", 30_000)
    simulator = start_simulator(markets=6, rate=800.0, rolling_markets=0)
    (port,) = free_ports(1)
    settings = settings_for(simulator, clickhouse_url=f"http://127.0.0.1:{port}")
    folder = settings.journal_dir()
    with ExitStack() as engine:
        with streaming(settings) as streamer:
            wait_for(lambda: len(reader.segments(folder)) > 5, "segments")
            wait_until_loaded(streamer, "parquet")  # a store that was behind would lose them, too
            segment = reader.segment_path(folder, reader.segments(folder)[2])
            data = segment.read_bytes()
            middle = len(data) // 2
            segment.write_bytes(data[:middle] + bytes(3_000) + data[middle + 3_000 :])
            engine.enter_context(running(tmp_path / "clickhouse", port=port))
            prepare(settings)
            remedy = f"rename it to {segment.name}.damaged"
            wait_for(
                lambda: remedy in str(streamer.health().stores["clickhouse"].trouble), "the damage"
            )
            segment.rename(reader.set_aside(segment))
            wait_for(lambda: streamer.health().trouble is None, "the load to go on")
            wait_until_loaded(streamer)
            resynced = (
                "SELECT count() FROM stream_events WHERE kind = 'resynced' AND market_ticker = ''"
            )
            wait_for(lambda: query(settings, resynced) == [(1,)], "the snapshots")
            simulator.pause()
            wait_for_the_last_frames(settings, simulator)
            assert streamer.health().connections == 1
        lost = sum(
            archived(settings, name).height - query(settings, f"SELECT count() FROM {name}")[0][0]
            for name in ("orderbook_events", "trades")
        )
        gaps = query(
            settings,
            "SELECT JSONExtractString(detail, 'channel'), JSONExtractUInt(detail, 'missing')"
            " FROM stream_events WHERE kind = 'gap' AND market_ticker = ''"
            " AND JSONExtractString(detail, 'cause') = 'journal_damaged'",
        )
        named = sum(row["named_holes"] for row in proved(settings))
    assert {"journal", "orderbook_delta"} <= {channel for channel, _ in gaps}
    assert lost == sum(missing for _, missing in gaps) == named > 0


def test_unknown_tickers_and_a_missing_key_are_errors(
    start_simulator: StartSimulator, settings_for: Callable[..., Settings]
) -> None:
    simulator = start_simulator(markets=4)
    settings = settings_for(simulator, use_clickhouse=False, market_tickers="NOPE-1,NOPE-2")
    with streaming(settings) as streamer:
        wait_for(lambda: streamer.failure() is not None, "the refusal")
        failure = streamer.failure()
    assert isinstance(failure, PlatformError)
    assert "NOPE-1, NOPE-2" in str(failure)
    settings.exchange.key_file.unlink()
    with pytest.raises(PlatformError, match="simulator is not running"):
        Streamer(settings).start()


def test_the_live_book_comparison_finds_no_difference(
    start_simulator: StartSimulator,
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kalshi_platform.quality.book_audit.CACHE_S", 3.0)
    simulator = start_simulator(markets=8, rate=40.0, rolling_markets=0, rest_cache_seconds=1.0)
    settings = settings_for(simulator, audit_interval_seconds=0.5)

    def audits() -> list[dict[str, int]]:
        sql = "SELECT detail FROM stream_events WHERE kind = 'audit'"
        return [json.loads(detail) for (detail,) in query(settings, sql)]

    with streaming(settings) as streamer:
        wait_for(lambda: streamer.health().synced == 8, "books")
        # levels that a snapshot has just changed are not compared yet
        wait_for(lambda: len(audits()) >= 3, "three rounds")
        wait_for(lambda: sum(r["levels"] for r in audits()) > 100, "levels that are compared")
    rounds = audits()
    assert sum(r["mismatches"] for r in rounds) == 0


def test_a_scale_no_snapshot_reveals_is_found_by_rest(
    start_simulator: StartSimulator,
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As for books without far bids: on neither scale are they crossed."""
    monkeypatch.setattr("kalshi_platform.quality.book_audit.CACHE_S", 3.0)
    monkeypatch.setattr("kalshi_platform.exchange.scale.scale_of", lambda *_: None)
    simulator = start_simulator(
        markets=8, rate=40.0, rolling_markets=0, rest_cache_seconds=1.0, yes_price=True
    )
    settings = settings_for(simulator, audit_interval_seconds=0.5)

    def details(kind: str) -> list[dict[str, Any]]:
        sql = f"SELECT detail FROM stream_events WHERE kind = '{kind}' ORDER BY record"
        return [json.loads(detail) for (detail,) in query(settings, sql)]

    with streaming(settings) as streamer:
        wait_for(lambda: bool(details("resynced")), "the books on the other scale")
        before = len(details("audit"))
        wait_for(
            lambda: sum(r["levels"] for r in details("audit")[before:]) > 100,
            "levels that are compared",
        )
        assert streamer.health().synced == 8
    assert [gap["cause"] for gap in details("gap")] == ["scale"]
    assert sum(r["mismatches"] for r in details("audit")[before:]) == 0
    assert details("mismatch") == []


def test_remedies_for_a_hanging_streamer_work(
    start_simulator: StartSimulator, settings_for: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = settings_for(start_simulator(markets=4, rate=50.0), use_clickhouse=False)
    started: list[subprocess.Popen[bytes]] = []

    def judged(later_s: float = 0.0) -> verdict.Judgement:
        report = health_report.read(settings.journal_dir())
        return verdict.judge(report, None, datetime.now(UTC) + timedelta(seconds=later_s))

    def command(sentence: str) -> list[str]:
        found = re.search(r"`([a-z][^`]+)`", sentence)
        assert found, sentence
        return found[1].split()

    def stream(argv: Sequence[str]) -> None:
        assert argv[0] == "kalshi-platform"
        more = {"USE_CLICKHOUSE": "0", "KALSHI_HOME": str(tmp_path)}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "kalshi_platform", *argv[1:]],
                env=_environment(settings) | more,
                stderr=subprocess.DEVNULL,
            )
        )
        wait_for(
            lambda: _pid(settings) == started[-1].pid and judged().cause == "recording", "frames"
        )

    try:
        stream(["kalshi-platform", "stream"])
        started[-1].send_signal(signal.SIGSTOP)
        hangs = judged(later_s=verdict.ALERTS.report_s + 1)
        assert hangs.cause == "streamer hangs"
        subprocess.run(command(hangs.sentence), check=True)
        assert started[-1].wait(30) == -signal.SIGKILL
        assert judged().cause == "streamer down"
        stream(["kalshi-platform", "stream"])  # what the supervisor does
        started[-1].send_signal(signal.SIGTERM)
        assert started[-1].wait(30) == 0
        stopped = judged(later_s=verdict.ALERTS.stopped_s + 1)
        assert (stopped.cause, stopped.verdict) == ("stopped", verdict.Verdict.WARN)
        stream(command(stopped.sentence))
    finally:
        for process in started:
            process.kill()
            process.wait()


def uncross_without_a_frame(venue: Venue) -> None:
    """Remove the crossing order without a frame, so that REST shows another book from now on."""
    exchange = venue.exchange
    assert isinstance(exchange, Exchange)
    (crossed,) = (it for it in exchange.markets() if it.book.crossed)
    level = crossed.listing.grid.levels - 1 - crossed.book.best[NO]
    exchange._uncross(crossed, level, exchange.now_ns)
    exchange._happened.clear()


def test_a_book_crossed_only_here_is_re_requested(
    start_simulator: StartSimulator,
    settings_for: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kalshi_platform.quality.book_audit.CACHE_S", 3.0)
    simulator = start_simulator(markets=8, rate=40.0, rolling_markets=0, rest_cache_seconds=1.0)
    settings = settings_for(simulator, audit_interval_seconds=0.5)
    with streaming(settings), dg.DagsterInstance.ephemeral() as instance:

        def check() -> dg.AssetCheckEvaluation:
            return run_checks(instance, resource(settings))["books_uncrossed"]

        wait_for(lambda: latest(settings) != set(), "books")
        simulator.inject("crossed:600")
        wait_for(lambda: not check().passed, "a book that is crossed for long")
        found = check()
        assert "if it shows another book, the recorded one is wrong" in (found.description or "")
        assert query(settings, "SELECT count() FROM stream_events WHERE kind = 'mismatch'") == [
            (0,)
        ]
        simulator._call(uncross_without_a_frame)
        wait_for(lambda: check().passed, "the exchange's book")
    ((side, theirs),) = [
        (it["side"], it["theirs"])
        for (detail,) in query(
            settings, "SELECT DISTINCT detail FROM stream_events WHERE kind = 'mismatch'"
        )
        for it in (json.loads(detail),)
    ]
    assert (side, theirs) == ("yes", "0.00")
    assert_lossless(settings)


def _environment(settings: Settings) -> dict[str, str]:
    return {
        **os.environ,
        "KALSHI_DATA_DIR": str(settings.data_dir),
        "CLICKHOUSE_URL": settings.clickhouse_url,
        "CLICKHOUSE_DATABASE": settings.clickhouse_database,
        "KALSHI_WS_URL": settings.kalshi_ws_url or "",
        "KALSHI_REST_URL": settings.kalshi_rest_url or "",
    }


def _wait_for_recording(settings: Settings, pid: int, before: int) -> None:
    """Wait until a process has journalled frames: those in memory only are lost with it."""
    wait_for(lambda: _pid(settings) == pid and _durable(settings) > before + 200, "frames")


def _records(settings: Settings) -> int:
    """The number of records in a journal without a writer."""
    folder = settings.journal_dir()
    if not reader.segments(folder):
        return 0
    return sum(block.rows for block in reader.record_ranges(folder, reader.oldest_offset(folder)))


def _durable(settings: Settings) -> int:
    health = health_report.read(settings.journal_dir())
    return int(str(health["journal_records"])) if health else 0


def _frames(settings: Settings) -> int:
    health = health_report.read(settings.journal_dir())
    return int(str(health["frames"])) if health else 0


def _pid(settings: Settings) -> int:
    health = health_report.read(settings.journal_dir())
    return int(str(health["pid"])) if health else 0

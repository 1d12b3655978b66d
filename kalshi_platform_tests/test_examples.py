"""Each program of examples/ runs, and shows what was recorded. engine.py: inventory/test_engine_example.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.analytics.hourly import compute_hour
from kalshi_platform.archive import open_archive
from kalshi_platform.clickhouse import client
from kalshi_platform.clickhouse.client import Client
from kalshi_platform.exchange.numbers import contracts, dollars
from kalshi_platform.recorder.streamer import Streamer
from kalshi_platform.settings import Settings
from kalshi_platform.simulator.book import BookView
from kalshi_platform.simulator.config import SimulatorConfig
from kalshi_platform.simulator.server import running
from kalshi_platform_tests.clickhouse.tables import database_of_a_module

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LEAST_FRAMES = 300


@dataclass(frozen=True)
class Recorded:
    """A recording that has ended, and what its simulator's books were at the end."""

    settings: Settings
    books: Mapping[str, BookView]


@pytest.fixture(scope="module")
def recorded(clickhouse_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    """Some seconds of the simulator in ClickHouse and in the archive, spreads included."""
    data = tmp_path_factory.mktemp("data")
    with (
        database_of_a_module(clickhouse_url) as database,
        running(SimulatorConfig(markets=4, rate=300, rolling_markets=0)) as simulator,
    ):
        settings = platform_settings.load(
            _env_file=None,
            kalshi_data_dir=data,
            clickhouse_url=clickhouse_url,
            clickhouse_database=database.clickhouse_database,
            hot_retention_days=database.hot_retention_days,
            kalshi_ws_url=simulator.ws_url,
            kalshi_rest_url=simulator.rest_url,
        )
        settings.exchange.key_file.parent.mkdir(parents=True)
        shutil.copy(simulator.key_file, settings.exchange.key_file)
        streamer = Streamer(settings)
        streamer.start()
        try:
            deadline = time.monotonic() + 60
            while streamer.health().frames < LEAST_FRAMES:
                assert time.monotonic() < deadline, streamer.health()
                time.sleep(0.05)
            simulator.pause()
            with closing(client.connect(settings)) as clickhouse:
                while _levels(clickhouse) != _levels_of(simulator.books()):
                    assert time.monotonic() < deadline, streamer.health()
                    time.sleep(0.1)
        finally:
            streamer.stop(60.0)
        compute_hour(settings, open_archive(settings).hours("orderbook_events")[-1])
        yield Recorded(settings, simulator.books())


def _levels(clickhouse: Client) -> set[tuple[str, str, str, str]]:
    rows = clickhouse.query(
        "SELECT market_ticker, side, price, size FROM latest_levels FINAL WHERE size > 0"
    ).result_rows
    return {(ticker, side, f"{price:.4f}", f"{size:.2f}") for ticker, side, price, size in rows}


def _levels_of(books: Mapping[str, BookView]) -> set[tuple[str, str, str, str]]:
    return {
        (ticker, side, price, size)
        for ticker, book in books.items()
        for side, levels in book.texts().items()
        for price, size in levels
    }


def run(name: str, *arguments: str, settings: Settings | None = None) -> str:
    """What an example prints, started as its docstring says."""
    environment = {**os.environ}
    if settings is not None:
        environment |= {
            "CLICKHOUSE_URL": settings.clickhouse_url,
            "CLICKHOUSE_DATABASE": settings.clickhouse_database,
            "KALSHI_DATA_DIR": str(settings.data_dir),
        }
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_hour_spreads_has_a_line_for_each_market(recorded: Recorded) -> None:
    shown = run("hour_spreads.py", str(recorded.settings.archive_dir))
    found = dict(re.findall(r"^(\S+) +(0\.\d{4}) dollars over \d+ s$", shown, re.MULTILINE))
    assert found.keys() == recorded.books.keys()
    assert all(0 < float(spread) < 1 for spread in found.values())


def test_replay_hour_ends_with_the_exchange_s_own_book(recorded: Recorded) -> None:
    shown = run("replay_hour.py", str(recorded.settings.archive_dir))
    ticker = shown.partition(":")[0]
    levels = re.findall(r"^(yes|no) +([\d.]+) ([\d.]+)$", shown, re.MULTILINE)
    wanted = _levels_of({ticker: recorded.books[ticker]})
    assert {(ticker, side, price, size) for side, price, size in levels} == wanted


def test_research_ends_with_the_exchange_s_own_book(recorded: Recorded) -> None:
    ticker = next(ticker for ticker, book in recorded.books.items() if book.yes and book.no)
    shown = run("research.py", str(recorded.settings.archive_dir), ticker)
    levels = re.findall(r"^(bid|ask) ([\d.]+) ([\d.]+)$", shown, re.MULTILINE)
    book = recorded.books[ticker]
    wanted = {("bid", dollars(price), contracts(size)) for price, size in book.yes.items()}
    wanted |= {("ask", dollars(10_000 - price), contracts(size)) for price, size in book.no.items()}
    assert set(levels) == wanted


def test_top_of_book_shows_the_exchange_s_own_best(recorded: Recorded) -> None:
    shown = run("top_of_book.py", "--seconds", "0", settings=recorded.settings)
    for ticker, book in recorded.books.items():
        (line,) = [line for line in shown.splitlines() if line.startswith(f"{ticker} ")]
        if book.yes:
            assert f" {dollars(max(book.yes))} of {contracts(book.yes[max(book.yes)])} " in line
        assert line.count("none") == (not book.yes) + (not book.no)


def test_simulator_feed_keeps_the_books_that_the_simulator_has() -> None:
    shown = run("simulator_feed.py", "--seconds", "1")
    assert shown.count("equal to the simulator's") == 5
    assert "DIFFERENT" not in shown


def test_every_example_is_run_by_a_test() -> None:
    tests = (
        Path(__file__).read_text()
        + (Path(__file__).parent / "inventory" / "test_engine_example.py").read_text()
    )
    assert [path.name for path in EXAMPLES.glob("*.py") if f'"{path.name}"' not in tests] == []

"""The catalogue of the markets, in a real Dagster instance and against a running exchange."""

from __future__ import annotations

import functools
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.exchange import rest
from kalshi_platform.orchestration import market_catalog as catalog
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.recorder.market_catalog import FILE
from kalshi_platform.settings import Settings
from kalshi_platform.simulator.server import Simulator
from kalshi_platform_tests.clickhouse.tables import database_of_a_module, settings_for
from kalshi_platform_tests.simulator_fixtures import StartSimulator

Make = Callable[..., tuple[KalshiResource, Settings]]


@pytest.fixture(scope="module")
def database(clickhouse_url: str) -> Iterator[str]:
    """A migrated database for this module."""
    with database_of_a_module(clickhouse_url) as settings:
        yield settings.clickhouse_database


@pytest.fixture
def platform_of(tmp_path: Path, clickhouse_url: str, database: str) -> Make:
    """The platform on a simulator, and on a database without a catalogue."""
    with closing(clickhouse.connect(settings_for(clickhouse_url, database))) as client:
        client.command("TRUNCATE TABLE market_catalog")

    def make(simulator: Simulator, **more: str) -> tuple[KalshiResource, Settings]:
        overrides = {
            "kalshi_data_dir": str(tmp_path / "data"),
            "clickhouse_url": clickhouse_url,
            "clickhouse_database": database,
            "kalshi_ws_url": simulator.ws_url,
            "kalshi_rest_url": simulator.rest_url,
            **more,
        }
        settings = platform_settings.load(_env_file=None, **overrides)
        settings.exchange.key_file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(simulator.key_file, settings.exchange.key_file)
        return KalshiResource(overrides=overrides), settings

    return make


def materialise(
    instance: dg.DagsterInstance, platform: KalshiResource
) -> dg.ExecuteInProcessResult:
    """Run the asset's own job."""
    defs = dg.Definitions(
        assets=catalog.ASSETS, jobs=catalog.JOBS, resources={"platform": platform}
    )
    job = defs.resolve_job_def("market_catalog_job")
    return job.execute_in_process(instance=instance, raise_on_error=False)


def metadata(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    (event,) = result.get_asset_materialization_events()
    return {name: value.value for name, value in event.materialization.metadata.items()}


def hot(settings: Settings, columns: str) -> dict[str, tuple[Any, ...]]:
    client = clickhouse.connect(settings)
    sql = f"SELECT market_ticker, {columns} FROM market_catalog FINAL"
    return {row[0]: tuple(row[1:]) for row in client.query(sql).result_rows}


def path_of(settings: Settings) -> Path:
    return settings.archive_dir / "market_catalog" / FILE


def cold(settings: Settings, *columns: str) -> dict[str, tuple[Any, ...]]:
    rows = pl.read_parquet(path_of(settings)).select("market_ticker", *columns).rows()
    return {row[0]: row[1:] for row in rows}


def test_every_market_is_catalogued_with_its_grid_and_times(
    instance: dg.DagsterInstance, start_simulator: StartSimulator, platform_of: Make
) -> None:
    simulator = start_simulator(markets=12, rate=200.0, rolling_markets=2)
    platform, settings = platform_of(simulator)
    values = metadata(materialise(instance, platform))
    tickers = set(simulator.books())
    assert values["markets"] == values["read"] == values["new"] == len(tickers)
    assert values["source"] == "simulator"
    assert sum(values["statuses"].values()) == len(tickers)
    assert 0 < len(values["preview"]) <= catalog.PREVIEW_ROWS
    columns = ["status", "event_ticker", "series_ticker", "price_level_structure", "open_time"]
    assert hot(settings, ", ".join(columns)) == cold(settings, *columns)
    assert set(cold(settings)) == tickers
    assert {row[2] for row in hot(settings, ", ".join(columns)).values()} == {
        ticker.split("-")[0] for ticker in tickers
    }
    for (ranges,) in cold(settings, "price_ranges").values():
        assert ranges[0]["start"] == Decimal("0.0000")
        assert ranges[-1]["end"] == Decimal("1.0000")
        assert all(step["step"] > 0 for step in ranges)
    steps = "arrayMap(each -> each.step, price_ranges)"
    assert {ticker: row[0] for ticker, row in hot(settings, steps).items()} == {
        ticker: [step["step"] for step in row[0]]
        for ticker, row in cold(settings, "price_ranges").items()
    }


def test_a_market_stays_and_is_read_until_it_is_finalized(
    instance: dg.DagsterInstance,
    start_simulator: StartSimulator,
    platform_of: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kalshi_platform.recorder.market_catalog.BACK", timedelta(0))
    simulator = start_simulator(markets=4, rate=50.0, rolling_markets=2, rolling_seconds=2.0)
    platform, settings = platform_of(simulator, market_series="KXBTCUP,KXETHUP")
    materialise(instance, platform)
    first = set(cold(settings))
    assert first
    deadline = time.monotonic() + 120
    while not all(status == "finalized" for status, _ in seen(settings, first)):
        assert time.monotonic() < deadline
        time.sleep(1.0)
        assert materialise(instance, platform).success
    assert {result for _, result in seen(settings, first)} <= {"yes", "no"}
    now = cold(settings, "status")
    assert first < set(now)
    assert {ticker: row[0] for ticker, row in hot(settings, "status").items()} == {
        ticker: row[0] for ticker, row in now.items()
    }
    again = materialise(instance, platform)
    assert metadata(again)["read"] < len(now), "what is finalized is not read again"


def seen(settings: Settings, tickers: set[str]) -> list[tuple[str, str]]:
    found = cold(settings, "status", "result")
    return [(found[ticker][0], found[ticker][1]) for ticker in sorted(tickers)]


def test_a_new_clickhouse_gets_every_market_of_the_file(
    instance: dg.DagsterInstance, start_simulator: StartSimulator, platform_of: Make
) -> None:
    simulator = start_simulator(markets=6, rate=0, rolling_markets=0)
    alone, settings = platform_of(simulator, use_clickhouse="0")
    assert metadata(materialise(instance, alone))["markets"] == 6
    tickers = sorted(cold(settings))
    platform, settings = platform_of(simulator, market_tickers=tickers[0])
    materialise(instance, platform)
    assert set(hot(settings, "title")) == set(tickers)
    client = clickhouse.connect(settings)
    client.command("TRUNCATE TABLE market_catalog")
    materialise(instance, platform)
    assert set(hot(settings, "title")) == set(tickers)


def test_an_incomplete_answer_writes_nothing(
    instance: dg.DagsterInstance,
    start_simulator: StartSimulator,
    platform_of: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rest, "RestClient", functools.partial(rest.RestClient, attempts=1))
    simulator = start_simulator(markets=6, rate=0, rolling_markets=0)
    platform, settings = platform_of(simulator)
    simulator.inject("rest401:50")
    failed = materialise(instance, platform)
    assert not failed.success
    failure = failed.filter_events(lambda event: event.is_step_failure)[0]
    assert "PROD_KEYID" in str(failure.event_specific_data)
    assert not path_of(settings).exists()
    assert hot(settings, "title") == {}


def test_a_file_that_cannot_be_read_is_named_and_left(
    instance: dg.DagsterInstance, start_simulator: StartSimulator, platform_of: Make
) -> None:
    simulator = start_simulator(markets=3, rate=0, rolling_markets=0)
    platform, settings = platform_of(simulator)
    path = path_of(settings)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not Parquet")
    failed = materialise(instance, platform)
    assert not failed.success
    failure = failed.filter_events(lambda event: event.is_step_failure)[0]
    assert str(path) in str(failure.event_specific_data)
    assert path.read_bytes() == b"not Parquet"


def test_the_schedule_runs_every_hour_by_default() -> None:
    (schedule,) = catalog.SCHEDULES
    assert schedule.default_status is dg.DefaultScheduleStatus.RUNNING
    assert schedule.cron_schedule == "5 * * * *"


def asked(instance: dg.DagsterInstance) -> bool:
    result = catalog.market_catalog_at_start(dg.build_sensor_context(instance=instance))
    assert isinstance(result, dg.SensorResult)
    return bool(result.run_requests)


def test_the_catalogue_is_read_at_start_and_after_a_missed_hour(
    instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked(instance)
    instance.report_runless_asset_event(dg.AssetMaterialization("market_catalog"))
    assert not asked(instance)
    monkeypatch.setattr(catalog, "READ_EVERY_S", 0.0)
    assert asked(instance)


def test_an_unreadable_catalogue_is_not_retried_at_every_tick(
    instance: dg.DagsterInstance,
    platform_of: Make,
    start_simulator: StartSimulator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulator = start_simulator(markets=2)
    platform, _ = platform_of(simulator, kalshi_rest_url="http://127.0.0.1:1/trade-api/v2")
    monkeypatch.setattr(rest, "RestClient", functools.partial(rest.RestClient, attempts=1))
    assert not materialise(instance, platform).success
    assert not asked(instance)
    monkeypatch.setattr(catalog, "TRY_AGAIN_S", 0.0)
    assert asked(instance)

"""The inventory checks in Dagster fail with ERROR if money is at stake, and pass if there is nothing to check."""

from __future__ import annotations

import functools
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import pytest

from kalshi_platform.clickhouse.client import connect
from kalshi_platform.exchange.rest import RestClient
from kalshi_platform.inventory import audit
from kalshi_platform.inventory.tables import usable
from kalshi_platform.orchestration import inventory
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.printable import from_markdown
from kalshi_platform.settings import Settings
from kalshi_platform_tests.clickhouse.tables import prepare, settings_for
from kalshi_platform_tests.inventory.planted import TICKER, Planted, ago
from kalshi_platform_tests.simulator_fixtures import StartSimulator


@pytest.fixture(scope="module")
def database(clickhouse_url: str) -> Iterator[Settings]:
    """A migrated database for this module."""
    name = f"test_{uuid.uuid4().hex}"
    settings = settings_for(clickhouse_url, name, hot_retention_days=36_500)
    prepare(settings)
    yield settings
    httpx.post(clickhouse_url, content=f"DROP DATABASE {name} SYNC").raise_for_status()


@pytest.fixture
def planted(database: Settings) -> Iterator[Planted]:
    """The market maker's tables, empty."""
    with closing(connect(database)) as client:
        for table in usable(client):
            client.command(f"TRUNCATE TABLE {table}")
        yield Planted(client)


def resource(settings: Settings, **others: str) -> KalshiResource:
    """The platform on the test's database."""
    overrides = {
        "clickhouse_url": settings.clickhouse_url,
        "clickhouse_database": settings.clickhouse_database,
        **others,
    }
    return KalshiResource(overrides=overrides)


@functools.cache
def job() -> dg.JobDefinition:
    """The job `inventory_qa`; each run provides the platform."""
    defs = dg.Definitions(
        assets=inventory.ASSETS,
        asset_checks=inventory.CHECKS,
        jobs=inventory.JOBS,
        resources={"platform": KalshiResource()},
        executor=dg.in_process_executor,
    )
    return defs.resolve_job_def("inventory_qa")


def run_checks(
    instance: dg.DagsterInstance, platform: KalshiResource
) -> dict[str, dg.AssetCheckEvaluation]:
    """Run the job `inventory_qa`; the evaluations by check."""
    result = job().execute_in_process(instance=instance, resources={"platform": platform})
    assert result.success
    return {
        evaluation.check_name: evaluation for evaluation in result.get_asset_check_evaluations()
    }


def test_faults_are_red_with_their_offenders_and_breaks(
    planted: Planted, database: Settings, instance: dg.DagsterInstance
) -> None:
    planted.snapshot(ago(100), 0)
    planted.decision(ago(90), exposure=0)
    planted.decision(ago(80), exposure=4, open_orders_count=0)
    planted.decision(ago(70), filled=9, pos_total_est=13, block_codes=["max_long"], allowed=0)
    found = run_checks(instance, resource(database))
    assert set(found) == {check.name for check in audit.CHECKS} | {"decisions_fresh"}
    error, warn = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN
    assert {
        name: (evaluation.asset_key.to_user_string(), evaluation.severity)
        for name, evaluation in found.items()
        if not evaluation.passed
    } == {
        "drift_without_actions": ("mm_decisions", warn),
        "open_exposure_mismatch": ("mm_decisions", error),
        "decision_snapshot_divergence": ("mm_decisions", error),
        "position_identity": ("mm_decisions", error),
    }
    metadata = found["decision_snapshot_divergence"].metadata
    offenders, named = metadata["offenders"], metadata["breaks"]
    assert isinstance(offenders, dg.TableMetadataValue)
    assert isinstance(named, dg.TableMetadataValue)
    assert [row.data["market_ticker"] for row in offenders.records] == [TICKER]
    assert "block_codes were max_long" in str(named.records[0].data["explanation"])


def test_a_healthy_market_maker_is_green(
    planted: Planted, database: Settings, instance: dg.DagsterInstance
) -> None:
    planted.snapshot(ago(100), 3)
    planted.decision(ago(90), filled=3)
    assert all(
        evaluation.passed for evaluation in run_checks(instance, resource(database)).values()
    )


def test_counts_are_of_all_rows_not_of_those_shown(
    planted: Planted,
    database: Settings,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inventory, "SHOWN", 2)
    for number in range(5):
        planted.decision(
            ago(50 - number), exposure=4, open_orders_count=0, market_ticker=f"M{number}"
        )
    found = run_checks(instance, resource(database))["open_exposure_mismatch"]
    assert (found.metadata["anomalies"].value, found.metadata["markets"].value) == (5, 5)
    offenders = found.metadata["offenders"]
    assert isinstance(offenders, dg.TableMetadataValue)
    assert len(offenders.records) == 2
    assert (found.description or "").startswith("5 anomalies in 5 markets")


def test_decisions_are_fresh_until_an_engine_stops(
    planted: Planted, database: Settings, instance: dg.DagsterInstance
) -> None:
    planted.decision(ago(2 * 3600 + 1500), engine_instance_id="a_*b*")
    stopped = run_checks(instance, resource(database))["decisions_fresh"]
    assert (stopped.passed, stopped.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert stopped.asset_key.to_user_string() == "mm_decisions"
    text = from_markdown(stopped.description or "")
    assert text.startswith(
        "Engine a_*b* has not decided for 2 h 25 min, its newest decision is of "
    )
    planted.decision(ago(5), engine_instance_id="a_*b*")
    goes_on = run_checks(instance, resource(database))["decisions_fresh"]
    assert goes_on.passed
    assert "1 decision of 1 market by 1 engine" in (goes_on.description or "")


def test_a_passing_check_says_what_it_checked(
    planted: Planted, database: Settings, instance: dg.DagsterInstance
) -> None:
    planted.snapshot(ago(100), 3)
    planted.decision(ago(90), filled=3)
    for evaluation in run_checks(instance, resource(database)).values():
        assert "1 decision of 1 market by 1 engine, the newest at " in (
            evaluation.description or ""
        )
        assert str(evaluation.metadata["judged"].value).startswith(
            "1 decision of 1 market by 1 engine"
        )


def test_without_a_market_maker_the_checks_pass_and_say_so(
    planted: Planted, database: Settings, instance: dg.DagsterInstance
) -> None:
    for platform in (resource(database), resource(database, use_clickhouse="0")):
        for evaluation in run_checks(instance, platform).values():
            assert evaluation.passed
            assert (evaluation.description or "").startswith("Nothing to check: ")


def test_clickhouse_away_fails_the_run_with_a_sentence(
    database: Settings, instance: dg.DagsterInstance
) -> None:
    with pytest.raises(dg.Failure, match="cannot be reached"):
        run_checks(instance, resource(database, clickhouse_url="http://127.0.0.1:9"))


def test_the_positions_of_the_exchange_are_materialised(
    planted: Planted,
    database: Settings,
    instance: dg.DagsterInstance,
    start_simulator: StartSimulator,
    tmp_path: Path,
) -> None:
    simulator = start_simulator(markets=2, rate=0.0, key_file=tmp_path / "simulator" / "key.pem")
    planted.decision(ago(60))
    result = dg.materialize(
        [inventory.mm_position_snapshots],
        instance=instance,
        resources={
            "platform": resource(
                database, kalshi_rest_url=simulator.rest_url, kalshi_data_dir=str(tmp_path)
            )
        },
    )
    assert result.success
    rows = planted.client.query(
        "SELECT market_ticker, pos_filled, source FROM mm_position_snapshots"
    ).result_rows
    assert rows == [(TICKER, 0.0, "absent")]


def test_an_unreadable_position_makes_the_report_incomplete(
    planted: Planted,
    database: Settings,
    *,
    instance: dg.DagsterInstance,
    start_simulator: StartSimulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulator = start_simulator(markets=2, rate=0.0, key_file=tmp_path / "simulator" / "key.pem")
    planted.decision(ago(60))
    whole = RestClient._raw_pages

    def with_an_odd_one(
        rest: RestClient, path: str, key: str, params: dict[str, Any]
    ) -> Iterator[bytes]:
        yield from whole(rest, path, key, params)
        if path == "/portfolio/positions":
            yield b'{"ticker":"KXODD-1","position_fp":null}'

    monkeypatch.setattr(RestClient, "_raw_pages", with_an_odd_one)
    result = dg.materialize(
        [inventory.mm_position_snapshots],
        instance=instance,
        resources={
            "platform": resource(
                database, kalshi_rest_url=simulator.rest_url, kalshi_data_dir=str(tmp_path)
            )
        },
    )
    assert result.success
    (made,) = result.asset_materializations_for_node("mm_position_snapshots")
    incomplete = str(made.metadata["incomplete"].value)
    assert "KXODD-1: position_fp null cannot be read; the item is left out." in incomplete
    assert f"{TICKER}': 'the report is incomplete" in str(made.metadata["left out"].value)
    assert planted.client.query("SELECT count() FROM mm_position_snapshots").result_rows == [(0,)]


def test_the_schedules_run_by_default() -> None:
    assert {
        evaluation.name: evaluation.default_status.value for evaluation in inventory.SCHEDULES
    } == {
        "inventory_qa_schedule": "RUNNING",
        "mm_position_snapshots_schedule": "RUNNING",
    }

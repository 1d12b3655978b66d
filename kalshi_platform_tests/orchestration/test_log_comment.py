"""Every ClickHouse query of a run has the run's, op's and partition's ids in its log_comment."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse.client import Client, called_by, connect, insert_arrow
from kalshi_platform.loading.sinks import ClickHouseSink
from kalshi_platform.orchestration.resources import KalshiResource

HOUR = "2026-11-02-03:00"
comments: dict[str, Mapping[str, Any] | str] = {}


def asked(client: Client) -> str:
    """The log_comment that ClickHouse received with a query."""
    row = client.query("SELECT getSetting('log_comment')").first_row
    assert row is not None
    return str(row[0])


def listen(name: str, platform: KalshiResource) -> None:
    with closing(connect(platform.settings(), log_comment=name)) as client:
        comments[name] = json.loads(asked(client))


@dg.op
def an_op(platform: KalshiResource) -> None:
    listen("an_op", platform)


@dg.job
def a_job() -> None:
    an_op()


@dg.asset(partitions_def=dg.HourlyPartitionsDefinition("2026-11-01-00:00"))
def an_asset(platform: KalshiResource) -> None:
    listen("an_asset", platform)


@dg.multi_asset_check(
    specs=[dg.AssetCheckSpec(name, asset="an_asset") for name in ("first", "second")]
)
def some_checks(platform: KalshiResource) -> Iterator[dg.AssetCheckResult]:
    listen("some_checks", platform)
    for name in ("first", "second"):
        yield dg.AssetCheckResult(passed=True, asset_key="an_asset", check_name=name)


@pytest.fixture
def platform(clickhouse_url: str, clickhouse_database: str) -> KalshiResource:
    comments.clear()
    return KalshiResource(
        overrides={"clickhouse_url": clickhouse_url, "clickhouse_database": clickhouse_database}
    )


def test_ops_assets_and_checks_are_named_with_their_run(
    instance: dg.DagsterInstance, platform: KalshiResource
) -> None:
    definitions = dg.Definitions(
        assets=[an_asset],
        asset_checks=[some_checks],
        jobs=[
            a_job,
            dg.define_asset_job(
                "materialise",
                dg.AssetSelection.assets(an_asset) - dg.AssetSelection.all_asset_checks(),
            ),
            dg.define_asset_job("check", dg.AssetSelection.checks(some_checks)),
        ],
        resources={"platform": platform},
    )
    runs = {
        job: definitions.resolve_job_def(job)
        .execute_in_process(instance=instance, partition_key=HOUR if job == "materialise" else None)
        .run_id
        for job in ("a_job", "materialise", "check")
    }
    assert comments == {
        "an_op": {"what": "an_op", "run_id": runs["a_job"], "job": "a_job", "op": "an_op"},
        "an_asset": {
            "what": "an_asset",
            "run_id": runs["materialise"],
            "job": "materialise",
            "partition": HOUR,
            "op": "an_asset",
            "assets": "an_asset",
        },
        "some_checks": {
            "what": "some_checks",
            "run_id": runs["check"],
            "job": "check",
            "op": "some_checks",
            "checks": "first,second",
        },
    }


def test_outside_of_dagster_the_comment_is_what_it_was(platform: KalshiResource) -> None:
    with closing(connect(platform.settings(), log_comment="sql")) as client:
        assert asked(client) == "sql"


def test_the_streamers_threads_write_with_their_runs_ids(
    platform: KalshiResource, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = platform.settings()
    with closing(connect(settings)) as client:
        client.command(
            "CREATE TABLE trades (n UInt8, said String MATERIALIZED getSetting('log_comment'))"
            " ENGINE = Memory"
        )
    with called_by(lambda: {"run_id": "abc", "shard": "1"}):
        store = ClickHouseSink(settings, "journal", "streamer shard 1")
    rows = pa.table({"n": pa.array([1], pa.uint8())})
    thread = threading.Thread(target=lambda: store._insert("trades", rows, "token"))
    thread.start()
    thread.join()
    with closing(connect(settings)) as client:
        (row,) = client.query("SELECT said FROM trades").result_rows
    assert json.loads(row[0]) == {"what": "streamer shard 1", "run_id": "abc", "shard": "1"}


def test_an_insert_with_a_comment_of_its_own_is_named_too(platform: KalshiResource) -> None:
    with closing(connect(platform.settings())) as client:
        client.command(
            "CREATE TABLE noted (n UInt8, said String MATERIALIZED getSetting('log_comment'))"
            " ENGINE = Memory"
        )
        with called_by(lambda: {"run_id": "abc"}):
            rows = pa.table({"n": pa.array([1], pa.uint8())})
            insert_arrow(client, "noted", rows, "token", log_comment="positions")
        (row,) = client.query("SELECT said FROM noted").result_rows
    assert json.loads(row[0]) == {"what": "positions", "run_id": "abc"}


def test_settings_of_a_scope_do_not_outlive_it() -> None:
    settings = platform_settings.load(_env_file=None)
    with called_by(lambda: {"run_id": "abc"}):
        store = ClickHouseSink(settings, "journal", "inside")
    after = ClickHouseSink(settings, "journal", "outside")
    assert json.loads(store._log_comment)["run_id"] == "abc"
    assert after._log_comment == "outside"

"""Migration 010 upgrades the tables of an engine in use, and loses nothing."""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.client import Client, connect
from kalshi_platform.commands.main import main
from kalshi_platform_tests.clickhouse.tables import settings_for
from kalshi_platform_tests.conftest import DATABASE_TIMEOUT_S

OLDER = """
CREATE TABLE mm_decisions (
    ts DateTime64(3, 'UTC'), decision_id UUID, engine_instance_id String, engine_version String,
    market_ticker String, bb_px Float64, ba_px Float64, mid Float64, spread Float64, fair Float64,
    target_bid_px Float64, target_ask_px Float64, target_bid_sz Float64, target_ask_sz Float64,
    inv_before Float64, inv_after_est Float64, params_json String
) ENGINE = MergeTree ORDER BY (market_ticker, ts)
"""
FILE = migrations.folder() / "010_inventory_observability.sql"


@pytest.fixture
def older(clickhouse_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Client]:
    """An empty database, for the command line too."""
    name = f"test_{uuid.uuid4().hex}"
    httpx.post(
        clickhouse_url, content=f"CREATE DATABASE {name}", timeout=DATABASE_TIMEOUT_S
    ).raise_for_status()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLICKHOUSE_URL", clickhouse_url)
    monkeypatch.setenv("CLICKHOUSE_DATABASE", name)
    platform_settings.current.cache_clear()
    with closing(connect(settings_for(clickhouse_url, name))) as client:
        yield client
    httpx.post(
        clickhouse_url, content=f"DROP DATABASE {name} SYNC", timeout=DATABASE_TIMEOUT_S
    ).raise_for_status()
    platform_settings.current.cache_clear()


@pytest.mark.parametrize("way", ["SOURCE", "migrate"])
def test_an_older_table_with_rows_is_upgraded_and_loses_nothing(older: Client, way: str) -> None:
    older.command(OLDER)
    older.command(
        "INSERT INTO mm_decisions (ts, decision_id, market_ticker, inv_before, params_json)"
        " SELECT now64(3) - number, generateUUIDv4(), 'OLD', number / 4, '{\"a\":1}'"
        " FROM numbers(1000)"
    )
    before = "SELECT count(), sum(inv_before), groupBitXor(cityHash64(decision_id, ts, params_json)) FROM mm_decisions"
    was = older.query(before).result_rows
    argv = ["sql", f"SOURCE {FILE}"] if way == "SOURCE" else ["migrate"]
    for _ in range(2):
        result = CliRunner().invoke(main, argv)
        assert result.exit_code == 0, result.output
    assert older.query(before).result_rows == was
    (row,) = older.query(
        "SELECT DISTINCT pos_filled, pos_total_est, open_orders_count, block_codes, inv_convention"
        " FROM mm_decisions"
    ).result_rows
    assert all(math.isnan(value) for value in row[:2])
    assert row[2:] == (0, [], "")
    older.command(
        "INSERT INTO mm_decisions (ts, market_ticker, pos_filled, pos_open_exposure, pos_total_est)"
        " SELECT now64(3), 'NEW', 2, 0, 2"
    )
    result = CliRunner().invoke(main, ["qa"])
    assert result.exit_code == 0, result.output


def test_it_also_runs_where_there_is_no_table_yet(older: Client) -> None:
    result = CliRunner().invoke(main, ["sql", f"SOURCE {FILE}"])
    assert result.exit_code == 0, result.output
    assert older.query("SELECT count() FROM mm_decisions").result_rows == [(0,)]
    assert CliRunner().invoke(main, ["migrate"]).exit_code == 0


def test_the_new_columns_are_those_of_the_contract(older: Client) -> None:
    CliRunner().invoke(main, ["migrate"])
    described = {row[0]: row[1] for row in older.query("DESCRIBE TABLE mm_decisions").result_rows}
    floats = ("pos_filled", "pos_open_exposure", "pos_total_est", "open_yes_bid_size",
              "open_yes_ask_size", "open_no_bid_size", "open_no_ask_size", "inv_before")  # fmt: skip
    assert {described[name] for name in floats} == {"Float64"}
    assert described["ts"] == "DateTime64(3, 'UTC')"
    assert {"open_orders_count", "allowed", "block_stage", "block_codes", "reason_codes",
            "inv_convention"} <= described.keys()  # fmt: skip

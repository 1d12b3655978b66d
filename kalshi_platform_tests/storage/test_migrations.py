"""Migrations: the schema in ClickHouse is the schema in Python, however often they run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from kalshi_platform.storage import migrations
from kalshi_platform.storage.clickhouse import connect
from kalshi_platform.storage.errors import StoreRefused
from kalshi_platform.storage.migrations import Migration, State
from kalshi_platform.storage.schema import DATASETS, Dataset
from kalshi_platform.storage.statements import statements
from kalshi_platform_tests.storage.tables import migrated, settings_for


@pytest.mark.parametrize("dataset", DATASETS.values(), ids=DATASETS)
def test_the_tables_have_the_columns_of_the_schema(
    clickhouse_url: str, clickhouse_database: str, dataset: Dataset
) -> None:
    with migrated(clickhouse_url, clickhouse_database) as client:
        described = client.query(
            f"DESCRIBE TABLE {dataset.name}", settings={"print_pretty_type_names": 0}
        ).result_rows
    assert [row[:2] for row in described] == [(c.name, c.clickhouse) for c in dataset.columns]


def test_a_second_run_applies_nothing(clickhouse_url: str, clickhouse_database: str) -> None:
    settings = settings_for(clickhouse_url, clickhouse_database)
    assert migrations.migrate(settings) == list(migrations.available())
    assert migrations.migrate(settings) == []
    with migrated(clickhouse_url, clickhouse_database) as client:
        stand = migrations.standing(client)
    assert {one.state for one in stand} == {State.APPLIED}
    assert all(one.applied_at is not None for one in stand)


def test_the_database_is_created_where_it_is_missing(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    settings = settings_for(clickhouse_url, f"{clickhouse_database}_new")
    with pytest.raises(StoreRefused, match="kalshi-platform migrate"):
        connect(settings)
    migrations.migrate(settings)
    client = connect(settings)
    try:
        assert client.query("SELECT count() FROM orderbook_events").first_row == (0,)
    finally:
        client.command(f"DROP DATABASE {settings.clickhouse_database}")
        client.close()


def test_a_migration_that_was_killed_after_any_statement_runs_again(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    settings = settings_for(clickhouse_url, clickhouse_database)
    client = connect(settings)
    every = migrations.available()
    try:
        for migration in every:
            for statement in statements(migration.sql):  # each prefix is a kill after it
                client.command(statement)
                client.command(statement)
        assert migrations.migrate(settings) == list(every)
    finally:
        client.close()


def test_a_changed_migration_is_refused_before_anything_is_applied(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    settings = settings_for(clickhouse_url, clickhouse_database)
    first = Migration(1, "first", "CREATE TABLE IF NOT EXISTS a (x Int8) ENGINE = Memory;")
    second = Migration(2, "second", "CREATE TABLE IF NOT EXISTS b (x Int8) ENGINE = Memory;")
    assert migrations.migrate(settings, [first]) == [first]
    changed = replace(first, sql=first.sql + " -- better")
    with pytest.raises(StoreRefused, match="001_first changed since"):
        migrations.migrate(settings, [changed, second])
    client = connect(settings)
    try:
        assert [s.state for s in migrations.standing(client, [changed, second])] == [
            State.CHANGED,
            State.PENDING,
        ]
        assert client.query("EXISTS TABLE b").first_row == (0,)
        assert [s.state for s in migrations.standing(client, [second])] == [
            State.UNKNOWN,
            State.PENDING,
        ]
    finally:
        client.close()


def test_a_migration_that_fails_is_not_recorded(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    settings = settings_for(clickhouse_url, clickhouse_database)
    broken = Migration(
        1, "broken", "CREATE TABLE IF NOT EXISTS a (x Int8) ENGINE = Memory; SELECT no_such_thing;"
    )
    with pytest.raises(StoreRefused, match="no_such_thing"):
        migrations.migrate(settings, [broken])
    mended = replace(broken, sql="CREATE TABLE IF NOT EXISTS a (x Int8) ENGINE = Memory;")
    assert migrations.migrate(settings, [mended]) == [mended]


def test_line_ends_do_not_change_the_checksum() -> None:
    assert Migration(1, "a", "SELECT\r\n1").checksum == Migration(1, "a", "SELECT\n1").checksum
    assert Migration(1, "a", "SELECT 1").checksum != Migration(1, "a", "SELECT 2").checksum


def test_the_retention_is_altered_only_when_it_differs(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    def ttls() -> set[str]:
        rows = client.query(
            "SELECT create_table_query FROM system.tables WHERE database = currentDatabase()"
            " AND name IN ('orderbook_events', 'stream_events', 'book_checkpoints', 'trades')"
        ).result_rows
        return {found for (sql,) in rows for found in re.findall(r"toIntervalDay\(\d+\)", sql)}

    with migrated(clickhouse_url, clickhouse_database, retention_days=30) as client:
        assert ttls() == {"toIntervalDay(30)"}
        assert migrations.keep(client, 30) == []
        assert set(migrations.keep(client, 7)) == set(migrations.RETAINED)
        assert ttls() == {"toIntervalDay(7)"}
        migrations.keep(client, migrations.FOR_EVER_DAYS)
        assert ttls() == set()
        assert migrations.keep(client, migrations.FOR_EVER_DAYS) == []


def test_a_hundred_years_of_retention_lose_nothing(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    with migrated(clickhouse_url, clickhouse_database) as client:
        for days in (migrations.FOR_EVER_DAYS - 1, 36_500):
            migrations.keep(client, days)
            client.command(
                f"INSERT INTO stream_events (ingest_ts, kind) VALUES (now64(6), '{days}')"
            )
            client.command("OPTIMIZE TABLE stream_events FINAL")
        assert client.query("SELECT count() FROM stream_events").first_row == (2,)


@pytest.mark.parametrize("names", [["first.sql"], ["001_a.sql", "0001_b.sql"], []])
def test_a_folder_that_makes_no_order_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text("SELECT 1", encoding="utf-8")
    with pytest.raises(StoreRefused):
        migrations.available(tmp_path)

"""Migrations: the schema in ClickHouse is the schema in Python, however often they run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kalshi_platform.clickhouse import hot_retention, migrations
from kalshi_platform.clickhouse.client import Client, connect
from kalshi_platform.clickhouse.migrations import Migration, State
from kalshi_platform.clickhouse.statements import statements
from kalshi_platform.errors import StoreRefused
from kalshi_platform.schema import DATASETS, TABLES, Dataset
from kalshi_platform_tests.clickhouse.tables import settings_for
from kalshi_platform_tests.clickhouse.two_shards import database_name


@pytest.fixture(scope="module")
def once_migrated(clickhouse_url: str) -> Iterator[Client]:
    """A client of a database that no test changes."""
    settings = settings_for(clickhouse_url, database_name())
    migrations.migrate(settings)
    with closing(connect(settings)) as client:
        yield client
        client.command(f"DROP DATABASE {settings.clickhouse_database} SYNC")


@pytest.mark.parametrize("dataset", [DATASETS[name] for name in TABLES], ids=TABLES)
def test_the_tables_have_the_columns_of_the_schema(once_migrated: Client, dataset: Dataset) -> None:
    described = once_migrated.query(
        f"DESCRIBE TABLE {dataset.name}", settings={"print_pretty_type_names": 0}
    ).result_rows
    assert [row[:2] for row in described] == [(c.name, c.clickhouse) for c in dataset.columns]


def test_a_second_run_applies_nothing(clickhouse_url: str, clickhouse_database: str) -> None:
    settings = settings_for(clickhouse_url, clickhouse_database)
    assert migrations.migrate(settings) == list(migrations.available())
    assert migrations.migrate(settings) == []
    with closing(connect(settings)) as client:
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


def test_every_statement_of_every_migration_may_run_twice(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    with closing(connect(settings_for(clickhouse_url, clickhouse_database))) as client:
        for migration in migrations.available():
            for statement in statements(migration.sql):
                client.command(statement)
                client.command(statement)
        assert migrations.differences(client) == []


class Killed(BaseException):
    """Stands for a SIGKILL between two statements."""


def test_a_migration_killed_after_any_statement_runs_again(
    clickhouse_url: str, clickhouse_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run is killed after the first statement that no earlier run has reached."""
    settings = settings_for(clickhouse_url, clickhouse_database)
    few = [m for m in migrations.available() if m.version in {1, 2, 10}]  # tables, views, ALTER
    run: set[str] = set()

    def connected(*_: Any, **others: Any) -> Client:
        client = connect(settings, **others)
        command = client.command

        def once(sql: str, **more: Any) -> Any:
            answer = command(sql, **more)
            if (statement := f"{sql} {more}") not in run:
                run.add(statement)
                raise Killed
            return answer

        client.command = once  # type: ignore[method-assign, assignment]
        return client

    monkeypatch.setattr(migrations, "connect", connected)
    for _ in range(200):
        try:
            migrations.migrate(settings, few)
        except Killed:
            continue
        break
    every = [s for m in few for s in statements(m.sql)]
    assert len(run) >= len(every) + 2 * len(few)
    monkeypatch.undo()
    assert migrations.migrate(settings, few) == []
    with closing(connect(settings)) as client:
        assert set(hot_retention.kept(client).values()) == {30}


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


def recorded_otherwise(client: Client, version: int) -> None:
    """Emulate an earlier version whose file of that number was another one."""
    client.command(
        "INSERT INTO schema_migrations SELECT version, name, 'of another file', now64(3)"
        " FROM schema_migrations FINAL WHERE version = {version:UInt32}",
        parameters={"version": version},
    )


def test_views_of_a_changed_migration_are_recreated(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    settings = settings_for(clickhouse_url, clickhouse_database)
    migrations.migrate(settings)
    notices: list[str] = []
    view = "SELECT create_table_query FROM system.tables WHERE database = currentDatabase() AND name = 'book_at'"
    with closing(connect(settings)) as client:
        newest = client.query(view).first_row
        client.command("CREATE OR REPLACE VIEW book_at AS SELECT 1 AS of_another_version")
        recorded_otherwise(client, 14)
        assert migrations.migrate(settings, notify=notices.append) == []
        assert client.query(view).first_row == newest
        assert {s.state for s in migrations.standing(client)} == {State.APPLIED}
    assert notices == [
        "014_book_at was another file when it was applied; its tables and views match the file as it is now."
    ]


def test_a_changed_migration_is_accepted_if_the_tables_match(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    settings = settings_for(clickhouse_url, clickhouse_database)
    migrations.migrate(settings)
    with closing(connect(settings)) as client:
        recorded_otherwise(client, 1)
        with pytest.raises(StoreRefused, match="kalshi-platform migrate --accept-changed"):
            migrations.migrate(settings)
        client.command("ALTER TABLE trades DROP COLUMN taker_book_side")
        with pytest.raises(StoreRefused, match=r"trades\.taker_book_side is missing"):
            migrations.migrate(settings, accept_changed=True)
        assert State.CHANGED in {s.state for s in migrations.standing(client)}
    # the remedy of that one: another database
    other = settings_for(clickhouse_url, f"{clickhouse_database}_other")
    migrations.migrate(other)
    with closing(connect(other)) as client:
        recorded_otherwise(client, 1)
        migrations.migrate(other, accept_changed=True)
        assert {s.state for s in migrations.standing(client)} == {State.APPLIED}
        assert migrations.migrate(other) == []
        client.command(f"DROP DATABASE {clickhouse_database}_other")


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_failing_migration_is_named_and_runs_again(
    clickhouse_url: str, clickhouse_database: str, fails_at: int
) -> None:
    settings = settings_for(clickhouse_url, clickhouse_database)
    good = [f"CREATE TABLE IF NOT EXISTS t{n} (x Int8) ENGINE = Memory" for n in (1, 2, 3)]
    bad = list(good)
    bad[fails_at - 1] = f"CREATE TABLE IF NOT EXISTS t{fails_at} (x NoSuchType) ENGINE = Memory"
    first = Migration(1, "first", "CREATE TABLE IF NOT EXISTS a (x Int8) ENGINE = Memory")
    broken = Migration(2, "broken", ";".join(bad))
    with pytest.raises(
        StoreRefused,
        match=rf"^Migration 002_broken failed at statement {fails_at} of 3"
        rf" \(CREATE TABLE IF NOT EXISTS t{fails_at}\): .*NoSuchType.*migrate again\.$",
    ):
        migrations.migrate(settings, [first, broken])
    repaired = replace(broken, sql=";".join(good))
    with closing(connect(settings)) as client:
        assert [s.state for s in migrations.standing(client, [first, repaired])] == [
            State.APPLIED,
            State.BEGUN,
        ]
    assert migrations.migrate(settings, [first, repaired]) == [repaired]


def test_applied_migrations_are_frozen() -> None:
    """A file that may have been applied somewhere never changes; a new one is added to the list."""
    listed = (migrations.folder() / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    current = [f"{m.checksum}  {m}.sql" for m in migrations.available()]
    assert current == listed, "add a new file's line: sha256sum NNN_name.sql >> SHA256SUMS"


def test_a_view_that_is_missing_is_made_again(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    settings = settings_for(clickhouse_url, clickhouse_database)
    migrations.migrate(settings)
    with closing(connect(settings)) as client:
        sql = (
            "SELECT name, create_table_query FROM system.tables"
            " WHERE database = currentDatabase() AND engine = 'View' ORDER BY name"
        )
        was = client.query(sql).result_rows
        assert "book_at" in [name for name, _ in was]
        for name, _ in was:
            client.command(f"DROP VIEW {name}")
        assert migrations.migrate(settings) == []
        assert client.query(sql).result_rows == was


def test_a_view_that_a_migration_drops_stays_dropped(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    settings = settings_for(clickhouse_url, clickhouse_database)
    made = Migration(1, "made", "CREATE VIEW IF NOT EXISTS v AS SELECT 1 AS x")
    gone = Migration(2, "gone", "DROP VIEW IF EXISTS v")
    for _ in range(2):
        migrations.migrate(settings, [made, gone])
        with closing(connect(settings)) as client:
            assert client.query("EXISTS VIEW v").first_row == (0,)


def test_line_ends_do_not_change_the_checksum() -> None:
    assert Migration(1, "a", "SELECT\r\n1").checksum == Migration(1, "a", "SELECT\n1").checksum
    assert Migration(1, "a", "SELECT 1").checksum != Migration(1, "a", "SELECT 2").checksum


@pytest.mark.parametrize("names", [["first.sql"], ["001_a.sql", "0001_b.sql"], []])
def test_a_folder_that_makes_no_order_is_refused(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).write_text("SELECT 1", encoding="utf-8")
    with pytest.raises(StoreRefused):
        migrations.available(tmp_path)

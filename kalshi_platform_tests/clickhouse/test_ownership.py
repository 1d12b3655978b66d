"""Foreign tables with one of the platform's names are refused before anything is changed, and stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.client import Client, connect
from kalshi_platform.clickhouse.ddl import Definition, definition
from kalshi_platform.clickhouse.ownership import MADE_BY_ENGINES
from kalshi_platform.clickhouse.partitions import replacing
from kalshi_platform.clickhouse.statements import statements
from kalshi_platform.commands.main import main
from kalshi_platform.errors import StoreRefused
from kalshi_platform_tests.clickhouse.tables import migrated, settings_for

MADE = {
    made.name: made
    for migration in migrations.available()
    for statement in statements(migration.sql)
    if (made := definition(statement)) is not None
}
FEW = {1, 2, 13}
"""The migrations that most tests here need; fewer are applied faster."""
DESK_TRADES = """
CREATE TABLE trades (id UInt64, ingest_ts DateTime64(3, 'UTC'), ticker String, px Float64)
ENGINE = MergeTree ORDER BY id
"""


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the platform to some of its migrations."""
    every = migrations.available()
    monkeypatch.setattr(
        migrations, "available", lambda: tuple(m for m in every if m.version in FEW)
    )


@pytest.fixture
def client(
    clickhouse_url: str, clickhouse_database: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Client]:
    """A desk's database; commands use it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLICKHOUSE_URL", clickhouse_url)
    monkeypatch.setenv("CLICKHOUSE_DATABASE", clickhouse_database)
    monkeypatch.setenv("HOT_RETENTION_DAYS", "30")
    platform_settings.current.cache_clear()
    with closing(connect(settings_for(clickhouse_url, clickhouse_database))) as client:
        yield client
    platform_settings.current.cache_clear()


def tables(client: Client) -> set[str]:
    found = client.query("SELECT name FROM system.tables WHERE database = currentDatabase()")
    return {str(name) for (name,) in found.result_rows}


def run(*argv: str) -> tuple[int, str]:
    platform_settings.current.cache_clear()
    result = CliRunner().invoke(main, argv)
    return result.exit_code, result.output + str(result.exception or "")


def sum_of_desk(client: Client, name: str) -> object:
    return client.query(f"SELECT count(), sum(id), min(ingest_ts) FROM {name}").first_row


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("remedy", ["RENAME", "CLICKHOUSE_DATABASE"])
def test_a_desks_own_trades_are_kept_and_each_remedy_works(
    client: Client, monkeypatch: pytest.MonkeyPatch, remedy: str
) -> None:
    client.command(DESK_TRADES)
    client.command(
        "INSERT INTO trades SELECT number, now64(3) - toIntervalDay(number % 400), 'T', 0.5"
        " FROM numbers(100000)"
    )
    was = sum_of_desk(client, "trades")
    for argv in (["migrate"], ["restore"]):
        code, output = run(*argv)
        assert code == 1
        assert f"Database {client.database} has a table or view of this platform's name" in output
        assert "trades (a MergeTree with id, ingest_ts, ticker, px)" in output
    assert tables(client) == {"trades"}
    if remedy == "RENAME":
        _, _, command = output.partition("rename what is there: ")
        client.command(command.strip().rstrip("."))
    else:
        monkeypatch.setenv("CLICKHOUSE_DATABASE", f"{client.database}_own")
    code, output = run("migrate")
    assert code == 0, output
    client.command("OPTIMIZE TABLE " + ("trades_former" if remedy == "RENAME" else "trades"))
    assert sum_of_desk(client, "trades_former" if remedy == "RENAME" else "trades") == was
    if remedy != "RENAME":
        client.command(f"DROP DATABASE {client.database}_own SYNC")


@pytest.mark.parametrize("kind", ["table", "view"])
def test_every_name_of_ours_is_asked_for(client: Client, clickhouse_url: str, kind: str) -> None:
    settings = settings_for(clickhouse_url, str(client.database))
    for name in MADE:
        client.command(
            f"CREATE TABLE {name} (ingest_ts DateTime, x Int8) ENGINE = MergeTree ORDER BY x"
            if kind == "table"
            else f"CREATE VIEW {name} AS SELECT 1 AS x"
        )
        with pytest.raises(StoreRefused, match=rf"not this platform's: {name} \("):
            migrations.migrate(settings)
        assert tables(client) == {name}
        client.command(f"DROP {kind} {name}")


@pytest.mark.usefixtures("few")
def test_the_bookkeeping_of_another_tool_is_refused(client: Client, clickhouse_url: str) -> None:
    client.command(
        "CREATE TABLE schema_migrations (version Int64, dirty UInt8, sequence UInt64)"
        " ENGINE = TinyLog"
    )
    with pytest.raises(StoreRefused, match=r"schema_migrations \(a TinyLog with version, dirty"):
        migrations.migrate(settings_for(clickhouse_url, str(client.database)))
    assert tables(client) == {"schema_migrations"}


@pytest.mark.usefixtures("few")
def test_a_name_that_was_taken_since_the_migrations_is_refused(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    settings = settings_for(clickhouse_url, clickhouse_database)
    with migrated(clickhouse_url, clickhouse_database) as client:
        client.command("RENAME TABLE trades TO trades_former, top_of_book TO top_former")
        client.command("CREATE TABLE trades (ts DateTime64(6)) ENGINE = MergeTree ORDER BY ()")
        client.command("CREATE TABLE top_of_book (x Int8) ENGINE = Memory")
        with pytest.raises(StoreRefused, match=r"2 tables or views .* top_of_book .*; trades "):
            migrations.migrate(settings)
        with pytest.raises(StoreRefused, match=r"trades \("), replacing(client, "trades", "1", "t"):
            pass


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("lost", ["comments", "bookkeeping"])
def test_own_tables_are_known_by_comment_or_bookkeeping(
    clickhouse_url: str, clickhouse_database: str, lost: str
) -> None:
    with migrated(clickhouse_url, clickhouse_database) as client:
        ours = [MADE[name] for name in tables(client) if name in MADE]
        if lost == "comments":
            for made in ours:
                if not made.is_view:
                    client.command(f"ALTER TABLE {made.name} MODIFY COMMENT ''")
        else:
            client.command("DROP TABLE schema_migrations")
            for made in ours:
                if made.is_view:  # has no comment: only the bookkeeping knows it
                    client.command(f"DROP VIEW {made.name}")
        applied = migrations.migrate(settings_for(clickhouse_url, clickhouse_database))
        assert applied == ([] if lost == "comments" else list(migrations.available()))


def test_every_table_of_the_migrations_has_a_comment() -> None:
    assert {name for name, made in MADE.items() if not made.is_view and not made.comment} == set()


def mm_table(made: Definition) -> str:
    """A table that a desk's engine made without one of the columns: other types, no codecs, another order."""
    texts = ", ".join(f"{column} String" for column in made.columns[:-1] if column != "ts")
    return (
        f"CREATE TABLE {made.name} (ts DateTime64(3, 'UTC'), {texts}, extra String)"
        " ENGINE = MergeTree ORDER BY ts"
    )


def test_engine_tables_with_the_documented_columns_are_used(
    client: Client, clickhouse_url: str
) -> None:
    settings = settings_for(clickhouse_url, str(client.database))
    for name in sorted(MADE_BY_ENGINES):
        lacking = MADE[name].columns[-1]
        client.command(mm_table(MADE[name]))
        client.command(f"INSERT INTO {name} (ts, extra) VALUES (now64(3), 'theirs')")
        with pytest.raises(StoreRefused, match=rf": {name} \(a MergeTree without {lacking}\)\."):
            migrations.migrate(settings)
        client.command(f"ALTER TABLE {name} ADD COLUMN {lacking} String")
    migrations.migrate(settings)
    for name in MADE_BY_ENGINES:
        assert client.query(f"SELECT extra FROM {name}").first_row == ("theirs",)

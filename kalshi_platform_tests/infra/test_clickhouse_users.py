"""On the real engine, each role can do what its part of the platform needs, and nothing harmful."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from kalshi_platform.analytics.hourly import compute_hour
from kalshi_platform.archive import LocalArchive
from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.client import Client, connect, translated
from kalshi_platform.clickhouse.statements import statements
from kalshi_platform.errors import StoreRefused
from kalshi_platform.loading.loader import Loader, Pace
from kalshi_platform.loading.sinks import ClickHouseSink, ParquetSink
from kalshi_platform.schema import TABLES
from kalshi_platform.settings import Settings
from kalshi_platform_tests.clickhouse.tables import settings_for
from kalshi_platform_tests.infra import as_role
from kalshi_platform_tests.loading.test_loader import FIRST_HOUR, journal_of, load_all, recording

DATABASE = "kalshi"  # the grants name it
As = Callable[[str], Settings]
HARM = [
    "DROP TABLE orderbook_events",
    "DROP DATABASE kalshi",
    "TRUNCATE TABLE stream_events",
    "ALTER TABLE orderbook_events DELETE WHERE 1",
    "ALTER TABLE latest_levels DROP COLUMN size",
    "ALTER TABLE orderbook_events DROP PARTITION ID '20261122'",
    "INSERT INTO schema_migrations (version) VALUES (999)",
    "CREATE TABLE mine (a Int8) ENGINE = MergeTree ORDER BY a",
    "CREATE USER mine",
    "SELECT * FROM url('http://127.0.0.1:1/', CSV, 'a String')",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine's folder with every table, created with the rights of kalshi_admin only."""
    folder = tmp_path_factory.mktemp("roles")
    with as_role.running(folder, "kalshi_admin") as url:
        settings = settings_for(url, DATABASE, hot_retention_days=36_500)
        assert migrations.migrate(settings) == list(migrations.available())
        assert migrations.migrate(settings.model_copy(update={"hot_retention_days": 9_000})) == []
        with closing(connect(settings)) as client, pytest.raises(StoreRefused), translated():
            client.command("CREATE DATABASE another")
    return folder


@pytest.fixture
def as_one(folder: Path, tmp_path: Path) -> Iterator[As]:
    """Context manager: settings to connect with the rights of a role; one at a time."""
    running = []

    def start(role: str) -> Settings:
        context = as_role.running(folder, role)
        url = context.__enter__()
        running.append(context)
        return settings_for(url, DATABASE, kalshi_data_dir=tmp_path, hot_retention_days=36_500)

    yield start
    for context in running:
        context.__exit__(None, None, None)


def refused(client: Client, harm: list[str]) -> None:
    for statement in harm:
        with pytest.raises(StoreRefused) as error, translated():
            client.command(statement)
        assert error.value.name == "ACCESS_DENIED", statement


def load_into(settings: Settings, number: int) -> None:
    """Load a recording of the connection of that number."""
    writer = journal_of(settings.journal_dir(), recording(200, number=number))
    for store in (
        ClickHouseSink(settings, str(writer.id)),
        ParquetSink(LocalArchive(settings.archive_dir), 0, lambda _: None),
    ):
        load_all(Loader(settings.journal_dir(), writer, store, Pace(40, 0.0, 0.0)))
    writer.close()


def test_the_writer_streams_and_can_damage_nothing(as_one: As) -> None:
    settings = as_one("kalshi_writer")
    load_into(settings, 1)
    with closing(connect(settings)) as client:
        assert client.query("SELECT count() > 150 FROM orderbook_events").first_row == (True,)
        for table in ("mm_decisions", "mm_order_actions", "mm_order_responses", "mm_fills"):
            client.command(f"INSERT INTO {table} (market_ticker) VALUES ('T')")
        refused(client, [*HARM, "CREATE TABLE spreads_staging_1 AS spreads"])


def test_the_operator_computes_hours_and_can_damage_nothing(as_one: As) -> None:
    settings = as_one("kalshi_operator")
    load_into(settings, 2)
    assert LocalArchive(settings.archive_dir).read_manifest("orderbook_events", FIRST_HOUR)
    for _ in range(2):
        compute_hour(settings, FIRST_HOUR)
    with closing(connect(settings)) as client:
        assert client.query("SELECT count() > 0 FROM spreads").first_row == (True,)
        client.command("INSERT INTO mm_inventory_breaks (market_ticker) VALUES ('T')")
        refused(client, [*HARM, "DROP TABLE spreads"])


def test_the_reader_reads_everything_and_changes_nothing(as_one: As) -> None:
    settings = as_one("kalshi_reader")
    with closing(connect(settings, log_comment="a setting may be given")) as client:
        names = client.query(
            "SELECT name FROM system.tables WHERE database = currentDatabase()"
            " AND create_table_query NOT LIKE '%{ticker:String}%'"
        ).result_rows
        assert len(names) > len(TABLES)
        for (name,) in names:
            client.query(f"SELECT * FROM {name} LIMIT 1")
        client.query("SELECT * FROM book_at(ticker = 'T', at = now64(6))")
        with pytest.raises(StoreRefused, match=r"(?i)readonly|not enough privileges"), translated():
            client.command("INSERT INTO latest_levels (market_ticker) VALUES ('T')")
        for setting in (
            *("readonly = 0", "max_execution_time = 3600", "max_execution_time = 0"),
            *("max_memory_usage = 5000000000", "max_memory_usage = 0", "max_result_rows = 0"),
        ):
            with pytest.raises(StoreRefused), translated():
                client.query(f"SELECT 1 SETTINGS {setting}")
        for statement in HARM:
            with pytest.raises(StoreRefused), translated():
                client.command(statement)


def test_the_parser_takes_every_statement(clickhouse_url: str) -> None:
    with closing(connect(settings_for(clickhouse_url, "default"), database=False)) as client:
        for path in sorted(as_role.ROLES.parent.glob("*.sql")):
            for statement in statements(path.read_text(encoding="utf-8")):
                client.query("SELECT formatQuery({sql:String})", parameters={"sql": statement})


def test_every_written_table_is_granted_with_its_shards() -> None:
    granted = {
        match[1]
        for grant in as_role.grants("kalshi_operator")
        if (match := re.fullmatch(r"GRANT INSERT.* ON kalshi\.(\w+)", grant))
    }
    migrated = {
        match[1]
        for migration in migrations.available()
        for match in re.finditer(r"^CREATE TABLE IF NOT EXISTS (\w+)", migration.sql, re.MULTILINE)
    }
    assert set(TABLES) <= migrated
    missing = sorted(t for t in migrated if not {t, f"{t}_local"} <= granted)
    assert not missing, (
        f"infra/clickhouse_users/roles.sql grants no INSERT on {missing} (and _local)"
    )


def test_no_file_holds_a_password() -> None:
    for path in as_role.ROLES.parent.glob("*.sql"):
        code = re.sub(r"--.*", "", path.read_text(encoding="utf-8"))
        assert not re.search(r"BY\s+'", code)

"""A database prepared for tests equals one that `migrate` creates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.client import Client, connect
from kalshi_platform.clickhouse.hot_retention import FOR_EVER_DAYS
from kalshi_platform.settings import Settings
from kalshi_platform_tests.clickhouse.tables import prepare, settings_for
from kalshi_platform_tests.clickhouse.two_shards import database_name

DEFINED = (
    "SELECT name, engine, replaceAll(create_table_query, currentDatabase() || '.', ''),"
    " replaceAll(as_select, currentDatabase() || '.', ''), comment"
    " FROM system.tables WHERE database = currentDatabase() ORDER BY name"
)
COLUMNS = (
    "SELECT * EXCEPT (database, data_compressed_bytes, data_uncompressed_bytes, marks_bytes)"
    " FROM system.columns WHERE database = currentDatabase() ORDER BY table, position"
)
APPLIED = "SELECT version, name, checksum FROM schema_migrations FINAL ORDER BY version"


@contextmanager
def dropped_afterwards(settings: Settings) -> Iterator[Client]:
    """A client of a database that a test made for itself."""
    with closing(connect(settings)) as client:
        yield client
        client.command(f"DROP DATABASE {settings.clickhouse_database} SYNC")


def test_a_prepared_database_equals_a_migrated_one(clickhouse_url: str) -> None:
    made, prepared = (
        settings_for(clickhouse_url, database_name(), hot_retention_days=FOR_EVER_DAYS)
        for _ in range(2)
    )
    migrations.migrate(made)
    prepare(prepared)
    with dropped_afterwards(made) as wanted, dropped_afterwards(prepared) as got:
        for sql in (DEFINED, COLUMNS, APPLIED):
            assert got.query(sql).result_rows == wanted.query(sql).result_rows
        assert migrations.standing(got)[-1].state is migrations.State.APPLIED
        assert migrations.migrate(prepared) == []
        assert got.query(DEFINED).result_rows == wanted.query(DEFINED).result_rows


def test_a_database_that_is_not_empty_is_not_prepared(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    settings = settings_for(clickhouse_url, clickhouse_database, hot_retention_days=FOR_EVER_DAYS)
    prepare(settings)
    with pytest.raises(AssertionError, match="TABLE_ALREADY_EXISTS"):
        prepare(settings)

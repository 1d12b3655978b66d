"""Hand-made rows, and migrated databases for them.

Migrating takes some seventy statements, a database's definitions as they are afterwards less than half: `prepare`
runs those, for tests that are about something else. test_tables.py compares both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from itertools import count
from typing import Any

import httpx
import pyarrow as pa

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.client import Client, connect, insert_arrow
from kalshi_platform.clickhouse.cluster import LOCAL
from kalshi_platform.clickhouse.ddl import definition
from kalshi_platform.clickhouse.hot_retention import FOR_EVER_DAYS
from kalshi_platform.clickhouse.migrations import Migration
from kalshi_platform.clickhouse.statements import statements
from kalshi_platform.schema import NAME, ZERO_UUID, Dataset
from kalshi_platform.settings import Settings
from kalshi_platform_tests.clickhouse.two_shards import database_name
from kalshi_platform_tests.conftest import DATABASE_TIMEOUT_S

STATEMENT_TIMEOUT_S = 120.0
"""Timeout of a definition on a busy machine."""
_tokens = count()
_made: dict[tuple[tuple[Migration, ...], str | None], Sequence[str]] = {}
"""What `prepare` runs, by the migrations that it stands for and the cluster: the same on every server of this version."""


def settings_for(url: str, database: str, **others: Any) -> Settings:
    """Settings for a ClickHouse database, independent of `.env`."""
    return platform_settings.load(
        _env_file=None, clickhouse_url=url, clickhouse_database=database, **others
    )


def prepare(settings: Settings) -> None:
    """Make in an empty database what `migrate` makes there. Raises for one that is not empty.

    Where rows are to expire it is `migrate` that makes it: few tests want that.
    """
    if settings.hot_retention_days < FOR_EVER_DAYS:
        migrations.migrate(settings)
        return
    # plain HTTP: no certificates to load
    with httpx.Client(verify=False, timeout=STATEMENT_TIMEOUT_S) as web:
        name = settings.clickhouse_database
        _run(web, settings.clickhouse_url, f"CREATE DATABASE IF NOT EXISTS {name}")
        for sql in _definitions(settings):
            _run(
                web, settings.clickhouse_url, sql, database=name, distributed_foreground_insert="1"
            )


@contextmanager
def database_of_a_module(url: str) -> Iterator[Settings]:
    """Settings of a new database with every table, which is dropped at the end."""
    settings = settings_for(url, database_name(), hot_retention_days=36_500)
    prepare(settings)
    yield settings
    drop = f"DROP DATABASE {settings.clickhouse_database} SYNC"
    httpx.post(url, content=drop, timeout=DATABASE_TIMEOUT_S).raise_for_status()


def _run(web: httpx.Client, url: str, sql: str, **params: str) -> None:
    answer = web.post(url, params=params, content=sql)
    assert answer.is_success, answer.text


def _definitions(settings: Settings) -> Sequence[str]:
    """The statements that create what `migrate` creates with the current migrations."""
    basis = migrations.available(), settings.clickhouse_cluster
    if basis not in _made:
        template = settings.model_copy(update={"clickhouse_database": database_name()})
        migrations.migrate(template)
        with closing(connect(template)) as client:
            _made[basis] = [*_created(client), _bookkeeping(client)]
            client.command(f"DROP DATABASE {template.clickhouse_database} SYNC")
    return _made[basis]


def _created(client: Client) -> Iterator[str]:
    """The definition of each table and view, without the database's name, in an order in which they can be created."""
    found = client.query(
        "SELECT name, create_table_query FROM system.tables WHERE database = currentDatabase()"
    ).result_rows
    definitions = {str(name): str(sql) for name, sql in found}
    order = {"schema_migrations": None}
    for migration in migrations.available():
        for statement in statements(migration.sql):
            if (made := definition(statement)) is not None:
                order.pop(made.name, None)  # a view that is replaced may need what came meanwhile
                order[made.name] = None
    for name in order:
        for created in (name + LOCAL, name):
            if (sql := definitions.pop(created, None)) is not None:
                unnamed = sql.replace(f"{client.database}.", "")
                yield unnamed.replace(f"'{client.database}'", "currentDatabase()")
    assert not definitions


def _bookkeeping(client: Client) -> str:
    """The statement that records which migrations were applied."""
    rows = client.query("SELECT version, name, checksum FROM schema_migrations FINAL").result_rows
    applied = ", ".join(f"({version}, '{name}', '{checksum}')" for version, name, checksum in rows)
    return (
        "INSERT INTO schema_migrations (version, name, checksum, applied_at)"
        f" SELECT one.1, one.2, one.3, now64(3) FROM (SELECT arrayJoin([{applied}]) AS one)"
    )


@contextmanager
def migrated(url: str, database: str, *, retention_days: int = 36_500) -> Iterator[Client]:
    """A client of a database with every migration applied.

    It keeps what the tests put into it for a hundred years: the days of their rows are fixed, and pass.
    """
    settings = settings_for(url, database, hot_retention_days=retention_days)
    prepare(settings)
    with closing(connect(settings)) as client:
        yield client


def arrow(dataset: Dataset, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """`rows` with all the dataset's columns; missing values are zero, empty or null."""
    columns = []
    for column in dataset.columns:
        values = [row.get(column.name, _blank(column.arrow, column.nullable)) for row in rows]
        plain = pa.string() if column.arrow == NAME else column.arrow
        columns.append(pa.array(values, plain).cast(column.arrow))
    return pa.table(columns, schema=dataset.arrow)


def insert(client: Client, dataset: Dataset, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert `rows`; each call has a new token."""
    insert_arrow(client, dataset.name, arrow(dataset, rows), f"by hand {next(_tokens)}")


def _blank(kind: pa.DataType, nullable: bool) -> Any:
    if nullable:
        return None
    if pa.types.is_decimal(kind):
        return Decimal(0)
    if pa.types.is_timestamp(kind):
        return datetime(2026, 11, 22, tzinfo=UTC)
    if pa.types.is_boolean(kind):
        return False
    if pa.types.is_integer(kind):
        return 0
    return ""


def one_row(client: Client, sql: str) -> tuple[Any, ...]:
    """The first row of an answer, which must have one."""
    row = client.query(sql).first_row
    assert row is not None
    return tuple(row)


def uuid(number: int) -> str:
    """A UUID that is easy to recognise."""
    return ZERO_UUID[:-8] + f"{number:08x}"

"""Rows by hand, and a migrated database to put them into."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from decimal import Decimal
from itertools import count
from typing import Any

import pyarrow as pa

from kalshi_platform import settings as platform_settings
from kalshi_platform.settings import Settings
from kalshi_platform.storage import migrations
from kalshi_platform.storage.clickhouse import Client, connect, insert_arrow
from kalshi_platform.storage.schema import NAME, ZERO_UUID, Dataset

_tokens = count()


def settings_for(url: str, database: str, **others: Any) -> Settings:
    """Settings for one ClickHouse database, whatever `.env` says."""
    return platform_settings.load(
        _env_file=None, clickhouse_url=url, clickhouse_database=database, **others
    )


@contextmanager
def migrated(url: str, database: str, *, retention_days: int = 36_500) -> Iterator[Client]:
    """A client of a database with every migration applied.

    It keeps what the tests put into it for a hundred years: the days of their rows are fixed, and pass.
    """
    settings = settings_for(url, database, hot_retention_days=retention_days)
    migrations.migrate(settings)
    client = connect(settings)
    try:
        yield client
    finally:
        client.close()


def arrow(dataset: Dataset, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """`rows` with the dataset's columns; what is left out is zero, empty or null."""
    columns = []
    for column in dataset.columns:
        values = [row.get(column.name, _blank(column.arrow, column.nullable)) for row in rows]
        plain = pa.string() if column.arrow == NAME else column.arrow
        columns.append(pa.array(values, plain).cast(column.arrow))
    return pa.table(columns, schema=dataset.arrow)


def insert(client: Client, dataset: Dataset, rows: Sequence[Mapping[str, Any]]) -> None:
    """Insert `rows`, each call anew."""
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
    """The first row of an answer that must have one."""
    row = client.query(sql).first_row
    assert row is not None
    return tuple(row)


def uuid(number: int) -> str:
    """A UUID that is easy to tell from another."""
    return ZERO_UUID[:-8] + f"{number:08x}"

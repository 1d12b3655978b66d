"""ibis, unchanged: expressions over tables of the server and over the program's own rows (external tables)."""

from __future__ import annotations

import datetime as dt
from typing import Any
from urllib.parse import urlsplit

import pytest

ibis: Any = pytest.importorskip("ibis", reason="make install-dev installs it")


@pytest.fixture
def connection(clickhouse_url: str, clickhouse_database: str) -> Any:
    at = urlsplit(clickhouse_url)
    return ibis.clickhouse.connect(host=at.hostname, port=at.port, database=clickhouse_database)


def test_rows_of_the_program_are_joined_with_a_table(connection: Any) -> None:
    connection.raw_sql(
        "CREATE TABLE trades (ticker String, n UInt32) ENGINE = MergeTree ORDER BY n"
    )
    connection.raw_sql("INSERT INTO trades VALUES ('A', 1), ('B', 2), ('B', 3)")
    names = ibis.memtable({"ticker": ["B", "C"], "name": ["Bö", "Co"]})
    trades = connection.table("trades")
    joined = trades.join(names, "ticker").group_by("name").agg(total=trades.n.sum())
    rows = connection.to_pyarrow(joined).to_pylist()
    assert rows == [{"name": "Bö", "total": 5}]
    assert connection.list_tables() == ["trades"]


def test_times_keep_their_zone(connection: Any) -> None:
    connection.raw_sql("CREATE TABLE t (a DateTime64(6, 'Asia/Tokyo')) ENGINE = Memory")
    connection.raw_sql("INSERT INTO t VALUES ('2026-01-01 12:00:00.5')")
    (row,) = connection.to_pyarrow(connection.table("t")).to_pylist()
    tokyo = dt.timezone(dt.timedelta(hours=9))
    assert row["a"] == dt.datetime(2026, 1, 1, 12, 0, 0, 500_000, tzinfo=tokyo)


def test_a_table_is_made_of_the_programs_rows(connection: Any) -> None:
    connection.create_table("kept", ibis.memtable({"a": [1, 2, 3], "b": ["x", "y", "z"]}))
    assert connection.table("kept").count().execute() == 3
    assert connection.table("kept").filter(ibis._.a > 1).b.max().execute() == "z"

"""clickhouse-connect with its defaults cannot distinguish the embedded engine from a ClickHouse server."""

from __future__ import annotations

import datetime as dt
import gzip
from collections.abc import Iterator
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit

import clickhouse_connect
import lz4.frame
import pyarrow as pa
import pytest
import zstandard
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import DatabaseError, StreamFailureError


def _client(url: str, **arguments: Any) -> Client:
    address = urlsplit(url)
    return clickhouse_connect.get_client(host=address.hostname, port=address.port, **arguments)


@pytest.fixture
def client(clickhouse_url: str, clickhouse_database: str) -> Iterator[Client]:
    with _client(clickhouse_url, database=clickhouse_database) as client:
        client.command(
            "CREATE TABLE t (a UInt64, s String, p Decimal(9, 4)) ENGINE = MergeTree ORDER BY a"
        )
        yield client


ROWS = [(1, "one", Decimal("0.4100")), (2, "zwei ü", Decimal("-1.5000"))]


def test_rows_go_round(client: Client) -> None:
    summary = client.insert("t", ROWS, column_names=["a", "s", "p"])
    assert summary.written_rows == 2
    assert client.query("SELECT * FROM t ORDER BY a").result_rows == ROWS
    assert client.command("SELECT count() FROM t") == 2
    assert client.ping()


def test_arrow_goes_round(client: Client) -> None:
    table = pa.table(
        {
            "a": pa.array([1, 2], pa.uint64()),
            "s": pa.array(["one", "zwei ü"]),
            "p": pa.array([Decimal("0.4100"), Decimal("-1.5000")], pa.decimal128(9, 4)),
        }
    )
    client.insert_arrow("t", table)
    back = client.query_arrow("SELECT * FROM t ORDER BY a", use_strings=True)
    assert back.to_pylist() == table.to_pylist()
    with client.query_arrow_stream("SELECT * FROM t") as stream:
        assert sum(batch.num_rows for batch in stream) == 2


def test_parameters_are_bound_by_the_server(client: Client) -> None:
    client.insert("t", ROWS, column_names=["a", "s", "p"])
    query = "SELECT a FROM t WHERE s IN {names:Array(String)} AND a > {a:UInt64}"
    assert client.query(query, parameters={"names": ["zwei ü", "it's"], "a": 1}).result_rows == [
        (2,)
    ]
    at = dt.datetime(2026, 11, 22, 14)  # noqa: DTZ001 - as the client returns UTC by default
    assert client.query("SELECT {at:DateTime64(6, 'UTC')}", parameters={"at": at}).result_rows == [
        (at,)
    ]
    many = [f"name {n}" for n in range(5000)]  # too long for a URL: sent as a form
    counted = client.query("SELECT length({l:Array(String)})", parameters={"l": many})
    assert counted.result_rows == [(5000,)]


def test_settings_are_the_querys_own(client: Client) -> None:
    query = "SELECT getSetting('max_block_size')"
    usual = client.command(query)
    assert client.command(query, settings={"max_block_size": 17}) == 17
    assert client.command(query) == usual


@pytest.mark.parametrize("compress", ["lz4", "zstd", "gzip", True, False])
def test_every_compression_works_both_ways(
    clickhouse_url: str, clickhouse_database: str, compress: str | bool
) -> None:
    with _client(clickhouse_url, database=clickhouse_database, compress=compress) as client:
        client.command("CREATE TABLE c (n UInt64) ENGINE = Memory")
        client.insert("c", [[n] for n in range(100_000)], column_names=["n"])
        rows = client.query("SELECT n FROM c ORDER BY n").result_rows
        assert [n for (n,) in rows] == list(range(100_000))
        assert client.raw_query("SELECT count() FROM c", fmt="CSV") == b"100000\n"


def test_raw_inserts_honour_the_token(client: Client) -> None:
    client.command(
        "CREATE TABLE d (n UInt64) ENGINE = MergeTree ORDER BY n SETTINGS non_replicated_deduplication_window = 10"
    )
    for compression in (None, "gzip", "zstd", "lz4"):
        pack = {
            None: bytes,
            "gzip": gzip.compress,
            "zstd": zstandard.ZstdCompressor().compress,
            "lz4": lz4.frame.compress,
        }[compression]
        client.raw_insert(
            "d", ["n"], pack(b"1\n2\n"), {"insert_deduplication_token": "T"}, "CSV", compression
        )
    assert client.command("SELECT count() FROM d") == 2


def test_an_empty_result_keeps_its_columns(client: Client) -> None:
    assert client.query("SELECT * FROM t LIMIT 0").column_names == ("a", "s", "p")
    assert client.query("SELECT * FROM t").result_rows == []


def test_an_unknown_table_is_code_60(client: Client) -> None:
    with pytest.raises(DatabaseError, match="UNKNOWN_TABLE") as refused:
        client.query("SELECT * FROM nowhere")
    assert refused.value.code == 60


def test_an_error_in_a_stream_reaches_the_reader(client: Client) -> None:
    query = "SELECT throwIf(number = 900000) FROM numbers(1000000) SETTINGS max_threads = 1"
    with (
        pytest.raises((StreamFailureError, DatabaseError), match="throwIf"),
        client.query_row_block_stream(query) as stream,
    ):
        for _ in stream:
            pass


def test_a_wrong_password_is_refused(clickhouse_url: str) -> None:
    for user, password in (("default", "wrong"), ("stranger", "")):
        with pytest.raises(DatabaseError, match="AUTHENTICATION_FAILED") as refused:
            _client(clickhouse_url, username=user, password=password)
        assert refused.value.code == 516


def test_views_and_materialised_views_work(client: Client) -> None:
    client.command("CREATE TABLE sums (s String, n UInt64) ENGINE = SummingMergeTree ORDER BY s")
    client.command("CREATE MATERIALIZED VIEW mv TO sums AS SELECT s, a AS n FROM t")
    client.command("CREATE VIEW above AS SELECT a FROM t WHERE a >= {least:UInt64}")
    client.insert("t", ROWS, column_names=["a", "s", "p"])
    assert client.query("SELECT n FROM sums FINAL ORDER BY s").result_rows == [(1,), (2,)]
    assert client.query("SELECT * FROM above(least = 2)").result_rows == [(2,)]

"""Native answers for a client's protocol version have the engine's bytes, with info and complete types."""

from __future__ import annotations

import datetime as dt
import threading
import uuid
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import clickhouse_connect
import httpx
import pytest

from kalshi_platform.embedded_clickhouse.native import Blocks
from kalshi_platform_tests.embedded_clickhouse.conftest import Ask

INFO = b"\x01\x00\x02\xff\xff\xff\xff\x00"
TIME = "SELECT toDateTime(1676369730, 'Asia/Shanghai') AS dt"
SELECTS = (
    "SELECT 1, 1",
    "SELECT {x:UInt8} + 1, {x:String}",
    "WITH 1 AS x SELECT x",
    "FROM numbers(3) SELECT number AS n",
    "(SELECT 1 AS a) UNION DISTINCT (SELECT 1)",
    "SELECT number, sum(number) FROM numbers(3) GROUP BY number WITH TOTALS ORDER BY ALL",
    "SELECT toLowCardinality('a'), map('a', 1), tuple(1, 'x'), 1::Variant(UInt8, String), NULL, 1::Dynamic,"
    " '{\"a\":1}'::JSON, [toLowCardinality('a')], cast([(1, 'a')], 'Nested(a UInt8, b String)')",
    "SELECT uniqState(1), quantilesState(0.5)(1), (1, 2)::Point, toFixedString('a', 3), 1.5::BFloat16",
    "SELECT 'a'::Enum8('a\n   b' = 2, 'a' = 1), toDecimal32(1, 2), toIPv4('1.1.1.1'), true",
    "SELECT name, type FROM system.columns WHERE table = 'tables' ORDER BY name",
    "SELECT 'é' AS `ü``x`, '\\n'",
    "SELECT 1 WHERE 0",
    "SELECT number % 10 = 0 ? 1 : 0 FROM numbers(1000) SETTINGS max_threads = 1",
)
OTHERS = (
    "SHOW DATABASES LIKE 'def%'",
    "EXISTS system.one",
    "SHOW TABLES FROM system LIKE 'on%'",
    "EXPLAIN SELECT 1",
    "EXPLAIN SYNTAX SELECT '\t\\\\ é'",
)


@pytest.mark.parametrize("version", ["54405", "54460"])
@pytest.mark.parametrize("query", SELECTS + OTHERS)
def test_a_block_differs_in_its_heads_only(ask: Ask, query: str, version: str) -> None:
    own = {"param_x": "7", "default_format": "Native"}
    plain = ask(query, **own).content
    for sent in (query, f"{query} -- end\n;"):
        answer = ask(sent, client_protocol_version=version, **own)
        assert answer.headers["X-ClickHouse-Format"] == "Native"
        if version == "54405":
            assert answer.content == (INFO + plain if plain else b"")
        elif plain:
            columns = plain[0]
            assert len(answer.content) == len(INFO + plain) + columns  # a byte in each head


def test_a_time_zone_is_kept_in_every_block(ask: Ask) -> None:
    expected = INFO + b"\x01\x01\x02dt\x19DateTime('Asia/Shanghai')B_\xebc"
    for query in (f"{TIME} FORMAT Native", f"{TIME} FORMAT Native SETTINGS max_threads = 1;"):
        assert ask(query, client_protocol_version="54337").content == expected
        assert b"\x08DateTimeB_" in ask(query).content
    many = "SELECT toDateTime(0, 'UTC') AS t FROM numbers(200000) FORMAT Native"
    for own in ({}, {"wait_end_of_query": "1"}, {"session_id": uuid.uuid4().hex}):
        content = ask(many, client_protocol_version="54405", **own).content
        assert content.count(INFO + b"\x01") == content.count(b"DateTime('UTC')") == 4
        assert len(content) > 800_000


def test_clickhouse_connect_returns_times_with_their_zone(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    at = urlsplit(clickhouse_url)
    zone = ZoneInfo("Asia/Shanghai")
    with clickhouse_connect.get_client(
        host=at.hostname, port=at.port, database=clickhouse_database
    ) as client:
        assert client.protocol_version
        at_once = dt.datetime(2023, 2, 14, 18, 15, 30, tzinfo=zone)
        assert client.query(TIME).result_rows == [(at_once,)]
        client.command("CREATE TABLE t (a DateTime('Asia/Shanghai')) ENGINE = Memory")
        client.insert("t", [[dt.datetime(2026, 1, 1, 12, tzinfo=zone)]], column_names=["a"])
        (row,) = client.query("SELECT a FROM t").result_rows
        assert row[0].tzinfo == zone
        assert client.query("SHOW TABLES").result_rows == [("t",)]


def test_a_changed_column_has_its_new_type(ask: Ask) -> None:
    ask("CREATE TABLE t (a DateTime('UTC')) ENGINE = MergeTree ORDER BY tuple()")
    ask("INSERT INTO t VALUES (1)").raise_for_status()
    for zone in ("UTC", "Asia/Tokyo", "Europe/Berlin"):
        ask(f"ALTER TABLE t MODIFY COLUMN a DateTime('{zone}')").raise_for_status()
        for _ in range(2):  # the second from the cache
            content = ask("SELECT a FROM t FORMAT Native", client_protocol_version="54405").content
            assert f"DateTime('{zone}')".encode() in content


def test_another_requests_table_of_the_same_name_has_its_own_type(
    ask: Ask, web: httpx.Client, clickhouse_url: str, clickhouse_database: str
) -> None:
    """The types of temporary and external tables are not those of a table of the server, nor the reverse."""
    versioned = {"client_protocol_version": "54405"}
    ask("CREATE TABLE t (a UInt32) ENGINE = Memory").raise_for_status()
    session = {"session_id": uuid.uuid4().hex, **versioned}
    ask("CREATE TEMPORARY TABLE t (a Int32)", **session).raise_for_status()
    ask("INSERT INTO t VALUES (1)").raise_for_status()
    ask("INSERT INTO t VALUES (1)", **session).raise_for_status()
    query = "SELECT a FROM t FORMAT Native"
    options = {"query": query, "database": clickhouse_database, "t_types": "Float32", **versioned}
    external = {"query": "SELECT _1 AS a FROM t FORMAT Native", "t_types": "Float32", **versioned}
    for _ in range(2):
        assert b"\x01a\x05Int32" in ask(query, **session).content
        assert b"\x01a\x06UInt32" in ask(query, **versioned).content
        for sent in (external, {**options, "t_structure": "a Float32", "t_types": ""}):
            answer = web.post(clickhouse_url, params=sent, files={"t": ("t", b"1\n")})
            assert b"\x01a\x07Float32" in answer.content


def test_no_answer_has_another_moments_types(ask: Ask) -> None:
    """A query during changes of a column is right or refused."""
    ask("CREATE TABLE t (a UInt16) ENGINE = MergeTree ORDER BY tuple()").raise_for_status()
    ask("INSERT INTO t SELECT 7 FROM numbers(100)").raise_for_status()
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            for kind in ("UInt32", "UInt16"):
                ask(f"ALTER TABLE t MODIFY COLUMN a {kind}").raise_for_status()

    changing = threading.Thread(target=change)
    changing.start()
    right = 0
    try:
        for _ in range(30):
            answer = ask("SELECT a FROM t FORMAT Native", client_protocol_version="54405")
            if answer.status_code != 200:
                assert "send the query again" in answer.text, answer.text
                continue
            right += 1
            head = answer.content[len(INFO) :]
            width = {b"\x01d\x01a\x06UInt16": 2, b"\x01d\x01a\x06UInt32": 4}[head[:11]]
            assert head[11:] == (7).to_bytes(width, "little") * 100
    finally:
        stop.set()
        changing.join()
    assert right


def test_a_version_is_a_number(ask: Ask) -> None:
    for bad in ("x", "-1", "1.5", "9" * 40):
        answer = ask("SELECT 1", client_protocol_version=bad)
        assert answer.headers["X-ClickHouse-Exception-Code"] == "72"


def test_a_stream_that_ends_within_a_block_is_noticed() -> None:
    whole = b"\x01" + bytes(7) + b"\x02" + bytes(7) + b"\x02" + bytes(7) + b"ab"
    expected = INFO + b"\x01\x02\x01x\x05UInt8ab"
    for cut in range(len(whole) + 1):
        blocks = Blocks([("x", "UInt8")], 54405)
        assert blocks.feed(whole[:cut]) + blocks.feed(whole[cut:]) == expected
        blocks.finish()
        if 0 < cut < len(whole):
            blocks = Blocks([("x", "UInt8")], 54405)
            assert blocks.feed(whole[:cut]) == b""
            with pytest.raises(ValueError, match="ends within"):
                blocks.finish()
    with pytest.raises(ValueError, match="columns"):
        Blocks([], 54405).feed(whole)

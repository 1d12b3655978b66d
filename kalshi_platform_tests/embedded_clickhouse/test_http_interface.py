"""ClickHouse's HTTP interface as curl and other HTTP clients use it."""

from __future__ import annotations

import gzip
import json
import shutil
import socket
import subprocess
import zlib
from typing import Any
from urllib.parse import urlsplit

import httpx
import lz4.frame
import pytest
import zstandard

from kalshi_platform_tests.embedded_clickhouse.conftest import Ask

TSV = "text/tab-separated-values; charset=UTF-8"
CSV = "text/csv; charset=UTF-8; header=absent"


def test_ping_and_the_bare_root_say_ok(web: httpx.Client, clickhouse_url: str) -> None:
    for path in ("/ping", "/", "/replicas_status"):
        answer = web.get(clickhouse_url + path)
        assert (answer.status_code, answer.text) == (200, "Ok.\n")


def test_a_query_comes_by_get_by_post_or_by_both(web: httpx.Client, clickhouse_url: str) -> None:
    assert web.get(clickhouse_url, params={"query": "SELECT 1 + 1"}).text == "2\n"
    assert web.post(clickhouse_url, content="SELECT 1 + 1").text == "2\n"
    assert web.post(clickhouse_url, params={"query": "SELECT 1"}, content="+ 1").text == "2\n"
    assert web.post(clickhouse_url, params={"query": "SELECT 1 + 1 -- two"}).text == "2\n"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_is_answered(clickhouse_url: str) -> None:
    def curl(*arguments: str) -> str:
        return subprocess.run(
            ["curl", "-sS", *arguments], check=True, capture_output=True, text=True
        ).stdout

    assert curl(f"{clickhouse_url}/?query=SELECT%20count()%20FROM%20numbers(7)") == "7\n"
    assert curl(f"{clickhouse_url}/?query=SELECT+count()+FROM+numbers(7)") == "7\n"
    assert curl("-G", clickhouse_url, "--data-urlencode", "query=SELECT 'é'") == "é\n"
    assert curl(clickhouse_url, "--data-binary", "SELECT 5") == "5\n"
    assert curl("-u", "default:", clickhouse_url, "-d", "SELECT 5") == "5\n"


def test_get_changes_nothing(
    web: httpx.Client, clickhouse_url: str, clickhouse_database: str, ask: Ask
) -> None:
    ask("CREATE TABLE t (a UInt8) ENGINE = MergeTree ORDER BY a").raise_for_status()
    lifted = web.get(clickhouse_url, params={"query": "SET readonly = 0"})
    assert lifted.headers["X-ClickHouse-Exception-Code"] == "164"
    state = {"session_id": f"get-{clickhouse_database}"}
    ask("SET max_threads = 1", **state).raise_for_status()
    for query in (
        f"INSERT INTO {clickhouse_database}.t VALUES (1)",
        f"INSERT INTO {clickhouse_database}.t SELECT 1",
        f"WITH 1 AS x INSERT INTO {clickhouse_database}.t SELECT x",
        f"DROP TABLE {clickhouse_database}.t",
    ):
        for session in ({}, {"session_id": "new"}, state):
            answer = web.get(clickhouse_url, params={"query": query, **session})
            assert answer.headers["X-ClickHouse-Exception-Code"] == "164", query
    assert ask("SELECT count() FROM t").text == "0\n"


def test_the_database_comes_in_the_url_or_in_a_header(
    web: httpx.Client, clickhouse_url: str, clickhouse_database: str
) -> None:
    query = "SELECT currentDatabase()"
    assert web.post(clickhouse_url, content=query).text == "default\n"
    by_url = web.post(clickhouse_url, params={"database": clickhouse_database}, content=query)
    assert by_url.text == clickhouse_database + "\n"
    named = {"X-ClickHouse-Database": clickhouse_database}
    assert web.post(clickhouse_url, headers=named, content=query).text == clickhouse_database + "\n"


@pytest.mark.parametrize(
    ("query", "code", "name", "status"),
    [
        ("SELECT * FROM nowhere", 60, "UNKNOWN_TABLE", 404),
        ("SELECT * FROM default.nowhere", 60, "UNKNOWN_TABLE", 404),
        ("SELECT * FROM nowhere.t", 81, "UNKNOWN_DATABASE", 404),
        ("SELEC 1", 62, "SYNTAX_ERROR", 400),
        ("SELECT 1; SELECT 2", 62, "SYNTAX_ERROR", 400),
        ("", 62, "SYNTAX_ERROR", 400),
        (" -- nothing", 62, "SYNTAX_ERROR", 400),
        ("exit", 62, "SYNTAX_ERROR", 400),
        ("\\q", 62, "SYNTAX_ERROR", 400),
        ("SELECT nothing", 47, "UNKNOWN_IDENTIFIER", 404),
        ("SELECT 1 FORMAT Nothing", 73, "UNKNOWN_FORMAT", 404),
        ("SELECT 1 SETTINGS no_such_setting = 1", 115, "UNKNOWN_SETTING", 404),
        ("SELECT throwIf(1)", 395, "FUNCTION_THROW_IF_VALUE_IS_NON_ZERO", 500),
        ("SELECT {x:UInt8}", 456, "UNKNOWN_QUERY_PARAMETER", 500),
    ],
)
def test_an_error_has_clickhouses_form(
    ask: Ask, query: str, code: int, name: str, status: int
) -> None:
    answer = ask(query)
    assert answer.status_code == status
    assert answer.headers["X-ClickHouse-Exception-Code"] == str(code)
    assert answer.text.startswith(f"Code: {code}. DB::Exception: ")
    assert f"({name}) (version " in answer.text
    assert answer.text.count("Code: ") == 1


def test_an_unknown_database_or_setting_in_the_url_is_refused(
    web: httpx.Client, clickhouse_url: str
) -> None:
    def code(**params: str) -> str:
        answer = web.post(clickhouse_url, params=params, content="SELECT 1")
        return answer.headers["X-ClickHouse-Exception-Code"]

    assert code(database="nowhere") == "81"
    assert code(database="a`; DROP DATABASE default --") == "81"
    assert code(no_such_setting="1") == "115"
    assert code(**{"max_threads = 1, max_block_size": "1"}) == "115"
    assert code(max_threads="1', readonly = '0") != "200"


def test_bytes_that_are_no_query_are_refused_in_a_sentence(ask: Ask) -> None:
    answer = ask("SELECT 1", b"\xff\xfe\x00garbage\x80")
    assert answer.status_code == 400
    assert answer.text.startswith("Code: 62. DB::Exception: ")
    assert "Syntax error" in answer.text


def test_settings_and_parameters_come_in_the_url(ask: Ask) -> None:
    assert ask("SELECT getSetting('max_block_size')", max_block_size="123").text == "123\n"
    text = ask("SELECT {s:String}, {n:UInt8} + 1", param_s="it's\\tü", param_n="4").text
    assert text == "it\\'s\\tü\t5\n"
    listed = ask("SELECT {l:Array(String)} FORMAT JSONCompactEachRow", param_l="['a','b\\'c']")
    assert listed.json() == [["a", "b'c"]]
    assert ask("SELECT {n:Nullable(UInt8)} IS NULL", param_n="\\N").text == "1\n"
    named = ask("SELECT count() FROM {t:Identifier}.tables WHERE 0", param_t="system")
    assert named.text == "0\n"


def test_a_role_is_unknown(ask: Ask) -> None:
    answer = ask("SELECT 1", role="admin")
    assert (answer.status_code, answer.headers["X-ClickHouse-Exception-Code"]) == (404, "511")
    assert ask("SELECT 1", role="").text == "1\n"
    assert ask("SET ROLE admin").headers["X-ClickHouse-Exception-Code"] in {"62", "497"}


def test_a_parameter_is_a_value_never_sql(ask: Ask) -> None:
    sly = "x' OR 1 = 1; DROP TABLE t --"
    assert ask("SELECT {s:String} FORMAT JSONCompactEachRow", param_s=sly).json() == [sly]


@pytest.mark.parametrize(
    ("query", "how", "expected", "content_type"),
    [
        ("SELECT 1 AS a", {}, "1\n", TSV),
        ("SELECT 1 AS a FORMAT CSV", {}, "1\n", CSV),
        ("SELECT 1 AS a", {"headers": {"X-ClickHouse-Format": "CSV"}}, "1\n", CSV),
        ("SELECT 1 AS a", {"default_format": "TSVWithNames"}, "a\n1\n", TSV),
        ("SELECT 'FORMAT JSON' AS format", {}, "FORMAT JSON\n", TSV),
        (
            "SELECT 1 AS a FORMAT JSONEachRow SETTINGS max_threads = 1",
            {},
            '{"a":1}\n',
            "application/x-ndjson; charset=UTF-8",
        ),
        (
            "SELECT number % 2 AS k, count() FROM numbers(4) GROUP BY k WITH TOTALS ORDER BY k",
            {},
            "0\t2\n1\t2\n\n0\t4\n",
            TSV,
        ),
    ],
)
def test_the_format_is_the_querys_or_the_requests(
    ask: Ask, query: str, how: dict[str, Any], expected: str, content_type: str
) -> None:
    answer = ask(query, **how)
    assert answer.text == expected
    assert answer.headers["Content-Type"] == content_type


def test_extremes_and_brackets_stand_once_around_a_long_answer(ask: Ask) -> None:
    extremes = ask("SELECT number FROM numbers(200000)", extremes="1")
    assert extremes.text.endswith("199999\n\n0\n199999\n")
    listed = ask(
        "SELECT number FROM numbers(200000) FORMAT JSONEachRow",
        output_format_json_array_of_rows="1",
    )
    assert len(listed.json()) == 200_000


def test_a_query_id_cannot_break_the_header(ask: Ask) -> None:
    answer = ask("SELECT 1", query_id="a\r\nSet-Cookie: é")
    assert answer.headers["X-ClickHouse-Query-Id"] == "a??Set-Cookie: ?"


def test_headers_say_what_clickhouse_says(ask: Ask) -> None:
    answer = ask("SELECT number FROM numbers(300000) FORMAT RowBinary", query_id="my-id")
    assert answer.headers["X-ClickHouse-Query-Id"] == "my-id"
    assert answer.headers["X-ClickHouse-Format"] == "RowBinary"
    assert answer.headers["X-ClickHouse-Timezone"]
    assert answer.headers["X-ClickHouse-Server-Display-Name"]
    whole = ask("SELECT sum(number) FROM numbers(300000)")
    assert json.loads(whole.headers["X-ClickHouse-Summary"])["read_rows"] == "300000"
    made = ask("CREATE TABLE t (a UInt8) ENGINE = Memory")
    assert "X-ClickHouse-Format" not in made.headers
    put = ask("INSERT INTO t VALUES", "(1), (2)")
    assert json.loads(put.headers["X-ClickHouse-Summary"])["written_rows"] == "2"


@pytest.mark.parametrize("rows", [0, 1, 1_000_000])
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "lz4", "zstd"])
def test_an_answer_is_compressed_when_asked_for(
    web: httpx.Client, clickhouse_url: str, encoding: str, rows: int
) -> None:
    query = f"SELECT number FROM numbers({rows}) FORMAT TSV"
    with web.stream(
        "POST",
        clickhouse_url,
        params={"enable_http_compression": "1"},
        headers={"Accept-Encoding": encoding},
        content=query,
    ) as answer:
        assert answer.headers["Content-Encoding"] == encoding
        raw = b"".join(answer.iter_raw())
    unpack = {
        "gzip": gzip.decompress,
        "deflate": zlib.decompress,
        "lz4": lz4.frame.decompress,
        "zstd": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
    }[encoding]
    assert unpack(raw) == b"".join(b"%d\n" % n for n in range(rows))
    plain = web.post(clickhouse_url, content=query, headers={"Accept-Encoding": encoding})
    assert "Content-Encoding" not in plain.headers


def test_an_error_in_a_streamed_answer_is_appended_and_breaks_it(
    web: httpx.Client,
    clickhouse_url: str,
) -> None:
    query = "SELECT throwIf(number = 900000) FROM numbers(1000000) SETTINGS max_threads = 1"
    received = b""
    with (
        pytest.raises(httpx.RemoteProtocolError),
        web.stream("POST", clickhouse_url, content=query) as answer,
    ):
        assert answer.status_code == 200
        tag = answer.headers["X-ClickHouse-Exception-Tag"].encode()
        for piece in answer.iter_bytes():
            received += piece
    assert b"\r\n__exception__\r\n" + tag + b"\r\nCode: 395. " in received
    assert received.endswith(tag + b"\r\n__exception__\r\n")
    held_back = web.post(clickhouse_url, params={"wait_end_of_query": "1"}, content=query)
    assert held_back.status_code == 500
    assert held_back.text.startswith("Code: 395. ")


def test_the_native_block_compression_is_refused_in_a_sentence(ask: Ask) -> None:
    for flag in ("compress", "decompress"):
        answer = ask("SELECT 1", **{flag: "1"})
        assert answer.status_code == 501
        assert f"{flag}=1" in answer.text


def test_a_form_carries_query_and_parameters(web: httpx.Client, clickhouse_url: str) -> None:
    answer = web.post(
        clickhouse_url,
        files={
            "query": (None, "SELECT {a:String} || {b:String}"),
            "param_a": (None, "é"),
            "param_b": (None, "'"),
        },
    )
    assert answer.text == "é\\'\n"


def test_an_unknown_path_is_404(web: httpx.Client, clickhouse_url: str) -> None:
    assert web.get(clickhouse_url + "/nowhere").status_code == 404


def test_the_servers_port_is_on_loopback_only(clickhouse_url: str) -> None:
    port = urlsplit(clickhouse_url).port
    assert port
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: finds this machine's own address
        own = probe.getsockname()[0]
    if own.startswith("127."):
        pytest.skip("this machine has no address but loopback")
    with pytest.raises(OSError):
        socket.create_connection((own, port), timeout=2).close()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:3000"}, 403),  # another program of this machine
        ({"Host": "evil.example:8123", "Origin": "http://evil.example:8123"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),  # as an <img> sends it
        ({"Sec-Fetch-Site": "same-site"}, 403),  # as that of another port does
        ({"Sec-Fetch-Site": "none"}, 200),  # typed by a person
        ({}, 200),
    ],
)
def test_a_web_page_of_another_site_is_refused(
    web: httpx.Client, clickhouse_url: str, headers: dict[str, str], status: int
) -> None:
    for answer in (
        web.post(clickhouse_url, content="SELECT 1", headers=headers),
        web.get(clickhouse_url, params={"query": "SELECT 1"}, headers=headers),
    ):
        assert answer.status_code == status
        assert (answer.headers.get("X-ClickHouse-Exception-Code") == "497") == (status == 403)


def test_a_repeated_query_is_not_compiled(ask: Ask) -> None:
    """Its fourth run would wait for the compiler; a query that wants that sets it itself."""

    def compiled_by(sql: str, **settings: str) -> int:
        count = "SELECT sum(value) FROM system.events WHERE event = 'CompileFunction'"
        before = int(ask(count).text)
        for _ in range(6):
            assert ask(sql, **settings).status_code == 200
        return int(ask(count).text) - before

    sums = "SELECT sum((number * 3 + 7) % 11), max(number * 5 - 2) FROM numbers(10) GROUP BY number % 3"
    assert compiled_by(sums) == 0
    assert (
        compiled_by(sums, compile_expressions="1", compile_aggregate_expressions="1") > 0
    )  # so the count counts

"""Tables that come with a query belong to it alone, are held to the allow-list and are bounded."""

from __future__ import annotations

import io
import threading
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import clickhouse_connect
import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clickhouse_connect.driver.external import ExternalData

from kalshi_platform.embedded_clickhouse import external, forms
from kalshi_platform.embedded_clickhouse.answers import ClickHouseError
from kalshi_platform_tests.embedded_clickhouse.conftest import Ask

Files = dict[str, tuple[str | None, bytes]]


@pytest.fixture
def post(web: httpx.Client, clickhouse_url: str, clickhouse_database: str) -> Any:
    """`post(sql, files, **options)`: a query in the URL with a multipart form."""

    def send(sql: str, files: Files, **options: str) -> httpx.Response:
        params = {"query": sql, "database": clickhouse_database, **options}
        return web.post(clickhouse_url, params=params, files=files)

    return send


def _code(answer: httpx.Response) -> str:
    return str(answer.headers.get("X-ClickHouse-Exception-Code", "0"))


def test_clickhouse_connect_sends_tables(clickhouse_url: str, clickhouse_database: str) -> None:
    at = urlsplit(clickhouse_url)
    where: dict[str, Any] = {
        "host": at.hostname,
        "port": at.port,
        "database": clickhouse_database,
    }
    parquet = io.BytesIO()
    pq.write_table(pa.table({"name": ["Al", "Bo"], "n": pa.array([1, 2], pa.int64())}), parquet)
    for in_form in (False, True):
        with clickhouse_connect.get_client(**where, form_encode_query_params=in_form) as client:
            data = ExternalData(
                file_name="people.parquet", fmt="Parquet", structure=["name String", "n Int64"],
                data=parquet.getvalue(),
            )  # fmt: skip
            data.add_file(file_name="years.csv", fmt="CSV", types="Int64,UInt16", data=b"2,1940\n")
            query = "SELECT name, _2 FROM people JOIN years ON n = _1 WHERE _2 > {least:UInt16}"
            rows = client.query(query, parameters={"least": 1900}, external_data=data).result_rows
            assert rows == [("Bo", 1940)]
            client.command("CREATE OR REPLACE TABLE kept ENGINE = Memory EMPTY AS SELECT * FROM people",
                           external_data=data)  # fmt: skip
            client.raw_query("INSERT INTO kept SELECT * FROM people", external_data=data)
            assert client.command("SELECT count() FROM kept") == 2


def test_a_table_is_gone_with_its_query(post: Any, ask: Ask) -> None:
    session = uuid.uuid4().hex
    for own in ({}, {"session_id": session}):
        mine = post("SELECT sum(a) FROM m", {"m": ("m", b"1\n2\n")}, m_structure="a UInt8", **own)
        assert mine.text == "3\n"
        assert _code(ask("SELECT * FROM m", **own)) == "60"
        ask(
            "SET max_threads = 1", session_id=session
        ).raise_for_status()  # it has state from now on
    failed = post("SELECT throwIf(a) FROM m", {"m": ("m", b"1\n")}, m_structure="a UInt8", **own)
    assert _code(failed) == "395"
    assert _code(ask("SELECT * FROM m", session_id=session)) == "60"


def test_a_sessions_own_table_is_not_replaced(post: Any, ask: Ask) -> None:
    session = {"session_id": uuid.uuid4().hex}
    ask("CREATE TEMPORARY TABLE own (a UInt8)", **session).raise_for_status()
    ask("INSERT INTO own VALUES (7)", **session).raise_for_status()
    files = {"m": ("m", b"1\n"), "own": ("own", b"1\n")}
    both = post("SELECT * FROM own", files, m_types="UInt8", own_types="UInt8", **session)
    assert _code(both) == "57"
    assert ask("SELECT a FROM own", **session).text == "7\n"
    assert _code(ask("SELECT * FROM m", **session)) == "60"


def test_queries_at_the_same_time_have_their_own_tables(post: Any) -> None:
    texts = list[str]()

    def count(number: int) -> None:
        rows = b"".join(b"%d\n" % number for _ in range(number))
        query = "SELECT sum(a), sleep(0.05) FROM m FORMAT TSV"
        texts.append(post(query, {"m": ("m", rows)}, m_structure="a UInt64").text)

    threads = [threading.Thread(target=count, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(texts) == sorted(f"{n * n}\t0\n" for n in range(1, 9))


def test_any_bytes_reach_a_table_unchanged(post: Any) -> None:
    every = bytes(range(256))
    answer = post("SELECT s FROM m FORMAT RawBLOB", {"m": ("m", every)}, m_structure="s String",
                  m_format="RawBLOB")  # fmt: skip
    assert answer.content == every


def test_an_empty_file_is_an_empty_table(post: Any) -> None:
    assert post("SELECT count() FROM m", {"m": ("m", b"")}, m_structure="a String").text == "0\n"


def test_a_file_without_columns_is_refused(post: Any) -> None:
    answer = post("SELECT 1", {"m": ("m", b"1\n")})
    assert _code(answer) == "36"
    assert "m_structure" in answer.text


@pytest.mark.parametrize(
    "structure",
    [
        "a UInt8 DEFAULT length(file('/etc/passwd'))",
        "a UInt8 MATERIALIZED 1",
        "a UInt8 CODEC(NONE)",
        "a UInt8 TTL now()",
        "a UInt8, INDEX i a TYPE minmax",
        "a UInt8) ENGINE = URL('http://127.0.0.1/') --",
        "a UInt8) ENGINE = URL('http://127.0.0.1/') /*",
        "a UInt8) ORDER BY (file('/etc/passwd')",
        "a UInt8) PARTITION BY (a",
        "a UInt8) AS SELECT (1",
        "a UInt8) ENGINE = Null COMMENT ('",
    ],
)
def test_columns_are_names_and_types_only(post: Any, structure: str) -> None:
    for option in ("m_structure", "m_types"):
        answer = post("SELECT 1", {"m": ("m", b"1\n")}, **{option: structure})
        assert _code(answer) in {"62", "497"}, answer.text


@pytest.mark.parametrize(
    ("data_format", "code"), [("Template", "497"), ("Protobuf", "497"), ("X' --", "73")]
)
def test_the_format_is_on_the_list(post: Any, data_format: str, code: str) -> None:
    files = {"m": ("m", b"1\n")}
    assert _code(post("SELECT 1", files, m_types="UInt8", m_format=data_format)) == code


def test_a_name_is_no_sql(post: Any) -> None:
    name = "x` (a UInt8); DROP TABLE t --"
    options = {f"{name}_types": "UInt8"}
    answer = post(
        "SELECT * FROM `x\\` (a UInt8); DROP TABLE t --`", {name: ("m", b"5\n")}, **options
    )
    assert answer.text == "5\n"


def test_a_get_or_a_reader_still_writes_nothing(post: Any, ask: Ask) -> None:
    ask("CREATE TABLE t (a UInt8) ENGINE = MergeTree ORDER BY a").raise_for_status()
    files = {"m": ("m", b"1\n")}
    assert post("SELECT * FROM m", files, m_types="UInt8", readonly="1").text == "1\n"
    for level in ("1", "2"):
        refused = post("INSERT INTO t SELECT * FROM m", files, m_types="UInt8", readonly=level)
        assert _code(refused) == "164"
    assert ask("SELECT count() FROM t").text == "0\n"


def test_a_small_file_cannot_become_a_large_table(post: Any, ask: Ask) -> None:
    packed = io.BytesIO()
    rows = pa.DictionaryArray.from_arrays(np.zeros(400_000, np.int32), ["x" * 1000])
    pq.write_table(pa.table({"s": rows}), packed, compression="zstd")
    assert len(packed.getvalue()) < 1_000_000
    files = {"m": ("m", packed.getvalue())}
    for own in ({}, {"max_memory_usage": "100000000000"}):
        answer = post("SELECT 1", files, m_structure="s String", m_format="Parquet", **own)
        assert _code(answer) == "241", answer.text
    assert ask("SELECT 1").text == "1\n"


def test_a_form_of_too_many_bytes_or_files_is_refused(
    web: httpx.Client, clickhouse_url: str
) -> None:
    options = {"query": "SELECT 1", "m_types": "String"}
    head = b'--b\r\nContent-Disposition: form-data; name="m"; filename="m"\r\n\r\n'

    def endless() -> Any:
        yield head
        for _ in range(forms.LONGEST_FILES_BYTES // (1 << 20) + 1):
            yield b"x" * (1 << 20)

    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    large = web.post(clickhouse_url, params=options, content=endless(), headers=kind)
    assert _code(large) == "307"
    many = web.post(
        clickhouse_url,
        params=options,
        content=(head + b"\r\n") * (forms.MOST_FILES + 1),
        headers=kind,
    )
    assert _code(many) == "36"


def test_all_tables_together_are_bounded() -> None:
    memory = external.Memory(total=2 * external.REQUEST_BYTES, patience_s=0)
    with memory.reserved() as first, memory.reserved() as second:
        with pytest.raises(ClickHouseError, match="MEMORY_LIMIT_EXCEEDED"), memory.reserved():
            pass
        first.shrink(100)
        second.shrink(external.REQUEST_BYTES * 9)  # more than it had
        with pytest.raises(ClickHouseError), memory.reserved():
            pass
        second.shrink(external.REQUEST_BYTES - 100)
        with memory.reserved():
            pass
    with memory.reserved(), memory.reserved():
        pass


def test_an_uploaded_file_leaves_nothing_in_the_folder(post: Any, clickhouse_url: str) -> None:
    post("SELECT 1 FROM m", {"m": ("m", b"1\n")}, m_types="UInt8").raise_for_status()
    process = getattr(clickhouse_url, "process", None)
    if process is None or not Path("/proc").exists():
        pytest.skip("it needs the server's own list of open files")
    links = [link.readlink() for link in Path(f"/proc/{process.pid}/fd").iterdir()]
    assert not [link for link in links if "/spool/" in str(link)]

"""INSERT with data in every way that clients send it."""

from __future__ import annotations

import gzip
import http.client
import io
import zlib
from collections.abc import Callable, Iterator
from urllib.parse import urlencode, urlsplit

import lz4.frame
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from kalshi_platform.embedded_clickhouse.encodings import Decompressor, compressor
from kalshi_platform_tests.embedded_clickhouse.conftest import Ask

ROWS = [(1, "one"), (2, "zwei ü"), (3, "tab\there")]
TABLE = pa.table({"a": pa.array([1, 2, 3], pa.uint64()), "s": [s for _, s in ROWS]})


def _arrow(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


DATA = {
    "TabSeparated": "1\tone\n2\tzwei ü\n3\ttab\\there\n".encode(),
    "CSV": '1,one\n2,"zwei ü"\n3,"tab\there"\n'.encode(),
    "JSONEachRow": '{"a":1,"s":"one"}\n{"a":2,"s":"zwei ü"}\n{"a":3,"s":"tab\\there"}'.encode(),
    "Values": "(1, 'one'), (2, 'zwei ü'), (1 + 2, 'tab\\there');".encode(),
    "RowBinary": b"".join(
        a.to_bytes(8, "little") + bytes([len(s.encode())]) + s.encode() for a, s in ROWS
    ),
    "ArrowStream": _arrow(TABLE),
    "Parquet": _parquet(TABLE),
}


@pytest.fixture
def table(ask: Ask) -> Callable[[], list[tuple[int, str]]]:
    """Creates table `t`; returns a function that reads it."""
    ask(
        "CREATE TABLE t (a UInt64, s String) ENGINE = MergeTree ORDER BY a"
        " SETTINGS non_replicated_deduplication_window = 100"
    ).raise_for_status()

    def rows() -> list[tuple[int, str]]:
        answer = ask("SELECT a, s FROM t ORDER BY a, s FORMAT ArrowStream")
        content = pa.ipc.open_stream(answer.content).read_all()
        return list(
            zip(content["a"].to_pylist(), content["s"].cast(pa.string()).to_pylist(), strict=True)
        )

    return rows


Rows = Callable[[], list[tuple[int, str]]]


@pytest.mark.parametrize("data_format", DATA)
def test_data_in_the_body_is_stored(ask: Ask, table: Rows, data_format: str) -> None:
    ask(f"INSERT INTO t (a, s) FORMAT {data_format}", DATA[data_format]).raise_for_status()
    assert table() == ROWS


@pytest.mark.parametrize("data_format", DATA)
def test_data_behind_the_statement_in_one_body_is_stored(
    ask: Ask, table: Rows, data_format: str
) -> None:
    for gap in (b"\n", b" ", b"\r\n") if data_format != "RowBinary" else (b"\n",):
        ask("TRUNCATE TABLE t").raise_for_status()
        body = f"INSERT INTO t FORMAT {data_format}".encode() + gap + DATA[data_format]
        ask("", body).raise_for_status()
        assert table() == ROWS


def test_native_data_goes_round(ask: Ask, table: Rows) -> None:
    ask("INSERT INTO t FORMAT CSV", DATA["CSV"]).raise_for_status()
    native = ask("SELECT * FROM t ORDER BY a FORMAT Native").content
    ask("TRUNCATE TABLE t").raise_for_status()
    ask("INSERT INTO t FORMAT Native", native).raise_for_status()
    assert table() == ROWS


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO t VALUES (7, 'x')",
        "insert into t (s, a) values ('x', 7);",
        "INSERT INTO TABLE t (*) SETTINGS max_threads = 1 VALUES (7, 'x')",
        "/* FORMAT */ INSERT INTO t -- VALUES\n VALUES\n(7, 'x')",
        "INSERT INTO t SELECT 7, 'x'",
        "INSERT INTO t WITH 7 AS seven SELECT seven, 'x'",
        "INSERT INTO t FORMAT Values (7, 'x')",
        'INSERT INTO t FORMAT JSONEachRow {"a": 7, "s": "x"}',
        "INSERT INTO t FORMAT CSV\n7,x",
    ],
)
def test_an_inline_insert_is_stored(ask: Ask, table: Rows, statement: str) -> None:
    ask(statement).raise_for_status()
    assert table() == [(7, "x")]


def test_values_may_hold_parameters(ask: Ask, table: Rows) -> None:
    ask(
        "INSERT INTO t VALUES ({a:UInt64}, {s:String})", param_a="7", param_s="it's"
    ).raise_for_status()
    assert table() == [(7, "it's")]


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("lz4", lz4.frame.compress),
        ("zstd", zstandard.ZstdCompressor().compress),
    ],
)
def test_a_compressed_body_is_stored(
    ask: Ask, table: Rows, encoding: str, pack: Callable[[bytes], bytes]
) -> None:
    packed = {"Content-Encoding": encoding}
    ask("INSERT INTO t FORMAT CSV", pack(DATA["CSV"]), packed).raise_for_status()
    assert table() == ROWS
    two_frames = pack(b"4,four\n") + pack(b"5,five\n")
    ask("INSERT INTO t FORMAT CSV", two_frames, packed).raise_for_status()
    assert len(table()) == 5
    torn = ask("INSERT INTO t FORMAT CSV", pack(DATA["CSV"] * 99)[:-9], packed)
    garbage = ask("INSERT INTO t FORMAT CSV", b"not compressed", packed)
    for refused in (torn, garbage):
        assert refused.headers["X-ClickHouse-Exception-Code"] == "271"
    assert len(table()) == 5


def test_an_unknown_encoding_is_refused_in_a_sentence(ask: Ask, table: Rows) -> None:
    refused = ask("INSERT INTO t FORMAT CSV", b"x", {"Content-Encoding": "br"})
    assert refused.status_code == 501
    assert "use gzip, deflate, lz4 or zstd" in refused.text
    assert table() == []


def test_a_second_insert_with_the_same_token_adds_nothing(ask: Ask, table: Rows) -> None:
    for token in ("A", "A", "B", "A"):
        for data_format in ("CSV", "Values"):
            ask(
                f"INSERT INTO t FORMAT {data_format}",
                DATA[data_format],
                insert_deduplication_token=token + data_format,
            ).raise_for_status()
    assert len(table()) == 4 * len(ROWS)


def test_a_token_covers_an_insert_of_many_blocks(ask: Ask, table: Rows) -> None:
    ask("SYSTEM STOP MERGES t").raise_for_status()
    data = b"".join(b"%d,x\n" % n for n in range(50_000))
    for _ in range(2):
        ask(
            "INSERT INTO t FORMAT CSV",
            data,
            insert_deduplication_token="many",
            min_insert_block_size_rows="5000",
            max_insert_block_size="5000",
        ).raise_for_status()
    assert ask("SELECT count() FROM t").text == "50000\n"
    parts = ask("SELECT count() FROM system.parts WHERE database = currentDatabase() AND active")
    assert int(parts.text) > 1, "the test needs an INSERT of several blocks"


def test_an_insert_through_input_is_refused_not_dropped(ask: Ask, table: Rows) -> None:
    statement = "INSERT INTO t SELECT a + 1, s FROM input('a UInt64, s String') FORMAT CSV"
    answer = ask(statement, DATA["CSV"])
    assert answer.headers["X-ClickHouse-Exception-Code"] == "48"
    assert table() == []


def test_garbage_is_refused_and_nothing_is_stored(ask: Ask, table: Rows) -> None:
    for data_format in ("CSV", "ArrowStream", "Parquet", "Native", "JSONEachRow", "RowBinary"):
        answer = ask(f"INSERT INTO t FORMAT {data_format}", b"\x00\x01garbage \xff")
        assert answer.headers.get("X-ClickHouse-Exception-Code"), data_format
        assert answer.text.startswith("Code: ")
    assert table() == []


def test_an_insert_of_nothing_is_no_error(ask: Ask, table: Rows) -> None:
    ask("INSERT INTO t FORMAT CSV", b"").raise_for_status()
    ask("INSERT INTO t VALUES").raise_for_status()
    assert table() == []


def test_an_insert_into_a_missing_table_is_code_60(ask: Ask) -> None:
    answer = ask("INSERT INTO nowhere FORMAT CSV", b"1\n")
    assert (answer.status_code, answer.headers["X-ClickHouse-Exception-Code"]) == (404, "60")


def test_a_body_of_hundreds_of_megabytes_is_stored(ask: Ask) -> None:
    ask("CREATE TABLE big (a UInt64, s String) ENGINE = MergeTree ORDER BY a").raise_for_status()
    row = b"1," + b"x" * 1021 + b"\n"
    piece = row * 1024

    def body() -> Iterator[bytes]:
        for _ in range(200):
            yield piece

    ask("INSERT INTO big FORMAT CSV", body()).raise_for_status()
    assert (
        ask("SELECT count(), sum(length(s)) FROM big").text
        == f"{200 * 1024}\t{200 * 1024 * 1021}\n"
    )


def test_a_body_that_breaks_off_stores_nothing(
    ask: Ask, table: Rows, clickhouse_url: str, clickhouse_database: str
) -> None:
    address = urlsplit(clickhouse_url)
    client = http.client.HTTPConnection(str(address.hostname), address.port)
    query = urlencode({"query": "INSERT INTO t FORMAT CSV", "database": clickhouse_database})
    client.putrequest("POST", f"/?{query}")
    client.putheader("Content-Length", "1000000")
    client.endheaders(b"1,one\n" * 100)
    client.close()
    ask("INSERT INTO t FORMAT CSV", DATA["CSV"]).raise_for_status()
    assert table() == ROWS


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "lz4", "zstd"])
def test_a_body_is_unpacked_in_pieces_that_fit_into_memory(encoding: str) -> None:
    packed = compressor(encoding)
    zeros = bytes(1 << 20)
    bomb = b"".join(packed.compress(zeros) for _ in range(64)) + packed.flush()
    body = Decompressor(encoding)
    sizes = [len(piece) for piece in body.decompress(bomb)]
    body.finish()
    assert sum(sizes) == 64 << 20
    assert max(sizes) <= 17 << 20


def test_an_insert_behind_with_has_data_too(ask: Ask) -> None:
    ask("CREATE TABLE t (s String) ENGINE = Memory").raise_for_status()
    ask("WITH 1 AS y INSERT INTO t (s) FORMAT TabSeparated\na;\n").raise_for_status()
    ask("WITH 1 AS y INSERT INTO t VALUES ('b')").raise_for_status()
    ask("WITH 'c' AS y INSERT INTO t SELECT y").raise_for_status()
    assert ask("SELECT s FROM t ORDER BY s").text == "a;\nb\nc\n"
    named = "WITH insert AS (SELECT 13 AS value) FROM insert FORMAT CSV"
    assert ask(named).text == "13\n"
    assert ask("WITH x (a, b) AS (SELECT 1, 2) SELECT b FROM x").text == "2\n"


def test_a_definition_may_have_settings_of_the_query_and_a_descending_key(ask: Ask) -> None:
    settings = "SETTINGS enable_time_time64_type = 1, index_granularity = 64"
    made = f"CREATE TABLE t (a UInt8, t Time) ENGINE = MergeTree ORDER BY a DESC {settings}"
    ask(made).raise_for_status()
    refused = ask("CREATE TABLE r (a UInt8) ENGINE = Memory SETTINGS format_schema = 'x'")
    assert refused.headers["X-ClickHouse-Exception-Code"] == "497"

"""The parsing of SQL that HTTP needs."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.embedded_clickhouse.answers import ClickHouseError
from kalshi_platform.embedded_clickhouse.statement import parse


@pytest.mark.parametrize(
    ("text", "verb", "named", "data"),
    [
        (b"SELECT 1", "SELECT", None, None),
        (b"  (select 1)", "(", None, None),
        (b"SELECT 1 FORMAT CSV;", "SELECT", "CSV", None),
        (b"SELECT 1 FORMAT CSV SETTINGS a = 1", "SELECT", "CSV", None),
        (b"SELECT 1 SETTINGS a = 1 FORMAT\nJSON -- FORMAT XML", "SELECT", "JSON", None),
        (b"SELECT 'x FORMAT CSV'", "SELECT", None, None),
        (b"SELECT $$ FORMAT CSV$$", "SELECT", None, None),
        (b"SELECT format FROM t", "SELECT", None, None),
        (b"SELECT `a;b`; -- end\n ;", "SELECT", None, None),
        (b"INSERT INTO t FORMAT CSV\n\n1", "INSERT", "CSV", b"\n1"),
        (b"INSERT INTO t FORMAT CSV 1", "INSERT", "CSV", b"1"),
        (b"INSERT INTO t FORMAT CSV", "INSERT", "CSV", b""),
        (b"INSERT INTO t FORMAT CSV;\n1", "INSERT", "CSV", b"1"),
        (b"INSERT INTO t FORMAT Native\r\n\x01\x00'", "INSERT", "Native", b"\x01\x00'"),
        (b"INSERT INTO t(a, `VALUES`) VALUES(';')", "INSERT", "Values", b"(';')"),
        (b"INSERT INTO values VALUES (1)", "INSERT", "Values", b" (1)"),
        (b"INSERT INTO d.format FORMAT CSV\n1", "INSERT", "CSV", b"1"),
        (b"INSERT INTO FUNCTION null('a Int8') VALUES (1)", "INSERT", "Values", b" (1)"),
        (b"INSERT INTO t SELECT 1 FORMAT CSV", "INSERT", "CSV", None),
        (b"WITH 1 AS y INSERT INTO t FORMAT CSV\n1", "INSERT", "CSV", b"1"),
        (b"WITH insert AS (SELECT 1) FROM insert FORMAT CSV", "WITH", "CSV", None),
        (b"WITH (SELECT 1) AS a INSERT INTO t SELECT a FORMAT CSV", "WITH", "CSV", None),
        (b"INSERT INTO t SELECT * FROM VALUES('a Int8', 1)", "INSERT", None, None),
        (b"", "", None, None),
        (b"/* only a comment", "", None, None),
    ],
)
def test_verb_format_and_data_are_found(
    text: bytes, verb: str, named: str | None, data: bytes | None
) -> None:
    statement = parse(text)
    assert (statement.verb, statement.format) == (verb, named)
    assert (text[statement.data_begin :] if statement.inserts_data else None) == data


@given(st.binary(max_size=200))
def test_data_is_never_read_as_sql(data: bytes) -> None:
    head = b"INSERT INTO t FORMAT RowBinary\n"
    assert parse(head + data).data_begin == len(head)


@given(st.binary(max_size=300))
def test_no_bytes_break_the_reading(text: bytes) -> None:
    try:
        parse(text)
    except ClickHouseError as refused:
        assert refused.code in {62, 497}


@pytest.mark.parametrize(
    "text", [b"SELECT 1; SELECT 2", b"DROP TABLE a;DROP TABLE b", b";;SELECT 1;x"]
)
def test_two_statements_are_refused(text: bytes) -> None:
    with pytest.raises(ClickHouseError, match="Multi-statements are not allowed"):
        parse(text)


SLOW = [
    *(b"$%d$ ", b"$a", b"$", b"'a''b", b"'\\", b"`\\", b'"', b"/*", b"--", b"# ", b"a ", b"("),
    *(b"1.", b"x.", b"$a$ ", b"FORMAT x ", b"\xff", b"VALUES "),
]


@pytest.mark.parametrize("unit", SLOW)
@pytest.mark.parametrize("head", [b"SELECT ", b"INSERT INTO t ", b"WITH 1 AS y INSERT INTO t "])
def test_reading_takes_time_that_grows_with_the_text_alone(head: bytes, unit: bytes) -> None:
    """Without a limit, 63 KB of unclosed heredocs took 38 s."""
    count = (128 << 10) // len(unit)
    text = head + b"".join(unit % n if b"%" in unit else unit for n in range(count))
    began = time.thread_time()
    with contextlib.suppress(ClickHouseError):
        parse(text)
    assert time.thread_time() - began < 5


def test_too_many_unclosed_heredocs_are_refused() -> None:
    few = b"SELECT " + b" ".join(b"$%d$" % n for n in range(50))
    assert parse(few).verb == "SELECT"
    many = b"SELECT " + b" ".join(b"$%d$" % n for n in range(9_000))
    with pytest.raises(ClickHouseError, match="too many heredocs that are not closed"):
        parse(many)
    closed = b"SELECT " + b" ".join(b"$%d$ x $%d$" % (n, n) for n in range(5_000))
    assert parse(closed).verb == "SELECT"


@pytest.mark.parametrize("text", [b"'", b"`", b'"', b"/*", b"'\\'", b"'a''", b"$a$ x"])
def test_what_is_not_closed_hides_no_data(text: bytes) -> None:
    statement = parse(b"INSERT INTO t SETTINGS log_comment = " + text + b" FORMAT CSV\n1")
    assert statement.inserts_data == text.startswith(b"$")

"""Reading SQL as far as HTTP needs it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.storage.embedded.answers import ClickHouseError
from kalshi_platform.storage.embedded.statement import parse


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

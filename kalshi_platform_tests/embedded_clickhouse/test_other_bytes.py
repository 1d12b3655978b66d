"""Bytes that are not UTF-8 are data as they are, or refused in a sentence, whichever way they come."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import httpx
import pytest

from kalshi_platform_tests.embedded_clickhouse.conftest import Ask

BYTES = b"\xff\xfe\x80 \xc3"


class Ways:
    """The ways in which a query reaches the server."""

    def __init__(self, web: httpx.Client, url: str, database: str) -> None:
        self._web, self._url, self._database = web, url, database

    def url(self, query: bytes) -> httpx.Response:
        return self._web.post(f"{self._url}/?database={self._database}&query={quote(query)}")

    def body(self, query: bytes) -> httpx.Response:
        return self._web.post(self._url, params={"database": self._database}, content=query)

    def both(self, query: bytes) -> httpx.Response:
        at = query.find(b"VALUES") + len("VALUES") if b"VALUES" in query else len("SELECT")
        options = f"database={self._database}&query={quote(query[:at])}"
        return self._web.post(f"{self._url}/?{options}", content=query[at:])

    def form(self, query: bytes) -> httpx.Response:
        params = {"database": self._database}
        return self._web.post(self._url, params=params, files={"query": (None, query)})


@pytest.fixture(params=["url", "body", "both", "form"])
def send(request: Any, web: httpx.Client, clickhouse_url: str, clickhouse_database: str) -> Any:
    """One of the ways."""
    return getattr(Ways(web, clickhouse_url, clickhouse_database), request.param)


@pytest.mark.parametrize("rest", ["VALUES ('%s')", "FORMAT TSV\n%s", "VALUES (concat('%s', ''))"])
def test_an_inserts_data_is_stored_as_it_is(send: Any, ask: Ask, rest: str) -> None:
    ask("CREATE TABLE t (s String) ENGINE = Memory").raise_for_status()
    before, _, after = rest.partition("%s")
    if send.__name__ == "both" and "VALUES" not in rest:
        pytest.skip("the URL has no line end")
    query = b"INSERT INTO t " + before.encode() + BYTES + after.encode()
    answer = send(query)
    assert answer.status_code == 200, answer.text
    assert ask("SELECT hex(s) FROM t").text == BYTES.hex().upper() + "\n"


@pytest.mark.parametrize(
    ("query", "answered"),
    [
        (b"SELECT hex('%s')", BYTES.hex().upper().encode() + b"\n"),
        (b"SELECT '%s' FORMAT RawBLOB", BYTES),
        (b"SELECT $x$%s$x$ FORMAT RawBLOB", BYTES),
        (b"SELECT 1 -- %s", b"1\n"),
        (b"SELECT hex(name) FROM (SELECT 1 AS `%s`) AS t, (SELECT '%s' AS name) AS u",
         BYTES.hex().upper().encode() + b"\n"),
        (b"SELECT '%s' AS `%s` FORMAT Native",
         b"\x01\x01\x05" + BYTES + b"\x06String\x05" + BYTES),
        (b"SELECT data FROM format(LineAsString, 'data String', '%s') FORMAT RawBLOB", BYTES),
    ],
)  # fmt: skip
def test_a_read_has_any_bytes(send: Any, query: bytes, answered: bytes) -> None:
    answer = send(query.replace(b"%s", BYTES))
    assert answer.status_code == 200, answer.text
    assert answer.content == answered


def test_names_in_native_keep_their_bytes(web: httpx.Client, clickhouse_url: str) -> None:
    query = b"SELECT '%s' AS `%s` FORMAT Native".replace(b"%s", BYTES)
    for _ in range(2):
        answer = web.post(f"{clickhouse_url}/?client_protocol_version=54405", content=query)
        assert answer.content.endswith(b"\x05" + BYTES + b"\x06String\x05" + BYTES)


@pytest.mark.parametrize(
    "query",
    [
        b"CREATE VIEW v AS SELECT '%s'",
        b"CREATE TABLE `%s` (a UInt8) ENGINE = Memory",
        b"SET log_comment = '%s'",
        b"ALTER TABLE t MODIFY COMMENT '%s'",
        b"KILL QUERY WHERE query = '%s'",
    ],
)
def test_what_defines_something_is_refused_in_one_sentence(send: Any, query: bytes) -> None:
    if send.__name__ == "both":
        pytest.skip("it is cut at SELECT or VALUES")
    answer = send(query.replace(b"%s", BYTES))
    assert (answer.status_code, answer.headers["X-ClickHouse-Exception-Code"]) == (400, "36")
    assert answer.text.startswith("Code: 36. DB::Exception: The statement is not UTF-8: ")
    assert "unhex(" in answer.text


def test_bytes_are_no_way_around_the_list(send: Any) -> None:
    for query in (
        b"SELECT file('%s')",
        b"SELECT '%s', file('/etc/passwd')",
        b"SELECT * FROM url('%s')",
        b"SELECT * FROM null('a UInt8 DEFAULT file(''%s'')')",
        b"INSERT INTO FUNCTION file('%s') VALUES (1)",
        b"SELECT '%s' FORMAT Template",
        b"SELECT '%s' SETTINGS format_schema = '%s'",
    ):
        if send.__name__ == "both" and not query.startswith(b"SELECT"):
            continue
        answer = send(query.replace(b"%s", BYTES))
        assert answer.headers["X-ClickHouse-Exception-Code"] in {"62", "497"}, answer.text


def test_names_and_settings_are_refused_in_the_same_sentence(
    web: httpx.Client, clickhouse_url: str
) -> None:
    for name in ("database", "max_threads", "session_id", "role", "m_structure"):
        in_url = web.post(f"{clickhouse_url}/?{name}=%FF", content="SELECT 1")
        form: dict[str, tuple[None, bytes]] = {
            "query": (None, b"SELECT 1"),
            name: (None, b"\xff"),
        }
        in_form = web.post(clickhouse_url, files=form)
        for answer in (in_url, in_form):
            assert answer.headers["X-ClickHouse-Exception-Code"] == "36"
            assert name in answer.text
            assert (
                "is not UTF-8: invalid start byte at byte 0. Other bytes may be in" in answer.text
            )


def test_what_the_sentence_advises_works(
    ask: Ask, web: httpx.Client, clickhouse_url: str, clickhouse_database: str
) -> None:
    ask("CREATE TABLE t (s String DEFAULT unhex('FF')) ENGINE = Memory").raise_for_status()
    ask("INSERT INTO t SELECT unhex('FF')").raise_for_status()
    ask("INSERT INTO t SELECT {s:String}", param_s="\\xFF").raise_for_status()
    ask("INSERT INTO t FORMAT RawBLOB", b"\xff").raise_for_status()
    options = f"database={clickhouse_database}&param_s=%FF"
    for query in ("INSERT INTO t SELECT {s:String}", "INSERT INTO t SELECT '\udcff'"):
        content = query.encode("utf-8", "surrogateescape")
        web.post(f"{clickhouse_url}/?{options}", content=content).raise_for_status()
    form: dict[str, tuple[None, bytes]] = {
        "query": (None, b"INSERT INTO t SELECT {s:String}"),
        "param_s": (None, b"\xff"),
    }
    web.post(clickhouse_url, params={"database": clickhouse_database}, files=form)
    assert ask("SELECT hex(s) FROM t").text == "FF\n" * 6


def test_an_error_that_quotes_bytes_is_readable(ask: Ask) -> None:
    ask("CREATE TABLE t (n UInt8) ENGINE = Memory").raise_for_status()
    answer = ask("INSERT INTO t FORMAT TSV", BYTES)
    assert answer.status_code == 400
    assert answer.text.startswith("Code: 27. ")

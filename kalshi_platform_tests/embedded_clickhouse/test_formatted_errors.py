"""With `http_write_exception_in_output_format` an answer that ends in an error is still valid JSON or XML."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from kalshi_platform_tests.embedded_clickhouse.conftest import Ask

ON = {"http_write_exception_in_output_format": "1"}
FAILS = "SELECT number, throwIf(number > 3, '<\"é\\\\') AS res FROM numbers(10)"
DOCUMENTS = ("JSON", "JSONCompact", "JSONStrings", "JSONCompactStrings")
ROWS = ("JSONEachRow", "JSONStringsEachRow", "JSONLines", "NDJSON", "PrettyJSONEachRow")
ARRAYS = ("JSONCompactEachRow", "JSONCompactStringsEachRow", "JSONCompactEachRowWithNamesAndTypes")


@pytest.mark.parametrize("output_format", [*DOCUMENTS, *ROWS, *ARRAYS, "JSONObjectEachRow", "XML"])
def test_an_error_before_the_first_row_is_a_valid_answer(ask: Ask, output_format: str) -> None:
    settings = f"SETTINGS {next(iter(ON))} = 1"
    for query, own in (
        (f"{FAILS} FORMAT {output_format}", ON),
        (FAILS, {**ON, "default_format": output_format}),
        (f"{FAILS} FORMAT {output_format} {settings}", {}),
        ("SELEC 1", {**ON, "default_format": output_format}),
    ):
        answer = ask(query, **own)
        code = answer.headers["X-ClickHouse-Exception-Code"]
        assert (answer.status_code, code) == ((400, "62") if query == "SELEC 1" else (500, "395"))
        assert answer.headers["X-ClickHouse-Format"] == output_format
        if output_format == "XML":
            error = ElementTree.fromstring(answer.content).findtext("exception")
        elif output_format in ARRAYS:
            (error,) = answer.json()
        else:
            error = answer.json()["exception"]
        assert error is not None
        assert error.startswith(f"Code: {code}. DB::Exception: ")
        assert '<"é\\' in error or code == "62"


@pytest.mark.parametrize(
    ("output_format", "row", "last"),
    [
        ("JSONEachRow", {"n": "1"}, lambda line: line["exception"]),
        ("JSONCompactEachRow", ["1"], lambda line: line[0]),
    ],
)
def test_an_error_in_a_stream_is_its_last_row(
    ask: Ask, output_format: str, row: object, last: object
) -> None:
    query = (
        "SELECT materialize(toUInt64(1)) AS n FROM numbers(1000000) WHERE NOT throwIf(number = 900000)"
        f" SETTINGS max_threads = 1, output_format_json_quote_64bit_integers = 1 FORMAT {output_format}"
    )
    for packed in ({}, {"enable_http_compression": "1"}):
        answer = ask(query, **ON, **packed)
        assert answer.status_code == 200
        lines = answer.text.splitlines()
        assert len(lines) > 100_000
        assert json.loads(lines[0]) == json.loads(lines[-2]) == row
        assert last(json.loads(lines[-1])).startswith("Code: 395. ")  # type: ignore[operator]


def test_other_formats_and_requests_keep_the_plain_text(ask: Ask) -> None:
    for query, own in (
        (f"{FAILS} FORMAT CSV", ON),
        (f"{FAILS} FORMAT Native", ON),
        (f"{FAILS} FORMAT JSON", {}),
        (f"{FAILS} FORMAT JSON", {next(iter(ON)): "0"}),
        (f"SELECT * FROM ({FAILS} SETTINGS {next(iter(ON))} = 1) FORMAT JSON", {}),
    ):
        assert ask(query, **own).text.startswith("Code: 395. ")
    wrong = ask("SELECT 1 FORMAT JSON", **ON, headers={"X-ClickHouse-User": "stranger"})
    assert wrong.text.startswith("Code: 516. ")

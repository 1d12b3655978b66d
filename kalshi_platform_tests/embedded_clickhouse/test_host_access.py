"""A query has no more access to the host than on a ClickHouse server."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kalshi_platform_tests.embedded_clickhouse.conftest import Ask

SECRET = "the-secret-of-the-host"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the host that no query may read."""
    path = tmp_path / "secret.txt"
    path.write_text(SECRET)
    return path


@pytest.mark.parametrize(
    "query",
    [
        "SELECT file('{path}')",
        "SELECT `file`('{path}')",
        "SELECT * APPLY file FROM (SELECT '{path}')",
        "SELECT * FROM file('{path}', 'LineAsString')",
        "SELECT * FROM url('file://{path}', 'LineAsString')",
        "SELECT * FROM `{path}`",
        "SELECT * FROM sqlite('{path}', 't')",
        "SELECT * FROM default.`{path}`",
        "DESCRIBE TABLE file('{path}')",
        "CREATE TABLE f (s String) ENGINE = File('LineAsString', '{path}')",
        "CREATE DATABASE f ENGINE = SQLite('{path}')",
        "CREATE DATABASE f ENGINE = Filesystem('{path}')",
        "INSERT INTO FUNCTION file('{path}', 'CSV', 's String') VALUES ('x')",
        "INSERT INTO FUNCTION file('{path}', 'CSV', 's String') SELECT 'x'",
        "SELECT 1 INTO OUTFILE '{path}' TRUNCATE",
        "INSERT INTO t FROM INFILE '{path}' FORMAT CSV",
        "SELECT * FROM Python(os)",
        "SELECT * FROM executable('cat {path}', 'LineAsString', 's String')",
        "BACKUP DATABASE default TO File('{path}')",
    ],
)
def test_a_query_reaches_no_file_of_the_host(ask: Ask, secret: Path, query: str) -> None:
    answer = ask(query.format(path=secret))
    assert answer.status_code != 200
    assert answer.text.startswith("Code: ")
    assert SECRET not in answer.text
    assert secret.read_text() == SECRET


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux confines a process to a folder")
@pytest.mark.parametrize(
    "query",
    [
        "SELECT arrayMap(file, ['{path}'])",
        "SELECT * FROM format(Values, 's String', '(file(\\'{path}\\'))')",
        "INSERT INTO t VALUES (file('{path}'))",
    ],
)
def test_the_kernel_stops_what_the_text_does_not_show(ask: Ask, secret: Path, query: str) -> None:
    ask("CREATE TABLE t (s String) ENGINE = Memory").raise_for_status()
    answer = ask(query.format(path=secret))
    assert SECRET not in answer.text
    assert SECRET not in ask("SELECT * FROM t").text
    own_environment = ask(query.format(path="/proc/self/environ"))
    assert "PATH=" not in own_environment.text


def test_columns_and_texts_may_be_called_file(ask: Ask) -> None:
    ask("CREATE TABLE t (file String, python UInt8) ENGINE = Memory").raise_for_status()
    ask("INSERT INTO t VALUES ('SELECT file(1)', 1)").raise_for_status()
    assert ask("SELECT file, t.file, python FROM t WHERE file != 'INTO OUTFILE'").status_code == 200

"""Definitions that an older version accepted and the list refuses are taken out at the start."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import httpx
import pytest

from kalshi_platform.embedded_clickhouse import running
from kalshi_platform.embedded_clickhouse.process import Running
from kalshi_platform_tests.embedded_clickhouse.conftest import PATIENCE_S

OLD = {
    "table k.u": "CREATE TABLE k.u (a UInt64) ENGINE = URL('http://127.0.0.1:1/', 'CSV')",
    "table k.f": "CREATE TABLE k.f (a UInt64) ENGINE = File(CSV)",
    "table k.program": "CREATE TABLE k.program (a String) ENGINE = Executable('env', 'TSV')",
    "dictionary k.d": "CREATE DICTIONARY k.d (a UInt64, b String) PRIMARY KEY a"
    " SOURCE(EXECUTABLE(COMMAND 'env' FORMAT 'TSV')) LAYOUT(FLAT()) LIFETIME(0)",
    "view k.v": "CREATE VIEW k.v AS SELECT * FROM url('http://127.0.0.1:1/', 'CSV', 'a UInt64')",
    "view k.of_a_file": "CREATE VIEW k.of_a_file AS SELECT file('/etc/hostname') AS x",
    "table k.`odd %20`": "CREATE TABLE k.`odd %20 'ü` (a String DEFAULT file('/etc/hostname'))"
    " ENGINE = MergeTree ORDER BY a",
    "view k.hourly": "CREATE MATERIALIZED VIEW k.hourly REFRESH EVERY 1 HOUR ENGINE = MergeTree"
    " ORDER BY a EMPTY AS SELECT * FROM url('http://127.0.0.1:1/', 'CSV', 'a UInt64')",
    "table k.needs_it": "CREATE TABLE k.needs_it (a UInt64, b String DEFAULT dictGet('k.d', 'b', a))"
    " ENGINE = MergeTree ORDER BY a",
    "database folder": "CREATE DATABASE folder ENGINE = Filesystem",
}
"""The labels of the refused objects in the warning."""
KEPT = [
    "CREATE TABLE k.kept (a UInt64, b String DEFAULT toString(a), INDEX i b TYPE minmax) ENGINE = MergeTree"
    " PARTITION BY a ORDER BY a TTL toDateTime(a) + INTERVAL 1 YEAR SETTINGS index_granularity = 1024",
    "CREATE TABLE k.none (a UInt64) ENGINE = Null COMMENT 'it''s'",
    "CREATE TABLE k.memory (a Enum8('x' = 1), t Tuple(a UInt8, b Nested(c String))) ENGINE = Memory",
    "CREATE TABLE k.both AS k.kept ENGINE = Merge('k', '^kept$')",
    "CREATE VIEW k.plain AS WITH x -> x + 1 AS f SELECT f(a) AS b FROM k.kept",
    "CREATE VIEW k.asked SQL SECURITY INVOKER AS SELECT a FROM k.kept WHERE a = {n:UInt64}",
    "CREATE MATERIALIZED VIEW k.into TO k.none AS SELECT a FROM k.kept",
    "CREATE MATERIALIZED VIEW k.inner ENGINE = SummingMergeTree ORDER BY a AS SELECT a FROM k.kept",
    "CREATE MATERIALIZED VIEW k.again REFRESH EVERY 1 HOUR APPEND ENGINE = MergeTree ORDER BY a"
    " AS SELECT 1 AS a",
    "CREATE VIEW k.mine DEFINER = default SQL SECURITY DEFINER AS SELECT a FROM k.kept",
    "CREATE DATABASE other COMMENT 'mine'",
]


def made_by_an_older_build(folder: Path, statements: Iterable[str]) -> None:
    """Run statements in the folder's engine without the list in front of it."""
    program = "import sys, chdb\nc = chdb.connect(sys.argv[1])\nfor s in sys.argv[2:]: c.query(s)\nc.close()"
    (folder / "engine").mkdir(parents=True)
    subprocess.run(
        [sys.executable, "-c", program, str(folder / "engine"), *statements], check=True, cwd=folder
    )


def asked(url: str, sql: str) -> httpx.Response:
    return httpx.post(url, content=sql, timeout=PATIENCE_S, verify=False)


def names(url: str) -> set[str]:
    found = asked(
        url,
        "SELECT database || '.' || name FROM system.tables WHERE database NOT IN ('system',"
        " 'INFORMATION_SCHEMA', 'information_schema') AND name NOT LIKE '.inner%'",
    )
    return set(found.raise_for_status().text.splitlines())


def warnings(url: Running) -> list[str]:
    """The warnings about it in the server's log, after the server has ended."""
    url.process.terminate()
    assert url.process.wait(PATIENCE_S) == 0
    assert url.process.stderr is not None
    return [line for line in url.process.stderr.read().splitlines() if "Taken out" in line]


def test_refused_definitions_are_taken_out_and_named(tmp_path: Path) -> None:
    data = tmp_path / "clickhouse"
    kept = "CREATE TABLE k.kept (a UInt64) ENGINE = MergeTree ORDER BY a"
    begin = ["CREATE DATABASE k ENGINE = Atomic", kept, "INSERT INTO k.kept VALUES (7)"]
    made_by_an_older_build(data, [*begin, *OLD.values()])
    with running(data) as url:
        assert names(url) == {"k.kept"}
        assert asked(url, "SELECT a FROM k.kept").text == "7\n"
        for attempt in (
            "SELECT * FROM k.d",
            "ATTACH TABLE k.u",
            "ATTACH TABLE k.of_a_file",
            "ATTACH DICTIONARY k.d",
            "SELECT * FROM k.of_a_file",
            "SHOW TABLES FROM folder",
        ):
            assert asked(url, attempt).status_code >= 400, attempt
        again = asked(url, "CREATE TABLE k.f (a UInt8) ENGINE = Memory")
        assert again.is_success, again.text
        assert asked(url, "DROP TABLE k.f").is_success
        first = warnings(url)
    assert len(first) == len(OLD)
    for label in OLD:
        assert any(f": {label.partition('`')[0]}" in line for line in first), label

    # Until its file is gone, each start says it again; the remedy is to remove the file.
    files = sorted((data / "refused").rglob("*.sql"))
    assert len(files) == len(OLD)
    assert all(any(f"is in {file}:" in line for line in first) for file in files)
    for file in files[1:]:
        file.unlink()
    with running(data) as url:
        assert names(url) == {"k.kept"}
        [line] = warnings(url)
        assert f"is in {files[0]}:" in line
    files[0].unlink()
    with running(data) as url:
        assert warnings(url) == []


def test_allowed_definitions_survive_a_restart(tmp_path: Path) -> None:
    with running(tmp_path) as url:
        for statement in ["CREATE DATABASE k", *KEPT]:
            assert asked(url, statement).is_success, asked(url, statement).text
        stranger = "CREATE VIEW k.x DEFINER = stranger SQL SECURITY DEFINER AS SELECT 1"
        assert asked(url, stranger).headers["X-ClickHouse-Exception-Code"] == "497"
        before = names(url)
        assert len(before) == len(KEPT) - 1
    with running(tmp_path) as url:
        assert names(url) == before
        assert "other" in asked(url, "SHOW DATABASES").text.split()
        assert warnings(url) == []


def test_a_definition_that_is_taken_out_again_replaces_no_other(tmp_path: Path) -> None:
    data = tmp_path / "clickhouse"
    made_by_an_older_build(data, ["CREATE DATABASE k ENGINE = Atomic", OLD["table k.u"]])
    aside = data / "refused" / "k" / "u.sql"
    aside.parent.mkdir(parents=True)
    aside.write_text("-- table k.u: it was another\n")
    with running(data) as url:
        assert len(warnings(url)) == 2
    assert aside.read_text() == "-- table k.u: it was another\n"
    assert "ENGINE = URL" in aside.with_name("u 1.sql").read_text()


def test_a_definition_that_stays_prevents_the_start(tmp_path: Path) -> None:
    data = tmp_path / "clickhouse"
    made_by_an_older_build(data, ["CREATE DATABASE k ENGINE = Atomic", OLD["table k.u"]])
    (data / "refused").write_text("in the way")
    with pytest.raises(Exception, match="cannot be taken out"), running(data):
        pass
    (data / "refused").unlink()
    with running(data) as url:
        assert names(url) == set()

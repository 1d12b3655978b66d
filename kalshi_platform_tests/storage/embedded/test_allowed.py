"""What SQL may do is what is listed: every name of the engine is on a list, or refused before it acts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kalshi_platform.storage import migrations
from kalshi_platform.storage.embedded import allowed
from kalshi_platform.storage.statements import statements
from kalshi_platform_tests.storage.embedded.conftest import Ask

ROOT = Path(__file__).resolve().parents[3]
ATTACKS = [
    "CREATE DICTIONARY d (k String, v String) PRIMARY KEY k"
    " SOURCE(EXECUTABLE(COMMAND 'env' FORMAT 'TSV')) LAYOUT(COMPLEX_KEY_HASHED()) LIFETIME(0)",
    "CREATE DICTIONARY d (k String, v String) PRIMARY KEY k"
    " SOURCE(HTTP(URL 'http://127.0.0.1:1/' FORMAT 'TSV')) LAYOUT(COMPLEX_KEY_HASHED()) LIFETIME(0)",
    "SELECT dictGet('d', 'v', 'x')",
    "SELECT * FROM dictionary('d')",
    "SELECT * FROM executable('env', 'TSV', 'a String')",
    "SELECT * FROM url('http://127.0.0.1:1/', 'TSV', 'a String')",
    "SELECT /* c */ * FROM `url`('http://127.0.0.1:1/', 'TSV', 'a String')",
    "SELECT * FROM s3('http://127.0.0.1:1/b/k', 'TSV', 'a String')",
    "SELECT * FROM remote('127.0.0.1:1', system.one)",
    "SELECT * FROM cluster('default', system.one)",
    "SELECT * FROM mysql('127.0.0.1:1', 'd', 't', 'u', 'p')",
    "SELECT * FROM jdbc('x', 'y', 'z')",
    "SELECT * FROM odbc('x', 'y', 'z')",
    "SELECT * FROM python('x')",
    "SELECT * FROM eval('SELECT 1')",
    "SELECT 1 IN url('http://127.0.0.1:1/', 'TSV', 'a String')",
    "CREATE TABLE f (a String) ENGINE = URL('file:/etc/passwd', 'TSV')",
    "CREATE TABLE f (a String) ENGINE = Executable('env', 'TSV')",
    "CREATE TABLE f (a String) ENGINE = S3('http://127.0.0.1:1/b/k', 'TSV')",
    "CREATE TABLE f AS url('http://127.0.0.1:1/', 'TSV', 'a String')",
    "CREATE VIEW f AS SELECT * FROM url('http://127.0.0.1:1/', 'TSV', 'a String')",
    "CREATE MATERIALIZED VIEW f REFRESH EVERY 1 HOUR ENGINE = URL('http://127.0.0.1:1/', 'TSV')"
    " AS SELECT 'a' AS a",
    "CREATE TABLE f (a String DEFAULT file('/etc/passwd')) ENGINE = Memory",
    "CREATE TABLE f (a Int8) ENGINE = MergeTree ORDER BY a SETTINGS disk = disk(type = 'local', path = '/')",
    "CREATE DATABASE f ENGINE = MySQL('127.0.0.1:1', 'd', 'u', 'p')",
    "CREATE FUNCTION f AS x -> file(x)",
    "CREATE NAMED COLLECTION f AS a = 1",
    "CREATE USER f",
    "EXECUTE AS default SELECT 1",
    "ATTACH TABLE f FROM '/tmp' (a Int8) ENGINE = Memory",
    "BACKUP DATABASE default TO Disk('a', 'b')",
    "INSERT INTO FUNCTION url('http://127.0.0.1:1/', 'TSV', 'a String') SELECT 'a'",
    "INSERT INTO f SELECT * FROM url('http://127.0.0.1:1/', 'TSV', 'a String')",
    "SELECT 1 INTO OUTFILE $$/tmp/x$$",
    "SELECT 1 INTO OUTFILE $a$/tmp/x$a$ FORMAT TSV",
    "EXPLAIN SELECT * FROM url('http://127.0.0.1:1/', 'TSV', 'a String')",
    "EXPLAIN AST optimize = 1 SELECT * FROM executable('env', 'TSV', 'a String')",
    "DESCRIBE TABLE url('http://127.0.0.1:1/', 'TSV')",
    "SYSTEM RELOAD DICTIONARIES",
    "SYSTEM START LISTEN HTTP",
    "SELECT arrayMap(file, ['/etc/passwd'])",
    "SELECT * APPLY file FROM (SELECT '/etc/passwd')",
    "SELECT * APPLY (x -> file(x)) FROM (SELECT '/etc/passwd')",
    "WITH x -> file(x) AS f SELECT f('/etc/passwd')",
    "SELECT * FROM format(CSV, 'a String, b String DEFAULT file(\\'/etc/passwd\\')', 'a,')",
    "SELECT * FROM format(CSV, concat('a String DEFAULT fi', 'le(1)'), 'a')",
    "SELECT 1 SETTINGS additional_result_filter = 'file(1)'",
    "SELECT 1 SETTINGS format_template_row = '/etc/passwd'",
    "SELECT 1 SETTINGS input_format_record_errors_file_path = '/tmp/x'",
    "SET dialect = 'kusto'",
    "SELECT 1 FORMAT Template",
    "DROP DATABASE system",
    "KILL TRANSACTION WHERE 1",
    "SELECT 1; SELECT 2",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_not_listed_is_refused(ask: Ask, attack: str) -> None:
    answer = ask(attack)
    assert answer.status_code in {400, 403, 404}, answer.text
    assert answer.headers["X-ClickHouse-Exception-Code"] in {"46", "62", "497"}, answer.text


@pytest.mark.parametrize("setting", ["dialect", "format_schema", "profile", "url_base"])
def test_a_setting_in_the_url_is_held_to_the_list(ask: Ask, setting: str) -> None:
    answer = ask("SELECT 1", **{setting: "x"})
    assert answer.headers["X-ClickHouse-Exception-Code"] in {"115", "497"}


@pytest.mark.parametrize(
    ("listed", "question"),
    [
        (allowed.FUNCTIONS | allowed.FUNCTIONS_REFUSED, "SELECT name FROM system.functions"),
        (allowed.SETTINGS | allowed.SETTINGS_REFUSED, "SELECT name FROM system.settings"),
        (
            allowed.MERGE_TREE_SETTINGS | allowed.MERGE_TREE_SETTINGS_REFUSED,
            "SELECT name FROM system.merge_tree_settings",
        ),
        (allowed.FORMATS | allowed.FORMATS_REFUSED, "SELECT name FROM system.formats"),
    ],
)
def test_every_name_of_the_engine_was_looked_at(
    ask: Ask, listed: frozenset[str], question: str
) -> None:
    assert set(ask(question).text.split()) - listed == set()


def test_no_name_is_on_both_lists() -> None:
    assert not allowed.FUNCTIONS & allowed.FUNCTIONS_REFUSED
    assert not allowed.SETTINGS & allowed.SETTINGS_REFUSED
    lowered = {name.lower() for name in allowed.FUNCTIONS}
    assert not {name for name in allowed.FUNCTIONS_REFUSED if name.lower() in lowered}


@pytest.mark.parametrize(
    ("table", "listed", "form"),
    [
        ("table_functions", allowed.TABLE_FUNCTIONS, "SELECT * FROM {}('http://127.0.0.1:1/a')"),
        ("table_engines", allowed.TABLE_ENGINES, "CREATE TABLE f (a Int8) ENGINE = {}('x')"),
        ("database_engines", allowed.DATABASE_ENGINES, "CREATE DATABASE f_f ENGINE = {}('x')"),
    ],
)
def test_every_other_engine_and_table_function_is_refused(
    ask: Ask, table: str, listed: frozenset[str], form: str
) -> None:
    names = set(ask(f"SELECT name FROM system.{table}").text.split()) - listed
    assert len(names) > 5
    for name in names:
        for statement in (form.format(name), f"EXPLAIN AST {form.format(name)}"):
            answer = ask(statement)
            assert answer.headers["X-ClickHouse-Exception-Code"] in {"62", "497"}, answer.text


def _own() -> Iterator[str]:
    for migration in migrations.available():
        yield from statements(migration.sql)
    for path in sorted((ROOT / "infra" / "queries").rglob("*.sql")):
        yield from statements(path.read_text(encoding="utf-8"))


def test_every_statement_of_the_platform_is_on_the_list(ask: Ask) -> None:
    for statement in _own():
        code = ask(f"EXPLAIN AST {statement}").headers.get("X-ClickHouse-Exception-Code", "0")
        assert code not in {"46", "115", "497"}, statement


def test_expressions_in_values_are_evaluated_where_they_are_listed(ask: Ask) -> None:
    ask("CREATE TABLE t (a DateTime, s String) ENGINE = Memory").raise_for_status()
    ask("INSERT INTO t VALUES (now(), concat('a', 'b')), ('2026-01-01 00:00:00', 'c')")
    assert ask("SELECT s FROM t ORDER BY s").text == "ab\nc\n"
    refused = ask("INSERT INTO t VALUES (now(), file('/etc/passwd'))")
    assert refused.headers["X-ClickHouse-Exception-Code"] == "497"
    assert ask("SELECT count() FROM t").text == "2\n"


def test_user_made_names_are_no_functions(ask: Ask) -> None:
    ask("CREATE TABLE url (file UInt8, python UInt8) ENGINE = Memory").raise_for_status()
    ask("CREATE VIEW v AS SELECT file FROM url WHERE file = {n:UInt8}").raise_for_status()
    assert ask("WITH file AS (SELECT 1 AS s3) SELECT s3 FROM file").status_code == 200
    assert ask("SELECT url.file FROM url WHERE lower(toString(file)) = 'x'").status_code == 200
    assert ask("SELECT * FROM v(n = 1)").status_code == 200
    assert ask("WITH x -> x + 1 AS f SELECT f(1)").text == "2\n"

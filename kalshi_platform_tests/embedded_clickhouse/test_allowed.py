"""SQL may use listed names only: every other name of the engine is refused before it acts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.statements import statements
from kalshi_platform.embedded_clickhouse import allowed
from kalshi_platform_tests.embedded_clickhouse.attacks import ATTACKS
from kalshi_platform_tests.embedded_clickhouse.conftest import Ask

ROOT = Path(__file__).resolve().parents[2]


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


def test_allowed_expressions_in_values_are_evaluated(ask: Ask) -> None:
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

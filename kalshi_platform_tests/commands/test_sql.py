"""`sql` prints aligned tables, streams other formats unchanged, and reports errors on one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import migrations
from kalshi_platform.commands.sql import command
from kalshi_platform.errors import StoreRefused

Run = Callable[..., Result]


@pytest.fixture
def sql(
    clickhouse_url: str,
    clickhouse_database: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[Run]:
    """Run the command in an empty folder on an empty database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLICKHOUSE_URL", clickhouse_url)
    monkeypatch.setenv("CLICKHOUSE_DATABASE", clickhouse_database)
    platform_settings.current.cache_clear()
    yield lambda *args, **more: CliRunner().invoke(command, args, **more)
    platform_settings.current.cache_clear()


def test_a_table_lines_up_and_keeps_every_decimal(sql: Run) -> None:
    result = sql(
        "SELECT * FROM (SELECT 'A' AS ticker, toDecimal32('0.5', 4) AS price, toUInt64(18446744073709551615) AS n,"
        " NULL AS nothing UNION ALL SELECT 'LONG\\nER', toDecimal32('0.1', 4), 7, NULL) ORDER BY ticker"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "ticker     price                     n  nothing",
        "A         0.5000  18446744073709551615  NULL",
        "LONG\\nER  0.1000                     7  NULL",
    ]


def test_statements_run_in_order_and_only_answers_are_printed(sql: Run) -> None:
    result = sql(
        "CREATE TABLE t (x Int8) ENGINE = Memory; INSERT INTO t VALUES (1), (2);"
        "SELECT sum(x) AS total FROM t; SELECT x FROM t WHERE x > 5"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == ["total", "3", "x"]


def test_a_format_is_streamed_as_clickhouse_writes_it(sql: Run) -> None:
    result = sql("--format", "JSONEachRow", "SELECT number AS n FROM numbers(70000)")
    lines = result.stdout.splitlines()
    assert len(lines) == 70_000
    assert json.loads(lines[-1]) == {"n": 69_999}
    assert sql("--format", "CSVWithNames", "SELECT 1 AS a, 'x' AS b").stdout == '"a","b"\n1,"x"\n'
    native = sql("--format", "Parquet", "SELECT 1 AS a").stdout_bytes
    assert native[:4] == native[-4:] == b"PAR1"


def test_a_format_in_the_sql_wins(sql: Run) -> None:
    assert sql("SELECT 1 AS a FORMAT CSV").stdout == "1\n"


def test_a_file_may_source_another(sql: Run, tmp_path: Path) -> None:
    (tmp_path / "one.sql").write_text("-- first\nSELECT 1 AS a;\nSOURCE two.sql;\n", "utf-8")
    (tmp_path / "two.sql").write_text("SELECT 2 AS b", "utf-8")
    for args in (("--file", "one.sql"), ("SOURCE one.sql",), ("source 'one.sql';",)):
        assert sql(*args, "--format", "TSV").stdout == "1\n2\n"
    assert sql("--file", "-", "--format", "TSV", input="SELECT 3").stdout == "3\n"


@pytest.mark.parametrize(
    "path",
    [
        "010_inventory_observability.sql",
        "infra/clickhouse_migrations/010_inventory_observability.sql",
        "'/elsewhere/db/010_inventory_observability.sql'",
        r"infra\clickhouse_migrations\010_inventory_observability.sql",
        r"'C:\Users\me\010_inventory_observability.sql'",
    ],
)
@pytest.mark.parametrize("installed", [False, True])
def test_a_migration_is_found_by_its_name_from_any_folder(
    sql: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, installed: bool
) -> None:
    """A wheel, and so the image, has no `infra`: the migrations are inside the package."""
    if installed:
        inside = tmp_path / "site-packages" / "_infra" / "clickhouse_migrations"
        shutil.copytree(migrations.folder(), inside)
        monkeypatch.setattr(migrations, "folder", lambda: inside)
    result = sql(f"SOURCE {path}")
    assert result.exit_code == 0, result.output
    assert f"is the platform's own, {migrations.folder()}" in result.stderr
    answer = sql("--format", "TSV", "SELECT pos_total_est FROM mm_decisions")
    assert answer.exit_code == 0, answer.output


def test_an_existing_file_has_precedence_over_the_platforms(sql: Run, tmp_path: Path) -> None:
    (tmp_path / "010_inventory_observability.sql").write_text("SELECT 'mine'", "utf-8")
    result = sql("SOURCE 010_inventory_observability.sql", "--format", "TSV")
    assert (result.stdout, result.stderr) == ("mine\n", "")


def test_only_the_platforms_own_queries_are_found_by_name(sql: Run) -> None:
    missing = sql("--file", "infra/queries/inventory/../../../pyproject.toml").exception
    assert isinstance(missing, StoreRefused)
    engines = sql("--file", "infra/queries/inventory/judged.sql").exception
    assert isinstance(engines, StoreRefused)
    assert "Substitution `since` is not set" in str(engines)  # it was read, and run


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, "cannot be read"), (b"\xff\xfe", "not UTF-8"), (b"SOURCE x.sql", "sources itself")],
)
def test_a_file_that_cannot_be_run_is_named(
    sql: Run, tmp_path: Path, content: bytes | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / "x.sql").write_bytes(content)
    error = sql("SOURCE x.sql").exception
    assert isinstance(error, StoreRefused)
    assert sentence in str(error)
    assert "x.sql" in str(error)


def test_parameters_are_bound_not_pasted(sql: Run) -> None:
    evil = "'; DROP TABLE t; --\n100%(a)s"
    result = sql(
        "SELECT {t:String} AS t, '%' AS p; SELECT {n:UInt8} AS n",
        *("--param", f"t={evil}", "--param", "n=7", "--format", "JSONEachRow"),
    )
    assert [json.loads(line) for line in result.stdout.splitlines()] == [
        {"t": evil, "p": "%"},
        {"n": 7},
    ]


@pytest.mark.parametrize("args", [("SELECT 1", "--param", "t=1"), ("SELECT 1", "--param", "t"), ()])
def test_arguments_that_make_no_sense_are_refused(sql: Run, args: tuple[str, ...]) -> None:
    result = sql(*args)
    assert result.exit_code == click.UsageError.exit_code


def test_an_error_is_one_line_with_its_code(sql: Run) -> None:
    error = sql("SELECT no_such_column\nFROM numbers(1)").exception
    assert isinstance(error, StoreRefused)
    assert (error.code, error.name) == (47, "UNKNOWN_IDENTIFIER")
    assert "UNKNOWN_IDENTIFIER (code 47)" in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize("args", [("--format", "CSV"), ("--rows", "1000000")])
def test_an_answer_that_breaks_off_is_an_error(sql: Run, args: tuple[str, ...]) -> None:
    result = sql(
        *args,
        "SELECT number, throwIf(number = 300000, 'broken on the way') FROM numbers(1000000)"
        " SETTINGS max_threads = 1, max_block_size = 1000",
    )
    error = result.exception
    assert isinstance(error, StoreRefused), error
    assert error.code == 395
    assert "broken on the way" in str(error)


def test_a_long_answer_is_cut_with_a_note(sql: Run) -> None:
    result = sql("SELECT number FROM numbers(20)", "--rows", "3")
    assert result.stdout.split() == ["number", "0", "1", "2"]
    assert "first 3 rows" in result.stderr
    assert "first" not in sql("SELECT number FROM numbers(3)", "--rows", "3").stderr

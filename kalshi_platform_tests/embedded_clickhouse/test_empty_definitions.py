"""Definitions that a full disk left empty do not prevent the engine from opening its folder."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from kalshi_platform.embedded_clickhouse import running
from kalshi_platform.errors import StoreError


def asked(url: str, *statements: str) -> str:
    answer = ""
    for sql in statements:
        answer = httpx.post(url, content=sql, timeout=60).raise_for_status().text
    return answer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with a table of three rows."""
    with running(tmp_path / "clickhouse") as url:
        asked(
            url,
            "CREATE DATABASE d",
            "CREATE TABLE d.t (a Int64) ENGINE = MergeTree ORDER BY a",
            "INSERT INTO d.t SELECT number FROM numbers(3)",
        )
    return tmp_path / "clickhouse"


def test_the_definition_of_a_new_table_is_removed(folder: Path) -> None:
    (folder / "engine" / "metadata" / "d" / "being_made.sql").touch()
    with running(folder) as url:
        assert asked(url, "SELECT count() FROM d.t") == "3\n"
        asked(url, "CREATE TABLE d.being_made (a Int64) ENGINE = MergeTree ORDER BY a")
    with running(folder) as url:
        assert asked(url, "SELECT count() FROM d.being_made") == "0\n"


def test_a_definition_with_rows_is_an_error_until_moved_away(folder: Path) -> None:
    definition = folder / "engine" / "metadata" / "d" / "t.sql"
    text = definition.read_bytes()
    definition.write_bytes(b"")
    with (
        pytest.raises(StoreError, match=r"definition of d\.t is empty") as refused,
        running(folder),
    ):
        pass
    assert "move it away" in str(refused.value)
    away = folder.rename(folder.with_name("away"))
    with running(folder) as url:
        assert asked(url, "SELECT 1") == "1\n"
    (away / "engine" / "metadata" / "d" / "t.sql").write_bytes(text)  # as in a backup
    with running(away) as url:
        assert asked(url, "SELECT count() FROM d.t") == "3\n"

"""If its data folder vanishes, the embedded ClickHouse reports it and creates no other in its place."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from kalshi_platform.embedded_clickhouse import running


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_a_folder_that_is_gone_is_an_error_until_it_is_back(left: str, tmp_path: Path) -> None:
    folder = tmp_path / "clickhouse"
    with running(folder) as url, httpx.Client(timeout=60.0) as client:

        def ask(sql: str) -> httpx.Response:
            return client.post(str(url), content=sql)

        ask("CREATE TABLE t (a UInt64) ENGINE = MergeTree ORDER BY a").raise_for_status()
        ask("INSERT INTO t VALUES (1)").raise_for_status()
        folder.rename(tmp_path / "away")
        if left == "an empty folder":
            folder.mkdir()
        for sql in ("INSERT INTO t VALUES (2)", "INSERT INTO t SELECT 3", "SELECT * FROM t"):
            answer = ask(sql)
            assert answer.status_code == 500
            assert f"The data folder {folder} is gone" in answer.text
        assert not (folder / "engine").exists()
        if left == "an empty folder":
            folder.rmdir()
        (tmp_path / "away").rename(folder)
        ask("INSERT INTO t VALUES (4)").raise_for_status()
        assert ask("SELECT groupArray(a) FROM (SELECT a FROM t ORDER BY a)").text == "[1,4]\n"

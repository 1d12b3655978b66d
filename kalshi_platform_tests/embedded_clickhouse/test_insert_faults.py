"""An INSERT that fails at any stage returns the engine's error to every client, and is stored once when repeated."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import clickhouse_connect
import httpx
import pytest
from clickhouse_connect.driver.exceptions import DatabaseError

from kalshi_platform.embedded_clickhouse import Running, running
from kalshi_platform_tests.embedded_clickhouse.conftest import PATIENCE_S, Ask, wait_until_running

SMALL, LARGE = 5, 80_000
"""Numbers of rows; the larger is 6 MB, which is sent in pieces and makes several blocks."""
TOKEN = "once"


def csv(rows: int, last: bytes = b"") -> Iterator[bytes]:
    """Rows 0 to `rows` - 1, in pieces; `last` replaces the last one."""
    for begin in range(0, rows, 1_000):
        end = min(begin + 1_000, rows)
        lines = [b"%d,%060d\n" % (n, n) for n in range(begin, end)]
        if last and end == rows:
            lines[-1] = last
        yield b"".join(lines)


@dataclass(frozen=True)
class Stage:
    """The stage at which an INSERT fails."""

    codes: frozenset[int]
    breaking: tuple[str, ...] = ()
    repair: tuple[str, ...] = ()
    settings: dict[str, str] = field(default_factory=dict)
    last_row: bytes = b""
    meanwhile: str = ""
    """A statement that another client runs during the INSERT."""


_VIEW = "CREATE MATERIALIZED VIEW v TO other AS SELECT {} AS a, s FROM t"
_SLOWLY = _VIEW.format("a + sleep(1)")
STAGES = {
    "the header": Stage(frozenset({115}), settings={"no_such_setting": "1"}),
    "a bad row at the end": Stage(frozenset({27, 117}), last_row=b"nothing\n"),
    "a violated constraint": Stage(
        frozenset({469}),
        ("ALTER TABLE t ADD CONSTRAINT c CHECK a + 1 < {rows}",),
        ("ALTER TABLE t DROP CONSTRAINT c",),
    ),
    "too many parts": Stage(
        frozenset({252}),
        (
            "SYSTEM STOP MERGES t",
            "INSERT INTO t SETTINGS insert_deduplication_token = 'another' VALUES (1000000, '')",
            "ALTER TABLE t MODIFY SETTING parts_to_delay_insert = 1, parts_to_throw_insert = 1",
        ),
        (
            "ALTER TABLE t MODIFY SETTING parts_to_delay_insert = 1000, parts_to_throw_insert = 3000",
            "SYSTEM START MERGES t",
            "ALTER TABLE t DELETE WHERE a = 1000000 SETTINGS mutations_sync = 2",
        ),
    ),
    "too many partitions": Stage(
        frozenset({252}), settings={"max_partitions_per_insert_block": "1"}
    ),
    "a view that throws": Stage(
        frozenset({395}), (_VIEW.format("throwIf(a + 1 = {rows})"),), ("DROP VIEW v SYNC",)
    ),
    "a view whose target is gone": Stage(
        frozenset({60}),
        (_VIEW.format("a"), "DROP TABLE other SYNC"),
        ("DROP VIEW v SYNC",),
    ),
    "no memory": Stage(
        frozenset({241}), settings={"max_memory_usage": "20000", "max_untracked_memory": "0"}
    ),
    "too slow": Stage(
        frozenset({159, 394}),
        (_SLOWLY,),
        ("DROP VIEW v SYNC",),
        {"max_execution_time": "1"},
    ),
    "killed": Stage(
        frozenset({394}),
        (_SLOWLY,),
        ("DROP VIEW v SYNC",),
        meanwhile="KILL QUERY WHERE query LIKE '%INTO t %' AND query NOT LIKE '%KILL%' SYNC",
    ),
    "a dropped table": Stage(
        frozenset({60, 218, 236}),
        (_SLOWLY,),
        ("DROP VIEW v SYNC", "{table}"),
        meanwhile="DROP TABLE t SYNC",
    ),
}
TABLE = (
    "CREATE TABLE t (a UInt64, s String) ENGINE = MergeTree PARTITION BY a % 2 ORDER BY a"
    " SETTINGS non_replicated_deduplication_window = 1000"
)
BLOCKS = {
    "insert_deduplication_token": TOKEN,
    "min_insert_block_size_rows": "20000",
    "max_insert_block_size": "20000",
}


@pytest.fixture(autouse=True)
def _tables(ask: Ask) -> None:
    ask(TABLE).raise_for_status()
    ask("CREATE TABLE other (a UInt64, s String) ENGINE = MergeTree ORDER BY a").raise_for_status()


def count(ask: Ask) -> str:
    return ask("SELECT count(), uniqExact(a) FROM t").text


def assert_is_the_engines_error(answer: httpx.Response, codes: frozenset[int]) -> None:
    code = answer.headers.get("X-ClickHouse-Exception-Code", "none")
    assert code in map(str, codes), (answer.status_code, answer.text)
    assert answer.status_code >= 400
    assert answer.text.startswith(f"Code: {code}. DB::Exception: ")
    assert "/dev/fd" not in answer.text
    assert "X-ClickHouse-Summary" not in answer.headers


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        (name, rows)
        for name in STAGES
        for rows in (SMALL, LARGE)
        # an INSERT of one block, begun before its table is dropped, may well end before that
        if (name, rows) != ("a dropped table", SMALL)
    ],
)
def test_a_failed_insert_has_its_error_and_is_stored_once_later(
    ask: Ask, name: str, rows: int
) -> None:
    stage = STAGES[name]
    for statement in stage.breaking:
        assert ask(statement.format(rows=rows)).text == ""
    statement = "INSERT INTO t (a, s) FORMAT CSV"
    for asynchronous in ({}, {"async_insert": "1", "wait_for_async_insert": "0"}):
        with contextlib.ExitStack() as held:
            if stage.meanwhile:
                held.enter_context(_meanwhile(ask, stage.meanwhile))
            answer = ask(
                statement, csv(rows, stage.last_row), **BLOCKS, **stage.settings, **asynchronous
            )
        assert_is_the_engines_error(answer, stage.codes)
        if "DROP TABLE t" in stage.meanwhile:
            break
    for statement in stage.repair:
        ask(statement.format(table=TABLE)).raise_for_status()
    for _ in range(2):
        answer = ask("INSERT INTO t (a, s) FORMAT CSV", csv(rows), **BLOCKS)
        answer.raise_for_status()
        assert answer.content == b""
        assert json.loads(answer.headers["X-ClickHouse-Summary"])["written_rows"] == str(rows)
    assert count(ask) == f"{rows}\t{rows}\n"


@contextlib.contextmanager
def _meanwhile(ask: Ask, statement: str) -> Iterator[None]:
    def run() -> None:
        wait_until_running(ask, "INTO t ", 1)
        ask(statement).raise_for_status()

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()


# -- every client ------------------------------------------------------------------------------


def _by_urllib(url: str, database: str, rows: int) -> str:
    query = urlencode({"query": "INSERT INTO t FORMAT CSV", "database": database, **BLOCKS})
    request = urllib.request.Request(f"{url}/?{query}", b"".join(csv(rows)))
    try:
        urllib.request.urlopen(request, timeout=PATIENCE_S).close()
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode()
    return ""


def _by_curl(url: str, database: str, rows: int) -> str:
    query = urlencode({"database": database, **BLOCKS})
    text = b"INSERT INTO t FORMAT CSV\n" + b"".join(csv(rows))
    argv = ["curl", "-sS", "--noproxy", "*", f"{url}/?{query}", "--data-binary", "@-"]
    done = subprocess.run(argv, input=text, capture_output=True, check=True, timeout=PATIENCE_S)
    return done.stdout.decode()


def _by_clickhouse_connect(url: str, database: str, rows: int) -> str:
    at = urlsplit(url)
    client = clickhouse_connect.get_client(
        host=at.hostname or "", port=at.port or 0, database=database
    )
    data = [(n, f"{n:060d}") for n in range(rows)]
    try:
        client.insert("t", data, column_names=["a", "s"], settings=dict(BLOCKS))
    except DatabaseError as error:
        return str(error)
    finally:
        client.close()
    return ""


@pytest.mark.parametrize("rows", [SMALL, LARGE])
@pytest.mark.parametrize("client", [_by_urllib, _by_curl, _by_clickhouse_connect])
def test_every_client_gets_the_error(
    client: Callable[[str, str, int], str],
    rows: int,
    ask: Ask,
    clickhouse_url: str,
    clickhouse_database: str,
) -> None:
    if client is _by_curl and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    ask(f"ALTER TABLE t ADD CONSTRAINT c CHECK a + 1 < {rows}").raise_for_status()
    assert "VIOLATED_CONSTRAINT" in client(clickhouse_url, clickhouse_database, rows)
    ask("ALTER TABLE t DROP CONSTRAINT c").raise_for_status()
    for _ in range(2):
        assert client(clickhouse_url, clickhouse_database, rows) == ""
    assert count(ask) == f"{rows}\t{rows}\n"


def test_an_error_that_quotes_binary_data_is_answered(ask: Ask) -> None:
    answer = ask("INSERT INTO t FORMAT Npy", b"\x93NUMPY\xff\xfe\x00" * 9)
    assert answer.status_code >= 400
    assert answer.text.startswith("Code: ")
    assert count(ask) == "0\t0\n"


def test_a_materialised_view_counts_in_the_summary(ask: Ask) -> None:
    ask(_VIEW.format("a")).raise_for_status()
    answer = ask("INSERT INTO t FORMAT CSV", csv(SMALL))
    assert json.loads(answer.headers["X-ClickHouse-Summary"])["written_rows"] == str(2 * SMALL)
    assert ask("SELECT count() FROM other").text == f"{SMALL}\n"


@pytest.mark.parametrize(
    "head",
    [
        "INSERT INTO t SETTINGS max_threads = 1 FORMAT CSV",
        "INSERT INTO t (a, s) SETTINGS log_comment = 'FORMAT' FORMAT CSV",
        "INSERT INTO settings SETTINGS max_threads = 1 FORMAT CSV",
        "INSERT INTO settings (settings, s) FORMAT CSV",
        "INSERT INTO {table:Identifier} FORMAT CSV",
        "INSERT INTO t (* EXCEPT (s)) SETTINGS input_format_csv_allow_variable_number_of_columns = 1"
        " FORMAT CSV",
    ],
)
def test_every_form_of_the_header_is_understood(ask: Ask, head: str) -> None:
    ask("CREATE TABLE settings (settings UInt64, s String) ENGINE = Memory").raise_for_status()
    answer = ask(head, b"7,x\n", param_table="t")
    assert (answer.status_code, answer.text) == (200, "")
    both = "SELECT a FROM t UNION ALL SELECT settings FROM settings"
    assert ask(both).text == "7\n"


# -- a full disk -------------------------------------------------------------------------------


@contextlib.contextmanager
def _files_cannot_grow(server: Running, _: Path) -> Iterator[None]:
    """Every write of more than a few bytes fails, as on a full disk."""
    before = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (16, before[1]))
    yield
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def _disk_is_full(_: Running, disk: Path) -> Iterator[None]:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\1" * (1 << 20)):  # in the end less than that, then nothing
            pass
    yield
    ballast.unlink()


@pytest.fixture(params=[_files_cannot_grow, _disk_is_full], ids=["no file grows", "a full disk"])
def filled(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Fill]]:
    """A folder for a server, and a function that fills its disk."""
    if request.param is _files_cannot_grow:
        if sys.platform != "linux":
            pytest.skip("another process's limits can be changed on Linux only")
        yield tmp_path, request.param
        return
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=320m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk")
    try:
        yield disk, request.param
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


Fill = Callable[[Running, Path], contextlib.AbstractContextManager[None]]


@pytest.mark.parametrize("rows", [SMALL, LARGE])
def test_an_insert_on_a_full_disk_is_stored_once_later(
    rows: int, filled: tuple[Path, Fill]
) -> None:
    folder, fill = filled
    with running(folder) as url, httpx.Client(timeout=PATIENCE_S, verify=False) as web:

        def ask(sql: str, data: Iterator[bytes]) -> httpx.Response:
            return web.post(str(url), params={"query": sql, **BLOCKS}, content=data)

        web.post(str(url), content=TABLE).raise_for_status()
        with fill(url, folder):
            for _ in range(3):
                answer = ask("INSERT INTO t FORMAT CSV", csv(rows))
                assert_is_the_engines_error(answer, frozenset({75, 243}))
        for _ in range(2):
            ask("INSERT INTO t FORMAT CSV", csv(rows)).raise_for_status()
        counted = web.post(str(url), content="SELECT count(), uniqExact(a) FROM t").text
        assert counted == f"{rows}\t{rows}\n"
        assert not any(os.scandir(folder / "spool"))

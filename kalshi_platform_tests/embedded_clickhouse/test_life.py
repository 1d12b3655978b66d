"""Start, stop and kill, as an operator and a supervisor see them."""

from __future__ import annotations

import concurrent.futures
import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from kalshi_platform.embedded_clickhouse import running
from kalshi_platform.errors import StoreError
from kalshi_platform_tests.embedded_clickhouse.conftest import PATIENCE_S
from kalshi_platform_tests.ports import free_ports


def _ask(url: str, sql: str, **params: str) -> httpx.Response:
    return httpx.post(url, params=params, content=sql, timeout=PATIENCE_S, verify=False)


def _read_on(url: str, sql: str, begun: threading.Event) -> None:
    """Read an answer to its end."""
    with httpx.stream("POST", url, content=sql, timeout=PATIENCE_S, verify=False) as answer:
        for _ in answer.iter_raw():
            begun.set()


def _running(url: str) -> int:
    """The number of other running queries."""
    return int(_ask(url, "SELECT count() FROM system.processes").text) - 1


def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.05)


def test_its_clients_load_neither_the_engine_nor_a_web_server() -> None:
    code = "import sys, kalshi_platform.embedded_clickhouse, kalshi_platform.commands.doctor; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert not {"uvicorn", "starlette", "chdb"} & set(loaded.stdout.split())


def test_after_kill_9_every_acknowledged_insert_is_there(tmp_path: Path) -> None:
    with running(tmp_path) as url:
        _ask(url, "CREATE DATABASE kalshi").raise_for_status()
        for table in ("kalshi.t", "default.t"):
            _ask(
                url,
                f"CREATE TABLE {table} (a UInt64) ENGINE = MergeTree ORDER BY a"
                " SETTINGS non_replicated_deduplication_window = 1000",
            ).raise_for_status()
        for number in range(20):
            for table in ("kalshi.t", "default.t"):
                _ask(
                    url,
                    f"INSERT INTO {table} VALUES ({number})",
                    insert_deduplication_token=str(number),
                ).raise_for_status()
        url.process.kill()
        url.process.wait()
    with running(tmp_path) as url:
        for table in ("kalshi.t", "default.t"):
            assert (
                _ask(url, f"SELECT count(), sum(a) FROM {table}").text == f"20\t{sum(range(20))}\n"
            )
            again = _ask(url, f"INSERT INTO {table} VALUES (19)", insert_deduplication_token="19")
            again.raise_for_status()
            assert _ask(url, f"SELECT count() FROM {table}").text == "20\n"
        assert (
            _ask(url, "SELECT * FROM default.nowhere").headers["X-ClickHouse-Exception-Code"]
            == "60"
        )


def test_sigterm_ends_it_with_exit_0_also_under_long_queries(tmp_path: Path) -> None:
    with running(tmp_path) as url, concurrent.futures.ThreadPoolExecutor() as pool:
        _ask(url, "CREATE TABLE t (a UInt64) ENGINE = MergeTree ORDER BY a").raise_for_status()
        trickle = (
            "SELECT number, sleepEachRow(0.01) FROM numbers(1000000)"
            " SETTINGS max_block_size = 10, max_threads = 1"
        )
        endless = "SELECT sum(cityHash64(number)) FROM numbers(1000000000000)"
        begun = threading.Event()
        silent = pool.submit(_ask, url, endless)
        begins = pool.submit(_read_on, url, trickle, begun)
        _until(lambda: _running(url) == 2, "both queries")
        assert begun.wait(PATIENCE_S)
        _ask(url, "INSERT INTO t VALUES (1)").raise_for_status()
        url.process.terminate()
        assert url.process.wait(timeout=PATIENCE_S) == 0
        assert silent.result().headers["X-ClickHouse-Exception-Code"] == "394"
        with pytest.raises(httpx.RemoteProtocolError):
            begins.result()
        assert url.process.stderr
        assert url.process.stderr.read() == ""
    with running(tmp_path) as url:
        assert _ask(url, "SELECT count() FROM t").text == "1\n"


def test_ctrl_c_ends_it_with_exit_0(tmp_path: Path) -> None:
    with running(tmp_path) as url:
        url.process.send_signal(signal.SIGINT)
        assert url.process.wait(timeout=PATIENCE_S) == 0


def test_a_request_under_way_is_finished_after_sigterm(tmp_path: Path) -> None:
    with running(tmp_path) as url, concurrent.futures.ThreadPoolExecutor() as pool:
        under_way = pool.submit(_ask, url, "SELECT sleep(1.5)")

        def seen() -> bool:
            nonlocal under_way
            if under_way.done():  # over before a busy machine has looked: another
                under_way = pool.submit(_ask, url, "SELECT sleep(1.5)")
            return _running(url) > 0

        _until(seen, "the query")
        url.process.terminate()
        assert under_way.result().text == "0\n"
        assert url.process.wait(timeout=PATIENCE_S) == 0


def test_no_query_can_end_the_server_or_its_process_group(tmp_path: Path) -> None:
    with running(tmp_path) as url:
        for query in ("SYSTEM SHUTDOWN", "SYSTEM KILL"):
            assert _ask(url, query).headers["X-ClickHouse-Exception-Code"] == "497"
        assert url.process.poll() is None


def test_a_taken_port_is_a_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(StoreError, match=f"Port {port} is taken by another program"),
            running(tmp_path, port=port),
        ):
            pass


def test_a_folder_in_use_is_a_sentence(tmp_path: Path) -> None:
    with (
        running(tmp_path),
        pytest.raises(StoreError, match="is in use by another process"),
        running(tmp_path),
    ):
        pass


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with (
        pytest.raises(StoreError, match=r"cannot be written: .*give another --path"),
        running(blocked),
    ):
        pass


def test_an_error_is_one_line_and_exit_1(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    command = [sys.executable, "-m", "kalshi_platform", "clickhouse", "--port", "0"]
    done = subprocess.run(
        [*command, "--path", str(blocked / "below")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_a_password_is_required_and_never_shown(tmp_path: Path) -> None:
    password = "s3cret-пароль"
    with running(tmp_path, user="me", password=password) as url:
        post = functools.partial(httpx.post, url, content="SELECT 1", timeout=PATIENCE_S)
        answers = [
            post(),
            post(
                headers={"X-ClickHouse-User": "me", "X-ClickHouse-Key": "no"},
            ),
            post(params={"user": "me", "password": password + "x"}),
            post(headers={"Authorization": "Basic ???"}),
            post(params={"user": "default", "password": password}),
        ]
        for answer in answers:
            assert answer.status_code == 403
            assert answer.headers["X-ClickHouse-Exception-Code"] == "516"
            assert "s3cret" not in answer.text
        given = [
            post(auth=("me", password)),
            post(params={"user": "me", "password": password}),
            post(
                headers=[(b"X-ClickHouse-User", b"me"), (b"X-ClickHouse-Key", password.encode())],
            ),
        ]
        assert [answer.text for answer in given] == ["1\n"] * 3
        assert httpx.get(f"{url}/ping", timeout=PATIENCE_S).text == "Ok.\n"
        if Path("/proc").exists():
            assert b"s3cret" not in Path(f"/proc/{url.process.pid}/cmdline").read_bytes()


def test_a_port_is_free_again_after_the_end(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    for _ in range(2):
        with running(tmp_path, port=port) as url:
            assert _ask(url, "SELECT 1").text == "1\n"


def test_the_default_database_survives_empty_full_and_dropped(tmp_path: Path) -> None:
    for step in (
        "SELECT 1",
        "CREATE TABLE t (a UInt8) ENGINE = Memory",
        "DROP DATABASE default SYNC",
    ):
        with running(tmp_path) as url:
            _ask(url, step).raise_for_status()
            assert _ask(url, "SELECT currentDatabase()").text == "default\n"
    with running(tmp_path) as url:
        assert _ask(url, "SHOW TABLES").text == ""
        assert (
            _ask(url, "SELECT engine FROM system.databases WHERE name = 'default'").text
            == "Atomic\n"
        )


def test_an_error_in_the_middle_of_an_answer_is_not_logged(tmp_path: Path) -> None:
    with running(tmp_path) as url:
        query = "SELECT throwIf(number = 900000) FROM numbers(1000000) SETTINGS max_threads = 1"
        with pytest.raises(httpx.RemoteProtocolError):
            _ask(url, query)
        url.process.terminate()
        assert url.process.stderr
        assert url.process.stderr.read() == ""


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_it_is_not_opened_to_other_machines_without_a_password(tmp_path: Path, host: str) -> None:
    command = [sys.executable, "-m", "kalshi_platform", "clickhouse", "--port", "0"]
    ended = subprocess.run(
        [*command, "--host", host, "--path", str(tmp_path)],
        env={**os.environ, "CLICKHOUSE_PASSWORD": ""},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.returncode == 1
    assert "CLICKHOUSE_PASSWORD is empty" in ended.stderr
    assert not any(tmp_path.iterdir())

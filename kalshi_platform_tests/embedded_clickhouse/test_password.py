"""Reading needs no password; writing needs one that the first start generates and every command finds."""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import re
import shlex
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import clickhouse_connect
import httpx
import psutil
import pytest
from clickhouse_connect.driver.exceptions import DatabaseError
from pydantic import SecretStr

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.embedded_clickhouse import launch, permission, running, write_password
from kalshi_platform.embedded_clickhouse.answers import ClickHouseError
from kalshi_platform.errors import StoreError, StoreRefused
from kalshi_platform.loading.sinks import ClickHouseSink
from kalshi_platform_tests.embedded_clickhouse.conftest import PATIENCE_S
from kalshi_platform_tests.ports import free_ports

ROOT = Path(__file__).resolve().parents[2]
READS = (
    *("SELECT 1", "SHOW TABLES", "SHOW DATABASES", "SHOW CREATE TABLE t", "EXISTS t"),
    *("DESCRIBE TABLE t", "EXPLAIN SELECT * FROM t", "SET max_threads = 1", "USE system"),
    *("SELECT * FROM t", "WITH 1 AS a SELECT a", "SHOW SETTING max_threads"),
    "SELECT count() FROM t WHERE a IN (SELECT number FROM numbers(9)) SETTINGS max_threads = 1",
)
WRITES = (
    *("INSERT INTO t VALUES (2)", "INSERT INTO t SELECT 2", "CREATE DATABASE other"),
    *("CREATE TABLE other (a UInt8) ENGINE = Memory", "CREATE VIEW other AS SELECT 1"),
    *("CREATE TEMPORARY TABLE other (a UInt8)", "ALTER TABLE t ADD COLUMN b UInt8"),
    *("ALTER TABLE t DELETE WHERE 1", "ALTER TABLE t MODIFY TTL toDateTime(a)"),
    *("DELETE FROM t WHERE 1", "TRUNCATE TABLE t", "DROP TABLE t", "DETACH TABLE t"),
    *("RENAME TABLE t TO other", "OPTIMIZE TABLE t FINAL", "CHECK TABLE t", "ATTACH TABLE other"),
    *("SYSTEM STOP MERGES", "SYSTEM FLUSH LOGS", "KILL QUERY WHERE 1", "KILL MUTATION WHERE 1"),
    *("CREATE INDEX i ON t (a) TYPE minmax", "EXCHANGE TABLES t AND other"),
    *("DROP DATABASE default", "EXPLAIN AST DROP TABLE t", "EXPLAIN INSERT INTO t SELECT 2"),
)
TABLE = "CREATE TABLE t (a UInt64) ENGINE = MergeTree ORDER BY a"


class Engine:
    """A running engine with a generated password."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.password = (folder / "password").read_text().strip()

    def ask(self, sql: str, **more: Any) -> httpx.Response:
        return httpx.post(self.url, content=sql, timeout=PATIENCE_S, verify=False, **more)

    def write(self, sql: str) -> None:
        self.ask(sql, auth=("default", self.password)).raise_for_status()

    def settings(self, **more: Any) -> platform_settings.Settings:
        """The settings of a command on this data folder."""
        return platform_settings.load(
            kalshi_data_dir=self.folder.parent,
            embedded_clickhouse_port=urlsplit(self.url).port,
            clickhouse_database="default",
            **more,
        )


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("home") / "data" / "clickhouse"
    with running(folder, password=None) as url:
        engine = Engine(folder, url)
        engine.write(TABLE)
        engine.write("INSERT INTO t VALUES (1)")
        yield engine


def code(answer: httpx.Response) -> str:
    return str(answer.headers.get("X-ClickHouse-Exception-Code", "0"))


def test_the_password_is_made_once_for_its_user_alone(tmp_path: Path) -> None:
    made = set()
    for _ in range(2):
        with running(tmp_path, password=None) as url:
            file = tmp_path / "password"
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            made.add(file.read_text())
            assert not list(tmp_path.glob("password-*"))
            assert Engine(tmp_path, url).ask("SELECT 1").text == "1\n"
    assert len(made) == 1
    assert re.fullmatch(r"[\w-]{43}\n", made.pop())


@pytest.mark.parametrize("user", [{}, {"user": "default"}, {"user": "default", "password": ""}])
def test_a_client_without_password_may_read(engine: Engine, user: dict[str, str]) -> None:
    for sql in READS:
        assert engine.ask(sql, params=user).is_success, engine.ask(sql, params=user).text
        got = httpx.get(engine.url, params={"query": sql, **user}, timeout=PATIENCE_S, verify=False)
        assert got.is_success, got.text


@pytest.mark.parametrize("sql", WRITES)
def test_a_client_without_password_changes_nothing(engine: Engine, sql: str) -> None:
    for answer in (
        engine.ask(sql),
        engine.ask(sql, params={"session_id": "s", "readonly": "0"}),
        engine.ask("", params={"query": sql, "user": "default"}),
    ):
        assert code(answer) == "497", answer.text
        assert "the file `password` of the data folder (KALSHI_DATA_DIR/clickhouse)" in answer.text
        assert engine.password not in answer.text
    assert engine.ask("SELECT groupArray(a) FROM t").text == "[1]\n"
    assert engine.ask("SHOW TABLES").text == "t\n"


@pytest.mark.parametrize("kind", sorted(permission._WRITING))
def test_no_kind_of_writing_is_a_readers(kind: str) -> None:
    rules = permission.Permission(permission.Known(), parse=lambda sql: {})
    for tree in ({"type": kind}, {"type": "ExplainQuery", "query": {"type": kind}}):
        with pytest.raises(ClickHouseError, match="without a password there is only reading"):
            rules.require(tree, reader=True)
    assert kind not in permission._READING


def test_the_engine_holds_readers_to_reading_as_well(engine: Engine) -> None:
    assert engine.ask("SELECT getSetting('readonly')").text == "2\n"
    again = engine.ask("SELECT getSetting('readonly')", params={"readonly": "0"})
    assert again.text == "2\n"


def test_readers_share_no_session_with_writers(engine: Engine) -> None:
    def ask(sql: str, **more: Any) -> httpx.Response:
        return engine.ask(sql, params={"session_id": "shared"}, **more)

    own = ("default", engine.password)
    ask("CREATE TEMPORARY TABLE secret AS SELECT 7 AS a", auth=own).raise_for_status()
    assert code(ask("SELECT * FROM secret")) == "60"
    ask("SET max_threads = 3").raise_for_status()
    assert ask("SELECT getSetting('max_threads')").text == "3\n"
    assert ask("SELECT getSetting('max_threads')", auth=own).text != "3\n"
    assert ask("SELECT * FROM secret", auth=own).text == "7\n"


def test_the_password_comes_as_in_clickhouse(engine: Engine) -> None:
    key = engine.password
    insert, drop = "INSERT INTO t VALUES (5)", "ALTER TABLE t DELETE WHERE a = 5"
    ways: list[dict[str, Any]] = [
        {"auth": ("default", key)},
        {"params": {"password": key}},
        {"params": {"user": "default", "password": key}},
        {"headers": {"X-ClickHouse-User": "default", "X-ClickHouse-Key": key}},
        {"headers": {"X-ClickHouse-Key": key}},
    ]
    for way in ways:
        assert engine.ask(insert, **way).is_success
    curl = ["curl", "-sSf", "--user", f"default:{key}", engine.url, "--data-binary", insert]
    subprocess.run(curl, check=True, timeout=PATIENCE_S)
    address = urlsplit(engine.url)
    client = clickhouse_connect.get_client(host=address.hostname, port=address.port, password=key)
    client.insert("t", [[5]], column_names=["a"])
    client.close()
    assert engine.ask("SELECT count() FROM t WHERE a = 5").text == f"{len(ways) + 2}\n"
    engine.write(f"{drop} SETTINGS mutations_sync = 1")


def test_clients_read_without_the_password(engine: Engine) -> None:
    line = f"{engine.url}/?query=SELECT%20count()%20FROM%20default.t"
    curl = subprocess.run(["curl", "-sS", line], capture_output=True, text=True, check=True)
    assert curl.stdout == "1\n"
    address = urlsplit(engine.url)
    client = clickhouse_connect.get_client(host=address.hostname, port=address.port)
    assert client.query_arrow("SELECT a FROM t").to_pydict() == {"a": [1]}
    with pytest.raises(DatabaseError, match="without a password there is only reading"):
        client.insert("t", [[6]], column_names=["a"])
    client.close()


def test_a_wrong_password_is_no_reader(engine: Engine) -> None:
    key = engine.password
    for user, wrong in (
        *(("default", key[:-1]), ("default", key + "x"), ("default", key.swapcase())),
        *(("default", "-"), ("stranger", ""), ("stranger", key), ("", ""), ("", key)),
    ):
        for way in (
            {"params": {"user": user, "password": wrong}},
            {"headers": {"X-ClickHouse-User": user, "X-ClickHouse-Key": wrong}},
            {"auth": (user, wrong)},
        ):
            answer = engine.ask("SELECT 1", **way)
            assert (answer.status_code, code(answer)) == (403, "516"), (user, way)
            assert key not in answer.text


# -- the file ----------------------------------------------------------------------------------


def _open(path: Path) -> None:
    path.chmod(0o644)


def _group(path: Path) -> None:
    path.chmod(0o640)


def _empty(path: Path) -> None:
    path.write_text("")


def _blank(path: Path) -> None:
    path.write_text("\n")


def _short(path: Path) -> None:
    path.write_text("guess\n")


def _lines(path: Path) -> None:
    path.write_text("a-password-of-a-desk\nand another\n")


def _binary(path: Path) -> None:
    path.write_bytes(b"\xff" * 40)


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def follow_remedy(sentence: str, path: Path) -> None:
    """Execute the remedy of the sentence."""
    if command := re.search(r"Remedy: (chmod 600 .+?);", sentence):
        subprocess.run(shlex.split(command[1]), check=True)
        return
    assert "Remedy: remove it and start the embedded ClickHouse again" in sentence
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink()


@pytest.mark.parametrize(
    "spoil",
    [_open, _group, _empty, _blank, _short, _lines, _binary, _link, _folder, _pipe],
)
def test_an_unusable_password_file_has_a_working_remedy(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    folder = tmp_path / "a desk's data" / "clickhouse"
    file = folder / "password"
    folder.mkdir(parents=True)
    secret = write_password.read_or_make(folder)
    spoil(file)
    with pytest.raises(StoreError) as refused, running(folder, password=None):
        pass
    message = str(refused.value).removeprefix("The embedded ClickHouse did not start: Error: ")
    assert message.startswith(f"The password file {file} ")
    assert message.count("\n") == 0
    settings = platform_settings.load(kalshi_data_dir=folder.parent)
    with pytest.raises(StoreRefused) as same:  # each command says the same
        clickhouse.connect(settings)
    assert str(same.value) == message
    assert secret not in message
    follow_remedy(message, file)
    made = write_password.read_or_make(folder)
    assert (made == secret) == (spoil in {_open, _group})
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_missing_password_file_is_made_again_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = write_password.read_or_make(tmp_path)
    assert write_password.read_or_make(tmp_path) == first
    (tmp_path / "engine").mkdir()
    assert caplog.text == ""
    (tmp_path / "password").unlink()
    with caplog.at_level(logging.WARNING):
        second = write_password.read_or_make(tmp_path)
    assert second != first
    assert f"{tmp_path / 'password'} is missing" in caplog.text
    assert first not in caplog.text
    assert second not in caplog.text


def test_starts_at_the_same_time_agree_on_one_password(tmp_path: Path) -> None:
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        together, found = threading.Barrier(4), list[str]()

        def start(
            folder: Path = folder,
            together: threading.Barrier = together,
            found: list[str] = found,
        ) -> None:
            together.wait()
            found.append(write_password.read_or_make(folder))

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4
        assert set(found) == {write_password.read(folder)}
        assert [file.name for file in folder.iterdir()] == ["password"]


# -- the platform's own commands ---------------------------------------------------------------


def test_each_command_finds_it_from_any_folder(engine: Engine, tmp_path: Path) -> None:
    """`migrate` writes from other processes in another folder, with only KALSHI_HOME in common."""
    home = engine.folder.parents[1]
    (home / ".env").write_text(f"EMBEDDED_CLICKHOUSE_PORT={urlsplit(engine.url).port}\n")
    own = ("KALSHI_", "CLICKHOUSE_", "PROD_", "EMBEDDED_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    message = ""
    for verb in (["migrate"], ["sql", "SELECT count() FROM orderbook_events"], ["migrate"]):
        done = subprocess.run(
            [sys.executable, "-m", "kalshi_platform", *verb],
            cwd=tmp_path,
            env={**env, "KALSHI_HOME": str(home), "LOG_LEVEL": "DEBUG"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        message += done.stdout
    assert engine.password not in message


def test_all_of_the_platform_connects_in_one_place() -> None:
    callers = set()
    for path in sorted((ROOT / "kalshi_platform").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "attr", getattr(node, "id", ""))
            if name in {"get_client", "create_client", "create_async_client", "get_async_client"}:
                callers.add(path.relative_to(ROOT).as_posix())
    assert callers == {"kalshi_platform/clickhouse/client.py"}


def test_a_command_that_came_before_the_file_gets_to_write(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([""])  # the first look finds no file
    found = clickhouse.password
    monkeypatch.setattr(
        clickhouse, "password", lambda settings: next(looks, None) or found(settings)
    )
    with contextlib.closing(clickhouse.connect(engine.settings())) as client:
        client.command("CREATE TABLE early (a UInt8) ENGINE = Memory")
        client.command("DROP TABLE early")


def test_a_loader_continues_with_a_new_password(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    folder = tmp_path / "clickhouse"
    with running(folder, password=None, port=port) as url:
        engine = Engine(folder, url)
        store = ClickHouseSink(engine.settings(), "journal")
        store._connected().command(TABLE)
    (folder / "password").unlink()
    with running(folder, password=None, port=port) as url:
        assert Engine(folder, url).password != engine.password
        store._connected().command("INSERT INTO t VALUES (1)")
        store._connected().close()


@contextlib.contextmanager
def listener() -> Iterator[tuple[int, bytearray]]:
    """Another program on a port, and the bytes that it receives."""
    received = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hear() -> None:
            with contextlib.suppress(OSError):
                while True:
                    caller, _ = server.accept()
                    with caller:
                        received.extend(caller.recv(65536))
                        caller.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=hear, daemon=True)
        thread.start()
        yield server.getsockname()[1], received
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
    thread.join(PATIENCE_S)


@pytest.mark.parametrize("place", ["http://localhost:{}", "http://127.0.0.1:{}", "http://[::1]:{}"])
def test_the_password_is_never_sent_to_another_server(engine: Engine, place: str) -> None:
    with listener() as (port, received):
        settings = engine.settings(clickhouse_url=place.format(port))
        assert clickhouse.password(settings) == ""
        with pytest.raises(StoreError) as refused:
            clickhouse.connect(settings)
        assert engine.password.encode() not in received
        assert engine.password not in str(refused.value)
        assert received or "[::1]" in place


def test_the_password_is_in_no_repr_and_no_process(engine: Engine) -> None:
    options = launch.Options("/data", "127.0.0.1", 1, "default", engine.password)
    settings = engine.settings(clickhouse_password=engine.password)
    with contextlib.closing(clickhouse.connect(engine.settings())) as client:
        assert engine.password not in repr(options) + repr(settings) + repr(client)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            shown = " ".join([*process.cmdline(), *process.environ().values()])
            assert engine.password not in shown


def test_a_refusal_to_write_carries_its_own_remedy(engine: Engine) -> None:
    elsewhere = engine.settings(clickhouse_url=engine.url.replace("127.0.0.1", "localhost"))
    with contextlib.closing(clickhouse.connect(elsewhere)) as client:
        with pytest.raises(StoreRefused) as refused, clickhouse.translated(elsewhere):
            client.command("TRUNCATE TABLE t")
        assert "Grant it" not in str(refused.value)
        assert "the file `password` of the data folder" in str(refused.value)
    given = engine.settings(
        clickhouse_url=elsewhere.clickhouse_url, clickhouse_password=engine.password
    )
    with contextlib.closing(clickhouse.connect(given)) as client:  # the remedy
        client.command("CREATE TABLE r (a UInt8) ENGINE = Memory")
        client.command("DROP TABLE r")


def test_clickhouse_password_overrides_it_on_both_sides(tmp_path: Path) -> None:
    """Started by the command itself, as `up` does."""
    (port,) = free_ports(1)
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("KALSHI_")},
        "KALSHI_HOME": str(tmp_path),
        "CLICKHOUSE_PASSWORD": "of-our-own",
        "EMBEDDED_CLICKHOUSE_PORT": str(port),
    }
    command = [sys.executable, "-m", "kalshi_platform", "clickhouse"]
    with subprocess.Popen(command, cwd="/", env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            folder = tmp_path / "data" / "clickhouse"
            assert folder.is_dir()
            assert not (folder / "password").exists()
            assert code(httpx.post(url, content="SELECT 1", timeout=PATIENCE_S)) == "516"
            settings = platform_settings.load(
                kalshi_data_dir=tmp_path / "data",
                embedded_clickhouse_port=port,
                clickhouse_database="default",
            )
            with contextlib.closing(
                clickhouse.connect(
                    settings.model_copy(update={"clickhouse_password": SecretStr("of-our-own")})
                )
            ) as client:
                client.command(TABLE)
            # one that was made before stays what it is, and opens nothing
            left = write_password.read_or_make(folder)
            with pytest.raises(StoreRefused, match="another CLICKHOUSE_PASSWORD") as refused:
                clickhouse.connect(settings)
            assert left not in str(refused.value)
        finally:
            process.terminate()

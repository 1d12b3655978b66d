"""No secret leaks: every output and file of a whole session of the platform is searched, byte by byte.

The same session also shows on which addresses the platform listens and which requests it answers.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from kalshi_platform import settings as platform_settings
from kalshi_platform.exchange.connection import LiveConnection, dial
from kalshi_platform.exchange.rest import RestClient
from kalshi_platform.exchange.signing import Credentials, load_signer
from kalshi_platform.journal import reader
from kalshi_platform.journal.writer import Writer
from kalshi_platform.loopback import is_loopback
from kalshi_platform.simulator.config import SimulatorConfig
from kalshi_platform.simulator.server import Simulator, running
from kalshi_platform_tests.commands.test_up import Up, until
from kalshi_platform_tests.ports import free_ports

KEY_ID = "5ec7e7-key-id-0f-a-session"
WRONG_ID = "5ec7e7-another-key-id"
USER, PASSWORD = "operator", "5ec7e7-clickhouse-word"
WRONG_PASSWORD = "5ec7e7-wrong-word"
QA_PASSWORD = "5ec7e7-word-of-qa"
SLACK_PATH, WEBHOOK_PATH = "5ec7e7-path-of-slack", "5ec7e7-path-of-a-webhook"
SMTP_PASSWORD = "5ec7e7-word-of-mail"


def new_key(path: Path) -> rsa.RSAPrivateKey:
    key = rsa.generate_private_key(65_537, 2048)
    path.touch(mode=0o600)
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return key


def secrets_of(*keys: rsa.RSAPrivateKey) -> set[bytes]:
    """Every secret, in each encoding in which it could appear."""
    words = {KEY_ID, WRONG_ID, PASSWORD, WRONG_PASSWORD, QA_PASSWORD}
    words |= {SLACK_PATH, WEBHOOK_PATH, SMTP_PASSWORD}
    found = {word.encode() for word in words}
    found |= {base64.b64encode(f"{USER}:{word}".encode()) for word in words}
    for key in keys:
        private = key.private_numbers()
        numbers = (private.d, private.p, private.q)
        found |= {n.to_bytes((n.bit_length() + 7) // 8, "big")[8:40] for n in numbers}
        found |= {str(n).encode()[:40] for n in numbers} | {
            f"{n:x}".encode()[8:48] for n in numbers
        }
        for form in (
            serialization.PrivateFormat.PKCS8,
            serialization.PrivateFormat.TraditionalOpenSSL,
        ):
            pem = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
            found |= {line for line in pem.splitlines() if len(line) == 64}
    return found


@dataclass
class Session:
    """The outputs, files and open ports of a session of the platform."""

    folder: Path
    secrets: set[bytes]
    outputs: dict[str, bytes] = field(default_factory=dict)
    """Output of each command, command lines, answers of ClickHouse."""
    listening: set[tuple[str, int, str]] = field(default_factory=set)
    """(address, port, program)"""
    answers: dict[str, int] = field(default_factory=dict)
    """HTTP status of requests from a web page of another site."""


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """Run `up` with a key and passwords, and every command beside it, also with wrong ones."""
    folder = tmp_path_factory.mktemp("session")
    keys = tmp_path_factory.mktemp("keys")
    right, wrong = new_key(keys / "right.pem"), new_key(keys / "wrong.pem")
    with running(SimulatorConfig(markets=3, rate=100, rolling_markets=0)) as simulator:
        simulator.register(KEY_ID, right.public_key())
        yield _run_session(folder, keys, simulator, secrets_of(right, wrong))


def _run_session(folder: Path, keys: Path, simulator: Simulator, secrets: set[bytes]) -> Session:
    ui, clickhouse, metrics = free_ports(3)
    env = {
        "PROD_KEYID": KEY_ID,
        "PROD_KEYFILE": str(keys / "right.pem"),
        "KALSHI_WS_URL": simulator.ws_url,
        "KALSHI_REST_URL": simulator.rest_url,
        "MARKET_TICKERS": ",".join(simulator.books()),
        "CLICKHOUSE_USER": USER,
        "CLICKHOUSE_PASSWORD": PASSWORD,
        "CH_PASSWORD": QA_PASSWORD,
        "METRICS_PORT": str(metrics),
        "ALERT_SLACK_WEBHOOK_URL": f"http://127.0.0.1:9/{SLACK_PATH}",  # nothing listens there
        "ALERT_WEBHOOK_URL": f"{simulator.control_url}/{WEBHOOK_PATH}",  # a 404
        "ALERT_EMAIL_TO": "desk@example.test",
        "ALERT_EMAIL_FROM": "platform@example.test",
        "SMTP_HOST": "127.0.0.1",
        "SMTP_PORT": "9",
        "SMTP_USER": USER,
        "SMTP_PASSWORD": SMTP_PASSWORD,
        "NO_COLOR": "1",
    }
    up = Up(folder / "data", ui, clickhouse, **env)
    session = Session(folder, secrets)
    at = f"http://127.0.0.1:{clickhouse}"
    command = Commands(
        session, {**os.environ, **env, "KALSHI_DATA_DIR": str(up.data), "CLICKHOUSE_URL": at}
    )
    up.start()
    try:
        up.says("Recording: ")
        until(lambda: rows(at) > 0, up.logs)
        until(lambda: answers(f"http://127.0.0.1:{metrics}/metrics"), up.logs)
        elsewhere = str(folder / "elsewhere")
        wrong = str(keys / "wrong.pem")
        wrong_url = f"http://{USER}:{WRONG_PASSWORD}@127.0.0.1:1"
        with ThreadPoolExecutor(4) as threads:
            ended = [
                threads.submit(command, verb, expected, *args, **env)
                for verb, expected, args, env in (
                    ("doctor", "exit 0", (), {}),
                    ("doctor", "exit 1", ("--test-alert",), {"LOG_FORMAT": "json"}),
                    ("sql", "exit 0", ("SELECT count() FROM orderbook_events",), {}),
                    ("qa", "exit 1", (), {}),  # CH_PASSWORD is not ClickHouse's
                    ("sql", "exit 1", ("SELECT 1",), {"CLICKHOUSE_PASSWORD": WRONG_PASSWORD}),
                    (
                        *("doctor", "exit 1", ()),
                        {"PROD_KEYFILE": wrong, "CLICKHOUSE_PASSWORD": WRONG_PASSWORD},
                    ),
                    ("watch", "exit 1", ("--ticker", "A-1"), {"PROD_KEYID": WRONG_ID}),
                    (
                        "stream",
                        "exit 1",
                        (),
                        {"KALSHI_DATA_DIR": f"{elsewhere}-1", "PROD_KEYFILE": wrong},
                    ),
                    (
                        *("stream", "for 4 s", ()),
                        {"KALSHI_DATA_DIR": elsewhere, "CLICKHOUSE_PASSWORD": WRONG_PASSWORD},
                    ),
                    ("migrate", "exit 1", (), {"HOT_RETENTION_DAYS": "soon"}),
                    ("migrate", "exit 1", (), {"CLICKHOUSE_URL": wrong_url}),
                    (
                        "stream",
                        "exit 1",
                        (),
                        {"KALSHI_WS_URL": "ws://exchange.example/trade-api/ws/v2"},
                    ),
                )
            ]
        assert b"ALERT_WEBHOOK_URL" in ended[1].result()
        assert b"count()" in ended[2].result()
        for command_run in ended:
            command_run.result()
        until(lambda: bool(up.reported()), up.logs)
        session.outputs |= dump(at)
        observe(session, up, at)
        session.outputs["what up printed"] = up.output.encode()
        up.end(signal.SIGINT)
    finally:
        up.kill()
    return session


class Commands:
    """Runs the command line in the session's environment, and keeps its output."""

    def __init__(self, session: Session, env: dict[str, str]) -> None:
        self._session = session
        self._env = env
        self._numbers = itertools.count()

    def __call__(self, verb: str, expected: str, *args: str, **env: str) -> bytes:
        """Run a command; `expected` is its exit code, or how long it runs before SIGTERM."""
        process = subprocess.Popen(
            [sys.executable, "-m", "kalshi_platform", verb, *args],
            env={**self._env, **env},
            cwd=self._session.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        name = f"{next(self._numbers)}: {verb} {' '.join(env)}"
        command_line = psutil.Process(process.pid).cmdline()
        self._session.outputs[f"ps of {name}"] = " ".join(command_line).encode()
        if expected.startswith("for "):
            time.sleep(float(expected.split()[1]))
            process.terminate()
        out, _ = process.communicate(timeout=180)
        self._session.outputs[name] = out
        if expected.startswith("exit"):
            assert process.returncode == int(expected.split()[1]), out.decode()
        return out


def answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(url, trust_env=False, verify=False, timeout=60).is_success
    return False


def rows(url: str) -> int:
    answer = _asked(url, "SELECT count() FROM kalshi.orderbook_events")
    return int(answer.text) if answer is not None and answer.is_success else 0


def _asked(url: str, query: str) -> httpx.Response | None:
    headers = {"X-ClickHouse-User": USER, "X-ClickHouse-Key": PASSWORD}
    with suppress(httpx.HTTPError):
        return httpx.post(
            url, content=query, headers=headers, trust_env=False, verify=False, timeout=60
        )
    return None


def dump(url: str) -> dict[str, bytes]:
    """Every row of the platform's tables and of the engine's logs of queries and errors."""
    names = _asked(
        url,
        "SELECT database || '.' || name FROM system.tables WHERE database = 'kalshi'"
        " AND NOT startsWith(name, 'book_at') AND engine NOT LIKE '%View' OR database = 'system'"
        " AND (name LIKE '%_log' OR name IN ('errors', 'processes', 'settings', 'warnings'))",
    )
    assert names is not None
    found = {}
    for name in names.raise_for_status().text.split():
        answer = _asked(url, f"SELECT * FROM {name} FORMAT TSV")
        assert answer is not None
        found[f"ClickHouse's {name}"] = answer.raise_for_status().content
    assert found["ClickHouse's kalshi.orderbook_events"]
    return found


def observe(session: Session, up: Up, clickhouse: str) -> None:
    for process in up.family():
        with suppress(psutil.NoSuchProcess):
            session.outputs[f"ps {process.pid}"] = " ".join(process.cmdline()).encode()
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    session.listening.add((*connection.laddr, process.name()))
    ui = f"http://127.0.0.1:{up.port}"
    mutation = {"query": "mutation { reloadWorkspace { __typename } }"}
    link = {
        "Sec-Fetch-Site": "cross-site",
        "Sec-Fetch-Mode": "navigate",
        "Sec-Fetch-Dest": "document",
    }
    page = {"Origin": "https://evil.example"}
    pointed = {"Host": "evil.example", "Origin": "http://evil.example"}
    with httpx.Client(trust_env=False, timeout=60) as web:
        session.answers = {
            "own page": web.post(
                f"{ui}/graphql", json=mutation, headers={"Origin": ui}
            ).status_code,
            "no page": web.post(f"{ui}/graphql", json=mutation).status_code,
            "link": web.get(f"{ui}/runs", headers=link).status_code,
            "page of another port": web.post(
                f"{ui}/graphql", json=mutation, headers={"Origin": "http://127.0.0.1:9"}
            ).status_code,
            "form of a page": web.post(f"{ui}/graphql", params=mutation, headers=page).status_code,
            "image on a page": web.get(
                f"{ui}/graphql", params=mutation, headers={**link, "Sec-Fetch-Mode": "no-cors"}
            ).status_code,
            "name pointed here": web.post(
                f"{ui}/graphql", json=mutation, headers=pointed
            ).status_code,
            "event of a page": web.post(
                f"{ui}/report_asset_materialization/x", headers=page
            ).status_code,
            "query of a page": web.post(clickhouse, content="SELECT 1", headers=page).status_code,
        }


# -- the search ---------------------------------------------------------------------------------


def unpacked(path: Path) -> Iterator[bytes]:
    """A file's bytes, and its content decompressed."""
    yield path.read_bytes()
    if path.suffix == ".parquet":
        yield str(pq.read_table(path, partitioning=None).to_pydict()).encode()
    elif path.suffix == reader.SUFFIX:
        with pa.ipc.open_stream(path) as stream, suppress(pa.ArrowInvalid):
            for batch in stream:
                yield from batch.column("frame").to_pylist()
    elif path.suffix == ".db":
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            database.text_factory = bytes
            for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'"):
                for row in database.execute(f'SELECT * FROM "{table.decode()}"'):
                    for value in row:
                        if isinstance(value, bytes):
                            yield value
                            with suppress(zlib.error, ValueError):
                                packed = (
                                    bytes.fromhex(value.decode()) if value[:2] == b"78" else value
                                )
                                yield zlib.decompress(packed)


def found_in(haystack: bytes, secrets: set[bytes]) -> set[bytes]:
    return {secret for secret in secrets if secret in haystack}


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first of them runs the session
def test_no_secret_is_in_any_output_or_file_of_a_session(session: Session) -> None:
    leaks = {
        name: found
        for name, text in session.outputs.items()
        if (found := found_in(text, session.secrets))
    }
    searched = 0
    kinds = set()
    for path in session.folder.rglob("*"):
        if path.is_file():
            kinds.add(path.suffix)
            for piece in unpacked(path):
                searched += len(piece)
                if found := found_in(piece, session.secrets) | found_in(
                    piece, {b"KALSHI-ACCESS-SIGNATURE"}
                ):
                    leaks[str(path)] = found
    assert leaks == {}
    assert {".parquet", ".arrows", ".db", ".log", ".json"} <= kinds
    assert any(
        path.name.endswith(".err") for path in session.folder.rglob("*")
    )  # of Dagster's runs
    assert searched > 1_000_000


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first of them runs the session
def test_the_search_finds_what_is_there(session: Session, tmp_path: Path) -> None:
    table = pa.table({"detail": [f"user {KEY_ID}"] * 3})
    pq.write_table(table, tmp_path / "a.parquet", compression="gzip")
    with closing(sqlite3.connect(tmp_path / "a.db")) as database:
        database.execute("CREATE TABLE t (a BLOB)")
        database.execute("INSERT INTO t VALUES (?)", [zlib.compress(PASSWORD.encode() * 9)])
        database.commit()
    writer = Writer(tmp_path / "journal")
    for _ in range(50):
        writer.note("error", {"message": WRONG_PASSWORD})
    writer.close()
    [segment] = (tmp_path / "journal").glob(f"*{reader.SUFFIX}")
    for path in (tmp_path / "a.parquet", tmp_path / "a.db", segment):
        packed, *pieces = unpacked(path)
        assert path.suffix != ".db" or not found_in(packed, session.secrets)
        assert any(found_in(piece, session.secrets) for piece in pieces)


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first of them runs the session
def test_every_server_listens_on_loopback_only(session: Session) -> None:
    assert len(session.listening) >= 3  # ClickHouse, the UI, the metrics; not the code server
    assert {address for address, *_ in session.listening if not is_loopback(address)} == set()


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first of them runs the session
def test_the_ui_and_clickhouse_refuse_other_sites(session: Session) -> None:
    answers = dict(session.answers)
    assert [answers.pop(name) for name in ("own page", "no page", "link")] == [200, 200, 200]
    assert set(answers.values()) == {403}


@pytest.mark.slow
@pytest.mark.timeout(900)  # the first of them runs the session
def test_private_folders_are_closed_to_other_users(session: Session) -> None:
    data = session.folder / "data"
    for name in ("journal/shard-0", "clickhouse", "dagster", "logs"):
        assert (data / name).stat().st_mode & 0o007 == 0, name


# -- in memory ----------------------------------------------------------------------------------


def test_no_repr_or_traceback_shows_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    key = new_key(tmp_path / "key.pem")
    settings = platform_settings.load(
        prod_keyid=KEY_ID,
        prod_keyfile=tmp_path / "key.pem",
        clickhouse_user=USER,
        clickhouse_password=PASSWORD,
        ch_password=QA_PASSWORD,
    )
    exchange = settings.exchange
    signer = load_signer(exchange.key_file)
    credentials = Credentials(exchange.key_id, signer)
    client = RestClient(exchange)
    shown = []
    for holder in (settings, exchange, signer, credentials, client):
        shown += [repr(holder), str(holder), f"{holder}", f"{[holder]}"]
    shown += [settings.model_dump_json(), str(settings.model_dump())]
    try:
        raise RuntimeError(settings, exchange, credentials, client)
    except RuntimeError as error:
        shown += [repr(error), *traceback.format_exception(error)]
    client.close()
    assert found_in("\n".join(shown).encode(), secrets_of(key)) == set()


def test_libraries_log_no_signed_header_at_debug_level(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    key = new_key(tmp_path / "key.pem")
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.INFO, logger="websockets.server")  # the simulator's, not ours
    with running(SimulatorConfig(markets=1, rate=0, rolling_markets=0)) as simulator:
        simulator.register(KEY_ID, key.public_key())
        credentials = Credentials(KEY_ID, load_signer(tmp_path / "key.pem"))

        async def shake_hands() -> None:
            await (await dial(simulator.ws_url, credentials, LiveConnection)).close()

        asyncio.run(shake_hands())
        exchange = platform_settings.Exchange(
            simulator.ws_url, simulator.rest_url, KEY_ID, tmp_path / "key.pem", simulated=True
        )
        with RestClient(exchange, credentials=credentials) as client:
            client.balance()
    assert caplog.records
    assert found_in(caplog.text.encode(), secrets_of(key)) == set()
    assert not re.search("access-signature", caplog.text, re.IGNORECASE)
    assert json.dumps(KEY_ID) not in caplog.text

"""ClickHouse slow, refusing, cut off or restarted in mid-insert: retried by code, and exactly once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.clickhouse import migrations
from kalshi_platform.embedded_clickhouse import running
from kalshi_platform.exchange.columnar import decode
from kalshi_platform.journal import reader
from kalshi_platform.journal.reader import concatenate
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.loader import Loader
from kalshi_platform.loading.rows import build_rows
from kalshi_platform.loading.sinks import ClickHouseSink
from kalshi_platform.settings import Settings
from kalshi_platform_tests.clickhouse.tables import prepare
from kalshi_platform_tests.loading.test_loader import PATIENCE_S, SMALL, journal_of, recording
from kalshi_platform_tests.ports import free_ports

Fault = Callable[["Front"], bool]
"""Applies a fault to a request; True where the request has been answered (or cut off)."""


class Front(BaseHTTPRequestHandler):
    """A real HTTP server in front of ClickHouse that injects planned faults into inserts."""

    target: str
    before: list[Fault]
    after: list[Fault]
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Forward, unless a fault is planned for this insert."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        insert = "insert_deduplication_token" in self.path
        if insert and self.before and self.before.pop(0)(self):
            return
        answer = httpx.post(
            self.target + self.path,
            content=body,
            headers={k: v for k, v in self.headers.items() if k.lower() != "host"},
            timeout=60,
        )
        if insert and self.after and self.after.pop(0)(self):
            return
        self.answer(answer.status_code, answer.content, dict(answer.headers))

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """Send a response."""
        self.send_response(status)
        for name, value in headers.items():
            if name.lower().startswith("x-clickhouse") or name.lower() == "content-type":
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def refuses(code: int, name: str) -> Fault:
    def fault(front: Front) -> bool:
        text = f"Code: {code}. DB::Exception: planted. ({name}) (version 26.9)"
        front.answer(500, text.encode(), {"X-ClickHouse-Exception-Code": str(code)})
        return True

    return fault


def cuts_off(front: Front) -> bool:
    front.close_connection = True
    front.connection.close()
    return True


def is_slow(front: Front) -> bool:
    time.sleep(0.5)
    return False


@contextmanager
def fronted(url: str, *, before: list[Fault], after: list[Fault]) -> Iterator[str]:
    handler = type("Planned", (Front,), {"target": url, "before": before, "after": after})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def make(url: str, database: str, data: Path) -> Settings:
    return platform_settings.load(
        kalshi_data_dir=data,
        clickhouse_url=url,
        clickhouse_database=database,
        hot_retention_days=36_500,
    )


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalshi_platform.loading.shared_rows.CHUNK_ROWS", 30)
    monkeypatch.setattr("kalshi_platform.loading.loader.REFUSED_RETRY_S", 0.3)
    monkeypatch.setattr("kalshi_platform.loading.loader.DRAIN_GIVE_UP_S", 60.0)


def assert_each_row_once(settings: Settings, deltas: int) -> None:
    client = clickhouse.connect(settings)
    rows = deltas + 3
    counted = client.query("SELECT count(), uniqExact(seq, side, price) FROM orderbook_events")
    assert counted.result_rows == [(rows, rows)]
    levels = client.query("SELECT count() FROM latest_levels FINAL WHERE size > 0").result_rows
    assert levels == [(4,)]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([refuses(252, "TOO_MANY_PARTS")] * 3, []),
        ([refuses(241, "MEMORY_LIMIT_EXCEEDED")] * 2, []),
        ([is_slow] * 3, []),
        ([cuts_off, cuts_off], []),
        ([], [cuts_off, is_slow, cuts_off]),
        ([], [refuses(159, "TIMEOUT_EXCEEDED")] * 3),
    ],
    ids=[
        "too many parts",
        "memory",
        "slow",
        "cut off before",
        "answer lost",
        "timed out after it was done",
    ],
)
def test_after_an_insert_fault_each_row_is_stored_once(
    before: list[Fault],
    after: list[Fault],
    tmp_path: Path,
    clickhouse_url: str,
    clickhouse_database: str,
) -> None:
    direct = make(clickhouse_url, clickhouse_database, tmp_path)
    prepare(direct)
    writer = journal_of(tmp_path / "journal", recording(90))
    with fronted(clickhouse_url, before=list(before), after=list(after)) as url:
        store = ClickHouseSink(make(url, clickhouse_database, tmp_path), str(writer.id))
        load = Loader(tmp_path / "journal", writer, store, SMALL)
        load.start()
        load.drain()
        assert load.join(PATIENCE_S), load.failure or load.trouble
    writer.close()
    assert_each_row_once(direct, 90)


def test_a_missing_table_is_reported_and_loading_resumes(
    tmp_path: Path, clickhouse_url: str, clickhouse_database: str
) -> None:
    settings = make(clickhouse_url, clickhouse_database, tmp_path)
    writer = journal_of(tmp_path / "journal", recording(90))
    load = Loader(tmp_path / "journal", writer, ClickHouseSink(settings, str(writer.id)), SMALL)
    load.start()
    deadline = time.monotonic() + PATIENCE_S
    while "UNKNOWN_TABLE" not in str(load.trouble):
        assert time.monotonic() < deadline, load.trouble
        time.sleep(0.05)
    assert load.refused
    assert load.lag == writer.durable.n
    migrations.migrate(settings)
    load.drain()
    assert load.join(PATIENCE_S), load.failure or load.trouble
    writer.close()
    assert_each_row_once(settings, 90)


def test_a_server_that_kept_a_token_without_rows_gets_them_again(
    tmp_path: Path, clickhouse_url: str, clickhouse_database: str
) -> None:
    """ClickHouse stores a token before the rows: a kill in between leaves only the token."""
    settings = make(clickhouse_url, clickhouse_database, tmp_path)
    prepare(settings)
    writer = journal_of(tmp_path / "journal", recording(300))
    writer.close()
    block = concatenate(
        list(reader.record_ranges(tmp_path / "journal", reader.oldest_offset(tmp_path / "journal")))
    )
    rows, _ = build_rows(decode([block]), BookState())
    client = clickhouse.connect(settings)

    def counts() -> dict[str, int]:
        return {
            name: int(client.query(f"SELECT count() FROM {name}").result_rows[0][0])
            for name in ("orderbook_events", "trades", "stream_events")
        }

    def write(store: ClickHouseSink) -> None:
        store.write(rows.first_n, rows.end_n, [rows])

    # Each as after a killed streamer, and as after a restarted loader.
    for lost in ("orderbook_events", "trades", "stream_events"):
        stores = [ClickHouseSink(settings, "journal") for _ in range(3)]
        write(stores[0])
        whole = counts()
        assert all(whole.values())
        client.command(f"ALTER TABLE {lost} DELETE WHERE true SETTINGS mutations_sync = 2")
        token = f"journal:{rows.first_n}-{rows.end_n}:{lost}"
        clickhouse.insert_arrow(client, lost, rows.tables[lost], token)
        assert counts()[lost] == 0, "the token alone keeps them out: that is what this is about"
        for store in stores:
            write(store)
            assert counts() == whole, lost
    client.close()


def test_each_row_is_stored_once_across_clickhouse_kills(tmp_path: Path) -> None:
    data = tmp_path / "clickhouse"
    (port,) = free_ports(1)
    with running(data, port=port) as first:
        settings = make(str(first), "kalshi", tmp_path)
        prepare(settings)
    writer = journal_of(tmp_path / "journal", recording(2_000))
    load = Loader(tmp_path / "journal", writer, ClickHouseSink(settings, str(writer.id)), SMALL)
    load.start()
    for life_s in (0.3, 0.8, 0.5):
        with running(data, port=port) as server:
            time.sleep(life_s)
            server.process.kill()
            server.process.wait()
    with running(data, port=port):
        load.drain()
        assert load.join(PATIENCE_S), load.failure or load.trouble
        assert_each_row_once(settings, 2_000)
    writer.close()

"""A proxy that lies about inserts: each row is stored once, or the loader reports what is wrong."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pyarrow as pa
import pytest

from kalshi_platform.embedded_clickhouse import running
from kalshi_platform.journal import reader
from kalshi_platform.journal.writer import Writer
from kalshi_platform.loading.loader import Loader
from kalshi_platform.loading.sinks import ClickHouseSink
from kalshi_platform.settings import Settings
from kalshi_platform_tests.clickhouse.tables import prepare
from kalshi_platform_tests.loading.test_clickhouse_faults import assert_each_row_once, make
from kalshi_platform_tests.loading.test_loader import PATIENCE_S, SMALL, journal_of, recording
from kalshi_platform_tests.small_disk import fill, make_room, small_disk

DELTAS = 60
PAGE = b"<html>\n<title>Sign in</title></html>"


@dataclass
class Exchanged:
    """A request that came to the proxy, and the way on."""

    front: Proxy
    body: bytes

    def forward(self, body: bytes | None = None) -> httpx.Response:
        """Send it on to ClickHouse, perhaps with another body."""
        headers = {k: v for k, v in self.front.headers.items() if k.lower() not in _OF_THE_WAY}
        content = self.body if body is None else body
        url = self.front.plan.target + self.front.path
        return httpx.post(url, content=content, headers=headers, timeout=60)

    @property
    def genuine_headers(self) -> dict[str, str]:
        """What ClickHouse would say of this insert if it took all of it, the id of the query included."""
        query_id = self.front.path.partition("query_id=")[2].partition("&")[0]
        summary = {"written_rows": "1000000", "written_bytes": "1"}
        return {"X-ClickHouse-Query-Id": query_id, "X-ClickHouse-Summary": json.dumps(summary)}

    def half(self) -> bytes:
        """The insert with the first half of its rows; of one row, with that."""
        head, _, data = self.body.partition(b"\n")
        table = pa.ipc.open_stream(data).read_all()
        out = pa.BufferOutputStream()
        with pa.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table.slice(0, -(-table.num_rows // 2)))
        return b"\n".join([head, out.getvalue().to_pybytes()])


_OF_THE_WAY = {"host", "content-length", "connection"}
Lie = Callable[[Exchanged], None]


@dataclass
class Plan:
    """What the proxy does to inserts at the moment."""

    target: str
    lie: Lie | None = None
    lies: int = 0
    kept: list[httpx.Response] = field(default_factory=list)
    """Answers that it has seen."""


class Proxy(BaseHTTPRequestHandler):
    """Forwards; lies about what carries a deduplication token where the plan says so."""

    plan: Plan
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        """Forward a request, or lie about it."""
        exchanged = Exchanged(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))
        lie = self.plan.lie
        if lie is not None and "insert_deduplication_token" in self.path:
            self.plan.lies += 1
            lie(exchanged)
            return
        answer = exchanged.forward()
        self.plan.kept.append(answer)
        self.pass_on(answer)

    def pass_on(self, answer: httpx.Response) -> None:
        """Give ClickHouse's answer to the client."""
        ours = ("x-clickhouse", "content-type")
        kept = {k: v for k, v in answer.headers.items() if k.lower().startswith(ours)}
        self.say(answer.status_code, answer.content, kept)

    def say(self, status: int, body: bytes, headers: dict[str, str], cut: int = 0) -> None:
        """Answer; `cut`: with so many bytes less than announced, and then no connection."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) + cut))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = cut > 0

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def login_page(it: Exchanged) -> None:
    it.front.say(200, PAGE, {"Content-Type": "text/html"})


def error_text(it: Exchanged) -> None:
    it.front.say(200, b"upstream connect error", it.genuine_headers)


def not_forwarded(it: Exchanged) -> None:
    it.front.say(200, b"", it.genuine_headers)


def no_summary(it: Exchanged) -> None:
    answer = it.forward()
    del answer.headers["X-ClickHouse-Summary"]
    it.front.pass_on(answer)


def another_summary(it: Exchanged) -> None:
    it.front.say(200, b"", it.genuine_headers | {"X-ClickHouse-Summary": '{"written_rows":"0"}'})


def half_forwarded(it: Exchanged) -> None:
    it.forward(it.half())
    it.front.say(200, b"", it.genuine_headers)


def sent_elsewhere(it: Exchanged) -> None:
    it.front.say(302, b"", {"Location": "http://127.0.0.1:9/login"})


def truncated(it: Exchanged) -> None:
    it.forward()
    it.front.say(200, b"", it.genuine_headers, cut=40)


def cut_in_the_headers(it: Exchanged) -> None:
    it.forward()
    it.front.wfile.write(b"HTTP/1.1 200 OK\r\nX-ClickHouse-Server-Display-Name: a\r\n")
    it.front.close_connection = True


def of_another_request(it: Exchanged) -> None:
    it.front.pass_on(next(a for a in it.front.plan.kept if not a.content))


def forwarded_twice(it: Exchanged) -> None:
    it.forward()
    it.front.pass_on(it.forward())


def closed_after_forwarding(it: Exchanged) -> None:
    it.forward()
    it.front.close_connection = True


LIES: dict[Lie, str | None] = {
    login_page: "without X-ClickHouse-Query-Id",
    error_text: "upstream connect error",
    not_forwarded: "of them are not stored",
    no_summary: "X-ClickHouse-Summary",
    another_summary: "says that it wrote 0",
    half_forwarded: None,  # more of them each time
    sent_elsewhere: "HTTP 302",
    truncated: "cannot be reached",
    cut_in_the_headers: "breaks off in its headers",
    of_another_request: "to another query",
    forwarded_twice: None,  # the token makes one of both
    closed_after_forwarding: "cannot be reached",
}
"""Each lie and what the loader reports while it lasts; None where loading succeeds nevertheless."""


@contextmanager
def proxied(target: str) -> Iterator[tuple[str, Plan]]:
    plan = Plan(target)
    handler = type("Planned", (Proxy,), {"plan": plan})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", plan
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalshi_platform.loading.shared_rows.CHUNK_ROWS", 30)
    monkeypatch.setattr("kalshi_platform.loading.loader.REFUSED_RETRY_S", 0.2)
    monkeypatch.setattr("kalshi_platform.loading.loader.DRAIN_GIVE_UP_S", 60.0)
    monkeypatch.setattr("kalshi_platform.clickhouse.verified_inserts.SETTLE_S", (0.02,))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Writer]]:
    """One journal, loaded by each case into its own database."""
    folder = tmp_path_factory.mktemp("journal")
    with closing(journal_of(folder, recording(DELTAS))) as writer:
        yield folder, writer


def wait_for(what: Callable[[], object], load: Loader) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, load.failure or load.trouble
        time.sleep(0.01)


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_lying_proxy_neither_loses_nor_duplicates_rows(
    lie: Lie,
    tmp_path: Path,
    records: tuple[Path, Writer],
    clickhouse_url: str,
    clickhouse_database: str,
) -> None:
    direct = make(clickhouse_url, clickhouse_database, tmp_path)
    prepare(direct)
    folder, writer = tmp_path / "journal", records[1]
    shutil.copytree(records[0], folder)
    said = LIES[lie]
    with proxied(clickhouse_url) as (url, plan):
        settings = make(url, clickhouse_database, tmp_path)
        plan.lie = lie
        load = Loader(folder, writer, ClickHouseSink(settings, str(writer.id)), SMALL)
        load.start()
        if said is not None:
            wait_for(lambda: said in str(load.trouble), load)
            trouble = str(load.trouble)
            assert url in trouble or "cannot be reached" in trouble
            assert load.committed is not None
            assert load.committed.n == reader.oldest_offset(folder).n, (
                "the cursor waits for the rows"
            )
            wait_for(lambda: plan.lies > 1, load)
            plan.lie = None
        load.drain()
        assert load.join(PATIENCE_S), load.failure or load.trouble
    assert plan.lies
    assert_each_row_once(direct, DELTAS)


@contextmanager
def refusing_disk(folder: Path) -> Iterator[tuple[Settings, Path]]:
    """An embedded ClickHouse on a file system of its own, which can be filled."""
    with (
        small_disk(folder, megabytes=320) as disk,
        running(disk / "clickhouse") as url,
    ):
        settings = make(str(url), "kalshi", folder)
        prepare(settings)
        yield settings, disk


def test_a_full_clickhouse_disk_delays_the_cursor(tmp_path: Path) -> None:
    with refusing_disk(tmp_path) as (settings, disk):
        folder = tmp_path / "journal"
        writer = journal_of(folder, recording(DELTAS))
        load = Loader(folder, writer, ClickHouseSink(settings, str(writer.id)), SMALL)
        fill(disk)
        load.start()
        wait_for(lambda: "NOT_ENOUGH_SPACE" in str(load.trouble), load)
        ahead = load.committed.n if load.committed else 0
        assert ahead == reader.oldest_offset(folder).n
        assert load.lag == writer.durable.n
        make_room(disk)
        load.drain()
        assert load.join(PATIENCE_S), load.failure or load.trouble
        writer.close()
        assert_each_row_once(settings, DELTAS)

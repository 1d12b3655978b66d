"""What is fuzzed, and what must hold for any input whatever.

A target is a context manager that yields a function of the fuzzer's bytes. It raises on a finding;
what the code under test may raise is caught by name.
"""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import quote, urlsplit

import msgspec
import polars as pl

from kalshi_platform.archive import export
from kalshi_platform.clickhouse.statements import statements
from kalshi_platform.embedded_clickhouse import running
from kalshi_platform.embedded_clickhouse.answers import ClickHouseError
from kalshi_platform.embedded_clickhouse.statement import parse
from kalshi_platform.errors import StoreRefused
from kalshi_platform.exchange import columnar as decoding
from kalshi_platform.exchange.answers import decode_refusal
from kalshi_platform.exchange.auxiliary_channel import LIFECYCLE, TRADES
from kalshi_platform.exchange.columnar import Decoded, decode
from kalshi_platform.exchange.session import Session
from kalshi_platform.journal import reader
from kalshi_platform.journal import writer as writer_module
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.reader import JournalError
from kalshi_platform.journal.writer import Writer
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.rows import build_rows
from kalshi_platform_tests import wire
from kalshi_platform_tests.fuzz import inputs, sql

Run = Callable[[bytes], None]


@dataclass(frozen=True)
class Target:
    """Something that reads bytes from elsewhere."""

    promise: str
    open: Callable[[], AbstractContextManager[Run]]
    seeds: Sequence[bytes]


FRAME_SEEDS = [
    inputs.script(*((n, ()) for n in range(len(inputs.FRAMES)))),
    *(inputs.script((n, ((2, 3),))) for n in range(len(inputs.FRAMES))),
    *(b"\1" + json.dumps(frame).encode() for frame in inputs.FRAMES),
    inputs.script((1, ((9, 14),)), (1, ((8, 44),)), (0, ((7, 255),))),
]


PARTS = ("deltas", "levels", "snapshots", "trades", "stream")


# -- frames: the fast path against the slow one -------------------------------------------------


@contextmanager
def frames() -> Iterator[Run]:
    """Every frame becomes exactly what the slow path makes of it, alone or among others."""
    yield lambda data: check_frames(inputs.frames(data))


def check_frames(found: Sequence[bytes]) -> None:
    """Record these frames, and load them."""
    conn = wire.conn_id(1)
    session = Session(["A-1", "B-2"])
    records: list[wire.Record] = [wire.connected(conn, wire.NOON_NS)]
    for n, frame in enumerate(found):
        records.append((wire.NOON_NS + n, conn, int(session.receive(frame, float(n))), frame))
    fast = decode(wire.blocks(records))
    with mock.patch.multiple(decoding, _json=_refuse, _ndjson=_refuse):
        slow = decode(wire.blocks(records))
    _same(fast, slow)
    # an odd field has a row beside its frame's own
    stream = fast.stream.filter(pl.col("kind") != "malformed_field")
    kept = sorted([*fast.deltas["n"], *fast.snapshots["n"], *fast.trades["n"], *stream["n"]])
    assert kept == list(range(len(records))), "a record was lost or doubled"
    halves = [decode([block]) for block in wire.blocks(records, [len(records) // 2])]
    for part in PARTS:
        cut = pl.concat([getattr(half, part) for half in halves])
        assert cut.equals(getattr(fast, part)), f"its neighbours changed a frame: {part}"
    rows, _ = build_rows(fast, BookState())
    events = rows.tables["stream_events"].num_rows
    assert events >= len(records) - fast.deltas.height - fast.trades.height


def _refuse(*_: object) -> None:
    """Send every frame to the slow path."""


def _same(fast: Decoded, slow: Decoded) -> None:
    for part in PARTS:
        ours, theirs = getattr(fast, part), getattr(slow, part)
        assert ours.equals(theirs), f"fast and slow differ in {part}:\n{ours}\n{theirs}"


# -- the session --------------------------------------------------------------------------------


@contextmanager
def session() -> Iterator[Run]:
    """Whatever comes in whatever order: a kind for each frame, commands that are JSON, no error."""

    def run(data: bytes) -> None:
        conversation = Session(["A-1", "B-2", "C-3"], auxiliary=(TRADES, LIFECYCLE))
        now = 0.0
        for n, frame in enumerate(inputs.frames(data)):
            for command in conversation.commands(now):
                assert isinstance(msgspec.json.decode(command), dict)
            assert conversation.receive(frame, now) in Kind
            for note in conversation.take_notes():
                msgspec.json.encode(note.detail)
            conversation.follow(["A-1", "D-4"] if n % 3 == 2 else ["A-1", "B-2"])
            now += 0.3 if n % 4 else 20.0
        assert 0 <= conversation.synced <= len(conversation.tickers)
        assert all(isinstance(sentence, str) for sentence in conversation.warnings)

    yield run


# -- the journal --------------------------------------------------------------------------------


@contextmanager
def journal_bytes() -> Iterator[Run]:
    """A damaged segment gives the records before the damage, or a `JournalError`; never another one. Set
    aside, it gives some of its records."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in (9, 5):
            writer = Writer(folder)
            for n in range(count):
                writer.append(n, wire.conn_id(n % 2), n % 4, b"frame %d" % n * (n + 1))
                if n % 3 == 2:
                    writer.submit()
            writer.close()
        paths = [reader.segment_path(folder, n) for n in reader.segments(folder)]
        whole = [path.read_bytes() for path in paths]
        original = _records(folder)

        def run(data: bytes) -> None:
            which = data[0] % 2 if data else 0
            next_n = len(original)
            paths[which].write_bytes(damaged(whole[which], data[1:]))
            try:
                found = _records(folder)
                assert found == original[: len(found)], "a record that was never written"
                torn, damage, next_n = writer_module._inspect_end(folder)
                assert (
                    len(found) == len(original)
                    or torn
                    or damage
                    or paths[which].stat().st_size < len(whole[which])
                ), "records are missing, and nothing says so"
                assert damage or next_n <= len(original)
            except JournalError:
                pass
            aside = paths[which].rename(reader.set_aside(paths[which]))
            try:
                kept = _records(folder)
                assert set(kept) <= set(original), "a record that was never written"
                assert kept == sorted(kept), "the records are not in their order"
                assert all(record[0] < next_n for record in kept), "a number is given out again"
                assert {r for r in original if (r[0] < 9) == (which == 1)} <= set(kept), (
                    "a whole one"
                )
            finally:
                aside.unlink()
                paths[which].write_bytes(whole[which])

        yield run


def _records(folder: Path) -> list[tuple[Any, ...]]:
    return [
        (it.first_n + i, *row.values())
        for it in reader.read(folder, reader.oldest_offset(folder))
        if isinstance(it, reader.RecordRange)
        for i, row in enumerate(it.batch.to_pylist())
    ]


def damaged(data: bytes, edits: bytes) -> bytes:
    """`data`, changed as the fuzzer's bytes say: four for each change. More than 60: the bytes alone."""
    if len(edits) > 60:
        return edits
    changed = bytearray(data)
    for at in range(0, len(edits) - 3, 4):
        high, low, what, value = edits[at : at + 4]
        place = (high << 8 | low) % max(len(changed), 1)
        match what % 4:
            case 0:
                changed[place : place + 1] = bytes([value])
            case 1 if changed:
                changed[place] ^= 1 << value % 8
            case 2:
                del changed[place : place + value]
            case _:
                changed[place:place] = changed[: value * 8]
    return bytes(changed)


# -- texts --------------------------------------------------------------------------------------


@contextmanager
def statement() -> Iterator[Run]:
    """The embedded ClickHouse's reader of SQL: a statement, or an error as ClickHouse has them."""

    def run(data: bytes) -> None:
        try:
            found = parse(data)
        except ClickHouseError as error:
            assert str(error).startswith("Code: ")
            return
        for edge in (found.header_end, found.data_begin):
            assert edge is None or 0 <= edge <= len(data)

    yield run


@contextmanager
def texts() -> Iterator[Run]:
    """Error answers, SQL files, and the details of events that are published: a value, or a sentence."""

    def run(data: bytes) -> None:
        assert isinstance(str(decode_refusal(data)), str)
        text = data.decode(errors="replace")
        try:
            parts = list(statements(text))
        except StoreRefused:
            parts = []
        assert all(part in text for part in parts)
        for kind in (*export.NOTES, *export.FRAMES, "fill"):
            public = msgspec.json.decode(export.public_detail(kind, text))
            allowed = export.NOTES.get(kind, export.ENVELOPE | {"msg"})
            assert set(public) <= allowed
            assert set(public.get("msg", {})) <= export.FRAMES.get(kind, frozenset())

    yield run


# -- the embedded ClickHouse over HTTP ----------------------------------------------------------

TOKEN = "fuzzed-secret-of-the-host"

SQL = [
    *(
        "SELECT 1",
        "SELECT 'a' FORMAT JSON",
        "SELECT * FROM t",
        "INSERT INTO t VALUES ('x')",
        "exit",
    ),
    *(
        "INSERT INTO t FORMAT CSV\nx\ny\n",
        "SELECT file('{path}')",
        "SELECT * FROM file('{path}','LineAsString')",
    ),
    *(
        "SELECT * FROM url('file://{path}', 'LineAsString')",
        "SELECT * FROM executable('cat {path}', 'LineAsString', 's String')",
    ),
    *(
        "SELECT arrayMap(file, ['{path}'])",
        "INSERT INTO FUNCTION file('{path}', 'CSV', 's String') VALUES ('x')",
    ),
    *(
        "SELECT 1 INTO OUTFILE '{path}' TRUNCATE",
        "CREATE TABLE f (s String) ENGINE = File('LineAsString', '{path}')",
    ),
    *(
        "SELECT * FROM s3('file://{path}', 'LineAsString')",
        "CREATE DATABASE d ENGINE = SQLite('{path}')",
    ),
    *(
        "SELECT * FROM `{path}`",
        "SELECT /* file( */ `file`('{path}')",
        "WITH file('{path}') AS x SELECT x",
    ),
    *(
        "SELECT * FROM fileCluster('c', '{path}', 'LineAsString')",
        "SELECT * FROM format(Values, 's String', '(file(\\'{path}\\'))')",
    ),
    *(
        "INSERT INTO t FROM INFILE '{path}' FORMAT CSV",
        "BACKUP TABLE t TO File('{path}')",
        "DESCRIBE file('{path}')",
    ),
    *(
        "CREATE FUNCTION f AS () -> file('{path}')",
        "SELECT * FROM Python(os)",
        "SELECT * FROM filesystem('{path}')",
    ),
    *(
        "CREATE DICTIONARY dd (k UInt64) PRIMARY KEY k SOURCE(FILE(PATH '{path}' FORMAT 'CSV')) LAYOUT(FLAT()) LIFETIME(1)",
    ),
    *(
        "CREATE NAMED COLLECTION n AS url = 'file://{path}'",
        "SYSTEM SHUTDOWN",
        "DROP DATABASE default",
        "SET readonly = 0",
    ),
    *(
        "SELECT * FROM iceberg('{path}')",
        "SELECT * FROM deltaLakeLocal('{path}')",
        "SELECT * FROM hudi('{path}')",
    ),
    *(
        "SELECT * FROM sqlite('{path}', 't')",
        "SELECT * FROM input('s String')",
        "KILL QUERY WHERE 1",
        "SELECT throwIf(1)",
    ),
    *(
        "SELECT * FROM jdbc('{path}')",
        "SELECT * FROM merge('{path}')",
        "SELECT '\\0'",
        "SELECT $x${path}$x$",
        "/*",
    ),
]
"""Queries that are fine, that are errors, and that want a file of the host."""
WRAPS = [
    *[b"{q}"] * 6,
    *(
        b"SELECT * FROM ({q})",
        b"WITH x AS ({q}) SELECT * FROM x",
        b"{q} UNION ALL SELECT 'a'",
        b"EXPLAIN {q}",
    ),
    *(b"INSERT INTO t {q}", b"CREATE VIEW v AS {q}", b"SELECT toString(({q}))", b"DESCRIBE ({q})"),
    *(
        b"CREATE TABLE c ENGINE = Memory AS {q}",
        b"/* */ {q} -- ;",
        b"{q} FORMAT JSON",
        b"SELECT 1; {q}",
    ),
]
"""What stands around a query."""
MARK = b"{path}"
PATIENCE_S, ANSWER_S = 0.3, 20.0


@contextmanager
def http() -> Iterator[Run]:
    """Any bytes on the socket: an HTTP answer, a ClickHouse error, the process alive, the host untouched."""
    with tempfile.TemporaryDirectory() as name:
        host = Path(name) / "host"
        host.mkdir()
        secret = host / "secret.txt"
        secret.write_text(TOKEN)
        with running(Path(name) / "clickhouse") as url:
            address = (urlsplit(url).hostname or "", urlsplit(url).port or 0)
            create = _post(b"CREATE TABLE t (s String) ENGINE = Memory")
            assert b"200 OK" in asked(address, create, ANSWER_S)

            def run(data: bytes) -> None:
                request = request_of(_varied(data), str(secret).encode())
                answer = asked(address, request)
                judge(request, answer)
                assert url.process.poll() is None, "the process ended"
                assert secret.read_text() == TOKEN, "a file of the host was changed"
                assert list(host.iterdir()) == [secret], "a file of the host was made"

            yield run
            assert asked(address, b"GET /ping HTTP/1.0\r\n\r\n", ANSWER_S).endswith(b"Ok.\n")
        shutil.rmtree(host)


def _varied(data: bytes) -> bytes:
    """A request of REQUESTS, changed; the server's coverage is not measured."""
    if len(data) < 2:
        return data
    chosen = REQUESTS[data[0] % len(REQUESTS)]
    mode, body = chosen[:1], chosen[1:]
    if mode != b"\0":
        sql, *rest = body.split(b"\xff", 1)
        sql = WRAPS[data[1] % len(WRAPS)].replace(b"{q}", sql)
        body = b"\xff".join([sql, *rest])
    return mode + damaged(body, data[2:60])


def request_of(data: bytes, secret: bytes) -> bytes:
    """One HTTP request: the bytes as they are, or put together from pieces."""
    if not data or data[0] % 4 == 0:
        return data[1:].replace(MARK, secret)
    rest = [*data[1:].split(b"\xff", 3), b"", b"", b""]
    query, options, headers = (piece.replace(MARK, secret) for piece in rest[:3])
    options = quote(options, safe="=&+%").encode()
    head = b"\r\n".join(line for line in headers.split(b"\n") if b":" in line and b"\r" not in line)
    head = head + b"\r\n" if head else b""
    match data[0] % 4:
        case 1:
            return _post(query, options, head)
        case 2:
            return (
                b"GET /?query=%s&%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n%s\r\n"
                % (
                    quote(query).encode(),
                    options,
                    head,
                )
            )
        case _:
            first, _, body = query.partition(b"\n")
            return _post(body, b"query=" + quote(first).encode() + b"&" + options, head)


def _post(body: bytes, options: bytes = b"", head: bytes = b"") -> bytes:
    limits = b"max_execution_time=2&max_memory_usage=200000000&"
    return (
        b"POST /?%s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n%s\r\n%s"
        % (limits + options, len(body), head, body)
    )


def asked(address: tuple[str, int], request: bytes, patience_s: float = PATIENCE_S) -> bytes:
    """Everything that the server answers until it closes.

    If the server waits for more, the request is ended after `patience_s`, which also ends a query.
    """
    with socket.create_connection(address, timeout=patience_s) as connection:
        connection.sendall(request)
        pieces = []
        try:
            while piece := _received(connection):
                pieces.append(piece)
        except ConnectionError:
            pass  # an answer that was broken off on purpose, or bytes that were left unread
    return b"".join(pieces)


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(65_536)
    except TimeoutError:
        with suppress(OSError):  # it has answered at this moment, and gone
            connection.shutdown(socket.SHUT_WR)
        connection.settimeout(ANSWER_S)
        return connection.recv(65_536)


def judge(request: bytes, answer: bytes) -> None:
    """Raise unless that is an answer, and one that gives nothing away."""
    assert TOKEN.encode() not in answer, f"a file of the host was read by {request!r}"
    assert b"Traceback" not in answer, answer
    if not answer:
        return  # half a request, and its sender has gone
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1."), answer[:200]
    assert not head.startswith(b"HTTP/1.1 500") or body.startswith((b"Code: ",)), (request, answer)


REQUESTS = [
    *(bytes([n % 3 + 1]) + sql.encode() for n, sql in enumerate(SQL)),
    b"\1SELECT 1\xffdatabase=nowhere\xffX-ClickHouse-Format: CSV",
    b"\3INSERT INTO t FORMAT CSV\nx\xff\xffContent-Encoding: gzip",
    b"\1SELECT {x:String}\xffparam_x={path}\xffAuthorization: Basic !",
    b"\1SELECT 1\xffsession_id=s&session_timeout=9\xffContent-Encoding: zstd",
    b"\1SET max_threads = 1\xffsession_id=s\xff",
    b"\0GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\0POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nSEL\r\n0\r\n\r\n",
    b"\0POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    b'Content-Length: 77\r\n\r\n--b\r\nContent-Disposition: form-data; name="query"\r\n\r\nSELECT 1\r\n--b--\r\n  ',
    b"\0\x16\x03\x01 a TLS client",
]
"""How it is asked, in the first byte (`request_of`), then the query, the options and the headers."""

TARGETS = {
    "frames": Target(
        "fast and slow decoding agree on any frames, and no record is lost", frames, FRAME_SEEDS
    ),
    "session": Target("any frames in any order raise nothing", session, FRAME_SEEDS),
    "journal": Target(
        "a damaged journal gives its records or an error, never others",
        journal_bytes,
        [b"", *(bytes([n % 2, n >> 8, n & 255, n % 4, n % 256]) for n in range(0, 1500, 20))],
    ),
    "statement": Target(
        "any bytes are a statement or a ClickHouse error",
        statement,
        [*(sql.encode() for sql in SQL), b"INSERT INTO t FORMAT Native \xff\x00", b"SELECT 'a\\"],
    ),
    "texts": Target(
        "error answers, SQL files and published details",
        texts,
        [*(json.dumps(frame).encode() for frame in inputs.FRAMES), *(sql.encode() for sql in SQL)],
    ),
    "http": Target(
        "any request is answered, and none reaches the host's files",
        http,
        [bytes([n, 0]) for n in range(len(REQUESTS))],
    ),
    "sql": Target(
        "with nothing behind the list of what SQL may do, no statement gets out",
        sql.escape,
        sql.SEEDS,
    ),
}

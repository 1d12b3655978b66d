"""The HTTP server: it reads a request, runs its statement and writes the answer as ClickHouse does.

Each running query has a thread; the event loop only reads and writes sockets, so that `/ping` and other clients are
answered while queries run. The engine itself is in engine.py.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import hmac
import json
import logging
import os
import secrets
import shutil
import signal
import socket
import string
import tempfile
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar, cast
from urllib.parse import unquote_to_bytes, urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from kalshi_platform.browsers import refusal
from kalshi_platform.embedded_clickhouse import external, write_password
from kalshi_platform.embedded_clickhouse.answers import (
    ClickHouseError,
    as_text,
    content_type,
    decoded,
)
from kalshi_platform.embedded_clickhouse.confinement import confine
from kalshi_platform.embedded_clickhouse.early_headers import KEY, with_early_headers
from kalshi_platform.embedded_clickhouse.encodings import Decompressor, choose_encoding, compressor
from kalshi_platform.embedded_clickhouse.engine import (
    MINIMUM_FREE_BYTES,
    Answer,
    Engine,
    Progress,
    make_writable,
)
from kalshi_platform.embedded_clickhouse.engine import Request as EngineRequest
from kalshi_platform.embedded_clickhouse.formatted_errors import formatted_error
from kalshi_platform.embedded_clickhouse.forms import LONGEST_FIELDS_BYTES, Form, read_form
from kalshi_platform.embedded_clickhouse.permission import require_format
from kalshi_platform.embedded_clickhouse.statement import Statement, parse
from kalshi_platform.errors import StoreError
from kalshi_platform.loopback import is_loopback

log = logging.getLogger(__name__)
_T = TypeVar("_T")
Piece = tuple[bytes, Progress]

WORKERS = 64
"""Queries that run in parallel; further ones wait."""
LONGEST_SESSION_S = 3600
QUERY_BYTES = 256 * 1024
"""Longest query, or INSERT before its data, unless the setting max_query_size is larger."""
LONGEST_QUERY_BYTES = LONGEST_FIELDS_BYTES
"""Upper limit of that setting."""
ROOM_EVERY_BYTES = 16 * 1024 * 1024
"""Bytes of an INSERT's data between two checks of the free space."""
FINISH_REQUESTS_S = 3
"""Seconds after SIGTERM in which running requests may finish."""
END_QUERIES_S = 3
"""Seconds after that for killed queries to end."""

PROGRESS_SHARE, LONGEST_PROGRESS_S = 10, 60
"""A header of progress comes at most once in a tenth of the query's time so far, but each minute: common clients
accept 100 headers."""
_ERRORS_IN_FORMAT = "http_write_exception_in_output_format"
_NOT_SETTINGS = frozenset(
    {"query", "database", "default_format", "user", "password", "quota_key", "query_id", "role"}
    | {"session_id", "session_timeout", "session_check", "close_session", "client_protocol_version"}
    | {"compress", "decompress", "buffer_size", "wait_end_of_query", "stacktrace"}
)


@dataclass(frozen=True)
class _Call:
    """A request that was read: the statement, its conditions and its data."""

    request: EngineRequest
    statement: Statement
    sql: str
    data: IO[bytes] | None
    query_id: str
    encoding: str | None
    formats_errors: bool
    """Errors are written in the answer's format, if it has a form for them."""
    progress_every_s: float | None
    """The least time between two headers of the query's progress; None: none are sent."""

    @property
    def format(self) -> str:
        """The answer's format."""
        return self.statement.format or self.request.default_format


class Server:
    """Answers HTTP for one engine."""

    def __init__(
        self, engine: Engine, user: str, password: str, *, readers: bool, loopback: bool = True
    ) -> None:
        """`readers`: clients without a password may read. `loopback`: it listens on that interface only."""
        self._engine = engine
        self._loopback = loopback
        self._user = user.encode()
        self._password = password.encode()
        self._readers = frozenset({b"default", self._user}) if readers else frozenset()
        self._spool = _Spool(engine.spool)
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="query")
        routes = [
            Route("/", self._root, methods=["GET", "POST"]),
            Route("/ping", _ok, methods=["GET"]),
            Route("/replicas_status", _ok, methods=["GET"]),
            Route("/{path:path}", _unknown_path, methods=["GET", "POST"]),
        ]
        self.app = with_early_headers(Starlette(routes=routes))

    def stop(self) -> None:
        """Accept no new query; running ones continue."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _root(self, http: Request) -> Response:
        """Answer a query, or `Ok.` for a bare GET."""
        if http.method in {"GET", "HEAD"} and not http.scope["query_string"]:
            return await _ok(http)
        query_id = str(uuid.uuid4())
        error_format = ""
        with ExitStack() as held:
            try:
                _check_origin(http, loopback=self._loopback)
                options, query = _options(http.scope["query_string"])
                query_id = options.get("query_id") or query_id
                reader = self._is_reader(http, options)
                if _is_on(options, _ERRORS_IN_FORMAT):
                    error_format = options.get("default_format", "")
                call = await self._read(http, options, query, query_id, held, reader=reader)
                error_format = call.format if call.formats_errors else ""
                return await self._answer(http, call)
            except ClickHouseError as error:
                return self._refusal(error, query_id, error_format)
            except ClientDisconnect:
                return Response(status_code=499)  # the client is gone; the statement was not run
            except OSError as error:
                return self._refusal(_of_the_system(error), query_id, error_format)

    def _is_reader(self, http: Request, options: Mapping[str, str]) -> bool:
        """Whether a request without a password may read. Raises `ClickHouseError` for a wrong password."""
        user, password = _credentials(http, options)
        right_user = hmac.compare_digest(user, self._user)
        right_password = hmac.compare_digest(password, self._password)
        if right_user and right_password:
            return False
        if user in self._readers and not password:
            return True
        raise ClickHouseError(
            516,
            "AUTHENTICATION_FAILED",
            f"{user.decode(errors='replace')}: Authentication failed: password is incorrect,"
            " or there is no user with such name.",
        )

    async def _read(
        self,
        http: Request,
        options: dict[str, str],
        query: bytes,
        query_id: str,
        held: ExitStack,
        *,
        reader: bool,
    ) -> _Call:
        """Read a request: data is written to files, which `held` closes; a query is bounded and held in memory.

        `query` is the beginning of the query, from the URL.
        """
        for flag in ("compress", "decompress"):
            if options.get(flag, "0") not in {"0", ""}:
                raise ClickHouseError(
                    48,
                    "NOT_IMPLEMENTED",
                    f"{flag}=1 (ClickHouse's own block compression) is not supported by the embedded"
                    " ClickHouse; use HTTP compression: Accept-Encoding and Content-Encoding",
                )
        body = _pieces(http)
        form = Form()
        if http.headers.get("content-type", "").startswith("multipart/form-data"):
            form = await self._form(http, body, held)
            query += form.fields.pop("query", b"")
            options |= {
                name: _option(name, value, f"The form's field {name}")
                for name, value in form.fields.items()
            }
        limit = _longest_query(options)
        head = await _beginning(body, query and query + b"\n", limit)
        tables = external.tables(form.files, options)
        request = _engine_request(http, options, tables, reader=reader)
        statement, sql = await asyncio.get_running_loop().run_in_executor(
            self._threads, self._parsed, head, limit, request
        )
        data: IO[bytes] | None = None
        if statement.data_begin is not None:
            self._engine.require_folder()  # the data is spooled there first
            data = held.enter_context(self._spool.file())
            self._spool.write(data, memoryview(head)[statement.data_begin :])
            async for piece in body:
                self._spool.write(data, memoryview(piece))
            data.seek(0)
        http_compression = _is_on(options, "enable_http_compression")
        return _Call(
            request=request,
            statement=statement,
            sql=sql,
            data=data,
            query_id=query_id,
            encoding=choose_encoding(http.headers.get("accept-encoding", ""))
            if http_compression
            else None,
            formats_errors=statement.formats_errors or _is_on(options, _ERRORS_IN_FORMAT),
            progress_every_s=_progress_interval(options),
        )

    async def _form(self, http: Request, body: AsyncIterator[bytes], held: ExitStack) -> Form:
        """The form in a body, its files in the data folder until `held` closes them."""

        def new_file() -> IO[bytes]:
            self._engine.require_folder()
            return held.enter_context(self._spool.file())

        return await read_form(_header(http, "content-type"), body, new_file, self._spool.write)

    def _parsed(self, head: bytes, limit: int, request: EngineRequest) -> tuple[Statement, str]:
        """Parse and permit the statement at the start of a body; returns it and its text, an INSERT's up to its target.

        Raises `ClickHouseError` for a statement that may not run.
        """
        statement = parse(head[:limit])
        end = len(head) if statement.data_begin is None else statement.data_begin
        if end > limit or (end == limit and len(head) > limit):
            raise ClickHouseError(
                62,
                "SYNTAX_ERROR",
                f"Max query size exceeded: the query is longer than {limit} bytes (can be increased with"
                f" the `max_query_size` setting, up to {LONGEST_QUERY_BYTES})",
            )
        any_bytes = statement.reads_only or statement.inserts
        sql = as_text(head[:end]) if any_bytes else decoded(head[:end], "The statement")
        if not statement.verb:
            raise ClickHouseError(62, "SYNTAX_ERROR", "Syntax error: Empty query")
        checked = sql
        if statement.inserts_data:
            sql = as_text(head[: statement.header_end])
            checked = f"{sql}\n{statement.settings}\nFORMAT {statement.format}"
        require_format(request.default_format)
        self._engine.permit(checked, request.settings, reader=request.reader)
        for table in request.tables:
            self._engine.permit_table(table)
        return statement, sql

    async def _answer(self, http: Request, call: _Call) -> Response:
        """Run the statement and answer at once, or as a stream if there is a second piece."""
        if call.data is not None:
            done = await self._in_thread(
                http,
                call,
                lambda: self._engine.insert(
                    call.request, call.statement, call.sql, cast(IO[bytes], call.data)
                ),
            )
            return Response(b"", headers=self._headers(call, done, result=False))
        answer = self._engine.query(call.request, call.statement, call.sql)
        try:
            # both in one call, since each change of thread delays a small answer
            first, second = await self._in_thread(
                http, call, lambda: (cast(Piece, answer.fetch()), answer.fetch())
            )
            if second is None:
                return await self._complete(http, call, first)
        except BaseException:
            self._threads.submit(answer.close)
            raise
        headers = self._headers(call, second[1], result=True)
        if call.encoding:
            headers["Content-Encoding"] = call.encoding
        headers["X-ClickHouse-Exception-Tag"] = tag = "".join(
            secrets.choice(string.ascii_lowercase) for _ in range(16)
        )
        pieces = self._stream(call, [first[0], second[0]], answer, tag)
        return StreamingResponse(pieces, headers=headers)

    async def _complete(self, http: Request, call: _Call, piece: Piece) -> Response:
        """The response to a statement whose answer is a single piece."""
        body, progress = piece
        headers = self._headers(call, progress, result=bool(body) or call.statement.reads_only)
        if call.encoding:
            packed = compressor(call.encoding)
            headers["Content-Encoding"] = call.encoding
            body = await self._in_thread(
                http, call, lambda: packed.compress(piece[0]) + packed.flush()
            )
        return Response(body, headers=headers)

    async def _stream(
        self, call: _Call, begun: list[bytes], answer: Answer, tag: str
    ) -> AsyncIterator[bytes]:
        """Stream the answer in pieces; an error is appended to them, as ClickHouse does."""
        packed = compressor(call.encoding) if call.encoding else None
        loop = asyncio.get_running_loop()

        def following() -> bytes | None:
            piece = (begun.pop(0),) if begun else answer.fetch()
            return packed.compress(piece[0]) if packed and piece else piece and piece[0]

        try:
            while (piece := await loop.run_in_executor(self._threads, following)) is not None:
                if piece:
                    yield piece
            if packed:
                yield packed.flush()
        except ClickHouseError as error:
            row = formatted_error(self._text(error), call.format) if call.formats_errors else None
            trailer = row or self._exception_block(error, tag)
            yield packed.compress(trailer) + packed.flush() if packed else trailer
            if not row:
                raise _AnswerBroken(str(error)) from error
        finally:
            self._threads.submit(answer.close)

    def _exception_block(self, error: ClickHouseError, tag: str) -> bytes:
        message = self._text(error)
        return (
            f"\r\n__exception__\r\n{tag}\r\n{message}\n{len(message.encode()) + 1} {tag}\r\n__exception__\r\n"
        ).encode()

    async def _in_thread(self, http: Request, call: _Call, work: Callable[[], _T]) -> _T:
        """Run `work` in a thread and send its progress; if the client disconnects, its query is killed."""
        loop = asyncio.get_running_loop()
        result = loop.run_in_executor(self._threads, work)
        gone = asyncio.ensure_future(_disconnected(http))
        either: list[Any] = [result, gone]
        begun, pause = loop.time(), call.progress_every_s
        try:
            while not (
                await asyncio.wait(either, timeout=pause, return_when=asyncio.FIRST_COMPLETED)
            )[0]:
                progress = await loop.run_in_executor(None, self._engine.progress, call.request.tag)
                if progress and not result.done():
                    http.scope[KEY].send("X-ClickHouse-Progress", progress)
                pause = max(
                    call.progress_every_s or 0,
                    min((loop.time() - begun) / PROGRESS_SHARE, LONGEST_PROGRESS_S),
                )
            while not result.done() and call.statement.reads_only:
                await loop.run_in_executor(None, self._engine.kill, call.request.tag)
                # a query that had not begun was not found, so the kill is repeated
                await asyncio.wait([cast(Any, result)], timeout=0.5)
            return await asyncio.shield(result)
        finally:
            gone.cancel()

    def _headers(self, call: _Call, progress: Progress, *, result: bool) -> dict[str, str]:
        """The headers of an answer; `result`: whether the statement has a result, even an empty one."""
        headers = self._common_headers(call.query_id) | {
            "X-ClickHouse-Timezone": self._engine.timezone,
            "X-ClickHouse-Summary": json.dumps({name: str(n) for name, n in progress.items()}),
        }
        if result:
            headers["X-ClickHouse-Format"] = call.format
            headers["Content-Type"] = content_type(call.format)
        return headers

    def _common_headers(self, query_id: str) -> dict[str, str]:
        return {
            "X-ClickHouse-Server-Display-Name": self._engine.host_name,
            "X-ClickHouse-Query-Id": "".join(c if " " <= c <= "~" else "?" for c in query_id),
        }

    def _text(self, error: ClickHouseError) -> str:
        return f"{error} (version {self._engine.version})"

    def _refusal(self, error: ClickHouseError, query_id: str, output_format: str) -> Response:
        """The answer that is an error, in `output_format` if that has a form for it."""
        headers = self._common_headers(query_id) | {"X-ClickHouse-Exception-Code": str(error.code)}
        text = self._text(error)
        formatted = formatted_error(text, output_format)
        if formatted is None:
            return PlainTextResponse(text + "\n", error.status, headers=headers)
        headers["X-ClickHouse-Format"] = output_format
        headers["Content-Type"] = content_type(output_format)
        return Response(formatted, error.status, headers=headers)


class _AnswerBroken(Exception):
    """Closes the connection in the middle of an answer, so that no client takes it for complete."""


def _is_no_broken_answer(record: logging.LogRecord) -> bool:
    """Log filter: drop a query's own error, which its client has received."""
    return not (record.exc_info and isinstance(record.exc_info[1], _AnswerBroken))


class _Spool:
    """Temporary files for the data of INSERTs, in the data folder; unnamed, so that none is left behind."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def file(self) -> IO[bytes]:
        """A new, empty file, which is deleted when it is closed."""
        return tempfile.TemporaryFile(dir=self._folder, buffering=0)

    def write(self, file: IO[bytes], data: memoryview) -> None:
        """Append data. Raises `ClickHouseError` if that would fill the disk, on which the engine needs space."""
        before = file.tell() // ROOM_EVERY_BYTES
        while data:
            data = data[file.write(data) :]
        if file.tell() // ROOM_EVERY_BYTES == before:
            return
        if shutil.disk_usage(self._folder).free < MINIMUM_FREE_BYTES:
            raise ClickHouseError(
                243,
                "NOT_ENOUGH_SPACE",
                f"No room for the request body: less than {MINIMUM_FREE_BYTES // 2**20} MiB are left on the"
                " disk of the data folder",
            )


async def _pieces(http: Request) -> AsyncIterator[bytes]:
    """The body, decompressed, in pieces of bounded size."""
    encoding = http.headers.get("content-encoding", "").strip().lower()
    if encoding in {"", "identity"}:
        async for piece in http.stream():
            yield piece
        return
    decompressor = Decompressor(encoding)
    async for piece in http.stream():
        for unpacked in decompressor.decompress(piece):
            yield unpacked
    decompressor.finish()


async def _beginning(body: AsyncIterator[bytes], before: bytes, limit: int) -> bytes:
    """`before` and the beginning of a body: the whole body, or more than `limit` bytes."""
    head = bytearray(before)
    while len(head) <= limit and (piece := await anext(body, None)) is not None:
        head += piece
    return bytes(head)


def _of_the_system(error: OSError) -> ClickHouseError:
    """The error of a request that could not be read because of the system, such as a full disk."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return ClickHouseError(
            243, "NOT_ENOUGH_SPACE", f"No room for the request body: {error.strerror}"
        )
    log.error("A request could not be read: %s", error)
    return ClickHouseError(425, "SYSTEM_ERROR", f"The request could not be read: {error.strerror}")


def _longest_query(options: Mapping[str, str]) -> int:
    """The longest query in bytes; the engine has the same default."""
    wanted = options.get("max_query_size", "")
    if not wanted.isdecimal() or not int(wanted[:20]):
        return QUERY_BYTES
    return min(int(wanted[:20]), LONGEST_QUERY_BYTES)


async def _ok(_: Request) -> Response:
    return Response(b"Ok.\n", media_type="text/html; charset=UTF-8")


async def _unknown_path(http: Request) -> Response:
    return PlainTextResponse(
        f"There is no handle {http.scope['path']}\n\nUse / or /ping for health checks.\n", 404
    )


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _check_origin(http: Request, *, loopback: bool) -> None:
    """Refuse requests from web pages of other sites.

    Such a page can reach the loopback interface through its visitor's browser, and reading needs no password.
    """
    if why := refusal(http.headers, scheme=http.scope["scheme"], loopback=loopback):
        raise ClickHouseError(497, "ACCESS_DENIED", why)


def _options(query_string: bytes) -> tuple[dict[str, str], bytes]:
    """The URL's parameters, the last value of one that is given twice, and the query, which may end in data."""
    options: dict[str, str] = {}
    query = b""
    for part in query_string.split(b"&"):
        name, _, encoded = part.replace(b"+", b" ").partition(b"=")
        shown = decoded(unquote_to_bytes(name), "A name in the URL")
        value = unquote_to_bytes(encoded)
        if shown == "query":
            query = value
        elif shown:
            options[shown] = _option(shown, value, f"{shown} in the URL")
    return options, query


def _option(name: str, value: bytes, label: str) -> str:
    """The value of an option; that of a query's parameter may be any bytes."""
    return as_text(value) if name.startswith("param_") else decoded(value, label)


def _header(http: Request, name: str, otherwise: str = "") -> bytes:
    return http.headers.get(name, otherwise).encode("latin-1")  # the bytes as received


def _credentials(http: Request, options: Mapping[str, str]) -> tuple[bytes, bytes]:
    """User and password from headers or URL; `default` without a password if there are none."""
    headers = http.headers
    if "x-clickhouse-user" in headers or "x-clickhouse-key" in headers:
        return _header(http, "x-clickhouse-user", "default"), _header(http, "x-clickhouse-key")
    scheme, _, encoded = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            user, _, password = base64.b64decode(encoded, validate=True).partition(b":")
        except ValueError as error:
            raise ClickHouseError(
                516, "AUTHENTICATION_FAILED", "The Authorization header is not valid Basic"
            ) from error
        return user, password
    return options.get("user", "default").encode(), options.get("password", "").encode()


def _engine_request(
    http: Request,
    options: Mapping[str, str],
    tables: tuple[external.Table, ...],
    *,
    reader: bool,
) -> EngineRequest:
    """The conditions of a request, from its URL, form and headers."""
    if role := options.get("role"):
        raise ClickHouseError(
            511,
            "UNKNOWN_ROLE",
            f"There is no role `{role}`: the embedded ClickHouse has one user and no roles",
        )
    timeout = options.get("session_timeout", "60")
    if not timeout.isdecimal() or int(timeout[:20]) > LONGEST_SESSION_S:
        raise ClickHouseError(
            374, "INVALID_SESSION_TIMEOUT", f"Invalid session timeout: '{timeout}'"
        )
    return EngineRequest(
        database=options.get("database")
        or decoded(_header(http, "x-clickhouse-database"), "X-ClickHouse-Database"),
        settings={
            name: value
            for name, value in options.items()
            if name not in _NOT_SETTINGS and not name.startswith("param_")
        },
        parameters={
            name.removeprefix("param_"): value
            for name, value in options.items()
            if name.startswith("param_")
        },
        default_format=options.get("default_format")
        or decoded(_header(http, "x-clickhouse-format"), "X-ClickHouse-Format")
        or "TabSeparated",
        readonly=reader or http.method == "GET",
        reader=reader,
        session_id=options.get("session_id", ""),
        session_timeout_s=float(timeout),
        session_must_exist=options.get("session_check") == "1",
        buffered=_is_on(options, "wait_end_of_query") or _is_on(options, "http_wait_end_of_query"),
        native_version=_protocol_version(options.get("client_protocol_version", "0")),
        tables=tables,
    )


def _progress_interval(options: Mapping[str, str]) -> float | None:
    """Seconds between two headers of progress; None if the request wants none."""
    if not _is_on(options, "send_progress_in_http_headers"):
        return None
    interval = options.get("http_headers_progress_interval_ms", "100")
    return max(int(interval[:9]), 10) / 1000 if interval.isdecimal() else 0.1


def _is_on(options: Mapping[str, str], name: str) -> bool:
    return options.get(name, "0").lower() not in {"0", "", "false"}


def _protocol_version(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise ClickHouseError(
            72, "CANNOT_PARSE_NUMBER", f"client_protocol_version is a number, not '{text}'"
        )
    return int(text)


def serve(
    *,
    path: Path,
    host: str = "127.0.0.1",
    port: int,
    user: str,
    password: str | None,
    object_store: Collection[str] = (),
    ready: Callable[[int], None] | None = None,
) -> None:
    """Serve the data folder `path` until SIGTERM or SIGINT; port 0 takes any free one.

    On Linux the calling process is irrevocably confined to `path` (confinement.py), so `serve` needs a process of
    its own. `password` is as in `launch.Options`. `object_store` are the URL prefixes that SQL may reach. `ready` is
    called with the port once requests are answered. Raises `StoreError` if the port is taken, the folder is in use,
    not writable or on a full disk, its password file is not usable, or other machines could connect without a
    password.
    """
    folder = path.expanduser().absolute()
    if not password and not is_loopback(host):
        raise StoreError(
            f"--host {host} opens the database to other machines, and CLICKHOUSE_PASSWORD is empty: any client"
            " that reaches the port could read everything. Set a password, or leave --host out."
        )
    make_writable(folder)
    # before a client can connect: one that finds no password file connects as a reader
    secret = write_password.read_or_make(folder) if password is None else password
    listener = _bind(host, port)
    with listener:
        confine(folder, [_port(url) for url in object_store])
        engine = Engine(folder, object_store)
        server = Server(engine, user, secret, readers=password is None, loopback=is_loopback(host))
        _run(server, engine, listener, ready)
        server.stop()
        if not engine.end_queries(END_QUERIES_S / 3):
            log.warning("a query did not end in time; the engine is left without a clean close")
            os._exit(0)  # its thread would keep the process alive; acknowledged inserts are on disk
        engine.close()


def _port(url: str) -> int:
    parts = urlsplit(url)
    return parts.port or (443 if parts.scheme == "https" else 80)


def _bind(host: str, port: int) -> socket.socket:
    """Open the listening socket. Raises `StoreError` if the port is taken."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET
        )
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StoreError(
                f"Port {port} is taken by another program on {host}: stop it, or give another --port."
            ) from None
        raise StoreError(
            f"Cannot listen on {host}:{port}: {error.strerror or error}. Give another --host or --port."
        ) from error


def _run(
    server: Server, engine: Engine, listener: socket.socket, ready: Callable[[int], None] | None
) -> None:
    class Web(uvicorn.Server):
        """Calls `ready` when requests are answered; at the shutdown kills the queries that do not end."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if ready is not None:
                ready(listener.getsockname()[1])

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            loop = asyncio.get_running_loop()
            end = loop.call_later(
                FINISH_REQUESTS_S, loop.run_in_executor, None, engine.end_queries, END_QUERIES_S
            )
            await super().shutdown(sockets)
            end.cancel()

    config = uvicorn.Config(
        server.app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=FINISH_REQUESTS_S + END_QUERIES_S,
    )
    logging.getLogger("uvicorn.error").addFilter(_is_no_broken_answer)
    if threading.current_thread() is threading.main_thread():
        # uvicorn raises the signal again after the shutdown; this handler ignores it
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
    Web(config).run(sockets=[listener])

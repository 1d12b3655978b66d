"""The engine: one data folder, a connection for each request, sessions, and cancellation.

A new connection takes well under a millisecond and has its own settings, current database and temporary tables, so
nothing of one request can reach the next. Only a session with state (SET, USE, a temporary table) keeps a connection.
HTTP is in server.py, the check of statements in permission.py.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import queue
import re
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import filelock

from kalshi_platform.embedded_clickhouse import (
    empty_definitions,
    external,
    native,
    parts,
    refused,
    rights,
)
from kalshi_platform.embedded_clickhouse.answers import ClickHouseError, as_bytes, as_text
from kalshi_platform.embedded_clickhouse.failed_writes import FailedWrites
from kalshi_platform.embedded_clickhouse.permission import (
    Known,
    Permission,
    not_listed,
    require_format,
)
from kalshi_platform.embedded_clickhouse.statement import Statement
from kalshi_platform.errors import StoreError

log = logging.getLogger(__name__)

MINIMUM_FREE_BYTES = 256 * 1024 * 1024
"""Least free space for a start: on a full disk merges can fail half-way."""
ANSWER_PIECE_BYTES = 1024 * 1024
CHUNKED_FORMATS = frozenset(
    {"native", "rowbinary", "tabseparated", "tsv", "tabseparatedraw", "tsvraw", "csv"}
    | {"jsoneachrow", "jsonlines", "ndjson", "jsonstringseachrow", "jsoncompacteachrow"}
    | {"jsoncompactstringseachrow"}
)
"""Formats without header and footer: the engine's pieces, concatenated, are the whole answer."""
BLOCK_ROWS = 65_409
"""The engine's block size for reads."""
SESSION_TIMEOUT_S = 60
_ONLY_WHOLE = frozenset({"extremes", "output_format_json_array_of_rows"})
"""Settings that add parts to an answer that its pieces lack."""
_PLAIN_TYPES = {"print_pretty_type_names": "0"}
"""The setting for types in DESCRIBE as they are in Native."""
_SETTING_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TAG = "query_cache_tag"
"""A setting without effect unless the query cache is used: carries the request's number, by which
a running query is found and killed. A request that sets it itself cannot be cancelled."""
_PROGRESS = """
SELECT toString(read_rows) AS read_rows, toString(read_bytes) AS read_bytes,
    toString(total_rows_approx) AS total_rows_to_read, toString(written_rows) AS written_rows,
    toString(written_bytes) AS written_bytes, toString(toUInt64(elapsed * 1e9)) AS elapsed_ns,
    toString(memory_usage) AS memory_usage
FROM system.processes WHERE Settings['query_cache_tag'] = {sql:String} LIMIT 1 FORMAT JSONEachRow
"""
"""The progress of the query with this tag."""

_CONFIG = """<clickhouse>
  <logger><level>fatal</level></logger>
  <users_config>{users}</users_config>
  <user_files_path>{user_files}/</user_files_path>
  <merge_tree>
    <!-- as migrations would set it table by table: see migrations._disable_statistics -->
    <auto_statistics_types></auto_statistics_types>
    <old_parts_lifetime>{sources_kept_s}</old_parts_lifetime>
    <!-- acknowledged inserts survive a power failure: the loader's cursor, which is durable, relies on them -->
    <fsync_after_insert>1</fsync_after_insert>
    <fsync_part_directory>1</fsync_part_directory>
  </merge_tree>
</clickhouse>
"""
_PARSE_LIMITS = "SET max_query_size = 33554432"
_UNSUPPORTED = re.compile(r"AST node of type '([^']*)' does not support JSON serialization")
_WITHIN = ": In scope SELECT parseQueryToJSON("
"""The end of a parser error: the query that called the parser."""
_PART = r"(?:[A-Za-z_]\w*|`(?:[^`\\]|\\.)*`|\{\w+:\s*Identifier\})"
_ABOUT_NAMES = re.compile(
    rf"(?:(?:EXISTS|SHOW CREATE)(?: TEMPORARY)?(?: TABLE| VIEW| DATABASE| DICTIONARY)? {_PART}(?:\.{_PART})?"
    rf"|SHOW (?:ENGINES|PROCESSLIST|PRIVILEGES|GRANTS|SETTING {_PART})"
    r"|SHOW FUNCTIONS(?: I?LIKE '(?:[^'\\]|\\.)*')?)(?: FORMAT (?P<format>\w+))?"
)
"""Statements that only name things, as the engine formats them; it has no JSON syntax tree for them."""
_DESCRIBE = re.compile(r"(?:DESCRIBE|DESC) (?:TABLE )?(?P<table>.*)", re.DOTALL)
_LITERALS = re.compile(
    rb"(?:[\s()\[\]{},:;+\-.]++|\d[\w.]*+|'(?:[^'\\]++|\\.|'')*+'"
    rb"|(?i:NULL|TRUE|FALSE|INF|NAN|DEFAULT)\b)*+",
    re.DOTALL,
)
"""VALUES without any expression."""
LITERAL_VALUES_BYTES, EXPRESSION_VALUES_BYTES = 16 * 1024 * 1024, 1024 * 1024
"""Limits up to which VALUES may be literals that are scanned here, and may hold expressions; longer ones are read as
literals by the engine."""
_SYNTAX_ERROR = 62
_FAILED = "WriteBufferFromFileDescriptorWriteFailed"
"""The engine's counter of failed file writes, after which it does not always fail the operation."""
REMEMBERED_BYTES, REMEMBERED = 8192, 2048
"""The verdicts on the latest statements of at most this length are cached: at most 16 MiB of text."""


@dataclass(frozen=True)
class Request:
    """The conditions under which a statement runs."""

    database: str
    """Current database; empty for the default one."""
    settings: Mapping[str, str]
    parameters: Mapping[str, str]
    """Values of `{name:Type}`, in ClickHouse's escaped form."""
    default_format: str
    readonly: bool
    reader: bool = False
    """It came without a password: it may only read, and shares no session with clients that have one."""
    session_id: str = ""
    session_timeout_s: float = SESSION_TIMEOUT_S
    session_must_exist: bool = False
    buffered: bool = False
    """Send the answer only after the query has ended (`wait_end_of_query`)."""
    native_version: int = 0
    """The protocol version for which answers in Native are written (`client_protocol_version`)."""
    tables: tuple[external.Table, ...] = ()
    """External tables, which exist for this request only."""
    tag: str = field(default_factory=lambda: uuid.uuid4().hex)


_OF_AN_INSERT = ("written_rows", "written_bytes", "elapsed_ns")
Progress = Counter[str]
"""The engine's counters under the names of `X-ClickHouse-Summary`. Counters that it lacks are missing, not zero."""


class Answer:
    """A statement's answer, piece by piece. Holds a connection until it ends or is closed."""

    def __init__(
        self, pieces: Generator[tuple[bytes, Progress], None, None], kill: Callable[[], None]
    ) -> None:
        self._pieces = pieces
        self._kill = kill
        self._lock = threading.Lock()
        self._ended = False

    def fetch(self) -> tuple[bytes, Progress] | None:
        """The next piece with the progress so far; None at the end. There is at least one piece.

        Raises `ClickHouseError`, after which the answer has ended.
        """
        with self._lock:
            try:
                piece = next(self._pieces, None)
            except BaseException:
                self._ended = True
                raise
            self._ended = piece is None
            return piece

    def close(self) -> None:
        """Kill the query, also while another thread is fetching."""
        if not self._ended:
            self._kill()
        with self._lock:
            self._ended = True
            self._pieces.close()


class _Run:
    """Runs statements on a connection."""

    def __init__(self, connection: Any, parameters: Mapping[str, str], *, in_pieces: bool) -> None:
        self.connection = connection
        self._parameters = _plain(parameters)
        self._in_pieces = in_pieces

    def answer(
        self, sql: str, default_format: str
    ) -> Generator[tuple[bytes, Progress], None, None]:
        """Run a statement and yield its answer, at least one piece."""
        if not self._in_pieces:
            result = self.connection.query(as_bytes(sql), default_format, params=self._parameters)
            progress = _progress(result)
            view = memoryview(result.get_memview().view()) if result.size() else memoryview(b"")
            for begin in range(0, max(len(view), 1), ANSWER_PIECE_BYTES):
                yield bytes(view[begin : begin + ANSWER_PIECE_BYTES]), progress
            return
        done: Progress = Counter()
        query = as_bytes(sql)
        with self.connection.send_query(query, default_format, params=self._parameters) as stream:
            for piece in stream:
                done.update(_progress(piece))  # each piece has its own counters
                yield piece.bytes(), done
        if not done:
            yield b"", done

    def describe(self, select: str) -> list[native.Column]:
        """The names and types of a SELECT's columns."""
        result = self.connection.query(
            as_bytes(f"DESCRIBE TABLE ({select}\n)"), "JSONCompactEachRow", params=self._parameters
        )
        lines = map(json.loads, as_text(result.bytes()).split("\n")[:-1])
        return [(name, kind) for name, kind, *_ in lines]


class _Definitions:
    """Counts the statements that may change the types of columns. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = self._ended = 0

    @property
    def state(self) -> int | None:
        """A number that is the same only while no definition changes; None if one may be changing now."""
        with self._lock:
            return None if self._running else self._ended

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Context manager of a statement that may change a definition."""
        with self._lock:
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                self._ended += 1


def _changed() -> ClickHouseError:
    return ClickHouseError(
        236,
        "ABORTED",
        "The definition of a table changed while the query ran: send the query again",
    )


@dataclass
class _Session:
    lock: threading.Lock = field(default_factory=threading.Lock)
    connection: Any = None
    last_used: float = 0.0
    timeout_s: float = SESSION_TIMEOUT_S


class Engine:
    """The chDB engine on one data folder, held exclusively while open. Thread-safe."""

    def __init__(self, path: Path, object_store: Collection[str] = ()) -> None:
        """Open the folder, and create it if it is missing. Raises `StoreError`.

        `object_store` are the URL prefixes that `s3()` may reach.
        """
        make_writable(path)
        self._lock = filelock.FileLock(path / "lock")
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout:
            raise StoreError(
                f"The data folder {path} is in use by another process: the embedded ClickHouse"
                " serves a folder to one process only. Stop the other one, or give another --path."
            ) from None
        self.spool = path / "spool"
        self._path = path
        self._folder = _identity_of(path)
        """The folder's identity, to notice if its path leads elsewhere later."""
        self._parsers: queue.LifoQueue[Any] = queue.LifoQueue()
        self._cached_verdict = functools.lru_cache(REMEMBERED)(self._verdict)
        try:
            self._open(path, object_store)
        except BaseException:
            self._lock.release()
            raise
        self._sessions: dict[tuple[bool, str], _Session] = {}
        """By (whether it is a reader's, session id)."""
        self._external_memory = external.Memory()
        self._definitions = _Definitions()
        self._columns: dict[object, list[native.Column]] = {}
        """The columns of the latest SELECTs, for Native."""
        self._object_store = bool(object_store)
        self._guard = threading.Lock()
        self._running = 0
        self._idle = threading.Condition(self._guard)
        self._closing = False
        self._failed_writes = FailedWrites(path, self._count_failed_writes, self._merging_since)
        self._failed_writes.start()

    def _open(self, path: Path, object_store: Collection[str]) -> None:
        """Prepare the folder, repair it, open the engine and take out refused definitions."""
        temporary = path / "tmp"
        for folder in (self.spool, temporary):
            shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
        for folder in (self.spool, temporary, path / "engine", path / "user_files"):
            folder.mkdir(exist_ok=True)
        os.environ["TMPDIR"] = str(temporary)  # loading the engine creates a temporary folder
        import chdb  # half a gigabyte, so imported when it is needed

        users, config = path / "users.xml", path / "config.xml"
        users.write_text(rights.users(object_store))
        config.write_text(
            _CONFIG.format(
                users=users,
                user_files=path / "user_files",
                sources_kept_s=parts.SOURCES_KEPT_S,
            )
        )
        connect: Callable[[str], Any] = chdb.connect
        self._open_connection = functools.partial(
            connect, f"{path / 'engine'}?config-file={config}"
        )
        empty_definitions.remove(path)
        try:
            parts.set_aside(path)
        except OSError as error:
            raise StoreError(
                f"The data folder {path} has a part of a table that cannot be read, and it cannot be set"
                f" aside: {error}"
            ) from error
        kept = _keep_default_database(path / "engine")
        try:
            self._base = self._open_connection()  # the engine stays open while one connection does
            self._make_default_database_plain(kept)
            row = self._base.query("SELECT version(), timezone(), hostName()", "TabSeparated")
        except (RuntimeError, chdb.ChdbError) as error:
            raise StoreError(
                f"The embedded ClickHouse cannot open its data folder {path}: {error}"
            ) from error
        self._permission = Permission(self._known_names(), self.syntax_tree, tuple(object_store))
        try:
            with self._connect() as connection:
                refused.set_aside(connection, lambda sql: self._verdict(sql, reader=False), path)
        except (RuntimeError, chdb.ChdbError, OSError) as error:
            raise StoreError(
                f"The data folder {path} holds definitions that the embedded ClickHouse may not run, and they"
                f" cannot be taken out: {error}"
            ) from error
        self.version, self.timezone, self.host_name = row.bytes().decode().rstrip("\n").split("\t")

    def _make_default_database_plain(self, kept: bool) -> None:
        """Make `default` an ordinary database: the engine opens it as one in which unknown tables are files."""
        self._base.query("USE system")
        self._base.query("DETACH DATABASE default")
        self._base.query(
            "ATTACH DATABASE default" if kept else "CREATE DATABASE default ENGINE = Atomic"
        )
        self._base.query("USE default")

    def _connect(self) -> Any:
        """A new connection; recreates the database `default` if it was dropped, since connections need it."""
        try:
            return self._open_connection()
        except RuntimeError as error:
            if "Database default does not exist" not in str(error):
                raise
            self._base.query("CREATE DATABASE IF NOT EXISTS default ENGINE = Atomic")
            return self._open_connection()

    def permit(self, sql: str, settings: Iterable[str], *, reader: bool) -> None:
        """Raise `ClickHouseError` unless SQL and settings are allowed (permission.py).

        `sql` is one statement, an INSERT without its data. `reader`: it may only read.
        """
        self._permission.require_settings(settings)
        known = len(sql) <= REMEMBERED_BYTES
        verdict = self._cached_verdict(sql, reader) if known else self._verdict(sql, reader)
        if verdict is not None:
            raise verdict.with_traceback(None)

    def permit_table(self, table: external.Table) -> None:
        """Raise `ClickHouseError` unless the external table has plain columns and an allowed format."""
        require_format(table.format)
        self._permission.require_columns(table.columns, f"the external table {table.name}")

    def _verdict(self, sql: str, reader: bool) -> ClickHouseError | None:
        """The refusal of a statement; None if it may run."""
        try:
            try:
                tree = self.syntax_tree(sql)
            except ClickHouseError as error:
                unsupported = _UNSUPPORTED.search(str(error))
                if unsupported is None:
                    raise
                self._require_without_tree(sql, unsupported[1], reader)
            else:
                self._permission.require(tree, reader=reader)
        except ClickHouseError as error:
            return error
        return None

    def _require_without_tree(self, sql: str, kind: str, reader: bool) -> None:
        """Check a statement for which the engine has no JSON syntax tree."""
        formatted = self._ask_parser("SELECT formatQuerySingleLine({sql:String})", sql)
        if about := _ABOUT_NAMES.fullmatch(formatted):
            if about["format"]:
                require_format(about["format"])
        elif kind == "DescribeQuery" and (described := _DESCRIBE.fullmatch(formatted)):
            table = described["table"]  # as the engine formats it; nothing is run
            tree = self.syntax_tree(f"SELECT * FROM {table}")  # noqa: S608
            self._permission.require(tree, reader=reader)
        else:
            raise not_listed(f"the statement, or a part of it, {kind}")

    def syntax_tree(self, sql: str) -> Mapping[str, Any]:
        """The engine's syntax tree of a statement. Raises `ClickHouseError` for a syntax error."""
        try:
            tree: Mapping[str, Any] = json.loads(
                self._ask_parser("SELECT parseQueryToJSON({sql:String})", sql)
            )
        except RecursionError as error:
            raise ClickHouseError(168, "TOO_DEEP_AST", "The query is nested too deeply") from error
        return tree

    def _ask_parser(self, question: str, sql: str) -> str:
        """Run a query about the text `sql` on a connection for parsing."""
        try:
            parser = self._parsers.get_nowait()
        except queue.Empty:
            parser = self._connect()
            parser.query(_PARSE_LIMITS)
        try:
            with self._translated():
                answer = parser.query(question, "TabSeparatedRaw", params={"sql": _escaped(sql)})
        except ClickHouseError as error:
            sentence = error.sentence.partition(_WITHIN)[0]
            raise ClickHouseError(error.code, error.name, sentence) from None
        finally:
            self._parsers.put(parser)
        return str(answer.bytes().decode(errors="replace")).rstrip("\n")

    def _known_names(self) -> Known:
        def names(question: str) -> list[str]:
            return str(self._base.query(question, "TabSeparatedRaw").bytes().decode()).split()

        return Known(
            functions=frozenset(names("SELECT name FROM system.functions")),
            table_functions=frozenset(names("SELECT name FROM system.table_functions")),
            higher_order=frozenset(names("SELECT name FROM system.functions WHERE higher_order")),
            combinators=tuple(names("SELECT name FROM system.aggregate_function_combinators")),
        )

    def query(self, request: Request, statement: Statement, sql: str) -> Answer:
        """Prepare a statement; the first `fetch` runs it and raises its errors."""
        return Answer(self._pieces(request, statement, sql), lambda: self.kill(request.tag))

    def _pieces(
        self, request: Request, statement: Statement, sql: str
    ) -> Generator[tuple[bytes, Progress], None, None]:
        """Run a statement and yield its answer, streamed if format and statement permit."""
        output_format = (statement.format or request.default_format).lower()
        in_pieces = (
            statement.streams
            and not request.buffered
            and output_format in CHUNKED_FORMATS
            and _ONLY_WHOLE.isdisjoint(request.settings)
        )
        versioned = output_format == "native" and request.native_version > 0
        if versioned and statement.selects:
            request = dataclasses.replace(request, settings={**_PLAIN_TYPES, **request.settings})
        with (
            self._connection(request, statement) as (connection, fresh),
            nullcontext() if statement.reads_only else self._changing(statement),
        ):
            run = _Run(connection, request.parameters, in_pieces=in_pieces)
            if not versioned:
                yield from run.answer(sql, request.default_format)
            elif statement.selects:
                text = statement.without_format(sql)
                cached = fresh and not request.tables and len(text) <= REMEMBERED_BYTES
                yield from self._native(run, request, text, cached=cached)
            else:
                yield from self._native_of_other(run, request, statement, sql)

    @contextmanager
    def _changing(self, statement: Statement) -> Iterator[None]:
        """Context manager of a statement that writes, and may change the types of columns."""
        with (
            nullcontext() if statement.inserts else self._definitions.changing(),
            self._failed_writes.watched(),
        ):
            yield

    def _native(
        self, run: _Run, request: Request, select: str, *, cached: bool
    ) -> Generator[tuple[bytes, Progress], None, None]:
        """Run a SELECT without FORMAT and yield its answer in Native for the request's protocol version."""
        state = self._definitions.state
        key = (
            *(state, request.database, select),
            *(tuple(request.settings.items()), tuple(request.parameters.items())),
        )
        cached = cached and state is not None
        columns = self._columns.get(key) if cached else None
        if columns is None:
            columns = run.describe(select)
        if cached:
            if len(self._columns) >= REMEMBERED:
                self._columns.clear()
            self._columns[key] = columns
        blocks = native.Blocks(columns, request.native_version)
        try:
            for piece, progress in run.answer(select, "Buffers"):
                yield blocks.feed(piece), progress
            blocks.finish()
        except ValueError as error:
            raise _changed() from error
        # columns of s3() may be those of an object that has changed
        unchanged = (
            state is not None and state == self._definitions.state and not self._object_store
        )
        if not unchanged and run.describe(select) != columns:
            raise _changed()

    def _native_of_other(
        self, run: _Run, request: Request, statement: Statement, sql: str
    ) -> Generator[tuple[bytes, Progress], None, None]:
        """The same of any other statement, which is run once: its rows become those of a SELECT."""
        with_types = "TabSeparatedWithNamesAndTypes"
        pieces = list(run.answer(statement.with_format(sql, with_types), with_types))
        text = b"".join(piece for piece, _ in pieces)
        if text:
            rows = _Run(run.connection, {"rows": _escaped(as_text(text))}, in_pieces=False)
            select = f"SELECT * FROM format({with_types}, {{rows:String}})"  # noqa: S608 - no user text
            for piece, _ in self._native(rows, request, select, cached=False):
                yield piece, pieces[0][1]
        else:
            yield pieces[0]

    def insert(
        self, request: Request, statement: Statement, header: str, data: IO[bytes]
    ) -> Progress:
        """Run an INSERT with the data of a file. Raises `ClickHouseError` with the engine's text.

        The engine reads the file itself, in pieces, as INSERT … FROM INFILE: unlike its streaming insert
        (`send_insert`), that reports failures at any stage. The file is named by a descriptor, duplicated for this
        call.
        """
        if statement.format is None or statement.format.lower() == "values":
            request = self._with_expressions(request, data)
        with (
            self._connection(_as_of_a_file(request), statement) as (connection, _),
            self._failed_writes.watched(),
            _descriptor(data) as source,
        ):
            result = connection.query(
                as_bytes(
                    f"{header}\nFROM INFILE '/dev/fd/{source}' COMPRESSION 'none'"
                    f"\n{statement.settings}\nFORMAT {statement.format}"
                ),
                params=_plain(request.parameters),
            )
        written = _progress(result)
        return Counter({name: written[name] for name in _OF_AN_INSERT})

    def _with_expressions(self, request: Request, data: IO[bytes]) -> Request:
        """Let the engine evaluate expressions in VALUES if all are allowed; by default it evaluates none.

        Raises `ClickHouseError` for an expression that is not allowed.
        """
        begin = data.tell()
        text = data.read(LITERAL_VALUES_BYTES + 1)
        data.seek(begin)
        if len(text) > LITERAL_VALUES_BYTES:
            return request
        if _LITERALS.fullmatch(text) is None:
            if len(text) > EXPRESSION_VALUES_BYTES:
                return request
            rows = text.decode(errors="replace").strip().removesuffix(";")
            verdict = self._verdict(f"SELECT {rows}", reader=False)
            if verdict is not None and verdict.code != _SYNTAX_ERROR:
                raise verdict.with_traceback(None)
            if verdict is not None:
                return request
        evaluated = {"input_format_values_interpret_expressions": "1"}
        return dataclasses.replace(request, settings={**request.settings, **evaluated})

    def kill(self, tag: str) -> None:
        """Ask the engine to end the query of a request, without waiting for the end."""
        self._kill(f"Settings['{_TAG}'] = {_literal(tag)}")

    def progress(self, tag: str) -> str:
        """The progress of a request's running query, as JSON; empty if it does not run."""
        return self._ask_parser(_PROGRESS, tag)

    def end_queries(self, patience_s: float) -> bool:
        """Refuse new queries and kill the running ones; False if one did not end in time."""
        with self._guard:
            self._closing = True
        deadline = time.monotonic() + patience_s
        while not self._wait_idle(0):
            if time.monotonic() > deadline:
                return False
            self._kill("1")
            self._wait_idle(0.2)
        return True

    def close(self) -> None:
        """Close the engine and release the folder. Queries must have ended."""
        self._failed_writes.stop()
        for session in self._sessions.values():
            if session.connection is not None:
                session.connection.close()
        while not self._parsers.empty():
            self._parsers.get_nowait().close()
        self._base.close()
        self._lock.release()

    def _count_failed_writes(self) -> int:
        asked = "SELECT value FROM system.events WHERE event = {sql:String}"
        return int(
            self._ask_parser(asked, _FAILED) or 0
        )  # the engine has no row for a zero counter

    def _merging_since(self, seconds: float) -> int:
        asked = "SELECT count() FROM system.merges WHERE elapsed >= {sql:String}::Float64"
        return int(self._ask_parser(asked, str(seconds)))

    def _wait_idle(self, timeout_s: float) -> bool:
        with self._idle:
            return self._idle.wait_for(lambda: self._running == 0, timeout_s)

    def _kill(self, condition: str) -> None:
        connection = self._connect()
        try:
            connection.query(f"KILL QUERY WHERE query_id != queryID() AND ({condition}) ASYNC")
        finally:
            connection.close()

    @contextmanager
    def _connection(self, request: Request, statement: Statement) -> Iterator[tuple[Any, bool]]:
        """A connection to run on, and whether it is a new one."""
        with self._guard:
            if self._closing:
                raise ClickHouseError(236, "ABORTED", "The server is shutting down")
            self._running += 1
        try:
            self.require_folder()
            with self._translated(), self._memory(request) as memory:
                if request.session_id:
                    with self._session(request, statement, memory) as connection_and_freshness:
                        yield connection_and_freshness
                else:
                    with self._new_connection(request, memory) as connection:
                        yield connection, True
            self.require_folder()  # if it vanished meanwhile, nothing was stored
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    @contextmanager
    def _memory(self, request: Request) -> Iterator[external.Reservation | None]:
        """The memory for the request's external tables; None if it has none."""
        if not request.tables:
            yield None
            return
        with self._external_memory.reserved() as memory:
            yield memory

    @contextmanager
    def _new_connection(
        self, request: Request, memory: external.Reservation | None
    ) -> Iterator[Any]:
        """A connection for this request alone."""
        connection = self._connect()
        try:
            self._prepare(connection, request, memory)
            yield connection
        finally:
            connection.close()

    def require_folder(self) -> None:
        """Raise `ClickHouseError` if the data folder is gone: the engine would recreate it empty."""
        if _identity_of(self._path) != self._folder:
            raise ClickHouseError(
                425,
                "SYSTEM_ERROR",
                f"The data folder {self._path} is gone: it is not mounted, or was removed or replaced."
                " Bring it back; nothing is read or written meanwhile",
            )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        import chdb

        try:
            yield
        except (RuntimeError, chdb.ChdbError) as error:
            raise ClickHouseError.from_engine(str(error)) from error
        except UnicodeDecodeError as error:  # an error text that quotes binary data
            raise ClickHouseError.from_engine(error.object.decode(errors="replace")) from error

    @contextmanager
    def _session(
        self, request: Request, statement: Statement, memory: external.Reservation | None
    ) -> Iterator[tuple[Any, bool]]:
        """The session's connection, exclusively; a temporary one while the session has no state."""
        session = self._find_session(request)
        if not session.lock.acquire(blocking=False):
            raise ClickHouseError(
                373,
                "SESSION_IS_LOCKED",
                f"Session {request.session_id} is locked by a concurrent client",
            )
        try:
            if session.connection is None and not statement.keeps_state:
                with self._new_connection(request, memory) as connection:
                    yield connection, True
                return
            if session.connection is None:
                session.connection = self._connect()
            if (
                request.readonly
                and not statement.reads_only
                and statement.verb not in {"SET", "USE"}
            ):
                raise ClickHouseError(
                    164, "READONLY", "default: Cannot execute query in readonly mode."
                )
            with _restored(session.connection, request, keep_database=statement.verb == "USE"):
                try:
                    self._prepare(session.connection, request, memory, lock_down=False)
                    yield session.connection, False
                finally:
                    for table in memory.tables if memory else ():
                        session.connection.query(f"DROP TEMPORARY TABLE {table}")
        finally:
            session.last_used = time.monotonic()
            session.lock.release()

    def _find_session(self, request: Request) -> _Session:
        """Find or create a session, and close expired ones."""
        now = time.monotonic()
        key = (request.reader, request.session_id)
        with self._guard:
            for name, session in list(self._sessions.items()):
                if now - session.last_used > session.timeout_s and not session.lock.locked():
                    if session.connection is not None:
                        session.connection.close()
                    del self._sessions[name]
            if request.session_must_exist and key not in self._sessions:
                raise ClickHouseError(
                    372, "SESSION_NOT_FOUND", f"Session {request.session_id} not found"
                )
            session = self._sessions.setdefault(key, _Session())
            session.last_used = now
            session.timeout_s = request.session_timeout_s
        return session

    def _prepare(
        self,
        connection: Any,
        request: Request,
        memory: external.Reservation | None,
        *,
        lock_down: bool = True,
    ) -> None:
        """Set the database and the request's settings on a connection, and create its external tables."""
        if request.database:
            connection.query(f"USE {_identifier(request.database)}")
        settings = {_TAG: request.tag, **request.settings}
        if lock_down and request.readonly and settings.get("readonly", "0") == "0":
            settings["readonly"] = "2"
        readonly = {"readonly": settings.pop("readonly")} if "readonly" in settings else {}
        if memory is None:
            _set(connection, {**settings, **readonly})  # it last, since nothing can be set after it
            return
        _set(connection, settings)
        memory.shrink(sum(_create(connection, request, memory, table) for table in request.tables))
        if readonly:
            _set(connection, readonly)


def _set(connection: Any, settings: Mapping[str, str]) -> None:
    assignments = (f"{_name(name)} = {_literal(value)}" for name, value in settings.items())
    connection.query("SET " + ", ".join(assignments))


def _create(
    connection: Any, request: Request, memory: external.Reservation, table: external.Table
) -> int:
    """Create and fill an external table; returns the bytes of its rows."""
    name = _identifier(table.name)
    connection.query(f"CREATE TEMPORARY TABLE {name} ({table.columns}\n) ENGINE = Memory")
    memory.tables.append(name)
    if not os.fstat(table.data.fileno()).st_size:
        return 0
    own = request.settings.get("max_memory_usage", "")
    wanted = int(own[:20]) if own.isdecimal() else 0
    limit = min(wanted or external.REQUEST_BYTES, external.REQUEST_BYTES)
    with _descriptor(table.data) as source:
        result = connection.query(
            f"INSERT INTO {name} FROM INFILE '/dev/fd/{source}' COMPRESSION 'none'"
            f" SETTINGS max_memory_usage = {limit} FORMAT {table.format}"
        )
    return int(result.bytes_written())


@contextmanager
def _descriptor(data: IO[bytes]) -> Iterator[int]:
    """Context manager: a descriptor of a file's beginning, for the engine to read it by name."""
    source = os.dup(data.fileno())
    try:
        os.lseek(source, 0, os.SEEK_SET)
        yield source
    finally:
        os.close(source)


def _identity_of(path: Path) -> tuple[int, int] | None:
    """Device and inode of the folder's lock file; None if it does not exist."""
    try:
        found = (path / "lock").stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _keep_default_database(engine_path: Path) -> bool:
    """Whether the folder already has a database `default`; ensures that the engine finds it.

    ClickHouse links `metadata/default` to the database's folder when its first table is created, and the
    engine looks only for the link. So a database that never had a table gets its link here.
    """
    definition = engine_path / "metadata" / "default.sql"
    if not definition.exists():
        return False
    link = definition.with_suffix("")
    if not link.is_symlink():
        found = re.search(r"UUID '([0-9a-f-]{36})'", definition.read_text())
        if found is None:
            raise StoreError(f"{definition} has no UUID: the data folder is damaged.")
        target = Path("store") / found[1][:3] / found[1]
        (engine_path / target).mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("..") / target, target_is_directory=True)
    return True


@contextmanager
def _restored(connection: Any, request: Request, *, keep_database: bool) -> Iterator[None]:
    """Context manager: restore a session's settings and database after a request with its own."""
    rows = connection.query(
        "SELECT name, value, changed FROM system.settings WHERE has({names:Array(String)}, name)",
        "JSONCompactEachRow",
        params={"names": "[" + ",".join(_literal(name) for name in request.settings) + "]"},
    )
    before = {
        name: (value, changed)
        for name, value, changed in map(json.loads, rows.bytes().splitlines())
    }
    database = connection.query("SELECT currentDatabase()", "JSONCompactEachRow")
    home = json.loads(database.bytes())[0]
    try:
        yield
    finally:
        back = [
            f"{name} = {_literal(value) if changed else 'DEFAULT'}"
            for name, (value, changed) in before.items()
        ]
        if back:
            connection.query("SET " + ", ".join(back))
        if request.database and not keep_database:
            connection.query(f"USE {_identifier(home)}")


def _as_of_a_file(request: Request) -> Request:
    """The request with the block size of an insert whose data is in the statement."""
    size = request.settings.get("max_insert_block_size", "")
    if not size.isdecimal() or not 0 < int(size[:20]) < BLOCK_ROWS:
        return request
    return dataclasses.replace(request, settings={"max_block_size": size, **request.settings})


def _progress(result: Any) -> Progress:
    return Counter(
        read_rows=result.storage_rows_read(),
        read_bytes=result.storage_bytes_read(),
        written_rows=result.rows_written(),
        written_bytes=result.bytes_written(),
        result_rows=result.rows_read(),
        result_bytes=result.bytes_read(),
        elapsed_ns=int(result.elapsed() * 1e9),
    )


def _name(name: str) -> str:
    if not _SETTING_NAME.fullmatch(name):
        raise ClickHouseError(115, "UNKNOWN_SETTING", f"Unknown setting '{name}'")
    return name


def _literal(value: str) -> str:
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _escaped(value: str) -> str:
    """A text as a parameter's value, escaped as in TabSeparated."""
    return value.translate(_ESCAPES)


def _plain(parameters: Mapping[str, str]) -> dict[str, str]:
    """Parameters' values, which are escaped already, without bytes that are not UTF-8."""
    return {name: value.translate(_OTHER_BYTES) for name, value in parameters.items()}


_OTHER_BYTES = {0xDC00 + byte: f"\\x{byte:02X}" for byte in range(0x80, 0x100)}
"""The escapes of the lone surrogates of `as_text`."""
_ESCAPES = _OTHER_BYTES | str.maketrans(
    {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r", "\0": "\\0", "'": "\\'"}
)


def _identifier(name: str) -> str:
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"


def make_writable(path: Path) -> None:
    """Create the folder if it is missing. Raises `StoreError` if it cannot be written or the disk is full."""
    if any(sign in str(path) for sign in "?&<>\\"):
        raise StoreError(f"The data folder {path} has one of ? & < > \\ in its name: give another.")
    try:
        path.mkdir(mode=0o750, parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.write_bytes(b"1")
        probe.unlink()
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise StoreError(
            f"The data folder {path} cannot be written: {error.strerror or error}."
            " Correct its permissions or its disk, or give another --path."
        ) from error
    if free < MINIMUM_FREE_BYTES:
        raise StoreError(
            f"The disk of {path} has {free // 2**20} MiB left; the embedded ClickHouse needs"
            f" {MINIMUM_FREE_BYTES // 2**20} MiB. Make room, or give another --path."
        )

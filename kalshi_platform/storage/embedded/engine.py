"""The engine: one data folder, a connection for each request, sessions, cancelling.

A fresh connection costs well under a millisecond and carries its own settings, current database
and temporary tables, so nothing of one request can reach the next. Only a session that was told
to remember something (SET, USE, a temporary table) keeps a connection.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import filelock

from kalshi_platform.storage.embedded.answers import ClickHouseError
from kalshi_platform.storage.embedded.statement import Statement
from kalshi_platform.storage.errors import StoreError

log = logging.getLogger(__name__)

MINIMUM_FREE_BYTES = 256 * 1024 * 1024
"""The engine does not start with less room on its disk: a full one can lose merges half-way."""
INSERT_PIECE_BYTES = 4 * 1024 * 1024
"""Data is handed to the engine in pieces of this size, always the same, so that a repeated
INSERT makes the same blocks and `insert_deduplication_token` recognises them."""
ANSWER_PIECE_BYTES = 1024 * 1024
CHUNKED_FORMATS = frozenset(
    {"native", "rowbinary", "tabseparated", "tsv", "tabseparatedraw", "tsvraw", "csv"}
    | {"jsoneachrow", "jsonlines", "ndjson", "jsonstringseachrow", "jsoncompacteachrow"}
    | {"jsoncompactstringseachrow"}
)
"""Formats without head or foot: the engine's pieces, one after the other, are the whole answer."""
SESSION_TIMEOUT_S = 60
_ONLY_WHOLE = frozenset({"extremes", "output_format_json_array_of_rows"})
"""Settings that add to an answer what its pieces do not have."""
_SETTING_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TAG = "query_cache_tag"
"""A setting without effect unless the query cache is used: carries the request's number, by which
a running query is found and killed. A request that sets it itself cannot be cancelled."""

_CONFIG = """<clickhouse>
  <logger><level>fatal</level></logger>
  <users_config>{users}</users_config>
  <user_files_path>{user_files}/</user_files_path>
  <!-- as migrations would set it table by table: see migrations._leave_statistics_out -->
  <merge_tree><auto_statistics_types></auto_statistics_types></merge_tree>
</clickhouse>
"""
_USERS = """<clickhouse>
  <profiles><default>
    <implicit_select>0</implicit_select>
    <allow_introspection_functions>0</allow_introspection_functions>
    <!-- no compiling: a question's fourth run would take four times as long, for a tenth off long scans -->
    <compile_expressions>0</compile_expressions>
    <compile_aggregate_expressions>0</compile_aggregate_expressions>
    <compile_sort_description>0</compile_sort_description>
  </default></profiles>
  <users><default>
    <password></password>
    <profile>default</profile>
    <quota>default</quota>
    <grants>
      <query>GRANT ALL ON *.*</query>
      <query>REVOKE FILE, SQLITE ON *.*</query>
      <query>REVOKE TABLE ENGINE ON Python</query>
      <query>REVOKE SYSTEM SHUTDOWN ON *.*</query>
    </grants>
  </default></users>
  <quotas><default/></quotas>
</clickhouse>
"""


@dataclass(frozen=True)
class Request:
    """What to run, and under which conditions."""

    database: str
    """Current database; empty for the default one."""
    settings: Mapping[str, str]
    parameters: Mapping[str, str]
    """Values of `{name:Type}`, in ClickHouse's escaped form."""
    default_format: str
    readonly: bool
    session_id: str = ""
    session_timeout_s: float = SESSION_TIMEOUT_S
    session_must_exist: bool = False
    buffered: bool = False
    """Hold the whole answer back until the query has ended (`wait_end_of_query`)."""
    tag: str = field(default_factory=lambda: uuid.uuid4().hex)


Progress = Counter[str]
"""Work done, as the engine counts it, under the names of `X-ClickHouse-Summary`. What it does not
count is missing, not zero."""


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
        """The next piece, with the work done so far; None at the end. At least one piece comes.

        Raises `ClickHouseError`, after which the answer is ended.
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
        """End the query, whatever another thread is fetching."""
        if not self._ended:
            self._kill()
        with self._lock:
            self._ended = True
            self._pieces.close()


@dataclass
class _Session:
    lock: threading.Lock = field(default_factory=threading.Lock)
    connection: Any = None
    last_used: float = 0.0
    timeout_s: float = SESSION_TIMEOUT_S


class Engine:
    """The chDB engine on one data folder, held exclusively while open. Thread-safe."""

    def __init__(self, path: Path) -> None:
        """Open the folder, creating it where it is missing. Raises `StoreError`."""
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
        """Which folder it is, wherever its path leads meanwhile."""
        try:
            self._open(path)
        except BaseException:
            self._lock.release()
            raise
        self._sessions: dict[str, _Session] = {}
        self._guard = threading.Lock()
        self._running = 0
        self._idle = threading.Condition(self._guard)
        self._closing = False

    def _open(self, path: Path) -> None:
        temporary = path / "tmp"
        for folder in (self.spool, temporary):
            shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
        for folder in (self.spool, temporary, path / "engine", path / "user_files"):
            folder.mkdir(exist_ok=True)
        os.environ["TMPDIR"] = str(temporary)  # loading the engine makes a temporary folder
        import chdb  # half a gigabyte: loaded when it is needed

        users, config = path / "users.xml", path / "config.xml"
        users.write_text(_USERS)
        config.write_text(_CONFIG.format(users=users, user_files=path / "user_files"))
        connect: Callable[[str], Any] = chdb.connect
        self._open_connection = functools.partial(
            connect, f"{path / 'engine'}?config-file={config}"
        )
        kept = _keep_default_database(path / "engine")
        try:
            self._keeper = self._open_connection()  # the engine lives as long as a connection does
            self._make_default_database_plain(kept)
            row = self._keeper.query("SELECT version(), timezone(), hostName()", "TabSeparated")
        except (RuntimeError, chdb.ChdbError) as error:
            raise StoreError(
                f"The embedded ClickHouse cannot open its data folder {path}: {error}"
            ) from error
        self.version, self.timezone, self.host_name = row.bytes().decode().rstrip("\n").split("\t")

    def _make_default_database_plain(self, kept: bool) -> None:
        """Make `default` an ordinary database: as the engine opens it, unknown tables are files."""
        self._keeper.query("USE system")
        self._keeper.query("DETACH DATABASE default")
        self._keeper.query(
            "ATTACH DATABASE default" if kept else "CREATE DATABASE default ENGINE = Atomic"
        )
        self._keeper.query("USE default")

    def _connect(self) -> Any:
        """A fresh connection; brings back the database `default`, without which there is none."""
        try:
            return self._open_connection()
        except RuntimeError as error:
            if "Database default does not exist" not in str(error):
                raise
            self._keeper.query("CREATE DATABASE IF NOT EXISTS default ENGINE = Atomic")
            return self._open_connection()

    def query(self, request: Request, statement: Statement, sql: str) -> Answer:
        """Begin a statement; nothing runs before the first `fetch`, which gives its errors too."""
        return Answer(self._pieces(request, statement, sql), lambda: self.kill(request.tag))

    def _pieces(
        self, request: Request, statement: Statement, sql: str
    ) -> Generator[tuple[bytes, Progress], None, None]:
        output_format = statement.format or request.default_format
        in_pieces = (
            statement.streams
            and not request.buffered
            and output_format.lower() in CHUNKED_FORMATS
            and _ONLY_WHOLE.isdisjoint(request.settings)
        )
        parameters = dict(request.parameters)
        with self._connection(request, statement) as (connection, fresh):
            if not in_pieces or not fresh:
                result = connection.query(sql, request.default_format, params=parameters)
                progress = _progress(result)
                view = memoryview(result.get_memview().view()) if result.size() else memoryview(b"")
                for begin in range(0, max(len(view), 1), ANSWER_PIECE_BYTES):
                    yield bytes(view[begin : begin + ANSWER_PIECE_BYTES]), progress
                return
            done: Progress = Counter()
            with connection.send_query(sql, request.default_format, params=parameters) as stream:
                for piece in stream:
                    done.update(_progress(piece))  # each piece is counted anew
                    yield piece.bytes(), done
            if not done:
                yield b"", done

    def insert(
        self, request: Request, statement: Statement, header: str, data: IO[bytes]
    ) -> Progress:
        """Run an INSERT with the data that follows, read in pieces. Raises `ClickHouseError`."""
        with self._connection(request, statement) as (connection, _):
            for name, value in request.parameters.items():
                connection.query(f"SET param_{_name(name)} = {_literal(value)}")
            with connection.send_insert(header, statement.format or "Values") as stream:
                while piece := data.read(INSERT_PIECE_BYTES):
                    stream.append(piece)
                done = stream.finish()
        return Counter(
            written_rows=done.rows_written,
            written_bytes=done.bytes_written,
            elapsed_ns=int(done.elapsed * 1e9),
        )

    def kill(self, tag: str) -> None:
        """Ask the engine to end the query of a request; returns at once, ended or not."""
        self._kill(f"Settings['{_TAG}'] = {_literal(tag)}")

    def end_queries(self, patience_s: float) -> bool:
        """Take no new query and kill the running ones; False where one did not end in time."""
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
        """Close the engine and let go of the folder. Queries must have ended."""
        for session in self._sessions.values():
            if session.connection is not None:
                session.connection.close()
        self._keeper.close()
        self._lock.release()

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
        """A connection to run on, and whether it is a fresh one."""
        with self._guard:
            if self._closing:
                raise ClickHouseError(236, "ABORTED", "The server is shutting down")
            self._running += 1
        try:
            self._insist_on_folder()
            with self._translated():
                if request.session_id:
                    with self._session(request, statement) as connection_and_freshness:
                        yield connection_and_freshness
                else:
                    connection = self._connect()
                    try:
                        self._prepare(connection, request)
                        yield connection, True
                    finally:
                        connection.close()
            self._insist_on_folder()  # what went meanwhile was not stored
        finally:
            with self._idle:
                self._running -= 1
                self._idle.notify_all()

    def _insist_on_folder(self) -> None:
        """The engine would make folders that are gone again, without what was in them."""
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

    @contextmanager
    def _session(self, request: Request, statement: Statement) -> Iterator[tuple[Any, bool]]:
        session = self._find_session(request)
        if session.connection is None and not statement.keeps_state:
            connection = self._connect()  # nothing to remember: as good as no session
            try:
                self._prepare(connection, request)
                yield connection, True
            finally:
                connection.close()
            return
        if not session.lock.acquire(blocking=False):
            raise ClickHouseError(
                373,
                "SESSION_IS_LOCKED",
                f"Session {request.session_id} is locked by a concurrent client",
            )
        try:
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
                self._prepare(session.connection, request, lock_down=False)
                yield session.connection, False
        finally:
            session.last_used = time.monotonic()
            session.lock.release()

    def _find_session(self, request: Request) -> _Session:
        now = time.monotonic()
        with self._guard:
            for name, session in list(self._sessions.items()):
                if now - session.last_used > session.timeout_s and not session.lock.locked():
                    if session.connection is not None:
                        session.connection.close()
                    del self._sessions[name]
            if request.session_must_exist and request.session_id not in self._sessions:
                raise ClickHouseError(
                    372, "SESSION_NOT_FOUND", f"Session {request.session_id} not found"
                )
            session = self._sessions.setdefault(request.session_id, _Session())
            session.last_used = now
            session.timeout_s = request.session_timeout_s
        return session

    def _prepare(self, connection: Any, request: Request, *, lock_down: bool = True) -> None:
        if request.database:
            connection.query(f"USE {_identifier(request.database)}")
        settings = {_TAG: request.tag, **request.settings}
        if lock_down and request.readonly and settings.get("readonly", "0") == "0":
            settings["readonly"] = "2"
        # last, for nothing can be set after it
        ordered = sorted(settings.items(), key=lambda item: item[0] == "readonly")
        assignments = ", ".join(f"{_name(name)} = {_literal(value)}" for name, value in ordered)
        connection.query(f"SET {assignments}")


def _identity_of(path: Path) -> tuple[int, int] | None:
    """Which file the folder's lock is; None where there is none."""
    try:
        found = (path / "lock").stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _keep_default_database(engine_path: Path) -> bool:
    """Whether the folder has a database `default` from before; sees to it that the engine finds it.

    ClickHouse links `metadata/default` to the database's folder when its first table is made; the
    engine looks for the link only. So a database that never had a table gets its link here.
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
    """Put a session's settings and database back after a request that had its own."""
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


def _identifier(name: str) -> str:
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"


def make_writable(path: Path) -> None:
    """Create the folder where it is missing. Raises `StoreError` where it cannot be written."""
    if any(sign in str(path) for sign in "?&<>"):
        raise StoreError(f"The data folder {path} has one of ? & < > in its name: give another.")
    try:
        path.mkdir(mode=0o750, parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.write_bytes(b"1")
        probe.unlink()
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise StoreError(
            f"The data folder {path} cannot be written: {error.strerror or error}."
            " Mend its permissions or its disk, or give another --path."
        ) from error
    if free < MINIMUM_FREE_BYTES:
        raise StoreError(
            f"The disk of {path} has {free // 2**20} MiB left; the embedded ClickHouse needs"
            f" {MINIMUM_FREE_BYTES // 2**20} MiB. Make room, or give another --path."
        )

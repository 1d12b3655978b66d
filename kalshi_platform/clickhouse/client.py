"""The ClickHouse client: connections, Arrow inserts, and the translation of errors.

All code that uses ClickHouse takes its client from `connect` and runs inside `translated`. The tables are in
migrations.py and schema.py; whether inserted rows are really stored is checked in verified_inserts.py.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

import clickhouse_connect
import pyarrow as pa
from clickhouse_connect.driver import exceptions as driver
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.summary import QuerySummary
from urllib3.exceptions import HTTPError

from kalshi_platform.clickhouse import tls, transport
from kalshi_platform.embedded_clickhouse import write_password
from kalshi_platform.embedded_clickhouse.write_password import READ_ONLY
from kalshi_platform.errors import StoreError, StoreRefused, StoreUnavailable
from kalshi_platform.loopback import is_loopback
from kalshi_platform.settings import Settings

__all__ = [
    "MINIMUM_VERSION",
    "TRANSIENT",
    "Client",
    "acknowledged",
    "broken_answer",
    "called_by",
    "comment",
    "connect",
    "insert_arrow",
    "password",
    "ping",
    "server_version",
    "translated",
]

MINIMUM_VERSION = (24, 8)
"""Oldest supported version of ClickHouse."""

CONNECT_TIMEOUT_S = 5
LOOK_TIMEOUT_S = 2.5
"""Timeout of a ping, which waits for no query."""

ON_CLUSTER: Mapping[str, Any] = {
    "distributed_foreground_insert": 1,  # an insert is acknowledged when every shard has its rows
    "distributed_product_mode": "global",  # IN and JOIN see the rows of all shards
}
"""Settings of every query if tables are Distributed (CLICKHOUSE_CLUSTER)."""

WIRE_CODEC = "lz4"
"""Compression of inserted Arrow batches: 10 to 30 % faster than none even on loopback, unlike zstd."""

TRANSIENT: Mapping[int, str] = {
    95: "CANNOT_READ_FROM_SOCKET",  # a connection between servers broke
    96: "CANNOT_WRITE_TO_SOCKET",  # the same, on the way out
    75: "CANNOT_WRITE_TO_FILE_DESCRIPTOR",  # disk full, until an operator frees space
    159: "TIMEOUT_EXCEEDED",  # the server was too slow
    173: "CANNOT_ALLOCATE_MEMORY",  # the machine is short of memory now
    198: "DNS_ERROR",  # the name server did not answer
    201: "QUOTA_EXCEEDED",  # a quota is reset at its next interval
    202: "TOO_MANY_SIMULTANEOUS_QUERIES",  # busy
    203: "NO_FREE_CONNECTION",  # busy
    209: "SOCKET_TIMEOUT",  # network
    210: "NETWORK_ERROR",  # network
    225: "NO_ZOOKEEPER",  # the cluster's coordination is starting
    236: "ABORTED",  # the server is shutting down
    241: "MEMORY_LIMIT_EXCEEDED",  # other queries hold the memory
    242: "TABLE_IS_READ_ONLY",  # a replica that has lost its coordination
    243: "NOT_ENOUGH_SPACE",  # disk full, until an operator frees space
    252: "TOO_MANY_PARTS",  # merges are behind
    279: "ALL_CONNECTION_TRIES_FAILED",  # no replica answers now
    285: "TOO_FEW_LIVE_REPLICAS",  # a quorum is missing now
    286: "UNSATISFIED_QUORUM_FOR_PREVIOUS_WRITE",  # the previous write is not replicated yet
    319: "UNKNOWN_STATUS_OF_INSERT",  # perhaps stored; the token makes sending it again safe
    341: "UNFINISHED",  # a distributed DDL still runs
    369: "ALL_REPLICAS_ARE_STALE",  # replicas are catching up
    394: "QUERY_WAS_CANCELLED",  # it was killed, or the server stops
    425: "SYSTEM_ERROR",  # the operating system refused: threads, files
    439: "CANNOT_SCHEDULE_TASK",  # no thread free
    473: "DEADLOCK_AVOIDED",  # a lock was not available in time
    499: "S3_ERROR",  # object storage under the table
    745: "SERVER_OVERLOADED",  # busy
    999: "KEEPER_EXCEPTION",  # coordination of a cluster
}
"""ClickHouse's error codes of transient failures, which a retry may survive. All others are permanent."""

for _name in ("clickhouse_connect", "urllib3"):  # what they log is raised, too
    logging.getLogger(_name).setLevel(logging.ERROR)

_WRONG_USER = {
    192,
    193,
    194,
    516,
}  # UNKNOWN_USER, WRONG_PASSWORD, REQUIRED_PASSWORD, AUTHENTICATION…
_UNKNOWN_TABLE, _UNKNOWN_DATABASE, _ACCESS_DENIED = 60, 81, 497
_CODE = re.compile(r"\bCode:\s*(\d+)")
_EXPECTED = re.compile(r"Expected one of: .{100,}", re.DOTALL)
"""The parser's list of every possible next word, useless if it is long."""
_NAME = re.compile(r"\(([A-Z][A-Z0-9_]+)\)\s*(\(version|$)")
_WORDS_OF_DRIVER = re.compile(
    r"^(Received ClickHouse exception, code: \d+, server response: )?(Code: \d+\. )?(DB::Exception: )?"
)
_TAIL_OF_DRIVER = re.compile(r"\s*(\(version [^()]*(\([^()]*\))?[^()]*\))?\s*(\(for url [^)]*\))?$")


_caller: ContextVar[Callable[[], Mapping[str, str]] | None] = ContextVar("caller", default=None)


@contextmanager
def called_by(identify: Callable[[], Mapping[str, str]]) -> Iterator[None]:
    """Context manager: queries of clients made in this thread name the caller in `log_comment`.

    `identify` is called when a client is made, so that one scope serves many callers.
    """
    before = _caller.get()
    _caller.set(identify)
    try:
        yield
    finally:
        _caller.set(before)


def comment(purpose: str) -> str:
    """The `log_comment` of the current caller: JSON with `what` (the purpose) and its ids, else the purpose alone."""
    identify = _caller.get()
    if identify is None:
        return purpose
    return json.dumps({"what": purpose, **identify()}, ensure_ascii=False)


def connect(
    settings: Settings,
    *,
    database: bool = True,
    log_comment: str = "",
    receive_timeout_s: int | None = None,
) -> Client:
    """A client of the configured ClickHouse; threads may share it.

    `database=False` leaves the database out, for a server where it does not exist yet.
    `log_comment` goes into every query's row of system.query_log, with the ids of `called_by`.
    `receive_timeout_s`: seconds without data after which a query is abandoned; by default
    CLICKHOUSE_TIMEOUT_SECONDS.
    Raises `StoreUnavailable` if the server is unreachable, `StoreRefused` for a wrong user, database or
    certificate.
    """
    secret = password(settings)
    client = _client(settings, secret, database, log_comment, receive_timeout_s)
    if not secret and (made := password(settings)):
        # at the first start the server wrote it meanwhile
        client.close()
        client = _client(settings, made, database, log_comment, receive_timeout_s)
    return client


def password(settings: Settings) -> str:
    """CLICKHOUSE_PASSWORD, else, for the embedded ClickHouse, its generated password; empty if there is none.

    Raises `StoreRefused` if the password file is not usable.
    """
    given = settings.clickhouse_password.get_secret_value()
    if given or not settings.embedded_clickhouse:
        return given
    return write_password.read(settings.embedded_clickhouse_dir) or ""


def _client(
    settings: Settings,
    secret: str,
    database: bool,
    log_comment: str,
    receive_timeout_s: int | None,
) -> Client:
    """Open a driver client with the platform's options."""
    url = urlsplit(settings.clickhouse_url)
    local = is_loopback(url.hostname or "")
    files = tls.certificates(settings)
    every_query = {
        **(ON_CLUSTER if settings.clickhouse_cluster is not None else {}),
        **({"log_comment": text} if (text := comment(log_comment)) else {}),
    }
    with translated(settings):
        return clickhouse_connect.get_client(
            interface="https" if url.scheme == "https" else "http",
            host=url.hostname or "",
            port=url.port or (8443 if url.scheme == "https" else 8123),
            proxy_path=url.path,
            username=settings.clickhouse_user,
            password=secret,
            database=settings.clickhouse_database if database else None,
            connect_timeout=CONNECT_TIMEOUT_S,
            send_receive_timeout=receive_timeout_s or settings.clickhouse_timeout_seconds,
            compress=False if local else "zstd",  # of answers
            pool_mgr=transport.pool_to(settings.clickhouse_url, **files),
            **files,
            # a client certificate is the login, unless there is a password
            tls_mode="strict" if "client_cert" in files and secret else None,
            autogenerate_session_id=False,  # a session serves one query at a time
            show_clickhouse_errors="scrub",
            tz_mode="aware",  # naive times would be ambiguous
            settings=every_query or None,
        )


def ping(settings: Settings) -> None:
    """Check that the configured ClickHouse answers; any answer counts.

    Raises `StoreUnavailable` if it is unreachable, or accepts the connection and does not answer in time.
    """
    pool = transport.pool_to(settings.clickhouse_url, **tls.certificates(settings))
    with translated(settings):
        pool.request(
            "GET", f"{settings.clickhouse_url}/ping", timeout=LOOK_TIMEOUT_S, retries=False
        )


def server_version(client: Client) -> tuple[int, int]:
    """Major and minor version of the server: (24, 8)."""
    major, minor = str(client.server_version).split(".")[:2]
    return int(major), int(minor)


def insert_arrow(
    client: Client,
    table: str,
    rows: pa.Table,
    token: str,
    settings: Mapping[str, Any] | None = None,
    *,
    log_comment: str = "",
) -> None:
    """Insert `rows` into `table` once: a second call with the same token adds nothing.

    The rows are sent as one Arrow record batch, with settings under which ClickHouse neither splits nor queues
    it. So equal rows make an equal block each time: one part for each partition (day) in it.
    Dictionary columns may go into UUID, Enum and LowCardinality columns. An empty table is not sent.
    `settings` are further ClickHouse settings of this insert.

    Returns when ClickHouse has acknowledged all rows (`acknowledged`). `verified_inserts` checks that they are
    stored.
    """
    if not rows.num_rows:
        return
    body = pa.BufferOutputStream()
    with pa.ipc.new_stream(
        body,
        rows.schema,
        options=pa.ipc.IpcWriteOptions(compression=WIRE_CODEC, unify_dictionaries=True),
    ) as stream:
        stream.write_table(rows.combine_chunks())
    with translated():
        summary = client.raw_insert(
            table,
            rows.column_names,
            body.getvalue().to_pybytes(),
            settings={
                "async_insert": 0,
                "distributed_foreground_insert": 1,
                **_deduplicate(client),
                "insert_deduplication_token": token,
                "max_insert_block_size": rows.num_rows,
                "min_insert_block_size_rows": rows.num_rows,
                "min_insert_block_size_bytes": 0,
                **({"log_comment": comment(log_comment)} if log_comment else {}),
                **(settings or {}),
            },
            fmt="ArrowStream",
        )
    acknowledged(client, table, summary, rows.num_rows)


def acknowledged(client: Client, table: str, summary: QuerySummary, rows: int) -> None:
    """Raise `StoreError` if the answer to an insert does not acknowledge all `rows` rows.

    `X-ClickHouse-Summary` must count at least that many written rows. Fewer mean that not all were forwarded,
    since an error has another answer. More are correct: rows of materialised views count too, and so do those
    that a Distributed table sends to its shards. ClickHouse counts before it looks at the token, so a block that
    it drops as a repetition counts as written: the figure means "stored", not "added". Only a queued insert counts
    0, and `async_insert` is 0 here. `transport` has checked that the answer is ClickHouse's own.
    """
    written = str(summary.summary.get("written_rows", ""))
    where = f"ClickHouse at {client.uri} answered HTTP 200 to {rows:,} rows of {table}, and"
    if not written.isdecimal():
        raise StoreRefused(
            f"{where} does not say how many it wrote (X-ClickHouse-Summary). A proxy between here and"
            " ClickHouse removes that header: check CLICKHOUSE_URL, or let it forward answers unchanged."
        )
    if int(written) < rows:
        raise StoreUnavailable(
            f"{where} says that it wrote {int(written):,}. A proxy between here and ClickHouse did not forward"
            " all of them, or answers by itself: check CLICKHOUSE_URL."
        )


def _deduplicate(client: Client) -> Mapping[str, Any]:
    """Enable deduplication regardless of the user's profile; version 26 renamed the setting."""
    new = "deduplicate_insert" in client.server_settings
    return {"deduplicate_insert": "enable"} if new else {"insert_deduplicate": 1}


@contextmanager
def translated(settings: Settings | None = None) -> Iterator[None]:
    """Context manager: turn errors of the driver and the network into a `StoreError` with a remedy.

    With `settings` the sentence names the server, the user and the database.
    """
    try:
        yield
    except StoreError:
        raise
    except driver.Error as error:
        raise _translate(error, settings) from error
    except (HTTPError, OSError) as error:
        if handshake := tls.refusal(error, settings):
            raise StoreRefused(handshake) from error
        raise StoreUnavailable(_unreachable(error, settings)) from error


def broken_answer(tail: bytes, tag: str) -> StoreError | None:
    """The error that ClickHouse appended to an answer that it aborted while streaming; None if it did not.

    `tail` is the end of the body, `tag` its X-ClickHouse-Exception-Tag.
    """
    _, begun, message = tail.decode(errors="replace").rpartition(f"__exception__\r\n{tag}\r\n")
    if not begun:
        return None
    text = message.split(f" {tag}\r\n__exception__")[0].rpartition("\n")[0]
    name = _NAME.search(text)
    code = _CODE.search(text)
    return _translate(
        driver.DatabaseError(
            text, code=int(code[1]) if code else None, name=name[1] if name else None
        ),
        None,
    )


def _translate(error: driver.Error, settings: Settings | None) -> StoreError:
    """Turn a driver error into a `StoreError`, by ClickHouse's error code if there is one."""
    message = str(error)
    code = error.code
    if code is None and (found := _CODE.search(message)):
        code = int(found[1])  # an error in the middle of a stream has its code only in the text
    if code is None:
        return _without_code(error, message, settings)
    name = error.name or TRANSIENT.get(code, "")
    label = f"{name} (code {code})" if name else f"code {code}"
    reason = " ".join(
        _EXPECTED.sub("", _TAIL_OF_DRIVER.sub("", _WORDS_OF_DRIVER.sub("", message))).split()
    )
    reason = reason.rstrip(" .").removesuffix(f"({name})").rstrip(" .")
    if code in TRANSIENT:
        return StoreUnavailable(
            f"ClickHouse is busy or degraded, {label}: {reason}.", code=code, name=name
        )
    if code in _WRONG_USER:
        sentence = (
            f"{_place(settings)} refused user {settings.clickhouse_user if settings else ''!r}:"
            " wrong password, or no such user. Check CLICKHOUSE_USER and CLICKHOUSE_PASSWORD."
        )
        if settings and settings.embedded_clickhouse:
            sentence += (
                " It was started with another CLICKHOUSE_PASSWORD, or on another data folder than"
                f" {settings.embedded_clickhouse_dir}: restart it with these settings, or set its password here."
            )
    elif code == _UNKNOWN_DATABASE:
        sentence = f"ClickHouse refused, {label}: {reason}. Create it: kalshi-platform migrate."
    elif code == _UNKNOWN_TABLE:
        sentence = (
            f"ClickHouse refused, {label}: {reason}."
            " If it is one of the platform's, create it: kalshi-platform migrate."
        )
    elif code == _ACCESS_DENIED:
        remedy = "" if READ_ONLY in reason else " Grant it to CLICKHOUSE_USER."
        sentence = f"ClickHouse refused, {label}: {reason}.{remedy}"
    else:
        sentence = f"ClickHouse refused, {label}: {reason}."
    return StoreRefused(sentence, code=code, name=name)


def _without_code(error: driver.Error, message: str, settings: Settings | None) -> StoreError:
    if handshake := tls.refusal(error, settings):
        return StoreRefused(handshake)
    if isinstance(error, driver.OperationalError):
        return StoreUnavailable(_unreachable(error, settings))
    return StoreRefused(f"ClickHouse client: {message.rstrip('.')}.")


def _unreachable(error: BaseException, settings: Settings | None) -> str:
    remedy = "Start it (kalshi-platform clickhouse), or check CLICKHOUSE_URL."
    if settings is not None and not settings.embedded_clickhouse:
        remedy = "Check CLICKHOUSE_URL, and that the server runs."
        if tls.may_require_a_certificate(error, settings):
            remedy += " If it requires a client certificate, set CLICKHOUSE_CLIENT_CERT_FILE."
    return f"{_place(settings)} cannot be reached ({_root(error)}). {remedy}"


def _place(settings: Settings | None) -> str:
    return f"ClickHouse at {settings.clickhouse_url}" if settings is not None else "ClickHouse"


def _root(error: BaseException) -> str:
    """The innermost cause as the system describes it, such as 'Connection refused'."""
    seen: list[BaseException] = []
    reason: BaseException | None = error
    while reason is not None and reason not in seen:
        seen.append(reason)
        inner = getattr(reason, "reason", None)
        reason = (
            inner if isinstance(inner, BaseException) else (reason.__cause__ or reason.__context__)
        )
    for cause in reversed(seen):
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    last = seen[-1]
    return (
        "time-out" if "timeout" in type(last).__name__.lower() else str(last) or type(last).__name__
    )

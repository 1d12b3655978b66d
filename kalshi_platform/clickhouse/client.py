"""The one ClickHouse client: how to connect, how to insert, and what its errors mean.

Everything that talks to ClickHouse takes its client from `connect` and runs inside `translated`.
Which tables there are is not said here (migrations.py), nor what goes into them (schema.py).
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
    "look",
    "password",
    "server_version",
    "translated",
]

MINIMUM_VERSION = (24, 8)
"""Oldest ClickHouse that the platform is made for."""

CONNECT_TIMEOUT_S = 5
LOOK_TIMEOUT_S = 2.5
"""For the answer to a ping, which waits for no query."""

ON_CLUSTER: Mapping[str, Any] = {
    "distributed_foreground_insert": 1,  # an insert is acknowledged when every shard has its rows
    "distributed_product_mode": "global",  # IN and JOIN see the rows of all shards
}
"""Settings of every query where tables are Distributed (CLICKHOUSE_CLUSTER)."""

WIRE_CODEC = "lz4"
"""Of inserted Arrow batches: a tenth to a third faster than none even on loopback, where zstd is not."""

TRANSIENT: Mapping[int, str] = {
    95: "CANNOT_READ_FROM_SOCKET",  # a connection between servers broke
    96: "CANNOT_WRITE_TO_SOCKET",  # the same, on the way out
    75: "CANNOT_WRITE_TO_FILE_DESCRIPTOR",  # disk full, until somebody makes room
    159: "TIMEOUT_EXCEEDED",  # too slow this time
    173: "CANNOT_ALLOCATE_MEMORY",  # the machine is short of memory now
    198: "DNS_ERROR",  # the name server did not answer
    201: "QUOTA_EXCEEDED",  # a quota begins anew with its interval
    202: "TOO_MANY_SIMULTANEOUS_QUERIES",  # busy
    203: "NO_FREE_CONNECTION",  # busy
    209: "SOCKET_TIMEOUT",  # network
    210: "NETWORK_ERROR",  # network
    225: "NO_ZOOKEEPER",  # the cluster's coordination is starting
    236: "ABORTED",  # the server is shutting down
    241: "MEMORY_LIMIT_EXCEEDED",  # other queries hold the memory
    242: "TABLE_IS_READ_ONLY",  # a replica that has lost its coordination
    243: "NOT_ENOUGH_SPACE",  # disk full, until somebody makes room
    252: "TOO_MANY_PARTS",  # merges are behind
    279: "ALL_CONNECTION_TRIES_FAILED",  # no replica answers now
    285: "TOO_FEW_LIVE_REPLICAS",  # a quorum is missing now
    286: "UNSATISFIED_QUORUM_FOR_PREVIOUS_WRITE",  # the write before is not through yet
    319: "UNKNOWN_STATUS_OF_INSERT",  # perhaps stored; the token makes sending it again safe
    341: "UNFINISHED",  # a distributed DDL still runs
    369: "ALL_REPLICAS_ARE_STALE",  # replicas are catching up
    394: "QUERY_WAS_CANCELLED",  # somebody killed it, or the server stops
    425: "SYSTEM_ERROR",  # the operating system refused: threads, files
    439: "CANNOT_SCHEDULE_TASK",  # no thread free
    473: "DEADLOCK_AVOIDED",  # a lock was not to be had in time
    499: "S3_ERROR",  # object storage under the table
    745: "SERVER_OVERLOADED",  # busy
    999: "KEEPER_EXCEPTION",  # coordination of a cluster
}
"""ClickHouse's codes that pass by themselves, or once somebody has made room. All others stay."""

for _name in ("clickhouse_connect", "urllib3"):  # what they warn of is raised, too
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
"""The parser's list of every word that could have come next: no help when it is long."""
_NAME = re.compile(r"\(([A-Z][A-Z0-9_]+)\)\s*(\(version|$)")
_WORDS_OF_DRIVER = re.compile(
    r"^(Received ClickHouse exception, code: \d+, server response: )?(Code: \d+\. )?(DB::Exception: )?"
)
_TAIL_OF_DRIVER = re.compile(r"\s*(\(version [^()]*(\([^()]*\))?[^()]*\))?\s*(\(for url [^)]*\))?$")


_caller: ContextVar[Callable[[], Mapping[str, str]] | None] = ContextVar("caller", default=None)


@contextmanager
def called_by(identify: Callable[[], Mapping[str, str]]) -> Iterator[None]:
    """While it lasts, queries of clients made in this thread say in `log_comment` who asked.

    `identify` gives the ids when a client is made, so that one scope serves many callers.
    """
    before = _caller.get()
    _caller.set(identify)
    try:
        yield
    finally:
        _caller.set(before)


def comment(what: str) -> str:
    """The `log_comment` of who asks now: JSON with `what` and the caller's ids, else `what` alone."""
    identify = _caller.get()
    if identify is None:
        return what
    return json.dumps({"what": what, **identify()}, ensure_ascii=False)


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
    `receive_timeout_s` is the silence after which a query is given up, CLICKHOUSE_TIMEOUT_SECONDS
    unless it is given here.
    Raises `StoreUnavailable` where nobody answers, `StoreRefused` on a wrong user, database or
    certificate.
    """
    secret = password(settings)
    client = _client(settings, secret, database, log_comment, receive_timeout_s)
    if not secret and (made := password(settings)):  # while it was connecting: the first start
        client.close()
        client = _client(settings, made, database, log_comment, receive_timeout_s)
    return client


def password(settings: Settings) -> str:
    """CLICKHOUSE_PASSWORD, else the embedded ClickHouse's own, for that alone; empty where there is none.

    Raises `StoreRefused` where the embedded ClickHouse's file is unfit.
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
    url = urlsplit(settings.clickhouse_url)
    local = is_loopback(url.hostname or "")
    files = tls.certificates(settings)
    every_query = {
        **(ON_CLUSTER if settings.clickhouse_cluster is not None else {}),
        **({"log_comment": said} if (said := comment(log_comment)) else {}),
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
            # a client certificate logs in by itself, unless there is a password
            tls_mode="strict" if "client_cert" in files and secret else None,
            autogenerate_session_id=False,  # a session serves one query at a time
            show_clickhouse_errors="scrub",
            tz_mode="aware",  # a time without a zone is a trap
            settings=every_query or None,
        )


def look(settings: Settings) -> None:
    """Ask whether the configured ClickHouse answers at all: any answer will do.

    Raises `StoreUnavailable` where it is away, or takes the connection and does not answer in time.
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

    The rows travel as one Arrow record batch, and ClickHouse is told neither to cut nor to queue it,
    so the same rows make the same block each time: one part for each partition (day) in it.
    Dictionary columns may go into UUID, Enum and LowCardinality columns. An empty table does
    nothing. `settings` are further ClickHouse settings of this insert.

    Returns when ClickHouse has acknowledged all rows (`acknowledged`). Whether they are there is another
    question, which `verified_inserts` asks.
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
    """Raise `StoreError` where the answer to an insert of `rows` rows does not say that they were taken.

    `X-ClickHouse-Summary` must say that at least so many were written: an error of any stage has another
    answer, so fewer mean that they were not all sent on. More are right: the rows that materialised views
    make count too, and so do those that a Distributed table hands to its shards. A block that is taken for
    the repetition of another one counts as if it were written, for the count is made before ClickHouse looks
    at the token: the same figure means "there", not "added". Only an insert that ClickHouse may queue says 0,
    and no insert of ours allows that (`async_insert` is 0). That the answer is ClickHouse's own, and its body
    empty, is what `transport` sees to.
    """
    written = str(summary.summary.get("written_rows", ""))
    where = f"ClickHouse at {client.uri} answered HTTP 200 to {rows:,} rows of {table}, and"
    if not written.isdecimal():
        raise StoreRefused(
            f"{where} does not say how many it wrote (X-ClickHouse-Summary). Something between here and"
            " ClickHouse takes that away: check CLICKHOUSE_URL, or let it pass answers on as they are."
        )
    if int(written) < rows:
        raise StoreUnavailable(
            f"{where} says that it wrote {int(written):,}. Something between here and ClickHouse did not send"
            " all of them on, or answers by itself: check CLICKHOUSE_URL."
        )


def _deduplicate(client: Client) -> Mapping[str, Any]:
    """Deduplication, whatever the user's profile says; the setting got a new name in version 26."""
    new = "deduplicate_insert" in client.server_settings
    return {"deduplicate_insert": "enable"} if new else {"insert_deduplicate": 1}


@contextmanager
def translated(settings: Settings | None = None) -> Iterator[None]:
    """Turn what the driver and the network raise into a `StoreError` with a sentence to act on.

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
        raise StoreUnavailable(_away(error, settings)) from error


def broken_answer(tail: bytes, tag: str) -> StoreError | None:
    """The error behind an answer that ClickHouse broke off while streaming it, if it did.

    `tail` is the end of the body, `tag` its X-ClickHouse-Exception-Tag.
    """
    _, begun, message = tail.decode(errors="replace").rpartition(f"__exception__\r\n{tag}\r\n")
    if not begun:
        return None
    said = message.split(f" {tag}\r\n__exception__")[0].rpartition("\n")[0]
    name = _NAME.search(said)
    code = _CODE.search(said)
    return _translate(
        driver.DatabaseError(
            said, code=int(code[1]) if code else None, name=name[1] if name else None
        ),
        None,
    )


def _translate(error: driver.Error, settings: Settings | None) -> StoreError:
    message = str(error)
    code = error.code
    if code is None and (found := _CODE.search(message)):
        code = int(found[1])  # a failure in the middle of a stream has it in the text alone
    if code is None:
        return _without_code(error, message, settings)
    name = error.name or TRANSIENT.get(code, "")
    label = f"{name} (code {code})" if name else f"code {code}"
    said = " ".join(
        _EXPECTED.sub("", _TAIL_OF_DRIVER.sub("", _WORDS_OF_DRIVER.sub("", message))).split()
    )
    said = said.rstrip(" .").removesuffix(f"({name})").rstrip(" .")
    if code in TRANSIENT:
        return StoreUnavailable(
            f"ClickHouse is busy or ailing, {label}: {said}.", code=code, name=name
        )
    if code in _WRONG_USER:
        sentence = (
            f"{_place(settings)} refused user {settings.clickhouse_user if settings else ''!r}:"
            " wrong password, or no such user. Check CLICKHOUSE_USER and CLICKHOUSE_PASSWORD."
        )
        if settings and settings.embedded_clickhouse:
            sentence += (
                " It was started with another CLICKHOUSE_PASSWORD, or on another data folder than"
                f" {settings.embedded_clickhouse_dir}: start it again from here, or set here what it has."
            )
    elif code == _UNKNOWN_DATABASE:
        sentence = f"ClickHouse refused, {label}: {said}. Create it: kalshi-platform migrate."
    elif code == _UNKNOWN_TABLE:
        sentence = (
            f"ClickHouse refused, {label}: {said}."
            " If it is one of the platform's, create it: kalshi-platform migrate."
        )
    elif code == _ACCESS_DENIED:
        remedy = "" if READ_ONLY in said else " Grant it to CLICKHOUSE_USER."
        sentence = f"ClickHouse refused, {label}: {said}.{remedy}"
    else:
        sentence = f"ClickHouse refused, {label}: {said}."
    return StoreRefused(sentence, code=code, name=name)


def _without_code(error: driver.Error, message: str, settings: Settings | None) -> StoreError:
    if handshake := tls.refusal(error, settings):
        return StoreRefused(handshake)
    if isinstance(error, driver.OperationalError):
        return StoreUnavailable(_away(error, settings))
    return StoreRefused(f"ClickHouse client: {message.rstrip('.')}.")


def _away(error: BaseException, settings: Settings | None) -> str:
    remedy = "Start it (kalshi-platform clickhouse), or check CLICKHOUSE_URL."
    if settings is not None and not settings.embedded_clickhouse:
        remedy = "Check CLICKHOUSE_URL, and that the server runs."
        if tls.may_want_a_certificate(error, settings):
            remedy += " If it wants a client certificate, set CLICKHOUSE_CLIENT_CERT_FILE."
    return f"{_place(settings)} cannot be reached ({_root(error)}). {remedy}"


def _place(settings: Settings | None) -> str:
    return f"ClickHouse at {settings.clickhouse_url}" if settings is not None else "ClickHouse"


def _root(error: BaseException) -> str:
    """The innermost reason, in the system's words: 'Connection refused'."""
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

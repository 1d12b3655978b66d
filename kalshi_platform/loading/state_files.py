"""Saved book states on disk, and checkpoints: the rows of all books at the beginning of an hour.

The state itself belongs in `book_state`; deciding which saved state to use belongs in `loader` and `rebuild`.
"""

from __future__ import annotations

import itertools
import logging
import re
import threading
from collections.abc import Container, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
import polars as pl
import pyarrow as pa

from kalshi_platform import durable, typed_json
from kalshi_platform.archive import HOUR_STATES, Archive
from kalshi_platform.arrow_columns import names, place, prices, quantities
from kalshi_platform.errors import PlatformError
from kalshi_platform.journal.clock import ReceiveClock
from kalshi_platform.loading.book_state import (
    LEVELS,
    Book,
    BookState,
    Connection,
    Ladders,
    with_level_fields,
)
from kalshi_platform.loading.market_clocks import SavedClocks, restored
from kalshi_platform.loading.sorted_levels import PACKED, SortedLevels
from kalshi_platform.loading.wire_drift import WireState
from kalshi_platform.schema import BOOK_CHECKPOINTS, TIME
from kalshi_platform.utc_hours import floor_hour, hour_start_ns

log = logging.getLogger(__name__)

BATCH_LEVELS = 1 << 16
"""Levels compressed at a time."""
CHECKPOINT_ROWS = 1 << 16
"""Rows of a checkpoint built at a time: about 20 MB."""
_LIVE = pl.Schema(
    {
        "market": pl.Int64,
        "market_ticker": pl.String,
        "conn": pl.String,
        "sid": pl.UInt32,
        "market_id": pl.String,
        "verified": pl.Boolean,
        "seq": pl.UInt64,
    }
)
"""The columns of a checkpoint that describe a book."""
_HOUR_STATE = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2})-([0-9]+)\.state")
_ARCHIVED_STATE = re.compile(
    rf"{HOUR_STATES}/([0-9]{{4}}-[0-9]{{2}}-[0-9]{{2}}T[0-9]{{2}})-[0-9]+\.state"
)
_LOAD_STATE = re.compile(r"[a-z]+-([0-9]{15,})\.state")
ALIVE_NS = 30_000_000_000
"""The recorder writes a heartbeat every 10 s: if it was silent for longer before the hour, it was not running."""


class UnreadableState(PlatformError):
    """A state file is missing or damaged; the books can be rebuilt from an earlier one."""


_KIND = b"KSTATE"
MAGIC = _KIND + b"02"
"""The first bytes of a state file, followed by the digest of the rest and an Arrow IPC file. Files of earlier
versions are the Arrow IPC file alone."""
_ARROW = b"ARROW1"
_DIGEST_BYTES = 16


class _Head(msgspec.Struct):
    n: int
    version: int
    """The latest receive time, ns."""
    connections: dict[str, Connection]
    books: dict[str, Book]
    numbers: dict[str, int] = {}
    """The market numbers of packed levels; files of earlier versions have named levels instead."""
    partial: frozenset[str] = frozenset()
    last_ns: int = 0
    """Receive time of the last record; 0 in files of versions that used `version` for it."""
    clocks: SavedClocks | None = None
    """None in files of earlier versions."""
    hours: tuple[int, ...] = ()
    wire: WireState | None = None
    start: str = ""
    """Token of the recorder start that wrote it; empty in earlier versions' files and in hour states."""


def save(state: BookState, path: Path, start: str = "") -> None:
    """Write a state, completely or not at all. `start`: token of the recorder start that writes it."""
    head = msgspec.json.encode(
        _Head(
            n=state.n,
            version=state.version,
            connections=state.connections,
            books=state.books,
            numbers=state.numbers,
            partial=state.partial,
            last_ns=state.clock.last_ns,
            clocks=SavedClocks.of(state.clocks),
            hours=state.hours,
            wire=state.wire,
            start=start,
        )
    )
    schema = pa.schema([(name, pa.int64()) for name in PACKED], metadata={"state": head})
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    # Both loaders of a streamer may save the same state of the same hour at the same moment.
    temporary = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("wb") as file:
        file.write(MAGIC + bytes(_DIGEST_BYTES))
        body = _Body(file)
        with (
            pa.PythonFile(body, mode="w") as sink,
            pa.ipc.new_file(sink, schema, options=options) as writer,
        ):
            for levels in state.ladders.parts():
                writer.write_table(levels.to_arrow().cast(schema), max_chunksize=BATCH_LEVELS)
        file.seek(len(MAGIC))
        file.write(body.hash.digest())
    durable.publish(
        temporary, path
    )  # the cursor will name it: it survives what the cursor survives


class _Body:
    """The part of a file after its digest, as a file-like object that hashes what is written."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._written = 0
        self.hash = blake2b(digest_size=_DIGEST_BYTES)

    def write(self, data: bytes | memoryview) -> int:
        self.hash.update(data)
        self._file.write(data)
        self._written += memoryview(data).nbytes
        return memoryview(data).nbytes

    def tell(self) -> int:  # words: ok
        return self._written

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """Do nothing: the underlying file stays open, because its digest is written last."""


def load(
    path: Path,
    n: int | None = None,
    starts: Container[str] | None = None,
    *,
    whole: bool = False,
) -> BookState:
    """Read a state. It must be of record `n`, written by one of `starts`, and with `whole` have all its books.

    Raises: `UnreadableState` for a file that is missing, damaged, or does not meet these conditions.
    """
    return _decoded(_content(path), str(path), n, starts, whole=whole)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadableState(f"{path} cannot be read ({error}).") from None


def _decoded(
    content: bytes,
    where: str,
    n: int | None = None,
    starts: Container[str] | None = None,
    *,
    whole: bool = False,
) -> BookState:
    head, table = _read(content, where, n, starts, whole=whole)
    clock = ReceiveClock(head.last_ns or head.version, head.version)
    levels = pl.DataFrame(table.replace_schema_metadata(None))
    clocks = restored(head.clocks)
    if "market_ticker" in levels.columns:  # a file of an earlier version
        state = BookState.of(head.n, clock, head.connections, head.books, levels.cast(LEVELS))
        return replace(state, clocks=clocks, wire=head.wire)
    return BookState(
        head.n,
        clock,
        head.connections,
        head.books,
        head.numbers,
        Ladders(SortedLevels.of(levels.cast(PACKED).rechunk())),
        head.partial,
        clocks,
        head.hours,
        head.wire,
    )


def _read(
    content: bytes, where: str, n: int | None, starts: Container[str] | None, *, whole: bool
) -> tuple[_Head, pa.Table]:
    """A file's head and levels. The head is checked first, so a refused state's levels are not read."""
    try:
        file = pa.ipc.open_file(_verified_body(content))
        head = typed_json.decode(file.schema.metadata[b"state"], _Head)
        if n is not None and head.n != n:
            raise UnreadableState(f"{where} is of record {head.n}, not {n}.")
        if starts is not None and head.start not in starts:
            raise UnreadableState(f"{where} is of a start that this journal does not know.")
        if whole and head.partial:
            raise UnreadableState(f"{where} has some of its books only in part.")
        return head, file.read_all()
    except (OSError, ValueError, KeyError, TypeError, msgspec.DecodeError) as error:
        raise UnreadableState(f"{where} cannot be read ({error}).") from None


def _verified_body(content: bytes) -> pa.Buffer:
    """The Arrow file in a state file, after its digest was verified. Raises: `ValueError` for a damaged one."""
    view = memoryview(content)
    if content.startswith(_ARROW):
        return pa.py_buffer(view)
    begin = len(MAGIC) + _DIGEST_BYTES
    body = view[begin:]
    if content.startswith(_KIND) and not content.startswith(MAGIC):
        raise ValueError("another version wrote it")
    if not content.startswith(MAGIC) or view[len(MAGIC) : begin] != _digest(body):
        raise ValueError("its checksum does not fit")
    return pa.py_buffer(body)


def _digest(body: pa.Buffer | memoryview) -> bytes:
    return blake2b(body, digest_size=_DIGEST_BYTES).digest()


def save_hour_state(state: BookState, journal_folder: Path, hour: datetime) -> None:
    """Save the books before an hour's first record, so that the hour can be rebuilt.

    A state with partly known books is not saved: another loader of the journal may have all of them.
    """
    if not state.partial:
        save(state, _hour_path(journal_folder, hour, state.n))


def _hour_path(journal_folder: Path, hour: datetime, n: int) -> Path:
    return hour_folder(journal_folder) / f"{hour:%Y-%m-%dT%H}-{n:015d}.state"


def archive_hour_state(
    archive: Archive, journal_folder: Path, shard: int, hour: datetime, n: int
) -> None:
    """Copy the books before an hour's first record, `n`, to the archive; nothing where they were not saved."""
    path = _hour_path(journal_folder, hour, n)
    if path.exists():
        archive.write_metadata(archived_state_name(shard, hour), _content(path))


def archived_hour_state(archive: Archive, shard: int, hour: datetime) -> BookState | None:
    """The books before an hour's first record, from the archive; None where it has none.

    Raises: `UnreadableState` for damaged ones.
    """
    name = archived_state_name(shard, hour)
    content = archive.read_metadata(name)
    return None if content is None else _decoded(content, f"{archive}/{name}", whole=True)


def archived_state_name(shard: int, hour: datetime) -> str:
    """The archive's name for the books before an hour's first record of a shard."""
    return f"{HOUR_STATES}/{hour:%Y-%m-%dT%H}-{shard}.state"


def hour_state(journal_folder: Path, hour: datetime) -> BookState | None:
    """The books before an hour's first record; None where they were not saved."""
    kept = {n: path for at, n, path in _hour_states(journal_folder) if at == f"{hour:%Y-%m-%dT%H}"}
    return load(kept[min(kept)], min(kept)) if kept else None


def newest_saved(
    journal_folder: Path, starts: Container[str], first_n: int, n: int
) -> BookState | None:
    """The newest readable saved state from record `first_n` to `n`: of an hour's beginning or of a loader's cursor.

    The books do not depend on the store, so any loader's state can be used. File names show which one is the
    newest, so only one state is in memory at a time. States that another journal's start wrote, or with partly
    known books, are skipped.
    """
    kept: list[tuple[int, Path, Container[str] | None]] = [
        (int(match[1]), path, starts)
        for path in (journal_folder / "load").glob("*.state")
        if (match := _LOAD_STATE.fullmatch(path.name)) is not None
    ]
    kept += [(at_n, path, None) for _, at_n, path in _hour_states(journal_folder)]
    within = [state for state in kept if first_n <= state[0] <= n]
    for at_n, path, of_starts in sorted(within, key=lambda state: state[0], reverse=True):
        try:
            return load(path, at_n, of_starts, whole=True)
        except UnreadableState as error:  # a loader may have replaced its state meanwhile
            level = logging.WARNING if of_starts is None else logging.INFO
            log.log(level, "%s Trying an earlier one.", error)
    return None


def hour_of_archived_state(name: str) -> datetime | None:
    """The hour of such a name; None for another name."""
    match = _ARCHIVED_STATE.fullmatch(name)
    return datetime.strptime(match[1], "%Y-%m-%dT%H").replace(tzinfo=UTC) if match else None


def prune_hour_states(journal_folder: Path, kept_from_n: int) -> None:
    """Remove the states of hours whose records the journal no longer has."""
    for _, first_n, path in _hour_states(journal_folder):
        if first_n < kept_from_n:
            path.unlink()


def _hour_states(journal_folder: Path) -> Iterator[tuple[str, int, Path]]:
    """Yield the hour, the first record and the file of each saved hour state; other files are ignored."""
    for path in hour_folder(journal_folder).glob("*.state"):
        if (match := _HOUR_STATE.fullmatch(path.name)) is not None:
            yield match[1], int(match[2]), path


def is_hour_state(name: str) -> bool:
    """Whether a file name in that folder is that of a state or of one being written."""
    return bool(_HOUR_STATE.fullmatch(name)) or name.endswith(".tmp")


def hour_folder(journal_folder: Path) -> Path:
    """The folder of a journal's hour states."""
    return journal_folder / "load" / "hours"


def checkpoint(state: BookState, at: datetime, shard: int = 0) -> pa.Table:
    """All of `checkpoint_batches` as one table."""
    empty = BOOK_CHECKPOINTS.arrow.empty_table()
    return pa.concat_tables([empty, *checkpoint_batches(state, at, shard)]).unify_dictionaries()


def checkpoint_batches(state: BookState, at: datetime, shard: int = 0) -> Iterator[pa.Table]:
    """Yield the rows of every followed book for the checkpoint at time `at`, from the state before that record.

    Followed books have a snapshot and were not left. A book is not verified where its connection has ended or
    the recorder has been silent for too long: the hour begins within an outage. Where the clock enters an hour
    again, the checkpoint also has ended books, not verified, if earlier rows of this hour may show them live or
    further frames may arrive: the hour lacks what happened in between. All rows have the record `state.n`.

    Books are ordered by ticker and never split: a batch has CHECKPOINT_ROWS rows plus the rest of its last book.
    Equal states give equal batches.
    """
    books = _live_books(state, at)
    rows = np.maximum(state.ladders.heights(books["market"]), 1)  # an empty book has a row, too
    batch = (np.cumsum(rows) - rows) // CHECKPOINT_ROWS
    edges = [0, *(np.flatnonzero(np.diff(batch)) + 1).tolist(), books.height]
    for begin, end in itertools.pairwise(edges):
        if begin < end:
            yield _checkpoint_of(books.slice(begin, end - begin), state, at, shard)


def _live_books(state: BookState, at: datetime) -> pl.DataFrame:
    start_ns = hour_start_ns(floor_hour(at))
    alive = start_ns - state.version <= ALIVE_NS
    again = start_ns <= state.version
    ended_ns = state.all_ended_ns
    books = [
        (
            *(state.numbers[ticker], ticker, book.conn, book.sid, book.market_id),
            *(alive and state.is_synced(book), state.seq_of(book)),
        )
        for ticker, book in sorted(state.books.items())
        if book.based
        and (
            state.may_have_rows_in(start_ns, book)
            if again
            else state.follows(book) or (not book.left and book.ended_ns == ended_ns)
        )
    ]
    return pl.DataFrame(books, schema=_LIVE, orient="row")


def _checkpoint_of(books: pl.DataFrame, state: BookState, at: datetime, shard: int) -> pa.Table:
    levels = state.ladders.of(pl.Series([], dtype=pl.Int64), books["market"])
    rows = books.join(with_level_fields(levels), on="market", how="left").sort(
        "market_ticker", "side", "price"
    )
    return pa.Table.from_arrays(
        [
            pa.repeat(pa.scalar(at, TIME), rows.height),
            names(rows["conn"]),
            rows["sid"].to_arrow(),
            rows["seq"].to_arrow(),
            names(rows["market_id"]),
            names(rows["market_ticker"]),
            rows["verified"].to_arrow(),
            names(rows["side"]),
            prices(rows["price"]),
            quantities(rows["size"]),
            *place(pl.repeat(state.n, rows.height, dtype=pl.UInt64, eager=True), shard),
        ],
        schema=BOOK_CHECKPOINTS.arrow,
    )

"""The load: follows the journal and brings it to one store, exactly once.

Two files carry it over a kill: the *cursor* (what has been written, and what was about to be) and a
*state* (the books at an earlier record). Before a range is written it is planned in the cursor; a
load that finds a plan writes that very range again, under the same names and tokens, which the store
takes as once. A store that is away costs nothing but the wait: the journal keeps everything.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np
import tenacity

from kalshi_platform.loading.decode import decode
from kalshi_platform.loading.derive import Distrust, Rows, State, derive
from kalshi_platform.loading.state import checkpoint, load, save
from kalshi_platform.loading.stores import Store
from kalshi_platform.recording import journal
from kalshi_platform.recording.journal import Block, JournalError, Position, Writer, joined
from kalshi_platform.storage.archive import HOUR, hour_of_ns, hour_start_ns
from kalshi_platform.storage.errors import StoreError, StoreRefused, StoreUnavailable

log = logging.getLogger(__name__)

CHUNK_RECORDS = 65_536
"""Derived at a time: bounds memory while catching up."""
STATE_EVERY_S = 30.0
REFUSED_RETRY_S = 30.0
"""A store that refuses for good is asked again now and then: somebody may have mended it."""


@dataclass(frozen=True)
class Pace:
    """When a store is given what has come."""

    records: int
    seconds: float
    first_s: float
    """The same for the first time, so that a newcomer sees something soon."""


CLICKHOUSE_PACE = Pace(records=262_144, seconds=0.25, first_s=0.25)
PARQUET_PACE = Pace(records=524_288, seconds=60.0, first_s=5.0)


class _Cursor(msgspec.Struct, frozen=True):
    committed: tuple[int, int, int]
    planned: tuple[int, int, int] | None = None
    state_at: tuple[int, int, int] | None = None
    state_file: str = ""


class Load:
    """One store's load, in a thread of its own."""

    def __init__(
        self,
        folder: Path,
        writer: Writer,
        store: Store,
        pace: Pace,
        *,
        distrust: Callable[[Distrust], None] | None = None,
    ) -> None:
        self._folder = folder
        self._writer = writer
        self._store = store
        self._pace = pace
        self._distrust = distrust
        self._cursor_path = folder / "load" / f"{store.name}.json"
        self._stopping = threading.Event()
        self._abandon = threading.Event()
        self._deadline = float("inf")
        self.committed: Position | None = None
        """Everything before this is durable in the store."""
        self.committed_ns = 0
        """When the last range became durable there, by this machine's clock."""
        self.trouble: str | None = None
        """Why the store takes nothing at the moment, as a sentence."""
        self.refused = False
        """Whether that trouble is of the kind that no retry mends."""
        self.failure: BaseException | None = None
        """What ended this load: a damaged journal, or a bug."""
        self._thread = threading.Thread(target=self._run, name=f"load-{store.name}", daemon=True)

    @property
    def name(self) -> str:
        """The store's name."""
        return self._store.name

    def start(self) -> None:
        """Begin where the last load ended."""
        self._thread.start()

    def drain(self) -> None:
        """Load what the journal has, then end; the journal's writer must be closed or idle."""
        self._stopping.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end; True when everything was loaded in time, else the rest is left."""
        self._thread.join(timeout_s)
        ended = not self._thread.is_alive()
        self._abandon.set()
        return ended and self.failure is None and self.trouble is None

    @property
    def lag(self) -> int:
        """Journal records that are durable, and not yet in the store."""
        done = self.committed.n if self.committed else 0
        return max(self._writer.durable.n - done, 0)

    # -- the loading thread --------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._load()
        except _Abandoned:
            return
        except BaseException as error:  # noqa: BLE001 - told to the streamer, which ends for it
            self.failure = error
            log.error("The load into %s ended: %s", self.name, error)

    def _load(self) -> None:
        cursor, state, position = self._resume()
        self.committed = Position(*cursor.committed)
        pending: list[Rows] = []
        began = time.monotonic()
        pace_s = self._pace.first_s
        state_saved_at = time.monotonic()
        while True:
            if self._abandon.is_set():
                return
            if not pending:
                self._writer.wait_beyond(position.n, 0.25)
                began = time.monotonic()
            for block in _chunks(journal.read(self._folder, position, self._writer.durable)):
                for piece, hour in _at_hours(block, state.version):
                    if hour is not None:
                        cursor = self._commit(cursor, position, pending)
                        pending = []
                        self._begin_hour(hour, state, position.n)
                        cursor = self._keep_state(cursor, state, position)
                    rows, state = derive(decode([piece]), state)
                    position = piece.end
                    pending.append(rows)
                    if self._distrust is not None:
                        for distrust in rows.distrusted:
                            self._distrust(distrust)
                if position.n - cursor.committed[2] >= self._pace.records:
                    break
                if self._abandon.is_set():
                    return
            behind = position.n < self._writer.durable.n
            due = position.n - cursor.committed[2] >= self._pace.records
            if pending and (due or self._stopping.is_set() or time.monotonic() - began >= pace_s):
                cursor = self._commit(cursor, position, pending)
                pending = []
                pace_s = self._pace.seconds
                if time.monotonic() - state_saved_at > STATE_EVERY_S:
                    cursor = self._keep_state(cursor, state, position)
                    state_saved_at = time.monotonic()
            elif pending:
                time.sleep(min(0.05, self._pace.seconds))
            if self._stopping.is_set() and not behind and not pending:
                self._keep_state(cursor, state, position)
                return

    def _resume(self) -> tuple[_Cursor, State, Position]:
        """Where the last load ended, with its plan fulfilled."""
        cursor = self._read_cursor()
        committed = Position(*cursor.committed)
        state, position = State(n=committed.n), committed
        if cursor.state_at is not None:
            position = Position(*cursor.state_at)
            state = load(self._folder / "load" / cursor.state_file)
        elif committed.n:
            position = journal.beginning(self._folder)
            state = State(n=position.n)
        state, position, _ = self._replay(state, position, committed)
        if cursor.planned is not None:
            planned = Position(*cursor.planned)
            state, position, rows = self._replay(state, position, planned)
            cursor = self._commit(cursor, planned, rows)
        return cursor, state, position

    def _replay(
        self, state: State, position: Position, until: Position
    ) -> tuple[State, Position, list[Rows]]:
        """Derive up to `until`, which is durable: it was committed or planned."""
        rows = []
        for block in _chunks(journal.read(self._folder, position)):
            if position.n >= until.n:
                break
            piece = block
            if block.first_n + block.rows > until.n:
                piece, _ = block.cut(until.n - block.first_n)
            derived, state = derive(decode([piece]), state)
            rows.append(derived)
            position = piece.end
        if position.n != until.n:
            raise JournalError(
                f"The load into {self.name} had come to record {until.n}, but the journal in"
                f" {self._folder} ends at {position.n}. Was it replaced? Move {self._cursor_path.parent}"
                " away to load the journal from its beginning."
            )
        return state, until, rows

    def _begin_hour(self, hour: datetime, state: State, n: int) -> None:
        self._insist(lambda: self._store.begin_hour(hour, checkpoint(state, hour), n))

    def _commit(self, cursor: _Cursor, end: Position, rows: list[Rows]) -> _Cursor:
        """Plan, write, advance: in this order, so that a kill between repeats and never skips."""
        if end.n == cursor.committed[2]:
            return cursor
        first_n = cursor.committed[2]
        planned = msgspec.structs.replace(cursor, planned=_plain(end))
        self._write_cursor(planned)
        self._insist(lambda: self._store.write(first_n, end.n, rows))
        done = msgspec.structs.replace(planned, committed=_plain(end), planned=None)
        self._write_cursor(done)
        self.committed = end
        self.committed_ns = time.time_ns()
        return done

    def _insist(self, act: Callable[[], None]) -> None:
        """Do it, for as long as the store takes to take it."""

        def before_sleep(attempt: tenacity.RetryCallState) -> None:
            error = attempt.outcome.exception() if attempt.outcome else None
            self.refused = isinstance(error, StoreRefused)
            if self.trouble != str(error):
                self.trouble = str(error)
                log.error("%s stays in the journal: %s", self.name, error)

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(StoreError),
            wait=_patience,
            sleep=self._sleep,
            before_sleep=before_sleep,
        )
        retrying(act)
        if self.trouble is not None:
            log.warning("%s takes rows again.", self.name)
        self.trouble, self.refused = None, False

    def _sleep(self, seconds: float) -> None:
        if self._abandon.wait(seconds):
            raise _Abandoned

    def _keep_state(self, cursor: _Cursor, state: State, position: Position) -> _Cursor:
        """Save the books as of `position`, and forget the ones before."""
        if position.n != cursor.committed[2]:
            raise ValueError("a state is kept only for what has been committed")
        name = f"{self.name}-{position.n:015d}.state"
        save(state, self._folder / "load" / name)
        kept = msgspec.structs.replace(cursor, state_at=_plain(position), state_file=name)
        self._write_cursor(kept)
        if cursor.state_file and cursor.state_file != name:
            (self._folder / "load" / cursor.state_file).unlink(missing_ok=True)
        return kept

    def _read_cursor(self) -> _Cursor:
        try:
            return msgspec.json.decode(self._cursor_path.read_bytes(), type=_Cursor)
        except FileNotFoundError:
            return _Cursor(_plain(journal.beginning(self._folder)))
        except msgspec.DecodeError as error:
            raise JournalError(
                f"{self._cursor_path} is damaged ({error}). Move it away to load the journal from its"
                " beginning: what is in the stores already is not stored twice."
            ) from None

    def _write_cursor(self, cursor: _Cursor) -> None:
        self._cursor_path.parent.mkdir(exist_ok=True)
        temporary = self._cursor_path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(cursor))
            file.flush()
            os.fdatasync(file.fileno())
        temporary.replace(self._cursor_path)


class _Abandoned(Exception):
    """The streamer ends and the store is still away: the rest stays in the journal."""


def _patience(attempt: tenacity.RetryCallState) -> float:
    error = attempt.outcome.exception() if attempt.outcome else None
    if isinstance(error, StoreUnavailable):
        return tenacity.wait_random_exponential(multiplier=0.2, max=10)(attempt)
    return REFUSED_RETRY_S


def _plain(position: Position) -> tuple[int, int, int]:
    return (position.segment, position.offset, position.n)


def _chunks(blocks: Iterator[Block]) -> Iterator[Block]:
    """Small blocks gathered into larger ones: a derivation costs the same for few rows."""
    gathered: list[Block] = []
    rows = 0
    for block in blocks:
        gathered.append(block)
        rows += block.rows
        if rows >= CHUNK_RECORDS:
            yield joined(gathered)
            gathered, rows = [], 0
    if gathered:
        yield joined(gathered)


def _at_hours(block: Block, newest_ns: int) -> Iterator[tuple[Block, datetime | None]]:
    """The block cut before each first record of a later hour, with the hour that a piece begins.

    `newest_ns` is the newest receive time before the block: a clock that steps back begins nothing.
    """
    begins = None
    while True:
        recv_ns = block.batch.column("recv_ns").to_numpy()
        if not newest_ns:
            newest_ns = int(recv_ns[0])
        beyond = np.flatnonzero(recv_ns >= hour_start_ns(hour_of_ns(newest_ns) + HOUR))
        if not len(beyond):
            yield block, begins
            return
        at = int(beyond[0])
        newest_ns = int(recv_ns[at])
        if at:
            before, block = block.cut(at)
            yield before, begins
        begins = hour_of_ns(newest_ns)

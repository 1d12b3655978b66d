"""The load: follows the journal and brings it to one store, exactly once.

Two files carry it over a kill: the *cursor* (what has been written, and what was about to be) and a
*state* (the books at an earlier record). Before a range is written it is planned in the cursor; a
load that finds a plan writes that very range again, under the same names and tokens, which the store
takes as once. A store that is away costs nothing but the wait: the journal keeps everything.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import pyarrow as pa
import tenacity

from kalshi_platform.errors import PlatformError, StoreError, StoreRefused, StoreUnavailable
from kalshi_platform.exchange.columnar import decode_range
from kalshi_platform.health.verdict import BEHIND_S
from kalshi_platform.journal import reader
from kalshi_platform.journal.journal_identity import ADOPT
from kalshi_platform.journal.latency import Latency
from kalshi_platform.journal.ledger import Entry, EntryMissing, Superseded
from kalshi_platform.journal.reader import JournalError, LogOffset
from kalshi_platform.journal.writer import Writer
from kalshi_platform.loading import cursor as cursor_file
from kalshi_platform.loading import resume, traces
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.cursor import Cursor, Unusable, plain
from kalshi_platform.loading.presence import Presence
from kalshi_platform.loading.resume import Point, Recorder, Unresolved
from kalshi_platform.loading.rows import Rows, StaleBook, build_rows
from kalshi_platform.loading.shared_rows import CHUNK_ROWS, SharedRows, at_openings, chunks, up_to
from kalshi_platform.loading.sinks import Abandoned, Sink
from kalshi_platform.loading.state_files import (
    UnreadableState,
    checkpoint_batches,
    keep_hour_state,
    load,
    newest_kept,
    save,
)
from kalshi_platform.loading.traces import Trace
from kalshi_platform.schema import DATASETS, ORDERBOOK_EVENTS
from kalshi_platform.utc_hours import floor_hour, hour_of_ns

log = logging.getLogger(__name__)

T = TypeVar("T")
STATE_EVERY_S = 30.0
TROUBLE_PATIENCE_S = 1.5
"""At the end, a store that takes nothing is given up after this: the journal has it all."""
REFUSED_RETRY_S = 30.0
"""A store that goes on refusing is asked again so often: it may have been repaired."""
RESTART_S = 30.0
"""A load that was stopped, by damage to the journal or a fault, begins again after this."""
LOOK_S = 0.05
"""Between two looks at whether it may begin."""


@dataclass(frozen=True)
class Pace:
    """When a store is given what has come: at so many rows, or bytes in memory, or after so long."""

    rows: int
    seconds: float
    first_s: float
    """The same for the first time, so that a newcomer sees something soon."""
    gather_s: float = 0.0
    """How long to gather before deriving: deriving few rows costs as much as many."""
    bytes: int = 64 << 20


CLICKHOUSE_PACE = Pace(rows=131_072, seconds=0.0, first_s=0.0, gather_s=0.25)
PARQUET_PACE = Pace(rows=262_144, seconds=60.0, first_s=5.0, gather_s=0.25)


class Loader:
    """One store's load, in a thread of its own."""

    def __init__(
        self,
        folder: Path,
        writer: Writer,
        store: Sink,
        pace: Pace,
        *,
        shard: int = 0,
        derivation: SharedRows | None = None,
        on_stale_book: Callable[[StaleBook], None] | None = None,
        observe: Callable[[Rows, BookState], None] | None = None,
        note: Callable[[str, Mapping[str, object]], None] | None = None,
        presence: Presence | None = None,
    ) -> None:
        """`note` puts a note into the journal; `presence` looks at a store that is written to rarely."""
        self._folder = folder
        self._writer = writer
        self._store = store
        self._pace = pace
        self._derivation = derivation or SharedRows(folder, shard)
        self._derivation.joins(store.name)
        self._on_stale_book = on_stale_book
        self._observe = observe
        self._note = note
        self._presence = presence
        self._stopping = threading.Event()
        self._abandon = threading.Event()
        self._cursor = Cursor(committed=(0, 0, 0))
        self._entry: Entry | None = None
        """What the store's own record says of this start."""
        self._state = BookState()
        self._position = LogOffset(0, 0, 0)
        """Everything before it is in `_state`; what is not committed yet is in `_pending`."""
        self._pending: list[Rows] = []
        self.committed: LogOffset | None = None
        """Everything before this is durable in the store."""
        self.committed_ns = 0
        """When the last range became durable there, by this machine's clock."""
        self.loaded_ns = 0
        """Everything received up to then is there."""
        self.latency = Latency()
        """From receive to durable in the store, for order-book events."""
        self.rows: Counter[str] = Counter()
        """Written to the store since the start, by dataset; what only mirrors them is left out."""
        self.errors: Counter[str] = Counter()
        """Writes that were not taken since the start: by ClickHouse's code, `unreachable`, `disk`; and
        how often the load was stopped, by `damage` to the journal, by a `fault`, or because of its own or
        the store's `identity`."""
        self.failure: BaseException | None = None
        """What stopped this load: a damaged journal, or a bug. It begins again now and then, from its
        cursor, as a new process would: recording does not end for it."""
        self._trouble: str | None = None
        self._refused = False
        self._oldest = (-1, 0)
        """The record that the store lacks first, and when it was received."""
        self._may_begin: Callable[[], bool] = lambda: True
        self._thread = threading.Thread(target=self._run, name=f"load-{store.name}", daemon=True)

    @property
    def name(self) -> str:
        """The store's name."""
        return self._store.name

    @property
    def trouble(self) -> str | None:
        """Why nothing gets, or would get, into the store at the moment, as a sentence."""
        of_place = self._presence.trouble if self._presence is not None else None
        return self._stopped_by or of_place or self._trouble

    @property
    def _stopped_by(self) -> str | None:
        failure = self.failure  # the load's thread may end it at any moment
        if failure is None:
            return None
        if isinstance(failure, PlatformError):
            return str(failure)
        return (
            f"The load into {self.name} stopped by a fault of the program"
            f" ({type(failure).__name__}: {failure}); the journal keeps what is not loaded."
            " Please report it, with the log."
        )

    @property
    def refused(self) -> bool:
        """Whether that trouble is of the kind that no retry mends."""
        away = self._presence is not None and self._presence.refused
        return self.failure is not None or self._refused or away

    @property
    def oldest_ns(self) -> int:
        """Receive time of the oldest durable record that the store lacks; 0 where it lacks none.

        The journal is asked, whatever the load is at. 0 also where that record cannot be read: then the
        load stops at it, and says so.
        """
        at = self.committed
        if at is None or at.n >= self._writer.durable.n:
            return 0
        if at.n != self._oldest[0]:
            try:
                self._oldest = (at.n, reader.received_ns(self._folder, at) or 0)
            except JournalError:
                self._oldest = (at.n, 0)
        return self._oldest[1]

    @property
    def late(self) -> str | None:
        """That the store is behind, as a sentence, where the oldest record that it lacks is too old: also
        while it takes rows.
        """
        oldest_ns = self.oldest_ns
        age_s = (time.time_ns() - oldest_ns) / 1e9 if oldest_ns else 0.0
        if age_s <= BEHIND_S[self.name]:
            return None
        return (
            f"{self.name} is {age_s:,.0f} s behind: {self.lag:,} records wait in the journal, and nothing is"
            " lost. After a time away it catches up. If the age grows, it takes less than comes: give it more"
            " CPU or a faster disk, or share the markets among more shards (STREAM_SHARDS)."
        )

    def start(self, may_begin: Callable[[], bool] = lambda: True) -> None:
        """Begin where the last load ended, once `may_begin`, which is asked often, says so or the end has come."""
        if self._presence is not None:
            self._presence.start()
        self._may_begin = may_begin
        self._thread.start()

    def drain(self) -> None:
        """Load what the journal has, then end; the journal's writer must be closed or idle."""
        self._stopping.set()
        if self._presence is not None:
            self._presence.end()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end; True when everything was loaded in time, else the rest is left.

        A store that is in trouble, and stays so for TROUBLE_PATIENCE_S, is not waited for.
        """
        now = time.monotonic()
        ends, gives_up = now + timeout_s, now + TROUBLE_PATIENCE_S
        while self._thread.is_alive() and (now := time.monotonic()) < ends:
            if self.failure is None and self._trouble is None:
                gives_up = now + TROUBLE_PATIENCE_S
            elif now >= gives_up:
                break
            self._thread.join(0.05)
        ended = not self._thread.is_alive()
        self._abandon.set()
        if not ended:
            self._store.abandon()
        return ended and self.failure is None and self._trouble is None

    @property
    def alive(self) -> bool:
        """Whether it has begun and not ended."""
        return self._thread.is_alive()

    @property
    def lag(self) -> int:
        """Journal records that are durable, and not yet in the store."""
        done = self.committed.n if self.committed else 0
        began, ended = self._writer.began_n, self._writer.ended_n
        unused = began - ended if done <= ended else 0
        return max(self._writer.durable.n - unused - done, 0)

    @property
    def needs_from(self) -> int:
        """The first journal record that this load may still have to read."""
        state_at = self._cursor.state_at
        return state_at[2] if state_at else 0

    # -- the loading thread --------------------------------------------------------------------

    def _run(self) -> None:
        """Load until the end; what stops that is told, and the rest is begun again from the cursor."""
        while not (self._may_begin() or self._stopping.wait(LOOK_S)):
            pass
        while True:
            try:
                self._load()
            except Abandoned:
                return
            except BaseException as error:  # a panic of Polars is no Exception
                known = isinstance(error, PlatformError)
                if self.failure is None or str(error) != str(self.failure):
                    log.error("The load into %s stopped: %s", self.name, error, exc_info=not known)
                self.errors[_kind(error) if known else "fault"] += 1
                self.failure = error  # last: where it is seen, the line and the count are there
            else:
                return
            if self._stopping.wait(RESTART_S):
                return

    def _load(self) -> None:
        self._resume()
        began = state_kept_at = time.monotonic()
        pace_s = self._pace.first_s
        while not self._abandon.is_set():
            if not self._pending:
                self._writer.wait_beyond(self._position.n, 0.25)
                began = time.monotonic()
            self._gather()
            self._take()
            ending = self._stopping.is_set()
            if self._pending and (ending or self._full or time.monotonic() - began >= pace_s):
                self._commit(self._position)
                pace_s = self._pace.seconds
                if time.monotonic() - state_kept_at > STATE_EVERY_S:
                    self._keep_state()
                    state_kept_at = time.monotonic()
            if self.failure is not None and not self._pending:
                log.warning("The load into %s goes on.", self.name)
                self.failure = None
            if ending and not self._pending and self._position.n >= self._writer.durable.n:
                self._keep_state()
                return

    def _gather(self) -> None:
        """Let some records come together, unless there are many already or the end has come."""
        if self._writer.durable.n - self._position.n < CHUNK_ROWS:
            self._stopping.wait(max(self._pace.gather_s, 0.05 if self._pending else 0.0))

    @property
    def _full(self) -> bool:
        rows = sum(each.count for each in self._pending)
        return rows >= self._pace.rows or sum(e.bytes for e in self._pending) >= self._pace.bytes

    def _take(self) -> None:
        """Derive what is durable, until there is enough for one write."""
        durable = self._writer.durable
        for step in self._derivation.steps(self.name, self._position, self._state, durable):
            if step.hour is not None:
                self._commit(self._position)
                self._begin_hour(step.hour)
                self._keep_state()
            self._took(step.rows, step.state, step.end)
            for stale in step.rows.stale_books:
                self._report_stale(stale)
            if self._full or self._abandon.is_set():
                return

    def _took(self, rows: Rows, state: BookState, end: LogOffset) -> None:
        self._pending.append(rows.of(self._store.datasets))
        self._state, self._position = state, end
        if self._observe is not None:
            self._observe(rows, state)

    # -- where loading goes on ---------------------------------------------------------------------

    def _resume(self) -> None:
        """Go to where loading goes on, and write again what had been planned from there."""
        self._pending.clear()
        found = self._insist(lambda: cursor_file.read(self._folder, self.name, self._writer.id))
        cursor = found if isinstance(found, Cursor) else None
        point = self._point(found)
        self.committed = reader.offset_of(self._folder, point.loaded_to)
        self._state, self._position = self._books_before(point.loaded_to, cursor)
        whole = self._state.version > 0 or not self._is_pruned
        self._replay(point.loaded_to, written=True)
        if not whole:
            self._state = self._state.without_unbased()
        self._claim(point, cursor)
        self.loaded_ns = self._state.version
        if point.planned_to > point.loaded_to:
            self._replay(point.planned_to, written=False)
            self._commit(self._position)

    def _point(self, found: Cursor | Unusable) -> Point:
        """Where loading goes on. Raises `Superseded`, or `Unresolved` where that is not known."""
        cursor = found if isinstance(found, Cursor) else None
        why_none = found.why if isinstance(found, Unusable) else ""
        writer, store = self._writer, self._store
        entries = self._insist(lambda: store.ledger.entries(writer.id))
        own = frozenset((start.epoch, start.token) for start in writer.identity.starts)
        recorder = Recorder(writer.id, own, max(own), began=writer.began_n, ended=writer.ended_n)
        point = resume.by_store(entries, recorder, store.place)
        if point is None:
            return self._point_without_record(found)
        point = resume.held_against(point, cursor, why_none)
        if not point.certain:
            point = self._point_by_traces(point, cursor)
        if point.loaded_to < reader.oldest_offset(self._folder).n:
            raise self._no_longer_kept(point)
        return point

    def _point_by_traces(self, point: Point, cursor: Cursor | None) -> Point:
        """The store's point where the cursor does not agree with it."""
        if cursor is not None and cursor.committed[2] > point.planned_to:
            n = cursor.committed[2]
            if self._holds(traces.before(self._folder, n)):  # its record alone is old
                return replace(point, loaded_to=n, planned_to=cursor.planned_n)
        return self._beyond_what_is_there(point)

    def _beyond_what_is_there(self, point: Point) -> Point:
        """The point, moved behind ranges that the store has beyond it without saying so."""
        following = traces.following(self._folder, point.planned_to)
        if not self._holds(following):
            return point
        since = floor_hour(min(hour_of_ns(trace.recv_ns) for trace in following))
        last = self._insist(lambda: self._store.written_from(point.planned_to, since))
        if last is None:
            raise self._unresolved(f"its own record says {point.loaded_to}, and there is more")
        return replace(point, loaded_to=last[0], planned_to=last[1])

    def _point_without_record(self, cursor: Cursor | Unusable) -> Point:
        """Where loading goes on where the store has no record of this journal."""
        beginning = reader.oldest_offset(self._folder).n
        empty = not self._holds(traces.following(self._folder, beginning))
        if isinstance(cursor, Unusable):
            if not empty:
                raise self._unresolved(cursor.why)
            if cursor.is_there:
                raise self._gone(f"what was loaded there ({cursor.why})")
            return Point(beginning, beginning, cursor.why if self._is_pruned else "")
        committed = cursor.committed[2]
        if committed <= beginning and cursor.planned is None and empty:
            return Point(beginning, beginning)
        before = self._holds(traces.before(self._folder, committed))
        after = self._holds(traces.following(self._folder, cursor.planned_n))
        if before is not False and after is not True:
            return Point(committed, cursor.planned_n, "the store kept no record yet")
        if before is not False and after:  # it was killed before the cursor was written
            point = Point(committed, cursor.planned_n, "the store's record is gone")
            return self._beyond_what_is_there(point)
        if before or after or not empty:
            raise self._unresolved(f"the cursor, at record {committed}, does not agree with it")
        if not cursor.place or cursor.place == self._store.place:
            raise self._gone(f"what was loaded there up to record {committed}")
        return Point(beginning, beginning, f"{self._store.place} is a new place")

    def _gone(self, what: str) -> Unresolved:
        file = cursor_file.path(self._folder, self.name)
        return Unresolved(
            f"{self._store.place} does not hold {what}: it is not mounted, or was emptied or replaced. Bring it"
            f" back, and loading goes on by itself. If it is lost for good, {self._store.remedy}, or remove"
            f" {file}: loading begins again there with what the journal still has."
        )

    def _holds(self, found: Sequence[Trace]) -> bool | None:
        """Whether the store has any of the traces; None where that cannot be told of any."""
        answers = [self._insist(partial(self._store.holds, trace)) for trace in found]
        return True if True in answers else False if False in answers else None

    def _unresolved(self, why: str) -> Unresolved:
        return Unresolved(
            f"{self._store.place} holds rows of journal {self._writer.id}, and up to which record is not"
            f" known: {why}. Nothing is loaded there, for rows could be stored twice. Restore the folder"
            f" {self._folder / 'load'} from a backup. Without one, {self._store.remedy}."
        )

    def _no_longer_kept(self, point: Point) -> JournalError:
        beginning = reader.oldest_offset(self._folder).n
        name = reader.set_aside(reader.segment_path(self._folder, point.loaded_to)).name
        return JournalError(
            f"{self._store.place} holds this journal up to record {point.loaded_to}, and the journal in"
            f" {self._folder} begins at {beginning}: the records between are not here any more. Restore the"
            f" store, or the segments, from a newer backup. Without one, make an empty file {name} there:"
            " what the journal still has is loaded then, and gap rows name what is lost."
        )

    def _claim(self, point: Point, cursor: Cursor | None) -> None:
        """Say in the store that this start loads there from now on, then write the cursor."""
        start = self._writer.identity.starts[-1]
        entry = Entry(
            start.epoch,
            start.token,
            self._writer.began_n,
            point.loaded_to,
            point.planned_to,
            socket.gethostname(),
            str(self._folder),
        )
        if entry != self._entry:
            self._insist(lambda: self._store.ledger.claim(self._writer.id, entry))
        self._entry = entry
        keeps_state = cursor is not None and cursor.state_at is not None
        self._write_cursor(
            Cursor(
                format=cursor_file.FORMAT,
                journal=self._writer.id,
                store=self.name,
                place=self._store.place,
                start=start,
                committed=plain(self._position),
                state_at=cursor.state_at if cursor and keeps_state else None,
                state_file=cursor.state_file if cursor and keeps_state else "",
            )
        )
        if point.why:
            log.warning(
                "The load into %s goes on at record %d: %s.", self.name, point.loaded_to, point.why
            )
            if self._note is not None:
                detail = {"store": self.name, "record": point.loaded_to, "why": point.why}
                self._note("resumed", detail)

    def _books_before(self, n: int, cursor: Cursor | None) -> tuple[BookState, LogOffset]:
        """Books at or before record `n`, and their place in the journal."""
        if n == self._writer.began_n > self._writer.ended_n:
            return BookState(n=n), reader.offset_of(
                self._folder, n
            )  # numbers were left out before it
        if cursor is not None and cursor.state_at is not None and cursor.state_at[2] <= n:
            try:
                state = load(self._folder / "load" / cursor.state_file, cursor.state_at[2])
            except UnreadableState as error:
                log.warning("%s The books are derived from an earlier record again.", error)
            else:
                return state, LogOffset(*cursor.state_at)
        beginning = reader.oldest_offset(self._folder)
        starts = {start.token for start in self._writer.identity.starts}
        newest = newest_kept(self._folder, starts, beginning.n, n)
        if newest is not None:
            return newest, reader.offset_of(self._folder, newest.n)
        return BookState(n=beginning.n), beginning

    @property
    def _is_pruned(self) -> bool:
        """Whether the journal no longer has its first record."""
        return reader.oldest_offset(self._folder).n > self._writer.identity.first

    def _replay(self, until_n: int, *, written: bool) -> None:
        """Derive up to record `until_n`, which is durable: it was committed or planned.

        What is `written` is forgotten as it is derived. What was planned is one write, and kept whole.
        """
        doubted: dict[str, StaleBook] = {}
        for stretch in chunks(up_to(until_n, reader.read(self._folder, self._position))):
            for piece, _ in at_openings(stretch, self._state.clock):
                if self._abandon.is_set():
                    raise Abandoned
                rows, state = build_rows(decode_range(piece), self._state, self._derivation.shard)
                self._took(rows, state, piece.end)
                if written:
                    self._pending.clear()
                doubted.update({it.market_ticker: it for it in rows.stale_books})
        if self._position.n != until_n:
            raise JournalError(
                f"The load into {self.name} had come to record {until_n}, but the journal in"
                f" {self._folder} ends at {self._position.n}: its end was lost, or it was replaced. Restore"
                f" it from a backup. Without one, stop the recorder and run {ADOPT}: it goes on as a"
                " recorder of its own, with what the journal has."
            )
        for it in doubted.values():  # and their snapshots may never have been asked for
            if (book := self._state.books.get(it.market_ticker)) and not book.verified:
                self._report_stale(it)

    def _report_stale(self, it: StaleBook) -> None:
        if self._on_stale_book is not None:
            self._on_stale_book(it)

    def _begin_hour(self, hour: datetime) -> None:
        n = self._position.n
        self._insist(lambda: keep_hour_state(self._state, self._folder, hour))
        self._insist(lambda: self._store.begin_hour(hour, self._books(hour), n))

    def _books(self, hour: datetime) -> Iterator[pa.Table]:
        """The books before the hour's first record, some at a time, until the load is abandoned."""
        for batch in checkpoint_batches(self._state, hour, self._derivation.shard):
            if self._abandon.is_set():
                raise Abandoned
            yield batch

    def _commit(self, end: LogOffset) -> None:
        """Plan, write, advance: in this order, so that a kill between repeats and never skips."""
        first_n = self._cursor.committed[2]
        if end.n == first_n:
            return
        rows = tuple(self._pending)
        self._write_cursor(msgspec.structs.replace(self._cursor, planned=plain(end)))
        self._update_entry(first_n, end.n)
        self._insist(lambda: self._store.write(first_n, end.n, rows))
        self._update_entry(end.n, end.n)
        self._write_cursor(
            msgspec.structs.replace(self._cursor, committed=plain(end), planned=None)
        )
        for each in rows:
            self.rows.update(
                {n: t.num_rows for n, t in each.tables.items() if DATASETS[n].archived}
            )
        self._pending.clear()
        self.committed = end
        self.committed_ns = time.time_ns()
        self.loaded_ns = self._state.version
        for table in (r.tables[ORDERBOOK_EVENTS.name] for r in rows):
            received_ns = table["ingest_ts"].cast(pa.int64()).to_numpy() * 1000
            self.latency.add(received_ns, self.committed_ns)

    def _update_entry(self, loaded_to: int, planned_to: int) -> None:
        """Write to the store's own record how far it is, and what may be there besides."""
        before, ledger = self._entry, self._store.ledger
        if before is None:
            raise ValueError("nothing is written before the store is claimed")
        after = msgspec.structs.replace(before, loaded_to=loaded_to, planned_to=planned_to)
        act = ledger.commit if loaded_to == planned_to else ledger.plan
        self._insist(lambda: act(self._writer.id, before, after))
        self._entry = after

    def _insist(self, act: Callable[[], T]) -> T:
        """Do it, for as long as the store takes to take it."""

        def before_sleep(attempt: tenacity.RetryCallState) -> None:
            error = attempt.outcome.exception() if attempt.outcome else None
            self.errors[_code(error)] += 1
            self._refused = isinstance(error, StoreRefused)
            sentence = self._disk_sentence(error) if isinstance(error, OSError) else str(error)
            if self._trouble != sentence:
                log.error("What is not in %s yet stays in the journal: %s", self.name, sentence)
                self._trouble = sentence  # after the line in the log, where it can be read then

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type((StoreError, OSError)),
            wait=_patience,
            sleep=self._sleep,
            before_sleep=before_sleep,
        )
        done = retrying(act)
        if self._trouble is not None:
            log.warning("%s takes rows again.", self.name)
        self._trouble, self._refused = None, False
        return done

    def _disk_sentence(self, error: OSError) -> str:
        where = error.filename or self._folder / "load"
        return (
            f"{where} cannot be written ({error.strerror}). Mend that; the load goes on by itself."
        )

    def _sleep(self, seconds: float) -> None:
        if self._abandon.wait(seconds):
            raise Abandoned

    def _keep_state(self) -> None:
        """Save the books as of the committed position, and forget the ones before."""
        if self._position.n != self._cursor.committed[2]:
            raise ValueError("a state is kept only for what has been committed")
        folder = self._folder / "load"
        path = folder / f"{self.name}-{self._position.n:015d}.state"
        start = self._writer.identity.starts[-1].token
        self._insist(lambda: save(self._state, path, start))
        self._write_cursor(
            msgspec.structs.replace(
                self._cursor, state_at=plain(self._position), state_file=path.name
            )
        )
        for other in folder.glob(f"{self.name}-*.state"):  # those of cursors that were lost, too
            if other != path:
                other.unlink(missing_ok=True)

    def _write_cursor(self, cursor: Cursor) -> None:
        self._insist(lambda: cursor_file.write(self._folder, cursor))
        self._cursor = cursor


def _patience(attempt: tenacity.RetryCallState) -> float:
    error = attempt.outcome.exception() if attempt.outcome else None
    if isinstance(error, StoreUnavailable | OSError):
        return tenacity.wait_random_exponential(multiplier=0.2, max=10)(attempt)
    # at a first start the tables are made while it asks for them
    return tenacity.wait_exponential(multiplier=0.5, max=REFUSED_RETRY_S)(attempt)


def _kind(error: BaseException) -> str:
    of_identity = isinstance(error, Superseded | EntryMissing | Unresolved)
    return "identity" if of_identity else "damage"


def _code(error: BaseException | None) -> str:
    if isinstance(error, StoreError):
        return "unreachable" if error.code is None else f"{error.code} {error.name}".strip()
    return "disk"

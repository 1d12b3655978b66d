"""The loader: follows the journal and loads it into one store, exactly once.

Two files survive a kill: the *cursor* (what was written and what was about to be) and a *state* (the books at
an earlier record). Before a range is written it is planned, in the store's ledger and in the cursor. A loader
that finds a plan writes exactly that range again, under the same names and tokens; writes are idempotent per
journal range. While a store is unreachable the loader retries: the journal keeps everything.

Building rows belongs in `rows` and `shared_rows`, writing them in `sinks`, deciding where to resume in `resume`.
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

from kalshi_platform.errors import PlatformError, StoreError, StoreUnavailable, needs_person
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
from kalshi_platform.loading.cursor import Cursor, Unusable, to_place
from kalshi_platform.loading.presence import Presence
from kalshi_platform.loading.resume import Point, Recorder, Unresolved
from kalshi_platform.loading.rows import Rows, StaleBook, build_rows
from kalshi_platform.loading.shared_rows import (
    CHUNK_ROWS,
    SharedRows,
    chunks,
    split_at_checkpoints,
    until_record,
)
from kalshi_platform.loading.sinks import Abandoned, Sink
from kalshi_platform.loading.state_files import (
    UnreadableState,
    checkpoint_batches,
    load,
    newest_saved,
    save,
    save_hour_state,
)
from kalshi_platform.loading.traces import Trace
from kalshi_platform.schema import DATASETS, ORDERBOOK_EVENTS
from kalshi_platform.utc_hours import floor_hour, hour_of_ns

log = logging.getLogger(__name__)

T = TypeVar("T")
STATE_EVERY_S = 30.0
DRAIN_GIVE_UP_S = 1.5
"""At the end, a failing store is given up after this: the journal keeps its rows."""
REFUSED_RETRY_S = 30.0
"""Retry interval while a store refuses: it may have been repaired meanwhile."""
RESTART_S = 30.0
"""Delay before a loader restarts that was stopped by a damaged journal or a fault."""
BEGIN_POLL_S = 0.05
"""Interval at which `may_begin` is polled."""


@dataclass(frozen=True)
class Pace:
    """When pending rows are written: at this many rows, or bytes in memory, or after this time."""

    rows: int
    seconds: float
    first_s: float
    """`seconds` for the first write, so that a new user sees rows soon."""
    gather_s: float = 0.0
    """How long the oldest record may wait for more before rows are built: few rows cost as much as many."""
    bytes: int = 64 << 20


CLICKHOUSE_PACE = Pace(rows=131_072, seconds=0.0, first_s=0.0, gather_s=0.4)
PARQUET_PACE = Pace(rows=262_144, seconds=60.0, first_s=5.0, gather_s=0.4)


class Loader:
    """Loads the journal into one store, in a thread of its own."""

    def __init__(
        self,
        folder: Path,
        writer: Writer,
        sink: Sink,
        pace: Pace,
        *,
        shard: int = 0,
        shared_rows: SharedRows | None = None,
        on_stale_book: Callable[[StaleBook], None] | None = None,
        observe: Callable[[Rows, BookState], None] | None = None,
        note: Callable[[str, Mapping[str, object]], None] | None = None,
        presence: Presence | None = None,
    ) -> None:
        """`note` journals a note; `presence` checks a store that is written to rarely; `observe` receives the
        rows and books of each range; `on_stale_book` receives books found to be wrong."""
        self._folder = folder
        self._writer = writer
        self._sink = sink
        self._pace = pace
        self._shared_rows = shared_rows or SharedRows(folder, shard)
        self._shared_rows.register_loader(sink.name)
        self._on_stale_book = on_stale_book
        self._observe = observe
        self._note = note
        self._presence = presence
        self._stopping = threading.Event()
        self._abandon = threading.Event()
        self._cursor = Cursor(committed=(0, 0, 0))
        self._entry: Entry | None = None
        """The store's ledger entry of this start."""
        self._state = BookState()
        self._position = LogOffset(0, 0, 0)
        """`_state` includes every record before this; rows not committed yet are in `_pending`."""
        self._waits_since = 0.0
        """No durable record waits to be built since earlier than this, by the monotonic clock."""
        self._pending: list[Rows] = []
        self.committed: LogOffset | None = None
        """Everything before this is durable in the store."""
        self.committed_ns = 0
        """When the last range became durable in the store, by this machine's clock."""
        self.loaded_ns = 0
        """The store has everything received up to this time."""
        self.latency = Latency()
        """From receive to durable in the store, for order-book events."""
        self.rows: Counter[str] = Counter()
        """Rows written to the store since the start, by dataset; derived tables are not counted."""
        self.errors: Counter[str] = Counter()
        """Failed writes since the start, by ClickHouse's code, `unreachable` or `disk`; and stops of the loader
        by `damage` to the journal, a `fault`, or the `identity` of journal or store."""
        self.failure: BaseException | None = None
        """What stopped the loader: a damaged journal or a bug. It restarts from its cursor every `RESTART_S`;
        recording continues."""
        self._trouble: str | None = None
        self._refused = False
        self._oldest = (-1, 0)
        """The first record that the store lacks, and its receive time."""
        self._may_begin: Callable[[], bool] = lambda: True
        self._thread = threading.Thread(target=self._run, name=f"load-{sink.name}", daemon=True)

    @property
    def name(self) -> str:
        """The store's name."""
        return self._sink.name

    @property
    def trouble(self) -> str | None:
        """Why rows cannot be written to the store at the moment, as a sentence; None while they can."""
        unreachable = self._presence.trouble if self._presence is not None else None
        return self._stopped_by or unreachable or self._trouble

    @property
    def _stopped_by(self) -> str | None:
        failure = self.failure  # the loading thread may clear it at any moment
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
        """Whether the problem needs a person: no retry resolves it."""
        place_refused = self._presence is not None and self._presence.refused
        return self.failure is not None or self._refused or place_refused

    @property
    def oldest_ns(self) -> int:
        """Receive time of the oldest durable record that the store lacks; 0 where it lacks none.

        Read from the journal, independently of the loader's progress. Also 0 where that record cannot be read:
        then the loader stops there and reports it.
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
        """That the store is behind, as a sentence, where the oldest record it lacks is too old; else None."""
        oldest_ns = self.oldest_ns
        age_s = (time.time_ns() - oldest_ns) / 1e9 if oldest_ns else 0.0
        if age_s <= BEHIND_S[self.name]:
            return None
        return (
            f"{self.name} is {age_s:,.0f} s behind: {self.lag:,} records wait in the journal, and nothing is"
            " lost. After an outage it catches up. If the age grows, it is slower than the feed: give it more"
            " CPU or a faster disk, or share the markets among more shards (STREAM_SHARDS)."
        )

    def start(self, may_begin: Callable[[], bool] = lambda: True) -> None:
        """Start the thread. Loading begins once `may_begin`, which is polled, returns True or at the end."""
        if self._presence is not None:
            self._presence.start()
        self._may_begin = may_begin
        self._thread.start()

    def drain(self) -> None:
        """Load the rest of the journal, then end; the journal's writer must be closed or idle."""
        self._stopping.set()
        if self._presence is not None:
            self._presence.end()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end; return whether everything was loaded in time.

        Gives up on a store whose writes have failed for `DRAIN_GIVE_UP_S`.
        """
        now = time.monotonic()
        ends, gives_up = now + timeout_s, now + DRAIN_GIVE_UP_S
        while self._thread.is_alive() and (now := time.monotonic()) < ends:
            if self.failure is None and self._trouble is None:
                gives_up = now + DRAIN_GIVE_UP_S
            elif now >= gives_up:
                break
            self._thread.join(0.05)
        ended = not self._thread.is_alive()
        self._abandon.set()
        if not ended:
            self._sink.abandon()
        return ended and self.failure is None and self._trouble is None

    @property
    def alive(self) -> bool:
        """Whether the thread is running."""
        return self._thread.is_alive()

    @property
    def lag(self) -> int:
        """The number of durable journal records that are not in the store yet."""
        done = self.committed.n if self.committed else 0
        began, ended = self._writer.began_n, self._writer.ended_n
        unused = began - ended if done <= ended else 0
        return max(self._writer.durable.n - unused - done, 0)

    @property
    def needs_from(self) -> int:
        """The first journal record that this loader may still have to read."""
        state_at = self._cursor.state_at
        return state_at[2] if state_at else 0

    # -- the loading thread --------------------------------------------------------------------

    def _run(self) -> None:
        """Load until the end; report whatever stops loading, and restart from the cursor."""
        while not (self._may_begin() or self._stopping.wait(BEGIN_POLL_S)):
            pass
        while True:
            try:
                self._load()
            except Abandoned:
                return
            except BaseException as error:  # a panic of Polars is not an Exception
                known = isinstance(error, PlatformError)
                if self.failure is None or str(error) != str(self.failure):
                    log.error("The load into %s stopped: %s", self.name, error, exc_info=not known)
                self.errors[_kind(error) if known else "fault"] += 1
                self.failure = (
                    error  # last, so that the log line and the count exist when it is seen
                )
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
                if self._position.n >= self._writer.durable.n:
                    self._writer.wait_beyond(self._position.n, 0.25)
                    self._waits_since = time.monotonic()
                began = time.monotonic()
            self._gather()
            self._build_pending()
            ending = self._stopping.is_set()
            if self._pending and (ending or self._full or time.monotonic() - began >= pace_s):
                self._commit(self._position)
                pace_s = self._pace.seconds
                if time.monotonic() - state_kept_at > STATE_EVERY_S:
                    self._keep_state()
                    state_kept_at = time.monotonic()
            if self.failure is not None and not self._pending:
                log.warning("The load into %s has resumed.", self.name)
                self.failure = None
            if ending and not self._pending and self._position.n >= self._writer.durable.n:
                self._keep_state()
                return

    def _gather(self) -> None:
        """Wait for more records, unless one has waited long, many wait, or the loader is ending.

        Records that came while the range before was written have waited already: a slow store adds nothing.
        """
        if self._writer.durable.n - self._position.n < CHUNK_ROWS:
            rest_s = self._waits_since + self._pace.gather_s - time.monotonic()
            self._stopping.wait(max(rest_s, 0.05 if self._pending else 0.0))

    @property
    def _full(self) -> bool:
        count = sum(rows.count for rows in self._pending)
        size = sum(rows.bytes for rows in self._pending)
        return count >= self._pace.rows or size >= self._pace.bytes

    def _build_pending(self) -> None:
        """Build rows of durable records until there are enough for one write."""
        self._waits_since, durable = time.monotonic(), self._writer.durable
        for built in self._shared_rows.steps(self.name, self._position, self._state, durable):
            if built.hour is not None:
                self._commit(self._position)
                self._begin_hour(built.hour)
                self._keep_state()
            self._add_pending(built.rows, built.state, built.end)
            for stale in built.rows.stale_books:
                self._report_stale(stale)
            if built.hour is not None:  # the hours before it are sealed with its first rows
                self._commit(self._position)
            if self._full or self._abandon.is_set():
                return

    def _add_pending(self, rows: Rows, state: BookState, end: LogOffset) -> None:
        self._pending.append(rows.of(self._sink.datasets))
        self._state, self._position = state, end
        if self._observe is not None:
            self._observe(rows, state)

    # -- resuming ----------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Go to where loading resumes, and write the planned range again."""
        self._pending.clear()
        stored = self._retrying(lambda: cursor_file.read(self._folder, self.name, self._writer.id))
        cursor = stored if isinstance(stored, Cursor) else None
        point = self._resume_point(stored)
        self.committed = reader.offset_of(self._folder, point.loaded_to)
        self._state, self._position = self._books_before(point.loaded_to, cursor)
        whole = self._state.version > 0 or not self._is_pruned
        self._replay(point.loaded_to, written=True)
        if not whole:
            self._state = self._state.without_snapshotless_books()
        self._claim(point, cursor)
        self.loaded_ns = self._state.version
        if point.planned_to > point.loaded_to:
            self._replay(point.planned_to, written=False)
            self._commit(self._position)

    def _resume_point(self, stored: Cursor | Unusable) -> Point:
        """Where loading resumes. Raises: `Superseded`, or `Unresolved` where that cannot be determined."""
        cursor = stored if isinstance(stored, Cursor) else None
        why_none = stored.why if isinstance(stored, Unusable) else ""
        writer, sink = self._writer, self._sink
        entries = self._retrying(lambda: sink.ledger.entries(writer.id))
        own = frozenset((start.epoch, start.token) for start in writer.identity.starts)
        recorder = Recorder(writer.id, own, max(own), began=writer.began_n, ended=writer.ended_n)
        point = resume.from_ledger(entries, recorder, sink.place)
        if point is None:
            return self._point_without_ledger(stored)
        point = resume.compare_with_cursor(point, cursor, why_none)
        if not point.certain:
            point = self._point_by_traces(point, cursor)
        if point.loaded_to < reader.oldest_offset(self._folder).n:
            raise self._no_longer_kept(point)
        return point

    def _point_by_traces(self, point: Point, cursor: Cursor | None) -> Point:
        """Decide by traces where the cursor disagrees with the ledger."""
        if cursor is not None and cursor.committed[2] > point.planned_to:
            n = cursor.committed[2]
            if self._holds(
                traces.last_before(self._folder, n)
            ):  # the rows are there: the ledger is old
                return replace(point, loaded_to=n, planned_to=cursor.planned_n)
        return self._skip_written_ranges(point)

    def _skip_written_ranges(self, point: Point) -> Point:
        """Move the point beyond ranges that the store has although its ledger does not say so."""
        following = traces.first_from(self._folder, point.planned_to)
        if not self._holds(following):
            return point
        since = floor_hour(min(hour_of_ns(trace.recv_ns) for trace in following))
        last = self._retrying(lambda: self._sink.written_from(point.planned_to, since))
        if last is None:
            raise self._unresolved(f"its ledger says {point.loaded_to}, but it holds more")
        return replace(point, loaded_to=last[0], planned_to=last[1])

    def _point_without_ledger(self, cursor: Cursor | Unusable) -> Point:
        """Where loading resumes where the store's ledger has no entry of this journal."""
        beginning = reader.oldest_offset(self._folder).n
        empty = not self._holds(traces.first_from(self._folder, beginning))
        if isinstance(cursor, Unusable):
            if not empty:
                raise self._unresolved(cursor.why)
            if cursor.exists:
                raise self._rows_gone(f"what was loaded there ({cursor.why})")
            return Point(beginning, beginning, cursor.why if self._is_pruned else "")
        committed = cursor.committed[2]
        if committed <= beginning and cursor.planned is None and empty:
            return Point(beginning, beginning)
        before = self._holds(traces.last_before(self._folder, committed))
        after = self._holds(traces.first_from(self._folder, cursor.planned_n))
        if before is not False and after is not True:
            return Point(committed, cursor.planned_n, "the store had no ledger yet")
        if before is not False and after:  # killed before the cursor was written
            point = Point(committed, cursor.planned_n, "the store's ledger is gone")
            return self._skip_written_ranges(point)
        if before or after or not empty:
            raise self._unresolved(f"the cursor, at record {committed}, does not agree with it")
        if not cursor.place or cursor.place == self._sink.place:
            raise self._rows_gone(f"what was loaded there up to record {committed}")
        return Point(beginning, beginning, f"{self._sink.place} is a new location")

    def _rows_gone(self, what: str) -> Unresolved:
        file = cursor_file.path(self._folder, self.name)
        return Unresolved(
            f"{self._sink.place} does not hold {what}: it is not mounted, or was emptied or replaced. Restore"
            f" it, and loading resumes by itself. If it is lost for good, {self._sink.remedy}, or remove"
            f" {file}: loading starts again there with what the journal still has."
        )

    def _holds(self, stored: Sequence[Trace]) -> bool | None:
        """Whether the store has any of the traces; None where it cannot be determined for any."""
        answers = [self._retrying(partial(self._sink.holds, trace)) for trace in stored]
        return True if True in answers else False if False in answers else None

    def _unresolved(self, why: str) -> Unresolved:
        return Unresolved(
            f"{self._sink.place} holds rows of journal {self._writer.id}, and it is not known up to which"
            f" record: {why}. Nothing is loaded there, because rows could be stored twice. Restore the folder"
            f" {self._folder / 'load'} from a backup. Without one, {self._sink.remedy}."
        )

    def _no_longer_kept(self, point: Point) -> JournalError:
        beginning = reader.oldest_offset(self._folder).n
        name = reader.set_aside(reader.segment_path(self._folder, point.loaded_to)).name
        return JournalError(
            f"{self._sink.place} holds this journal up to record {point.loaded_to}, and the journal in"
            f" {self._folder} begins at {beginning}: the records between are missing. Restore the store, or"
            f" the segments, from a newer backup. Without one, make an empty file {name} there: the records"
            " that the journal still has are loaded then, and gap rows name the lost ones."
        )

    def _claim(self, point: Point, cursor: Cursor | None) -> None:
        """Claim the store's ledger entry for this start, then write the cursor."""
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
            self._retrying(lambda: self._sink.ledger.claim(self._writer.id, entry))
        self._entry = entry
        keeps_state = cursor is not None and cursor.state_at is not None
        self._write_cursor(
            Cursor(
                format=cursor_file.FORMAT,
                journal=self._writer.id,
                store=self.name,
                place=self._sink.place,
                start=start,
                committed=to_place(self._position),
                state_at=cursor.state_at if cursor and keeps_state else None,
                state_file=cursor.state_file if cursor and keeps_state else "",
            )
        )
        if point.why:
            log.warning(
                "The load into %s resumes at record %d: %s.", self.name, point.loaded_to, point.why
            )
            if self._note is not None:
                detail = {"store": self.name, "record": point.loaded_to, "why": point.why}
                self._note("resumed", detail)

    def _books_before(self, n: int, cursor: Cursor | None) -> tuple[BookState, LogOffset]:
        """The books at or before record `n`, and their log offset."""
        if n == self._writer.began_n > self._writer.ended_n:
            return BookState(n=n), reader.offset_of(
                self._folder, n
            )  # numbers were left out before it
        if cursor is not None and cursor.state_at is not None and cursor.state_at[2] <= n:
            try:
                state = load(self._folder / "load" / cursor.state_file, cursor.state_at[2])
            except UnreadableState as error:
                log.warning("%s The books are rebuilt from an earlier record.", error)
            else:
                return state, LogOffset(*cursor.state_at)
        beginning = reader.oldest_offset(self._folder)
        starts = {start.token for start in self._writer.identity.starts}
        newest = newest_saved(self._folder, starts, beginning.n, n)
        if newest is not None:
            return newest, reader.offset_of(self._folder, newest.n)
        return BookState(n=beginning.n), beginning

    @property
    def _is_pruned(self) -> bool:
        """Whether the journal's first record was removed."""
        return reader.oldest_offset(self._folder).n > self._writer.identity.first

    def _replay(self, until_n: int, *, written: bool) -> None:
        """Build rows up to record `until_n`, which is durable because it was committed or planned.

        `written`: the store has the rows, so only the books are kept. Rows of a planned range are kept pending,
        to be written as one range.
        """
        stale: dict[str, StaleBook] = {}
        for part in chunks(until_record(until_n, reader.read(self._folder, self._position))):
            for piece, _ in split_at_checkpoints(part, self._state.clock):
                if self._abandon.is_set():
                    raise Abandoned
                rows, state = build_rows(decode_range(piece), self._state, self._shared_rows.shard)
                self._add_pending(rows, state, piece.end)
                if written:
                    self._pending.clear()
                stale.update({book.market_ticker: book for book in rows.stale_books})
        if self._position.n != until_n:
            raise JournalError(
                f"The load into {self.name} had come to record {until_n}, but the journal in"
                f" {self._folder} ends at {self._position.n}: its end was lost, or it was replaced. Restore"
                f" it from a backup. Without one, stop the recorder and run {ADOPT}: it continues as an"
                " independent recorder with what the journal has."
            )
        for stale_book in stale.values():  # their snapshots may never have been requested
            book = self._state.books.get(stale_book.market_ticker)
            if book is not None and not book.verified:
                self._report_stale(stale_book)

    def _report_stale(self, stale_book: StaleBook) -> None:
        if self._on_stale_book is not None:
            self._on_stale_book(stale_book)

    def _begin_hour(self, hour: datetime) -> None:
        n = self._position.n
        self._retrying(lambda: save_hour_state(self._state, self._folder, hour))
        self._retrying(lambda: self._sink.begin_hour(hour, self._books(hour), n))

    def _books(self, hour: datetime) -> Iterator[pa.Table]:
        """Yield the books before the hour's first record in batches, until the loader is abandoned."""
        for batch in checkpoint_batches(self._state, hour, self._shared_rows.shard):
            if self._abandon.is_set():
                raise Abandoned
            yield batch

    def _commit(self, end: LogOffset) -> None:
        """Plan, write, advance; in this order, so that a kill in between repeats a range and never skips one."""
        first_n = self._cursor.committed[2]
        if end.n == first_n:
            return
        rows = tuple(self._pending)
        self._write_cursor(msgspec.structs.replace(self._cursor, planned=to_place(end)))
        self._update_entry(first_n, end.n)
        self._retrying(lambda: self._sink.write(first_n, end.n, rows))
        self._update_entry(end.n, end.n)
        self._write_cursor(
            msgspec.structs.replace(self._cursor, committed=to_place(end), planned=None)
        )
        for written in rows:
            self.rows.update(
                {n: t.num_rows for n, t in written.tables.items() if DATASETS[n].archived}
            )
        self._pending.clear()
        self.committed = end
        self.committed_ns = time.time_ns()
        self.loaded_ns = self._state.version
        for table in (r.tables[ORDERBOOK_EVENTS.name] for r in rows):
            received_ns = table["ingest_ts"].cast(pa.int64()).to_numpy() * 1000
            self.latency.add(received_ns, self.committed_ns)

    def _update_entry(self, loaded_to: int, planned_to: int) -> None:
        """Update the store's ledger entry: up to where it is loaded, and up to where a write is planned."""
        before, ledger = self._entry, self._sink.ledger
        if before is None:
            raise ValueError("no range may be written before the ledger entry is claimed")
        after = msgspec.structs.replace(before, loaded_to=loaded_to, planned_to=planned_to)
        act = ledger.commit if loaded_to == planned_to else ledger.plan
        self._retrying(lambda: act(self._writer.id, before, after))
        self._entry = after

    def _retrying(self, act: Callable[[], T]) -> T:
        """Call `act` until the store accepts it, with back-off."""

        def before_sleep(attempt: tenacity.RetryCallState) -> None:
            error = attempt.outcome.exception() if attempt.outcome else None
            self.errors[_code(error)] += 1
            self._refused = needs_person(error)
            sentence = self._disk_sentence(error) if isinstance(error, OSError) else str(error)
            if self._trouble != sentence:
                log.error("Records not in %s yet stay in the journal: %s", self.name, sentence)
                self._trouble = sentence  # after logging: the line exists when the problem is seen

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type((StoreError, OSError)),
            wait=_retry_wait_s,
            sleep=self._sleep,
            before_sleep=before_sleep,
        )
        done = retrying(act)
        if self._trouble is not None:
            log.warning("%s accepts rows again.", self.name)
        self._trouble, self._refused = None, False
        return done

    def _disk_sentence(self, error: OSError) -> str:
        where = error.filename or self._folder / "load"
        return f"{where} cannot be written ({error.strerror}). Correct that; loading resumes by itself."

    def _sleep(self, seconds: float) -> None:
        if self._abandon.wait(seconds):
            raise Abandoned

    def _keep_state(self) -> None:
        """Save the books as of the committed log offset and remove earlier saved books."""
        if self._position.n != self._cursor.committed[2]:
            raise ValueError("books are saved only at a committed log offset")
        folder = self._folder / "load"
        path = folder / f"{self.name}-{self._position.n:015d}.state"
        start = self._writer.identity.starts[-1].token
        self._retrying(lambda: save(self._state, path, start))
        self._write_cursor(
            msgspec.structs.replace(
                self._cursor, state_at=to_place(self._position), state_file=path.name
            )
        )
        for other in folder.glob(f"{self.name}-*.state"):  # including those of lost cursors
            if other != path:
                other.unlink(missing_ok=True)

    def _write_cursor(self, cursor: Cursor) -> None:
        self._retrying(lambda: cursor_file.write(self._folder, cursor))
        self._cursor = cursor


def _retry_wait_s(attempt: tenacity.RetryCallState) -> float:
    error = attempt.outcome.exception() if attempt.outcome else None
    if isinstance(error, StoreUnavailable | OSError):
        return tenacity.wait_random_exponential(multiplier=0.2, max=10)(attempt)
    # A short wait at first: at a first start the tables are created while the loader starts.
    return tenacity.wait_exponential(multiplier=0.5, max=REFUSED_RETRY_S)(attempt)


def _kind(error: BaseException) -> str:
    concerns_identity = isinstance(error, Superseded | EntryMissing | Unresolved)
    return "identity" if concerns_identity else "damage"


def _code(error: BaseException | None) -> str:
    if isinstance(error, StoreError):
        return "unreachable" if error.code is None else f"{error.code} {error.name}".strip()
    return "disk"

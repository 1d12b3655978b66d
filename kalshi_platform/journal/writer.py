"""The journal's writer: a thread that makes submitted records durable, batch by batch.

Group commit. Everything that waits is written as one batch with one `fdatasync`, within bounds: on a slow
disk batches become larger, while latency stays bounded by the sync. Records that the disk has not
accepted yet wait in memory; beyond `BACKLOG_BYTES` capture stops reading the socket.

Retries. A batch is retried until it is durable. After a failed `fdatasync` it is written to another
segment (see `segment`). The next segment is created before the current one is closed.

Single writer. One process writes a journal (see `lock`). Where the lock file or the current segment was
removed, the writer sets `failure`, on which the streamer stops. Until then it writes only to a segment
that it is certain to own.

The file format belongs in `reader`, the system calls in `segment`.
"""

from __future__ import annotations

import errno
import io
import itertools
import logging
import threading
import time
import uuid
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kalshi_platform import durable
from kalshi_platform.journal import journal_identity, reader
from kalshi_platform.journal.journal_identity import Claim, JournalIdentity
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.latency import Latency
from kalshi_platform.journal.lock import FolderLock, LockHeld, verify_no_writer
from kalshi_platform.journal.reader import (
    NO_CONNECTION,
    SCHEMA,
    SET_ASIDE,
    JournalError,
    LogOffset,
    checksum,
)
from kalshi_platform.journal.segment import REAL_DISK, Disk, Segment

log = logging.getLogger(__name__)

SEGMENT_BYTES = 128 << 20
"""The next segment begins when one reaches this size."""
LARGEST_SEGMENT_BYTES = SEGMENT_BYTES * 3 // 2
"""How far a segment grows where the disk has no room for another file."""
BATCH_RECORDS = 32_768
BATCH_BYTES = 8 << 20
"""A batch is submitted at this size, or at the next tick of capture's timer. The same bounds limit how
many waiting batches are written with one `fdatasync`."""
BACKLOG_BYTES = 64 << 20
"""Beyond this much data waiting for the disk, capture stops reading the socket."""
RETRY_S = 1.0
CHECK_S = 1.0
"""Interval at which the lock and the segment are checked."""
UNDURABLE_MS = 2_000
"""Records that are not durable after this are reported as a problem."""


@dataclass(frozen=True)
class UnfinishedEnd:
    """The unreadable end of the last segment, as a kill in mid-write leaves it."""

    segment: str
    good_up_to_byte: int
    good_up_to_n: int
    bytes_left: int


@dataclass(frozen=True)
class StartPoint:
    """The record number and epoch at which a recorder starts."""

    first_n: int
    """The number of its first record."""
    epoch: int = 0
    """The lowest epoch that the start may have."""


class Writer:
    """Appends to a journal. Only one thread, capture's, may call `append` and `submit`."""

    def __init__(
        self,
        folder: Path,
        *,
        reached: int = 0,
        claims: Sequence[Claim] = (),
        choose_start: Callable[[JournalIdentity, int], StartPoint] | None = None,
        disk: Disk = REAL_DISK,
    ) -> None:
        """Lock the folder, establish its identity, begin a segment and start the writing thread.

        `reached`: record numbers below this are in use, even if their segments have been removed.
        `claims`: evidence of the journal's id besides `journal.json`. `choose_start` is called under the
        lock with the identity and the first free number, and returns where to start.

        Raises: `JournalError` where another writer holds the folder, the disk refuses, or the journal's
        identity cannot be established.
        """
        self._folder = folder
        self._disk = disk
        _make_folder(folder)
        self._lock = _lock(folder)
        try:
            known = journal_identity.establish(folder, claims)
            _verify_no_writer(folder)
            _set_aside_superseded(folder)
            self.unfinished_end, self.damage, free = _inspect_end(folder)
            self.ended_n = max(free, reached)
            """The first number that was free before this start."""
            at = choose_start(known, self.ended_n) if choose_start else StartPoint(self.ended_n)
            self.identity = journal_identity.begin(folder, known, at.epoch, at.first_n)
            start = self._next_n = self.began_n = at.first_n
            """The first record of this start."""
            self._segment = self._begin_segment(start)
        except OSError as error:
            self._lock.release()
            raise _cannot_write(folder, error) from None
        except JournalError:
            self._lock.release()
            raise
        self._encoder = _Encoder()
        self._batch = _Batch()
        self._queue: deque[_Batch] = deque()
        self._queued_bytes = 0
        self._wake = threading.Condition()
        self._closing = False
        self._checked_at = time.monotonic()
        self.blocked: str | None = None
        """Why nothing can be written at the moment, as a sentence; None while writing succeeds."""
        self.failure: BaseException | None = None
        """Why this writer must stop: its lock or segment was removed, or the program failed."""
        self._oversized: str | None = None
        """Why the segment exceeds `SEGMENT_BYTES`, as a sentence; None while it does not."""
        self.durable = LogOffset(start, self._segment.size, start)
        """Everything before this is on disk."""
        self.durable_recv_ns = 0
        """Receive time of the last record on disk."""
        self.flushed_ns = 0
        """When the last batch became durable, by this machine's clock."""
        self.bytes_written = 0
        self.latency = Latency()
        """From receive to durable."""
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    @property
    def id(self) -> uuid.UUID:
        """The journal's id, part of every deduplication token."""
        return self.identity.id

    # -- called by capture -------------------------------------------------------------------

    def append(self, recv_ns: int, conn: bytes, kind: int, frame: bytes) -> None:
        """Append one record. It is durable once `durable.n` is greater than its number."""
        self.extend(recv_ns, conn, (kind,), (frame,))

    def extend(
        self, recv_ns: int, conn: bytes, kinds: Sequence[int], frames: Sequence[bytes]
    ) -> None:
        """Append records that were received together, in order."""
        batch, count = self._batch, len(frames)
        if not batch.recv:
            batch.since_ns = time.monotonic_ns()
        batch.recv.extend(array("q", (recv_ns,)) * count)
        batch.conn.append((conn, count))
        batch.kind.extend(kinds)
        batch.frame.extend(frames)
        batch.bytes += sum(map(len, frames)) + 64 * count
        if batch.bytes >= BATCH_BYTES or len(batch.recv) >= BATCH_RECORDS:
            self.submit()

    def note(
        self,
        kind: str,
        detail: Mapping[str, object],
        *,
        conn: bytes = NO_CONNECTION,
        sid: int = 0,
        market_ticker: str = "",
        recv_ns: int | None = None,
    ) -> None:
        """Append a note: an event of the recorder itself."""
        body = {"kind": kind, "sid": sid, "market_ticker": market_ticker, "detail": detail}
        at = time.time_ns() if recv_ns is None else recv_ns
        self.append(at, conn, Kind.NOTE, msgspec.json.encode(body))

    def submit(self) -> None:
        """Queue the appended records for the disk; called on every tick of capture's timer."""
        batch = self._batch
        if not batch.recv:
            return
        self._batch = _Batch()
        with self._wake:
            self._queue.append(batch)
            self._queued_bytes += batch.bytes
            self._wake.notify_all()

    @property
    def backlog_bytes(self) -> int:
        """Bytes waiting for the disk."""
        return self._queued_bytes + self._batch.bytes

    @property
    def full(self) -> bool:
        """Whether capture must stop reading."""
        return self.backlog_bytes > BACKLOG_BYTES

    def wait_durable(self, n: int, timeout_s: float) -> bool:
        """Wait until every record before number `n` is on disk."""
        with self._wake:
            return self._wake.wait_for(lambda: self.durable.n >= n, timeout_s)

    def wait_beyond(self, n: int, timeout_s: float) -> bool:
        """Wait until there is a durable record with number `n` or greater."""
        with self._wake:
            return self._wake.wait_for(lambda: self.durable.n > n, timeout_s)

    @property
    def next_n(self) -> int:
        """The number of the next record to be appended."""
        with self._wake:
            return self._next_n + sum(len(b.recv) for b in self._queue) + len(self._batch.recv)

    @property
    def oldest_undurable_ms(self) -> int:
        """Age in ms of the oldest record that is not durable, since it was appended; 0 where all are durable."""
        with self._wake:
            oldest = self._queue[0] if self._queue else self._batch
            since_ns = oldest.since_ns
        return (time.monotonic_ns() - since_ns) // 1_000_000 if since_ns else 0

    @property
    def trouble(self) -> str | None:
        """The most severe problem, as a sentence; None while there is none."""
        if self.failure is not None:
            return str(self.failure)
        if self.blocked is not None:
            return self.blocked
        if (age_ms := self.oldest_undurable_ms) > UNDURABLE_MS:
            return (
                f"The disk of the journal in {self._folder} is slow: frames received {age_ms / 1e3:.1f} s"
                f" ago are not durable yet (the normal maximum is {UNDURABLE_MS / 1e3:.0f} s), and a kill"
                " would lose them. Use a faster disk, or find what else writes there."
            )
        return self._oversized

    def close(self, timeout_s: float = 8.0, *, submitted: bool = False) -> None:
        """Write what is queued, close the segment and release the lock.

        `submitted`: capture's thread has submitted everything, or still runs and must not be interfered with.

        Raises: `JournalError`, with the size of the loss, where not everything was durable within `timeout_s`.
        """
        if not submitted:
            self.submit()
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(timeout_s)
        undurable = self._undurable_records()
        if not self._thread.is_alive():
            self._lock.release()
        if undurable is not None:
            raise JournalError(undurable)

    def _undurable_records(self) -> str | None:
        """How many records are not durable, as a sentence; None where all are."""
        with self._wake:
            waiting = [batch for batch in (*self._queue, self._batch) if batch.recv]
        if not waiting:
            return None
        frames = [
            len(frame)
            for batch in waiting
            for kind, frame in zip(batch.kind, batch.frame, strict=True)
            if kind != Kind.NOTE
        ]
        notes = sum(len(batch.recv) for batch in waiting) - len(frames)
        reason = self.blocked or (str(self.failure) if self.failure else "The disk is slow.")
        return (
            f"{len(frames):,} frames ({sum(frames):,} bytes) and {notes:,} notes could not be written to"
            f" {self._folder} before the end. They are lost, and the next start marks the gap. {reason}"
        )

    # -- the writing thread ------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._write_until_closed()
        except BaseException as error:
            log.error("The journal's writing thread failed: %s", error, exc_info=True)
            self.failure = error

    def _write_until_closed(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closing, CHECK_S)
                batches, closing = self._waiting_batches(), self._closing
            if time.monotonic() - self._checked_at >= CHECK_S:
                self._check()
            if batches:
                self._write(batches)
            elif closing:
                break
        self._segment.end()

    def _waiting_batches(self) -> list[_Batch]:
        """The queued batches to write next, as many as fit the bounds of one batch."""
        records = size = 0
        batches: list[_Batch] = []
        for batch in self._queue:
            records += len(batch.recv)
            size += batch.bytes
            if batches and (records > BATCH_RECORDS or size > BATCH_BYTES):
                break
            batches.append(batch)
        return batches

    def _write(self, batches: list[_Batch]) -> None:
        """Write batches as one, retrying until they are durable."""
        recv = np.concatenate([np.frombuffer(batch.recv, np.int64) for batch in batches])
        data = self._encoder.encode(batches, recv, self._next_n)
        while not self._append(data):
            time.sleep(RETRY_S)
            self._check()
        if self.blocked:
            log.warning("Writing to the journal has resumed.")
            self.blocked = None
        self._next_n += len(recv)
        self.bytes_written += len(data)
        with self._wake:
            for batch in batches:
                self._queue.popleft()
                self._queued_bytes -= batch.bytes
            self.durable_recv_ns = int(recv[-1])
            self.flushed_ns = time.time_ns()
            self.durable = LogOffset(self._segment.first_n, self._segment.size, self._next_n)
            self._wake.notify_all()
        self.latency.add(recv, self.flushed_ns)

    def _append(self, data: bytes) -> bool:
        """Make one encoded batch durable; return False where the disk refuses it."""
        try:
            self._change_segment()
            self._segment.append(data)
        except OSError as error:
            self._report_blocked(_disk_error(self._folder, error))
            return False
        except JournalError as error:
            self.failure = self.failure or error
            self._report_blocked(str(error))
            return False
        return True

    def _report_blocked(self, sentence: str) -> None:
        if self.blocked != sentence:
            log.error("%s Reading stops when %d MiB wait.", sentence, BACKLOG_BYTES >> 20)
            self.blocked = sentence  # after logging: the line exists when `blocked` is seen

    def _change_segment(self) -> None:
        """Begin the next segment where the current one is full or no longer trusted."""
        segment = self._segment
        if segment.trusted and segment.size < SEGMENT_BYTES:
            return
        self._check()
        if segment.trusted and self.failure is not None:
            return  # this segment is certainly ours; without the lock a new one might not be
        if not segment.trusted:
            segment.abandon()
        try:
            self._segment = self._begin_segment(self._next_n)
        except OSError as error:
            # A leftover empty file of that name would end this segment for readers: retry, not append.
            leftover = reader.segment_path(self._folder, self._next_n).exists()
            if leftover or not segment.trusted or segment.size >= LARGEST_SEGMENT_BYTES:
                raise
            self._report_oversized(error)
            return
        self._oversized = None
        if segment.trusted:
            segment.end()

    def _report_oversized(self, error: OSError) -> None:
        sentence = (
            f"The journal in {self._folder} continues in a full segment, because another file cannot be"
            f" created ({error.strerror}): make room for files (inodes, quota, open files)."
        )
        if self._oversized != sentence:
            log.error("%s", sentence)
            self._oversized = sentence

    def _check(self) -> None:
        """Set `failure` where the current segment or the lock file was removed."""
        self._checked_at = time.monotonic()
        segment = self._segment
        if segment.removed:
            segment.trusted = False
            self.failure = self.failure or JournalError(
                f"The journal segment {segment.name} was removed from {self._folder} while it was being"
                f" written: its records {segment.first_n} to {self._next_n - 1} exist only in the stores"
                " that had loaded them. The streamer stops. Restore the file if there is a copy, and start"
                " the streamer again."
            )
        if self._lock.lost and self.failure is None:
            self.failure = JournalError(
                f"The lock of the journal, {self._folder}/lock, was removed or replaced while it was held:"
                " another streamer could lock the same folder. This one stops, before two write there. Make"
                " sure that nothing removes that file, and start the streamer again."
            )

    def _begin_segment(self, first_n: int) -> Segment:
        """Create the next segment. Raises: `OSError`, or `JournalError` where another process writes that file."""
        folder_fd = self._lock.folder_fd
        try:
            return Segment(self._disk, folder_fd, first_n)
        except FileExistsError:
            leftover = _empty_segment(self._folder, first_n)
            names = (leftover.name, _set_aside_name(leftover).name)
            self._disk.rename(*names, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        return Segment(self._disk, folder_fd, first_n)


class _Encoder:
    """Encodes batches as messages of one Arrow IPC stream."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        self._stream = pa.ipc.new_stream(pa.PythonFile(self._buffer, "w"), SCHEMA, options=options)
        self._stream.write_batch(pa.RecordBatch.from_pylist([], SCHEMA))
        self._take()  # discards the stream header: each segment writes it itself

    def encode(self, batches: Sequence[_Batch], recv_ns: NDArray[np.int64], first_n: int) -> bytes:
        """Encode batches as one message whose first record has number `first_n`."""
        runs = (run for batch in batches for run in batch.conn)
        frames = list(itertools.chain.from_iterable(batch.frame for batch in batches))
        arrays = pa.RecordBatch.from_arrays(
            [
                _column(pa.int64(), len(frames), recv_ns),
                _column(pa.binary(16), len(frames), b"".join(conn * count for conn, count in runs)),
                _column(pa.uint8(), len(frames), b"".join(batch.kind for batch in batches)),
                pa.array(frames, pa.binary()),
            ],
            schema=SCHEMA,
        )
        metadata = {"n": str(first_n), "crc32": str(checksum(arrays))}
        self._stream.write_batch(arrays, custom_metadata=metadata)
        return self._take()

    def _take(self) -> bytes:
        data = self._buffer.getvalue()
        self._buffer.seek(0)
        self._buffer.truncate()
        return data


@dataclass
class _Batch:
    """Records on their way to the disk; immutable once submitted."""

    recv: array[int] = field(default_factory=lambda: array("q"))
    conn: list[tuple[bytes, int]] = field(default_factory=list)
    """Run-length encoded: a connection id and its number of consecutive records."""
    kind: bytearray = field(default_factory=bytearray)
    frame: list[bytes] = field(default_factory=list)
    bytes: int = 0
    since_ns: int = 0
    """Monotonic time in ns at which the first record was appended; 0 while there is none."""


def _column(dtype: pa.DataType, rows: int, values: NDArray[np.int64] | bytes) -> pa.Array:
    return pa.Array.from_buffers(dtype, rows, [None, pa.py_buffer(values)])


# -- opening -----------------------------------------------------------------------------------


def _make_folder(folder: Path) -> None:
    """Create the folder, durably."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        for path in missing:
            durable.sync(path.parent)
    except OSError as error:
        raise JournalError(
            f"The journal folder {folder} cannot be created ({error.strerror})."
            " Set KALSHI_DATA_DIR to a folder that this user can write."
        ) from None


@contextmanager
def hold_lock(folder: Path) -> Iterator[int]:
    """Hold a journal's lock without writing; yields the first free record number.

    Raises: `JournalError` where a streamer holds the lock.
    """
    lock = _lock(folder)
    try:
        _verify_no_writer(folder)
        yield _inspect_end(folder)[2]
    finally:
        lock.release()


def _lock(folder: Path) -> FolderLock:
    try:
        return FolderLock(folder)
    except LockHeld:
        raise _another_streamer(folder) from None
    except OSError as error:
        raise _cannot_write(folder, error) from None


def _verify_no_writer(folder: Path) -> None:
    """Test the lock of every segment: the lock file may have been removed under a running streamer."""
    for first_n in reader.segments(folder):
        try:
            verify_no_writer(reader.segment_path(folder, first_n))
        except LockHeld:
            raise _another_streamer(folder) from None


def _another_streamer(folder: Path) -> JournalError:
    return JournalError(
        f"Another streamer is writing to {folder}. Stop it first, or set KALSHI_DATA_DIR to"
        " another folder."
    )


def _empty_segment(folder: Path, first_n: int) -> Path:
    """The leftover segment of this name, which has no records.

    Raises: `JournalError` where it has records or another process writes it.
    """
    path = reader.segment_path(folder, first_n)
    try:
        verify_no_writer(path)
    except LockHeld:
        raise _another_streamer(folder) from None
    if any(reader.whole_batches(path)):
        raise JournalError(
            f"{path} should begin with record {first_n} but has records already: another streamer has"
            f" written to {folder}. Make sure that only one runs, and start it again."
        )
    return path


def _set_aside_superseded(folder: Path) -> None:
    """Rename an empty last segment whose batch is still in the preceding one.

    A kill between beginning a segment and writing the unconfirmed batch to it leaves this state.
    """
    newest = [reader.segment_path(folder, n) for n in reader.segments(folder)[-2:]]
    if len(newest) < 2 or any(path.suffix == SET_ASIDE for path in newest):
        return
    path, last = newest
    if reader.batches_from(path, int(last.stem)) and not any(reader.whole_batches(last)):
        last.rename(_set_aside_name(last))


def _set_aside_name(path: Path) -> Path:
    return path.with_name(f"{path.name}.torn-{time.time_ns()}")


def _cannot_write(folder: Path, error: OSError) -> JournalError:
    return JournalError(f"{_disk_error(folder, error)} Or set KALSHI_DATA_DIR to another folder.")


def _disk_error(folder: Path, error: OSError) -> str:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"No space is left for the journal in {folder}: make room."
    return f"The journal in {folder} cannot be written ({error.strerror}): check the disk and its permissions."


def _inspect_end(folder: Path) -> tuple[UnfinishedEnd | None, str | None, int]:
    """Return (the last segment's unfinished end, the damage to it, the first free record number)."""
    existing = reader.segments(folder)
    if not existing:
        return None, None, 0
    first_n = existing[-1]
    path = reader.segment_path(folder, first_n)
    if path.name.endswith(SET_ASIDE):
        return None, None, _first_free_number(path, first_n)
    position = LogOffset(first_n, 0, first_n)
    try:
        for records in reader.read_segment(path, position, None):
            position = records.end
    except JournalError as error:
        return None, str(error), _first_free_number(path, first_n)
    left = reader.bytes_after(path, position.offset)
    if left and any(reader.whole_batches(path, position.offset)):
        why = "intact batches follow bytes that are not a batch"
        damage = reader.corrupt_segment(path, position.offset, position.n, why)
        return None, str(damage), _first_free_number(path, first_n)
    unfinished_end = (
        UnfinishedEnd(path.name, position.offset, position.n - 1, left) if left else None
    )
    return unfinished_end, None, position.n


def _first_free_number(path: Path, first_n: int) -> int:
    """A number greater than that of every record a damaged segment may have had."""
    intact = list(reader.whole_batches(path))
    if intact and not reader.bytes_after(path, intact[-1].end_offset):
        return max(batch.end_n for batch in intact)
    # Upper bound: a record takes more than a byte, as its compressed frame offset alone takes two.
    return first_n + 2 * SEGMENT_BYTES

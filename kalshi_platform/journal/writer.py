"""Writing the journal: what comes is handed to a thread that makes it durable, batch by batch.

All that waits becomes one batch with one `fdatasync`, within bounds, so that a slow disk makes batches
larger and not older. What the disk does not take waits in memory, up to a bound, at which capture stops
reading. A batch is tried again until it is durable; after an `fdatasync` that failed it goes to another
segment (`segment.py`). The next segment is open before the one before it ends.

One process writes a journal (`lock.py`). A writer whose lock no longer guards the folder, or whose
segment was removed, writes on where it is sure to be alone and says so (`failure`), for the streamer to
stop.
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
from kalshi_platform.journal.lock import FolderLock, Held, insist_on_no_writer
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
"""A segment of this size is followed by the next one."""
LARGEST_SEGMENT_BYTES = SEGMENT_BYTES * 3 // 2
"""How far it grows where the disk has no room for another file."""
BATCH_RECORDS = 32_768
BATCH_BYTES = 8 << 20
"""A batch is handed over when it holds so much, or at the next tick of capture's clock; and as much
is written with one `fdatasync` where several wait."""
BACKLOG_BYTES = 64 << 20
"""Beyond this much waiting for the disk, capture stops reading the socket."""
RETRY_S = 1.0
CHECK_S = 1.0
"""Between two looks at whether the lock still guards the folder."""
UNDURABLE_MS = 2_000
"""Records that are not durable after this are told as trouble."""


@dataclass(frozen=True)
class Torn:
    """A segment whose end cannot be read, as a kill in mid-write leaves it."""

    segment: str
    good_up_to_byte: int
    good_up_to_n: int
    bytes_left: int


@dataclass(frozen=True)
class Beginning:
    """Where a start of a recorder begins."""

    first_n: int
    """The number of its first record."""
    epoch: int = 0
    """The least epoch that it may take."""


class Writer:
    """Appends to a journal. `append` and `hand_over` belong to one thread: capture's."""

    def __init__(
        self,
        folder: Path,
        *,
        reached: int = 0,
        claims: Sequence[Claim] = (),
        beginning: Callable[[JournalIdentity, int], Beginning] | None = None,
        disk: Disk = REAL_DISK,
    ) -> None:
        """`reached`: numbers below are taken, whatever the journal still has. `claims`: evidence of the
        journal's id beside `journal.json`. `beginning` is asked, under the lock, where to begin in view
        of the identity and the first number that is free here.

        Raises `JournalError` where another writer holds the folder, the disk refuses, or the journal's
        identity cannot be established.
        """
        self._folder = folder
        self._disk = disk
        _make_folder(folder)
        self._lock = _lock(folder)
        try:
            known = journal_identity.establish(folder, claims)
            _insist_on_no_writer(folder)
            _put_aside_superseded(folder)
            self.torn, self.damage, free = _end(folder)
            self.ended_n = max(free, reached)
            """The first number that was free before this start."""
            at = beginning(known, self.ended_n) if beginning else Beginning(self.ended_n)
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
        """Why nothing can be written at the moment, as a sentence; None when all is well."""
        self.failure: BaseException | None = None
        """Why this writer must not go on: its lock or its segment is gone, or a fault of the program."""
        self._grown: str | None = None
        """Why there is no next segment, though it is time for one."""
        self.durable = LogOffset(start, self._segment.size, start)
        """Everything before this is on disk."""
        self.durable_recv_ns = 0
        """Receive time of the last record on disk."""
        self.flushed_ns = 0
        """When the last batch had reached the disk, by this machine's clock."""
        self.bytes_written = 0
        self.delays = Latency()
        """From receive to disk."""
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    @property
    def id(self) -> uuid.UUID:
        """The journal's own id, part of every deduplication token."""
        return self.identity.id

    # -- capture's side ----------------------------------------------------------------------

    def append(self, recv_ns: int, conn: bytes, kind: int, frame: bytes) -> None:
        """Take one record. It is durable once `durable` has passed it."""
        self.extend(recv_ns, conn, (kind,), (frame,))

    def extend(
        self, recv_ns: int, conn: bytes, kinds: Sequence[int], frames: Sequence[bytes]
    ) -> None:
        """Take records that came together, in order."""
        batch, count = self._batch, len(frames)
        if not batch.recv:
            batch.since_ns = time.monotonic_ns()
        batch.recv.extend(array("q", (recv_ns,)) * count)
        batch.conn.append((conn, count))
        batch.kind.extend(kinds)
        batch.frame.extend(frames)
        batch.bytes += sum(map(len, frames)) + 64 * count
        if batch.bytes >= BATCH_BYTES or len(batch.recv) >= BATCH_RECORDS:
            self.hand_over()

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
        """Record something that happened."""
        body = {"kind": kind, "sid": sid, "market_ticker": market_ticker, "detail": detail}
        at = time.time_ns() if recv_ns is None else recv_ns
        self.append(at, conn, Kind.NOTE, msgspec.json.encode(body))

    def hand_over(self) -> None:
        """Give what has come to the disk; called on every tick of capture's clock."""
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
        """Bytes that wait for the disk."""
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
        """The number that the next record will get."""
        with self._wake:
            return self._next_n + sum(len(b.recv) for b in self._queue) + len(self._batch.recv)

    @property
    def oldest_undurable_ms(self) -> int:
        """Age of the oldest record that is not durable, from when it was appended; 0 where all are."""
        with self._wake:
            oldest = self._queue[0] if self._queue else self._batch
            since_ns = oldest.since_ns
        return (time.monotonic_ns() - since_ns) // 1_000_000 if since_ns else 0

    @property
    def trouble(self) -> str | None:
        """What is wrong, as a sentence; None when all is well."""
        if self.failure is not None:
            return str(self.failure)
        if self.blocked is not None:
            return self.blocked
        if (age_ms := self.oldest_undurable_ms) > UNDURABLE_MS:
            return (
                f"The disk of the journal in {self._folder} is slow: what came {age_ms / 1e3:.1f} s ago"
                f" is not durable yet ({UNDURABLE_MS / 1e3:.0f} s is the most that is normal), and a"
                " kill would lose it. Give it a faster disk, or find what else writes there."
            )
        return self._grown

    def close(self, timeout_s: float = 8.0, *, handed_over: bool = False) -> None:
        """Write what is left, end the segment and release the lock.

        `handed_over`: capture's thread has given everything, or still runs, and nothing is taken from it.
        Raises `JournalError` where the disk did not take everything within `timeout_s`: how much is lost.
        """
        if not handed_over:
            self.hand_over()
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(timeout_s)
        lost = self._loss()
        if not self._thread.is_alive():
            self._lock.release()
        if lost is not None:
            raise JournalError(lost)

    def _loss(self) -> str | None:
        """What is not durable, as a sentence; None where everything is."""
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
            log.error("Writing the journal ended: %s", error, exc_info=True)
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
        """What is written next: all that waits, within the bounds of a batch."""
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
        """Write batches as one, for as long as it takes."""
        recv = np.concatenate([np.frombuffer(batch.recv, np.int64) for batch in batches])
        data = self._encoder.encode(batches, recv, self._next_n)
        while not self._append(data):
            time.sleep(RETRY_S)
            self._check()
        if self.blocked:
            log.warning("The journal is being written again.")
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
        self.delays.add(recv, self.flushed_ns)

    def _append(self, data: bytes) -> bool:
        """Make one encoded batch durable; False where the disk refuses."""
        try:
            self._change_segment()
            self._segment.append(data)
        except OSError as error:
            self._tell_blocked(_disk_sentence(self._folder, error))
            return False
        except JournalError as error:
            self.failure = self.failure or error
            self._tell_blocked(str(error))
            return False
        return True

    def _tell_blocked(self, sentence: str) -> None:
        if self.blocked != sentence:
            log.error("%s Reading stops when %d MiB wait.", sentence, BACKLOG_BYTES >> 20)
            self.blocked = sentence  # after the line in the log, where it can be read then

    def _change_segment(self) -> None:
        """Begin the next segment where this one is long enough, or cannot be trusted any more."""
        segment = self._segment
        if segment.trusted and segment.size < SEGMENT_BYTES:
            return
        self._check()
        if segment.trusted and self.failure is not None:
            return  # it is ours; whether a new one would be is not known
        if not segment.trusted:
            segment.abandon()
        try:
            self._segment = self._begin_segment(self._next_n)
        except OSError as error:
            # An empty file that stayed would end this segment for readers: it is put aside first.
            stayed = reader.segment_path(self._folder, self._next_n).exists()
            if stayed or not segment.trusted or segment.size >= LARGEST_SEGMENT_BYTES:
                raise
            self._tell_grown(error)
            return
        self._grown = None
        if segment.trusted:
            segment.end()

    def _tell_grown(self, error: OSError) -> None:
        sentence = (
            f"The journal in {self._folder} goes on in a segment that is full, as there is no room for"
            f" another file ({error.strerror}): make room for files (inodes, quota, open files)."
        )
        if self._grown != sentence:
            log.error("%s", sentence)
            self._grown = sentence

    def _check(self) -> None:
        """Notice that others may write to the folder, or that the segment is no longer in it."""
        self._checked_at = time.monotonic()
        segment = self._segment
        if segment.removed:
            segment.trusted = False
            self.failure = self.failure or JournalError(
                f"The journal segment {segment.name} was removed from {self._folder} while it was written:"
                f" the records {segment.first_n} to {self._next_n - 1} that it had are in the stores that"
                " had loaded them, and nowhere else. The streamer stops. Restore the file if there is a"
                " copy, and start it again."
            )
        if self._lock.lost and self.failure is None:
            self.failure = JournalError(
                f"The lock of the journal, {self._folder}/lock, was removed or replaced while it was held:"
                " another streamer could believe the folder to be free. This one stops, before two write"
                " there. See that nothing removes that file, and start it again."
            )

    def _begin_segment(self, first_n: int) -> Segment:
        """The next segment. Raises `OSError`, or `JournalError` where another process writes its file."""
        folder_fd = self._lock.folder_fd
        try:
            return Segment(self._disk, folder_fd, first_n)
        except FileExistsError:
            begun = _begun_in_vain(self._folder, first_n)
            names = (begun.name, _aside(begun).name)
            self._disk.rename(*names, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
        return Segment(self._disk, folder_fd, first_n)


class _Encoder:
    """Batches to the messages of an Arrow IPC stream."""

    def __init__(self) -> None:
        self._buffer = io.BytesIO()
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        self._stream = pa.ipc.new_stream(pa.PythonFile(self._buffer, "w"), SCHEMA, options=options)
        self._stream.write_batch(pa.RecordBatch.from_pylist([], SCHEMA))
        self._take()  # with the header, which a segment writes itself

    def encode(self, batches: Sequence[_Batch], recv_ns: NDArray[np.int64], first_n: int) -> bytes:
        """Batches as one message, whose first record is number `first_n`."""
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
    """Records on their way to the disk; not touched again once it is handed over."""

    recv: array[int] = field(default_factory=lambda: array("q"))
    conn: list[tuple[bytes, int]] = field(default_factory=list)
    """Runs: a connection, and how many records in a row are its."""
    kind: bytearray = field(default_factory=bytearray)
    frame: list[bytes] = field(default_factory=list)
    bytes: int = 0
    since_ns: int = 0
    """When its first record was appended, by the monotonic clock; 0 where it has none."""


def _column(dtype: pa.DataType, rows: int, values: NDArray[np.int64] | bytes) -> pa.Array:
    return pa.Array.from_buffers(dtype, rows, [None, pa.py_buffer(values)])


# -- opening -----------------------------------------------------------------------------------


def _make_folder(folder: Path) -> None:
    """Make the folder, durably."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        for path in missing:
            durable.sync(path.parent)
    except OSError as error:
        raise JournalError(
            f"The journal folder {folder} cannot be made ({error.strerror})."
            " Set KALSHI_DATA_DIR to a folder that this user can write."
        ) from None


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """Hold a journal's lock without writing to it; gives the first number that is free.

    Raises `JournalError` where a streamer has it.
    """
    lock = _lock(folder)
    try:
        _insist_on_no_writer(folder)
        yield _end(folder)[2]
    finally:
        lock.release()


def _lock(folder: Path) -> FolderLock:
    try:
        return FolderLock(folder)
    except Held:
        raise _another_streamer(folder) from None
    except OSError as error:
        raise _cannot_write(folder, error) from None


def _insist_on_no_writer(folder: Path) -> None:
    """The lock's file may have been removed under a streamer that runs: its segment is locked, too."""
    for first_n in reader.segments(folder):
        try:
            insist_on_no_writer(reader.segment_path(folder, first_n))
        except Held:
            raise _another_streamer(folder) from None


def _another_streamer(folder: Path) -> JournalError:
    return JournalError(
        f"Another streamer is writing to {folder}. Stop it first, or set KALSHI_DATA_DIR to"
        " another folder."
    )


def _begun_in_vain(folder: Path, first_n: int) -> Path:
    """A segment that was begun and holds no record; raises `JournalError` where it has some."""
    path = reader.segment_path(folder, first_n)
    try:
        insist_on_no_writer(path)
    except Held:
        raise _another_streamer(folder) from None
    if any(reader.whole_batches(path)):
        raise JournalError(
            f"{path} is to be begun with record {first_n}, and has records already: another streamer"
            f" has written to {folder}. See that only one runs, and start it again."
        )
    return path


def _put_aside_superseded(folder: Path) -> None:
    """A kill while a batch was moved to another segment leaves it in the one before, and that one empty."""
    newest = [reader.segment_path(folder, n) for n in reader.segments(folder)[-2:]]
    if len(newest) < 2 or any(path.suffix == SET_ASIDE for path in newest):
        return
    path, last = newest
    if reader.batches_from(path, int(last.stem)) and not any(reader.whole_batches(last)):
        last.rename(_aside(last))


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.torn-{time.time_ns()}")


def _cannot_write(folder: Path, error: OSError) -> JournalError:
    return JournalError(
        f"{_disk_sentence(folder, error)} Or set KALSHI_DATA_DIR to another folder."
    )


def _disk_sentence(folder: Path, error: OSError) -> str:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return f"No space is left for the journal in {folder}: make room."
    return f"The journal in {folder} cannot be written ({error.strerror}): check the disk and its permissions."


def _end(folder: Path) -> tuple[Torn | None, str | None, int]:
    """(the last segment's torn tail, the damage to it, the first number that is free)"""
    existing = reader.segments(folder)
    if not existing:
        return None, None, 0
    first_n = existing[-1]
    path = reader.segment_path(folder, first_n)
    if path.name.endswith(SET_ASIDE):
        return None, None, _beyond(path, first_n)
    position = LogOffset(first_n, 0, first_n)
    try:
        for block in reader.read_segment(path, position, None):
            position = block.end
    except JournalError as error:
        return None, str(error), _beyond(path, first_n)
    left = reader.bytes_after(path, position.offset)
    if left and any(reader.whole_batches(path, position.offset)):
        why = "batches that are whole follow what is none"
        damage = reader.corrupt(path, position.offset, position.n, why)
        return None, str(damage), _beyond(path, first_n)
    torn = Torn(path.name, position.offset, position.n - 1, left) if left else None
    return torn, None, position.n


def _beyond(path: Path, first_n: int) -> int:
    """A number that no record of a damaged segment had."""
    found = list(reader.whole_batches(path))
    if found and not reader.bytes_after(path, found[-1].end_offset):
        return max(it.end_n for it in found)
    # A record takes more than a byte: the offsets of the frames alone, compressed, take two.
    return first_n + 2 * SEGMENT_BYTES

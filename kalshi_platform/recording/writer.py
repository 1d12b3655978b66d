"""Writing the journal: what comes is handed to a thread that makes it durable, batch by batch.

The lock is the kernel's: it falls with its holder, and two writers cannot be. What the disk does not
take waits in memory, up to a bound, at which capture stops reading.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import threading
import time
import uuid
from array import array
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import msgspec
import numpy as np
import pyarrow as pa

from kalshi_platform import durable
from kalshi_platform.exchange.frames import Kind
from kalshi_platform.recording import journal, journal_identity
from kalshi_platform.recording.delays import Delays
from kalshi_platform.recording.journal import (
    NO_CONNECTION,
    SCHEMA,
    SET_ASIDE,
    SUFFIX,
    JournalError,
    Position,
    checksum,
)
from kalshi_platform.recording.journal_identity import Claim, JournalIdentity

log = logging.getLogger(__name__)

SEGMENT_BYTES = 128 << 20
BATCH_RECORDS = 32_768
BATCH_BYTES = 8 << 20
"""A batch is handed over when it holds so much, or at the next tick of capture's clock."""
BACKLOG_BYTES = 64 << 20
"""Beyond this much waiting for the disk, capture stops reading the socket."""
RETRY_S = 1.0


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
    ) -> None:
        """`reached`: numbers below are taken, whatever the journal still has. `claims`: evidence of the
        journal's id beside `journal.json`. `beginning` is asked, under the lock, where to begin in view
        of the identity and the first number that is free here.

        Raises `JournalError` where another writer holds the folder, the disk refuses, or the journal's
        identity cannot be established.
        """
        self._folder = folder
        try:
            folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        except OSError as error:
            raise JournalError(
                f"The journal folder {folder} cannot be made ({error.strerror})."
                " Set KALSHI_DATA_DIR to a folder that this user can write."
            ) from None
        self._lock = _lock(folder)
        try:
            known = journal_identity.establish(folder, claims)
            self.torn, self.damage, free = _end(folder)
            self.ended_n = max(free, reached)
            """The first number that was free before this start."""
            at = beginning(known, self.ended_n) if beginning else Beginning(self.ended_n)
            self.identity = journal_identity.begin(folder, known, at.epoch, at.first_n)
            start = self._next_n = self.began_n = at.first_n
            """The first record of this start."""
            self._open_segment(start)
        except OSError as error:
            self._lock.release()
            raise _cannot_write(folder, error) from None
        except JournalError:
            self._lock.release()
            raise
        self._batch = _Batch()
        self._queue: deque[_Batch] = deque()
        self._queued_bytes = 0
        self._wake = threading.Condition()
        self._closing = False
        self.blocked: str | None = None
        """Why nothing can be written at the moment, as a sentence; None when all is well."""
        self.durable = Position(start, self._offset, start)
        """Everything before this is on disk."""
        self.durable_recv_ns = 0
        """Receive time of the last record on disk."""
        self.flushed_ns = 0
        """When the last batch had reached the disk, by this machine's clock."""
        self.bytes_written = 0
        self.delays = Delays()
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
        batch.handed_over = time.monotonic()
        with self._wake:
            self._queue.append(batch)
            self._queued_bytes += batch.bytes
            self._wake.notify_all()

    @property
    def backlog_bytes(self) -> int:
        """Bytes that wait for the disk."""
        return self._queued_bytes + self._batch.bytes

    @property
    def waiting_s(self) -> float:
        """For how long the oldest batch has waited for the disk; 0 where none waits."""
        oldest = next(iter(self._queue.copy()), None)
        return 0.0 if oldest is None else time.monotonic() - oldest.handed_over

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

    def close(self, timeout_s: float = 8.0) -> None:
        """Write what is left, end the segment and let the lock go.

        Raises `JournalError` where the disk would not take the rest within `timeout_s`.
        """
        self.hand_over()
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise JournalError(
                f"{self.backlog_bytes:,} bytes could not be written to {self._folder} before the end:"
                f" {self.blocked or 'the disk is slow'}. They are lost, and the next start marks the gap."
            )
        self._lock.release()

    # -- the writing thread ------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    break
                batch = self._queue[0]
            self._write(batch)
        self._end_segment()

    def _write(self, batch: _Batch) -> None:
        """Write one batch, for as long as it takes; what stands half-written is cut off first."""
        data: bytes | None = None
        while True:
            try:
                if self._offset >= SEGMENT_BYTES:
                    self._end_segment()
                    self._open_segment(self._next_n)
                    data = None
                if data is None:
                    data = self._encode(batch)
                _write_all(self._fd, data, self._offset)
                os.fdatasync(self._fd)
                break
            except OSError as error:
                sentence = _disk_sentence(self._folder, error)
                if self.blocked != sentence:
                    self.blocked = sentence
                    log.error("%s Reading stops when %d MiB wait.", sentence, BACKLOG_BYTES >> 20)
                time.sleep(RETRY_S)
        self._offset += len(data)
        self._next_n += len(batch.recv)
        self.bytes_written += len(data)
        if self.blocked:
            log.warning("The journal is being written again.")
            self.blocked = None
        with self._wake:
            self._queue.popleft()
            self._queued_bytes -= batch.bytes
            self.durable_recv_ns = batch.recv[-1]
            self.flushed_ns = time.time_ns()
            self.durable = Position(self._segment, self._offset, self._next_n)
            self._wake.notify_all()
        self.delays.add(np.frombuffer(batch.recv, np.int64), self.flushed_ns)

    def _encode(self, batch: _Batch) -> bytes:
        conn = b"".join([conn * count for conn, count in batch.conn])
        arrays = pa.RecordBatch.from_arrays(
            [
                _column(pa.int64(), len(batch.recv), batch.recv),
                _column(pa.binary(16), len(batch.recv), conn),
                _column(pa.uint8(), len(batch.recv), batch.kind),
                pa.array(batch.frame, pa.binary()),
            ],
            schema=SCHEMA,
        )
        metadata = {"n": str(self._next_n), "crc32": str(checksum(arrays))}
        self._stream.write_batch(arrays, custom_metadata=metadata)
        return self._take()

    def _take(self) -> bytes:
        data = self._buffer.getvalue()
        self._buffer.seek(0)
        self._buffer.truncate()
        return data

    def _open_segment(self, first_n: int) -> None:
        path = self._folder / f"{first_n:020d}{SUFFIX}"
        if path.exists():  # begun, and torn before its first record was whole: keep it, aside
            path.rename(path.with_name(f"{path.name}.torn-{time.time_ns()}"))
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
        self._buffer = io.BytesIO()
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        self._stream = pa.ipc.new_stream(pa.PythonFile(self._buffer, "w"), SCHEMA, options=options)
        header = self._take()
        _write_all(self._fd, header, 0)
        os.fdatasync(self._fd)
        durable.sync(self._folder)
        self._segment, self._offset = first_n, len(header)

    def _end_segment(self) -> None:
        self._stream.close()
        try:
            _write_all(self._fd, self._take(), self._offset)
            os.fdatasync(self._fd)
        except OSError as error:
            # Only the end mark is missing; every record is there.
            log.warning("Segment %d has no end mark: %s", self._segment, error.strerror)
        os.close(self._fd)


@dataclass
class _Batch:
    """Records on their way to the disk; not touched again once it is handed over."""

    recv: array[int] = field(default_factory=lambda: array("q"))
    conn: list[tuple[bytes, int]] = field(default_factory=list)
    """Runs: a connection, and how many records in a row are its."""
    kind: bytearray = field(default_factory=bytearray)
    frame: list[bytes] = field(default_factory=list)
    bytes: int = 0
    handed_over: float = 0.0
    """When, by the monotonic clock."""


def _column(dtype: pa.DataType, rows: int, values: array[int] | bytes | bytearray) -> pa.Array:
    return pa.Array.from_buffers(dtype, rows, [None, pa.py_buffer(values)])


# -- opening -----------------------------------------------------------------------------------


def _lock(folder: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(folder / "lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise JournalError(
            f"Another streamer is writing to {folder}. Stop it first, or set KALSHI_DATA_DIR to"
            " another folder."
        ) from None
    except OSError as error:
        raise _cannot_write(folder, error) from None
    return lock


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
    existing = journal.segments(folder)
    if not existing:
        return None, None, 0
    first_n = existing[-1]
    path = journal.segment_path(folder, first_n)
    if path.name.endswith(SET_ASIDE):
        return None, None, _beyond(path, first_n)
    position = Position(first_n, 0, first_n)
    try:
        for block in journal.read_segment(path, position, None):
            position = block.end
    except JournalError as error:
        return None, str(error), _beyond(path, first_n)
    left = journal.bytes_after(path, position.offset)
    if left and any(journal.whole_batches(path, position.offset)):
        why = "batches that are whole follow what is none"
        damage = journal.corrupt(path, position.offset, position.n, why)
        return None, str(damage), _beyond(path, first_n)
    torn = Torn(path.name, position.offset, position.n - 1, left) if left else None
    return torn, None, position.n


def _beyond(path: Path, first_n: int) -> int:
    """A number that no record of a damaged segment had."""
    found = list(journal.whole_batches(path))
    if found and not journal.bytes_after(path, found[-1].end_offset):
        return max(it.end_n for it in found)
    # A record takes more than a byte: the offsets of the frames alone, compressed, take two.
    return first_n + 2 * SEGMENT_BYTES


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written

"""The journal: every frame as it came, durable before anybody acts on it. All else is derived.

A journal is a folder of segments, each an Arrow IPC stream (zstd) that any Arrow reader opens:

    recv_ns  int64              receive time, this machine's clock, ns since the epoch
    conn     fixed binary (16)  UUID of the connection, zero for notes without one
    kind     uint8              see exchange.frames.Kind
    frame    binary             the bytes from the wire; a JSON object for a note

Records are numbered through all segments without a hole; a segment is named for its first number,
and each batch carries its own (`n`) and a checksum (`crc32`) in its metadata. A writer never appends
to a segment that it did not begin, so a tail torn by a kill stays where it is, for anyone to see,
and is named by a note in the segment that follows.

The lock is the kernel's: it falls with its holder, and two writers cannot be.
"""

from __future__ import annotations

import errno
import io
import itertools
import json
import logging
import os
import threading
import time
import uuid
import zlib
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import msgspec
import numpy as np
import pyarrow as pa

from kalshi_platform.durable import sync
from kalshi_platform.errors import PlatformError
from kalshi_platform.exchange.frames import Kind
from kalshi_platform.recording.delays import Delays

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        pa.field("recv_ns", pa.int64(), nullable=False),
        pa.field("conn", pa.binary(16), nullable=False),
        pa.field("kind", pa.uint8(), nullable=False),
        pa.field("frame", pa.binary(), nullable=False),
    ]
)
NO_CONNECTION = bytes(16)
SEGMENT_BYTES = 128 << 20
BATCH_RECORDS = 32_768
BATCH_BYTES = 8 << 20
"""A batch is handed over when it holds so much, or at the next tick of capture's clock."""
BACKLOG_BYTES = 64 << 20
"""Beyond this much waiting for the disk, capture stops reading the socket."""
RETRY_S = 1.0
SUFFIX = ".arrows"


class JournalError(PlatformError):
    """The journal cannot be written, is locked by another writer, or is damaged."""


@dataclass(frozen=True, order=True)
class Position:
    """A place between two records: the segment, the byte offset of a batch, the next number.

    The batch at `offset` may begin before `n`; reading skips what is before it.
    """

    segment: int
    offset: int
    n: int


@dataclass(frozen=True)
class Block:
    """Consecutive records of the journal, decoded: a batch, a part of one, or several (`joined`)."""

    first_n: int
    batch: pa.RecordBatch
    begins: tuple[Position, ...]
    """Where each of its batches begins; of the first, the block may be the rest alone."""
    end: Position
    """Where the next block begins."""

    @property
    def rows(self) -> int:
        """How many records it holds."""
        return int(self.batch.num_rows)

    def cut(self, at: int) -> tuple[Block, Block]:
        """The block in two, the second beginning with its record `at` (0 < at < rows)."""
        n = self.first_n + at
        before = bisect_right(self.begins, n, key=lambda begin: begin.n)
        holder = self.begins[before - 1]  # the batch that has record n
        return (
            Block(
                self.first_n,
                self.batch.slice(0, at),
                self.begins[:before] if holder.n < n else self.begins[: before - 1],
                Position(holder.segment, holder.offset, n),
            ),
            Block(n, self.batch.slice(at), self.begins[before - 1 :], self.end),
        )


def joined(blocks: Sequence[Block]) -> Block:
    """Consecutive blocks as one."""
    if len(blocks) == 1:
        return blocks[0]
    batch = pa.concat_batches([block.batch for block in blocks])
    begins = tuple(begin for block in blocks for begin in block.begins)
    return Block(blocks[0].first_n, batch, begins, blocks[-1].end)


@dataclass(frozen=True)
class Torn:
    """A segment whose end cannot be read, as a kill in mid-write leaves it."""

    segment: str
    good_up_to_byte: int
    good_up_to_n: int
    bytes_left: int


class Writer:
    """Appends to a journal. `append` and `hand_over` belong to one thread: capture's."""

    def __init__(self, folder: Path) -> None:
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
            self.id = _identity(folder)
            self.torn, start = _end(folder)
            self._next_n = start
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
        metadata = {"n": str(self._next_n), "crc32": str(_checksum(arrays))}
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
        sync(self._folder)
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


def _column(dtype: pa.DataType, rows: int, values: array[int] | bytes | bytearray) -> pa.Array:
    return pa.Array.from_buffers(dtype, rows, [None, pa.py_buffer(values)])


# -- reading -----------------------------------------------------------------------------------


def segments(folder: Path) -> list[int]:
    """First numbers of the journal's segments, ascending."""
    return sorted(int(path.stem) for path in folder.glob(f"*{SUFFIX}"))


def segment_path(folder: Path, first_n: int) -> Path:
    """Where a segment is."""
    return folder / f"{first_n:020d}{SUFFIX}"


def identity(folder: Path) -> uuid.UUID:
    """The journal's own id, part of every deduplication token."""
    return uuid.UUID(json.loads((folder / "journal.json").read_text())["id"])


def beginning(folder: Path) -> Position:
    """The oldest position that is still kept; raises `JournalError` where there is no journal."""
    first = next(iter(segments(folder)), None)
    if first is None:
        raise JournalError(f"There is no journal in {folder}: nothing has been recorded there.")
    return Position(first, 0, first)


def find(folder: Path, n: int) -> Position:
    """Where record `n` is, or will be. Raises `JournalError` where it is no longer kept."""
    before = [first_n for first_n in segments(folder) if first_n <= n]
    if not before:
        raise JournalError(f"The journal in {folder} no longer has record {n}.")
    return Position(before[-1], 0, n)


def read(folder: Path, start: Position, limit: Position | None = None) -> Iterator[Block]:
    """The blocks from `start` on, up to `limit` (the writer's `durable`) or to what can be read.

    Raises `JournalError`, saying where it is good up to, for damage that is not a torn tail, and
    for a `start` whose record has been removed.
    """
    position = start
    if any(position.segment < first_n <= position.n for first_n in segments(folder)):
        position = find(folder, position.n)  # it names a segment that ends before its record
    while True:
        path = segment_path(folder, position.segment)
        if not path.exists():
            raise JournalError(
                f"The journal segment {path.name}, which holds record {position.n}, is gone from {folder}."
            )
        end_of_file = limit.offset if limit and limit.segment == position.segment else None
        for block in _read_segment(path, position, end_of_file):
            yield block
            position = block.end
        if limit is not None and position.segment >= limit.segment:
            return
        following = next((n for n in segments(folder) if n > position.segment), None)
        if following is None:
            return
        if following != position.n:
            raise JournalError(
                f"The journal in {folder} is good up to record {position.n - 1}; its next segment begins"
                f" at {following}: {following - position.n} records of {path.name} cannot be read."
                " Nothing was deleted; restore that file from a backup, or load what follows it by itself."
            )
        position = Position(following, 0, following)


def prune(folder: Path, needed_n: int, older_than_s: float) -> list[Path]:
    """Remove segments that hold nothing from record `needed_n` on and are older; says which."""
    existing = segments(folder)
    removed = []
    for first_n, following in itertools.pairwise(existing):
        path = segment_path(folder, first_n)
        if following > needed_n or time.time() - path.stat().st_mtime < older_than_s:
            break
        path.unlink()
        removed.append(path)
    return removed


def _read_segment(path: Path, start: Position, size: int | None) -> Iterator[Block]:
    with path.open("rb") as file:
        header = _message(file, 0)
        if header is None:
            return
        offset = max(start.offset, len(header))
        expected: int | None = None
        while size is None or offset < size:
            message = _message(file, offset)
            if message is None:
                if size is not None:  # it had been whole
                    raise _corrupt(path, offset, expected or start.n, "a batch without an end")
                return
            try:
                stream = pa.ipc.open_stream(header + message)
                batch, metadata = stream.read_next_batch_with_custom_metadata()
                first_n, crc = int(metadata["n"]), int(metadata["crc32"])
            except StopIteration:  # the end mark
                return
            except (pa.ArrowException, OSError, MemoryError) as error:
                raise _corrupt(path, offset, expected or start.n, str(error)) from None
            except (KeyError, TypeError, ValueError):
                why = "a batch without its number and checksum"
                raise _corrupt(path, offset, expected or start.n, why) from None
            begins_right = first_n <= start.n if expected is None else first_n == expected
            if not begins_right or not _has_shape(batch) or _checksum(batch) != crc:
                why = "checksum or numbering does not fit"
                raise _corrupt(path, offset, expected or start.n, why)
            begin = Position(start.segment, offset, first_n)
            offset += len(message)
            expected = first_n + int(batch.num_rows)
            if expected > start.n:
                skip = max(start.n - first_n, 0)
                end = Position(start.segment, offset, expected)
                yield Block(first_n + skip, batch.slice(skip), (begin,), end)


def _message(file: io.BufferedReader, offset: int) -> bytes | None:
    """One whole IPC message, or None where the file ends before it does."""
    there = os.fstat(file.fileno()).st_size - offset  # a damaged length may be of any size
    file.seek(offset)
    prefix = file.read(8)
    if len(prefix) < 8:
        return None
    metadata_bytes = int.from_bytes(prefix[4:], "little")
    if metadata_bytes == 0:
        return prefix  # the end mark
    if metadata_bytes > there - 8:
        return None
    metadata = file.read(metadata_bytes)
    body_bytes = _body_length(metadata)
    if body_bytes > there - 8 - metadata_bytes:
        return None
    return prefix + metadata + file.read(body_bytes)


def _body_length(metadata: bytes) -> int:
    """`bodyLength` of an Arrow `Message` flatbuffer: its fourth field, a 64-bit integer.

    https://arrow.apache.org/docs/format/Columnar.html#encapsulated-message-format
    """
    table = int.from_bytes(metadata[:4], "little")
    vtable = table - int.from_bytes(metadata[table : table + 4], "little", signed=True)
    if int.from_bytes(metadata[vtable : vtable + 2], "little") < 12:
        return 0
    field = int.from_bytes(metadata[vtable + 10 : vtable + 12], "little")
    if field == 0:
        return 0
    return int.from_bytes(metadata[table + field : table + field + 8], "little")


def _has_shape(batch: pa.RecordBatch) -> bool:
    """Whether the batch has our columns, and as many rows as its buffers: the checksum is of these alone."""
    conn = batch.column(1) if batch.schema.equals(SCHEMA) else None
    if conn is None or any(column.null_count for column in batch.columns):
        return False
    return bool(conn.buffers()[1].size == 16 * batch.num_rows)


def _checksum(batch: pa.RecordBatch) -> int:
    crc = 0
    for column in batch.columns:
        if column.offset:
            column = pa.concat_arrays([column])  # noqa: PLW2901 - a slice's buffers are its parent's
        for buffer in column.buffers():
            if buffer is not None:
                crc = zlib.crc32(buffer, crc)
    return crc


def _corrupt(path: Path, offset: int, n: int, why: str) -> JournalError:
    return JournalError(
        f"Journal segment {path} is corrupt at byte {offset} ({why}): good up to record {n - 1}."
        " Nothing was deleted; restore the file from a backup."
    )


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


def _identity(folder: Path) -> uuid.UUID:
    path = folder / "journal.json"
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"format": 1, "id": str(uuid.uuid4())}) + "\n")
        sync(temporary)
        temporary.replace(path)
    return identity(folder)


def _end(folder: Path) -> tuple[Torn | None, int]:
    """What the last segment's tail looks like, and the first number that is free."""
    existing = segments(folder)
    if not existing:
        return None, 0
    first_n = existing[-1]
    path = segment_path(folder, first_n)
    position = Position(first_n, 0, first_n)
    for block in _read_segment(path, position, None):
        position = block.end
    with path.open("rb") as file:
        tail = path.stat().st_size - position.offset
        complete = _message(file, position.offset)
    if tail == 0 or (complete is not None and len(complete) == tail):
        return None, position.n
    return Torn(path.name, position.offset, position.n - 1, tail), position.n


def _write_all(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written

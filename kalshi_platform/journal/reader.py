"""The journal's format and how it is read. Every frame is kept as received and is durable before it is used.

A journal is a folder of segments, each an Arrow IPC stream (zstd) that any Arrow reader opens:

    recv_ns  int64              receive time, this machine's clock, ns since the epoch
    conn     fixed binary (16)  UUID of the connection, zero for notes without one
    kind     uint8              see journal.kind.Kind
    frame    binary             the bytes from the wire; a JSON object for a note

Records are numbered consecutively through all segments. A segment is named for its first record number;
each batch carries its first number (`n`) and a checksum (`crc32`) in its metadata. A writer
(`journal.writer`) never appends to a segment that it did not begin: the unfinished end that a kill
leaves stays in its segment, and a note in the next segment names it.

Damage. Reading stops with a `JournalError` at a segment that the disk has damaged; the remedy is to
restore it from a backup. Without a backup, the operator appends `.damaged` to its name. Then every
intact batch is read and the missing numbers are returned as a `LostRange`. Nothing else produces one.

Overlaps. A record number occurs in two segments only where the writer wrote an unconfirmed batch again to
the next segment; the two copies are equal. If two recorders wrote to one folder, a segment holds other
records under the numbers of the next one: that is an error, too. Once the operator has appended
`.damaged`, the segment is read up to the next segment's first number, and the records beyond it are
reported as an `UnreadRange`.

The module only reads: creating and appending belong in `segment` and `writer`.
"""

from __future__ import annotations

import io
import itertools
import mmap
import os
import re
import time
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from kalshi_platform.errors import PlatformError

SCHEMA = pa.schema(
    [
        pa.field("recv_ns", pa.int64(), nullable=False),
        pa.field("conn", pa.binary(16), nullable=False),
        pa.field("kind", pa.uint8(), nullable=False),
        pa.field("frame", pa.binary(), nullable=False),
    ]
)
NO_CONNECTION = bytes(16)
SUFFIX = ".arrows"
SET_ASIDE = ".damaged"
"""The operator appends this to a segment's name to say that there is no better copy of it."""
HEADER: bytes = SCHEMA.serialize().to_pybytes()
"""The first bytes of every segment."""
_SEGMENT = re.compile(r"([0-9]{20})\.arrows(?:\.damaged)?")
_MARK = b"\xff\xff\xff\xff"
END_MARK = _MARK + bytes(4)
"""The last bytes of a segment that its writer has closed."""
_BEGINS = re.compile(rb"\xff{4}..\x00\x00", re.DOTALL)
"""The first bytes of a message: Arrow's continuation marker and the metadata length, below 64 KiB."""


class JournalError(PlatformError):
    """The journal cannot be written, is locked by another writer, or is damaged."""


@dataclass(frozen=True, order=True)
class LogOffset:
    """A place between two records: the segment, the byte offset of a batch, the next record number.

    The batch at `offset` may begin before `n`; reading skips its records before `n`.
    """

    segment: int
    offset: int
    n: int


@dataclass(frozen=True)
class UnreadRange:
    """Records of a set-aside segment that are not read, because the following segment has other records
    under the same numbers."""

    segment: str
    following: str
    first_n: int
    end_n: int
    """Both segments may have the numbers `first_n` to `end_n` - 1."""


@dataclass(frozen=True)
class RecordRange:
    """Consecutive records of the journal as columns: a batch, part of one, or several (`concatenate`)."""

    first_n: int
    batch: pa.RecordBatch
    begins: tuple[LogOffset, ...]
    """Where each of its batches begins; the range may hold only the latter part of the first one."""
    end: LogOffset
    """Where the next range begins."""
    unread: UnreadRange | None = None
    """Records of the preceding segment that are not read; reported with the first range after them."""

    @property
    def rows(self) -> int:
        """The number of records."""
        return int(self.batch.num_rows)

    def cut(self, at: int) -> tuple[RecordRange, RecordRange]:
        """Split the range; the second part begins with its record `at` (0 < at < rows)."""
        n = self.first_n + at
        before = bisect_right(self.begins, n, key=lambda begin: begin.n)
        holder = self.begins[before - 1]  # the batch that contains record n
        return (
            RecordRange(
                self.first_n,
                self.batch.slice(0, at),
                self.begins[:before] if holder.n < n else self.begins[: before - 1],
                LogOffset(holder.segment, holder.offset, n),
                self.unread,
            ),
            RecordRange(n, self.batch.slice(at), self.begins[before - 1 :], self.end),
        )


@dataclass(frozen=True)
class LostRange:
    """Consecutive records of a damaged segment that can no longer be read."""

    first_n: int
    rows: int
    """The number of lost records."""
    until_ns: int
    """Receive time of the first record after the range."""
    end: LogOffset
    """Log offset of that record."""

    def cut(self, at: int) -> tuple[LostRange, LostRange]:
        """Split the range, as `RecordRange.cut` does."""
        n = self.first_n + at
        within = LogOffset(self.end.segment, self.end.offset, n)
        return (
            LostRange(self.first_n, at, self.until_ns, within),
            LostRange(n, self.rows - at, self.until_ns, self.end),
        )


JournalRange = RecordRange | LostRange
"""What `read` yields."""


def concatenate(record_ranges: Sequence[RecordRange]) -> RecordRange:
    """Join consecutive ranges into one; only the first of them may have an `unread` range."""
    if len(record_ranges) == 1:
        return record_ranges[0]
    batch = pa.concat_batches([records.batch for records in record_ranges])
    begins = tuple(begin for records in record_ranges for begin in records.begins)
    return RecordRange(
        record_ranges[0].first_n, batch, begins, record_ranges[-1].end, record_ranges[0].unread
    )


# -- reading -----------------------------------------------------------------------------------


def segments(folder: Path) -> list[int]:
    """First record numbers of the journal's segments, ascending; other files are ignored.

    Raises: `JournalError` for a folder without read permission: it must not look empty.
    """
    return sorted({first_n for name in names(folder) if (first_n := segment_of(name)) is not None})


def segment_of(name: str) -> int | None:
    """The first record number of the segment with this file name; None for another file."""
    match = _SEGMENT.fullmatch(name)
    return int(match[1]) if match else None


def names(folder: Path) -> list[str]:
    """The file names in a folder; empty where the folder is missing. Raises: `JournalError` as `segments`."""
    try:
        return [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise JournalError(
            f"The journal's folder {folder} cannot be read ({error.strerror}). Make it readable for this user."
        ) from None


def segment_path(folder: Path, first_n: int) -> Path:
    """The path of a segment: its `.damaged` name where only that exists, else its own name."""
    path = folder / f"{first_n:020d}{SUFFIX}"
    aside = set_aside(path)
    return aside if not path.exists() and aside.exists() else path


def set_aside(path: Path) -> Path:
    """The name of a segment once the operator has set it aside."""
    return path.with_name(path.name + SET_ASIDE)


def oldest_offset(folder: Path) -> LogOffset:
    """The oldest log offset that is still kept. Raises: `JournalError` where there is no journal."""
    first = next(iter(segments(folder)), None)
    if first is None:
        raise JournalError(f"There is no journal in {folder}: nothing has been recorded there.")
    return LogOffset(first, 0, first)


def offset_of(folder: Path, n: int) -> LogOffset:
    """The log offset of record `n`, written or not yet. Raises: `JournalError` where it is no longer kept."""
    before = [first_n for first_n in segments(folder) if first_n <= n]
    if not before:
        raise JournalError(f"The journal in {folder} no longer has record {n}.")
    return LogOffset(before[-1], 0, n)


def read(folder: Path, start: LogOffset, limit: LogOffset | None = None) -> Iterator[JournalRange]:
    """Yield the ranges from `start` up to `limit` (the writer's `durable`) or to the end of the journal.

    Every record is in a `RecordRange`, in a `LostRange` (set-aside segments only), or in an `unread` range.

    Raises: `JournalError`, naming the last good record, for damage other than an unfinished end, for
    record numbers that two segments have, and for a `start` whose record has been removed.
    """
    position, unread = _resolve_start(folder, start)
    while True:
        path = segment_path(folder, position.segment)
        if not path.exists():
            raise JournalError(
                f"The journal segment {path.name}, which holds record {position.n}, is gone from {folder}."
                f" Restore it from a backup; without one, make an empty file {set_aside(path).name} there:"
                " the records after it are loaded then, and gap rows name the lost ones."
            )
        end_of_file = limit.offset if limit and limit.segment == position.segment else None
        aside = path.name.endswith(SET_ASIDE)
        following = _following(folder, position.segment)
        record_ranges = (
            _read_damaged(path, position, end_of_file, following)
            if aside
            else read_segment(path, position, end_of_file)
        )
        while following is None or position.n < following:
            records = next(record_ranges, None)
            if records is None:
                break
            if following is not None and records.end.n > following:
                raise _overlap_error(path, segment_path(folder, following), following)
            if records.first_n > position.n:
                yield _lost_range(position, records)
            yield replace(records, unread=unread) if unread else records
            position, unread = records.end, None
        if limit is not None and position.segment >= limit.segment:
            return
        following = _following(folder, position.segment)
        if following is None:
            return
        if following > position.n and not aside:
            raise JournalError(
                f"The journal in {folder} is good up to record {position.n - 1}; its next segment begins"
                f" at {following}: {following - position.n} records of {path.name} cannot be read."
                f" {_remedy(path)}"
            )
        unread = _unread_range(folder, position.segment, following)
        position = LogOffset(following, 0, position.n)


def _resolve_start(folder: Path, start: LogOffset) -> tuple[LogOffset, UnreadRange | None]:
    """The log offset where reading from `start` begins, and the unread range just before it.

    `start` may name a segment that ends before its record: reading then begins in a later one.
    """
    existing = segments(folder)
    later = [n for n in existing if start.segment < n <= start.n]
    position = offset_of(folder, start.n) if later else start
    if later and later[0] < start.n and start.segment in existing:
        unread = _unread_range(folder, start.segment, later[0], start.n)
        if unread is not None:
            return position, unread
    before = [n for n in existing if n < position.segment]
    if before and position.n == position.segment:
        return position, _unread_range(folder, before[-1], position.segment)
    return position, None


def _unread_range(
    folder: Path, segment: int, following: int, until_n: int = 0
) -> UnreadRange | None:
    """The records of a segment that are not read because the following one has others under their numbers.

    `until_n`: reading continues with this record; the records before it may have come from either segment.
    Raises: `JournalError` where the segment was not set aside.
    """
    path, next_path = segment_path(folder, segment), segment_path(folder, following)
    beyond = batches_from(path, following)
    if beyond:
        end_n = max(batch.end_n for batch in beyond)
        # A batch that was written again after a failed sync is equal in both segments: no overlap.
        rewritten = itertools.takewhile(lambda batch: batch.n < end_n, whole_batches(next_path))
        same = {(batch.n, batch.end_n, batch.crc) for batch in rewritten}
        beyond = [batch for batch in beyond if (batch.n, batch.end_n, batch.crc) not in same]
    if not beyond:
        return None
    if not path.name.endswith(SET_ASIDE):
        raise _overlap_error(path, next_path, following)
    end_n = max(until_n, *(batch.end_n for batch in beyond))
    return UnreadRange(path.name, next_path.name, following, end_n)


def batches_from(path: Path, n: int) -> list[WholeBatch]:
    """The intact batches of a segment that have a record from `n` on."""
    # Message lengths alone lead to the last batch: if it ends before `n`, no other batch is decoded.
    with path.open("rb") as file:
        last, end, size = 0, 0, path.stat().st_size
        while end < size and (length := _length(file, end)) is not None:
            if length > len(END_MARK):
                last = end
            end += length
        message = _message(file, last)
    try:
        begin = end if message is not None and _batch(HEADER, message).end_n <= n else 0
    except (StopIteration, pa.ArrowException, OSError, MemoryError, ValueError):
        begin = 0
    return [batch for batch in whole_batches(path, begin) if batch.end_n > n]


def _overlap_error(path: Path, following: Path, n: int) -> JournalError:
    return JournalError(
        f"The journal segments {path.name} and {following.name} in {path.parent} both have records from"
        f" number {n} on, and they differ: two recorders wrote there at once. Make sure that only one runs."
        f" Nothing was deleted; keep a copy of both. Then rename {path.name} to {set_aside(path).name}: the"
        f" records of {following.name} are loaded, and a gap row names those of the other that are not."
    )


def record_ranges(
    folder: Path, start: LogOffset, limit: LogOffset | None = None
) -> Iterator[RecordRange]:
    """As `read`, for callers that need every record. Raises: `JournalError` for lost and unread ranges, too."""
    for part in read(folder, start, limit):
        if isinstance(part, LostRange):
            raise JournalError(
                f"The journal in {folder} has lost its records {part.first_n} to"
                f" {part.first_n + part.rows - 1}."
            )
        if part.unread is not None:
            raise JournalError(
                f"The records of {part.unread.segment} in {folder} from number {part.unread.first_n} on are"
                f" not read: {part.unread.following} has others under the same numbers."
            )
        yield part


def received_ns(folder: Path, at: LogOffset) -> int | None:
    """Receive time of the record at `at`, or of the next readable one; None at the end of the journal."""
    part = next(read(folder, at), None)
    if part is None:
        return None
    if isinstance(part, LostRange):
        return part.until_ns
    return int(part.batch.column("recv_ns")[0].as_py())


def _following(folder: Path, segment: int) -> int | None:
    return next((n for n in segments(folder) if n > segment), None)


def _lost_range(position: LogOffset, following: RecordRange) -> LostRange:
    begin = following.begins[0]
    return LostRange(
        position.n,
        following.first_n - position.n,
        following.batch.column("recv_ns")[0].as_py(),
        LogOffset(begin.segment, begin.offset, following.first_n),
    )


def prune(folder: Path, needed_n: int, older_than_s: float) -> list[Path]:
    """Remove segments that end before record `needed_n` and are older than `older_than_s`; return their paths."""
    existing = segments(folder)
    removed = []
    for first_n, following in itertools.pairwise(existing):
        path = segment_path(folder, first_n)
        if following > needed_n or time.time() - path.stat().st_mtime < older_than_s:
            break
        path.unlink()
        removed.append(path)
    return removed


def read_segment(path: Path, start: LogOffset, size: int | None) -> Iterator[RecordRange]:
    """Yield the ranges of one segment from `start` on, up to byte `size` or to its unfinished end."""
    with path.open("rb") as file:
        header = _message(file, 0)
        if header is None:
            return
        offset = max(start.offset, len(header))
        # After a segment that was set aside, records up to this segment's first number may be missing.
        expected = start.segment if start.n < start.segment else None
        while size is None or offset < size:
            message = _message(file, offset)
            if message is None:
                if size is not None:  # the writer had confirmed these bytes
                    raise corrupt_segment(
                        path, offset, expected or start.n, "a batch without an end"
                    )
                return
            try:
                decoded = _batch(header, message)
            except StopIteration:  # the end mark
                return
            except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
                raise corrupt_segment(path, offset, expected or start.n, str(error)) from None
            begins_right = decoded.n <= start.n if expected is None else decoded.n == expected
            if not begins_right:
                raise corrupt_segment(
                    path, offset, expected or start.n, "its numbering does not fit"
                )
            begin = LogOffset(start.segment, offset, decoded.n)
            offset += len(message)
            expected = decoded.end_n
            if expected > start.n:
                end = LogOffset(start.segment, offset, expected)
                yield _record_range(decoded, begin, start.n, end)


@dataclass(frozen=True)
class _Batch:
    n: int
    batch: pa.RecordBatch
    crc: int

    @property
    def end_n(self) -> int:
        return self.n + int(self.batch.num_rows)


def _batch(header: bytes, message: bytes) -> _Batch:
    """Decode a message and verify its checksum.

    Raises: `StopIteration` for an end mark; `pa.ArrowException`, `OSError`, `MemoryError` or `ValueError`
    for anything else that is not an intact batch of a journal.
    """
    stream = pa.ipc.open_stream(header + message)
    batch, metadata = stream.read_next_batch_with_custom_metadata()
    try:
        first_n, crc = int(metadata["n"]), int(metadata["crc32"])
    except (KeyError, TypeError, ValueError):
        raise ValueError("a batch without its number and checksum") from None
    if not _has_expected_shape(batch) or checksum(batch) != crc:
        raise ValueError("checksum does not fit")
    return _Batch(first_n, batch, crc)


def _record_range(decoded: _Batch, begin: LogOffset, start_n: int, end: LogOffset) -> RecordRange:
    """The records of a batch from `start_n` on."""
    skip = max(start_n - decoded.n, 0)
    return RecordRange(decoded.n + skip, decoded.batch.slice(skip), (begin,), end)


def _message(file: io.BufferedReader, offset: int) -> bytes | None:
    """Read the IPC message at `offset`; None where the file ends before the message does."""
    length = _length(file, offset)
    if length is None:
        return None
    file.seek(offset)
    return file.read(length)


def _length(file: io.BufferedReader, offset: int) -> int | None:
    """Length in bytes of the IPC message at `offset`; None where the file ends before the message does."""
    available = (
        os.fstat(file.fileno()).st_size - offset
    )  # a damaged length field may hold any value
    file.seek(offset)
    prefix = file.read(8)
    if len(prefix) < 8:
        return None
    if prefix == END_MARK:
        return len(prefix)
    metadata_bytes = int.from_bytes(prefix[4:], "little")
    if not prefix.startswith(_MARK) or not 0 < metadata_bytes <= available - 8:
        return None
    body_bytes = _body_length(file.read(metadata_bytes))
    length = 8 + metadata_bytes + body_bytes
    return length if length <= available else None


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


def _has_expected_shape(batch: pa.RecordBatch) -> bool:
    """Whether the batch has the journal's columns and as many rows as its buffers hold.

    The checksum covers the buffers only, not the schema and the row count.
    """
    conn = batch.column(1) if batch.schema.equals(SCHEMA) else None
    if conn is None or any(column.null_count for column in batch.columns):
        return False
    return bool(conn.buffers()[1].size == 16 * batch.num_rows)


def checksum(batch: pa.RecordBatch) -> int:
    """CRC-32 of the records, as a batch carries it in its metadata."""
    crc = 0
    for column in batch.columns:
        if column.offset:
            column = pa.concat_arrays([column])  # noqa: PLW2901 - a slice's buffers are its parent's
        for buffer in column.buffers():
            if buffer is not None:
                crc = zlib.crc32(buffer, crc)
    return crc


def corrupt_segment(path: Path, offset: int, n: int, why: str) -> JournalError:
    """The error for a segment that cannot be read beyond record `n` - 1, with the remedy."""
    return JournalError(
        f"Journal segment {path} is corrupt at byte {offset} ({why}): good up to record {n - 1}."
        f" {_remedy(path)}"
    )


def _remedy(path: Path) -> str:
    return (
        "Nothing was deleted; restore the file from a backup. Without one, rename it to"
        f" {set_aside(path).name}: its intact batches are loaded then, and gap rows name the lost records."
    )


# -- damaged segments --------------------------------------------------------------------------


@dataclass(frozen=True)
class WholeBatch:
    """Byte and record range of an intact batch."""

    offset: int
    end_offset: int
    n: int
    end_n: int
    crc: int


def _read_damaged(
    path: Path, start: LogOffset, size: int | None, following: int | None
) -> Iterator[RecordRange]:
    """Yield the intact batches of a set-aside segment, skipping damaged bytes between them."""
    status = path.stat()
    with path.open("rb") as file:
        for batch in trusted_batches(path, status.st_size, status.st_mtime_ns, following):
            if batch.end_n <= start.n or (size is not None and batch.end_offset > size):
                continue
            message = _message(file, batch.offset)
            if message is None:
                raise corrupt_segment(
                    path, batch.offset, batch.n, "it became shorter while it was read"
                )
            begin = LogOffset(start.segment, batch.offset, batch.n)
            end = LogOffset(start.segment, batch.end_offset, batch.end_n)
            yield _record_range(_batch(HEADER, message), begin, start.n, end)


@lru_cache(maxsize=4)
def trusted_batches(
    path: Path, size: int, mtime_ns: int, following: int | None
) -> tuple[WholeBatch, ...]:
    """The intact batches of a damaged segment whose record numbers can be trusted, in order.

    The checksum does not cover a batch's record number. After damage the number is trusted where the next
    batch, or the `following` segment, begins at the number where this batch ends. The result depends on
    the file alone and not on where reading begins, so reading a range twice gives the same lost ranges.
    `size` and `mtime_ns` are part of the cache key: they identify the content.
    """
    number = int(path.name.partition(".")[0])
    intact = list(whole_batches(path))
    expected, kept = number, list[WholeBatch]()
    for i, batch in enumerate(intact):
        next_n = intact[i + 1].n if i + 1 < len(intact) else following
        if batch.n < expected or (following is not None and batch.end_n > following):
            continue
        if batch.n == expected or batch.end_n == next_n:
            kept.append(batch)
            expected = batch.end_n
    return tuple(kept)


def whole_batches(path: Path, at: int = 0) -> Iterator[WholeBatch]:
    """Search the file from byte `at` on for messages that decode as a batch with the right checksum."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            while (begins := _BEGINS.search(content, at)) is not None:
                offset = begins.start()
                at = offset + 1
                message = _message(file, offset)
                try:
                    batch = _batch(HEADER, message) if message is not None else None
                except (StopIteration, pa.ArrowException, OSError, MemoryError, ValueError):
                    continue
                if message is None or batch is None or not batch.batch.num_rows:
                    continue
                end = offset + len(message)
                yield WholeBatch(offset, end, batch.n, batch.end_n, batch.crc)
                if end == len(content) or content[end : end + len(_MARK)] == _MARK:
                    at = end  # otherwise the length itself may be damaged: search on from within it


def bytes_after(path: Path, offset: int) -> int:
    """Number of bytes in a segment after `offset`; 0 where they are one complete message (the end mark)."""
    with path.open("rb") as file:
        left = path.stat().st_size - offset
        complete = _message(file, offset)
    return 0 if complete is not None and len(complete) == left else left

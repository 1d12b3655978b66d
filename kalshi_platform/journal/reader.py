"""The journal: every frame as it came, durable before anybody acts on it. All else is derived.

A journal is a folder of segments, each an Arrow IPC stream (zstd) that any Arrow reader opens:

    recv_ns  int64              receive time, this machine's clock, ns since the epoch
    conn     fixed binary (16)  UUID of the connection, zero for notes without one
    kind     uint8              see exchange.frames.Kind
    frame    binary             the bytes from the wire; a JSON object for a note

Records are numbered through all segments without a hole; a segment is named for its first number,
and each batch carries its own (`n`) and a checksum (`crc32`) in its metadata. A writer
(`recording.writer`) never appends to a segment that it did not begin, so a tail torn by a kill stays
where it is, for anyone to see, and is named by a note in the segment that follows.

A segment that the disk has damaged stops whoever reads it, and is restored from a backup. Where there
is none, somebody renames it, `.damaged` behind its name: then every batch of it that is whole is read,
and what is lost comes as a `LostRange`. Nothing else makes one.

No number is in two segments, but for a batch that a writer has written again to the next one, as the
disk had not confirmed it. Where two recorders wrote to one folder, the records of a segment beyond the
first number of the next are others than that one's: an error, too. Renamed, the segment is read up to
that number, and the rest is named (`Unread`).
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
"""Behind a segment's name: there is no better copy of it."""
HEADER: bytes = SCHEMA.serialize().to_pybytes()
"""So begins every segment."""
_SEGMENT = re.compile(r"([0-9]{20})\.arrows(?:\.damaged)?")
_MARK = b"\xff\xff\xff\xff"
END_MARK = _MARK + bytes(4)
"""So ends one that its writer has ended."""
_BEGINS = re.compile(rb"\xff{4}..\x00\x00", re.DOTALL)
"""So begins every message of a segment: Arrow's mark, and the length of the metadata, below 64 KiB."""


class JournalError(PlatformError):
    """The journal cannot be written, is locked by another writer, or is damaged."""


@dataclass(frozen=True, order=True)
class LogOffset:
    """A place between two records: the segment, the byte offset of a batch, the next number.

    The batch at `offset` may begin before `n`; reading skips what is before it.
    """

    segment: int
    offset: int
    n: int


@dataclass(frozen=True)
class Unread:
    """Records of a segment that was set aside, and whose numbers the following segments have given to
    others: those are read instead."""

    segment: str
    following: str
    first_n: int
    end_n: int
    """The numbers `first_n` to `end_n` - 1 are the ones that both may have."""


@dataclass(frozen=True)
class RecordRange:
    """Consecutive records of the journal, decoded: a batch, a part of one, or several (`joined`)."""

    first_n: int
    batch: pa.RecordBatch
    begins: tuple[LogOffset, ...]
    """Where each of its batches begins; of the first, the block may be the rest alone."""
    end: LogOffset
    """Where the next block begins."""
    unread: Unread | None = None
    """What the segment before its first record has, and is not read."""

    @property
    def rows(self) -> int:
        """How many records it holds."""
        return int(self.batch.num_rows)

    def cut(self, at: int) -> tuple[RecordRange, RecordRange]:
        """The block in two, the second beginning with its record `at` (0 < at < rows)."""
        n = self.first_n + at
        before = bisect_right(self.begins, n, key=lambda begin: begin.n)
        holder = self.begins[before - 1]  # the batch that has record n
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
    """Consecutive records that a damaged segment had, and that cannot be read any more."""

    first_n: int
    rows: int
    """How many there were."""
    until_ns: int
    """Receive time of the first record after them."""
    end: LogOffset
    """Where that is."""

    def cut(self, at: int) -> tuple[LostRange, LostRange]:
        """The hole in two, as a block."""
        n = self.first_n + at
        within = LogOffset(self.end.segment, self.end.offset, n)
        return (
            LostRange(self.first_n, at, self.until_ns, within),
            LostRange(n, self.rows - at, self.until_ns, self.end),
        )


JournalRange = RecordRange | LostRange
"""What reading a journal gives."""


def joined(blocks: Sequence[RecordRange]) -> RecordRange:
    """Consecutive blocks as one; what is not read comes before the first of them."""
    if len(blocks) == 1:
        return blocks[0]
    batch = pa.concat_batches([block.batch for block in blocks])
    begins = tuple(begin for block in blocks for begin in block.begins)
    return RecordRange(blocks[0].first_n, batch, begins, blocks[-1].end, blocks[0].unread)


# -- reading -----------------------------------------------------------------------------------


def segments(folder: Path) -> list[int]:
    """First numbers of the journal's segments, ascending; files of other names are passed over.

    Raises `JournalError` for a folder that may not be read: its segments are there all the same.
    """
    return sorted({first_n for name in names(folder) if (first_n := segment_of(name)) is not None})


def segment_of(name: str) -> int | None:
    """The first number of the segment whose file has this name; None for another file."""
    match = _SEGMENT.fullmatch(name)
    return int(match[1]) if match else None


def names(folder: Path) -> list[str]:
    """Whatever is in a folder, by name; nothing where there is none. Raises `JournalError` as `segments`."""
    try:
        return [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise JournalError(
            f"The journal's folder {folder} cannot be read ({error.strerror}). Make it readable for this user."
        ) from None


def segment_path(folder: Path, first_n: int) -> Path:
    """Where a segment is; under its own name where it is not there."""
    path = folder / f"{first_n:020d}{SUFFIX}"
    aside = set_aside(path)
    return aside if not path.exists() and aside.exists() else path


def set_aside(path: Path) -> Path:
    """The name of a segment of which there is no better copy."""
    return path.with_name(path.name + SET_ASIDE)


def beginning(folder: Path) -> LogOffset:
    """The oldest position that is still kept; raises `JournalError` where there is no journal."""
    first = next(iter(segments(folder)), None)
    if first is None:
        raise JournalError(f"There is no journal in {folder}: nothing has been recorded there.")
    return LogOffset(first, 0, first)


def find(folder: Path, n: int) -> LogOffset:
    """Where record `n` is, or will be. Raises `JournalError` where it is no longer kept."""
    before = [first_n for first_n in segments(folder) if first_n <= n]
    if not before:
        raise JournalError(f"The journal in {folder} no longer has record {n}.")
    return LogOffset(before[-1], 0, n)


def read(folder: Path, start: LogOffset, limit: LogOffset | None = None) -> Iterator[JournalRange]:
    """The blocks from `start` on, up to `limit` (the writer's `durable`) or to what can be read.

    Every record is in a block, or in a hole where a segment was set aside, or told by a block's `unread`.
    Raises `JournalError`, saying where it is good up to, for damage that is not a torn tail, for numbers
    that two segments have, and for a `start` whose record has been removed.
    """
    position, unread = _entered(folder, start)
    while True:
        path = segment_path(folder, position.segment)
        if not path.exists():
            raise JournalError(
                f"The journal segment {path.name}, which holds record {position.n}, is gone from {folder}."
                f" Restore it from a backup; without one, make an empty file {set_aside(path).name} there:"
                " what follows is loaded then, and gap rows name what is lost."
            )
        end_of_file = limit.offset if limit and limit.segment == position.segment else None
        aside = path.name.endswith(SET_ASIDE)
        following = _following(folder, position.segment)
        blocks = (
            _read_damaged(path, position, end_of_file, following)
            if aside
            else read_segment(path, position, end_of_file)
        )
        while following is None or position.n < following:
            block = next(blocks, None)
            if block is None:
                break
            if following is not None and block.end.n > following:
                raise _overlapping(path, segment_path(folder, following), following)
            if block.first_n > position.n:
                yield _hole(position, block)
            yield replace(block, unread=unread) if unread else block
            position, unread = block.end, None
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
        unread = _unread(folder, position.segment, following)
        position = LogOffset(following, 0, position.n)


def _entered(folder: Path, start: LogOffset) -> tuple[LogOffset, Unread | None]:
    """Where `start` is, and what is not read before it. It may name a segment that ends before its record."""
    existing = segments(folder)
    later = [n for n in existing if start.segment < n <= start.n]
    position = find(folder, start.n) if later else start
    if later and later[0] < start.n and start.segment in existing:
        unread = _unread(folder, start.segment, later[0], start.n)
        if unread is not None:
            return position, unread
    before = [n for n in existing if n < position.segment]
    if before and position.n == position.segment:
        return position, _unread(folder, before[-1], position.segment)
    return position, None


def _unread(folder: Path, segment: int, following: int, until_n: int = 0) -> Unread | None:
    """Records of a segment whose numbers the following one has given to others.

    `until_n`: reading goes on with this record, and may have come to it by either's.
    Raises `JournalError` where the segment was not set aside.
    """
    path, next_path = segment_path(folder, segment), segment_path(folder, following)
    beyond = batches_from(path, following)
    if beyond:
        end_n = max(batch.end_n for batch in beyond)
        again = itertools.takewhile(lambda batch: batch.n < end_n, whole_batches(next_path))
        same = {(batch.n, batch.end_n, batch.crc) for batch in again}
        beyond = [batch for batch in beyond if (batch.n, batch.end_n, batch.crc) not in same]
    if not beyond:
        return None
    if not path.name.endswith(SET_ASIDE):
        raise _overlapping(path, next_path, following)
    end_n = max(until_n, *(batch.end_n for batch in beyond))
    return Unread(path.name, next_path.name, following, end_n)


def batches_from(path: Path, n: int) -> list[WholeBatch]:
    """The whole batches of a segment that have a record from `n` on."""
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


def _overlapping(path: Path, following: Path, n: int) -> JournalError:
    return JournalError(
        f"The journal segments {path.name} and {following.name} in {path.parent} both have records from"
        f" number {n} on, and not the same: two recorders wrote there at once. See that only one runs."
        f" Nothing was deleted; keep a copy of both. Then rename {path.name} to {set_aside(path).name}:"
        f" what {following.name} has is loaded, and a gap row names the records of the other that are not."
    )


def blocks(folder: Path, start: LogOffset, limit: LogOffset | None = None) -> Iterator[RecordRange]:
    """As `read`, for those who want every record. Raises `JournalError` where some are lost, too."""
    for it in read(folder, start, limit):
        if isinstance(it, LostRange):
            raise JournalError(
                f"The journal in {folder} has lost its records {it.first_n} to {it.first_n + it.rows - 1}."
            )
        if it.unread is not None:
            raise JournalError(
                f"The records of {it.unread.segment} in {folder} from number {it.unread.first_n} on are not"
                f" read: {it.unread.following} has others under the same numbers."
            )
        yield it


def received_ns(folder: Path, at: LogOffset) -> int | None:
    """Receive time of the record at a position, or of the next one that can be read; None for none."""
    it = next(read(folder, at), None)
    if it is None:
        return None
    return it.until_ns if isinstance(it, LostRange) else int(it.batch.column("recv_ns")[0].as_py())


def _following(folder: Path, segment: int) -> int | None:
    return next((n for n in segments(folder) if n > segment), None)


def _hole(position: LogOffset, following: RecordRange) -> LostRange:
    begin = following.begins[0]
    return LostRange(
        position.n,
        following.first_n - position.n,
        following.batch.column("recv_ns")[0].as_py(),
        LogOffset(begin.segment, begin.offset, following.first_n),
    )


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


def read_segment(path: Path, start: LogOffset, size: int | None) -> Iterator[RecordRange]:
    """The blocks of one segment from `start` on, up to byte `size` or to a torn tail."""
    with path.open("rb") as file:
        header = _message(file, 0)
        if header is None:
            return
        offset = max(start.offset, len(header))
        # after a segment that was set aside, the first record is not the one that comes next
        expected = start.segment if start.n < start.segment else None
        while size is None or offset < size:
            message = _message(file, offset)
            if message is None:
                if size is not None:  # it had been whole
                    raise corrupt(path, offset, expected or start.n, "a batch without an end")
                return
            try:
                found = _batch(header, message)
            except StopIteration:  # the end mark
                return
            except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
                raise corrupt(path, offset, expected or start.n, str(error)) from None
            begins_right = found.n <= start.n if expected is None else found.n == expected
            if not begins_right:
                raise corrupt(path, offset, expected or start.n, "its numbering does not fit")
            begin = LogOffset(start.segment, offset, found.n)
            offset += len(message)
            expected = found.end_n
            if expected > start.n:
                yield _block(found, begin, start.n, LogOffset(start.segment, offset, expected))


@dataclass(frozen=True)
class _Batch:
    n: int
    batch: pa.RecordBatch
    crc: int

    @property
    def end_n(self) -> int:
        return self.n + int(self.batch.num_rows)


def _batch(header: bytes, message: bytes) -> _Batch:
    """A batch whose checksum is right.

    Raises `StopIteration` for an end mark; `pa.ArrowException`, `OSError`, `MemoryError` or `ValueError`
    for what is no batch of ours.
    """
    stream = pa.ipc.open_stream(header + message)
    batch, metadata = stream.read_next_batch_with_custom_metadata()
    try:
        first_n, crc = int(metadata["n"]), int(metadata["crc32"])
    except (KeyError, TypeError, ValueError):
        raise ValueError("a batch without its number and checksum") from None
    if not _has_shape(batch) or checksum(batch) != crc:
        raise ValueError("checksum does not fit")
    return _Batch(first_n, batch, crc)


def _block(found: _Batch, begin: LogOffset, start_n: int, end: LogOffset) -> RecordRange:
    """What a batch has from record `start_n` on."""
    skip = max(start_n - found.n, 0)
    return RecordRange(found.n + skip, found.batch.slice(skip), (begin,), end)


def _message(file: io.BufferedReader, offset: int) -> bytes | None:
    """One whole IPC message, or None where the file ends before it does."""
    length = _length(file, offset)
    if length is None:
        return None
    file.seek(offset)
    return file.read(length)


def _length(file: io.BufferedReader, offset: int) -> int | None:
    """Bytes of the IPC message at `offset`; None where the file ends before it does."""
    there = os.fstat(file.fileno()).st_size - offset  # a damaged length may be of any size
    file.seek(offset)
    prefix = file.read(8)
    if len(prefix) < 8:
        return None
    if prefix == END_MARK:
        return len(prefix)
    metadata_bytes = int.from_bytes(prefix[4:], "little")
    if not prefix.startswith(_MARK) or not 0 < metadata_bytes <= there - 8:
        return None
    body_bytes = _body_length(file.read(metadata_bytes))
    length = 8 + metadata_bytes + body_bytes
    return length if length <= there else None


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


def checksum(batch: pa.RecordBatch) -> int:
    """CRC 32 of the records, as a batch carries it."""
    crc = 0
    for column in batch.columns:
        if column.offset:
            column = pa.concat_arrays([column])  # noqa: PLW2901 - a slice's buffers are its parent's
        for buffer in column.buffers():
            if buffer is not None:
                crc = zlib.crc32(buffer, crc)
    return crc


def corrupt(path: Path, offset: int, n: int, why: str) -> JournalError:
    """That a segment cannot be read beyond record `n` - 1, and what to do."""
    return JournalError(
        f"Journal segment {path} is corrupt at byte {offset} ({why}): good up to record {n - 1}."
        f" {_remedy(path)}"
    )


def _remedy(path: Path) -> str:
    return (
        "Nothing was deleted; restore the file from a backup. Without one, rename it to"
        f" {set_aside(path).name}: what can still be read of it is loaded then, and gap rows name the rest."
    )


# -- what is left of a damaged segment ---------------------------------------------------------


@dataclass(frozen=True)
class WholeBatch:
    """Where a batch is that can be read."""

    offset: int
    end_offset: int
    n: int
    end_n: int
    crc: int


def _read_damaged(
    path: Path, start: LogOffset, size: int | None, following: int | None
) -> Iterator[RecordRange]:
    """The batches of a segment that was set aside, whatever is between them."""
    status = path.stat()
    with path.open("rb") as file:
        for it in believed(path, status.st_size, status.st_mtime_ns, following):
            if it.end_n <= start.n or (size is not None and it.end_offset > size):
                continue
            message = _message(file, it.offset)
            if message is None:
                raise corrupt(path, it.offset, it.n, "it became shorter while it was read")
            begin = LogOffset(start.segment, it.offset, it.n)
            end = LogOffset(start.segment, it.end_offset, it.end_n)
            yield _block(_batch(HEADER, message), begin, start.n, end)


@lru_cache(maxsize=4)
def believed(path: Path, size: int, mtime_ns: int, following: int | None) -> tuple[WholeBatch, ...]:
    """The whole batches of a damaged segment whose numbers can be believed, in order.

    A batch's number is not in its checksum: after damage it is believed where the next batch, or the
    `following` segment, begins at the number at which this one ends. Which they are depends on the file
    alone, not on where the reading begins, so that a range that is read twice has the same holes.
    `size` and `mtime_ns` say to the cache which content it was.
    """
    number = int(path.name.partition(".")[0])
    found = list(whole_batches(path))
    expected, kept = number, list[WholeBatch]()
    for i, it in enumerate(found):
        then = found[i + 1].n if i + 1 < len(found) else following
        if it.n < expected or (following is not None and it.end_n > following):
            continue
        if it.n == expected or it.end_n == then:
            kept.append(it)
            expected = it.end_n
    return tuple(kept)


def whole_batches(path: Path, at: int = 0) -> Iterator[WholeBatch]:
    """Whatever has the form and the checksum of a batch, wherever it begins from byte `at` on."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            while (begins := _BEGINS.search(content, at)) is not None:
                offset = begins.start()
                at = offset + 1
                message = _message(file, offset)
                try:
                    it = _batch(HEADER, message) if message is not None else None
                except (StopIteration, pa.ArrowException, OSError, MemoryError, ValueError):
                    continue
                if message is None or it is None or not it.batch.num_rows:
                    continue
                end = offset + len(message)
                yield WholeBatch(offset, end, it.n, it.end_n, it.crc)
                if end == len(content) or content[end : end + len(_MARK)] == _MARK:
                    at = end  # else it may be the length that was changed


def bytes_after(path: Path, offset: int) -> int:
    """Bytes of a segment after `offset`, should there be more than an end mark."""
    with path.open("rb") as file:
        left = path.stat().st_size - offset
        complete = _message(file, offset)
    return 0 if complete is not None and len(complete) == left else left

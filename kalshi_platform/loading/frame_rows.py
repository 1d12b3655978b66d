"""The dataset `frames`: journal records in the archive's columns, and back.

A part of `frames` is read from the journal when it is written: its bytes never wait in memory among the rows that
are built from them. `sid` and `seq` are those of the built rows; records without a number are few, and their heads
are read one by one. Which files hold which records belongs in `archive`, rebuilding an hour from them in `rebuild`.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.archive import Archive
from kalshi_platform.exchange.frames import DecodeError, decode_head
from kalshi_platform.journal import reader
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.reader import SCHEMA, LogOffset, RecordRange
from kalshi_platform.loading.rows import Rows
from kalshi_platform.loading.shared_rows import chunks, until_record
from kalshi_platform.loading.state_files import archive_hour_state
from kalshi_platform.schema import FRAMES, ORDERBOOK_EVENTS, STREAM_EVENTS, TRADES

TYPES = {kind: kind.name.lower() for kind in Kind}
"""The column `type` of each kind of journal record."""
_TYPES = pa.array([TYPES[kind] for kind in sorted(Kind)], pa.string())
_SOURCES = (ORDERBOOK_EVENTS.name, TRADES.name, STREAM_EVENTS.name)
REPLICA = 0


class JournalFrames:
    """Reads the frames of consecutive ranges of one shard's journal."""

    def __init__(self, folder: Path, shard: int) -> None:
        self._folder = folder
        self._shard = shard
        self._next = LogOffset(0, 0, -1)
        """Where the last range ended: the next one usually begins there."""

    def tables(self, first_n: int, end_n: int, rows: Sequence[Rows]) -> Iterator[pa.Table]:
        """Yield the frames of records first_n to end_n - 1, which `rows` were built from, in bounded tables.

        Raises: `JournalError` where the journal no longer has them.
        """
        begin = self._next if self._next.n == first_n else reader.offset_of(self._folder, first_n)
        numbers = Numbers(first_n, end_n, rows)
        for part in chunks(until_record(end_n, reader.read(self._folder, begin))):
            if isinstance(part, RecordRange):
                yield frames_table(part, numbers, self._shard)
            if part.first_n + part.rows == end_n:
                self._next = part.end

    def archive_books(self, archive: Archive, hour: datetime, n: int) -> None:
        """Copy the books before an hour's first record, `n`, to the archive: frames alone do not have them."""
        archive_hour_state(archive, self._folder, self._shard, hour, n)


class Numbers:
    """`sid` and `seq` of a range's records, as the built rows have them."""

    def __init__(self, first_n: int, end_n: int, rows: Sequence[Rows]) -> None:
        self._first_n = first_n
        self._sid = np.zeros(end_n - first_n, np.uint32)
        self._seq = np.zeros(end_n - first_n, np.uint64)
        for built in rows:
            for name in _SOURCES:
                table = built.tables[name]
                seq = table["seq"].to_numpy()
                at = table["record"].to_numpy()[seq > 0].astype(np.int64) - first_n
                self._seq[at] = seq[seq > 0]
                self._sid[at] = table["sid"].to_numpy()[seq > 0]

    def of(self, part: RecordRange) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint64]]:
        """The columns `sid` and `seq` of some of the range's records."""
        inside = slice(part.first_n - self._first_n, part.first_n - self._first_n + part.rows)
        sid, seq = self._sid[inside].copy(), self._seq[inside]
        kind, frame = part.batch.column("kind"), part.batch.column("frame")
        for row in np.flatnonzero(seq == 0).tolist():
            sid[row] = _sid(kind[row].as_py(), frame[row].as_py())
        return sid, seq


def _sid(kind: int, frame: bytes) -> int:
    """The subscription that a record without a number names; 0 where it names none."""
    try:
        if kind == Kind.NOTE:
            return int(msgspec.json.decode(frame)["sid"])
        return decode_head(frame).sid
    except DecodeError:
        return 0


def frames_table(part: RecordRange, numbers: Numbers, shard: int) -> pa.Table:
    """Journal records as rows of `frames`."""
    batch = part.batch
    sid, seq = numbers.of(part)
    conns = batch.column("conn").cast(pa.binary()).dictionary_encode()
    names = pa.array([str(uuid.UUID(bytes=c)) for c in conns.dictionary.to_pylist()], pa.string())
    return pa.Table.from_arrays(
        [
            batch.column("recv_ns").cast(FRAMES.arrow.field("recv_ts").type),
            pa.repeat(pa.scalar(shard, pa.uint32()), part.rows),
            pa.repeat(pa.scalar(REPLICA, pa.uint32()), part.rows),
            pa.array(np.arange(part.first_n, part.first_n + part.rows, dtype=np.uint64)),
            pa.DictionaryArray.from_arrays(conns.indices.cast(pa.int32()), names),
            pa.array(sid),
            pa.array(seq),
            pa.DictionaryArray.from_arrays(batch.column("kind").cast(pa.int32()), _TYPES),
            batch.column("frame"),
        ],
        schema=FRAMES.arrow,
    )


def records(table: pa.Table) -> Iterator[RecordRange]:
    """Yield the journal's records of some rows of `frames`, sorted by record; each range is without a gap."""
    if not table.num_rows:
        return
    numbers = table["record"].to_numpy().astype(np.int64)
    edges = [0, *(np.flatnonzero(np.diff(numbers) != 1) + 1).tolist(), len(numbers)]
    conns = table["conn_id"].combine_chunks()
    names = conns.dictionary.to_pylist()
    bytes_of = pa.array([uuid.UUID(name).bytes for name in names], SCHEMA.field("conn").type)
    kinds = pc.index_in(table["type"].cast(pa.string()), value_set=_TYPES)
    batch = pa.RecordBatch.from_arrays(
        [
            table["recv_ts"].cast(pa.int64()).combine_chunks(),
            bytes_of.take(conns.indices),
            kinds.cast(pa.uint8()).combine_chunks(),
            table["frame"].combine_chunks(),
        ],
        schema=SCHEMA,
    )
    for start, end in itertools.pairwise(edges):
        if start < end:
            first_n, rows = int(numbers[start]), end - start
            yield RecordRange(
                first_n,
                batch.slice(start, rows),
                (LogOffset(0, 0, first_n),),
                LogOffset(0, 0, first_n + rows),
            )

"""Tally a shard's journal by subscription (`tally`), as far as the journal is kept.

Frames are counted by their kind and the `sid` and `seq` of their heads. The loader's decoder is not used, so
that a fault of it cannot hide itself.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from kalshi_platform import typed_json
from kalshi_platform.exchange.frames import DecodeError, decode_head
from kalshi_platform.journal import reader
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.reader import LostRange, RecordRange
from kalshi_platform.loading.shared_rows import chunks, until_record
from kalshi_platform.quality.tally import DELTA, OTHER, SNAPSHOT, TRADE, Holdings
from kalshi_platform.quality.tally_stores import named_by
from kalshi_platform.utc_hours import hour_start_ns

_HEAD = pa.schema([pa.field("sid", pa.uint32()), pa.field("seq", pa.uint64())])
_MOST = 2**63 - 1
"""The greatest `seq` that a frame may have: `exchange.frames.Seq`."""
_KINDS = {Kind.DELTA: DELTA, Kind.TRADE: TRADE, Kind.SNAPSHOT: SNAPSHOT}


@dataclass
class Journal:
    """One shard's journal, up to a record."""

    shard: int
    first: int
    """The first record that is kept; those before it were pruned."""
    end: int
    """The record that it was read up to."""
    held: Holdings = field(default_factory=Holdings)
    recent: Holdings = field(default_factory=Holdings)
    """The same for records received from `recent_from` on."""
    lost: list[tuple[int, int]] = field(default_factory=list)
    """(first, end) of each lost range."""

    @property
    def lost_records(self) -> int:
        """Number of records that cannot be read."""
        return sum(end - first for first, end in self.lost)


class _Note(msgspec.Struct):
    kind: str = ""
    sid: int = 0
    detail: msgspec.Raw = msgspec.Raw(b"{}")


def read(
    folder: Path,
    shard: int,
    end: int,
    *,
    hours: tuple[datetime, datetime] | None,
    recent_from: datetime | None,
    progress: Callable[[int], None],
) -> Journal:
    """Tally a journal up to record `end`; with `hours`, the records received from the first to the last of them.

    `progress` is called with the record that has been reached. Raises `JournalError` for damage.
    """
    beginning = reader.oldest_offset(folder)
    found = Journal(shard, beginning.n, max(end, beginning.n))
    # in chunks: adding up has a fixed cost, and a quiet exchange makes many small batches
    for part in chunks(until_record(end, reader.read(folder, beginning))):
        if isinstance(part, LostRange):
            found.lost.append((part.first_n, part.first_n + part.rows))
        else:
            records = _records(part, hours)
            _add(found.held, shard, records)
            if recent_from is not None:
                recent = pl.col("recv_ns") >= hour_start_ns(recent_from)
                _add(found.recent, shard, records.filter(recent))
                found.recent.compress_idle()
        found.held.compress_idle()
        progress(part.first_n + part.rows)
    if recent_from is None:
        found.recent = found.held
    return found


def connections(folder: Path, start: int) -> set[str]:
    """Return the connections of the records from `start` on."""
    found: set[str] = set()
    for part in reader.read(folder, reader.offset_of(folder, start)):
        if isinstance(part, RecordRange):
            conns = part.batch.column("conn").cast(pa.binary()).unique()
            found |= {str(uuid.UUID(bytes=conn)) for conn in conns.to_pylist()}
    return found


def _records(records: RecordRange, hours: tuple[datetime, datetime] | None) -> pl.DataFrame:
    """Return the records of a range with their numbers, within the hours."""
    conns = records.batch.column("conn").cast(pa.binary()).dictionary_encode()
    names = pl.Series(
        [str(uuid.UUID(bytes=c)) for c in conns.dictionary.to_pylist()], dtype=pl.String
    )
    rows = pl.DataFrame(
        {
            "record": np.arange(records.first_n, records.first_n + records.rows, dtype=np.uint64),
            "recv_ns": pl.Series(records.batch.column("recv_ns")),
            "conn": names.gather(pl.Series(conns.indices)),
            "what": pl.Series(records.batch.column("kind")),
            "frame": pl.Series(records.batch.column("frame").cast(pa.large_binary())),
        }
    )
    if hours is None:
        return rows
    first, last = (hour_start_ns(hour) for hour in hours)
    return rows.filter(pl.col("recv_ns").is_between(first, last + 3_600_000_000_000, closed="left"))


def _add(held: Holdings, shard: int, records: pl.DataFrame) -> None:
    held.add_records(
        pl.repeat(shard, records.height, dtype=pl.UInt32, eager=True), records["record"]
    )
    is_note = pl.col("what") == int(Kind.NOTE)
    for conn, frame in records.filter(is_note).select("conn", "frame").iter_rows():
        _add_note(held, conn, frame)
    frames = records.filter(~is_note & (pl.col("what") != int(Kind.MALFORMED)))
    if frames.is_empty():
        return
    sid, seq = heads(frames["frame"])
    kind = (
        frames["what"]
        .cast(pl.Int64)
        .replace_strict(
            {int(k): v for k, v in _KINDS.items()}, default=OTHER, return_dtype=pl.Int64
        )
    )
    held.add(
        frames.select(
            "conn",
            sid.alias("sid"),
            seq.alias("seq"),
            "record",
            kind.alias("kind"),
            pl.from_epoch(pl.col("recv_ns") // 1_000, time_unit="us")
            .dt.replace_time_zone("UTC")
            .alias("ingest_ts"),
        ).filter(pl.col("seq") > 0)
    )


def _add_note(held: Holdings, conn: str, frame: bytes) -> None:
    note = typed_json.decode(frame, _Note)
    if note.kind == "connected":
        held.opened.add(conn)
    elif note.kind == "gap":
        held.add_gaps(named_by(conn, note.sid, bytes(note.detail)))


def heads(frames: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Return `sid` and `seq` of each frame, 0 if it has none that can be read."""
    table = _read_heads(frames)
    if table is not None:
        return tuple(pl.Series(table[name]).fill_null(0) for name in ("sid", "seq"))  # type: ignore[return-value]
    pairs = list(_one_by_one(frames))
    return (
        pl.Series([sid for sid, _ in pairs], dtype=pl.UInt32),
        pl.Series([seq for _, seq in pairs], dtype=pl.UInt64),
    )


def _read_heads(frames: pl.Series) -> pa.Table | None:
    """Read all heads at once; None if a frame does not have the expected shape."""
    data = frames.to_arrow().cast(pa.large_binary())
    text = b"\n".join(data.to_pylist())
    try:
        table = pj.read_json(
            pa.BufferReader(text),
            read_options=pj.ReadOptions(use_threads=False, block_size=max(len(text), 1)),
            parse_options=pj.ParseOptions(
                explicit_schema=_HEAD, unexpected_field_behavior="ignore"
            ),
        )
    except pa.ArrowInvalid:
        return None
    if table.num_rows != len(frames) or (pc.max(table["seq"]).as_py() or 0) > _MOST:
        return None
    return table


def _one_by_one(frames: pl.Series) -> Iterator[tuple[int, int]]:
    for frame in frames:
        try:
            head = decode_head(frame)
        except DecodeError:
            yield 0, 0
        else:
            yield head.sid, head.seq

"""Rows built range by range from the journal, once for all loaders that follow it.

Every loader has its own pace and its own log offset (see `loader`). Building rows is a pure function of a range
and the books before it, so a range that one loader has built serves the next loader at the same offset. A
loader at another offset builds its own ranges concurrently; no lock is held while building.

A range is bounded by the rows that it gives and the bytes that it reads, not by its number of records: a
snapshot is one record and thousands of rows. How rows are built belongs in `rows`.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.exchange.columnar import Decoded, decode_range
from kalshi_platform.journal import reader
from kalshi_platform.journal.clock import ReceiveClock
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.reader import (
    JournalError,
    JournalRange,
    LogOffset,
    LostRange,
    RecordRange,
    concatenate,
)
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.rows import Rows, build_rows
from kalshi_platform.utc_hours import HOUR_NS

CHUNK_ROWS = 65_536
CHUNK_BYTES = 16 << 20
"""Upper bounds of a range: they limit memory while catching up, and the time until a stop request is seen.
A single record may exceed them: a frame is never split."""
LEVEL_BYTES = 18
"""The minimum size of a level in a snapshot's JSON: ["0.0100","1.00"],"""
KEPT_STEPS = 8
KEPT_BYTES = 48 << 20
"""So much is kept for the other loads: more than comes while one of them writes. Bytes are those of the rows,
and of the books what the newest step does not hold as well."""
SHARED_WAIT_S = 5.0
"""How long a loader waits at most for a range that another loader is building, which is ready sooner than its own."""


@dataclass(frozen=True)
class BuiltRange:
    """A range of the journal with its rows."""

    begin: LogOffset
    loss_key: Hashable
    """`BookState.loss_key` before the range: a loader that lost records which another read has other books."""
    hour: datetime | None
    """The new hour that begins with its first record; None if none does."""
    rows: Rows
    state: BookState
    """The books after it."""
    end: LogOffset


@dataclass(frozen=True)
class _DecodedRange:
    """Decoded records within one hour: the part of the work that needs no books."""

    hour: datetime | None
    decoded: Decoded
    end: LogOffset


_DecodedRanges = Iterator[_DecodedRange]
_Key = tuple[int, Hashable]
"""The number of a range's first record, and the loss key before it."""


class SharedRows:
    """Built ranges of one journal, shared by the loaders of its stores. Thread-safe."""

    def __init__(self, folder: Path, shard: int = 0) -> None:
        self._folder = folder
        self.shard = shard
        """The journal's shard."""
        self._lock = threading.Lock()
        """Guards the fields below; held only briefly."""
        self._kept: dict[_Key, BuiltRange] = {}
        """Kept ranges, in the order in which they were built."""
        self._in_progress: dict[_Key, Future[BuiltRange | None]] = {}
        """Ranges being built; the result is None where building failed."""
        self._decoder = ThreadPoolExecutor(2, thread_name_prefix="decode")
        self._ahead: dict[
            tuple[int, ReceiveClock], Future[tuple[_DecodedRange, _DecodedRanges] | None]
        ] = {}
        """Records decoded ahead, by the number of their first record and the clock before."""
        self._reached: dict[str, int] = {}
        """The record that each loader has reached; -1: it has not begun."""

    def register_loader(self, load: str) -> None:
        """Register a loader, so that ranges built by others are kept for it."""
        self._reached[load] = -1

    def steps(
        self, load: str, start: LogOffset, state: BookState, limit: LogOffset
    ) -> Iterator[BuiltRange]:
        """Yield the built ranges from `start` up to `limit`; `state`: the books before `start`."""
        while start.n < limit.n:
            step = self._step(load, start, state, limit)
            yield step
            start, state = step.end, step.state

    def _step(self, load: str, start: LogOffset, state: BookState, limit: LogOffset) -> BuiltRange:
        key = (start.n, state.loss_key)
        with self._lock:
            step, others = self._kept.get(key), self._in_progress.get(key)
            if mine := step is None and others is None:
                self._in_progress[key] = Future()
            until_n = self._limit_at_kept(start.n, limit.n)
        if step is None and others is not None:
            step = _wait_for_other(others)
        try:
            step = step or self._derive(start, state, limit, until_n)
        finally:
            with self._lock:
                if step is not None:
                    self._kept[key] = step
                    self._reached[load] = step.end.n
                    self._forget()
                if mine:
                    self._in_progress.pop(key).set_result(step)
        return step

    def _derive(
        self, start: LogOffset, state: BookState, limit: LogOffset, until_n: int
    ) -> BuiltRange:
        piece = self._next(start, state, limit, until_n)
        rows, after = build_rows(piece.decoded, state, self.shard)
        return BuiltRange(start, state.loss_key, piece.hour, rows, after, piece.end)

    def _next(
        self, start: LogOffset, state: BookState, limit: LogOffset, until_n: int
    ) -> _DecodedRange:
        """The next decoded records; they may have been decoded ahead."""
        with self._lock:
            ahead = self._ahead.pop((start.n, state.clock), None)
        result = ahead.result() if ahead is not None else None
        if result is None:
            parts = until_record(until_n, reader.read(self._folder, start, limit))
            result = _first(_decoded_ranges(parts, state))
        if result is None:
            raise JournalError(
                f"The journal in {self._folder} no longer has record {start.n}, which was written to it:"
                " another process truncated its segment."
            )
        decoded_range, following = result
        if decoded_range.end.n < until_n:
            clock = decoded_range.decoded.clock_after(state.clock)
            self._decode_ahead((decoded_range.end.n, clock), following)
        return decoded_range

    def _decode_ahead(self, place: tuple[int, ReceiveClock], following: _DecodedRanges) -> None:
        """Decode the next records while this range is built; at most one range ahead per loader."""
        with self._lock:
            while len(self._ahead) >= max(len(self._reached), 1):
                del self._ahead[next(iter(self._ahead))]
            self._ahead[place] = self._decoder.submit(_first, following)

    def _limit_at_kept(self, start_n: int, limit_n: int) -> int:
        """End a range where a kept one begins, so that a loader that was behind can reuse kept ranges again."""
        begins = [step.begin.n for step in self._kept.values() if step.begin.n > start_n]
        return min([*begins, limit_n])

    def _forget(self) -> None:
        """Drop ranges that every loader has passed, and the oldest ones beyond the limits.

        A loader that is farther behind, for example after an outage, builds its own ranges until it reaches kept
        ones.
        """
        passed = min(self._reached.values(), default=-1)
        steps = sorted(self._kept.items(), key=lambda kept: kept[1].end.n, reverse=True)
        kept = list[tuple[_Key, BuiltRange]]()
        counted = {id(piece) for _, newest in steps[:1] for piece, _ in newest.state.pieces()}
        held = 0
        for key, step in steps[:KEPT_STEPS]:
            pieces = {id(piece): size for piece, size in step.state.pieces()}
            held += step.rows.bytes + sum(pieces[piece] for piece in pieces.keys() - counted)
            counted |= pieces.keys()
            if step.end.n <= passed or (kept and held > KEPT_BYTES):
                break
            kept.append((key, step))
        self._kept = dict(reversed(kept))


def _wait_for_other(load: Future[BuiltRange | None]) -> BuiltRange | None:
    """Wait for a range that another loader is building; None where that fails or takes too long."""
    try:
        return load.result(SHARED_WAIT_S)
    except TimeoutError:
        return None


def _decoded_ranges(parts: Iterator[JournalRange], state: BookState) -> _DecodedRanges:
    """Decode the records after `state`, range by range, lazily."""
    clock = state.clock
    dropped = state.ladders.height // max(len(state.books), 1)
    for chunk in chunks(parts, dropped):
        for part, opens in split_at_checkpoints(chunk, clock):
            decoded = decode_range(part)
            hour = opens if opens and clock.is_new_hour(opens) else None
            yield _DecodedRange(hour, decoded, part.end)
            clock = decoded.clock_after(clock)


def _first(pieces: _DecodedRanges) -> tuple[_DecodedRange, _DecodedRanges] | None:
    """The next decoded range and the iterator of the following ones; None at the end."""
    piece = next(pieces, None)
    return None if piece is None else (piece, pieces)


def until_record(n: int, parts: Iterator[JournalRange]) -> Iterator[JournalRange]:
    """Yield the ranges before record `n`, without reading beyond it."""
    for part in parts:
        if part.first_n >= n:
            return
        yield part.cut(n - part.first_n)[0] if part.first_n + part.rows > n else part
        if part.first_n + part.rows >= n:
            return


def chunks(parts: Iterator[JournalRange], dropped: int = 0) -> Iterator[JournalRange]:
    """Join small ranges and split large ones, to CHUNK_ROWS rows or CHUNK_BYTES, whichever comes first.

    Building rows has a fixed cost per range, and takes memory per row. `dropped`: the average number of levels
    that a snapshot drops from the book before it; each is a row, too.
    """
    gathered: list[RecordRange] = []
    full = 0.0
    for part in parts:
        if gathered and (isinstance(part, LostRange) or part.unread is not None):
            yield concatenate(gathered)
            gathered, full = [], 0.0
        if isinstance(part, LostRange):
            yield part
            continue
        rest: RecordRange | None = part
        while rest is not None:
            after = full + np.cumsum(_shares(rest.batch, dropped))
            fits = (
                int(np.searchsorted(after, 1.0, side="left")) + 1
            )  # includes the record that fills it
            head, rest = rest.cut(fits) if fits < rest.rows else (rest, None)
            gathered.append(head)
            full = float(after[head.rows - 1])
            if full >= 1.0:
                yield concatenate(gathered)
                gathered, full = [], 0.0
    if gathered:
        yield concatenate(gathered)


def _shares(batch: pa.RecordBatch, dropped: int) -> npt.NDArray[np.float64]:
    """The fraction of a chunk that each record takes, by rows or bytes, whichever is larger."""
    size = pc.binary_length(batch.column("frame")).to_numpy()
    is_snapshot = batch.column("kind").to_numpy() == Kind.SNAPSHOT
    rows = np.where(is_snapshot, 1 + dropped + size // LEVEL_BYTES, 1)
    shares: npt.NDArray[np.float64] = np.maximum(rows / CHUNK_ROWS, size / CHUNK_BYTES)
    return shares


def split_at_checkpoints(
    part: JournalRange, clock: ReceiveClock
) -> Iterator[tuple[JournalRange, datetime | None]]:
    """Split a range before each record at which a book checkpoint is due; yield the parts with its time.

    `clock`: the clock before the range. No checkpoint is due at a lost range, but at the record after it.
    """
    if isinstance(part, LostRange):
        yield part, None
        return
    recv_ns = part.batch.column("recv_ns").to_numpy()
    before = np.concatenate([[clock.last_ns or recv_ns[0]], recv_ns[:-1]])
    opening = np.flatnonzero((recv_ns < before) | (recv_ns // HOUR_NS != before // HOUR_NS))
    block, cut, opens = part, 0, None
    for at in opening.tolist():
        if at > cut:
            head, block = block.cut(at - cut)
            yield head, opens
        newest_ns = max(clock.newest_ns, int(before[: at + 1].max()))
        opens = ReceiveClock(int(before[at]), newest_ns).checkpoint_time(int(recv_ns[at]))
        cut = at
    yield block, opens

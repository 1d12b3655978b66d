"""The journal, derived step by step, and each step once for all stores that follow it.

Every store has its own pace and its own place in the journal (`load.py`). Deriving is a pure function
of a range and the books before it, so what one load has derived serves the next one that comes to the
same place. A load that is elsewhere derives for itself, beside the others: no lock is held meanwhile.

A step is bounded by the rows that it makes and by the bytes that it reads, not by its records: a
snapshot is one record and thousands of rows.
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
"""Derived at a time: bounds memory while catching up, and the time to the next look at whether to end.
One record may make more of either: a frame is not cut."""
LEVEL_BYTES = 18
"""What a level takes of a snapshot's JSON at least: ["0.0100","1.00"],"""
KEPT_STEPS = 8
KEPT_BYTES = 48 << 20
"""So much is kept for the other loads: more than comes while one of them writes. Bytes are those of the rows,
and of the books what the newest step does not hold as well."""
SHARED_WAIT_S = 5.0
"""A step that another load is deriving is waited for, as it is sooner there than one's own; not longer
than this, whatever holds the other up."""


@dataclass(frozen=True)
class BuiltRange:
    """A range of the journal, derived."""

    begin: LogOffset
    doubts: Hashable
    """Of the state before it. A load that lost records which another had read has other books there."""
    hour: datetime | None
    """The new hour that its first record begins; None where it begins none."""
    rows: Rows
    state: BookState
    """The books after it."""
    end: LogOffset


@dataclass(frozen=True)
class _Piece:
    """Records within one hour, decoded: all that can be done without the books before them."""

    hour: datetime | None
    decoded: Decoded
    end: LogOffset


_Pieces = Iterator[_Piece]
_Key = tuple[int, Hashable]
"""The number of a step's first record, and the doubts before it."""


class SharedRows:
    """Steps through one journal, shared by the loads of its stores, which are threads."""

    def __init__(self, folder: Path, shard: int = 0) -> None:
        self._folder = folder
        self.shard = shard
        """Whose journal it is."""
        self._lock = threading.Lock()
        """Of what follows; held for moments."""
        self._kept: dict[_Key, BuiltRange] = {}
        """In the order of derivation."""
        self._under_way: dict[_Key, Future[BuiltRange | None]] = {}
        """What a load is deriving now; None where that failed."""
        self._decoder = ThreadPoolExecutor(2, thread_name_prefix="decode")
        self._ahead: dict[tuple[int, ReceiveClock], Future[tuple[_Piece, _Pieces] | None]] = {}
        """What is decoded ahead, by the number of its first record and the clock before."""
        self._reached: dict[str, int] = {}
        """The record that each load has come to; -1: it has not begun."""

    def joins(self, load: str) -> None:
        """A load will follow this journal: keep for it what others derive."""
        self._reached[load] = -1

    def steps(
        self, load: str, start: LogOffset, state: BookState, limit: LogOffset
    ) -> Iterator[BuiltRange]:
        """What is durable from `start` up to `limit`, where `state` is the books before `start`."""
        while start.n < limit.n:
            step = self._step(load, start, state, limit)
            yield step
            start, state = step.end, step.state

    def _step(self, load: str, start: LogOffset, state: BookState, limit: LogOffset) -> BuiltRange:
        key = (start.n, state.doubts)
        with self._lock:
            step, others = self._kept.get(key), self._under_way.get(key)
            if mine := step is None and others is None:
                self._under_way[key] = Future()
            until_n = self._up_to_what_is_kept(start.n, limit.n)
        if step is None and others is not None:
            step = _of_another(others)
        try:
            step = step or self._derive(start, state, limit, until_n)
        finally:
            with self._lock:
                if step is not None:
                    self._kept[key] = step
                    self._reached[load] = step.end.n
                    self._forget()
                if mine:
                    self._under_way.pop(key).set_result(step)
        return step

    def _derive(
        self, start: LogOffset, state: BookState, limit: LogOffset, until_n: int
    ) -> BuiltRange:
        piece = self._next(start, state, limit, until_n)
        rows, after = build_rows(piece.decoded, state, self.shard)
        return BuiltRange(start, state.doubts, piece.hour, rows, after, piece.end)

    def _next(self, start: LogOffset, state: BookState, limit: LogOffset, until_n: int) -> _Piece:
        """The next records, decoded: by now perhaps, if somebody looked ahead."""
        with self._lock:
            ahead = self._ahead.pop((start.n, state.clock), None)
        found = ahead.result() if ahead is not None else None
        if found is None:
            stretches = up_to(until_n, reader.read(self._folder, start, limit))
            found = _first(_pieces(stretches, state))
        if found is None:
            raise JournalError(
                f"The journal in {self._folder} no longer has record {start.n}, which was written to it:"
                " its segment was cut short by somebody else."
            )
        piece, following = found
        if piece.end.n < until_n:
            clock = piece.decoded.clock_after(state.clock)
            self._look_ahead((piece.end.n, clock), following)
        return piece

    def _look_ahead(self, place: tuple[int, ReceiveClock], following: _Pieces) -> None:
        """Decode what comes next while this is derived; one piece for each load at most."""
        with self._lock:
            while len(self._ahead) >= max(len(self._reached), 1):
                del self._ahead[next(iter(self._ahead))]
            self._ahead[place] = self._decoder.submit(_first, following)

    def _up_to_what_is_kept(self, start_n: int, limit_n: int) -> int:
        """A load that was behind meets the other's steps again, instead of cutting across them for ever."""
        begins = [step.begin.n for step in self._kept.values() if step.begin.n > start_n]
        return min([*begins, limit_n])

    def _forget(self) -> None:
        """Let go of what every load has passed, and of more than is worth it.

        A load that is farther behind, its store away perhaps, comes back to the steps of that time.
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


def _of_another(load: Future[BuiltRange | None]) -> BuiltRange | None:
    """What another load derives; None where it fails or takes too long."""
    try:
        return load.result(SHARED_WAIT_S)
    except TimeoutError:
        return None


def _pieces(stretches: Iterator[JournalRange], state: BookState) -> _Pieces:
    """What comes after `state` in pieces, decoded one by one as they are asked for."""
    clock = state.clock
    dropped = state.ladders.height // max(len(state.books), 1)
    for stretch in chunks(stretches, dropped):
        for piece, opens in at_openings(stretch, clock):
            it = decode_range(piece)
            yield _Piece(opens if opens and clock.is_new_hour(opens) else None, it, piece.end)
            clock = it.clock_after(clock)


def _first(pieces: _Pieces) -> tuple[_Piece, _Pieces] | None:
    """The next piece and those behind it; None at the end."""
    piece = next(pieces, None)
    return None if piece is None else (piece, pieces)


def up_to(n: int, stretches: Iterator[JournalRange]) -> Iterator[JournalRange]:
    """The stretches before record `n`; reads none behind it."""
    for it in stretches:
        if it.first_n >= n:
            return
        yield it.cut(n - it.first_n)[0] if it.first_n + it.rows > n else it
        if it.first_n + it.rows >= n:
            return


def chunks(stretches: Iterator[JournalRange], dropped: int = 0) -> Iterator[JournalRange]:
    """Small blocks gathered and large ones cut, to CHUNK_ROWS rows or CHUNK_BYTES, whatever comes first.

    A derivation costs the same for few rows, and memory for many. `dropped`: levels that a snapshot
    takes from the book before it, on average; each is a row too.
    """
    gathered: list[RecordRange] = []
    full = 0.0
    for it in stretches:
        if gathered and (isinstance(it, LostRange) or it.unread is not None):
            yield concatenate(gathered)
            gathered, full = [], 0.0
        if isinstance(it, LostRange):
            yield it
            continue
        rest: RecordRange | None = it
        while rest is not None:
            after = full + np.cumsum(_shares(rest.batch, dropped))
            fits = int(np.searchsorted(after, 1.0, side="left")) + 1  # the one that fills it, too
            head, rest = rest.cut(fits) if fits < rest.rows else (rest, None)
            gathered.append(head)
            full = float(after[head.rows - 1])
            if full >= 1.0:
                yield concatenate(gathered)
                gathered, full = [], 0.0
    if gathered:
        yield concatenate(gathered)


def _shares(batch: pa.RecordBatch, dropped: int) -> npt.NDArray[np.float64]:
    """What part of a chunk each record takes, by its rows or its bytes."""
    size = pc.binary_length(batch.column("frame")).to_numpy()
    is_snapshot = batch.column("kind").to_numpy() == Kind.SNAPSHOT
    rows = np.where(is_snapshot, 1 + dropped + size // LEVEL_BYTES, 1)
    shares: npt.NDArray[np.float64] = np.maximum(rows / CHUNK_ROWS, size / CHUNK_BYTES)
    return shares


def at_openings(
    stretch: JournalRange, clock: ReceiveClock
) -> Iterator[tuple[JournalRange, datetime | None]]:
    """A block cut before each record at which the books are to be written down, with what `ReceiveClock.opens`
    says of it.

    `clock` is that before the block. A hole opens nothing: the record after it does.
    """
    if isinstance(stretch, LostRange):
        yield stretch, None
        return
    recv_ns = stretch.batch.column("recv_ns").to_numpy()
    before = np.concatenate([[clock.last_ns or recv_ns[0]], recv_ns[:-1]])
    opening = np.flatnonzero((recv_ns < before) | (recv_ns // HOUR_NS != before // HOUR_NS))
    block, cut, opens = stretch, 0, None
    for at in opening.tolist():
        if at > cut:
            head, block = block.cut(at - cut)
            yield head, opens
        newest_ns = max(clock.newest_ns, int(before[: at + 1].max()))
        opens = ReceiveClock(int(before[at]), newest_ns).checkpoint_time(int(recv_ns[at]))
        cut = at
    yield block, opens

"""The journal, derived step by step, and each step once for all stores that follow it.

Every store has its own pace and its own place in the journal (`load.py`). Deriving is a pure function
of a range and the books before it, so what one load has derived serves the next one that comes to the
same place. A load that is far behind finds nothing kept and derives for itself.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from kalshi_platform.loading.books import State
from kalshi_platform.loading.decode import Decoded, decoded
from kalshi_platform.loading.derive import Rows, derive
from kalshi_platform.recording import journal
from kalshi_platform.recording.journal import Block, Hole, JournalError, Position, Stretch, joined
from kalshi_platform.storage.archive import HOUR, hour_of_ns, hour_start_ns

CHUNK_RECORDS = 65_536
"""Derived at a time: bounds memory while catching up."""
KEPT_STEPS = 8
KEPT_RECORDS = KEPT_STEPS * CHUNK_RECORDS
"""So much is kept for the other loads: more than comes while one of them writes. Each step holds all
books, so that there are few."""


@dataclass(frozen=True)
class Step:
    """A range of the journal, derived."""

    begin: Position
    doubts: Hashable
    """Of the state before it. A load that lost records which another had read has other books there."""
    hour: datetime | None
    """The hour that its first record begins; None within an hour."""
    rows: Rows
    state: State
    """The books after it."""
    end: Position


@dataclass(frozen=True)
class _Piece:
    """Records within one hour, decoded: all that can be done without the books before them."""

    hour: datetime | None
    decoded: Decoded
    end: Position


@dataclass(frozen=True)
class _Chunk:
    pieces: list[_Piece]
    newest_ns: int
    """Newest receive time up to its end."""


class Derivation:
    """Steps through one journal, shared by the loads of its stores, which are threads."""

    def __init__(self, folder: Path, shard: int = 0) -> None:
        self._folder = folder
        self.shard = shard
        """Whose journal it is."""
        self._lock = threading.Lock()
        self._kept: dict[tuple[int, Hashable], Step] = {}
        """By the number of the first record and the doubts before it, in the order of derivation."""
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._ahead: tuple[int, Future[_Chunk]] | None = None
        """The chunk that is being decoded ahead, by the number of its first record."""
        self._reached: dict[str, int] = {}
        """The record that each load has come to; -1: it has not begun."""

    def joins(self, load: str) -> None:
        """A load will follow this journal: keep for it what others derive."""
        self._reached[load] = -1

    def steps(self, load: str, start: Position, state: State, limit: Position) -> Iterator[Step]:
        """What is durable from `start` up to `limit`, where `state` is the books before `start`."""
        while start.n < limit.n:
            step = self._step(load, start, state, limit)
            yield step
            start, state = step.end, step.state

    def _step(self, load: str, start: Position, state: State, limit: Position) -> Step:
        with self._lock:  # whoever comes second waits for the first instead of deriving it again
            if (start.n, state.doubts) not in self._kept:
                limit = self._up_to_what_is_kept(start, limit)
                chunk = self._chunk(start, state.version, limit)
                self._look_ahead(chunk, limit)
                begin, after = start, state
                for piece in chunk.pieces:
                    doubts = after.doubts
                    rows, after = derive(piece.decoded, after, self.shard)
                    step = Step(begin, doubts, piece.hour, rows, after, piece.end)
                    self._kept[begin.n, doubts] = step
                    begin = piece.end
            step = self._kept[start.n, state.doubts]
            self._reached[load] = step.end.n
            self._forget()
            return step

    def _up_to_what_is_kept(self, start: Position, limit: Position) -> Position:
        """A load that was behind meets the other's steps again, instead of cutting across them for ever.

        Not those that begin an hour: that may be within a batch, and the journal is read by batches.
        """
        place = (start.segment, start.offset)
        begins = [step.begin for step in self._kept.values() if step.hour is None]
        return min((b for b in begins if (b.segment, b.offset) > place), default=limit)

    def _chunk(self, start: Position, newest_ns: int, limit: Position) -> _Chunk:
        """The next records, decoded: by now perhaps, if somebody looked ahead."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == start.n:
            return ahead[1].result()
        return _decode_chunk(self._folder, start, newest_ns, limit)

    def _look_ahead(self, chunk: _Chunk, limit: Position) -> None:
        """Decode the next chunk while this one is derived, where that much waits already."""
        end = chunk.pieces[-1].end
        if limit.n - end.n >= CHUNK_RECORDS:
            task = self._decoder.submit(_decode_chunk, self._folder, end, chunk.newest_ns, limit)
            self._ahead = (end.n, task)

    def _forget(self) -> None:
        """Let go of what every load has passed that is anywhere near, and of more than is worth it.

        A load that is farther behind, its store away perhaps, comes back to the steps of that time.
        """
        steps = sorted(self._kept.values(), key=lambda step: step.end.n)
        newest = steps[-1]
        worth = min(KEPT_RECORDS, KEPT_STEPS * (newest.end.n - newest.begin.n))
        near = [n for n in self._reached.values() if n < 0 or n >= newest.end.n - worth]
        needed_from = max(min(near, default=0), newest.end.n - KEPT_RECORDS)
        kept = [step for step in steps if step.end.n > needed_from]
        self._kept = {(step.begin.n, step.doubts): step for step in kept[-KEPT_STEPS:]}


def _decode_chunk(folder: Path, start: Position, newest_ns: int, limit: Position) -> _Chunk:
    stretch = next(chunks(journal.read(folder, start, limit)), None)
    if stretch is None:
        raise JournalError(
            f"The journal in {folder} no longer has record {start.n}, which was written to it: its"
            " segment was cut short by somebody else."
        )
    pieces = []
    for piece, hour in at_hours(stretch, newest_ns):
        it = decoded(piece)
        pieces.append(_Piece(hour, it, piece.end))
        if not it.lost:
            newest_ns = max(newest_ns, it.newest_recv_ns)
    return _Chunk(pieces, newest_ns)


def chunks(stretches: Iterator[Stretch]) -> Iterator[Stretch]:
    """Small blocks gathered into larger ones: a derivation costs the same for few rows."""
    gathered: list[Block] = []
    rows = 0
    for it in stretches:
        is_hole = isinstance(it, Hole)
        if not isinstance(it, Hole):
            gathered.append(it)
            rows += it.rows
        if gathered and (is_hole or rows >= CHUNK_RECORDS):
            yield joined(gathered)
            gathered, rows = [], 0
        if is_hole:
            yield it
    if gathered:
        yield joined(gathered)


def at_hours(stretch: Stretch, newest_ns: int) -> Iterator[tuple[Stretch, datetime | None]]:
    """A block cut before each first record of a later hour, with the hour that a piece begins.

    `newest_ns` is the newest receive time before it: a clock that steps back begins nothing. Nor does
    a hole: the record after it does.
    """
    if isinstance(stretch, Hole):
        yield stretch, None
        return
    block, begins = stretch, None
    while True:
        recv_ns = block.batch.column("recv_ns").to_numpy()
        if not newest_ns:
            newest_ns = int(recv_ns[0])
        beyond = np.flatnonzero(recv_ns >= hour_start_ns(hour_of_ns(newest_ns) + HOUR))
        if not len(beyond):
            yield block, begins
            return
        at = int(beyond[0])
        newest_ns = int(recv_ns[at])
        if at:
            before, block = block.cut(at)
            yield before, begins
        begins = hour_of_ns(newest_ns)

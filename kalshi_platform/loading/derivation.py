"""The journal, derived step by step, and each step once for all stores that follow it.

Every store has its own pace and its own place in the journal (`load.py`). Deriving is a pure function
of a range and the books before it, so what one load has derived serves the next one that comes to the
same place. A load that is far behind finds nothing kept and derives for itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from kalshi_platform.loading.decode import decode
from kalshi_platform.loading.derive import Rows, State, derive
from kalshi_platform.recording import journal
from kalshi_platform.recording.journal import Block, JournalError, Position, joined
from kalshi_platform.storage.archive import HOUR, hour_of_ns, hour_start_ns

CHUNK_RECORDS = 65_536
"""Derived at a time: bounds memory while catching up."""
KEPT_RECORDS = 4 * CHUNK_RECORDS
KEPT_STEPS = 64
"""So much is kept for the other loads: more than comes while one of them writes, tens of MB."""


@dataclass(frozen=True)
class Step:
    """A range of the journal, derived."""

    hour: datetime | None
    """The hour that its first record begins; None within an hour."""
    rows: Rows
    state: State
    """The books after it."""
    end: Position


class Derivation:
    """Steps through one journal, shared by the loads of its stores, which are threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._kept: dict[int, Step] = {}
        """By the number of the first record, in the order of derivation."""
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
            if start.n not in self._kept:
                block = next(chunks(journal.read(self._folder, start, limit)), None)
                if block is None:
                    raise JournalError(
                        f"The journal in {self._folder} no longer has record {start.n}, which was"
                        " written to it: its segment was cut short by somebody else."
                    )
                for piece, hour in at_hours(block, state.version):
                    rows, state = derive(decode([piece]), state)
                    self._kept[piece.first_n] = Step(hour, rows, state, piece.end)
            step = self._kept[start.n]
            self._reached[load] = step.end.n
            self._forget()
            return step

    def _forget(self) -> None:
        """Let go of what every load has passed, and of more than is worth keeping."""
        needed_from = min(self._reached.values())
        newest = next(reversed(self._kept.values())).end.n
        needed_from = max(needed_from, newest - KEPT_RECORDS)
        kept = [n for n, step in self._kept.items() if needed_from < step.end.n <= newest]
        self._kept = {n: self._kept[n] for n in kept[-KEPT_STEPS:]}


def chunks(blocks: Iterator[Block]) -> Iterator[Block]:
    """Small blocks gathered into larger ones: a derivation costs the same for few rows."""
    gathered: list[Block] = []
    rows = 0
    for block in blocks:
        gathered.append(block)
        rows += block.rows
        if rows >= CHUNK_RECORDS:
            yield joined(gathered)
            gathered, rows = [], 0
    if gathered:
        yield joined(gathered)


def at_hours(block: Block, newest_ns: int) -> Iterator[tuple[Block, datetime | None]]:
    """The block cut before each first record of a later hour, with the hour that a piece begins.

    `newest_ns` is the newest receive time before the block: a clock that steps back begins nothing.
    """
    begins = None
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

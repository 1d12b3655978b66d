"""Sets of sequence numbers or record numbers: a bit each, in blocks that are compressed when they rest.

Numbers come nearly without holes and nearly in order, so a block that is full takes some hundred bytes once
it rests. One odd number, however large, costs one block.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
_WORDS = 1 << 14
"""Of 64 bits, in a block: 128 KiB."""
_NUMBERS = _WORDS * 64
_ONE, _SIX, _LOW = np.uint64(1), np.uint64(6), np.uint64(63)
_NOTHING: U64 = np.zeros(_WORDS, np.uint64)


class Numbers:
    """A set of numbers from 0 to 2**64 - 1."""

    def __init__(self) -> None:
        self._open: dict[int, U64] = {}
        self._resting: dict[int, bytes] = {}
        self._touched: set[int] = set()

    def add(self, values: U64) -> None:
        """Add numbers, in any order."""
        words = values >> _SIX
        order = np.argsort(words, kind="stable")
        different, first = np.unique(words[order], return_index=True)
        if len(different):
            bits = _ONE << (values & _LOW)
            self.add_words(different, np.bitwise_or.reduceat(bits[order], first))

    def add_words(self, words: U64, bits: U64) -> None:
        """Add 64 w + b for each bit b that is set beside the word w. No word comes twice."""
        blocks = words // np.uint64(_WORDS)
        for block in np.unique(blocks):
            its = blocks == block
            self._opened(int(block))[(words[its] % np.uint64(_WORDS)).astype(np.int64)] |= bits[its]

    def update(self, other: Numbers) -> None:
        """Add all numbers of another set."""
        for block in other._blocks():
            self._opened(block)[:] |= other._words(block)

    def rest(self) -> None:
        """Compress the blocks that nothing was added to since the last time."""
        for block in self._open.keys() - self._touched:
            self._resting[block] = zlib.compress(self._open.pop(block).tobytes(), 1)
        self._touched.clear()

    def __len__(self) -> int:
        return sum(int(np.bitwise_count(self._words(block)).sum()) for block in self._blocks())

    def __bool__(self) -> bool:
        return bool(self._open or self._resting)

    @property
    def first(self) -> int:
        """The least number. The set must have one."""
        return next(self.runs())[0]

    @property
    def last(self) -> int:
        """The greatest number. The set must have one."""
        block = self._blocks()[-1]
        words = self._words(block)
        word = int(np.flatnonzero(words)[-1])
        return block * _NUMBERS + word * 64 + int(words[word]).bit_length() - 1

    def count(self, start: int, end: int) -> int:
        """How many numbers there are from `start` to before `end`."""
        return sum(
            int(np.bitwise_count(_within(self._words(block), block, start, end)).sum())
            for block in self._blocks()
            if block * _NUMBERS < end and (block + 1) * _NUMBERS > start
        )

    def without(self, other: Numbers) -> Numbers:
        """The numbers that the other set does not have."""
        found = Numbers()
        for block in self._blocks():
            left = self._words(block) & ~other._words(block)
            if left.any():
                found._open[block] = left
        return found

    def up_to(self, end: int) -> Numbers:
        """The numbers before `end`."""
        found = Numbers()
        for block in self._blocks():
            left = _within(self._words(block), block, 0, end)
            if left.any():
                found._open[block] = left
        return found

    def runs(self) -> Iterator[tuple[int, int]]:
        """Where numbers follow each other: (first, end), ascending."""
        begun: tuple[int, int] | None = None
        for block in self._blocks():
            bits = np.unpackbits(self._words(block).view(np.uint8), bitorder="little")
            edges = np.flatnonzero(np.diff(bits, prepend=0, append=0)).reshape(-1, 2)
            for start, end in (edges.astype(object) + block * _NUMBERS).tolist():
                if begun is not None and begun[1] == start:
                    begun = (begun[0], end)
                    continue
                if begun is not None:
                    yield begun
                begun = (start, end)
        if begun is not None:
            yield begun

    def _blocks(self) -> list[int]:
        return sorted(self._open.keys() | self._resting.keys())

    def _words(self, block: int) -> U64:
        """A block's words, to be read only."""
        if (words := self._open.get(block)) is not None:
            return words
        if (packed := self._resting.get(block)) is not None:
            return np.frombuffer(zlib.decompress(packed), np.uint64)
        return _NOTHING

    def _opened(self, block: int) -> U64:
        """A block's words, to be changed."""
        self._touched.add(block)
        if block not in self._open:
            self._open[block] = self._words(block).copy()
            self._resting.pop(block, None)
        return self._open[block]


def _within(words: U64, block: int, start: int, end: int) -> U64:
    """A block's words with the bits of the numbers from `start` to before `end` alone."""
    begin = block * _NUMBERS
    low, high = max(start - begin, 0), min(end - begin, _NUMBERS)
    if (low, high) == (0, _NUMBERS):
        return words
    kept = words.copy()
    if high <= low:
        kept[:] = 0
        return kept
    kept[: low // 64] = 0
    kept[low // 64] &= ~np.uint64(0) << np.uint64(low % 64)
    if high % 64:
        kept[high // 64] &= (_ONE << np.uint64(high % 64)) - _ONE
    kept[-(-high // 64) :] = 0
    return kept


def disjoint(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges (first, end), ascending, joined where they overlap or touch; empty ones are left out."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if end <= start:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def gaps_between(
    present: Iterable[tuple[int, int]], start: int, end: int
) -> Iterator[tuple[int, int]]:
    """What disjoint, ascending ranges leave out from `start` to before `end`."""
    at = start
    for first, after in present:
        if first >= end:
            break
        if first > at:
            yield at, first
        at = max(at, after)
    if at < end:
        yield at, end

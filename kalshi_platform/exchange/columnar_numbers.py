"""Sets of sequence numbers or record numbers: one bit each, in blocks that are compressed when idle.

Numbers arrive nearly gapless and nearly in order, so a full block compresses to about a hundred bytes. One
outlier, however large, costs one block. What the numbers mean belongs in `quality`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]
_WORDS = 1 << 14
"""64-bit words in a block: 128 KiB."""
_NUMBERS = _WORDS * 64
_ONE, _SIX, _LOW = np.uint64(1), np.uint64(6), np.uint64(63)
_NOTHING: U64 = np.zeros(_WORDS, np.uint64)


class NumberSet:
    """A set of numbers from 0 to 2**64 - 1."""

    def __init__(self) -> None:
        self._open: dict[int, U64] = {}
        self._compressed: dict[int, bytes] = {}
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
        """Add 64 w + b for each bit b set in the value that belongs to word w. Each word occurs once."""
        blocks = words // np.uint64(_WORDS)
        for block in np.unique(blocks):
            inside = blocks == block
            place = (words[inside] % np.uint64(_WORDS)).astype(np.int64)
            self._writable(int(block))[place] |= bits[inside]

    def update(self, other: NumberSet) -> None:
        """Add all numbers of another set."""
        for block in other._blocks():
            self._writable(block)[:] |= other._words(block)

    def compress_idle(self) -> None:
        """Compress the blocks to which nothing was added since the last call."""
        for block in self._open.keys() - self._touched:
            self._compressed[block] = zlib.compress(self._open.pop(block).tobytes(), 1)
        self._touched.clear()

    def __len__(self) -> int:
        return sum(int(np.bitwise_count(self._words(block)).sum()) for block in self._blocks())

    def __bool__(self) -> bool:
        return bool(self._open or self._compressed)

    @property
    def first(self) -> int:
        """The smallest number. The set must not be empty."""
        return next(self.runs())[0]

    @property
    def last(self) -> int:
        """The largest number. The set must not be empty."""
        block = self._blocks()[-1]
        words = self._words(block)
        word = int(np.flatnonzero(words)[-1])
        return block * _NUMBERS + word * 64 + int(words[word]).bit_length() - 1

    def count(self, start: int, end: int) -> int:
        """The count of numbers in [start, end)."""
        return sum(
            int(np.bitwise_count(_masked(self._words(block), block, start, end)).sum())
            for block in self._blocks()
            if block * _NUMBERS < end and (block + 1) * _NUMBERS > start
        )

    def difference(self, other: NumberSet) -> NumberSet:
        """The numbers that are not in the other set."""
        result = NumberSet()
        for block in self._blocks():
            left = self._words(block) & ~other._words(block)
            if left.any():
                result._open[block] = left
        return result

    def before(self, end: int) -> NumberSet:
        """The numbers below `end`."""
        result = NumberSet()
        for block in self._blocks():
            left = _masked(self._words(block), block, 0, end)
            if left.any():
                result._open[block] = left
        return result

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield the runs of consecutive numbers as (first, end), ascending."""
        run: tuple[int, int] | None = None
        for block in self._blocks():
            bits = np.unpackbits(self._words(block).view(np.uint8), bitorder="little")
            edges = np.flatnonzero(np.diff(bits, prepend=0, append=0)).reshape(-1, 2)
            for start, end in (edges.astype(object) + block * _NUMBERS).tolist():
                if run is not None and run[1] == start:
                    run = (run[0], end)
                    continue
                if run is not None:
                    yield run
                run = (start, end)
        if run is not None:
            yield run

    def _blocks(self) -> list[int]:
        return sorted(self._open.keys() | self._compressed.keys())

    def _words(self, block: int) -> U64:
        """A block's words, read-only."""
        if (words := self._open.get(block)) is not None:
            return words
        if (packed := self._compressed.get(block)) is not None:
            return np.frombuffer(zlib.decompress(packed), np.uint64)
        return _NOTHING

    def _writable(self, block: int) -> U64:
        """A block's words, writable."""
        self._touched.add(block)
        if block not in self._open:
            self._open[block] = self._words(block).copy()
            self._compressed.pop(block, None)
        return self._open[block]


def _masked(words: U64, block: int, start: int, end: int) -> U64:
    """A block's words with all bits cleared except those of numbers in [start, end)."""
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


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sort ranges (first, end) and merge those that overlap or touch; empty ranges are dropped."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def gaps_between(
    present: Iterable[tuple[int, int]], start: int, end: int
) -> Iterator[tuple[int, int]]:
    """Yield the parts of [start, end) that disjoint, ascending ranges do not cover."""
    at = start
    for first, after in present:
        if first >= end:
            break
        if first > at:
            yield at, first
        at = max(at, after)
    if at < end:
        yield at, end

"""Sizes that rest on a side of the book at sampled frames: near the best price, over the best levels, in all.

Sums that do not depend on the best price (all, levels, value) are computed from the starts and ends of runs
alone. For the others, a side's sizes form a matrix with descending prices in the rows and samples in the
columns, filled by running sums from each run's start and end. The samples of a market are cut into windows,
so that the matrix of a window needs only the levels that can count in it: down to the largest distance from
its lowest best price, or to enough levels that stand throughout. No loop per event.

Which frames are sampled is the caller's choice; the datasets' formulas are in their own modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kalshi_platform.analytics.best import Best
from kalshi_platform.analytics.columns import Array, Ints
from kalshi_platform.analytics.frames import (
    MAX_PRICE,
    NO,
    NONE,
    YES,
    Codes,
    Frames,
    Levels,
    differs,
)

CENT = 100
"""In 1e-4 dollars."""
CENTS = (1, 2, 5, 10)
"""Distances from the best price, in cents, within which sizes are summed."""
BEST_LEVELS = 5
"""How many of the best levels are summed."""
SIDES = {"bid": YES, "ask": NO}
"""Sides of the YES market: its bids are YES bids, its asks are NO bids."""
_CELLS = 1 << 19
"""Cells of a matrix: about what fits a processor's cache."""
_WINDOW = 512
"""Samples of a window: few, so that few levels count in it."""
_SPAN = 1 << 16
"""Greater than any price."""


@dataclass(frozen=True)
class Side:
    """One side of the book, one value per sample. Sizes in 1e-2 contracts."""

    price: Ints
    """The best bid of the side, NONE if it is empty."""
    within: dict[int, Ints]
    """By distance in cents: size from the best price down to that distance below it; 0: at the best price."""
    over: Ints
    """Size of the BEST_LEVELS best levels; of all levels if there are fewer."""
    all: Ints
    levels: Ints
    """Number of levels with a size."""
    value: Ints
    """Sum of size times price on the side's own scale, in 1e-6 dollars."""


@dataclass(frozen=True)
class Top:
    """The best levels of a side: one row per rank, the best first; one column per sample."""

    price: Ints
    """NONE: the side has fewer levels."""
    size: Ints
    """0: the side has fewer levels."""


def side_at(frames: Frames, levels: Levels, best: Best, side: int, at: Codes) -> Side:
    """Return the side (YES or NO) after each of the frames `at`, which ascend."""
    runs = _sampled(frames, levels, side, at)
    price = best.price[at]
    near = _near(runs, price, BEST_LEVELS, reach=max(CENTS) * CENT)
    n = len(at)
    found = Side(
        price,
        {0: best.size[at]} | {cents: np.zeros(n, dtype=np.int64) for cents in CENTS},
        np.zeros(n, dtype=np.int64),
        runs.summed(runs.size),
        runs.summed(1),
        runs.summed(runs.size * runs.price),
    )
    rows = {cents: near.rows_from(price - cents * CENT) for cents in CENTS}
    for block in near.blocks():
        where = slice(block.first, block.first + block.width)
        (last,) = block.ranks((BEST_LEVELS,))
        sums = block.sums()
        for cents in CENTS:
            found.within[cents][where] = block.cells(sums, rows[cents][where])
        found.over[where] = block.cells(sums, last)
    for values in found.within.values():
        values[price == NONE] = 0
    return found


def top_at(frames: Frames, levels: Levels, best: Best, side: int, at: Codes, *, count: int) -> Top:
    """Return the `count` best levels of the side (YES or NO) after each of the frames `at`, which ascend."""
    near = _near(_sampled(frames, levels, side, at), best.price[at], count, reach=0)
    found = Top(
        np.full((count, len(at)), NONE, dtype=np.int64),
        np.zeros((count, len(at)), dtype=np.int64),
    )
    for block in near.blocks():
        where = slice(block.first, block.first + block.width)
        highest = near.levels[near.window_at[where]]
        for rank, row in enumerate(block.ranks(range(1, count + 1))):
            exists = row < block.height
            found.size[rank, where] = np.where(exists, block.cells(block.sizes, row), 0)
            price = near.prices[np.where(exists, highest + row, 0)]
            found.price[rank, where] = np.where(exists, price, NONE)
    return found


def sample_ranges(levels: Levels, at: Codes) -> tuple[Ints, Ints]:
    """Return for each run the range of samples that it covers: indices into `at`, first and end (exclusive).

    The sampled frames `at` ascend, and may repeat.
    """
    if not len(levels.start):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    base, last = int(levels.start.min()), int(levels.end.max())
    earlier, inside = np.searchsorted(at, [base, last])
    # How many samples come before each frame from `base` to `last`.
    before = np.full(last - base + 1, earlier, dtype=np.int64)
    before[1:] += np.cumsum(np.bincount(at[earlier:inside] - base, minlength=last - base))
    return before[levels.start - base], before[levels.end - base]


@dataclass(frozen=True)
class _Runs:
    """The runs of one side that cover a sample, by market, price and start; start and end count samples."""

    price: Ints
    size: Ints
    start: Ints
    end: Ints
    market_at: Codes
    """The market of each sample."""

    def summed(self, amount: Array | int) -> Ints:
        """Return for each sample the sum of `amount` over the runs that cover it."""
        change = np.zeros(len(self.market_at) + 1, dtype=np.int64)
        np.add.at(change, self.start, amount)
        np.subtract.at(change, self.end, amount)
        total: Ints = np.cumsum(change[:-1])
        return total


def _sampled(frames: Frames, levels: Levels, side: int, at: Codes) -> _Runs:
    if len(at):
        levels = levels.between(frames.market[at[0]], frames.market[at[-1]])
    start, end = sample_ranges(levels, at)
    covering = np.flatnonzero((start < end) & (levels.ladder % 2 == side))
    return _Runs(
        levels.price[covering],
        levels.size[covering],
        start[covering],
        end[covering],
        frames.market[at],
    )


@dataclass(frozen=True)
class _Near:
    """Runs cut at the bounds of windows, of the levels that count there, by window, row and start."""

    size: Ints
    start: Ints
    end: Ints
    row: Ints
    """Row of the run's level: 0 for the highest of the window."""
    edges: Ints
    """The first sample of each window, and the end of the last."""
    window_at: Ints
    """The window of each sample."""
    bounds: Ints
    """The first run of each window, and the end of the last."""
    levels: Ints
    """The first level of each window, as an index into `keys` and `prices`, and the end of the last."""
    keys: Ints
    """Window and price of each level as one number, the highest price first."""
    prices: Ints

    def rows_from(self, lowest: Ints) -> Ints:
        """Return for each sample the row of the lowest level whose price is not below `lowest`."""
        if not len(lowest):
            return lowest
        key = self.window_at * _SPAN + (MAX_PRICE - np.maximum(lowest, 0))
        fresh = np.flatnonzero(differs(key))
        level = np.searchsorted(self.keys, key[fresh], side="right") - 1
        row = np.maximum(level - self.levels[self.window_at[fresh]], 0)
        found: Ints = np.repeat(row, np.diff(np.append(fresh, len(key))))
        return found

    def blocks(self) -> Iterator[_Block]:
        """Yield groups of windows, each as a matrix of at most about _CELLS sizes."""
        heights = np.maximum(np.diff(self.levels), 1)
        begun = 0
        while begun < len(heights):
            some = slice(begun, begun + _CELLS // _WINDOW)
            tallest = np.maximum.accumulate(heights[some])
            cells = tallest * (self.edges[1:][some] - self.edges[begun])
            count = max(int(np.count_nonzero(cells <= _CELLS)), 1)
            runs = slice(self.bounds[begun], self.bounds[begun + count])
            first, last = int(self.edges[begun]), int(self.edges[begun + count])
            if runs.start < runs.stop:
                height = int(tallest[count - 1])
                sizes = _matrix(self, runs, first, last - first, height)
                yield _Block(first, last - first, height, sizes)
            begun += count


def _near(runs: _Runs, best: Ints, count: int, *, reach: int) -> _Near:
    """Cut runs into windows; leave out levels that are never among the `count` best, nor within `reach` of the best."""
    n = len(runs.market_at)
    begins = np.flatnonzero(differs(runs.market_at)) if n else np.empty(0, dtype=np.int64)
    since = np.arange(n) - np.repeat(begins, np.diff(np.append(begins, n)))
    edges = np.append(np.flatnonzero(since % _WINDOW == 0), n)
    windows = len(edges) - 1
    window_at = np.repeat(np.arange(windows), np.diff(edges))

    first = window_at[runs.start]
    pieces = window_at[runs.end - 1] - first + 1
    run = np.repeat(np.arange(len(pieces)), pieces)
    window = np.arange(len(run)) + np.repeat(first - np.cumsum(pieces) + pieces, pieces)
    # Sorted as one number: window, descending price, and the run, which keeps the order of samples.
    bits = len(run).bit_length()
    key = window * _SPAN + (MAX_PRICE - runs.price[run])
    key = (key << bits) | np.arange(len(run))
    key.sort()
    order = key & ((1 << bits) - 1)
    key >>= bits
    run, window = run[order], key // _SPAN
    price = MAX_PRICE - key % _SPAN
    start = np.maximum(runs.start[run], edges[window])
    end = np.minimum(runs.end[run], edges[window + 1])

    stands = np.cumsum((start == edges[window]) & (end == edges[window + 1]))
    before = np.append(0, stands)[np.searchsorted(window, np.arange(windows))]
    enough = np.flatnonzero((stands - before[window] == count) & (np.diff(stands, prepend=0) > 0))
    floor = np.full(windows, -1, dtype=np.int64)
    floor[window[enough]] = price[enough]
    if n:
        lowest = np.minimum.reduceat(np.where(best == NONE, MAX_PRICE, best), edges[:-1])
        floor = np.minimum(floor, lowest - reach)
    keep = np.flatnonzero(price >= floor[window])
    key, window = key[keep], window[keep]
    fresh = differs(key)
    level = np.cumsum(fresh) - 1
    bounds = np.searchsorted(window, np.arange(windows + 1))
    levels = np.append(level, level[-1] + 1 if len(level) else 0)[bounds]
    return _Near(
        runs.size[run[keep]],
        start[keep],
        end[keep],
        level - levels[window],
        edges,
        window_at,
        bounds,
        levels,
        key[fresh],
        price[keep][fresh],
    )


@dataclass(frozen=True)
class _Block:
    """The sizes of all levels at consecutive samples."""

    first: int
    width: int
    height: int
    sizes: Array
    """Of shape (height, width + 1): the highest level first; the last column belongs to no sample."""

    def sums(self) -> Array:
        """Return the cumulative sizes: each level plus all above it."""
        sums = np.empty_like(self.sizes)
        sums[0] = self.sizes[0]
        for row in range(1, self.height):
            np.add(sums[row - 1], self.sizes[row], out=sums[row])
        return sums

    def ranks(self, wanted: Sequence[int]) -> list[Ints]:
        """Return for each rank and sample the row of the level with that rank; `height` if there is none."""
        columns = self.sizes.shape[1]
        present = np.zeros(columns, dtype=np.uint16)
        rows = [np.zeros(columns, dtype=np.uint16) for _ in wanted]
        flag = np.empty(columns, dtype=np.bool_)
        for row in range(self.height):
            np.greater(self.sizes[row], 0, out=flag)
            np.add(present, flag, out=present)
            for rank, into in zip(wanted, rows, strict=True):
                np.less(present, rank, out=flag)
                np.add(into, flag, out=into)
        return [into[: self.width].astype(np.int64) for into in rows]

    def cells(self, matrix: Array, row: Ints) -> Array:
        """Return for each sample the matrix's value in its row; rows beyond the last one count as the last."""
        at = np.minimum(row, self.height - 1) * matrix.shape[1]
        at += np.arange(self.width)
        values: Array = matrix.reshape(-1)[at]
        return values


def _matrix(near: _Near, runs: slice, first: int, width: int, height: int) -> Array:
    size = near.size[runs]
    # If a sum over all levels of the greatest size fits 32 bits, half the memory is moved.
    kind = np.int32 if height * int(size.max()) < 1 << 31 else np.int64
    size = size.astype(kind)
    changes = np.zeros((height, width + 1), dtype=kind)
    flat = changes.reshape(-1)
    row = near.row[runs] * (width + 1) - first
    # Runs of one level do not overlap, and a window ends where the next begins: neither line names a
    # cell twice.
    flat[row + near.start[runs]] += size
    flat[row + near.end[runs]] -= size
    for line in changes:
        np.cumsum(line, out=line)
    return changes

"""What rests on a side of the book at chosen frames: near the best, over the best levels, in all.

Such frames are called places here. What does not depend on where the best is (all, levels, value) is
summed up over the beginnings and ends of runs alone. For the rest, a side's sizes are laid out as a
matrix, prices downwards in the rows and places in the columns, some markets beside each other; it is
filled by running sums from each run's beginning and end, a block of bounded size at a time. No loop per
event.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kalshi_platform.analytics.best import Best
from kalshi_platform.analytics.columns import Array, Ints
from kalshi_platform.analytics.frames import NO, NONE, YES, Codes, Frames, Levels, differs

CENT = 100
"""In units of price."""
CENTS = (1, 2, 5, 10)
"""Distances from the best that are summed up to."""
BEST_LEVELS = 5
"""How many best levels are summed up."""
SIDES = {"bid": YES, "ask": NO}
"""Sides of the YES market: its bids are YES bids, its asks are NO bids."""
_CELLS = 1 << 20
"""Of a matrix: what fits a processor's cache, by and large."""
_SPAN = 1 << 17
"""More than any price, and than any price with a distance subtracted."""


@dataclass(frozen=True)
class Side:
    """One side of the book, one value per place. Sizes in 1e-2 contracts."""

    price: Ints
    """The best bid of the side, NONE where it is empty."""
    within: dict[int, Ints]
    """Size at the best and down to so many cents below it; 0 cents: at the best."""
    over: Ints
    """Size of the BEST_LEVELS best levels; of all where there are fewer."""
    all: Ints
    levels: Ints
    """How many levels have a size."""
    value: Ints
    """Sum of size times price on the side's own scale, in 1e-6 dollars."""


@dataclass(frozen=True)
class Top:
    """The best levels of a side, one row per rank, the best first, one column per place."""

    price: Ints
    """NONE: the side has fewer levels."""
    size: Ints
    """0: the side has fewer levels."""


def side_at(frames: Frames, levels: Levels, best: Best, side: int, at: Codes) -> Side:
    """The side (YES or NO) after each of the frames `at`, which ascend."""
    runs = _seen(frames, levels, side, at)
    n = len(at)
    price = best.price[at]
    found = Side(
        price,
        {0: best.size[at]} | {cents: np.zeros(n, dtype=np.int64) for cents in CENTS},
        np.zeros(n, dtype=np.int64),
        runs.summed(runs.size),
        runs.summed(1),
        runs.summed(runs.size * runs.price),
    )
    rows = {cents: runs.rows_from(price, cents * CENT) for cents in CENTS}
    for block in runs.blocks():
        where = slice(block.first, block.first + block.width)
        (last,) = block.ranks((BEST_LEVELS,))
        sums = block.sums()
        for cents in CENTS:
            found.within[cents][where] = block.cells(sums, rows[cents][where])
        found.over[where] = block.cells(sums, last)
    for values in found.within.values():
        values[price == NONE] = 0
    return found


def top_at(frames: Frames, levels: Levels, side: int, at: Codes, count: int) -> Top:
    """The `count` best levels of the side (YES or NO) after each of the frames `at`, which ascend."""
    runs = _seen(frames, levels, side, at)
    found = Top(
        np.full((count, len(at)), NONE, dtype=np.int64),
        np.zeros((count, len(at)), dtype=np.int64),
    )
    for block in runs.blocks():
        where = slice(block.first, block.first + block.width)
        for rank, row in enumerate(block.ranks(range(1, count + 1))):
            there = row < block.height
            size = block.cells(block.sizes, row)
            found.size[rank, where] = np.where(there, size, 0)
            level = runs.highest[runs.market_at[where]] - np.where(there, row, 0)
            found.price[rank, where] = np.where(there, runs.prices[level], NONE)
    return found


def seen_from(levels: Levels, at: Codes) -> tuple[Ints, Ints]:
    """From which of the frames `at` each run is seen: from the first, up to but without the second.

    `at` ascends, and the same frame may come more than once.
    """
    if not len(levels.start):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    base, last = int(levels.start.min()), int(levels.end.max())
    earlier, inside = np.searchsorted(at, [base, last])
    # How many places come before each frame from `base` to `last`.
    before = np.full(last - base + 1, earlier, dtype=np.int64)
    before[1:] += np.cumsum(np.bincount(at[earlier:inside] - base, minlength=last - base))
    return before[levels.start - base], before[levels.end - base]


@dataclass(frozen=True)
class _Runs:
    """The runs of one side that stand at some place, by market, price and place."""

    price: Ints
    size: Ints
    start: Ints
    end: Ints
    row: Ints
    """Of the run's level: 0 for its market's highest."""
    market_at: Codes
    """The market of each place."""
    prices: Ints
    """The prices of all levels, by market, ascending."""
    keys: Ints
    """Market and price of each of them, as one number."""
    highest: Ints
    """Each market's highest level, into `prices`."""
    heights: Ints
    """How many levels each market has."""
    bounds: Ints
    """Each market's first run."""

    def summed(self, amount: Array | int) -> Ints:
        """At each place the sum of what the runs that stand there count for."""
        change = np.zeros(len(self.market_at) + 1, dtype=np.int64)
        np.add.at(change, self.start, amount)
        np.subtract.at(change, self.end, amount)
        total: Ints = np.cumsum(change[:-1])
        return total

    def rows_from(self, best: Ints, distance: int) -> Ints:
        """Of each place the row of the lowest level that is at most `distance` below the best."""
        if not len(best):
            return best
        key = self.market_at.astype(np.int64) * _SPAN + np.maximum(best - distance, 0)
        fresh = differs(key)
        market = self.market_at[fresh]
        level = np.searchsorted(self.keys, key[fresh])
        row = np.maximum(self.highest[market] - level, 0)
        found: Ints = row[np.cumsum(fresh) - 1]
        return found

    def blocks(self) -> Iterator[_Block]:
        """The places in pieces, each as a matrix of at most _CELLS sizes."""
        height_at = np.maximum(self.heights[self.market_at], 1)
        first, n = 0, len(self.market_at)
        while first < n:
            height = np.maximum.accumulate(height_at[first : first + _CELLS // height_at[first]])
            fits = height * np.arange(1, len(height) + 1) <= _CELLS
            width = max(int(np.count_nonzero(fits)), 1)
            last = first + width
            markets = self.market_at[first], self.market_at[last - 1]
            these = np.arange(self.bounds[markets[0]], self.bounds[markets[1] + 1])
            these = these[(self.start[these] < last) & (self.end[these] > first)]
            if len(these):
                yield _Block(
                    first,
                    width,
                    int(height[width - 1]),
                    _matrix(self, these, first, width, int(height[width - 1])),
                )
            first = last


def _seen(frames: Frames, levels: Levels, side: int, at: Codes) -> _Runs:
    if len(at):
        levels = levels.between(frames.market[at[0]], frames.market[at[-1]])
    start, end = seen_from(levels, at)
    seen = np.flatnonzero((start < end) & (levels.ladder % 2 == side))
    market, price = levels.ladder[seen] // 2, levels.price[seen]
    key = market.astype(np.int64) * _SPAN + price
    fresh = differs(key)
    level = np.cumsum(fresh) - 1
    markets = int(frames.market.max(initial=-1)) + 1
    keys = key[fresh]
    edges = np.searchsorted(keys, np.arange(markets + 1) * _SPAN)
    highest = edges[1:] - 1
    return _Runs(
        price,
        levels.size[seen],
        start[seen],
        end[seen],
        highest[market] - level,
        frames.market[at],
        price[fresh],
        keys,
        highest,
        np.diff(edges),
        np.searchsorted(market, np.arange(markets + 1)),
    )


@dataclass(frozen=True)
class _Block:
    """The sizes of all levels at some places that follow each other."""

    first: int
    width: int
    height: int
    sizes: Array
    """Of shape (height, width + 1): the highest level first; the last column is of no place."""

    def sums(self) -> Array:
        """The size of each level and of all above it."""
        sums = np.empty_like(self.sizes)
        sums[0] = self.sizes[0]
        for row in range(1, self.height):
            np.add(sums[row - 1], self.sizes[row], out=sums[row])
        return sums

    def ranks(self, wanted: Sequence[int]) -> list[Ints]:
        """For each rank, at each place, the row of the level that has it; `height` where none has."""
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
        """At each place the matrix's value in the given row, in the last one for those beyond."""
        at = np.minimum(row, self.height - 1) * matrix.shape[1]
        at += np.arange(self.width)
        values: Array = matrix.reshape(-1)[at]
        return values


def _matrix(runs: _Runs, these: Ints, first: int, width: int, height: int) -> Array:
    size = runs.size[these]
    # A sum over all levels of the greatest size fits 32 bits: half the memory to be moved.
    kind = np.int32 if height * int(size.max()) < 1 << 31 else np.int64
    changes = np.zeros((height, width + 1), dtype=kind)
    flat = changes.reshape(-1)
    row = runs.row[these] * (width + 1)
    # Of one level runs do not overlap, and where one market's places end another's begin: no cell is
    # named twice in either line.
    flat[row + np.maximum(runs.start[these] - first, 0)] += size.astype(kind)
    flat[row + np.minimum(runs.end[these] - first, width)] -= size.astype(kind)
    for line in changes:
        np.cumsum(line, out=line)
    return changes

"""What rests on a side of the book at chosen frames: near the best, over the best levels, in all.

Such frames are called places here. What does not depend on where the best is (all, levels, value) is
summed up over the beginnings and ends of runs alone. For the rest, a side's sizes are laid out as a
matrix, prices downwards in the rows and places in the columns, many stretches of places beside each
other, and filled by running sums from each run's beginning and end. A stretch has rows for the levels
that can matter in it alone: down to the farthest that is asked for below its lowest best, or to enough
levels that stand all through it. No loop per event.
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
"""In units of price."""
CENTS = (1, 2, 5, 10)
"""Distances from the best that are summed up to."""
BEST_LEVELS = 5
"""How many best levels are summed up."""
SIDES = {"bid": YES, "ask": NO}
"""Sides of the YES market: its bids are YES bids, its asks are NO bids."""
_CELLS = 1 << 19
"""Of a matrix: what fits a processor's cache, by and large."""
_STRETCH = 512
"""Places of a stretch: short, so that few levels matter in it."""
_SPAN = 1 << 16
"""More than any price."""


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
    """The `count` best levels of the side (YES or NO) after each of the frames `at`, which ascend."""
    near = _near(_seen(frames, levels, side, at), best.price[at], count, reach=0)
    found = Top(
        np.full((count, len(at)), NONE, dtype=np.int64),
        np.zeros((count, len(at)), dtype=np.int64),
    )
    for block in near.blocks():
        where = slice(block.first, block.first + block.width)
        highest = near.levels[near.stretch_at[where]]
        for rank, row in enumerate(block.ranks(range(1, count + 1))):
            there = row < block.height
            found.size[rank, where] = np.where(there, block.cells(block.sizes, row), 0)
            price = near.prices[np.where(there, highest + row, 0)]
            found.price[rank, where] = np.where(there, price, NONE)
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
    market_at: Codes
    """The market of each place."""

    def summed(self, amount: Array | int) -> Ints:
        """At each place the sum of what the runs that stand there count for."""
        change = np.zeros(len(self.market_at) + 1, dtype=np.int64)
        np.add.at(change, self.start, amount)
        np.subtract.at(change, self.end, amount)
        total: Ints = np.cumsum(change[:-1])
        return total


def _seen(frames: Frames, levels: Levels, side: int, at: Codes) -> _Runs:
    if len(at):
        levels = levels.between(frames.market[at[0]], frames.market[at[-1]])
    start, end = seen_from(levels, at)
    seen = np.flatnonzero((start < end) & (levels.ladder % 2 == side))
    return _Runs(levels.price[seen], levels.size[seen], start[seen], end[seen], frames.market[at])


@dataclass(frozen=True)
class _Near:
    """Runs cut to stretches of places, of the levels that matter there, by stretch, row and place."""

    size: Ints
    start: Ints
    end: Ints
    row: Ints
    """Of the run's level: 0 for the stretch's highest."""
    edges: Ints
    """The first place of each stretch, and the end of all."""
    stretch_at: Ints
    """The stretch of each place."""
    bounds: Ints
    """The first run of each stretch, and the end of all."""
    levels: Ints
    """The first level of each stretch, into `keys` and `prices`, and the end of all."""
    keys: Ints
    """Stretch and price of each level as one number, the highest price first."""
    prices: Ints

    def rows_from(self, lowest: Ints) -> Ints:
        """Of each place the row of the lowest level whose price is not below `lowest`."""
        if not len(lowest):
            return lowest
        key = self.stretch_at * _SPAN + (MAX_PRICE - np.maximum(lowest, 0))
        fresh = np.flatnonzero(differs(key))
        level = np.searchsorted(self.keys, key[fresh], side="right") - 1
        row = np.maximum(level - self.levels[self.stretch_at[fresh]], 0)
        found: Ints = np.repeat(row, np.diff(np.append(fresh, len(key))))
        return found

    def blocks(self) -> Iterator[_Block]:
        """Some stretches at a time, as a matrix of about _CELLS sizes at most."""
        heights = np.maximum(np.diff(self.levels), 1)
        begun = 0
        while begun < len(heights):
            some = slice(begun, begun + _CELLS // _STRETCH)
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
    """Leave out the levels that are never among the `count` best, nor within `reach` of the best."""
    n = len(runs.market_at)
    begins = np.flatnonzero(differs(runs.market_at)) if n else np.empty(0, dtype=np.int64)
    since = np.arange(n) - np.repeat(begins, np.diff(np.append(begins, n)))
    edges = np.append(np.flatnonzero(since % _STRETCH == 0), n)
    stretches = len(edges) - 1
    stretch_at = np.repeat(np.arange(stretches), np.diff(edges))

    first = stretch_at[runs.start]
    pieces = stretch_at[runs.end - 1] - first + 1
    run = np.repeat(np.arange(len(pieces)), pieces)
    stretch = np.arange(len(run)) + np.repeat(first - np.cumsum(pieces) + pieces, pieces)
    # Sorted as one number: stretch, price downwards, and the run, which keeps the order of places.
    bits = len(run).bit_length()
    key = stretch * _SPAN + (MAX_PRICE - runs.price[run])
    key = (key << bits) | np.arange(len(run))
    key.sort()
    order = key & ((1 << bits) - 1)
    key >>= bits
    run, stretch = run[order], key // _SPAN
    price = MAX_PRICE - key % _SPAN
    start = np.maximum(runs.start[run], edges[stretch])
    end = np.minimum(runs.end[run], edges[stretch + 1])

    stands = np.cumsum((start == edges[stretch]) & (end == edges[stretch + 1]))
    before = np.append(0, stands)[np.searchsorted(stretch, np.arange(stretches))]
    enough = np.flatnonzero((stands - before[stretch] == count) & (np.diff(stands, prepend=0) > 0))
    floor = np.full(stretches, -1, dtype=np.int64)
    floor[stretch[enough]] = price[enough]
    if n:
        lowest = np.minimum.reduceat(np.where(best == NONE, MAX_PRICE, best), edges[:-1])
        floor = np.minimum(floor, lowest - reach)
    keep = np.flatnonzero(price >= floor[stretch])
    key, stretch = key[keep], stretch[keep]
    fresh = differs(key)
    level = np.cumsum(fresh) - 1
    bounds = np.searchsorted(stretch, np.arange(stretches + 1))
    levels = np.append(level, level[-1] + 1 if len(level) else 0)[bounds]
    return _Near(
        runs.size[run[keep]],
        start[keep],
        end[keep],
        level - levels[stretch],
        edges,
        stretch_at,
        bounds,
        levels,
        key[fresh],
        price[keep][fresh],
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


def _matrix(near: _Near, runs: slice, first: int, width: int, height: int) -> Array:
    size = near.size[runs]
    # A sum over all levels of the greatest size fits 32 bits: half the memory to be moved.
    kind = np.int32 if height * int(size.max()) < 1 << 31 else np.int64
    size = size.astype(kind)
    changes = np.zeros((height, width + 1), dtype=kind)
    flat = changes.reshape(-1)
    row = near.row[runs] * (width + 1) - first
    # Of one level runs do not overlap, and where one stretch ends another begins: no cell is named
    # twice in either line.
    flat[row + near.start[runs]] += size
    flat[row + near.end[runs]] -= size
    for line in changes:
        np.cumsum(line, out=line)
    return changes

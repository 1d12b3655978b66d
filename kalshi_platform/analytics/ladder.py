"""What rests on each side of the books at the end of every second: at, near and behind the best.

Per market and side the levels are laid out as a matrix, best price first, one column per second.
Sums from the best down then answer every "within n cents" and "over n levels" at once. The loop is
per market, side and block of seconds, never per event.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kalshi_platform.analytics.books import NO, NONE, YES, Best, Books
from kalshi_platform.analytics.columns import Ints

CENT = 100
"""In units of price."""
_BLOCK = 1 << 21
"""Cells of a matrix: 16 MiB."""


@dataclass(frozen=True)
class Side:
    """One side of the book, one value per second of `Books.seconds`. Sizes in 1e-2 contracts."""

    price: Ints
    """The best bid of the side, NONE where it is empty."""
    within: dict[int, Ints]
    """Size at the best and down to so many cents below it; 0 cents: at the best."""
    over: dict[int, Ints]
    """Size of so many best levels; of all where there are fewer."""
    all: Ints
    levels: Ints
    """How many levels have a size."""
    value: Ints
    """Sum of size times price on the side's own scale, in 1e-6 dollars."""


def ladder(books: Books, side: int, *, cents: tuple[int, ...], best: tuple[int, ...]) -> Side:
    """The side (YES or NO) of every market at the end of each second.

    `cents`: distances from the best to sum up to; `best`: numbers of levels to sum up.
    """
    n = len(books.seconds)
    of_side: Best = books.best_yes if side == YES else books.best_no
    found = Side(
        of_side.price[books.seconds],
        {c: np.zeros(n, dtype=np.int64) for c in cents},
        {b: np.zeros(n, dtype=np.int64) for b in best},
        *(np.zeros(n, dtype=np.int64) for _ in range(3)),
    )
    for block in _blocks(books, side):
        _sum_up(block, found)
    return found


@dataclass(frozen=True)
class _Block:
    """Runs of one market and side, as seen at the ends of some seconds."""

    first: int
    """The first second."""
    seconds: int
    prices: Ints
    """Ascending."""
    level: Ints
    """Of each run, into `prices`."""
    start: Ints
    end: Ints
    size: Ints


def _blocks(books: Books, side: int) -> Iterator[_Block]:
    levels, frames = books.levels, books.frames
    # How many seconds end before a frame: the first end of a second that a run from it is seen at.
    ends = np.zeros(len(frames) + 1, dtype=np.int64)
    ends[books.seconds.astype(np.int64) + 1] = 1
    ends = np.cumsum(ends)
    start, end = ends[levels.start], ends[levels.end]
    seen = np.flatnonzero((start < end) & (levels.ladder % 2 == side))
    start, end = start[seen], end[seen]
    price, size, market = levels.price[seen], levels.size[seen], levels.ladder[seen] // 2
    bounds = np.searchsorted(market, np.arange(len(books.tickers) + 1))
    of_market = np.searchsorted(frames.market[books.seconds], np.arange(len(books.tickers) + 1))
    for number in np.flatnonzero(bounds[:-1] < bounds[1:]):
        runs = slice(bounds[number], bounds[number + 1])
        fresh = np.append(True, price[runs][1:] != price[runs][:-1])
        prices, level = price[runs][fresh], np.cumsum(fresh) - 1
        width = max(_BLOCK // len(prices), 1)
        for first in range(of_market[number], of_market[number + 1], width):
            last = min(first + width, of_market[number + 1])
            inside = (start[runs] < last) & (end[runs] > first)
            yield _Block(
                first,
                last - first,
                prices,
                level[inside],
                np.maximum(start[runs][inside] - first, 0),
                np.minimum(end[runs][inside], last) - first,
                size[runs][inside],
            )


def _sum_up(block: _Block, found: Side) -> None:
    count = len(block.prices)
    where = slice(block.first, block.first + block.seconds)
    # Of one level runs do not overlap, so no cell is named twice in either line.
    changes = np.zeros((count, block.seconds + 1), dtype=np.int64)
    row = count - 1 - block.level
    changes[row, block.start] += block.size
    changes[row, block.end] -= block.size
    sizes = np.cumsum(changes, axis=1)[:, :-1]
    prices = block.prices[::-1]
    found.value[where] = (sizes * prices[:, None]).sum(axis=0)
    present = np.cumsum(sizes > 0, axis=0, dtype=np.int32)
    summed = np.cumsum(sizes, axis=0)
    found.all[where] = summed[-1]
    found.levels[where] = present[-1]
    column = np.arange(block.seconds)
    best = found.price[where]
    for cents, into in found.within.items():
        rows = np.searchsorted(-prices, -(best - cents * CENT), side="right") - 1
        into[where] = np.where(best == NONE, 0, summed[np.minimum(rows, count - 1), column])
    for levels, into in found.over.items():
        rows = (present < levels).sum(axis=0)
        into[where] = summed[np.minimum(rows, count - 1), column]


SIDES = {"bid": YES, "ask": NO}
"""Sides of the YES market: its bids are YES bids, its asks are NO bids."""

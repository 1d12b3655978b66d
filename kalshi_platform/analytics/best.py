"""The best price of a side after every frame.

It is the highest level that stands then. Each level stands for runs of frames; "the highest run over
every frame" is found for all frames at once by covering each run with two blocks of a power of two and
pushing maxima down from the long blocks to the short ones (a sparse table, backwards): O(n log n) in
whole-array steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kalshi_platform.analytics.columns import Ints
from kalshi_platform.analytics.frames import NONE, Codes, Levels


@dataclass(frozen=True)
class Best:
    """The best bid of a side after every frame."""

    price: Ints
    """NONE: the side is empty."""
    size: Ints
    """0: the side is empty."""


def best(levels: Levels, side: int, n: int) -> Best:
    """The best bid of the side (YES or NO) after each of the hour's `n` frames."""
    runs = np.flatnonzero(levels.ladder % 2 == side).astype(np.int32)
    if not len(runs):
        return Best(np.full(n, NONE, np.int64), np.zeros(n, np.int64))
    # Within a market and side runs are numbered by price: the greatest number is the best price.
    top = _topmost(levels.start[runs], levels.end[runs], runs, n)
    there = top >= 0
    return Best(np.where(there, levels.price[top], NONE), np.where(there, levels.size[top], 0))


def _topmost(start: Codes, end: Codes, number: Codes, n: int) -> Codes:
    """For each of `n` places the greatest number of the runs over it, NONE where there is none.

    Runs come by ascending number; run i covers the places start[i] to end[i] - 1.
    """
    table = np.full(n, NONE, dtype=np.int32)
    if not len(start):
        return table
    exponent = (np.frexp((end - start).astype(np.float64))[1] - 1).astype(np.int8)
    order = np.argsort(exponent, kind="stable")
    edges = np.searchsorted(exponent[order], np.arange(int(exponent.max()) + 2))
    for k in range(int(exponent.max()), -1, -1):
        # table[i] speaks for the block of 2**(k + 1) places from i; now for its two halves
        half = 1 << k
        if half < n:
            halved = table.copy()
            np.maximum(table[half:], table[:-half], out=halved[half:])
            table = halved
        these = order[edges[k] : edges[k + 1]]
        for place in (start[these], end[these] - half):
            # of places that come twice the last is kept, which is the greatest
            table[place] = np.maximum(table[place], number[these])
    return table

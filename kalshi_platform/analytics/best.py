"""Compute the best price of a side after every frame: the highest level that stands then.

Each level stands over runs of frames. The highest run over each frame is found for all frames at once: each
run is covered by two blocks whose length is a power of two, and maxima are pushed down from long blocks to
short ones (a sparse table, used in reverse). O(n log n), in whole-array steps. Only the best level is
computed here; the levels below it are `ladder`'s.
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
    """NONE if the side is empty."""
    size: Ints
    """0 if the side is empty."""


def best(levels: Levels, side: int, n: int) -> Best:
    """Return the best bid of the side (YES or NO) after each of the hour's `n` frames."""
    runs = np.flatnonzero(levels.ladder % 2 == side).astype(np.int32)
    if not len(runs):
        return Best(np.full(n, NONE, np.int64), np.zeros(n, np.int64))
    # Within a market and side runs are numbered by ascending price: the greatest number has the best price.
    top = _topmost(levels.start[runs], levels.end[runs], runs, n)
    exists = top >= 0
    return Best(np.where(exists, levels.price[top], NONE), np.where(exists, levels.size[top], 0))


def _topmost(start: Codes, end: Codes, number: Codes, n: int) -> Codes:
    """Return for each of `n` frames the greatest number of the runs over it, NONE if there is none.

    Runs are ordered by number; run i covers the frames start[i] to end[i] - 1.
    """
    table = np.full(n, NONE, dtype=np.int32)
    if not len(start):
        return table
    exponent = (np.frexp((end - start).astype(np.float64))[1] - 1).astype(np.int8)
    order = np.argsort(exponent, kind="stable")
    edges = np.searchsorted(exponent[order], np.arange(int(exponent.max()) + 2))
    for k in range(int(exponent.max()), -1, -1):
        # table[i] holds for the block of 2**(k + 1) frames from i; divide it into its two halves
        half = 1 << k
        if half < n:
            halved = table.copy()
            np.maximum(table[half:], table[:-half], out=halved[half:])
            table = halved
        chosen = order[edges[k] : edges[k + 1]]
        for first in (start[chosen], end[chosen] - half):
            # an index that occurs twice keeps the last value, which is the greatest
            table[first] = np.maximum(table[first], number[chosen])
    return table

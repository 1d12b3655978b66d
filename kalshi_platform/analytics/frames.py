"""The words that an hour's books are written in: frames, and the runs over which levels stand.

Units in this package: prices 1e-4 dollars on the bid scale of the side, sizes 1e-2 contracts, times
µs since the epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from kalshi_platform.analytics.columns import Array, Bools, Ints

Codes = npt.NDArray[np.int32]
YES, NO, NO_LEVEL = 0, 1, -1
CHECKPOINT, SNAPSHOT, DELTA, DOUBT = 0, 1, 2, 3
CAUSES = ["checkpoint", "snapshot", "delta", "doubt"]
NO_TIME = np.iinfo(np.int64).min
NONE = -1
SECOND_US = 1_000_000
MAX_PRICE = (1 << 16) - 1
"""Prices are sorted as 16-bit digits."""


@dataclass(frozen=True)
class Frames:
    """One value per frame, markets by ticker and frames within a market in their order.

    A frame is a delta, a whole snapshot, the checkpoint that begins the hour, or a doubt: the moment
    from which a book can no longer be believed. Doubts change no level.
    """

    market: Codes
    book: Codes
    seq: Ints
    """0 for doubts."""
    record: Ints
    """The journal record of the frame, of the checkpoint's beginning, or of what told the doubt; NONE where
    the rows have none."""
    ts: Ints
    """Exchange time, NO_TIME where there is none."""
    ingest_us: Ints
    clock_us: Ints
    """Receive time that never steps back within a market, even where the machine's clock did."""
    cause: npt.NDArray[np.int8]
    verified: Bools
    """The book can be believed after this frame: no gap since its snapshot."""

    def __len__(self) -> int:
        return len(self.market)

    def bounds(self, markets: int) -> Ints:
        """The first frame of each of so many markets, and the first after them all."""
        return np.searchsorted(self.market, np.arange(markets + 1))

    @cached_property
    def shown_us(self) -> Ints:
        """Receive time that never steps back, counted from a market's last frame: the state at an instant is
        that after the last frame at or before it, the last time that the clock showed the instant.

        Without records it is `clock_us`: the state when the clock first showed it.
        """
        if not (self.record != NONE).any():
            return self.clock_us
        return -running_max(-self.ingest_us[::-1], -self.market[::-1])[::-1]

    @cached_property
    def begins(self) -> Bools:
        """Whether the frame is its market's first."""
        return differs(self.market)


@dataclass(frozen=True)
class Levels:
    """Runs of frames over which a level stood with one size, by market, side, price and frame."""

    ladder: Codes
    """Market and side: 2 * market + side."""
    price: Ints
    size: Ints
    start: Codes
    """The first frame of the run."""
    end: Codes
    """The first frame after it."""

    def between(self, first: int, last: int) -> Levels:
        """The runs of the markets from `first` to `last`."""
        edges = np.searchsorted(self.ladder, [2 * first, 2 * last + 2])
        these = slice(int(edges[0]), int(edges[1]))
        return Levels(*(getattr(self, name)[these] for name in self.__dataclass_fields__))


def running_max(values: Ints, group: Array) -> Ints:
    """The greatest value so far, anew in each group; groups ascend."""
    if not ((values[1:] < values[:-1]) & (group[1:] == group[:-1])).any():
        return values
    base = int(values.min())
    lift = group.astype(np.int64)
    lift = (lift - lift[0]) * (int(values.max()) - base + 1)
    highest: Ints = np.maximum.accumulate(values - base + lift) - lift + base
    return highest


def differs(values: Array) -> Bools:
    """Whether each value differs from the one before; the first does."""
    found = np.ones(len(values), dtype=np.bool_)
    np.not_equal(values[1:], values[:-1], out=found[1:])
    return found

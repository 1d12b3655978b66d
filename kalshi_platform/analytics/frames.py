"""Data types of an hour's books: frames, and the runs of frames over which levels stood with one size.

`books` builds them from rows; what is computed from them is in the other modules.

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
CHECKPOINT, SNAPSHOT, DELTA, STALE = 0, 1, 2, 3
CAUSES = ["checkpoint", "snapshot", "delta", "doubt"]
NONE = -1
SECOND_US = 1_000_000
MAX_PRICE = (1 << 16) - 1
"""Prices are sorted as 16-bit digits."""


@dataclass(frozen=True)
class Frames:
    """One value per frame, markets by ticker and frames within a market in their order.

    A frame is a delta, a whole snapshot, the checkpoint that begins the hour, or a stale event (recorded as
    cause `doubt`): from it on the book is stale. Stale events change no level.
    """

    market: Codes
    book: Codes
    seq: Ints
    """0 for stale events."""
    record: Ints
    """The journal record of the frame, of the start of the checkpoint, or of the stale event; NONE if the
    rows have none."""
    ts: Ints
    """Exchange time, NO_TIME if there is none."""
    ingest_us: Ints
    clock_us: Ints
    """Receive time that never decreases within a market, even if the machine's clock was set back."""
    cause: npt.NDArray[np.int8]
    verified: Bools
    """Whether the book is synced after this frame: no gap since its snapshot."""

    def __len__(self) -> int:
        return len(self.market)

    def bounds(self, markets: int) -> Ints:
        """Return the first frame of each of `markets` markets, and the end of the last."""
        return np.searchsorted(self.market, np.arange(markets + 1))

    @cached_property
    def shown_us(self) -> Ints:
        """Receive time that never decreases, computed backwards from a market's last frame.

        If the clock showed an instant twice, the state at that instant is the one after the last frame of the
        second time. Without records it is `clock_us`, which gives the state of the first time.
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
    """Runs of frames over which a level stood with one size, ordered by market, side, price and frame."""

    ladder: Codes
    """Market and side: 2 * market + side."""
    price: Ints
    size: Ints
    start: Codes
    """The first frame of the run."""
    end: Codes
    """The first frame after it."""

    def between(self, first: int, last: int) -> Levels:
        """Return the runs of the markets from `first` to `last`."""
        edges = np.searchsorted(self.ladder, [2 * first, 2 * last + 2])
        these = slice(int(edges[0]), int(edges[1]))
        return Levels(*(getattr(self, name)[these] for name in self.__dataclass_fields__))


def running_max(values: Ints, group: Array) -> Ints:
    """Return the running maximum within each group; groups ascend."""
    if not ((values[1:] < values[:-1]) & (group[1:] == group[:-1])).any():
        return values
    base = int(values.min())
    lift = group.astype(np.int64)
    lift = (lift - lift[0]) * (int(values.max()) - base + 1)
    highest: Ints = np.maximum.accumulate(values - base + lift) - lift + base
    return highest


def differs(values: Array) -> Bools:
    """Whether each value differs from the one before; true for the first."""
    found = np.ones(len(values), dtype=np.bool_)
    np.not_equal(values[1:], values[:-1], out=found[1:])
    return found

"""Count the frames of an hour by market and by minute, for plots and metadata. The datasets are elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from kalshi_platform.analytics.books import Books
from kalshi_platform.analytics.columns import Ints
from kalshi_platform.analytics.frames import SECOND_US, STALE

BUSIEST = 3
"""Number of markets that are drawn in a plot."""
_MINUTES = 60


@dataclass
class Activity:
    """Frames of an hour, by market and by minute of receive time. Stale events do not count."""

    hour: datetime
    gaps: int = 0
    by_market: dict[str, int] = field(default_factory=dict)
    by_minute: Ints = field(default_factory=lambda: np.zeros(_MINUTES, dtype=np.int64))

    def add(self, books: Books) -> None:
        """Add the frames of a group of the hour's markets."""
        self.gaps = books.gaps
        happened = books.frames.cause != STALE
        counts = np.bincount(books.frames.market[happened], minlength=len(books.tickers))
        for market in np.flatnonzero(counts).tolist():
            self.by_market[books.tickers[market]] = int(counts[market])
        start_us = int(self.hour.timestamp()) * SECOND_US
        minute = (books.frames.clock_us[happened] - start_us) // (_MINUTES * SECOND_US)
        self.by_minute += np.bincount(np.clip(minute, 0, _MINUTES - 1), minlength=_MINUTES)

    def busiest(self, count: int = BUSIEST) -> list[str]:
        """Return the tickers of the `count` markets with the most frames, the busiest first."""
        return sorted(self.by_market, key=lambda t: (-self.by_market[t], t))[:count]

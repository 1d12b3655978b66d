"""How much happened in an hour: what is told of it beside the datasets, kept small."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from kalshi_platform.analytics.books import Books
from kalshi_platform.analytics.columns import Ints
from kalshi_platform.analytics.frames import DOUBT, SECOND_US

BUSIEST = 3
"""Markets that get a line of their own in a plot."""
_MINUTES = 60


@dataclass
class Activity:
    """Frames of an hour, by market and by minute of receive time. Doubts are no frames."""

    hour: datetime
    gaps: int = 0
    by_market: dict[str, int] = field(default_factory=dict)
    by_minute: Ints = field(default_factory=lambda: np.zeros(_MINUTES, dtype=np.int64))

    def add(self, of: Books) -> None:
        """Count the frames of some of the hour's markets."""
        self.gaps = of.gaps
        happened = of.frames.cause != DOUBT
        counts = np.bincount(of.frames.market[happened], minlength=len(of.tickers))
        for market in np.flatnonzero(counts).tolist():
            self.by_market[of.tickers[market]] = int(counts[market])
        start_us = int(self.hour.timestamp()) * SECOND_US
        minute = (of.frames.clock_us[happened] - start_us) // (_MINUTES * SECOND_US)
        self.by_minute += np.bincount(np.clip(minute, 0, _MINUTES - 1), minlength=_MINUTES)

    def busiest(self, count: int = BUSIEST) -> list[str]:
        """The markets with the most frames, the busiest first."""
        return sorted(self.by_market, key=lambda t: (-self.by_market[t], t))[:count]

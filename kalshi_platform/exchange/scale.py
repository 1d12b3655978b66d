"""Detects from snapshots which scale no bids are quoted on: their own, or the YES scale (`use_yes_price`).

A no bid at p is a yes ask at 1 - p. Read on the wrong scale, the lowest no bid becomes the best one and
the book is crossed; on the right scale it is not, because the exchange matches crossing orders. So nearly
every snapshot with two sides reveals its scale, whatever the subscription requested. Acting on a change
belongs in `session`.
"""

from __future__ import annotations

from kalshi_platform.exchange.book import Extent
from kalshi_platform.exchange.numbers import ONE_DOLLAR

VOTES = 3
"""Consecutive snapshots on the other scale, with none on the current one, that change the scale."""


class Scale:
    """The scale of one connection, updated by its snapshots."""

    def __init__(self, yes_price: bool) -> None:
        self.yes_price = yes_price
        """Whether no bids are quoted at 1 - p."""
        self._contrary = 0
        """Snapshots on the other scale since the last one on the current scale."""

    def observe(self, yes: Extent, no: Extent, markets: int) -> bool:
        """Update by a snapshot's extents; return True where the scale has just changed.

        With fewer than `VOTES` followed `markets`, one snapshot per market is enough.
        """
        observed = scale_of(yes, no)
        if observed is None:
            return False
        self._contrary = self._contrary + 1 if observed != self.yes_price else 0
        if self._contrary < min(VOTES, max(markets, 1)):
            return False
        self.yes_price, self._contrary = observed, 0
        return True


def scale_of(yes: Extent, no: Extent) -> bool | None:
    """True where a book can only be on the YES scale, False where only on its own; None if undecided."""
    if yes is None or no is None:
        return None
    crossed_on_own = yes[1] + no[1] >= ONE_DOLLAR
    crossed_on_yes = yes[1] >= no[0]
    return None if crossed_on_own == crossed_on_yes else crossed_on_own

"""Which scale the exchange quotes no bids on: their own, or the YES scale (`use_yes_price`), seen from data.

A no bid at p is a yes ask at 1 - p. Read on the wrong scale, the lowest no bid becomes the best one, and
the book is crossed; read on the right one it is not, for the exchange matches what crosses. So nearly
every snapshot with two sides tells its scale, whatever was asked for.
"""

from __future__ import annotations

from kalshi_platform.exchange.book import Extent
from kalshi_platform.exchange.numbers import ONE_DOLLAR

VOTES = 3
"""Snapshots that must tell the other scale, none telling this one, before it is believed."""


class Scale:
    """The scale of one connection, kept current by its snapshots."""

    def __init__(self, yes_price: bool) -> None:
        self.yes_price = yes_price
        """Whether no bids are quoted at 1 - p."""
        self._others = 0
        """Snapshots that told the other scale since the last one that told this one."""

    def is_other(self, yes: Extent, no: Extent, markets: int) -> bool:
        """Take a snapshot's extents in; True where the scale has just been found to be the other one.

        Of fewer than `VOTES` followed `markets`, one snapshot for each is enough.
        """
        told = told_scale(yes, no)
        if told is None:
            return False
        self._others = self._others + 1 if told != self.yes_price else 0
        if self._others < min(VOTES, max(markets, 1)):
            return False
        self.yes_price, self._others = told, 0
        return True


def told_scale(yes: Extent, no: Extent) -> bool | None:
    """Whether a book is on the YES scale: it is crossed on the other one. None where that is not so."""
    if yes is None or no is None:
        return None
    crossed_on_own = yes[1] + no[1] >= ONE_DOLLAR
    crossed_on_yes = yes[1] >= no[0]
    return None if crossed_on_own == crossed_on_yes else crossed_on_own

"""The kinds of inventory breaks: the one list of them, which docs/inventory.md explains.

A kind is a cause and a remedy. Which break is of which kind is decided in explain.py.
"""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum

SETTLES_WITHIN = timedelta(seconds=30)
"""What was only late has arrived within this. A difference that lasts longer is no timing."""


class Kind(StrEnum):
    """Why the engine's belief and the exchange's books differ."""

    TIMING = "timing"
    """A fill or an answer was late, and has come since, or is at most 30 seconds old."""
    MISSING_FILL = "missing fill"
    """The exchange filled what was never recorded, or what was recorded and is not in pos_filled."""
    INVENTED_FILL = "invented fill"
    """pos_filled has what the exchange never filled, or has a fill twice."""
    UNKNOWN_ORDER = "unknown order"
    """Exposure, or an answer, of an order that no action accounts for; or an order not counted."""
    PHANTOM_ORDER = "phantom order"
    """An order that has ended and is still counted."""
    ROLLED = "rolled inventory"
    """inv_before is the estimate of the decision before."""
    WRONG_CONVENTION = "wrong convention"
    """The right amount with the other sign."""
    SETTLED = "settled"
    """The market is settled, and the engine still holds the position."""
    CLOCK = "clock"
    """The engine's clock is off by a steady amount."""
    STALE_SNAPSHOT = "stale snapshot"
    """The exchange's report is too old to judge by."""
    UNEXPLAINED = "unexplained"
    """None of these."""

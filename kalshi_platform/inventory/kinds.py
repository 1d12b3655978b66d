"""The kinds of inventory breaks, which docs/inventory.md explains.

A kind stands for a cause and a remedy. explain.py decides which kind a break has.
"""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum

SETTLES_WITHIN = timedelta(seconds=30)
"""Late rows arrive within this time; a difference that lasts longer is not timing."""


class Kind(StrEnum):
    """Why the engine's position and the exchange's differ."""

    TIMING = "timing"
    """A fill or an answer was late, and has arrived since, or is at most 30 seconds old."""
    MISSING_FILL = "missing fill"
    """A fill of the exchange was never recorded, or is recorded and not in pos_filled."""
    INVENTED_FILL = "invented fill"
    """pos_filled contains a fill that the exchange does not have, or a fill twice."""
    UNKNOWN_ORDER = "unknown order"
    """Exposure, or an answer, of an order that no action accounts for; or an order not counted."""
    PHANTOM_ORDER = "phantom order"
    """An order that has ended and is still counted."""
    ROLLED = "rolled inventory"
    """inv_before is the estimate of the decision before."""
    WRONG_CONVENTION = "wrong convention"
    """The right amount with the wrong sign."""
    SETTLED = "settled"
    """The market is settled, and the engine still holds the position."""
    CLOCK = "clock"
    """The engine's clock is off by a steady amount."""
    STALE_SNAPSHOT = "stale snapshot"
    """The exchange's newest position is too old for a comparison."""
    UNEXPLAINED = "unexplained"
    """None of these."""

"""The number of examples of costly properties."""

from __future__ import annotations

from hypothesis import settings

SUITE_SHARE = 4
"""The suite draws one in this many examples."""
LEAST = 10
"""The fewest examples that the suite draws."""


def examples(number: int) -> settings:
    """Hypothesis settings of a property that costs seconds: `number` examples under `make explore`.

    The suite, and so CI, draws a quarter of them, at least LEAST, and the same ones each time (conftest.py). Run
    `make explore` after changing code that such a property tests, and before a release; it prints how to reproduce
    a failing example.
    """
    exploring = settings.get_current_profile_name() == "explore"
    few = min(number, max(LEAST, -(-number // SUITE_SHARE)))
    return settings(max_examples=number if exploring else few, deadline=None)

"""How many examples a costly property gets."""

from __future__ import annotations

from hypothesis import settings

SUITE_SHARE = 4
"""One of so many examples is drawn in the suite."""
LEAST = 10
"""And no fewer than these."""


def examples(number: int) -> settings:
    """Settings of a property that costs seconds: `number` examples where new ones are looked for (`make explore`).

    The suite, and so CI, draws a quarter of them, LEAST or more, the same ones each time (conftest.py): it finds what
    a change breaks of these, and nothing else. Who changes what such a property tests, and who makes a release, runs
    `make explore`, which prints how to draw a failing example again.
    """
    exploring = settings.get_current_profile_name() == "explore"
    few = min(number, max(LEAST, -(-number // SUITE_SHARE)))
    return settings(max_examples=number if exploring else few, deadline=None)

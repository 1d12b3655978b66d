"""How many examples a costly property gets."""

from __future__ import annotations

from hypothesis import settings

SUITE_SHARE = 4
"""One of so many examples is drawn in the suite."""


def examples(number: int) -> settings:
    """Settings of a property that costs seconds: `number` examples where new ones are looked for (`make explore`).

    The suite draws a quarter of them, the same ones each time (conftest.py).
    """
    exploring = settings.get_current_profile_name() == "explore"
    return settings(max_examples=number if exploring else -(-number // SUITE_SHARE), deadline=None)

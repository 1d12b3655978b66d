"""The wait before another attempt."""

from __future__ import annotations

DOUBLINGS = 32
"""Beyond them every wait is the longest, and a float does not overflow."""


def wait_s(failures: int, first_s: float, longest_s: float) -> float:
    """Seconds after so many failures in a row: `first_s`, then twice as long each time, at most `longest_s`."""
    return min(first_s * 2.0 ** min(failures - 1, DOUBLINGS), longest_s)

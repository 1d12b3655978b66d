"""The wire's form, which the exchange changed between August and October 2026.

What differs is in frames.py; this module only names the two forms.
"""

from __future__ import annotations

from enum import StrEnum


class Wire(StrEnum):
    """A form of the wire, by the month since which it has been sent."""

    AUGUST = "2026-08"
    """No `clock` and no `sending_ts_ms`; the `ts` of a delta has microseconds, zeros trimmed."""
    OCTOBER = "2026-10"
    """Order-book messages have `clock`, every frame `sending_ts_ms`; `ts` has milliseconds."""


CURRENT = Wire.OCTOBER

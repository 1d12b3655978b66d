"""The kinds of journal records."""

from __future__ import annotations

from enum import IntEnum


class Kind(IntEnum):
    """What a journal record holds. The numbers are in the journal: never renumber."""

    NOTE = 0
    """Not a frame: something that happened to the recording, as JSON."""
    DELTA = 1
    SNAPSHOT = 2
    CONTROL = 3
    """Any other readable frame: acks, errors, other channels, types not known yet."""
    MALFORMED = 4
    """Bytes that are no JSON object with a type."""
    TRADE = 5
    """A trade of the trade channel. Without a `seq`: one that the stream had missed, as REST told it.
    Journals from before trades were recorded have none."""

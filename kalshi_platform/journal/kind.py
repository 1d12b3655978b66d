"""The kinds of journal records. Decoding a record belongs in `exchange`."""

from __future__ import annotations

from enum import IntEnum


class Kind(IntEnum):
    """What a journal record holds. The numbers are stored in the journal: never renumber."""

    NOTE = 0
    """Not a frame but an event of the recorder itself, as JSON."""
    DELTA = 1
    SNAPSHOT = 2
    CONTROL = 3
    """Any other readable frame: acknowledgements, errors, other channels, unknown types."""
    MALFORMED = 4
    """Bytes that are not a JSON object with a `type`."""
    TRADE = 5
    """A trade of the trade channel. One without a `seq` was missed on the stream and backfilled from REST.
    Journals from before trades were recorded have none."""

"""What a replay yields for each thing that happened: a tuple of integers, which is cheap to make."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import NamedTuple

from kalshi_platform.exchange.numbers import ONE_DOLLAR
from kalshi_platform.reading.arguments import PRICE_UNIT, QTY_UNIT, instant_of


class EventKind(StrEnum):
    """What an event is."""

    OPENING = "opening"
    """The book at the span's start; later: where a book begins again from an hour's checkpoint."""
    SNAPSHOT = "snapshot"
    """The exchange sent the whole book."""
    DELTA = "delta"
    """One level changed."""
    STALE = "stale"
    """Something was lost: from here on the book is not the exchange's, until the next snapshot."""
    TRADE = "trade"
    """A trade, which changes no book: the exchange sends its deltas apart from it."""


class Event(NamedTuple):
    """One event of a replay, in integers; its properties give exact decimals and datetimes."""

    kind: EventKind
    ticker: str
    shard: int | None
    record: int | None
    """With `shard` the place in the journal; None for an opening, and in recordings of old versions."""
    known_us: int
    """Receive time in µs since the epoch, never decreasing: the event may be used from then on."""
    ts_us: int | None
    """Exchange time in µs since the epoch; None where the frame has none."""
    side: str
    """Whose bid ladder changed, "yes" or "no"; of a trade what the taker bought; else empty."""
    price_units: int
    """1e-4 dollars, on the scale of `side`."""
    qty_units: int
    """1e-2 contracts: of a delta the signed change, of a trade its size."""
    size_units: int
    """1e-2 contracts: the level's size after a delta."""
    trade_id: str

    @property
    def known_at(self) -> datetime:
        """Receive time, never decreasing: the event may be used from then on."""
        return instant_of(self.known_us)

    @property
    def ts(self) -> datetime | None:
        """Exchange time; None where the frame has none."""
        return None if self.ts_us is None else instant_of(self.ts_us)

    @property
    def price(self) -> Decimal:
        """Dollars, on the scale of `side`."""
        return self.price_units * PRICE_UNIT

    @property
    def yes_price(self) -> Decimal:
        """Dollars for a YES contract."""
        return (
            self.price_units if self.side == "yes" else ONE_DOLLAR - self.price_units
        ) * PRICE_UNIT

    @property
    def qty(self) -> Decimal:
        """Contracts: of a delta the signed change, of a trade its size."""
        return self.qty_units * QTY_UNIT

    @property
    def size(self) -> Decimal:
        """Contracts: the level's size after a delta."""
        return self.size_units * QTY_UNIT

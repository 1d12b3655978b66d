"""A market's replay as changes of one book in YES terms, which is what backtesting engines take."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import NamedTuple

from kalshi_platform.exchange.numbers import ONE_DOLLAR
from kalshi_platform.reading.archive import Archive
from kalshi_platform.reading.events import Event, EventKind
from kalshi_platform.reading.market_book import MarketBook


class Level(NamedTuple):
    """A level of one side of the YES book."""

    bid: bool
    price: int
    """1e-4 dollars for a YES contract."""
    size: int
    """1e-2 contracts; 0: the level is gone."""


class BookChange(NamedTuple):
    """One event of a market."""

    exchange_us: int
    """See `exchange_time`."""
    known_us: int
    """Receive time, never decreasing."""
    event: Event
    whole: bool
    """Whether `levels` are the whole book: what it was before is cleared. Without levels the book is empty or stale."""
    levels: tuple[Level, ...]
    """None for a trade, which changes no book."""


EXCHANGE_TIME_RULE = (
    "The exchange's time of a delta or trade, at most its receive time; of a snapshot, an opening or a stale event, which"
    " have none, the receive time. It never decreases: an event that the exchange sent before a snapshot and that came"
    " after it gets the snapshot's time."
)
"""The rule of `BookChange.exchange_us`, for the sidecar."""


def changes(archive: Archive, ticker: str, start: datetime, end: datetime) -> Iterator[BookChange]:
    """Yield the changes of a market's book, and its trades.

    From a stale event to the next snapshot the book is cleared, and deltas are left out.
    """
    exchange_us = 0
    for event, book in archive.replay(ticker, start, end, allow_gaps=True):
        ts_us = event.known_us if event.ts_us is None else event.ts_us
        exchange_us = max(exchange_us, min(ts_us, event.known_us))
        if event.kind is EventKind.DELTA:
            if not book.verified:
                continue
            bid = event.side == "yes"
            price = event.price_units if bid else ONE_DOLLAR - event.price_units
            levels: tuple[Level, ...] = (Level(bid, price, max(event.size_units, 0)),)
            whole = False
        elif event.kind is EventKind.TRADE:
            levels, whole = (), False
        else:
            levels, whole = whole_book(book) if book.verified else (), True
        yield BookChange(exchange_us, event.known_us, event, whole, levels)


def whole_book(book: MarketBook) -> tuple[Level, ...]:
    """Return all levels of a book, bids and then asks, the best first."""
    bids = sorted(book.yes.levels.items(), reverse=True)
    asks = sorted(book.no.levels.items(), reverse=True)
    return (
        *(Level(bid=True, price=price, size=size) for price, size in bids),
        *(Level(bid=False, price=ONE_DOLLAR - price, size=size) for price, size in asks),
    )


class YesBook:
    """The levels that an engine has after the changes so far."""

    def __init__(self) -> None:
        self.sizes: dict[tuple[bool, int], int] = {}

    def apply(self, change: BookChange) -> None:
        """Apply a change."""
        if change.whole:
            self.sizes.clear()
        for bid, price, size in change.levels:
            if size:
                self.sizes[bid, price] = size
            else:
                self.sizes.pop((bid, price), None)

    def levels(self) -> list[Level]:
        """List all levels: bids and then asks, the best first."""
        made = [Level(bid, price, size) for (bid, price), size in self.sizes.items()]
        return sorted(
            made, key=lambda level: (not level.bid, (-1 if level.bid else 1) * level.price)
        )

"""A market's book during a replay or at an instant, in YES terms, in exact numbers or in floats.

The levels are kept as integers by price, the best of each side with them; everything else is computed when it is asked
for. A NO bid at p is the YES ask at 1 - p.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Final

import polars as pl

from kalshi_platform.exchange.numbers import ONE_DOLLAR
from kalshi_platform.reading.arguments import PRICE_UNIT, QTY_UNIT
from kalshi_platform.reading.events import Event

Number = Decimal | float
NONE: Final = -1


class Side:
    """One ladder of bids, on its own scale: 1e-4 dollars to 1e-2 contracts."""

    __slots__ = ("best", "levels")

    def __init__(self) -> None:
        self.levels: dict[int, int] = {}
        self.best = NONE

    def replace(self, levels: dict[int, int]) -> None:
        """Replace all levels."""
        self.levels = levels
        self.best = max(levels, default=NONE)

    def change(self, price: int, size: int) -> None:
        """Set a level to a size."""
        if size > 0:
            self.levels[price] = size
            self.best = max(self.best, price)
        elif self.levels.pop(price, None) is not None and price == self.best:
            self.best = max(self.levels, default=NONE)


class MarketBook:
    """A market's book as it was known at an instant; a replay changes it with every event.

    Prices are dollars for a YES contract, sizes contracts: exact decimals, or floats where the reader was asked for
    `exact=False`. Bids are the YES bids, asks the NO bids at 1 - their price.
    """

    __slots__ = ("_exact", "event", "no", "ticker", "verified", "yes")

    def __init__(self, ticker: str, *, exact: bool = True) -> None:
        """Make an empty book, which is not verified.

        Args:
            ticker: The market.
            exact: Whether numbers are decimals; else they are floats.
        """
        self.ticker = ticker
        self.yes, self.no = Side(), Side()
        self.verified = False
        self.event: Event | None = None
        self._exact = exact

    def price_of(self, units: int) -> Number:
        """Convert a price.

        Args:
            units: 1e-4 dollars.

        Returns:
            Dollars, of this book's kind of number.
        """
        return units * PRICE_UNIT if self._exact else units / 1e4

    def size_of(self, units: int) -> Number:
        """Convert a size.

        Args:
            units: 1e-2 contracts.

        Returns:
            Contracts, of this book's kind of number.
        """
        return units * QTY_UNIT if self._exact else units / 1e2

    @property
    def bid(self) -> tuple[Number, Number] | None:
        """The best YES bid and its size; None where there is none."""
        price = self.yes.best
        if price == NONE:
            return None
        return self.price_of(price), self.size_of(self.yes.levels[price])

    @property
    def ask(self) -> tuple[Number, Number] | None:
        """The best YES ask and its size; None where there is none."""
        price = self.no.best
        if price == NONE:
            return None
        return self.price_of(ONE_DOLLAR - price), self.size_of(self.no.levels[price])

    @property
    def mid(self) -> Number | None:
        """Halfway between best bid and best ask; None where a side is empty."""
        if NONE in (self.yes.best, self.no.best):
            return None
        return self.price_of(self.yes.best + ONE_DOLLAR - self.no.best) / 2

    @property
    def spread(self) -> Number | None:
        """Best ask less best bid; None where a side is empty."""
        if NONE in (self.yes.best, self.no.best):
            return None
        return self.price_of(ONE_DOLLAR - self.no.best - self.yes.best)

    @property
    def imbalance(self) -> float | None:
        """(bid size - ask size) / (bid size + ask size) at the best prices; None where both sides are empty."""
        bid = self.yes.levels.get(self.yes.best, 0)
        ask = self.no.levels.get(self.no.best, 0)
        return (bid - ask) / (bid + ask) if bid + ask else None

    def bids(self, count: int | None = None) -> list[tuple[Number, Number]]:
        """List the best YES bids.

        Args:
            count: How many; None: all.

        Returns:
            Price and size of each level, the highest price first.
        """
        levels = self.yes.levels
        return [
            (self.price_of(p), self.size_of(levels[p]))
            for p in sorted(levels, reverse=True)[:count]
        ]

    def asks(self, count: int | None = None) -> list[tuple[Number, Number]]:
        """List the best YES asks.

        Args:
            count: How many; None: all.

        Returns:
            Price and size of each level, the lowest price first.
        """
        levels = self.no.levels
        return [
            (self.price_of(ONE_DOLLAR - p), self.size_of(levels[p]))
            for p in sorted(levels, reverse=True)[:count]
        ]

    def to_polars(self) -> pl.DataFrame:
        """Make a table of all levels.

        Returns:
            Columns `side` (bid or ask), `price` and `size`; bids first, the best first.
        """
        rows = [("bid", *level) for level in self.bids()] + [
            ("ask", *level) for level in self.asks()
        ]
        price, size = (pl.Decimal(9, 4), pl.Decimal(18, 2)) if self._exact else (pl.Float64,) * 2
        return pl.DataFrame(rows, {"side": pl.String, "price": price, "size": size}, orient="row")

    def __repr__(self) -> str:
        state = "" if self.verified else ", not verified"
        return f"<MarketBook {self.ticker} bid {self.bid} ask {self.ask} {state}>"

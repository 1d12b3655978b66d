"""The order book of one market: two ladders of bids, kept exactly in integers.

Levels are indexes into the market's grid, sizes integers of 1e-2 contracts. There are no asks: a
NO bid at p is a YES ask at 1 - p. What the book looks like on the wire is in frames.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kalshi_platform.exchange.numbers import contracts, dollars
from kalshi_platform.simulator.grid import Grid

YES, NO = 0, 1
SIDES = ("yes", "no")


@dataclass(frozen=True)
class BookView:
    """A book at one instant: price (1e-4 dollars) to size (1e-2 contracts), prices ascending."""

    market_id: str
    yes: Mapping[int, int]
    no: Mapping[int, int]

    def texts(self) -> dict[str, list[tuple[str, str]]]:
        """Both ladders as texts of the wire, prices ascending."""
        return {
            name: [(dollars(price), contracts(size)) for price, size in ladder.items()]
            for name, ladder in (("yes", self.yes), ("no", self.no))
        }


class Book:
    """Two ladders of resting size. Never holds a negative size."""

    __slots__ = ("best", "grid", "sizes")

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.sizes: tuple[list[int], list[int]] = ([0] * grid.levels, [0] * grid.levels)
        self.best = [-1, -1]
        """The highest level with size on each side, -1 if the side is empty."""

    def change(self, side: int, level: int, qty: int) -> None:
        """Add `qty` (signed, 1e-2 contracts) to a level. Raises ValueError below zero."""
        ladder = self.sizes[side]
        size = ladder[level] + qty
        if size < 0:
            raise ValueError(
                f"{SIDES[side]} {self.grid.texts[level]} would hold {size}, less than nothing"
            )
        ladder[level] = size
        if size and level > self.best[side]:
            self.best[side] = level
        elif not size and level == self.best[side]:
            while level >= 0 and not ladder[level]:
                level -= 1
            self.best[side] = level

    def below(self, side: int, level: int) -> int:
        """Return the highest level with size at or below `level`, -1 if there is none."""
        ladder = self.sizes[side]
        while level >= 0 and not ladder[level]:
            level -= 1
        return level

    def room(self, side: int) -> int:
        """Return the highest level that a bid on `side` can have without matching the other side."""
        return self.grid.levels - 2 - max(self.best[1 - side], 0)

    @property
    def crossed(self) -> bool:
        """Whether the best bids of both sides sum to a dollar or more."""
        yes, no = self.best
        return yes >= 0 and no >= 0 and yes + no >= self.grid.levels - 1

    def ladder(self, side: int) -> dict[int, int]:
        """Price to size of one side, best price last."""
        return {
            price: size
            for price, size in zip(self.grid.prices, self.sizes[side], strict=True)
            if size
        }

    def clear(self) -> None:
        """Remove every order."""
        for side in (YES, NO):
            self.sizes[side][:] = [0] * self.grid.levels
        self.best[:] = [-1, -1]

"""Simulate the traders of one book, step by step, from a seed.

A latent fair probability walks at random in log-odds. Makers place and cancel near it, the size
thinning out with the distance from the best; takers sweep one or more levels, at random or where
the walk has left a bid on the wrong side of fair. The n-th step of a seeded flow on a given book
is always the same; when it happens is the exchange's business.
"""

from __future__ import annotations

import functools
import math
import random
from bisect import bisect_left
from dataclasses import dataclass

from kalshi_platform.exchange.numbers import ONE_DOLLAR
from kalshi_platform.simulator.book import NO, YES, Book
from kalshi_platform.simulator.grid import Grid

RESTING_ORDERS = 120
"""Long-run number of single orders of a market, besides its opening levels."""
TAKER_SHARE = 0.06
CORRECTION_SHARE = 0.6
"""Probability that a step removes a bid that it finds on the wrong side of the fair value."""


@dataclass(frozen=True, slots=True)
class Print:
    """One match: `qty` at the YES price of `yes_level`, by a taker of that side."""

    taker: int
    yes_level: int
    qty: int


Change = tuple[int, int, int]
"""side, level, signed quantity"""


@functools.cache
def _fractions(grid: Grid) -> tuple[float, ...]:
    """The grid's prices in dollars, for the latent value alone."""
    return tuple(price / ONE_DOLLAR for price in grid.prices)


class OrderFlow:
    """The traders of one market: the latent fair value, and the orders that may be canceled."""

    __slots__ = ("_anchor", "_depth", "_grid", "_orders", "_random", "_scaled", "_volatility", "_x")

    def __init__(self, grid: Grid, seed: str) -> None:
        self._grid = grid
        self._scaled = _fractions(grid)
        self._random = random.Random(seed)  # noqa: S311  a model of a market, not a secret
        self._anchor = self._random.gauss(0.0, 1.3)
        self._x = self._anchor
        self._volatility = self._random.uniform(0.0005, 0.006)
        self._depth = 1.5 + 2.5 * math.sqrt(grid.levels / 99)
        self._orders: list[Change] = []

    @property
    def fair(self) -> float:
        """The latent probability of YES."""
        return 1.0 / (1.0 + math.exp(-self._x))

    def opening(self, book: Book, sides: tuple[int, ...] = (YES, NO)) -> list[Change]:
        """Fill an empty book: a wall far out, thin in the middle, thick near the best."""
        rng, done = self._random, []
        reach = max(12, self._grid.levels // 3)
        for side in sides:
            top = self._top(side)
            for level in range(top, -1, -1):
                distance = top - level
                if distance > reach and rng.random() > 40 / self._grid.levels:
                    continue
                if distance and rng.random() < 0.12:
                    continue
                qty = self._size() * (1 + int(6 * math.exp(-distance / self._depth)))
                if self._scaled[level] < 0.02:
                    qty += rng.randrange(20_000_00, 1_400_000_00)  # the wall at the edge
                book.change(side, level, qty)
                done.append((side, level, qty))
        return done

    def step(self, book: Book) -> tuple[list[Change], list[Print]]:
        """Apply one event to the book; return its changes (at least one) and its matches."""
        rng = self._random
        self._x += self._volatility * (rng.random() - 0.5) * 3.5 + 0.0005 * (self._anchor - self._x)
        for side in (YES, NO):
            top = self._top(side)
            if book.best[side] > top and rng.random() < CORRECTION_SHARE:
                return self._sweep(book, side, down_to=top + 1)
        dice = rng.random()
        if dice < TAKER_SHARE:
            side = YES if rng.random() < 0.5 else NO
            if book.best[side] >= 0:
                return self._sweep(book, side, down_to=None)
        if dice < 0.5 + 0.45 * (len(self._orders) / RESTING_ORDERS - 0.9):
            cancelled = self._cancel(book)
            if cancelled is not None:
                return [cancelled], []
        return [self._place(book)], []

    def _top(self, side: int) -> int:
        """Return the best level that a maker quotes: the last one below fair, on the side's own scale."""
        below = bisect_left(self._scaled, self.fair)
        top = below - 1 if side == YES else self._grid.levels - below - 1
        return min(max(top, 0), self._grid.levels - 2)

    def _size(self) -> int:
        """Draw a heavy-tailed order size; two in three are whole contracts."""
        qty = int(400 / (self._random.random() + 0.002)) + 1
        return qty if self._random.random() < 0.35 else (qty // 100 + 1) * 100

    def _place(self, book: Book) -> Change:
        rng = self._random
        side = YES if rng.random() < 0.5 else NO
        level = min(self._top(side), book.room(side))
        level -= int(-math.log(1.0 - rng.random()) * self._depth)
        order = (side, max(level, 0), self._size())
        book.change(*order)
        self._orders.append(order)
        return order

    def _cancel(self, book: Book) -> Change | None:
        """Cancel one of the orders, or what the takers have left of it."""
        orders = self._orders
        while orders:
            at = int(self._random.random() * len(orders))
            side, level, qty = orders[at]
            orders[at] = orders[-1]
            orders.pop()
            left = min(qty, book.sizes[side][level])
            if left:
                book.change(side, level, -left)
                return side, level, -left
        return None

    def _sweep(
        self, book: Book, side: int, down_to: int | None
    ) -> tuple[list[Change], list[Print]]:
        """Match a marketable order with the bids of `side`, best first."""
        rng = self._random
        levels = 64 if down_to is not None else 1 + int(-math.log(1.0 - rng.random()) * 0.8)
        changes: list[Change] = []
        prints: list[Print] = []
        taker = 1 - side
        while levels and (level := book.best[side]) >= (down_to or 0):
            levels -= 1
            size = book.sizes[side][level]
            partial = down_to is None and not levels and rng.random() < 0.7
            qty = min(size, self._size()) if partial else size
            book.change(side, level, -qty)
            changes.append((side, level, -qty))
            yes_level = level if side == YES else self._grid.levels - 1 - level
            prints.append(Print(taker, yes_level, qty))
        return changes, prints

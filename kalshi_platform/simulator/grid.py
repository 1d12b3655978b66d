"""Price grids: which prices an order may have, by `price_level_structure`.

Prices are integers of 1e-4 dollars (exchange/numbers.py). Every grid mirrors itself around 50
cents, so the level `i` of one side faces the level `n - 1 - i` of the other: 1 - price(i).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from kalshi_platform.exchange.numbers import ONE_DOLLAR, dollars


@dataclass(frozen=True)
class PriceRange:
    """From `start` to `end` in steps of `step`, all in 1e-4 dollars."""

    start: int
    end: int
    step: int


@dataclass(frozen=True)
class Grid:
    """The prices of one structure, ascending, with their texts on the wire."""

    name: str
    ranges: tuple[PriceRange, ...]
    prices: tuple[int, ...]
    texts: tuple[str, ...]

    @property
    def levels(self) -> int:
        """Number of prices."""
        return len(self.prices)


_RANGES: dict[str, tuple[PriceRange, ...]] = {
    "linear_cent": (PriceRange(0, 10_000, 100),),
    "deci_cent": (PriceRange(0, 10_000, 10),),
    "tapered_deci_cent": (
        PriceRange(0, 1_000, 10),
        PriceRange(1_000, 9_000, 100),
        PriceRange(9_000, 10_000, 10),
    ),
    "center_deci_edge_centi_cent": (
        PriceRange(0, 100, 1),
        PriceRange(100, 9_900, 10),
        PriceRange(9_900, 10_000, 1),
    ),
}

STRUCTURES = tuple(_RANGES)
"""Names of the grids that the simulator uses."""


@functools.cache
def grid(structure: str) -> Grid:
    """Return the grid of that name. Raises KeyError for an unknown one."""
    return _made(structure, _RANGES[structure])


@functools.cache
def covering(prices: frozenset[int]) -> Grid:
    """Return the coarsest grid that has all of these prices; a nameless one of 1e-4 dollars if none has."""
    for structure in STRUCTURES:
        if prices <= set(grid(structure).prices):
            return grid(structure)
    return _made("", (PriceRange(0, ONE_DOLLAR, 1),))


def _made(structure: str, ranges: tuple[PriceRange, ...]) -> Grid:
    prices = {
        price for band in ranges for price in range(band.start, band.end + band.step, band.step)
    }
    ascending = tuple(sorted(prices - {0, ONE_DOLLAR}))
    return Grid(structure, ranges, ascending, tuple(dollars(price) for price in ascending))

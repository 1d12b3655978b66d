"""One market's order book: two bid ladders in exact integers. No I/O.

Prices are 1e-4 dollars on the side's own bid scale, sizes 1e-2 contracts. A yes ask at 1 - p is a
no bid at p: there is one book, seen from two sides. It is the reference for the tests of columnar
decoding, and the book of `watch` and of the live-book check. Books over many frames in columns belong in
`loading` and `analytics`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from itertools import chain

from kalshi_platform.exchange.frames import Delta, Snapshot
from kalshi_platform.exchange.numbers import (
    MOST_QTY,
    ONE_DOLLAR,
    cents_units,
    contracts,
    dollars,
    price_units,
    qty_units,
)

SIDES = ("yes", "no")
Ladder = dict[int, int]
"""Price to size; only levels with a size."""
_PLAIN_LEVELS = re.compile(r"(?:(?:0\.[0-9]{4}|1\.0000)\|[0-9]{1,9}\.[0-9]{2}\|)*")


class BookError(ValueError):
    """A frame that cannot be applied: a frame was missed or repeated, or a value is out of range."""


class SyncState(Enum):
    """Whether a book is known to be the exchange's."""

    WAITING = "waiting"
    """Subscribed; its first snapshot has not been received."""
    SYNCED = "synced"
    STALE = "stale"
    """A frame was missed since the snapshot; a new snapshot is requested."""


State = SyncState
"""Its former name, which engines import."""


@dataclass(frozen=True)
class LevelChange:
    """A delta in exact units."""

    side: str
    price: int
    qty: int


def delta_change(delta: Delta, *, use_yes_price: bool = False) -> LevelChange:
    """Read the change that a delta frame names, in either wire form.

    Args:
        delta: The body of the frame.
        use_yes_price: Whether the connection quotes no bids on the YES scale.

    Returns:
        Side, price in 1e-4 dollars on the side's own bid scale, and signed quantity in 1e-2 contracts.

    Raises:
        BookError: A value cannot be read; the sentence names it.
    """
    if delta.side not in SIDES:
        raise BookError(f"side {delta.side!r} is neither yes nor no")
    try:
        if delta.price_dollars is not None:
            price = price_units(delta.price_dollars)
        elif delta.price is not None:
            price = cents_units(delta.price)
        else:
            raise BookError("the delta has no price")
        if delta.delta_fp is not None:
            qty = qty_units(delta.delta_fp)
        elif delta.delta is not None:
            qty = cents_units(delta.delta)
        else:
            raise BookError("the delta has no quantity")
    except ValueError as error:
        raise BookError(str(error)) from None
    check_qty(qty)
    return LevelChange(delta.side, own_scale(delta.side, price, use_yes_price=use_yes_price), qty)


def snapshot_ladder(snapshot: Snapshot, side: str, *, use_yes_price: bool = False) -> Ladder:
    """Read one side of a snapshot, in any wire form; prefers fixed point, then dollars, then cents.

    Args:
        snapshot: The body of the frame.
        side: "yes" or "no".
        use_yes_price: Whether the connection quotes no bids on the YES scale.

    Returns:
        Price in 1e-4 dollars on the side's own bid scale to size in 1e-2 contracts; levels without a size are left out.

    Raises:
        BookError: A value cannot be read, a size is negative, or a price comes twice.
    """
    ladder: Ladder = {}
    try:
        levels = [
            (own_scale(side, price, use_yes_price=use_yes_price), size)
            for price, size in _levels(snapshot, side)
        ]
    except ValueError as error:
        raise BookError(str(error)) from None
    for price, size in levels:
        if price in ladder:
            raise BookError(f"the snapshot lists {side} {dollars(price)} twice")
        if size < 0:
            raise BookError(f"the snapshot has a negative size at {side} {dollars(price)}")
        check_qty(size)
        ladder[price] = size
    return {price: size for price, size in ladder.items() if size}


Extent = tuple[int, int] | None
"""The lowest and the highest price of a side; None where it is empty."""


def snapshot_extents(snapshot: Snapshot) -> tuple[Extent, Extent]:
    """Find the extents of both sides of a snapshot, as quoted.

    Accepts exactly the snapshots that the loader accepts. Builds no ladders where all levels have the current wire
    form: 0.1 ms for 180 levels.

    Args:
        snapshot: The body of the frame.

    Returns:
        The extents of the yes and of the no side, in 1e-4 dollars.

    Raises:
        BookError: The snapshot names no market, or a value cannot be read.
    """
    if not snapshot.market_ticker:
        raise BookError("the snapshot names no market")
    return (
        _extent(snapshot, "yes", snapshot.yes_dollars_fp),
        _extent(snapshot, "no", snapshot.no_dollars_fp),
    )


def _extent(snapshot: Snapshot, side: str, levels: list[tuple[str, str]] | None) -> Extent:
    if levels is not None and _is_plain(levels):
        texts = [price for price, size in levels if size.strip("0.")]
        return (price_units(min(texts)), price_units(max(texts))) if texts else None
    ladder = snapshot_ladder(snapshot, side)
    for price in ladder:
        check_price(side, price)
    return (min(ladder), max(ladder)) if ladder else None


def _is_plain(levels: list[tuple[str, str]]) -> bool:
    """Whether all levels have the current wire form and each price occurs once.

    Such prices have equal length, so comparing the texts compares the prices.
    """
    text = "|".join([*chain.from_iterable(levels), ""])
    return (
        len(dict(levels)) == len(levels)
        and text.count("|") == 2 * len(levels)
        and _PLAIN_LEVELS.fullmatch(text) is not None
    )


def check_price(side: str, price: int) -> None:
    """Refuse a price that no contract has.

    Args:
        side: "yes" or "no", for the sentence.
        price: 1e-4 dollars.

    Raises:
        BookError: The price is outside 0 to 1 dollar.
    """
    if not 0 <= price <= ONE_DOLLAR:
        raise BookError(f"{side} price {dollars(price)} is outside 0 to 1 dollar")


def check_qty(qty: int) -> None:
    """Refuse a size, or a change, that no level has.

    Args:
        qty: 1e-2 contracts, signed.

    Raises:
        BookError: That is more than any level has.
    """
    if abs(qty) >= MOST_QTY:
        raise BookError(f"{contracts(qty)} contracts are more than any level has")


def own_scale(side: str, price: int, *, use_yes_price: bool) -> int:
    """Convert a price to its side's own bid scale.

    Args:
        side: "yes" or "no".
        price: As quoted, in 1e-4 dollars.
        use_yes_price: Whether no bids are quoted at 1 - p, on the YES scale.

    Returns:
        The price in 1e-4 dollars.
    """
    return ONE_DOLLAR - price if use_yes_price and side == "no" else price


def _levels(snapshot: Snapshot, side: str) -> list[tuple[int, int]]:
    fp = snapshot.yes_dollars_fp if side == "yes" else snapshot.no_dollars_fp
    if fp is not None:
        return [(price_units(price), qty_units(size)) for price, size in fp]
    text = snapshot.yes_dollars if side == "yes" else snapshot.no_dollars
    if text is not None:
        return [(price_units(price), qty_units(str(size))) for price, size in text]
    cents = snapshot.yes if side == "yes" else snapshot.no
    return [(cents_units(price), cents_units(size)) for price, size in cents or []]


@dataclass
class Book:
    """A market's two ladders, in exact integers.

    Args:
        market_ticker: The market.
        state: Whether the book is synced with the exchange.
        ladders: For "yes" and "no", price in 1e-4 dollars on the side's own bid scale to size in 1e-2 contracts.
    """

    market_ticker: str
    state: SyncState = SyncState.WAITING
    ladders: dict[str, Ladder] = field(default_factory=lambda: {"yes": {}, "no": {}})

    def apply_snapshot(self, snapshot: Snapshot, *, use_yes_price: bool = False) -> None:
        """Replace both ladders; the book is synced afterwards.

        Args:
            snapshot: The body of the frame.
            use_yes_price: Whether the connection quotes no bids on the YES scale.

        Raises:
            BookError: The snapshot cannot be read; the book is as before.
        """
        ladders = {
            side: snapshot_ladder(snapshot, side, use_yes_price=use_yes_price) for side in SIDES
        }
        self.ladders = ladders
        self.state = SyncState.SYNCED

    def apply_delta(self, change: LevelChange) -> int:
        """Change one level.

        Args:
            change: What `delta_change` read.

        Returns:
            The level's size after it, in 1e-2 contracts.

        Raises:
            BookError: The book has no snapshot yet, or the level would be negative, which is corruption: the book is stale then.
        """
        if self.state is SyncState.WAITING:
            raise BookError(f"a delta for {self.market_ticker} came before its snapshot")
        ladder = self.ladders[change.side]
        size = ladder.get(change.price, 0) + change.qty
        if size < 0:
            self.state = SyncState.STALE
            raise BookError(
                f"{self.market_ticker} {change.side} {dollars(change.price)} would be {size / 100:.2f}"
                " contracts: a frame was missed or repeated"
            )
        if size:
            ladder[change.price] = size
        else:
            ladder.pop(change.price, None)
        return size

    def mark_stale(self) -> None:
        """Note that a frame was missed: the book is stale until its next snapshot."""
        if self.state is SyncState.SYNCED:
            self.state = SyncState.STALE

    def best(self, side: str) -> tuple[int, int] | None:
        """Find the best bid of a side.

        Args:
            side: "yes" or "no".

        Returns:
            Price in 1e-4 dollars on the side's own bid scale, and size in 1e-2 contracts; None where the side is empty.
        """
        ladder = self.ladders[side]
        if not ladder:
            return None
        price = max(ladder)
        return price, ladder[price]

"""What the position columns mean, computed from the live orders and from nothing else.

    pos_filled          the reconciled, fill-based position from the exchange; never working orders
    pos_open_exposure   what the orders that are live at this moment add when all of them fill
    pos_total_est       the sum of both

Contracts, exact, YES positive and NO negative. No I/O; what is recorded of it is in recorder.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import Enum

from kalshi_platform.errors import PlatformError

INV_CONVENTION = "yes_positive"
"""The one normalisation: a YES contract is +1, a NO contract -1."""


class InventoryError(PlatformError):
    """What an engine handed over cannot be a position, an order or a fill."""


class Contract(Enum):
    """Which contract is traded."""

    YES = "yes"
    NO = "no"


class Quote(Enum):
    """Whether it is bid for or offered."""

    BID = "bid"
    ASK = "ask"


def sign(quote: Quote, contract: Contract) -> int:
    """+1 where a fill adds to the position: YES bought or NO sold; else -1."""
    return 1 if (quote is Quote.BID) == (contract is Contract.YES) else -1


@dataclass(frozen=True)
class WorkingOrder:
    """An order that can still be filled: from the moment it is sent until its end is known."""

    client_order_id: str
    contract: Contract
    quote: Quote
    remaining: Decimal
    """Contracts not yet filled."""

    def __post_init__(self) -> None:
        if not self.remaining.is_finite() or self.remaining <= 0:
            raise InventoryError(
                f"Order {self.client_order_id} has {self.remaining} contracts remaining: a working"
                " order has more than none. Leave finished orders out."
            )


@dataclass(frozen=True)
class Resting:
    """The resting inventory: the five columns of every decision. Contracts."""

    open_orders_count: int
    open_yes_bid_size: Decimal
    open_yes_ask_size: Decimal
    open_no_bid_size: Decimal
    open_no_ask_size: Decimal

    @property
    def exposure(self) -> Decimal:
        """`pos_open_exposure`: signed, YES positive."""
        return (
            self.open_yes_bid_size
            + self.open_no_ask_size
            - self.open_yes_ask_size
            - self.open_no_bid_size
        )


def resting(orders: Iterable[WorkingOrder]) -> Resting:
    """The resting inventory of the orders live at this moment."""
    sizes: dict[tuple[Contract, Quote], Decimal] = {}
    seen: set[str] = set()
    for order in orders:
        if order.client_order_id in seen:
            raise InventoryError(
                f"Order {order.client_order_id} was given twice among the working orders."
                " Give each once."
            )
        seen.add(order.client_order_id)
        key = (order.contract, order.quote)
        sizes[key] = sizes.get(key, Decimal(0)) + order.remaining
    none = Decimal(0)
    return Resting(
        len(seen),
        sizes.get((Contract.YES, Quote.BID), none),
        sizes.get((Contract.YES, Quote.ASK), none),
        sizes.get((Contract.NO, Quote.BID), none),
        sizes.get((Contract.NO, Quote.ASK), none),
    )


class Reconciled:
    """A position that the exchange itself has confirmed: its report, and the fills after it.

    Made by `from_exchange`, moved by `filled`: there is no other way to one, so that an estimate
    cannot become a position.
    """

    __slots__ = ("as_of", "market_ticker", "position")
    market_ticker: str
    position: Decimal
    """Contracts, YES positive."""
    as_of: datetime

    def __init__(self) -> None:
        raise InventoryError(
            "A reconciled position comes from the exchange: Reconciled.from_exchange(…), and then"
            " .filled(…) for each fill. An estimate is none."
        )

    @classmethod
    def from_exchange(cls, market_ticker: str, position_fp: str, as_of: datetime) -> Reconciled:
        """The exchange's own text ("-12.00") of a position; `as_of` has a time zone."""
        try:
            position = Decimal(position_fp)
        except ArithmeticError:
            position = Decimal("NaN")
        if not position.is_finite():
            raise InventoryError(
                f"Position {position_fp!r} of {market_ticker} is no number of contracts."
                " Give the exchange's position_fp as it came."
            )
        return cls._made(market_ticker, position, as_of)

    def filled(self, contract: Contract, count: Decimal, at: datetime) -> Reconciled:
        """The position after a fill of `count` contracts; outcome side YES adds, NO takes away."""
        if not count.is_finite() or count <= 0:
            raise InventoryError(f"A fill of {count} contracts of {self.market_ticker} is none.")
        signed = count if contract is Contract.YES else -count
        return self._made(self.market_ticker, self.position + signed, at)

    @classmethod
    def _made(cls, market_ticker: str, position: Decimal, as_of: datetime) -> Reconciled:
        if as_of.tzinfo is None:
            raise InventoryError(
                f"The position of {market_ticker} has a time without a zone: {as_of}. Give UTC."
            )
        new = object.__new__(cls)
        object.__setattr__(new, "market_ticker", market_ticker)
        object.__setattr__(new, "position", position)
        object.__setattr__(new, "as_of", as_of)
        return new

    def __setattr__(self, name: str, value: object) -> None:
        raise InventoryError(f"A reconciled position does not change: {name} cannot be set.")

    def __repr__(self) -> str:
        return f"Reconciled({self.market_ticker!r}, {self.position}, as_of={self.as_of})"


@dataclass(frozen=True)
class Inventory:
    """What an engine holds and has resting, at one moment."""

    position: Reconciled
    resting: Resting

    @property
    def pos_filled(self) -> Decimal:
        """The reconciled position, working orders left out."""
        return self.position.position

    @property
    def pos_open_exposure(self) -> Decimal:
        """What the live orders add when all of them fill."""
        return self.resting.exposure

    @property
    def pos_total_est(self) -> Decimal:
        """The sum of both: what hysteresis and the block logic go by."""
        return self.pos_filled + self.pos_open_exposure


def inventory(position: Reconciled, live_orders: Iterable[WorkingOrder]) -> Inventory:
    """The inventory of one market; to be computed anew in each loop, from the orders live then."""
    return Inventory(position, resting(live_orders))

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


@dataclass(frozen=True)
class Reconciled:
    """A position that the exchange itself has confirmed: its report, and the fills after it.

    Made by `from_exchange`, moved by `filled` only: there is no other way to a position, so an
    estimate cannot become one.
    """

    market_ticker: str
    position: Decimal
    """Contracts, YES positive."""
    as_of: datetime

    @classmethod
    def from_exchange(cls, market_ticker: str, position_fp: str, as_of: datetime) -> Reconciled:
        """The exchange's own text ("-12.00") of a position; `as_of` has a time zone."""
        try:
            position = Decimal(position_fp)
        except ArithmeticError:
            raise InventoryError(
                f"Position {position_fp!r} of {market_ticker} is not a number."
                " Give the exchange's position_fp."
            ) from None
        if not position.is_finite():
            raise InventoryError(
                f"Position {position_fp!r} of {market_ticker} is not a number of contracts."
            )
        if as_of.tzinfo is None:
            raise InventoryError(f"The position of {market_ticker} has a time without a zone.")
        return cls(market_ticker, position, as_of)

    def filled(self, contract: Contract, count: Decimal, at: datetime) -> Reconciled:
        """The position after a fill of `count` contracts; outcome side YES adds, NO takes away."""
        if not count.is_finite() or count <= 0:
            raise InventoryError(f"A fill of {count} contracts of {self.market_ticker} is none.")
        signed = count if contract is Contract.YES else -count
        return Reconciled(self.market_ticker, self.position + signed, max(at, self.as_of))

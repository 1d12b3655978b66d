"""Define the position columns, and compute them from the reconciled position and the live orders.

    pos_filled          the reconciled, fill-based position from the exchange; never working orders
    pos_open_exposure   what the live orders add if all of them fill
    pos_total_est       the sum of both

Contracts, exact, YES positive and NO negative. The exchange nets: a YES and a NO contract of one market are a
dollar and no position, so a fill of NO reduces the position in YES. No I/O; recorder.py records it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from enum import Enum

from kalshi_platform.inventory import values
from kalshi_platform.inventory.values import BadValue, InventoryError, WrongType

__all__ = [
    "INV_CONVENTION",
    "BadValue",
    "Contract",
    "Inventory",
    "InventoryError",
    "OrderStatus",
    "Quote",
    "Reconciled",
    "Resting",
    "Result",
    "WorkingOrder",
    "WrongType",
    "inventory",
    "resting",
    "sign",
]

INV_CONVENTION = "yes_positive"
YES_POSITIVE = frozenset({"", INV_CONVENTION, "buy_yes_positive"})
"""Names that engines use for the YES-positive convention, in lower case; empty: not given."""
"""The one normalisation: a YES contract is +1, a NO contract -1."""
_CONVENTIONS = {Decimal(1): INV_CONVENTION, Decimal(-1): "no_positive"}
MIXED = "mixed"
MOST_ORDERS = 2**32 - 1
_NONE = Decimal(0)
_SIZES = ("open_yes_bid_size", "open_yes_ask_size", "open_no_bid_size", "open_no_ask_size")


class Contract(Enum):
    """Which contract is traded; of a fill, the exchange's `outcome_side`."""

    YES = "yes"
    NO = "no"


class Quote(Enum):
    """Bid or ask; for a YES order, the exchange's `book_side`."""

    BID = "bid"
    ASK = "ask"


class OrderStatus(Enum):
    """Status of an order: the values of `mm_order_responses.status`."""

    RESTING = "resting"
    PARTIALLY_FILLED = "partially_filled"
    EXECUTED = "executed"
    """Filled to the end."""
    CANCELED = "canceled"
    """On request, or by the exchange."""
    EXPIRED = "expired"
    REJECTED = "rejected"

    @property
    def is_end(self) -> bool:
        """Whether the order has left the book."""
        return self not in {OrderStatus.RESTING, OrderStatus.PARTIALLY_FILLED}


class Result(Enum):
    """A market's result; the exchange's `market_result`."""

    YES = "yes"
    NO = "no"
    SCALAR = "scalar"
    VOID = "void"


def sign(quote: Quote, contract: Contract) -> int:
    """Compute whether a fill adds to the position or takes from it.

    Args:
        quote: Bid or ask.
        contract: YES or NO.

    Returns:
        +1 where a fill adds: YES bought or NO sold; else -1.

    Raises:
        WrongType: An argument is not of its enum.
    """
    values.member("quote", quote, Quote)
    values.member("contract", contract, Contract)
    return 1 if (quote is Quote.BID) == (contract is Contract.YES) else -1


@dataclass(frozen=True)
class WorkingOrder:
    """An order that can still be filled: from the moment it is sent until its end is known.

    Args:
        client_order_id: The order's id.
        contract: YES or NO.
        quote: Bid or ask.
        remaining: Contracts not yet filled; more than 0.

    Raises:
        WrongType: An argument has another type.
        BadValue: `remaining` is 0 or less, or the id empty.
    """

    client_order_id: str
    contract: Contract
    quote: Quote
    remaining: Decimal
    """Contracts not yet filled."""

    def __post_init__(self) -> None:
        name = values.text("client_order_id", self.client_order_id)
        values.member("contract", self.contract, Contract)
        values.member("quote", self.quote, Quote)
        remaining = values.exact("remaining", self.remaining)
        if remaining <= 0:
            raise BadValue(
                f"Order {name} has {remaining} contracts remaining: a working"
                " order has more than none. Leave finished orders out."
            )
        object.__setattr__(self, "client_order_id", name)
        object.__setattr__(self, "remaining", remaining)


@dataclass(frozen=True)
class Resting:
    """The resting inventory: the five columns of every decision. Contracts."""

    open_orders_count: int
    open_yes_bid_size: Decimal
    open_yes_ask_size: Decimal
    open_no_bid_size: Decimal
    open_no_ask_size: Decimal

    def __post_init__(self) -> None:
        orders, open_sides = self.open_orders_count, 0
        if type(orders) is not int or not 0 <= orders <= MOST_ORDERS:
            orders = values.whole("open_orders_count", orders)
            if orders > MOST_ORDERS:
                raise BadValue(f"open_orders_count is {orders}: give at most {MOST_ORDERS:,}.")
            object.__setattr__(self, "open_orders_count", orders)
        for name in _SIZES:
            given = getattr(self, name)
            size = values.amount(name, given)
            if size is not given:
                object.__setattr__(self, name, size)
            open_sides += bool(size)
        if orders < open_sides or (orders > 0) != (open_sides > 0):
            raise BadValue(
                f"open_orders_count is {orders}, and {open_sides} of the four sizes are above 0."
                " Make it of the live orders: resting(orders)."
            )

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
    """Compute the resting inventory of the live orders."""
    sizes = [_NONE] * 4
    seen: set[str] = set()
    for order in orders:
        if not isinstance(order, WorkingOrder):
            raise WrongType(f"An order is {values.shown(order)}: give each as a WorkingOrder.")
        if order.client_order_id in seen:
            raise BadValue(
                f"Order {order.client_order_id} was given twice among the working orders."
                " Give each once."
            )
        seen.add(order.client_order_id)
        sizes[2 * (order.contract is Contract.NO) + (order.quote is Quote.ASK)] += order.remaining
    return Resting(len(seen), *sizes)


class Reconciled:
    """A position that the exchange itself has confirmed: its report, and the fills after it.

    Created by `from_exchange`, changed by `filled`, ended by `settled`, and by nothing else, so that an
    estimate cannot become a position.
    """

    __slots__ = ("as_of", "fills_by", "market_ticker", "position")
    market_ticker: str
    position: Decimal
    """Contracts, YES positive."""
    as_of: datetime
    fills_by: str
    """The convention by which the fills since the report moved the position; empty before the first."""

    def __init__(self) -> None:
        raise InventoryError(
            "A reconciled position comes from the exchange: Reconciled.from_exchange(…), and then"
            " .filled(…) for each fill. An estimate is none."
        )

    @classmethod
    def from_exchange(cls, market_ticker: str, position_fp: str, as_of: datetime) -> Reconciled:
        """Take a position as the exchange reports it.

        Args:
            market_ticker: The market.
            position_fp: The exchange's own text of the position, such as "-12.00"; contracts, YES positive.
            as_of: When the exchange reported it, with a time zone.

        Returns:
            The position.

        Raises:
            WrongType: `position_fp` is no text.
            BadValue: `position_fp` is no number of contracts, or `as_of` has no time zone.
        """
        ticker = values.text("market_ticker", market_ticker)
        return cls._made(ticker, _position(ticker, position_fp), as_of, "")

    @property
    def convention(self) -> str:
        """How the fills since the report were normalised: `inv_convention` of a decision."""
        return self.fills_by or INV_CONVENTION  # the report itself is YES positive

    def filled(
        self,
        contract: Contract,
        count: Decimal,
        at: datetime,
        *,
        post_position_fp: str | None = None,
    ) -> Reconciled:
        """Apply a fill: outcome side YES adds, NO takes away.

        The exchange nets the two: what is held of one side ends before the other begins (`netted`).

        Args:
            contract: The fill's outcome side.
            count: Contracts; more than 0.
            at: The exchange's time of the fill, with a time zone.
            post_position_fp: The exchange's own figure of the position after it, as a fill message has it. It shows which
                sign the fill had.

        Returns:
            The position after the fill.

        Raises:
            WrongType: An argument has another type.
            BadValue: `count` is 0 or less, or `at` has no time zone.
        """
        values.member("contract", contract, Contract)
        size = values.count("count", count)
        signed = size if contract is Contract.YES else -size
        moved = signed
        if post_position_fp is not None:
            moved = _position(self.market_ticker, post_position_fp) - self.position
        used = _CONVENTIONS.get(moved / signed, self.fills_by)  # else a fill between was missed
        fills_by = used if self.fills_by in {"", used} else MIXED
        return self._made(self.market_ticker, self.position + signed, at, fills_by)

    def netted(self, contract: Contract, count: Decimal) -> Decimal:
        """Compute how much of a fill ends what is held of the other side; such a pair of contracts is worth a dollar.

        Args:
            contract: The fill's outcome side.
            count: Contracts; more than 0.

        Returns:
            Contracts, from 0 to `count`.

        Raises:
            BadValue: `count` is 0 or less.
        """
        values.member("contract", contract, Contract)
        size = values.count("count", count)
        other = -self.position if contract is Contract.YES else self.position
        return min(size, max(other, Decimal(0)))

    def settled(self, at: datetime) -> Reconciled:
        """End the position: its market was settled or voided.

        Args:
            at: When, with a time zone.

        Returns:
            The position after it: none.

        Raises:
            BadValue: `at` has no time zone.
        """
        return self._made(self.market_ticker, Decimal(0), at, self.fills_by)

    @classmethod
    def _made(
        cls, market_ticker: str, position: Decimal, as_of: datetime, fills_by: str
    ) -> Reconciled:
        values.moment(f"The position of {market_ticker}", as_of)
        new = object.__new__(cls)
        object.__setattr__(new, "market_ticker", market_ticker)
        object.__setattr__(new, "position", position)
        object.__setattr__(new, "as_of", as_of)
        object.__setattr__(new, "fills_by", fills_by)
        return new

    def __setattr__(self, name: str, value: object) -> None:
        raise InventoryError(f"A reconciled position does not change: {name} cannot be set.")

    def __repr__(self) -> str:
        return f"Reconciled({self.market_ticker!r}, {self.position}, as_of={self.as_of})"


def _position(market_ticker: str, position_fp: str) -> Decimal:
    if not isinstance(position_fp, str):
        raise WrongType(
            f"position_fp is {values.shown(position_fp)}, a {type(position_fp).__name__}: give the"
            " exchange's text as it came, such as '-12.00'."
        )
    try:
        return values.exact("position_fp", Decimal(position_fp))
    except (ArithmeticError, BadValue):
        raise BadValue(
            f"Position {values.shown(position_fp)} of {market_ticker} is no number of contracts."
            " Give the exchange's position_fp as it came."
        ) from None


@dataclass(frozen=True)
class Inventory:
    """What an engine holds and has resting, at one moment. Made by `inventory`.

    Args:
        position: The reconciled position.
        resting: The resting orders, added up.
    """

    position: Reconciled
    resting: Resting

    def __post_init__(self) -> None:
        values.one_of("position", self.position, Reconciled)
        values.one_of("resting", self.resting, Resting)

    @property
    def pos_filled(self) -> Decimal:
        """The reconciled position, working orders left out; contracts, YES positive."""
        return self.position.position

    @property
    def pos_open_exposure(self) -> Decimal:
        """What the live orders add if all of them fill; contracts, YES positive."""
        return self.resting.exposure

    @property
    def pos_total_est(self) -> Decimal:
        """The sum of both: what hysteresis and the block logic use."""
        return self.pos_filled + self.pos_open_exposure


def inventory(position: Reconciled, live_orders: Iterable[WorkingOrder]) -> Inventory:
    """Compute the inventory of one market; compute it again in each loop, from the orders live then.

    Args:
        position: The reconciled position.
        live_orders: The market's orders that can still be filled, each once.

    Returns:
        Position, resting sizes and their exposure; contracts, YES positive.

    Raises:
        WrongType: An order is no `WorkingOrder`.
        BadValue: An order is given twice.
    """
    return Inventory(position, resting(live_orders))

"""An engine's own orders, from the moment they are sent until their end is known. No I/O.

    sent ──► resting ──► partially_filled ──► executed
      │         └──────────────┴────────────► canceled, expired
      └──► rejected

`working` returns the orders of a market that can still be filled, for `inventory`; each transition returns the
`Sent` and the `OrderStatus` for the row (`Recorder.response`, `Recorder.order_changed`). An end is final: only a
fill in flight may still arrive after a cancel or an expiry, up to what remained.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import Decimal

from kalshi_platform.inventory import values
from kalshi_platform.inventory.recorder import Sent
from kalshi_platform.inventory.semantics import Contract, OrderStatus, Quote, WorkingOrder
from kalshi_platform.inventory.values import BadValue

ENDED_KEPT = 10_000
"""Number of ended orders that are kept, for late fills."""


@dataclass(frozen=True)
class LiveOrder:
    """One order as it stands."""

    sent: Sent
    """The action that placed or replaced it."""
    contract: Contract
    quote: Quote
    remaining: Decimal
    """Contracts not yet filled; after a cancel, those that it took away."""
    status: OrderStatus | None = None
    """None: sent, and not heard of yet."""
    replaces: str = ""

    @property
    def is_live(self) -> bool:
        """Whether it may still be filled, as far as is known."""
        return self.status is None or not self.status.is_end


class LiveOrders:
    """The orders of one engine. For one thread."""

    def __init__(self) -> None:
        self._live: dict[str, LiveOrder] = {}
        self._ended: dict[str, LiveOrder] = {}

    def placed(
        self, sent: Sent, contract: Contract, quote: Quote, size: Decimal, *, replaces: str = ""
    ) -> LiveOrder:
        """Note that an order was sent. One that it replaces stays live until the exchange has acknowledged this one.

        Args:
            sent: What `Recorder.action` returned.
            contract: YES or NO.
            quote: Bid or ask.
            size: Contracts; more than 0.
            replaces: The id of the order that it replaces.

        Returns:
            The order.

        Raises:
            BadValue: The order's id was sent before, or the replaced order is not live.
        """
        order = LiveOrder(
            values.one_of("sent", sent, Sent),
            values.member("contract", contract, Contract),
            values.member("quote", quote, Quote),
            values.count("size", size),
            replaces=values.optional_text("replaces", replaces),
        )
        name = sent.client_order_id
        if name in self:
            raise BadValue(f"Order {name} was sent before: give each order an id of its own.")
        if order.replaces and order.replaces not in self._live:
            raise BadValue(f"Order {name} replaces {order.replaces}, which is not live.")
        self._live[name] = order
        return order

    def heard(self, client_order_id: str, status: OrderStatus | str) -> LiveOrder:
        """Note what the exchange reports of an order. Reporting the same final status again changes nothing.

        Args:
            client_order_id: The order's id.
            status: Its status now.

        Returns:
            The order as it is now.

        Raises:
            BadValue: The order is not known, or the status cannot follow its last one.
        """
        now = values.member_or_text("status", status, OrderStatus)
        order = self._known(client_order_id)
        if not order.is_live:
            if order.status is not now:
                raise _cannot_follow(order, now)
            return order
        if now is OrderStatus.REJECTED and order.status is not None:
            raise _cannot_follow(order, now)
        if now is OrderStatus.RESTING and order.status is OrderStatus.PARTIALLY_FILLED:
            now = OrderStatus.PARTIALLY_FILLED  # an acknowledgement that comes after its first fill
        if order.replaces and order.status is None and now is not OrderStatus.REJECTED:
            replaced = self._live.get(order.replaces)
            if replaced is not None:
                self._set(replace(replaced, status=OrderStatus.CANCELED))
        return self._set(replace(order, status=now))

    def filled(self, client_order_id: str, size: Decimal) -> LiveOrder:
        """Note a fill of an order; its status then shows whether it was the last.

        Args:
            client_order_id: The order's id.
            size: Contracts; more than 0.

        Returns:
            The order as it is now.

        Raises:
            BadValue: The fill is larger than what remained, or the order is not known or was rejected.
        """
        contracts = values.count("size", size)
        order = self._known(client_order_id)
        if contracts > order.remaining or order.status is OrderStatus.REJECTED:
            raise BadValue(
                f"A fill of {contracts} of order {client_order_id}: {order.remaining} remain, and its status"
                f" is {_text(order)}. Look for a fill that was booked twice."
            )
        rest = order.remaining - contracts
        if order.is_live:
            status = OrderStatus.PARTIALLY_FILLED if rest else OrderStatus.EXECUTED
            return self._set(replace(order, remaining=rest, status=status))
        return self._set(replace(order, remaining=rest))

    def decreased(self, client_order_id: str, remaining: Decimal) -> LiveOrder:
        """Note that the exchange has acknowledged a decrease.

        Args:
            client_order_id: The order's id.
            remaining: What it keeps, contracts; more than 0.

        Returns:
            The order as it is now.

        Raises:
            BadValue: That is more than it had, or the order is not known or not live.
        """
        rest = values.count("remaining", remaining)
        order = self._known(client_order_id)
        if not order.is_live or rest > order.remaining:
            raise BadValue(
                f"Order {client_order_id} cannot be decreased to {rest}: {order.remaining} remain, and its"
                f" status is {_text(order)}."
            )
        return self._set(replace(order, remaining=rest))

    def __contains__(self, client_order_id: str) -> bool:
        """Check whether an order is known: sent by this engine, and not ended long ago.

        Args:
            client_order_id: The order's id.

        Returns:
            True for the live orders and the newest 10,000 that ended.
        """
        return client_order_id in self._live or client_order_id in self._ended

    def working(self, market_ticker: str) -> list[WorkingOrder]:
        """List the orders of a market that may still be filled, for `inventory`.

        Args:
            market_ticker: The market.

        Returns:
            The orders with their remaining sizes, oldest first.
        """
        return [
            WorkingOrder(name, order.contract, order.quote, order.remaining)
            for name, order in self._live.items()
            if order.sent.market_ticker == market_ticker
        ]

    def live(self, market_ticker: str) -> list[LiveOrder]:
        """List the same orders with all that is known of them.

        Args:
            market_ticker: The market.

        Returns:
            The orders, oldest first.
        """
        return [order for order in self._live.values() if order.sent.market_ticker == market_ticker]

    def settled(self, market_ticker: str) -> list[LiveOrder]:
        """Note that a market was settled or voided: its orders are out of the book.

        Args:
            market_ticker: The market.

        Returns:
            The orders that were live, now canceled.
        """
        return [
            self._set(replace(order, status=OrderStatus.CANCELED))
            for order in self.live(market_ticker)
        ]

    def _known(self, client_order_id: str) -> LiveOrder:
        order = self._live.get(client_order_id) or self._ended.get(client_order_id)
        if order is None:
            raise BadValue(
                f"Order {values.shown(client_order_id)} is not known: it was not sent by this engine, or"
                " ended long ago."
            )
        return order

    def _set(self, order: LiveOrder) -> LiveOrder:
        name = order.sent.client_order_id
        if order.is_live:
            self._live[name] = order
            return order
        self._live.pop(name, None)
        self._ended[name] = order
        if len(self._ended) > ENDED_KEPT:
            self._ended.pop(next(iter(self._ended)))
        return order


def _text(order: LiveOrder) -> str:
    return order.status.value if order.status is not None else "not known yet"


def _cannot_follow(order: LiveOrder, now: OrderStatus) -> BadValue:
    return BadValue(
        f"Order {order.sent.client_order_id} is {_text(order)}, and cannot be {now.value} after that."
        " Ask the exchange for the order."
    )

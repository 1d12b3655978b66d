"""The simulator's one account: orders, fills and positions. No I/O.

An own order rests in the book behind everybody else's at its price: takers reach it last, and the
order flow never cancels it. Orders only rest (post-only); the exchange refuses what would match.
Prices are 1e-4 dollars, quantities 1e-2 contracts, positions signed: YES positive, NO negative.
"""

from __future__ import annotations

import itertools
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from kalshi_platform.exchange.numbers import ONE_DOLLAR, contracts, dollars
from kalshi_platform.simulator import market as life
from kalshi_platform.simulator.book import SIDES, YES
from kalshi_platform.simulator.frames import rfc3339
from kalshi_platform.simulator.market import Market
from kalshi_platform.simulator.orderflow import Change

_NAMESPACE = uuid.UUID("8f6f1c4e-9a53-4d59-8e3a-2f6b7f1d2c11")


class OrderRejected(Exception):
    """The exchange rejects the order; `str()` is the reason, in one word."""


@dataclass(frozen=True)
class Order:
    """A resting own order. `side` is the bid ladder: an ask on YES is a bid on NO."""

    order_id: str
    client_order_id: str
    market: Market
    side: int
    level: int
    remaining: int
    placed_us: int

    def texts(self) -> dict[str, object]:
        """The order as JSON."""
        return {
            "order_id": self.order_id,
            "client_order_id": self.client_order_id,
            "ticker": self.market.ticker,
            "outcome_side": SIDES[self.side],
            "price_dollars": self.market.listing.grid.texts[self.level],
            "remaining_count_fp": contracts(self.remaining),
            "status": "resting",
            "created_time": rfc3339(self.placed_us),
        }


@dataclass(frozen=True)
class OwnFill:
    """A fill of an own order; `number` counts them from 1."""

    number: int
    fill_id: str
    order: Order
    qty: int
    ts_us: int

    @property
    def signed(self) -> int:
        """The change of the position."""
        return self.qty if self.order.side == YES else -self.qty

    def texts(self) -> dict[str, object]:
        """The fill as in GET /portfolio/fills."""
        own = self.order.market.listing.grid.prices[self.order.level]
        yes = own if self.order.side == YES else ONE_DOLLAR - own
        side = SIDES[self.order.side]
        return {
            "fill_id": self.fill_id,
            "trade_id": self.fill_id,
            "order_id": self.order.order_id,
            "ticker": self.order.market.ticker,
            "market_ticker": self.order.market.ticker,
            "outcome_side": side,
            "book_side": "bid" if self.order.side == YES else "ask",
            "side": side,
            "action": "buy",
            "count_fp": contracts(self.qty),
            "yes_price_dollars": dollars(yes),
            "no_price_dollars": dollars(ONE_DOLLAR - yes),
            "is_taker": False,
            "fee_cost": "0.000000",
            "created_time": rfc3339(self.ts_us),
            "ts": self.ts_us // 1_000_000,
            "exchange_index": 0,
        }


@dataclass(frozen=True)
class Holding:
    """The position in a market, and its cost."""

    position: int = 0
    cost: int = 0
    """In 1e-6 dollars, of the open position."""
    traded: int = 0
    """In 1e-6 dollars, of all fills."""
    updated_us: int = 0

    def after(self, fill: OwnFill) -> Holding:
        """Return the holding after a fill; offset contracts are removed at average cost."""
        price = fill.order.market.listing.grid.prices[fill.order.level]
        spent = price * fill.qty
        position = self.position + fill.signed
        if self.position * fill.signed >= 0:
            cost = self.cost + spent
        elif abs(fill.signed) <= abs(self.position):
            cost = self.cost * abs(position) // abs(self.position)
        else:
            cost = price * abs(position)
        return Holding(position, cost, self.traded + spent, fill.ts_us)


@dataclass(frozen=True)
class Settled:
    """A position that was paid out."""

    market: Market
    holding: Holding
    ts_us: int

    def texts(self) -> dict[str, object]:
        """The settlement as in GET /portfolio/settlements."""
        held, yes_wins = self.holding.position, self.market.result == "yes"
        yes, no = max(held, 0), max(-held, 0)
        cost = f"{self.holding.cost / 1_000_000:.6f}"
        return {
            "ticker": self.market.ticker,
            "event_ticker": self.market.listing.event_ticker,
            "market_result": self.market.result,
            "yes_count_fp": contracts(yes),
            "no_count_fp": contracts(no),
            "yes_total_cost_dollars": cost if yes else "0.000000",
            "no_total_cost_dollars": cost if no else "0.000000",
            "fee_cost": "0.000000",
            "revenue": yes if yes_wins else no,  # a dollar each: 1e-2 contracts are cents
            "settled_time": rfc3339(self.ts_us),
            "value": 100 if yes_wins else 0,
        }


class Portfolio:
    """The account. `change` changes a market's book and sends it to every subscriber."""

    def __init__(self, seed: str, change: Callable[[Market, list[Change], int], None]) -> None:
        self._change = change
        self._seed = seed
        self.epoch = str(uuid.uuid5(_NAMESPACE, seed))
        """Id of this account; a restarted simulator has another one."""
        self._numbers = itertools.count(1)
        self._orders: dict[str, Order] = {}
        self._at: defaultdict[tuple[str, int, int], list[str]] = defaultdict(list)
        """Own orders of a level, oldest first, by client order id."""
        self._used: set[str] = set()
        self._holdings: dict[str, Holding] = {}
        self.fills: list[OwnFill] = []
        self.settled: list[Settled] = []
        self.frozen_us: int | None = None
        """Since when the portfolio pages are frozen; None: they are not."""

    def orders(self) -> list[Order]:
        """All resting orders, oldest first."""
        return list(self._orders.values())

    def holdings(self) -> dict[str, Holding]:
        """Open positions, by ticker."""
        return {ticker: held for ticker, held in self._holdings.items() if held.position}

    def fills_after(self, number: int) -> list[OwnFill]:
        """Fills with a greater number, oldest first."""
        return self.fills[number:]

    def place(
        self, market: Market, *, side: int, price: int, qty: int, client_order_id: str, at_ns: int
    ) -> Order:
        """Rest an order. Raises `OrderRejected`."""
        if client_order_id in self._used or not client_order_id:
            raise OrderRejected("client_order_id_not_new")
        if market.status != life.ACTIVE:
            raise OrderRejected("market_not_active")
        if qty <= 0:
            raise OrderRejected("invalid_count")
        try:
            level = market.listing.grid.prices.index(price)
        except ValueError:
            raise OrderRejected("invalid_price") from None
        if level > market.book.room(side):
            raise OrderRejected("post_only_cross")
        number = next(self._numbers)
        order = Order(
            str(uuid.uuid5(_NAMESPACE, f"{self._seed}:order:{number}")),
            client_order_id,
            market,
            side,
            level,
            qty,
            at_ns // 1000,
        )
        self._used.add(client_order_id)
        self._orders[client_order_id] = order
        self._at[market.ticker, side, level].append(client_order_id)
        self._change(market, [(side, level, qty)], at_ns)
        return order

    def cancel(self, client_order_id: str, at_ns: int) -> Order:
        """Cancel an order. Raises `OrderRejected` if it does not rest."""
        order = self._orders.get(client_order_id)
        if order is None:
            raise OrderRejected("order_not_found")
        self._remove(order)
        self._change(order.market, [(order.side, order.level, -order.remaining)], at_ns)
        return order

    def cancel_all(self, market: Market, at_ns: int) -> None:
        """Cancel every order of a market, as the exchange does at its close."""
        for order in self.orders():
            if order.market is market:
                self.cancel(order.client_order_id, at_ns)

    def spare(
        self, market: Market, changes: Iterable[Change], traded: bool, ts_us: int
    ) -> list[Change]:
        """Apply others' changes of the book to own orders: trades fill them, cancellations leave them.

        The changes are in the book already; returns them as they are after sparing.
        """
        kept: list[Change] = []
        for side, level, qty in changes:
            short = 0
            key = (market.ticker, side, level)
            if qty < 0 and key in self._at:
                own = sum(self._orders[name].remaining for name in self._at[key])
                short = max(own - market.book.sizes[side][level], 0)
            if short and traded:
                self._fill(key, short, ts_us)
            elif short:
                market.book.change(side, level, short)
                qty += short  # noqa: PLW2901
            if qty:
                kept.append((side, level, qty))
        return kept

    def settle(self, market: Market, at_us: int) -> None:
        """Pay out a settled market."""
        held = self._holdings.pop(market.ticker, None)
        if held is not None and held.position:
            self.settled.append(Settled(market, held, at_us))

    def _fill(self, key: tuple[str, int, int], qty: int, ts_us: int) -> None:
        for name in list(self._at[key]):
            order = self._orders[name]
            part = min(qty, order.remaining)
            qty -= part
            number = len(self.fills) + 1
            fill_id = str(uuid.uuid5(_NAMESPACE, f"{self._seed}:fill:{number}"))
            fill = OwnFill(number, fill_id, order, part, ts_us)
            self.fills.append(fill)
            held = self._holdings.get(order.market.ticker, Holding())
            self._holdings[order.market.ticker] = held.after(fill)
            if part == order.remaining:
                self._remove(order)
            else:
                self._orders[name] = replace(order, remaining=order.remaining - part)
            if not qty:
                return

    def _remove(self, order: Order) -> None:
        del self._orders[order.client_order_id]
        key = (order.market.ticker, order.side, order.level)
        self._at[key].remove(order.client_order_id)
        if not self._at[key]:
            del self._at[key]

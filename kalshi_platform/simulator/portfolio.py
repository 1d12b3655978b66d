"""The simulator's one account: orders, fills, positions and cash. No I/O.

An own order rests in the book behind everybody else's at its price: takers reach it last, and the
order flow never cancels it. Orders only rest (post-only); the exchange refuses what would match.
Prices are 1e-4 dollars, quantities 1e-2 contracts, so their product and all money are 1e-6 dollars;
positions are signed: YES positive, NO negative.

At any time: cash + cost of the open positions = deposit + realized profit - fees.
"""

from __future__ import annotations

import itertools
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from decimal import Decimal

from kalshi_platform.exchange.fees import trade_fee
from kalshi_platform.exchange.numbers import ONE_DOLLAR, contracts, dollars
from kalshi_platform.simulator import market as life
from kalshi_platform.simulator.book import SIDES, YES
from kalshi_platform.simulator.catalog import FEE_TYPES
from kalshi_platform.simulator.frames import rfc3339
from kalshi_platform.simulator.market import Market
from kalshi_platform.simulator.orderflow import Change

_NAMESPACE = uuid.UUID("8f6f1c4e-9a53-4d59-8e3a-2f6b7f1d2c11")
USER_ID = str(uuid.uuid5(_NAMESPACE, "user"))
DEPOSIT = 100_000 * 1_000_000
"""What the account starts with."""
KEPT_ORDERS = 10_000
"""How many finished orders can be looked up, the newest ones."""
RESTING, EXECUTED, CANCELED = "resting", "executed", "canceled"


def money(amount: int) -> str:
    """Return 1e-6 dollars as text, with six decimals."""
    sign = "-" if amount < 0 else ""
    return f"{sign}{abs(amount) // 1_000_000}.{abs(amount) % 1_000_000:06d}"


def maker_fee(market: Market, price: int, qty: int) -> int:
    """Return the fee of a fill of a resting order; zero in a series without maker fees."""
    fee = trade_fee(
        Decimal(price) / ONE_DOLLAR,
        Decimal(qty) / 100,
        taker=False,
        fee_type=FEE_TYPES[market.listing.series_ticker],
    )
    return int(fee * 1_000_000)


class OrderRejected(Exception):
    """The exchange rejects the order; `str()` is the reason, in one word."""


@dataclass(frozen=True)
class Order:
    """An own order. `side` is the bid ladder: an ask on YES is a bid on NO."""

    number: int
    order_id: str
    client_order_id: str
    market: Market
    side: int
    level: int
    initial: int
    remaining: int
    placed_us: int
    updated_us: int
    filled: int = 0
    fees: int = 0
    status: str = RESTING

    @property
    def price(self) -> int:
        """Price of the contract of its side."""
        return self.market.listing.grid.prices[self.level]

    def texts(self) -> dict[str, object]:
        """The order as in GET /portfolio/orders."""
        return {
            "order_id": self.order_id,
            "user_id": USER_ID,
            "client_order_id": self.client_order_id,
            "ticker": self.market.ticker,
            **_direction(self.side, self.price),
            "type": "limit",
            "status": self.status,
            "fill_count_fp": contracts(self.filled),
            "remaining_count_fp": contracts(self.remaining),
            "initial_count_fp": contracts(self.initial),
            "taker_fill_cost_dollars": money(0),
            "maker_fill_cost_dollars": money(self.price * self.filled),
            "taker_fees_dollars": money(0),
            "maker_fees_dollars": money(self.fees),
            "created_time": rfc3339(self.placed_us),
            "last_update_time": rfc3339(self.updated_us),
            "self_trade_prevention_type": "taker_at_cross",
            "cancel_order_on_pause": False,
            "subaccount_number": 0,
            "exchange_index": 0,
        }


@dataclass(frozen=True)
class OwnFill:
    """A fill of an own order; `number` counts them from 1."""

    number: int
    fill_id: str
    order: Order
    qty: int
    fee: int
    ts_us: int

    @property
    def signed(self) -> int:
        """The change of the position."""
        return self.qty if self.order.side == YES else -self.qty

    def texts(self) -> dict[str, object]:
        """The fill as in GET /portfolio/fills."""
        return {
            "fill_id": self.fill_id,
            "trade_id": self.fill_id,
            "order_id": self.order.order_id,
            "ticker": self.order.market.ticker,
            "market_ticker": self.order.market.ticker,
            **_direction(self.order.side, self.order.price),
            "count_fp": contracts(self.qty),
            "is_taker": False,
            "fee_cost": money(self.fee),
            "created_time": rfc3339(self.ts_us),
            "ts": self.ts_us // 1_000_000,
            "subaccount_number": 0,
            "exchange_index": 0,
        }


def _direction(side: int, price: int) -> dict[str, object]:
    """Both forms of an order's side and of its price, as orders and fills have them."""
    yes = price if side == YES else ONE_DOLLAR - price
    return {
        "outcome_side": SIDES[side],
        "book_side": "bid" if side == YES else "ask",
        "side": SIDES[side],
        "action": "buy",
        "yes_price_dollars": dollars(yes),
        "no_price_dollars": dollars(ONE_DOLLAR - yes),
    }


@dataclass(frozen=True)
class Holding:
    """The position in a market, its cost and what it has brought."""

    market: Market
    position: int = 0
    cost: int = 0
    """Of the open position."""
    traded: int = 0
    """Cost of all fills."""
    shares: int = 0
    """Contracts of all fills, in 1e-2."""
    realized: int = 0
    """Profit of what was closed, without fees."""
    fees: int = 0
    updated_us: int = 0

    def after(self, fill: OwnFill) -> Holding:
        """Return the holding after a fill.

        A contract of the other side closes one that is held: the pair pays a dollar at once. Closed
        contracts are removed at average cost.
        """
        price = fill.order.price
        held = abs(self.position)
        closed = min(fill.qty, held) if self.position * fill.signed < 0 else 0
        kept = self.cost * (held - closed) // held if held else 0
        return Holding(
            market=self.market,
            position=self.position + fill.signed,
            cost=kept + price * (fill.qty - closed),
            traded=self.traded + price * fill.qty,
            shares=self.shares + fill.qty,
            realized=self.realized + (ONE_DOLLAR - price) * closed - (self.cost - kept),
            fees=self.fees + fill.fee,
            updated_us=fill.ts_us,
        )

    def texts(self) -> dict[str, object]:
        """The position as in GET /portfolio/positions."""
        return {
            "ticker": self.market.ticker,
            "exchange_index": 0,
            "position_fp": contracts(self.position),
            "market_exposure_dollars": money(self.cost),
            "realized_pnl_dollars": money(self.realized),
            "fees_paid_dollars": money(self.fees),
            "total_traded_dollars": money(self.traded),
            "last_updated_ts": rfc3339(self.updated_us),
        }

    @property
    def value(self) -> int:
        """What the open position is worth at the last trade's price; its cost without a trade."""
        last = self.market.last_price
        if not last:
            return self.cost
        return abs(self.position) * (last if self.position > 0 else ONE_DOLLAR - last)


def event_positions(holdings: Iterable[Holding]) -> list[dict[str, object]]:
    """The sums of the positions by event, as in GET /portfolio/positions."""
    by_event: dict[str, list[Holding]] = {}
    for held in holdings:
        by_event.setdefault(held.market.listing.event_ticker, []).append(held)
    return [
        {
            "event_ticker": event,
            "total_cost_dollars": money(sum(held.traded for held in members)),
            "total_cost_shares_fp": contracts(sum(held.shares for held in members)),
            "event_exposure_dollars": money(sum(held.cost for held in members)),
            "realized_pnl_dollars": money(sum(held.realized for held in members)),
            "fees_paid_dollars": money(sum(held.fees for held in members)),
        }
        for event, members in by_event.items()
    ]


@dataclass(frozen=True)
class Settled:
    """A market in which the account had traded, and what its position was paid."""

    market: Market
    holding: Holding
    """As it was before the payment."""
    ts_us: int

    @property
    def revenue(self) -> int:
        """A dollar for each winning contract: in cents as many as there are 1e-2 contracts."""
        position = self.holding.position
        return max(position, 0) if self.market.result == "yes" else max(-position, 0)

    @property
    def closed(self) -> Holding:
        """The holding after the payment."""
        profit = self.revenue * 10_000 - self.holding.cost
        realized = self.holding.realized + profit
        return replace(self.holding, position=0, cost=0, realized=realized, updated_us=self.ts_us)

    def texts(self) -> dict[str, object]:
        """The settlement as in GET /portfolio/settlements."""
        yes, no = max(self.holding.position, 0), max(-self.holding.position, 0)
        cost = money(self.holding.cost)
        return {
            "ticker": self.market.ticker,
            "exchange_index": 0,
            "event_ticker": self.market.listing.event_ticker,
            "market_result": self.market.result,
            "yes_count_fp": contracts(yes),
            "no_count_fp": contracts(no),
            "yes_total_cost_dollars": cost if yes else money(0),
            "no_total_cost_dollars": cost if no else money(0),
            "fee_cost": money(self.holding.fees),
            "revenue": self.revenue,
            "settled_time": rfc3339(self.ts_us),
            "value": 100 if self.market.result == "yes" else 0,
        }


class Portfolio:
    """The account. `change` changes a market's book and sends it to every subscriber."""

    def __init__(self, seed: str, change: Callable[[Market, list[Change], int], None]) -> None:
        self._change = change
        self._seed = seed
        self.epoch = str(uuid.uuid5(_NAMESPACE, seed))
        """Id of this account; a restarted simulator has another one."""
        self._numbers = itertools.count(1)
        self.cash = DEPOSIT
        self.updated_us = 0
        """When the cash last changed."""
        self._orders: dict[str, Order] = {}
        self._finished: deque[Order] = deque(maxlen=KEPT_ORDERS)
        self._at: defaultdict[tuple[str, int, int], list[str]] = defaultdict(list)
        """Own orders of a level, oldest first, by client order id."""
        self._used: set[str] = set()
        self._holdings: dict[str, Holding] = {}
        self.fills: list[OwnFill] = []
        self.settled: list[Settled] = []
        self.frozen_us: int | None = None
        """Since when the portfolio pages are frozen; None: they are not."""

    @classmethod
    def empty(cls) -> Portfolio:
        """Return an account that nothing happens to."""
        return cls("", lambda *_: None)

    def orders(self) -> list[Order]:
        """All resting orders, oldest first."""
        return list(self._orders.values())

    def all_orders(self) -> list[Order]:
        """All resting orders and the last finished ones, newest first."""
        both = [*self._orders.values(), *self._finished]
        return sorted(both, key=lambda order: order.number, reverse=True)

    def holdings(self) -> dict[str, Holding]:
        """Open positions, by ticker."""
        return {ticker: held for ticker, held in self._holdings.items() if held.position}

    def traded(self) -> list[Holding]:
        """Every market that is not settled and in which there was a fill; the position may be zero."""
        return list(self._holdings.values())

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
        committed = sum(order.price * order.remaining for order in self._orders.values())
        if committed + price * qty > self.cash:
            raise OrderRejected("insufficient_balance")
        number = next(self._numbers)
        order = Order(
            number,
            str(uuid.uuid5(_NAMESPACE, f"{self._seed}:order:{number}")),
            client_order_id,
            market,
            side,
            level,
            qty,
            qty,
            at_ns // 1000,
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
        self._finish(replace(order, status=CANCELED, remaining=0, updated_us=at_ns // 1000))
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
        if held is None:
            return
        settled = Settled(market, held, at_us)
        self.settled.append(settled)
        self.cash += settled.revenue * 10_000
        self.updated_us = at_us

    def _fill(self, key: tuple[str, int, int], qty: int, ts_us: int) -> None:
        for name in list(self._at[key]):
            order = self._orders[name]
            part = min(qty, order.remaining)
            qty -= part
            number = len(self.fills) + 1
            fill_id = str(uuid.uuid5(_NAMESPACE, f"{self._seed}:fill:{number}"))
            fee = maker_fee(order.market, order.price, part)
            fill = OwnFill(number, fill_id, order, part, fee, ts_us)
            self.fills.append(fill)
            self._hold(fill)
            order = replace(
                order,
                filled=order.filled + part,
                fees=order.fees + fee,
                remaining=order.remaining - part,
                updated_us=ts_us,
            )
            self._orders[name] = order
            if not order.remaining:
                self._finish(replace(order, status=EXECUTED))
            if not qty:
                return

    def _hold(self, fill: OwnFill) -> None:
        market = fill.order.market
        before = self._holdings.get(market.ticker, Holding(market))
        after = before.after(fill)
        self._holdings[market.ticker] = after
        pairs = (abs(before.position) + fill.qty - abs(after.position)) // 2
        self.cash += pairs * ONE_DOLLAR - fill.order.price * fill.qty - fill.fee
        self.updated_us = fill.ts_us

    def _finish(self, order: Order) -> None:
        """Take an order out of the queue of its price, and keep it as it ended."""
        self._finished.append(order)
        del self._orders[order.client_order_id]
        key = (order.market.ticker, order.side, order.level)
        self._at[key].remove(order.client_order_id)
        if not self._at[key]:
            del self._at[key]

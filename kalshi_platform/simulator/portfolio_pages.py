"""The exchange's pages about the account: balance, positions, orders, fills, settlements and limits.

Each takes a query and returns what is to be JSON, or raises `Rejected`, as those of pages.py.
"""

from __future__ import annotations

import time

from kalshi_platform.simulator.exchange import Exchange
from kalshi_platform.simulator.frames import rfc3339
from kalshi_platform.simulator.pages import BASE, NOT_FOUND
from kalshi_platform.simulator.portfolio import (
    CANCELED,
    EXECUTED,
    RESTING,
    Holding,
    Portfolio,
    event_positions,
    money,
)
from kalshi_platform.simulator.query import Query, Rejected, bad_request, between
from kalshi_platform.simulator.replay import Recording

_STATUSES = (RESTING, CANCELED, EXECUTED)
_COUNTS = {
    "position": lambda held: held.position,
    "total_traded": lambda held: held.traded,
}


class PortfolioPages:
    """The pages of the one account. A recording has none: its account is empty."""

    def __init__(self, exchange: Exchange | Recording) -> None:
        self._account = exchange.portfolio if isinstance(exchange, Exchange) else Portfolio.empty()

    def user_data_timestamp(self, _: Query) -> object:
        """Return the time as of which the portfolio pages hold."""
        frozen = self._account.frozen_us
        return {"as_of_time": rfc3339(time.time_ns() // 1000 if frozen is None else frozen)}

    def balance(self, query: Query) -> object:
        """Return the cash, in cents without their fractions, and the worth of the positions."""
        _one_account(query)
        account = self._account
        text = money(account.cash)[:-2]  # four decimals, the rest cut off
        return {
            "balance": account.cash // 10_000,
            "balance_breakdown": [{"balance": text, "exchange_index": 0}],
            "balance_dollars": text,
            "portfolio_value": sum(held.value for held in account.traded()) // 10_000,
            "updated_ts": account.updated_us // 1_000_000,
        }

    def positions(self, query: Query) -> object:
        """Return the positions, page by page, and their sums by event."""
        _one_account(query)
        ticker, event = query.text("ticker"), query.text("event_ticker")
        wanted = query.texts("count_filter")
        if unknown := [name for name in wanted if name not in _COUNTS]:
            raise bad_request(f"count_filter {unknown[0]!r} is not one of {', '.join(_COUNTS)}")
        kind = query.choice("settlement_status", ("unsettled", "settled", "all")) or "unsettled"
        holdings: list[Holding] = []
        if kind != "settled":
            holdings += self._account.traded()
        if kind != "unsettled":
            holdings += [settled.closed for settled in self._account.settled]
        found = [
            held
            for held in holdings
            if ticker in {None, held.market.ticker}
            and event in {None, held.market.listing.event_ticker}
            and (not wanted or any(_COUNTS[name](held) for name in wanted))
        ]
        page, cursor = query.page(found, "GetPositions", 1000, lambda held: held.market.ticker)
        return {
            "cursor": cursor,
            "event_positions": event_positions(page),
            "market_positions": [held.texts() for held in page],
        }

    def fills(self, query: Query) -> object:
        """Return our fills, newest first, page by page."""
        _one_account(query)
        ticker, order_id = query.text("ticker"), query.text("order_id")
        edges = query.seconds("", "GetFills")
        found = [
            fill
            for fill in reversed(self._account.fills)
            if ticker in {None, fill.order.market.ticker}
            and order_id in {None, fill.order.order_id}
            and between(fill.ts_us, edges)
        ]
        page, cursor = query.page(found, "GetFills", 1000, lambda fill: fill.fill_id)
        return {"cursor": cursor, "fills": [fill.texts() for fill in page]}

    def orders(self, query: Query) -> object:
        """Return our orders by market, event, status and time of placing, newest first, page by page."""
        _one_account(query)
        ticker, events = query.text("ticker"), query.texts("event_ticker")
        status, edges = query.choice("status", _STATUSES), query.seconds("", "GetOrders")
        found = [
            order
            for order in self._account.all_orders()
            if ticker in {None, order.market.ticker}
            and (not events or order.market.listing.event_ticker in events)
            and status in {None, order.status}
            and between(order.placed_us, edges)
        ]
        page, cursor = query.page(found, "GetOrders", 1000, lambda order: order.order_id)
        return {"cursor": cursor, "orders": [order.texts() for order in page]}

    def order(self, query: Query) -> object:
        """Return one order."""
        for order in self._account.all_orders():
            if order.order_id == query.path["order_id"]:
                return {"order": order.texts()}
        raise Rejected(404, NOT_FOUND)

    def settlements(self, query: Query) -> object:
        """Return our positions that were paid out, newest first, page by page."""
        query.only_zero("subaccount")
        ticker, event = query.text("ticker"), query.text("event_ticker")
        edges = query.seconds("", "GetSettlements")
        found = [
            settled
            for settled in reversed(self._account.settled)
            if settled.holding.position
            and ticker in {None, settled.market.ticker}
            and event in {None, settled.market.listing.event_ticker}
            and between(settled.ts_us, edges)
        ]
        page, cursor = query.page(found, "GetSettlements", 1000, lambda item: item.market.ticker)
        return {"cursor": cursor, "settlements": [settled.texts() for settled in page]}

    def limits(self, _: Query) -> object:
        """Token buckets of the basic tier; the simulator does not enforce them."""
        return {
            "grants": [],
            "read": {"bucket_capacity": 200, "refill_rate": 200},
            "usage_tier": "basic",
            "write": {"bucket_capacity": 100, "refill_rate": 100},
        }

    def endpoint_costs(self, _: Query) -> object:
        """Return the cost of a request."""
        order = {"cost": 2, "method": "GET", "path": f"{BASE}/portfolio/orders/:order_id"}
        return {"default_cost": 10, "endpoint_costs": [order]}


def _one_account(query: Query) -> None:
    query.only_zero("subaccount")
    query.only_zero("exchange_index")

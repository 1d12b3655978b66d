"""Order entry and the account, for the paper market maker: what /simulator/orders and
/simulator/account take and answer. No exchange has these pages, and they want no key: an order that
is sent here can only ever reach a simulator.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kalshi_platform.exchange.numbers import ONE_DOLLAR, contracts, dollars, price_units, qty_units
from kalshi_platform.simulator import market as life
from kalshi_platform.simulator.book import NO, YES
from kalshi_platform.simulator.exchange import Exchange
from kalshi_platform.simulator.frames import rfc3339
from kalshi_platform.simulator.market import Market
from kalshi_platform.simulator.portfolio import OrderRejected


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One request: place an order, or cancel one; `replace_of` is cancelled first.

    `price` is of a YES contract, in dollars; `quote` is bid or ask.
    """

    client_order_id: str
    ticker: str
    action: str
    quote: str = "bid"
    price: str = "0"
    count: str = "0"
    replace_of: str = ""


class Answered(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a request."""

    client_order_id: str
    status: str
    """resting, canceled or rejected."""
    order_id: str = ""
    reject_reason: str = ""


class OpenOrder(msgspec.Struct, frozen=True, kw_only=True):
    """A resting order."""

    client_order_id: str
    order_id: str
    ticker: str
    quote: str
    price: str
    """Price of a YES contract."""
    remaining: str


class AccountFill(msgspec.Struct, frozen=True, kw_only=True):
    """A fill."""

    number: int
    fill_id: str
    order_id: str
    client_order_id: str
    ticker: str
    outcome_side: str
    count: str
    price: str
    """Price of the contract of `outcome_side`."""
    ts_us: int


class Top(msgspec.Struct, frozen=True, kw_only=True):
    """The best prices of a YES contract; None if there is none. `tick` at that price."""

    ticker: str
    active: bool
    bid: str | None
    ask: str | None
    tick: str


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """The account at one instant: no fill lies between two of its parts."""

    epoch: str
    """A changed id means another simulator: earlier state is void."""
    as_of: str
    tops: list[Top]
    orders: list[OpenOrder]
    positions: dict[str, str]
    fills: list[AccountFill]
    """Fills with a greater number than the requested one."""
    last_fill: int


def account(
    exchange: Exchange, *, after_fill: int, tickers: Sequence[str] = (), busiest: int = 0
) -> Account:
    """Return the current account, with the tops of `tickers`, or of the `busiest` markets that stay open."""
    markets = (
        [found for ticker in tickers if (found := exchange.market(ticker)) is not None]
        if tickers
        else _busiest(exchange, busiest)
    )
    portfolio = exchange.portfolio
    return Account(
        epoch=portfolio.epoch,
        as_of=rfc3339(exchange.now_ns // 1000),
        tops=[_top(listed) for listed in markets],
        orders=[
            OpenOrder(
                client_order_id=order.client_order_id,
                order_id=order.order_id,
                ticker=order.market.ticker,
                quote="bid" if order.side == YES else "ask",
                price=dollars(_yes_price(order.market, order.side, order.level)),
                remaining=contracts(order.remaining),
            )
            for order in portfolio.orders()
        ],
        positions={
            ticker: contracts(held.position) for ticker, held in portfolio.holdings().items()
        },
        fills=[
            AccountFill(
                number=fill.number,
                fill_id=fill.fill_id,
                order_id=fill.order.order_id,
                client_order_id=fill.order.client_order_id,
                ticker=fill.order.market.ticker,
                outcome_side="yes" if fill.order.side == YES else "no",
                count=contracts(fill.qty),
                price=fill.order.market.listing.grid.texts[fill.order.level],
                ts_us=fill.ts_us,
            )
            for fill in portfolio.fills_after(after_fill)
        ],
        last_fill=len(portfolio.fills),
    )


def execute(exchange: Exchange, requests: Sequence[Request], now_ns: int) -> list[Answered]:
    """Execute the requests in order. A failed one is answered with the reason."""
    return [_execute(exchange, request, now_ns) for request in requests]


def _execute(exchange: Exchange, request: Request, now_ns: int) -> Answered:
    name = request.client_order_id
    try:
        if request.action == "cancel":
            order = exchange.portfolio.cancel(name, now_ns)
            return Answered(client_order_id=name, status="canceled", order_id=order.order_id)
        if request.action != "place" or request.quote not in {"bid", "ask"}:
            raise OrderRejected("unknown_action")
        if request.replace_of:
            exchange.portfolio.cancel(request.replace_of, now_ns)
        market = exchange.market(request.ticker)
        if market is None:
            raise OrderRejected("market_not_found")
        side = YES if request.quote == "bid" else NO
        try:
            yes, qty = price_units(request.price), qty_units(request.count)
        except ValueError:
            raise OrderRejected("invalid_number") from None
        price = yes if side == YES else ONE_DOLLAR - yes
        order = exchange.portfolio.place(
            market, side=side, price=price, qty=qty, client_order_id=name, at_ns=now_ns
        )
    except OrderRejected as rejected:
        return Answered(client_order_id=name, status="rejected", reject_reason=str(rejected))
    return Answered(client_order_id=name, status="resting", order_id=order.order_id)


def _busiest(exchange: Exchange, count: int) -> list[Market]:
    lasting = [
        listed
        for listed in exchange.markets()
        if not listed.listing.rolling
        and listed.status == life.ACTIVE
        and len(listed.listing.sides) == 2
    ]
    return sorted(lasting, key=lambda listed: (-listed.listing.weight, listed.ticker))[:count]


def _yes_price(market: Market, side: int, level: int) -> int:
    price = market.listing.grid.prices[level]
    return price if side == YES else ONE_DOLLAR - price


def _top(market: Market) -> Top:
    yes, no = market.book.best
    prices = market.listing.grid.prices
    at = max(yes, 0)
    tick = prices[min(at + 1, len(prices) - 1)] - prices[min(at, len(prices) - 2)]
    return Top(
        ticker=market.ticker,
        active=market.status == life.ACTIVE and not market.halted,
        bid=dollars(prices[yes]) if yes >= 0 else None,
        ask=dollars(_yes_price(market, NO, no)) if no >= 0 else None,
        tick=dollars(tick),
    )

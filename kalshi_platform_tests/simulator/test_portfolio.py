"""The simulator's account: own orders in the public book, filled by takers only, to the last unit."""

from __future__ import annotations

import random

import pytest

from kalshi_platform.simulator.book import NO, YES
from kalshi_platform.simulator.exchange import Exchange
from kalshi_platform.simulator.frames import Cleared, Delta
from kalshi_platform.simulator.portfolio import OrderRejected

SECOND = 1_000_000_000
START = 1_790_000_000 * SECOND


def exchange(rate: float = 500.0, seed: int = 1, rolling: int = 0) -> Exchange:
    return Exchange(
        markets=3, rate=rate, seed=seed, now_ns=START, rolling_markets=rolling, rolling_seconds=20.0
    )


@pytest.mark.parametrize("seed", range(3))
def test_own_orders_rest_publicly_and_are_filled_by_takers(seed: int) -> None:
    venue = exchange(seed=seed)
    rng = random.Random(seed)
    books = {
        ticker: {"yes": dict(view.yes), "no": dict(view.no)}
        for ticker, view in venue.books().items()
    }
    placed = cancelled = 0
    now = START
    for number in range(2_000):
        now += SECOND // 50
        happened = venue.advance(now)
        market = rng.choice(list(venue.markets()))
        side = rng.choice((YES, NO))
        level = max(market.book.room(side) - rng.randrange(4), 0)
        price, qty = market.listing.grid.prices[level], rng.randrange(1, 2_000)
        try:
            venue.portfolio.place(
                market, side=side, price=price, qty=qty, client_order_id=str(number), at_ns=now
            )
            placed += qty
        except OrderRejected as rejected:
            assert str(rejected) == "post_only_cross"
        if (resting := venue.portfolio.orders()) and rng.random() < 0.8:
            gone = venue.portfolio.cancel(rng.choice(resting).client_order_id, now)
            cancelled += gone.remaining
        for delta in [*happened, *venue.happened()]:
            if isinstance(delta, Delta):
                ladder = books[delta.market.ticker]["yes" if delta.side == YES else "no"]
                at = delta.market.listing.grid.prices[delta.level]
                ladder[at] = ladder.get(at, 0) + delta.qty
                if not ladder[at]:
                    del ladder[at]
        for order in venue.portfolio.orders():
            assert order.market.book.sizes[order.side][order.level] >= order.remaining
    for ticker, view in venue.books().items():
        assert books[ticker] == {"yes": dict(view.yes), "no": dict(view.no)}
    filled = sum(fill.qty for fill in venue.portfolio.fills)
    assert filled > 0
    assert placed == filled + cancelled + sum(o.remaining for o in venue.portfolio.orders())
    positions: dict[str, int] = {}
    for fill in venue.portfolio.fills:
        ticker = fill.order.market.ticker
        positions[ticker] = positions.get(ticker, 0) + fill.signed
    held = {ticker: each.position for ticker, each in venue.portfolio.holdings().items()}
    assert held == {ticker: position for ticker, position in positions.items() if position}


def test_a_close_cancels_own_orders_and_settlement_pays() -> None:
    venue = exchange(rate=200.0, rolling=3)
    market = next(market for market in venue.markets() if market.status == "active")
    for number in range(400):
        venue.advance(START + number * SECOND // 100)
        level = market.book.room(YES)
        try:
            venue.portfolio.place(
                market, side=YES, price=market.listing.grid.prices[level], qty=100,
                client_order_id=str(number), at_ns=venue.now_ns,
            )  # fmt: skip
        except OrderRejected:
            break  # it has closed
    assert venue.portfolio.fills
    happened = venue.advance(START + 60 * SECOND)
    assert any(isinstance(event, Cleared) for event in happened)
    assert [order for order in venue.portfolio.orders() if order.market is market] == []
    (settled,) = (
        settlement for settlement in venue.portfolio.settled if settlement.market is market
    )
    assert settled.holding.position == sum(
        fill.signed for fill in venue.portfolio.fills if fill.order.market is market
    )
    assert market.ticker not in venue.portfolio.holdings()
    assert settled.texts()["market_result"] == market.result


def test_what_cannot_rest_is_refused_with_the_reason() -> None:
    venue = exchange(rate=0.0)
    market = next(iter(venue.markets()))
    price = market.listing.grid.prices[0]

    def place(name: str, price: int = price, qty: int = 100) -> str:
        try:
            venue.portfolio.place(
                market, side=YES, price=price, qty=qty, client_order_id=name, at_ns=START
            )
        except OrderRejected as rejected:
            return str(rejected)
        return "resting"

    assert place("a") == "resting"
    assert place("a") == "client_order_id_not_new"
    assert place("b", qty=0) == "invalid_count"
    assert place("c", price=price + 1) == "invalid_price"
    assert place("d", price=market.listing.grid.prices[-1]) == "post_only_cross"
    with pytest.raises(OrderRejected, match="order_not_found"):
        venue.portfolio.cancel("z", START)
    market.status = "closed"
    assert place("e") == "market_not_active"


def test_an_account_without_orders_does_not_change_order_flow() -> None:
    quiet, busy = exchange(seed=7), exchange(seed=7)
    market = next(iter(busy.markets()))
    busy.portfolio.place(
        market, side=YES, price=market.listing.grid.prices[0], qty=1, client_order_id="a",
        at_ns=START,
    )  # fmt: skip
    busy.portfolio.cancel("a", START)
    for one in (quiet, busy):
        one.advance(START + 5 * SECOND)
    assert quiet.books() == busy.books()

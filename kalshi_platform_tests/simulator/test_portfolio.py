"""The simulator's account: own orders in the public book, filled by takers only, to the last unit."""

from __future__ import annotations

import random
from collections import defaultdict
from decimal import ROUND_DOWN, Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import QueryParams

from kalshi_platform.simulator.book import NO, YES
from kalshi_platform.simulator.exchange import Exchange
from kalshi_platform.simulator.frames import Cleared, Delta
from kalshi_platform.simulator.portfolio import DEPOSIT, OrderRejected, maker_fee
from kalshi_platform.simulator.portfolio_pages import PortfolioPages
from kalshi_platform.simulator.query import Query
from kalshi_platform_tests.properties import examples

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


@examples(80)
@given(
    st.integers(0, 10_000), st.lists(st.sampled_from(["bid", "bid", "cancel", "wait"]), max_size=15)
)
def test_cash_positions_orders_and_fills_agree_at_any_time(seed: int, steps: list[str]) -> None:
    venue = exchange(rate=400.0, seed=seed, rolling=2)
    account, pages = venue.portfolio, PortfolioPages(venue)
    rng = random.Random(seed)

    def page(name: str, **params: str) -> Any:
        query = Query(QueryParams({"limit": "1000", **params}), {})
        answer = getattr(pages, name)(query)
        query.refuse_unread()
        return answer[name if name != "positions" else "market_positions"]

    for number, step in enumerate(["bid", *steps, "wait", "wait"]):
        market = rng.choice(list(venue.markets()))
        side = rng.choice((YES, NO))
        level = market.book.best[side]
        if step == "bid" and market.status == "active" and 0 <= level <= market.book.room(side):
            account.place(
                market,
                side=side,
                price=market.listing.grid.prices[level],
                qty=rng.randrange(1, 3_000),
                client_order_id=str(number),
                at_ns=venue.now_ns,
            )
        elif step == "cancel" and account.orders():
            account.cancel(rng.choice(account.orders()).client_order_id, venue.now_ns)
        venue.advance(venue.now_ns + (5 * SECOND if step == "wait" else SECOND // 10))

        fills, settlements = page("fills"), page("settlements")
        orders = {order["order_id"]: order for order in page("orders")}
        positions = {held["ticker"]: held for held in page("positions", settlement_status="all")}
        cash = Decimal(100_000)
        held: defaultdict[str, Decimal] = defaultdict(Decimal)
        filled: defaultdict[str, Decimal] = defaultdict(Decimal)
        for fill in reversed(fills):
            count, fee = Decimal(fill["count_fp"]), Decimal(fill["fee_cost"])
            cash -= count * Decimal(fill[f"{fill['outcome_side']}_price_dollars"]) + fee
            signed = count if fill["outcome_side"] == "yes" else -count
            before, after = held[fill["ticker"]], held[fill["ticker"]] + signed
            cash += (abs(before) + count - abs(after)) / 2  # a dollar for each pair
            held[fill["ticker"]] = after
            filled[fill["order_id"]] += count
        for settled in settlements:
            cash += Decimal(settled["revenue"]) / 100
            counts = Decimal(settled["yes_count_fp"]), Decimal(settled["no_count_fp"])
            assert held[settled["ticker"]] == counts[0] - counts[1]
            held[settled["ticker"]] = Decimal(0)

        balance = pages.balance(Query(QueryParams(), {}))
        assert isinstance(balance, dict)
        assert account.cash == cash * 1_000_000
        assert Decimal(balance["balance_dollars"]) == cash.quantize(Decimal("0.0001"), ROUND_DOWN)
        assert balance["balance"] == int(cash * 100)
        assert {ticker: Decimal(one["position_fp"]) for ticker, one in positions.items()} == held
        total = {
            name: sum((Decimal(one[name]) for one in positions.values()), Decimal(0))
            for name in ("market_exposure_dollars", "realized_pnl_dollars", "fees_paid_dollars")
        }
        exposure, profit, fees = total.values()
        assert cash + exposure == 100_000 + profit - fees
        assert fees == sum(Decimal(fill["fee_cost"]) for fill in fills)
        for order_id, order in orders.items():
            assert Decimal(order["fill_count_fp"]) == filled[order_id]
            remaining = Decimal(order["initial_count_fp"]) - filled[order_id]
            gone = order["status"] == "canceled"
            assert Decimal(order["remaining_count_fp"]) == (0 if gone else remaining)
            assert order["status"] != "resting" or remaining
            assert order["status"] != "executed" or not remaining
        assert {order["order_id"] for order in page("orders", status="resting")} == {
            order.order_id for order in account.orders()
        }


@pytest.mark.parametrize(
    ("series", "price", "qty", "fee"),
    [
        ("KXHIGHNY", 5_200, 100, 4_400),  # 0.0175 x 1 x 0.52 x 0.48 = 0.004368, rounded up
        ("KXHIGHNY", 5_000, 400, 17_500),
        ("KXHIGHNY", 9_900, 1, 100),
        ("KXFED", 5_200, 100, 0),
    ],
)
def test_a_makers_fee_is_rounded_up_to_a_hundredth_of_a_cent(
    series: str, price: int, qty: int, fee: int
) -> None:
    market = next(m for m in exchange().markets() if m.listing.series_ticker == series)
    assert maker_fee(market, price, qty) == fee


def test_an_order_beyond_the_balance_is_refused() -> None:
    venue = exchange(rate=0.0)
    market = next(iter(venue.markets()))
    price = market.listing.grid.prices[market.book.room(YES)]

    def place(name: str, qty: int) -> None:
        venue.portfolio.place(
            market, side=YES, price=price, qty=qty, client_order_id=name, at_ns=START
        )

    most = DEPOSIT // price
    place("a", most - 100)
    with pytest.raises(OrderRejected, match="insufficient_balance"):
        place("b", 101)
    place("c", 100)


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

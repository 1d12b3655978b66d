"""An order is live until its end is known, and every contract of it is accounted for once."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.engine import (
    BadValue,
    Contract,
    LiveOrder,
    LiveOrders,
    OrderStatus,
    Quote,
    Reconciled,
    Sent,
    inventory,
    sign,
)

AT = datetime(2026, 11, 22, 12, tzinfo=UTC)
SIZE = Decimal(10)


def sent(name: str, ticker: str = "T") -> Sent:
    return Sent(uuid.uuid4(), AT, ticker, name)


def placed(orders: LiveOrders, name: str = "o", replaces: str = "") -> LiveOrder:
    return orders.placed(sent(name), Contract.YES, Quote.BID, SIZE, replaces=replaces)


def sizes(orders: LiveOrders) -> dict[str, Decimal]:
    return {order.client_order_id: order.remaining for order in orders.working("T")}


def test_an_order_is_live_from_the_moment_it_is_sent() -> None:
    orders = LiveOrders()
    placed(orders)
    assert sizes(orders) == {"o": SIZE}
    assert orders.working("another") == []
    assert orders.heard("o", "resting").status is OrderStatus.RESTING
    assert sizes(orders) == {"o": SIZE}


@pytest.mark.parametrize(
    "end", [status for status in OrderStatus if status.is_end], ids=lambda status: status.value
)
def test_an_end_takes_the_order_out_and_is_final(end: OrderStatus) -> None:
    orders = LiveOrders()
    order = placed(orders)
    assert orders.heard("o", end).sent is order.sent
    assert orders.working("T") == []
    assert orders.heard("o", end).status is end
    for status in set(OrderStatus) - {end}:
        with pytest.raises(BadValue, match=f"is {end.value}, and cannot be {status.value}"):
            orders.heard("o", status)
    with pytest.raises(BadValue, match="was sent before"):
        placed(orders)


def test_fills_move_remaining_and_status() -> None:
    orders = LiveOrders()
    placed(orders)
    assert orders.filled("o", Decimal("2.5")).status is OrderStatus.PARTIALLY_FILLED
    assert orders.heard("o", "resting").status is OrderStatus.PARTIALLY_FILLED
    assert sizes(orders) == {"o": Decimal("7.5")}
    with pytest.raises(BadValue, match="booked twice"):
        orders.filled("o", Decimal(8))
    assert orders.filled("o", Decimal("7.5")).status is OrderStatus.EXECUTED
    assert sizes(orders) == {}


def test_a_fill_that_a_cancel_overtook_is_taken_once() -> None:
    orders = LiveOrders()
    placed(orders)
    orders.heard("o", "canceled")
    late = orders.filled("o", Decimal(4))
    assert late.status is OrderStatus.CANCELED
    assert late.remaining == 6
    assert sizes(orders) == {}
    with pytest.raises(BadValue, match="6 remain"):
        orders.filled("o", Decimal(7))


def test_a_replaced_order_is_live_until_the_new_one_is_acked() -> None:
    orders = LiveOrders()
    placed(orders, "old")
    placed(orders, "new", replaces="old")
    assert set(sizes(orders)) == {"old", "new"}
    orders.heard("new", "resting")
    assert set(sizes(orders)) == {"new"}
    placed(orders, "newer", replaces="new")
    orders.heard("newer", "rejected")
    assert set(sizes(orders)) == {"new"}


def test_a_decrease_keeps_the_order_and_never_adds() -> None:
    orders = LiveOrders()
    placed(orders)
    orders.heard("o", "resting")
    assert orders.decreased("o", Decimal(3)).remaining == 3
    with pytest.raises(BadValue, match="cannot be decreased to 4"):
        orders.decreased("o", Decimal(4))
    assert sizes(orders) == {"o": Decimal(3)}


def test_a_settlement_takes_all_orders_of_the_market_out() -> None:
    orders = LiveOrders()
    placed(orders, "a")
    orders.placed(sent("b", "another"), Contract.YES, Quote.BID, SIZE)
    assert [order.sent.client_order_id for order in orders.settled("T")] == ["a"]
    assert orders.working("T") == []
    assert len(orders.working("another")) == 1


STEPS = st.lists(
    st.tuples(st.sampled_from(["resting", "canceled", "expired", "fill"]), st.integers(1, 600)),
    max_size=12,
)


@given(STEPS, st.sampled_from(Contract), st.sampled_from(Quote))
def test_position_and_exposure_account_for_every_contract(
    steps: list[tuple[str, int]], contract: Contract, quote: Quote
) -> None:
    orders = LiveOrders()
    orders.placed(sent("o"), contract, quote, SIZE)
    held = Reconciled.from_exchange("T", "0", AT)
    outcome = Contract.YES if sign(quote, contract) > 0 else Contract.NO
    taken_away = Decimal(0)
    for what, hundredths in steps:
        size = Decimal(hundredths) / 100
        try:
            order = orders.filled("o", size) if what == "fill" else orders.heard("o", what)
        except BadValue:
            continue
        if what == "fill":
            held = held.filled(outcome, size, AT)
        taken_away = Decimal(0) if order.is_live else order.remaining
    total = inventory(held, orders.working("T")).pos_total_est
    assert total == sign(quote, contract) * (SIZE - taken_away)

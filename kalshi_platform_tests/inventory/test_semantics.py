"""Positions mean what they say, and an estimate cannot become one."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.inventory.semantics import (
    Contract,
    InventoryError,
    Quote,
    Reconciled,
    WorkingOrder,
    inventory,
    resting,
    sign,
)

AT = datetime(2026, 11, 22, tzinfo=UTC)
SIZES = st.decimals(min_value="0.01", max_value="1000000", places=2)


def order(name: str, contract: Contract, quote: Quote, size: str | Decimal) -> WorkingOrder:
    return WorkingOrder(name, contract, quote, Decimal(size))


def test_resting_inventory_is_summed_by_side_and_signed() -> None:
    found = resting(
        [
            order("a", Contract.YES, Quote.BID, "10"),
            order("b", Contract.YES, Quote.BID, "0.25"),
            order("c", Contract.YES, Quote.ASK, "4"),
            order("d", Contract.NO, Quote.BID, "3"),
            order("e", Contract.NO, Quote.ASK, "1"),
        ]
    )
    assert found.open_orders_count == 5
    assert (found.open_yes_bid_size, found.open_yes_ask_size) == (Decimal("10.25"), Decimal(4))
    assert (found.open_no_bid_size, found.open_no_ask_size) == (Decimal(3), Decimal(1))
    assert found.exposure == Decimal("10.25") - 4 - 3 + 1


@given(
    st.sampled_from(Contract), st.sampled_from(Quote), SIZES, SIZES, st.integers(-(10**6), 10**6)
)
def test_a_fill_moves_the_position_and_leaves_the_total_as_it_is(
    contract: Contract, quote: Quote, part: Decimal, rest: Decimal, held: int
) -> None:
    before = inventory(
        Reconciled.from_exchange("T", str(held), AT), [order("a", contract, quote, part + rest)]
    )
    outcome = Contract.YES if sign(quote, contract) > 0 else Contract.NO
    after = inventory(
        before.position.filled(outcome, part, AT), [order("a", contract, quote, rest)]
    )
    assert after.pos_filled != before.pos_filled
    assert after.pos_total_est == before.pos_total_est


def test_only_the_exchange_makes_a_position() -> None:
    with pytest.raises(InventoryError, match="comes from the exchange"):
        Reconciled()
    held = Reconciled.from_exchange("T", "-12.50", AT)
    with pytest.raises(InventoryError, match="does not change"):
        held.position = Decimal(5)
    assert held.position == Decimal("-12.50")


@pytest.mark.parametrize("text", ["", "nan", "Infinity", "12 contracts"])
def test_what_is_no_number_is_no_position(text: str) -> None:
    with pytest.raises(InventoryError, match="no number of contracts"):
        Reconciled.from_exchange("T", text, AT)
    with pytest.raises(InventoryError, match="without a zone"):
        Reconciled.from_exchange("T", "1", AT.replace(tzinfo=None))


def test_finished_and_doubled_orders_are_refused() -> None:
    with pytest.raises(InventoryError, match="Leave finished orders out"):
        order("a", Contract.YES, Quote.BID, "0")
    twice = [order("a", Contract.YES, Quote.BID, "1")] * 2
    with pytest.raises(InventoryError, match="given twice"):
        resting(twice)


@given(st.lists(st.tuples(st.sampled_from(Contract), SIZES), max_size=10), st.integers(-50, 50))
def test_fills_of_both_sides_are_netted_in_any_order(
    fills: list[tuple[Contract, Decimal]], begin: int
) -> None:
    held = Reconciled.from_exchange("T", str(begin), AT)
    for contract, size in fills:
        before, pairs = held, held.netted(contract, size)
        held = held.filled(contract, size, AT)
        assert 0 <= pairs <= min(size, abs(before.position))
        assert abs(held.position) == abs(before.position) + size - 2 * pairs
    yes = sum((size for contract, size in fills if contract is Contract.YES), Decimal(0))
    no = sum((size for contract, size in fills if contract is Contract.NO), Decimal(0))
    assert held.position == begin + yes - no
    assert held.convention == "yes_positive"
    assert held.settled(AT).position == 0


@pytest.mark.parametrize(
    ("posts", "convention"),
    [
        ([None, None], "yes_positive"),
        (["3.00", "4.00"], "yes_positive"),
        (["7.00", "2.00"], "no_positive"),
        (["3.00", "2.00"], "mixed"),
        (["9.00", None], "yes_positive"),  # a fill between was missed: it says nothing of signs
    ],
)
def test_the_convention_is_that_of_the_fills(posts: list[str | None], convention: str) -> None:
    held = Reconciled.from_exchange("T", "5.00", AT)
    assert held.convention == "yes_positive"
    held = held.filled(Contract.NO, Decimal(2), AT, post_position_fp=posts[0])
    held = held.filled(Contract.YES, Decimal(1), AT, post_position_fp=posts[1])
    assert held.position == 4
    assert held.convention == convention
    assert held.settled(AT).convention == convention


@pytest.mark.parametrize("size", ["NaN", "sNaN", "Infinity", "-1", "0"])
def test_no_size_is_impossible(size: str) -> None:
    held = Reconciled.from_exchange("T", "0", AT)
    with pytest.raises(ValueError, match="count is"):
        held.filled(Contract.YES, Decimal(size), AT)
    with pytest.raises(ValueError, match="remaining"):
        WorkingOrder("o", Contract.YES, Quote.BID, Decimal(size))


@pytest.mark.parametrize("side", ["yes", "bid", "YES", None, 1, True])
def test_a_side_is_an_enums_member_and_nothing_else(side: Any) -> None:
    held = Reconciled.from_exchange("T", "0", AT)
    with pytest.raises(TypeError, match="contract is"):
        held.filled(side, Decimal(1), AT)
    with pytest.raises(TypeError, match="contract is"):
        WorkingOrder("o", side, Quote.BID, Decimal(1))
    with pytest.raises(TypeError, match="quote is"):
        WorkingOrder("o", Contract.YES, side, Decimal(1))
    with pytest.raises(TypeError, match="quote is"):
        sign(side, Contract.YES)

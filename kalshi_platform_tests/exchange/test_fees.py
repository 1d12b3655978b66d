"""The fee of a fill: the observed one, the same for both sides, rounded up, and refused where it is not known."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.exchange.fees import FEE_UNIT, trade_fee

PRICES = st.integers(0, 10_000).map(lambda units: Decimal(units) / 10_000)
SIZES = st.integers(0, 10**9).map(lambda units: Decimal(units) / 100)


def test_a_fill_that_was_observed_costs_what_the_exchange_charged() -> None:
    assert trade_fee(Decimal("0.52"), Decimal(1)) == Decimal("0.0175")  # of 0.017472


@given(price=PRICES, size=SIZES)
def test_a_fee_is_that_of_the_other_side_and_rounded_up_once(price: Decimal, size: Decimal) -> None:
    fee = trade_fee(price, size)
    assert fee == trade_fee(1 - price, size)
    exact = Decimal("0.07") * size * price * (1 - price)
    assert exact <= fee < exact + FEE_UNIT
    assert trade_fee(price, size, taker=False) == 0
    makers = trade_fee(price, size, taker=False, fee_type="quadratic_with_maker_fees")
    assert makers <= fee


def test_an_unknown_fee_type_and_an_impossible_price_are_refused() -> None:
    with pytest.raises(ValueError, match="'flat' is none of"):
        trade_fee(Decimal("0.5"), Decimal(1), fee_type="flat")
    with pytest.raises(ValueError, match="outside 0 to 1 dollar"):
        trade_fee(Decimal("1.5"), Decimal(1))

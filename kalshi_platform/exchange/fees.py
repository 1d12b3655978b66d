"""The exchange's trading fees, exactly.

A series has a fee type and a multiplier. `quadratic` series charge the taker alone, `quadratic_with_maker_fees` the maker
too, at a quarter of the taker's rate. The fee of a fill is rate * multiplier * contracts * price * (1 - price), rounded
up to 1e-4 dollars. The rates are those of the exchange's fee schedule; a fill's own `fee_cost` is what was paid.
"""

from __future__ import annotations

from decimal import ROUND_CEILING, Decimal

TAKER_RATE = Decimal("0.07")
MAKER_RATE = Decimal("0.0175")
FEE_UNIT = Decimal("0.0001")
MAKERS_PAY = frozenset({"quadratic_with_maker_fees"})
FEE_TYPES = frozenset({"quadratic", *MAKERS_PAY})
"""The fee types that are computed here."""


def trade_fee(
    price: Decimal,
    contracts: Decimal,
    *,
    taker: bool = True,
    fee_type: str = "quadratic",
    multiplier: Decimal = Decimal(1),
) -> Decimal:
    """Compute the fee of a fill.

    Args:
        price: Dollars for a contract, of either side: the fee is the same for YES at p and NO at 1 - p.
        contracts: How many.
        taker: Whether it is the taker's fee.
        fee_type: The series' fee type.
        multiplier: The series' fee multiplier.

    Returns:
        Dollars, rounded up to 1e-4.

    Raises:
        ValueError: The fee type is not one of `FEE_TYPES`, or the price is outside 0 to 1 dollar.
    """
    if fee_type not in FEE_TYPES:
        raise ValueError(f"the fee type {fee_type!r} is none of {', '.join(sorted(FEE_TYPES))}")
    if not 0 <= price <= 1:
        raise ValueError(f"the price {price} is outside 0 to 1 dollar")
    if not taker and fee_type not in MAKERS_PAY:
        return Decimal(0)
    rate = TAKER_RATE if taker else MAKER_RATE
    fee = rate * multiplier * contracts * price * (1 - price)
    return fee.quantize(FEE_UNIT, ROUND_CEILING)

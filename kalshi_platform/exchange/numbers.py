"""Exact numbers: prices as integers of 1e-4 dollars, quantities as integers of 1e-2 contracts.

No float touches a price or a size. Both wire forms are converted here: fixed-point strings such as
"0.0800" and "300.00", and the integer cents and whole contracts from before March 2026. Conversion of
whole columns belongs in `columnar`.
"""

from __future__ import annotations

import re
from decimal import Decimal

PRICE_SCALE = 4
QTY_SCALE = 2
ONE_DOLLAR = 10**PRICE_SCALE
MOST_QTY = 10**11
"""A billion contracts, in 1e-2 contracts: more than any level or change has. Below it, the notional of a book fits
its column."""
_DECIMAL = re.compile(r"-?[0-9]{1,14}(\.[0-9]{1,12})?")
"""Wider than any price or size. `Decimal` alone would accept 1e999999999 and take a minute for it."""


def fixed_point(text: str, scale: int) -> int:
    """`text` as an integer count of 10**-scale units. Raises: ValueError where that is not exact."""
    if not _DECIMAL.fullmatch(text):
        raise ValueError(f"{text[:40]!r} is not a decimal number, or out of all proportion")
    scaled = Decimal(text).scaleb(scale)
    units = int(scaled)
    if units != scaled:
        raise ValueError(f"{text!r} has more than {scale} decimals")
    return units


def price_units(dollars: str) -> int:
    """Dollars ("0.0800") to 1e-4 dollars (800)."""
    return fixed_point(dollars, PRICE_SCALE)


def qty_units(contracts: str) -> int:
    """Contracts ("300.00") to 1e-2 contracts (30000)."""
    return fixed_point(contracts, QTY_SCALE)


def cents_units(whole: int) -> int:
    """Cents or whole contracts (the wire's integers from before March 2026) to units: a hundred of either."""
    if abs(whole) >= 10**14:
        raise ValueError(f"{whole:.3e} is out of all proportion")
    return whole * 100


def dollars(price: int) -> str:
    """1e-4 dollars (800) to the wire's text ("0.0800")."""
    sign = "-" if price < 0 else ""
    return f"{sign}{abs(price) // ONE_DOLLAR}.{abs(price) % ONE_DOLLAR:04d}"


def contracts(qty: int) -> str:
    """1e-2 contracts (30000) to the wire's text ("300.00")."""
    sign = "-" if qty < 0 else ""
    return f"{sign}{abs(qty) // 100}.{abs(qty) % 100:02d}"

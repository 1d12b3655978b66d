"""The datasets that are computed from an hour's books, each with its function."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from kalshi_platform.analytics.books import Books
from kalshi_platform.analytics.depth import depth
from kalshi_platform.analytics.imbalance import imbalance
from kalshi_platform.analytics.spreads import spreads
from kalshi_platform.schema import DEPTH, IMBALANCE, SPREADS

COMPUTED: dict[str, Callable[[Books], pa.Table]] = {
    SPREADS.name: spreads,
    DEPTH.name: depth,
    IMBALANCE.name: imbalance,
}

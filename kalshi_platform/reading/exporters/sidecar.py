"""The JSON file beside exported data: what the files cannot say themselves, and the rules by which they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl

from kalshi_platform import __version__, durable
from kalshi_platform.exchange import fees
from kalshi_platform.reading.archive import Archive
from kalshi_platform.reading.arguments import PRICE_UNIT
from kalshi_platform.reading.exporters.levels import EXCHANGE_TIME_RULE

NO_TERMS = "not in this archive: the asset `market_catalog` records them"
CENT = 100
"""In 1e-4 dollars."""


@dataclass(frozen=True)
class Terms:
    """A market's terms, as the archive read them last; they may have been read after the span."""

    ticker: str
    row: Mapping[str, Any]
    """The market's row of `market_catalog`; empty where the archive has none."""

    @property
    def tick(self) -> int:
        """The smallest step of the price grid in 1e-4 dollars; a cent where the archive has no terms."""
        ranges = self.row.get("price_ranges") or ()
        return min((int(grid["step"] / PRICE_UNIT) for grid in ranges), default=CENT)


def terms_of(archive: Archive, ticker: str) -> Terms:
    """Read a market's terms."""
    rows = archive.markets(ticker).filter(pl.col("market_ticker") == ticker).to_dicts()
    return Terms(ticker, rows[0] if rows else {})


def write(
    path: Path,
    archive: Archive,
    terms: Terms,
    span: tuple[datetime, datetime],
    files: Sequence[Mapping[str, Any]],
    **more: Any,
) -> None:
    """Write the sidecar: span, files, gaps, terms, fees and result, and what `more` names."""
    covered = archive.coverage(terms.ticker, *span)
    gaps = covered.filter(pl.col("condition") != "synced").drop("market_ticker")
    result = {name: terms.row.get(name) for name in ("result", "settlement_value", "settlement_ts")}
    content = {
        "ticker": terms.ticker,
        "written_by": f"kalshi_platform {__version__}",
        "from": span[0],
        "to": span[1],
        "files": list(files),
        "gaps": gaps.to_dicts(),
        "terms": dict(terms.row) or NO_TERMS,
        "fees": {
            "rule": "rate * multiplier * contracts * price * (1 - price) of a fill, rounded up to the unit, in dollars",
            "taker_rate": fees.TAKER_RATE,
            "maker_rate": fees.MAKER_RATE,
            "makers_pay": sorted(fees.MAKERS_PAY),
            "unit": fees.FEE_UNIT,
            "function": "kalshi_platform.exchange.fees.trade_fee",
        },
        "result": result if terms.row else NO_TERMS,
        "exchange_time": EXCHANGE_TIME_RULE,
        "stale": "The book is cleared from where it is stale to its next snapshot; trades are kept.",
        **more,
    }
    durable.replace(path, json.dumps(content, indent=1, default=_plain).encode())


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TypeError(f"{value!r} cannot be written as JSON")

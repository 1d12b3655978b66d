"""What callers of the reader pass: each argument is checked here, and refused in a sentence with its remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from kalshi_platform.errors import RequestRefused

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
PRICE_UNIT, QTY_UNIT = Decimal(1).scaleb(-4), Decimal(1).scaleb(-2)
"""Dollars and contracts of one unit in exact integers."""
MOST_ROWS = 20_000_000
"""Rows that one sampled table may have: more is a mistake, or takes all memory."""
_EXAMPLE = "'KXFED-27-T0.5'"
_STEP = re.compile(r"([0-9]{1,9})(us|ms|s|m|h|d)")
_UNITS = {
    "us": MICROSECOND,
    "ms": timedelta(milliseconds=1),
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
}


def ticker_of(value: object) -> str:
    """Check one ticker. Raises: `RequestRefused`."""
    if not isinstance(value, str) or not value:
        raise RequestRefused(
            f"{_shown(value)} is not a ticker. Give a market's ticker as text, such as {_EXAMPLE}."
        )
    return value


def tickers_of(value: object) -> list[str]:
    """Check one ticker or several; each comes once, in the order given. Raises: `RequestRefused`."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return [ticker_of(value)]
    tickers = list(dict.fromkeys(ticker_of(one) for one in value))
    if not tickers:
        raise RequestRefused(
            f"The list of tickers is empty. Give at least one, such as {_EXAMPLE}."
        )
    return tickers


def instant(name: str, value: object) -> datetime:
    """Check an instant, and convert it to UTC. Raises: `RequestRefused`."""
    example = "datetime(2026, 11, 22, 14, tzinfo=UTC)"
    if not isinstance(value, datetime):
        raise RequestRefused(
            f"{name} is {_shown(value)}, not an instant. Give a datetime with a time zone, such as {example}."
        )
    if value.tzinfo is None:
        raise RequestRefused(
            f"{name} is {value}, without a time zone. Add one, as in {example}: the archive is in UTC."
        )
    return value.astimezone(UTC)


def span(start: object, end: object) -> tuple[datetime, datetime]:
    """Check a span, from `start` to before `end`, and convert it to UTC. Raises: `RequestRefused`."""
    first, last = instant("start", start), instant("end", end)
    if first >= last:
        raise RequestRefused(
            f"The span ends at {last:%Y-%m-%d %H:%M:%S} and begins at {first:%Y-%m-%d %H:%M:%S}: that is empty. Give a"
            " start before the end."
        )
    return first, last


def step(value: object, start: datetime, end: datetime) -> timedelta:
    """Check the distance of samples over a span. Raises: `RequestRefused`."""
    match = _STEP.fullmatch(value) if isinstance(value, str) else None
    every = int(match[1]) * _UNITS[match[2]] if match else value
    if not isinstance(every, timedelta) or every <= timedelta():
        raise RequestRefused(
            f"every is {_shown(value)}, not a duration. Give one above zero, such as '1s', '5m', '1h' or a timedelta."
        )
    if (rows := (end - start) // every) > MOST_ROWS:
        raise RequestRefused(
            f"every is {_shown(value)}, which makes {rows:,} rows of a market; at most {MOST_ROWS:,} are made. Take a"
            " longer step or a shorter span."
        )
    return every


def microseconds_of(at: datetime) -> int:
    """Convert an instant to µs since the epoch."""
    return (at - EPOCH) // MICROSECOND


def instant_of(us: int) -> datetime:
    """Convert µs since the epoch to an instant."""
    return EPOCH + us * MICROSECOND


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Fields of a frame that its book or trade does not need: an unreadable one costs itself, never the frame.

The slow paths of the columnar decoders read them here, one by one; an unreadable field is null, and
becomes a `malformed_field` row with its wire name. Decoding in columns belongs in those decoders.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import msgspec

from kalshi_platform.exchange.book import BookError
from kalshi_platform.exchange.frames import Delta, Head
from kalshi_platform.schema import ZERO_UUID

LAST_MS = 4_102_444_800_000
"""The year 2100 in Unix milliseconds: the exchange's times are from 0 to this."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_RFC_3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?(Z|[+-][0-9]{2}:[0-9]{2})"
)

V = TypeVar("V")
T = TypeVar("T")


class OptionalFields:
    """Reads the optional fields of one frame and collects a row for each that cannot be read."""

    def __init__(self, record: Mapping[str, Any], head: Head, ticker: str) -> None:
        self._record = record
        self._head = head
        self._ticker = ticker
        self.rows: list[tuple[Any, ...]] = []

    def read(self, field: str, value: V, convert: Callable[[V], T], default: T) -> T:
        """The converted value; `default` and a `malformed_field` row where it cannot be read."""
        try:
            return convert(value)
        except BookError as error:
            detail = {"field": field, "seq": self._head.seq, "reason": str(error)}
            place = (self._record["n"], self._record["recv_ns"], self._record["conn"])
            body = msgspec.json.encode(detail).decode()
            # seq is 0: the frame's own row (delta, snapshot or trade) already counts the sequence number.
            self.rows.append((*place, self._head.sid, 0, "malformed_field", self._ticker, body))
            return default


def market_id(value: object) -> str:
    """The market's UUID, zero where none was sent. Raises: BookError."""
    if value is None or value == "":
        return ZERO_UUID
    try:
        if isinstance(value, str):
            return str(uuid.UUID(value))
    except ValueError:
        pass
    raise BookError(f"{str(value)[:40]!r} is not a UUID")


def client_order_id(value: object) -> str:
    """The id of an own order, empty where none was sent. Raises: BookError."""
    if value is None or isinstance(value, str):
        return value or ""
    raise BookError(f"{str(value)[:40]!r} is not a text")


def exchange_time(delta: Delta) -> datetime | None:
    """The exchange's time to the microsecond; from `ts_ms` where `ts` is missing. Raises: BookError."""
    ts = delta.ts
    if ts is None:
        return unix_ms(delta.ts_ms)
    if not (isinstance(ts, str) and _RFC_3339.fullmatch(ts)):
        raise BookError(f"{str(ts)[:40]!r} is not an RFC 3339 time")
    try:
        return datetime.fromisoformat(ts).astimezone(UTC)
    except (ValueError, OverflowError):
        raise BookError(f"{ts[:40]!r} is no time that there is") from None


def unix_ms(value: object) -> datetime | None:
    """Unix milliseconds as a time; None where none was sent. Raises: BookError."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise BookError(f"{str(value)[:40]!r} is not a whole number of milliseconds")
    if not 0 <= value <= LAST_MS:
        raise BookError(f"{value} is no Unix time in milliseconds")
    return _EPOCH + timedelta(milliseconds=value)


def clock(value: object) -> int | None:
    """The exchange's clock of a market; None where none was sent. Raises: BookError."""
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise BookError(f"{str(value)[:40]!r} is not a clock: a whole number from 0 on, of 64 bits")
    return value

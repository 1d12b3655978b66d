"""Decodes the items of a REST page one by one, so that an unreadable item never costs its page.

An unreadable optional field is left out of its item; an item without a required field is left out of the
page. Both are reported with ticker, field and value. Fetching pages belongs in `rest`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from kalshi_platform import typed_json
from kalshi_platform.exchange.frames import DecodeError
from kalshi_platform.printable import printable

log = logging.getLogger(__name__)

T = TypeVar("T", bound=msgspec.Struct)
SHOWN_CHARACTERS = 120
"""How many characters of a value a report shows."""


@dataclass(frozen=True)
class Unreadable:
    """An item, or a field of one, that cannot be read."""

    path: str
    ticker: str
    """The item's ticker; empty where it cannot be read."""
    field: str
    """The field's name; empty where the item is not an object."""
    value: str
    """The value as JSON, truncated; empty where a required field was not sent."""
    left_out: bool
    """Whether the whole item is left out; else only the field is."""

    def __str__(self) -> str:
        item = self.ticker or "an item without a readable ticker"
        what = (
            f"{self.field} is missing" if not self.value else f"{self.field} {self.value}".strip()
        )
        cost = "the item is left out" if self.left_out else "the rest of the item is used"
        return f"GET {self.path}: {item}: {what}{' cannot be read' if self.value else ''}; {cost}."


ReportUnreadable = Callable[[Unreadable], None]


def log_unreadable(unreadable: Unreadable) -> None:
    """Log a warning: the default way to report."""
    log.warning("%s", unreadable)


def read(raw: bytes, kind: type[T], path: str, report: ReportUnreadable) -> T | None:
    """Decode one item without its unreadable fields; None where one of them is required."""
    try:
        return typed_json.decode(raw, kind)
    except DecodeError:
        return _read_fields(raw, kind, path, report)


def _read_fields(raw: bytes, kind: type[T], path: str, report: ReportUnreadable) -> T | None:
    try:
        members = typed_json.decode(raw, dict[str, msgspec.Raw])
    except DecodeError:
        report(Unreadable(path, "", "", _printable_value(raw), left_out=True))
        return None
    ticker = _or_none(bytes(members.get("ticker", b"null")), str | None) or ""
    values: dict[str, Any] = {}
    complete = True
    for field in msgspec.structs.fields(kind):
        sent = members.get(field.encode_name)
        if sent is not None:
            try:
                values[field.name] = typed_json.decode(bytes(sent), field.type)
                continue
            except DecodeError:
                pass
        if sent is not None or field.required:
            value = "" if sent is None else _printable_value(bytes(sent))
            report(Unreadable(path, ticker, field.encode_name, value, left_out=field.required))
            complete = complete and not field.required
    return kind(**values) if complete else None


def _or_none(raw: bytes, kind: Any) -> Any:
    try:
        return typed_json.decode(raw, kind)
    except DecodeError:
        return None


def _printable_value(raw: bytes) -> str:
    return printable(raw[:SHOWN_CHARACTERS].decode(errors="replace"))

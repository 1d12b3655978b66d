"""The items of an answer, read one by one: what cannot be read costs itself, and never its page.

A field that is not needed is left out of its item; an item without a field that it needs is left out of
the page. Either is named, with its ticker, field and value.
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
SHOWN = 120
"""Characters of a value that are shown."""


@dataclass(frozen=True)
class Unreadable:
    """A part of an answer that cannot be read."""

    path: str
    ticker: str
    """Of the item; empty where that cannot be read."""
    field: str
    """Empty where the item is no object at all."""
    value: str
    """As JSON, cut; empty where a field that is needed was not sent."""
    left_out: bool
    """The whole item is left out; else the field alone is."""

    def __str__(self) -> str:
        of = self.ticker or "an item without a readable ticker"
        what = (
            f"{self.field} is missing" if not self.value else f"{self.field} {self.value}".strip()
        )
        cost = "it is left out" if self.left_out else "the rest of it is used"
        return f"GET {self.path}: {of}: {what}{' cannot be read' if self.value else ''}; {cost}."


Tell = Callable[[Unreadable], None]


def logged(found: Unreadable) -> None:
    """Say it in the log."""
    log.warning("%s", found)


def read(raw: bytes, kind: type[T], path: str, tell: Tell) -> T | None:
    """One item, without the fields that cannot be read; None where it needs one of them."""
    try:
        return typed_json.decode(raw, kind)
    except DecodeError:
        return _in_part(raw, kind, path, tell)


def _in_part(raw: bytes, kind: type[T], path: str, tell: Tell) -> T | None:
    try:
        members = typed_json.decode(raw, dict[str, msgspec.Raw])
    except DecodeError:
        tell(Unreadable(path, "", "", _shown(raw), left_out=True))
        return None
    ticker = _or_none(bytes(members.get("ticker", b"null")), str | None) or ""
    values: dict[str, Any] = {}
    whole = True
    for field in msgspec.structs.fields(kind):
        sent = members.get(field.encode_name)
        if sent is not None:
            try:
                values[field.name] = typed_json.decode(bytes(sent), field.type)
                continue
            except DecodeError:
                pass
        if sent is not None or field.required:
            value = "" if sent is None else _shown(bytes(sent))
            tell(Unreadable(path, ticker, field.encode_name, value, left_out=field.required))
            whole = whole and not field.required
    return kind(**values) if whole else None


def _or_none(raw: bytes, kind: Any) -> Any:
    try:
        return typed_json.decode(raw, kind)
    except DecodeError:
        return None


def _shown(raw: bytes) -> str:
    return printable(raw[:SHOWN].decode(errors="replace"))

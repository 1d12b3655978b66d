"""JSON to types, also from several threads at once.

msgspec looks into a type when it first meets it, runs Python code for that, and is not alone there: two
threads that meet one type for the first time at the same moment crash the process (a streamer's loads,
say, which both read their state when it starts). Here one goes first.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}
_first = threading.Lock()


def decode(text: bytes | str, kind: type[T]) -> T:
    """Decode a text. Raises `msgspec.DecodeError` for what is no JSON, or not of that type."""
    decoded: T = _decoder(kind).decode(text)
    return decoded


def convert(value: object, kind: type[T]) -> T:
    """A decoded value as that type. Raises `msgspec.ValidationError` for what does not fit."""
    _decoder(kind)  # with it, the type has been looked into
    return msgspec.convert(value, kind)


def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    decoder = _decoders.get(kind)
    if decoder is None:
        with _first:
            decoder = _decoders.setdefault(kind, msgspec.json.Decoder(kind))
    return decoder

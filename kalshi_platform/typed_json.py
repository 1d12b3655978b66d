"""Decoding of JSON to types with msgspec, safe from several threads.

Building a decoder is not thread-safe in msgspec: two threads that use a type for the first time at the same
moment crash the process (for instance two loaders that read their state when a streamer starts). So each
decoder is built once, under a lock.
"""

from __future__ import annotations

import threading
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}
_building = threading.Lock()


def decode(text: bytes | str, kind: type[T]) -> T:
    """Decode JSON to a type. Raises `msgspec.DecodeError` if it is not JSON, or not of that type."""
    decoded: T = _decoder(kind).decode(text)
    return decoded


def convert(value: object, kind: type[T]) -> T:
    """Convert decoded JSON to a type. Raises `msgspec.ValidationError` if it does not fit."""
    _decoder(kind)  # builds what msgspec knows of the type, under the lock
    return msgspec.convert(value, kind)


def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    decoder = _decoders.get(kind)
    if decoder is None:
        with _building:
            decoder = _decoders.setdefault(kind, msgspec.json.Decoder(kind))
    return decoder

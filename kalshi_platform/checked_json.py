"""Small state files that prove their own content: one JSON object whose last member is a checksum.

    {"format":2,"id":"…","epoch":5,"checksum":"0f1e2d3c4b5a6978"}

The checksum is of the bytes before it, so that members that a later version adds are covered too. What
the members mean belongs to the modules that keep the files; `format` says which version of them it is, and
a file of a later one is left as it is.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import TypeVar

import msgspec

from kalshi_platform import typed_json

T = TypeVar("T")
_SEALED = re.compile(rb'(?P<body>\{.+),"checksum":"(?P<sum>[0-9a-f]{16})"\}\s*', re.DOTALL)


class Unproved(ValueError):
    """Not the content that was written: not JSON of that type, or the checksum does not fit."""


class LaterFormat(ValueError):
    """Whole, and written by a later version of the platform; `str()` is a sentence, for people."""

    def __init__(self, path: object, found: int) -> None:
        super().__init__(
            f"{path} has format {found}: a later version wrote it. Install that version."
        )


class _Head(msgspec.Struct):
    format: int = 1


def encode(state: msgspec.Struct) -> bytes:
    """The text of a state file. The struct must have a member."""
    body = msgspec.json.encode(state).removesuffix(b"}")
    return body + b',"checksum":"' + _checksum(body) + b'"}\n'


def decode(text: bytes, kind: type[T], path: object, known: int, *, unsealed: bool = False) -> T:
    """The state of the file in `path`. `unsealed`: take also a text without a checksum, of an earlier version.

    Raises `Unproved` for anything that `encode` did not write, `LaterFormat` for a format beyond `known`.
    """
    sealed = _SEALED.fullmatch(text)
    if sealed is None and (not unsealed or b'"checksum"' in text):
        raise Unproved("it has no checksum")
    if sealed is not None and _checksum(sealed["body"]) != sealed["sum"]:
        raise Unproved("its checksum does not fit")
    try:
        # first, for a later version's members need not fit this type
        if (found := typed_json.decode(text, _Head).format) > known:
            raise LaterFormat(path, found)
        return typed_json.decode(text, kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unproved(str(error)) from None


def _checksum(body: bytes) -> bytes:
    return blake2b(body, digest_size=8).hexdigest().encode()

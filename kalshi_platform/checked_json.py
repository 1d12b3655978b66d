"""Checksummed state files: one JSON object whose last member is a checksum.

    {"format":2,"id":"…","epoch":5,"checksum":"0f1e2d3c4b5a6978"}

The checksum covers the bytes before it, and so also members that a later version adds. `format` is the
version of the file's layout; a file of a later format is refused and left as it is. What the members mean
belongs to the modules that keep the files.
"""

from __future__ import annotations

import re
from hashlib import blake2b
from typing import TypeVar

import msgspec

from kalshi_platform import typed_json

T = TypeVar("T")
_CHECKSUMMED = re.compile(rb'(?P<body>\{.+),"checksum":"(?P<sum>[0-9a-f]{16})"\}\s*', re.DOTALL)


class CorruptFile(ValueError):
    """The content is not what was written: it is not JSON of that type, or the checksum does not match."""


class LaterFormat(ValueError):
    """The file is intact but a later version of the platform wrote it; `str()` is a sentence for people."""

    def __init__(self, path: object, found: int) -> None:
        super().__init__(
            f"{path} has format {found}: a later version wrote it. Install that version."
        )


class _Head(msgspec.Struct):
    format: int = 1


def encode(state: msgspec.Struct) -> bytes:
    """Encode a state with its checksum, as the bytes of the file. The struct must have a member."""
    body = msgspec.json.encode(state).removesuffix(b"}")
    return body + b',"checksum":"' + _checksum(body) + b'"}\n'


def decode(
    text: bytes, kind: type[T], path: object, known: int, *, checksum_optional: bool = False
) -> T:
    """Decode the content of the file at `path`, whose newest known format is `known`.

    With `checksum_optional` a file without a checksum is accepted: early versions wrote none.
    Raises `CorruptFile` for anything that `encode` did not write, `LaterFormat` for a format beyond `known`.
    """
    checked = _CHECKSUMMED.fullmatch(text)
    if checked is None and (not checksum_optional or b'"checksum"' in text):
        raise CorruptFile("it has no checksum")
    if checked is not None and _checksum(checked["body"]) != checked["sum"]:
        raise CorruptFile("its checksum does not fit")
    try:
        # before the whole type is decoded, because the members of a later format need not fit it
        if (found := typed_json.decode(text, _Head).format) > known:
            raise LaterFormat(path, found)
        return typed_json.decode(text, kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptFile(str(error)) from None


def _checksum(body: bytes) -> bytes:
    return blake2b(body, digest_size=8).hexdigest().encode()

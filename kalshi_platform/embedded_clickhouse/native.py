"""The Native format for clients of a protocol version (`client_protocol_version`).

For such a client each block begins with its info, and the types of its columns are complete. The engine writes
Native for version 0 only, in which a block has no info and `DateTime('Asia/Tokyo')` is `DateTime`. So the engine is
asked for the format Buffers, which has the same bytes of each column and their number, and the rest is written here,
with the columns' names and types from DESCRIBE.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from kalshi_platform.embedded_clickhouse.answers import as_bytes

CUSTOM_SERIALIZATION = 54454
"""From this protocol version on, each column says whether it has a serialization of its own."""

_BLOCK_INFO = b"\x01\x00\x02\xff\xff\xff\xff\x00"
"""Fields 1 (no overflow rows) and 2 (no bucket), end."""
_COUNT = struct.Struct("<Q")
_HEAD = struct.Struct("<QQ")

Column = tuple[str, str]
"""Name and type."""


class Blocks:
    """Turns a stream in the format Buffers into Native blocks of a protocol version."""

    def __init__(self, columns: Sequence[Column], version: int) -> None:
        custom = b"\x00" if version >= CUSTOM_SERIALIZATION else b""
        self._begin = _BLOCK_INFO + varint(len(columns))
        self._heads = [_text(name) + _text(kind) + custom for name, kind in columns]
        self._rest = b""

    def feed(self, piece: bytes) -> bytes:
        """The blocks that are complete with this piece."""
        data = self._rest + piece if self._rest else piece
        view = memoryview(data)
        blocks: list[bytes | memoryview] = []
        used = 0
        while block := self._block(view, used):
            used, parts = block
            blocks += parts
        self._rest = data[used:]
        return b"".join(blocks)

    def finish(self) -> None:
        """Raise `ValueError` if the stream ended within a block."""
        if self._rest:
            raise ValueError("the engine's answer ends within a block")

    def _block(self, data: memoryview, at: int) -> tuple[int, list[bytes | memoryview]] | None:
        """The end of the block that begins here, and its parts; None while bytes of it are missing."""
        if len(data) < at + _HEAD.size:
            return None
        columns, rows = _HEAD.unpack_from(data, at)
        if columns != len(self._heads):
            raise ValueError(f"a block has {columns} columns, DESCRIBE has {len(self._heads)}")
        at += _HEAD.size
        parts: list[bytes | memoryview] = [self._begin, varint(rows)]
        for head in self._heads:
            if len(data) < at + _COUNT.size:
                return None
            (size,) = _COUNT.unpack_from(data, at)
            at += _COUNT.size
            if len(data) < at + size:
                return None
            parts += (head, data[at : at + size])
            at += size
        return at, parts


def varint(number: int) -> bytes:
    """A number as ClickHouse writes sizes: seven bits per byte, the lowest first."""
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def _text(value: str) -> bytes:
    encoded = as_bytes(value)
    return varint(len(encoded)) + encoded

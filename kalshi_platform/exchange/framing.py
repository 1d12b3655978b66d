"""Splits received bytes into WebSocket frames (RFC 6455, section 5.2), without I/O.

Nearly every frame of a feed is an unfragmented, unmasked message: its payload is taken here, at a fraction
of the cost of the library's parser. All other frames (pings, fragments, close, protocol errors) are passed
to the library whole. The connection itself belongs in `connection`.
"""

from __future__ import annotations

from collections.abc import Callable

_MESSAGES = (0x81, 0x82)
"""First byte of an unfragmented message: FIN, no extension, opcode text or binary."""
_MASKED = 0x80


class Framing:
    """Splits the bytes of one connection into frames; buffers an incomplete one."""

    def __init__(self, longest: int) -> None:
        """`longest`: size in bytes of the longest accepted payload."""
        self._longest = longest
        self._begun = bytearray()
        """The beginning of an incomplete frame."""
        self._size = 0
        """The size that `_begun` must reach before parsing goes on."""
        self._plain = True
        self._cutting = True

    def feed(self, data: bytes, messages: list[bytes], other: Callable[[bytes], bool]) -> None:
        """Append unfragmented messages to `messages`; pass all other frames to `other`, in order.

        `other` receives a whole frame, header included, and returns whether messages may bypass it from
        now on: not while it holds the first of several fragments, nor once the connection is closing. A
        frame that is too long or masked, which no server may send, goes to it with all data after it.
        """
        if self._begun:
            self._begun += data
            if len(self._begun) < self._size:
                return
            data = bytes(self._begun)
            self._begun.clear()
        here, end = 0, len(data)
        while self._cutting:
            size = data[here + 1] if here + 1 < end else 0
            start = here + 2
            if size == 126:
                start = here + 4
                size = int.from_bytes(data[here + 2 : start])
            elif size == 127:
                start = here + 10
                size = int.from_bytes(data[here + 2 : start])
            elif size >= _MASKED:
                size = self._longest + 1
            stop = start + size
            if start > end:
                stop = start  # the header is incomplete, so the size is not known yet
            elif size > self._longest:
                self._cutting = False
                break
            if stop > end:
                self._begun += data[here:]
                self._size = stop - here
                return
            if self._plain and data[here] in _MESSAGES:
                messages.append(data[start:stop])
            else:
                self._plain = other(data[here:stop])
            here = stop
        other(data[here:])

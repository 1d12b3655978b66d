"""Where one WebSocket frame ends and the next begins (RFC 6455, section 5.2), without I/O.

Nearly every frame of a feed is a message of one piece, unmasked, of which nothing is left to do but to
take its bytes. Those are taken here, at a fraction of what the library's parser takes for one. All
others (pings, fragments, the end, what breaks the protocol) are the library's, whole.
"""

from __future__ import annotations

from collections.abc import Callable

_MESSAGES = (0x81, 0x82)
"""First byte of a message of one piece: FIN, no extension, the opcode of a text or of binary data."""
_MASKED = 0x80


class Framing:
    """Cuts the bytes of one connection into frames; keeps what is not whole yet."""

    def __init__(self, longest: int) -> None:
        """`longest`: bytes of the longest payload that is waited for."""
        self._longest = longest
        self._begun = bytearray()
        """The beginning of a frame whose end has not come."""
        self._size = 0
        """How long `_begun` must be to be looked at again."""
        self._plain = True
        self._cutting = True

    def feed(self, data: bytes, messages: list[bytes], other: Callable[[bytes], bool]) -> None:
        """Append the messages of one piece to `messages`; hand all other frames to `other`, in order.

        `other` takes a whole frame, header included, and says whether messages may go past it from
        now on: not while it has the first of several fragments, nor once the connection is ending. A
        frame that is too long or masked, which no server may send, goes to it with all that follows.
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
                stop = start  # until then the size is not known
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

"""The WebSocket connection: dials with fresh signed headers and tracks when bytes were last received.

Reads no frame's content: what a frame means belongs in `session`.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidHandshake, InvalidStatus
from websockets.frames import DATA_OPCODES
from websockets.protocol import State

from kalshi_platform.exchange.errors import ExchangeError, Unreachable
from kalshi_platform.exchange.framing import Framing
from kalshi_platform.exchange.rest import refusal
from kalshi_platform.exchange.signing import Credentials
from kalshi_platform.loopback import is_loopback

MAX_FRAME_BYTES = 96 << 20
"""The exchange's own limit is 64 MiB; the library's default of 1 MiB would refuse wide books."""
QUEUE_FRAMES = 2048
"""Frames queued in memory for the reader before the library stops reading the socket."""
OPEN_TIMEOUT_S = 15.0
_BLANK_LINE = b"\r\n\r\n"
Deliver = Callable[[list[bytes], int], None]
"""Receives the messages of one socket read and the time of that read in ns since the epoch."""
LIVENESS_S = 30.0
"""The server pings about every 10 s: a connection without any bytes for this long is dead."""
WRITE_DELAY_MAX_S = 1.0
"""How long a write waits at most until received bytes have been read."""


class LiveConnection(ClientConnection):
    """A client connection that records when bytes of any kind, pings included, were last received."""

    last_bytes_at: float = 0.0
    """Monotonic seconds."""

    def data_received(self, data: bytes) -> None:
        """Note the time, then let the library read what came.

        Args:
            data: What one read of the socket gave.
        """
        self.last_bytes_at = time.monotonic()
        super().data_received(data)

    @property
    def silent_s(self) -> float:
        """Seconds since the last bytes came."""
        return time.monotonic() - self.last_bytes_at

    @property
    def has_unread_bytes(self) -> bool:
        """Whether received bytes, or the peer's end of stream, have not been read yet.

        After the process was suspended, timers run before the socket is read.
        """
        fd = self.transport.get_extra_info("socket").fileno()
        if fd < 0:
            return False
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(0))


class BatchedConnection(LiveConnection):
    """Delivers the messages of one socket read together, with the time of that read.

    It does not support `recv`, whose queue and coroutine per message cost as much as the library's
    parser. The parser itself is bypassed for unfragmented messages (see `framing`).
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        """Make a connection of the library; its arguments are passed on.

        Args:
            *args: The library's own.
            **options: The library's own.
        """
        super().__init__(*args, **options)
        self._deliver: Deliver | None = None
        self._messages: list[bytes] = []
        self._fragments: bytearray | None = None
        """The fragments so far of a fragmented message."""
        self._tail = b""
        """The last bytes of the handshake response so far; frames begin after its blank line."""
        self._framing = Framing(MAX_FRAME_BYTES)
        self._write_by: float | None = None
        """Deadline of a delayed write by the loop's clock; None while none is delayed."""

    def deliver_to(self, deliver: Deliver) -> None:
        """Deliver every message from now on, in the loop's thread.

        Args:
            deliver: Takes the messages of one read of the socket, and the time of that read in ns since 1970.
        """
        self._deliver = deliver
        self._deliver_messages(time.time_ns())

    def data_received(self, data: bytes) -> None:
        """Note the time, cut what came into messages, and deliver them.

        Args:
            data: What one read of the socket gave.
        """
        recv_ns = time.time_ns()
        self.last_bytes_at = time.monotonic()
        if self.protocol.state is State.CONNECTING:
            data = self._handshake(data)
        if data:
            self._framing.feed(data, self._messages, self._parse_with_library)
        self._deliver_messages(recv_ns)

    def send_data(self) -> None:
        """Write pending data once received bytes have been read.

        When a write fails because the peer has closed, asyncio drops bytes that were not read yet.
        """
        if self._write_by is None:
            self._write_by = self.loop.time() + WRITE_DELAY_MAX_S
            self._write()

    def _write(self) -> None:
        """Write now, or reschedule while received bytes wait and the deadline has not passed."""
        if self._write_by is None:
            return
        must_wait = self.transport.is_reading() and self.has_unread_bytes
        if must_wait and self.loop.time() < self._write_by:
            self.loop.call_soon(self._write)
            return
        self._write_by = None
        super().send_data()

    def process_event(self, event: Any) -> None:
        """Collect messages in place of queueing them; all else takes the library's way.

        Args:
            event: A frame that the library has read.
        """
        if self.response is None or event.opcode not in DATA_OPCODES:
            super().process_event(event)
            return
        self._fragments = self._fragments or bytearray()
        self._fragments += event.data
        if event.fin:
            self._messages.append(bytes(self._fragments))
            self._fragments = None

    def _handshake(self, data: bytes) -> bytes:
        """Pass the handshake response to the library; return the frames after it."""
        response = self._tail + data
        self._tail = response[1 - len(_BLANK_LINE) :]
        blank = response.find(_BLANK_LINE)
        after = len(response) - blank - len(_BLANK_LINE) if blank >= 0 else 0
        head, frames = data[: len(data) - after], data[len(data) - after :]
        super().data_received(head)
        if frames and self.protocol.state is State.CONNECTING:  # refused: a body, not frames
            super().data_received(frames)
            return b""
        return frames

    def _parse_with_library(self, frame: bytes) -> bool:
        super().data_received(frame)
        return self._fragments is None and self.protocol.state is State.OPEN

    def _deliver_messages(self, recv_ns: int) -> None:
        if self._messages and self._deliver is not None:
            messages, self._messages = self._messages, []
            self._deliver(messages, recv_ns)


class _Dial(connect):
    """Follows no redirect: headers signed for one server are never sent to another."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        """Treat a redirect like any other refusal."""
        return exc


C = TypeVar("C", bound=LiveConnection)


async def dial(ws_url: str, credentials: Credentials, kind: type[C]) -> C:
    """Open one authenticated connection.

    Args:
        ws_url: The WebSocket's URL.
        credentials: Sign the dial.
        kind: The class of the connection: `LiveConnection`, or one derived from it.

    Returns:
        The open connection. It pings nothing itself: look at `silent_s`.

    Raises:
        CredentialsError: The exchange refuses the key or the clock.
        Unreachable: Nothing answers, or the exchange is down.
        ExchangeError: The exchange refuses the dial for another reason.
    """
    parts = urlsplit(ws_url)
    options: dict[str, Any] = {}
    if is_loopback(parts.hostname or ""):
        options["proxy"] = None
    try:
        connection = await _Dial(
            ws_url,
            additional_headers=dict(credentials.headers("GET", parts.path)),
            create_connection=kind,
            max_size=MAX_FRAME_BYTES,
            max_queue=QUEUE_FRAMES,
            compression=None,
            open_timeout=OPEN_TIMEOUT_S,
            close_timeout=2.0,
            ping_interval=None,  # any traffic counts as liveness, see LIVENESS_S
            **options,
        )
    except InvalidStatus as error:
        response = error.response
        raise refusal(response.status_code, response.body or b"", response.headers) from None
    except TimeoutError:
        raise Unreachable(f"{ws_url} did not answer within {OPEN_TIMEOUT_S:.0f} s.") from None
    except (OSError, InvalidHandshake) as error:
        raise Unreachable(f"{ws_url} cannot be reached: {error}.") from None
    if not isinstance(connection, kind):
        raise ExchangeError(
            "The WebSocket library did not use the connection class that it was given."
        )
    connection.last_bytes_at = time.monotonic()
    return connection

"""The WebSocket shell: dials, signed anew every time, and knows when the peer was last heard.

What a frame means is the session's affair (`session.py`); nothing here reads one.
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
"""The exchange's own limit is 64 MiB; the library's default of 1 MiB would cut wide books off."""
QUEUE_FRAMES = 2048
"""Frames that wait in memory for the reader before the socket is no longer read."""
OPEN_TIMEOUT_S = 15.0
_BLANK_LINE = b"\r\n\r\n"
Deliver = Callable[[list[bytes], int], None]
"""Takes the messages of one read of the socket, and when it was read: ns since the epoch."""
LIVENESS_S = 30.0
"""The server pings every 10 s or so: nothing at all for this long means the connection is dead."""
WRITE_PATIENCE_S = 1.0
"""For so long a write waits for bytes that have come to be read."""


class LiveConnection(ClientConnection):
    """A client connection that remembers when bytes of any kind last came, pings included."""

    last_bytes_at: float = 0.0
    """Monotonic seconds."""

    def data_received(self, data: bytes) -> None:
        """Note the time, then go on as always."""
        self.last_bytes_at = time.monotonic()
        super().data_received(data)

    @property
    def silent_s(self) -> float:
        """Seconds since the peer was last heard."""
        return time.monotonic() - self.last_bytes_at

    @property
    def bytes_wait(self) -> bool:
        """Whether something has come and was not read, the peer's end included.

        After a process stood still, timers run before the socket is read.
        """
        fd = self.transport.get_extra_info("socket").fileno()
        if fd < 0:
            return False
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        return bool(poll.poll(0))


class BatchedConnection(LiveConnection):
    """Delivers the messages of one read of the socket together, stamped with the time of that read.

    It has no `recv`, whose queue and coroutine for each message cost as much as the library's parsing;
    and that is spared where a message is all that there is to a frame (`framing.py`).
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._deliver: Deliver | None = None
        self._came: list[bytes] = []
        self._begun: bytearray | None = None
        """The fragments so far of a message of several."""
        self._tail = b""
        """The last bytes of the answer to the handshake so far; frames begin behind its blank line."""
        self._framing = Framing(MAX_FRAME_BYTES)
        self._write_by: float | None = None
        """When what waits to be written is written at the latest, by the loop's clock; None: nothing does."""

    def deliver_to(self, deliver: Deliver) -> None:
        """Hand every message to `deliver(messages, recv_ns)` from now on, in the loop's thread."""
        self._deliver = deliver
        self._hand_over(time.time_ns())

    def data_received(self, data: bytes) -> None:
        """Note the time, cut into messages, deliver."""
        recv_ns = time.time_ns()
        self.last_bytes_at = time.monotonic()
        if self.protocol.state is State.CONNECTING:
            data = self._shake_hands(data)
        if data:
            self._framing.feed(data, self._came, self._library)
        self._hand_over(recv_ns)

    def send_data(self) -> None:
        """Write what is to be written, once what has come is read.

        Where a write fails, as it does when the peer has closed, asyncio drops what was not read.
        """
        if self._write_by is None:
            self._write_by = self.loop.time() + WRITE_PATIENCE_S
            self._write()

    def _write(self) -> None:
        if self._write_by is None:
            return
        waits = self.transport.is_reading() and self.bytes_wait
        if waits and self.loop.time() < self._write_by:
            self.loop.call_soon(self._write)
            return
        self._write_by = None
        super().send_data()

    def process_event(self, event: Any) -> None:
        """Collect messages instead of queueing them; all else goes its usual way."""
        if self.response is None or event.opcode not in DATA_OPCODES:
            super().process_event(event)
            return
        self._begun = self._begun or bytearray()
        self._begun += event.data
        if event.fin:
            self._came.append(bytes(self._begun))
            self._begun = None

    def _shake_hands(self, data: bytes) -> bytes:
        """Give the library the answer to the handshake; returns the frames that came behind it."""
        answer = self._tail + data
        self._tail = answer[1 - len(_BLANK_LINE) :]
        blank = answer.find(_BLANK_LINE)
        behind = len(answer) - blank - len(_BLANK_LINE) if blank >= 0 else 0
        head, behind_it = data[: len(data) - behind], data[len(data) - behind :]
        super().data_received(head)
        if behind_it and self.protocol.state is State.CONNECTING:  # refused: a body, not frames
            super().data_received(behind_it)
            return b""
        return behind_it

    def _library(self, frame: bytes) -> bool:
        super().data_received(frame)
        return self._begun is None and self.protocol.state is State.OPEN

    def _hand_over(self, recv_ns: int) -> None:
        if self._came and self._deliver is not None:
            messages, self._came = self._came, []
            self._deliver(messages, recv_ns)


class _Dial(connect):
    """Follows no redirect: what was signed for one server is shown to no other."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        """The answer, whatever it was, is final."""
        return exc


C = TypeVar("C", bound=LiveConnection)


async def dial(ws_url: str, credentials: Credentials, kind: type[C]) -> C:
    """Open one authenticated connection of that kind.

    Raises `CredentialsError` where the key or the clock is refused, `Unreachable` where nobody
    answers or the exchange is down.
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
            ping_interval=None,  # liveness is judged by any traffic, see LIVENESS_S
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

"""Headers that are sent while a query runs, before the answer's status and other headers are known.

ClickHouse reports a query's progress this way (`send_progress_in_http_headers`), so that neither a client nor a proxy
takes a long query for a dead connection. ASGI sends all headers at once. So the first of these headers is written to
the connection behind a status line of 200, and the status line that uvicorn writes later is dropped: as in
ClickHouse, a query that fails after that has the status 200 and the header `X-ClickHouse-Exception-Code`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

KEY = "kalshi_platform.early_headers"
"""Where a request's scope has its `EarlyHeaders`."""

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
Receive = Callable[[], Awaitable[Message]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


def with_early_headers(app: App) -> App:
    """An ASGI application that finds an `EarlyHeaders` in each request's scope."""

    async def wrapped(scope: Message, receive: Receive, send: Send) -> None:
        scope[KEY] = EarlyHeaders(send)
        await app(scope, receive, send)

    return wrapped


class EarlyHeaders:
    """The headers of one answer that are sent before the others."""

    def __init__(self, send: Send) -> None:
        """`send` is a method of uvicorn's state of the request, which has the connection."""
        self._cycle: Any = getattr(send, "__self__", None)
        self._connection: asyncio.Transport | None = getattr(self._cycle, "transport", None)
        self._begun = False

    def send(self, name: str, value: str) -> None:
        """Send a header now."""
        if self._connection is None or self._connection.is_closing():
            return
        if not self._begun:
            self._begun = True
            self._connection.write(b"HTTP/1.1 200 OK\r\n")
            self._cycle.transport = _WithoutStatusLine(self._cycle, self._connection)
        self._connection.write(f"{name}: {value}\r\n".encode("latin-1"))


class _WithoutStatusLine:
    """A connection whose first line is dropped; afterwards the request uses the connection itself."""

    def __init__(self, cycle: Any, connection: asyncio.Transport) -> None:
        self._cycle = cycle
        self._connection = connection

    def write(self, data: bytes) -> None:
        self._cycle.transport = self._connection
        self._connection.write(data.partition(b"\r\n")[2])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

"""The WebSocket of one client: bytes to a `Session` and back. I/O only.

uvicorn hands over the connection at the upgrade request; websockets' protocol without I/O does
the handshake and the framing. What uvicorn's own WebSocket protocol cannot do is the reason for
this one: pings with a payload, many frames in one write, a reset, a socket that falls silent.
"""

from __future__ import annotations

import asyncio
import http
import json
import logging
import socket
import struct
from typing import TYPE_CHECKING, Any, cast

from uvicorn.config import Config
from uvicorn.server import ServerState
from websockets.frames import Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol

if TYPE_CHECKING:
    from kalshi_platform.simulator.venue import AnySession, Venue

WS_PATH = "/trade-api/ws/v2"
HEARTBEAT = b"heartbeat"
_GOODBYE_SECONDS = 0.5
_PATIENCE_BYTES = 1024 * 1024
_MAX_COMMAND_BYTES = 64 * 1024 * 1024

logger = logging.getLogger(__name__)


class ClientSocket(asyncio.Protocol):
    """One client's connection, from its upgrade request on."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any]
    ) -> None:
        self._venue: Venue = app_state["venue"]
        self._open_sockets = server_state.connections
        self._wire = ServerProtocol(max_size=_MAX_COMMAND_BYTES)
        self._transport: asyncio.Transport
        self._message: list[bytes] = []
        self._heartbeat: asyncio.TimerHandle | None = None
        self._release: asyncio.TimerHandle | None = None
        self._held = False
        self._hung = False
        self.session: AnySession | None = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._open_sockets.add(self)  # type: ignore[arg-type]  # uvicorn calls shutdown() on it

    def data_received(self, data: bytes) -> None:
        self._wire.receive_data(data)
        self._react()

    def eof_received(self) -> None:
        self._wire.receive_eof()
        self._react()

    def resume_writing(self) -> None:
        """Continue sending: the client has read what was written."""
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._open_sockets.discard(self)
        self._venue.disconnected(self)
        for timer in (self._heartbeat, self._release):
            if timer is not None:
                timer.cancel()

    def shutdown(self) -> None:
        """Close the connection, because the server stops."""
        if self._hung or self._wire.state is not State.OPEN:
            self._transport.abort()
            return
        self.close(1001)
        self._release = asyncio.get_running_loop().call_later(
            _GOODBYE_SECONDS, self._transport.abort
        )

    # for the venue

    @property
    def backlog(self) -> int:
        """Bytes that the client has not read yet."""
        return self._transport.get_write_buffer_size()

    def flush(self) -> None:
        """Write every frame that the session has ready."""
        if self.session is None or self._held or self._hung or self._wire.state is not State.OPEN:
            return
        if self.session.patient and self.backlog > _PATIENCE_BYTES:
            return
        ready = self.session.take()
        if ready:
            for frame in ready:
                self._wire.send_text(frame)
            self._write()

    def close(self, code: int) -> None:
        """Close cleanly with that code."""
        self.flush()
        if self._wire.state is State.OPEN:
            self._wire.send_close(code)
            self._write()

    def reset(self) -> None:
        """Reset the TCP connection, without a close frame."""
        raw: socket.socket = self._transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()

    def hold(self, seconds: float) -> None:
        """Hold every frame back for a while, then send them all."""
        self._held = True
        if self._release is not None:
            self._release.cancel()
        self._release = asyncio.get_running_loop().call_later(seconds, self._unhold)

    def hang(self, seconds: float | None) -> None:
        """Send no frame, no ping and no answer with the socket open; finally reset."""
        self._hung = True
        self._transport.pause_reading()
        self._venue.disconnected(self)
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        if seconds is not None:
            self._release = asyncio.get_running_loop().call_later(seconds, self.reset)

    # inside

    def _unhold(self) -> None:
        self._held = False
        self.flush()

    def _react(self) -> None:
        for event in self._wire.events_received():
            if isinstance(event, Request):
                self._shake_hands(event)
            elif isinstance(event, Frame):
                self._receive(event)
        if not self._hung:
            self._write()

    def _shake_hands(self, request: Request) -> None:
        path = request.path.split("?", 1)[0]
        if path != WS_PATH:
            response = self._wire.reject(http.HTTPStatus.NOT_FOUND, f"{path} is not {WS_PATH}\n")
        else:
            turned_away = self._venue.turn_away(request.headers, path)
            if turned_away is None:
                response = self._wire.accept(request)
            else:
                status, body = turned_away
                response = self._refuse(status, body)
        self._wire.send_response(response)
        if response.status_code == http.HTTPStatus.SWITCHING_PROTOCOLS:
            self.session = self._venue.connected(self)
            self._beat()

    def _refuse(self, status: int, body: object) -> Response:
        response = self._wire.reject(http.HTTPStatus(status), json.dumps(body))
        del response.headers["Content-Type"]
        response.headers["Content-Type"] = "application/json"
        return response

    def _receive(self, frame: Frame) -> None:
        if frame.opcode not in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            return
        self._message.append(bytes(frame.data))
        if frame.fin and self.session is not None:
            message, self._message = b"".join(self._message), []
            self.session.receive(message)
            self._venue.soon(self)

    def _beat(self) -> None:
        if self._wire.state is State.OPEN and not self._held:
            self._wire.send_ping(HEARTBEAT)
            self._write()
        self._heartbeat = asyncio.get_running_loop().call_later(
            self._venue.heartbeat_seconds, self._beat
        )

    def _write(self) -> None:
        chunks = self._wire.data_to_send()
        if chunks:
            # an empty chunk means that no more follow
            data = b"".join(chunks)
            if data:
                self._transport.write(data)
            if b"" in chunks:
                self._transport.close()

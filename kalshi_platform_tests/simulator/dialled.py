"""A client that sees every frame, pings and resets included: websockets' protocol on a socket."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.uri import parse_uri

from kalshi_platform.exchange.signing import Credentials, load_signer
from kalshi_platform.simulator.server import Simulator

PATH = "/trade-api/ws/v2"
PATIENCE_SECONDS = 60


class Dialled:
    """One connection. `response` is the answer to the handshake."""

    def __init__(self, simulator: Simulator, headers: Mapping[str, str] | None = None) -> None:
        uri = parse_uri(simulator.ws_url)
        self._socket = socket.create_connection((uri.host, uri.port), timeout=PATIENCE_SECONDS)
        self._wire = ClientProtocol(uri, max_size=None)
        request = self._wire.connect()
        if headers is None:
            credentials = Credentials(simulator.key_id, load_signer(simulator.key_file))
            headers = credentials.headers("GET", PATH)
        for name, value in headers.items():
            request.headers[name] = value
        self._wire.send_request(request)
        self._flush()
        self._frames: list[Frame] = []
        self.response: Response | None = None
        while self.response is None:
            self._receive()

    def __enter__(self) -> Dialled:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def send(self, command: dict[str, Any]) -> None:
        self._wire.send_text(json.dumps(command).encode())
        self._flush()

    def subscribe(self, tickers: list[str], *channels: str) -> None:
        params = {"channels": list(channels) or ["orderbook_delta"], "market_tickers": tickers}
        self.send({"id": 1, "cmd": "subscribe", "params": params})

    def frames(self) -> Iterator[Frame]:
        """Every frame as it comes; raises TimeoutError where none does, OSError on a reset."""
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            while self._frames:
                yield self._frames.pop(0)
            if not self._receive():
                return
        raise TimeoutError

    def texts(self) -> Iterator[bytes]:
        """The messages among the frames."""
        return (bytes(frame.data) for frame in self.frames() if frame.opcode is Opcode.TEXT)

    def texts_at_hand(self, seconds: float) -> Iterator[bytes]:
        """The messages until none comes for that long."""
        while not self.silent_for(seconds):
            yield next(self.texts())

    def silent_for(self, seconds: float) -> bool:
        """Whether nothing at all comes for that long."""
        self._socket.settimeout(seconds)
        try:
            return not self._frames and not self._receive()
        except TimeoutError:
            return True
        finally:
            self._socket.settimeout(PATIENCE_SECONDS)

    def _receive(self) -> bool:
        data = self._socket.recv(1 << 18)
        if data:
            self._wire.receive_data(data)
        else:
            self._wire.receive_eof()
        for event in self._wire.events_received():
            if isinstance(event, Response):
                self.response = event
            elif isinstance(event, Frame):
                self._frames.append(event)
        self._flush()
        return bool(data)

    def _flush(self) -> None:
        for chunk in self._wire.data_to_send():
            if chunk:
                self._socket.sendall(chunk)

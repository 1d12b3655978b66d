"""`Framing` yields what the library's own parser yields, for any split of the stream into reads."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from hypothesis import given
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.frames import DATA_OPCODES, Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from kalshi_platform.exchange.connection import BatchedConnection, dial
from kalshi_platform.exchange.framing import Framing
from kalshi_platform.exchange.signing import Credentials, Ed25519Signer

LONGEST = 70_000


@dataclass
class Heard:
    """The result of parsing a stream."""

    messages: list[bytes] = field(default_factory=list)
    fragments: list[bytes] = field(default_factory=list)
    protocol: ClientProtocol = field(
        default_factory=lambda: ClientProtocol(
            parse_uri("ws://127.0.0.1/"), state=State.OPEN, max_size=LONGEST
        )
    )

    def library(self, data: bytes) -> bool:
        """Parse with the library."""
        self.protocol.receive_data(data)
        for event in self.protocol.events_received():
            assert isinstance(event, Frame)
            if event.opcode in DATA_OPCODES:
                self.fragments.append(bytes(event.data))
                if event.fin:
                    self.messages.append(b"".join(self.fragments))
                    self.fragments.clear()
        return not self.fragments and self.protocol.state is State.OPEN

    @property
    def answered(self) -> Sequence[object]:
        """The pongs and the close frame that the server receives."""
        server = ServerProtocol(state=State.OPEN)
        server.receive_data(b"".join(self.protocol.data_to_send()))
        return server.events_received()


def frame(opcode: Opcode, data: bytes, *, fin: bool = True) -> bytes:
    return Frame(opcode, data, fin).serialize(mask=False)


def filler(size: int) -> bytes:
    return b"x" * size


sizes = st.one_of(
    st.integers(0, 40), st.sampled_from([125, 126, 127, 128, 255, 65_535, 65_536, LONGEST])
)
whole = st.builds(
    lambda opcode, size: [frame(opcode, filler(size))],
    st.sampled_from([Opcode.TEXT, Opcode.BINARY]),
    sizes,
)
pings = st.builds(lambda data: [frame(Opcode.PING, data)], st.binary(max_size=125))
fragmented = st.builds(
    lambda parts, ping: [
        frame(Opcode.TEXT, parts[0], fin=False),
        *([frame(Opcode.PING, b"between")] if ping else []),
        *(frame(Opcode.CONT, part, fin=False) for part in parts[1:-1]),
        frame(Opcode.CONT, parts[-1]),
    ],
    st.lists(st.binary(max_size=30), min_size=2, max_size=4),
    st.booleans(),
)
ends = st.one_of(
    st.just(b""),
    st.just(frame(Opcode.CLOSE, b"\x03\xe8bye")),
    st.just(frame(Opcode.TEXT, b"ab", fin=False)),
    st.just(Frame(Opcode.TEXT, b"masked").serialize(mask=True)),
    st.just(b"\xc1\x0acompressed"),
    st.just(frame(Opcode.CONT, b"of nothing")),
    st.just(frame(Opcode.TEXT, filler(LONGEST + 1))),
    st.just(b"\x82\x7f" + b"\xff" * 8),
    st.just(b"\x8b\x00"),
)


@st.composite
def streams(draw: st.DrawFn) -> tuple[bytes, list[int]]:
    """Valid frames, an end that may violate the protocol, frames after it; and the split points."""
    parts = draw(st.lists(st.one_of(whole, whole, pings, fragmented), max_size=12))
    behind = draw(st.lists(whole, max_size=2))
    data = b"".join(b"".join(part) for part in parts) + draw(ends)
    data += b"".join(b"".join(part) for part in behind)
    cuts = draw(st.lists(st.integers(0, len(data)), max_size=12))
    return data, sorted(cuts)


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    return [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@given(streams())
def test_any_split_of_a_stream_parses_as_in_the_library(
    stream: tuple[bytes, list[int]],
) -> None:
    data, cuts = stream
    expected, got = Heard(), Heard()
    expected.library(data)
    framing = Framing(LONGEST)
    for read in cut(data, cuts):
        framing.feed(read, got.messages, got.library)
    assert got.messages == expected.messages
    assert got.fragments == expected.fragments
    assert got.answered == expected.answered
    assert got.protocol.state == expected.protocol.state


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=5))
def test_garbage_yields_no_message_the_library_would_not(data: bytes, cuts: list[int]) -> None:
    expected, got = Heard(), Heard()
    expected.library(data)
    framing = Framing(LONGEST)
    for read in cut(data, sorted(min(at, len(data)) for at in cuts)):
        framing.feed(read, got.messages, got.library)
    assert got.messages == expected.messages


def test_a_long_message_is_parsed_once_when_complete() -> None:
    data = frame(Opcode.BINARY, filler(LONGEST)) * 2
    messages: list[bytes] = []
    framing = Framing(LONGEST)
    seen = []
    for start in range(0, len(data), 1000):
        framing.feed(data[start : start + 1000], messages, lambda _: True)
        seen.append(len(messages))
    assert messages == [filler(LONGEST)] * 2
    assert seen.index(1) == len(data) // 2 // 1000


@pytest.mark.parametrize("piece", [1, 7, 1 << 16])
def test_frames_right_after_the_handshake_are_delivered(piece: int) -> None:
    """On a real socket the handshake response and the first frames may arrive in one read."""
    sent = [b"first", b"a" * 126, b"in three pieces", b"last"]
    frames = b"".join(
        [
            frame(Opcode.TEXT, sent[0]),
            frame(Opcode.PING, b"there?"),
            frame(Opcode.TEXT, sent[1]),
            frame(Opcode.TEXT, b"in ", fin=False),
            frame(Opcode.CONT, b"three ", fin=False),
            frame(Opcode.CONT, b"pieces"),
            frame(Opcode.TEXT, sent[3]),
            frame(Opcode.CLOSE, b"\x03\xe8over"),
        ]
    )
    delivered: list[bytes] = []
    heard: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        [key] = [
            line.split(b":", 1)[1].strip()
            for line in request.split(b"\r\n")
            if line.lower().startswith(b"sec-websocket-key")
        ]
        guid = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key + guid).digest())
        answer = (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n" + frames
        )
        for start in range(0, len(answer), piece):
            writer.write(answer[start : start + piece])
            await writer.drain()
            await asyncio.sleep(0)
        heard.append(await reader.readexactly(24))  # a pong and the close
        writer.close()

    async def go() -> tuple[int, str]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            credentials = Credentials("id", Ed25519Signer(ed25519.Ed25519PrivateKey.generate()))
            connection = await dial(url, credentials, BatchedConnection)
            connection.deliver_to(lambda messages, _: delivered.extend(messages))
            await asyncio.wait_for(connection.wait_closed(), 60)
            end = connection.protocol.close_rcvd
            assert end is not None
            return end.code, end.reason

    assert asyncio.run(go()) == (1000, "over")
    assert delivered == sent
    [answers] = heard
    assert answers[0] == 0x8A, "the ping had its pong"

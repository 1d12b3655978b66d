"""Frames received before a connection ends, in any way, are in the journal."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import signal
import socket
import struct
import sys
import termios
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from kalshi_platform.exchange.session import Session
from kalshi_platform.exchange.signing import Credentials, Ed25519Signer
from kalshi_platform.journal import reader
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.writer import Writer
from kalshi_platform.recorder.capture import Capture
from kalshi_platform_tests import wire
from kalshi_platform_tests.recorder import recorder_process

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 60.0
LIVENESS_S = 2.0


class Exchange:
    """One connection of a recorder: answers its subscriptions, sends deltas and counts them."""

    def __init__(self, connection: ServerConnection) -> None:
        self.connection = connection
        self.deltas = 0
        self.sid = 0
        self.closing: asyncio.Task[None] | None = None
        self.subscribed = asyncio.Event()
        """Whether the book was requested and its snapshot sent."""

    async def answer(self) -> None:
        """Answer every subscription, until the connection is closed."""
        sids = 0
        with contextlib.suppress(ConnectionClosed):
            while True:
                command = json.loads(await self.connection.recv())
                for channel in command["params"].get("channels", ()):
                    sids += 1
                    msg = {"channel": channel, "sid": sids}
                    answer = {"id": command["id"], "type": "subscribed", "msg": msg}
                    await self.connection.send(json.dumps(answer))
                    if channel == "orderbook_delta":
                        self.sid = sids
                        first = wire.snapshot("A-1", 1, {4_800: 1_000}, {}, sid=sids)
                        await self.connection.send(first, text=True)
                        self.subscribed.set()

    async def send(self, deltas: int, *, ping_every: int = 0) -> None:
        for n in range(deltas):
            self.deltas += 1
            frame = wire.delta("A-1", 1 + self.deltas, "yes", 4_800, 1, sid=self.sid)
            await self.connection.send(frame, text=True)
            if ping_every and n % ping_every == 0:
                await self.connection.ping()

    @property
    def on_the_way(self) -> int:
        """Bytes that the recorder's kernel has not taken yet."""
        raw = self.connection.transport.get_extra_info("socket")
        waiting = struct.unpack("i", fcntl.ioctl(raw.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
        return int(waiting + self.connection.transport.get_write_buffer_size())


SendSignal = Callable[[int], None]
Script = Callable[[Exchange, SendSignal], Awaitable[None]]


@contextlib.asynccontextmanager
async def exchanges() -> AsyncIterator[tuple[str, asyncio.Queue[Exchange]]]:
    """The URL of a fake exchange and a queue of its connections."""
    found: asyncio.Queue[Exchange] = asyncio.Queue()

    async def handler(connection: ServerConnection) -> None:
        exchange = Exchange(connection)
        found.put_nowait(exchange)
        await exchange.answer()

    server = serve(handler, "127.0.0.1", 0, ping_interval=None, compression=None, close_timeout=1.0)
    async with server as listening:
        port = next(iter(listening.sockets)).getsockname()[1]
        yield f"ws://127.0.0.1:{port}/trade-api/ws/v2", found


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:.0f} s for {what}"
        await asyncio.sleep(0.01)


async def record(folder: Path, script: Script) -> int:
    """Run a recorder process against one connection's script; returns how many deltas were sent.

    The script may send the process signals; in its end the process ends by itself.
    """
    async with exchanges() as (url, found):
        argv = ["-m", recorder_process.__name__, str(folder), url, str(LIVENESS_S)]
        child = await asyncio.create_subprocess_exec(sys.executable, *argv, cwd=ROOT)
        try:
            async with asyncio.timeout(PATIENCE_S):
                exchange = await found.get()
                await exchange.subscribed.wait()
                await exchange.send(50)
                await script(exchange, child.send_signal)
                assert await child.wait() == 0
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        assert found.empty()  # there was no other connection
        return exchange.deltas


def recorded(folder: Path) -> list[bytes]:
    """The deltas in the journal."""
    return [
        record["frame"]
        for block in reader.record_ranges(folder, reader.oldest_offset(folder))
        for record in block.batch.to_pylist()
        if record["kind"] == Kind.DELTA
    ]


def causes(folder: Path) -> list[str]:
    found = []
    for block in reader.record_ranges(folder, reader.oldest_offset(folder)):
        for row in block.batch.to_pylist():
            note = json.loads(row["frame"]) if row["kind"] == Kind.NOTE else {}
            if note.get("kind") == "disconnected":
                found.append(note["detail"]["cause"])
    return found


def test_a_resumed_process_reads_before_checking_silence(
    tmp_path: Path,
) -> None:
    async def script(exchange: Exchange, signal_it: SendSignal) -> None:
        signal_it(signal.SIGSTOP)
        sending = asyncio.create_task(exchange.send(20_000, ping_every=500))
        await asyncio.sleep(2 * LIVENESS_S)
        signal_it(signal.SIGCONT)
        await sending
        signal_it(signal.SIGTERM)

    sent = asyncio.run(record(tmp_path, script))
    assert causes(tmp_path) == ["stopped"]
    assert len(recorded(tmp_path)) == sent == 20_050


async def close(exchange: Exchange) -> None:
    exchange.closing = asyncio.create_task(exchange.connection.close(1001, "going away"))


async def go(exchange: Exchange) -> None:
    exchange.connection.transport.close()


async def reset(exchange: Exchange) -> None:
    raw = exchange.connection.transport.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    exchange.connection.transport.abort()


@pytest.mark.parametrize("end", [close, go, reset])
def test_frames_before_the_exchange_closes_are_kept(
    end: Callable[[Exchange], Awaitable[None]], tmp_path: Path
) -> None:
    """The process was suspended meanwhile: frames and pings wait in its kernel."""

    async def script(exchange: Exchange, signal_it: SendSignal) -> None:
        await until(lambda: exchange.on_the_way == 0, "the first frames to be there")
        signal_it(signal.SIGSTOP)
        await exchange.send(150, ping_every=5)
        await until(lambda: exchange.on_the_way == 0, "the frames to be in the recorder's kernel")
        await end(exchange)
        await asyncio.sleep(0.2)
        signal_it(signal.SIGCONT)

    sent = asyncio.run(record(tmp_path, script))
    assert len(recorded(tmp_path)) == sent == 200
    [cause] = causes(tmp_path)
    assert cause.startswith(
        "closed by the exchange: 1001" if end is close else "the connection broke"
    )


def test_frames_after_the_subscription_ends_are_kept(tmp_path: Path) -> None:
    async def script(exchange: Exchange, signal_it: SendSignal) -> None:
        signal_it(signal.SIGSTOP)
        number = exchange.deltas + 2
        frame = {"type": "unsubscribed", "sid": exchange.sid, "seq": number}
        await exchange.connection.send(json.dumps(frame))
        sending = asyncio.create_task(exchange.send(3_000))
        await asyncio.sleep(0.2)
        signal_it(signal.SIGCONT)
        await sending

    sent = asyncio.run(record(tmp_path, script))
    assert causes(tmp_path) == ["the exchange ended the order-book subscription"]
    assert len(recorded(tmp_path)) == sent == 3_050


def test_frames_of_a_failing_session_are_journalled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Session.receive_run

    def fault(session: Session, frames: Iterable[bytes], now: float) -> list[Kind]:
        until_fault = list(frames)
        if any(b'"seq":30,' in frame.replace(b" ", b"") for frame in until_fault):
            raise RuntimeError("a bug")
        return judge(session, until_fault, now)

    monkeypatch.setattr(Session, "receive_run", fault)
    key = Ed25519Signer(ed25519.Ed25519PrivateKey.generate())
    writer = Writer(tmp_path)

    async def go_wrong() -> int:
        async with exchanges() as (url, found):
            capture = Capture(url, lambda: Credentials("id", key), writer, ["A-1"])
            running = asyncio.create_task(capture.run())
            exchange = await found.get()
            await exchange.subscribed.wait()
            await exchange.send(100)
            with pytest.raises(RuntimeError, match="a bug"):
                await running
            return exchange.deltas

    sent = asyncio.run(go_wrong())
    writer.close()
    assert len(recorded(tmp_path)) == sent == 100
    assert causes(tmp_path) == ["unexpected"]

"""Capture: receive, stamp, keep, notice a gap, ask for a snapshot. As little as can be.

It never waits for a database. Where the disk does not keep up it stops reading the socket and says
so; it never drops. Every connection's beginning, end and cause is a note in the journal.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from websockets.exceptions import ConnectionClosed

from kalshi_platform.exchange.connection import LIVENESS_S, LiveConnection, dial
from kalshi_platform.exchange.errors import CredentialsError, ExchangeError
from kalshi_platform.exchange.frames import Kind
from kalshi_platform.exchange.session import Session
from kalshi_platform.exchange.signing import Credentials
from kalshi_platform.recording.journal import Writer

log = logging.getLogger(__name__)

TICK_S = 0.025
"""How often what has come is handed to the disk: what a kill can lose."""
HEARTBEAT_S = 10.0
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.5, 30.0
HEALTHY_S = 30.0
"""A connection that lasted so long resets the back-off."""


class CaptureState(Enum):
    """What capture is doing, for people and for the supervisor."""

    STARTING = "starting"
    CONNECTING = "connecting"
    STREAMING = "streaming"
    QUIET = "quiet"
    """Connected and heard, with no order-book frame for a while."""
    BLOCKED = "blocked"
    """The disk does not keep up: the socket is not read."""
    STOPPED = "stopped"


QUIET_AFTER_S = 30.0


@dataclass
class Counters:
    """What came since the start."""

    frames: int = 0
    deltas: int = 0
    snapshots: int = 0
    malformed: int = 0
    gaps: int = 0
    connections: int = 0
    last_frame_ns: int = 0
    """Receive time of the last frame, this machine's clock; 0 before the first."""
    last_heard_ns: int = 0
    """When bytes of any kind last came, pings included."""


class Capture:
    """One shard's connection to the exchange, kept up for as long as it runs."""

    def __init__(
        self,
        ws_url: str,
        credentials: Callable[[], Credentials],
        journal: Writer,
        tickers: Iterable[str],
        *,
        use_yes_price: bool = False,
    ) -> None:
        self._ws_url = ws_url
        self._credentials = credentials
        self._journal = journal
        self._tickers = list(tickers)
        self._use_yes_price = use_yes_price
        self._stop = asyncio.Event()
        self._session: Session | None = None
        self._distrusted: list[tuple[str, str, dict[str, object]]] = []
        self._blocked = False
        self.counters = Counters()
        self.connected = False

    @property
    def state(self) -> CaptureState:
        """What it is doing now."""
        if self._stop.is_set():
            return CaptureState.STOPPED
        if self._blocked:
            return CaptureState.BLOCKED
        if not self.connected:
            return CaptureState.CONNECTING if self.counters.connections else CaptureState.STARTING
        if time.time_ns() - self.counters.last_frame_ns > QUIET_AFTER_S * 1e9:
            return CaptureState.QUIET
        return CaptureState.STREAMING

    @property
    def markets(self) -> tuple[int, int]:
        """(markets followed, of which have a book without a gap)."""
        session = self._session
        return (len(self._tickers), session.synced if session and self.connected else 0)

    def stop(self) -> None:
        """End `run` soon. Call in the event loop's thread."""
        self._stop.set()

    def follow(self, tickers: Iterable[str]) -> None:
        """Follow exactly these markets from now on. Call in the event loop's thread."""
        self._tickers = list(tickers)
        if self._session is not None:
            self._session.follow(self._tickers)

    def distrust(self, ticker: str, cause: str, detail: dict[str, object]) -> None:
        """A book was found to be wrong downstream. Call in the event loop's thread."""
        self._distrusted.append((ticker, cause, detail))

    def remark(self, kind: str, detail: Mapping[str, object], market_ticker: str = "") -> None:
        """Put a note into the journal for somebody else. Call in the event loop's thread."""
        self._journal.note(kind, detail, market_ticker=market_ticker)

    async def run(self) -> None:
        """Stay connected until `stop`. Raises `ExchangeError` for what dialling cannot mend."""
        ticking = asyncio.create_task(self._tick())
        try:
            attempt = 0
            while not self._stop.is_set():
                began = time.monotonic()
                try:
                    await self._connection(attempt)
                except CredentialsError:
                    raise
                except ExchangeError as error:
                    log.warning("%s Trying again.", error)
                attempt = 0 if time.monotonic() - began > HEALTHY_S else attempt + 1
                if not self._stop.is_set():
                    await self._pause(_backoff_s(attempt))
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
            self._journal.hand_over()

    async def _connection(self, attempt: int) -> None:
        """One connection, from dial to end; both are notes in the journal."""
        dialling = asyncio.ensure_future(dial(self._ws_url, self._credentials()))
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({dialling, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not dialling.done():
            dialling.cancel()
            return
        socket = await dialling
        identity = uuid.uuid4()
        conn = identity.bytes
        session = self._session = Session(self._tickers, use_yes_price=self._use_yes_price)
        self.counters.connections += 1
        self._journal.note(
            "connected",
            {
                "url": self._ws_url,
                "use_yes_price": self._use_yes_price,
                "markets": len(self._tickers),
                "attempt": attempt,
            },
            conn=conn,
        )
        log.info("Connected as %s: %d markets.", identity, len(self._tickers))
        self.connected = True
        before = self.counters.frames
        began = time.monotonic()
        cause = "unexpected"
        try:
            cause = await self._converse(socket, session, conn)
        finally:
            self.connected = False
            self._drain_notes(session, conn)
            self._journal.note(
                "disconnected",
                {
                    "cause": cause,
                    "frames": self.counters.frames - before,
                    "seconds": round(time.monotonic() - began, 3),
                },
                conn=conn,
            )
            log.info("Disconnected from %s: %s.", identity, cause)
            await _close(socket)
        if session.fatal is not None:
            raise session.fatal

    async def _converse(self, socket: LiveConnection, session: Session, conn: bytes) -> str:
        """Read until the connection is of no more use; says why."""
        reading = asyncio.create_task(self._read(socket, session, conn))
        speaking = asyncio.create_task(self._speak(socket, session, conn))
        stopping = asyncio.create_task(self._stop.wait())
        tasks = {reading, speaking, stopping}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if stopping in done:
            return "stopped"
        return (reading if reading in done else speaking).result() or "ended"

    async def _read(self, socket: LiveConnection, session: Session, conn: bytes) -> str:
        journal, counters = self._journal, self.counters
        receive, append, recv = session.receive, journal.append, socket.recv
        clock, monotonic, delta = time.time_ns, time.monotonic, Kind.DELTA
        try:
            while True:
                frame = await recv(decode=False)
                recv_ns = clock()
                kind = receive(frame, monotonic())
                if session.has_notes:
                    self._drain_notes(session, conn, recv_ns)
                append(recv_ns, conn, kind, frame)
                counters.frames += 1
                counters.last_frame_ns = recv_ns
                if kind is delta:
                    counters.deltas += 1
                    if counters.deltas & 1023:
                        continue
                elif kind is Kind.SNAPSHOT:
                    counters.snapshots += 1
                elif kind is Kind.MALFORMED:
                    counters.malformed += 1
                for command in session.commands(monotonic()):
                    await socket.send(command, text=True)
                if session.ended or session.fatal:
                    return session.ended or "refused"
                if journal.full:
                    await self._wait_for_disk(journal)
        except ConnectionClosed as closed:
            return _closing(closed)

    async def _wait_for_disk(self, journal: Writer) -> None:
        """Not reading lets TCP push back on the exchange, which may then end the subscription."""
        log.error(
            "The disk does not keep up: %d MiB wait for it, so the exchange is not read. %s",
            journal.backlog_bytes >> 20,
            journal.blocked or "",
        )
        self._blocked = True
        try:
            while journal.full:  # noqa: ASYNC110 - the journal's thread sets no asyncio event
                await asyncio.sleep(TICK_S)
        finally:
            self._blocked = False

    async def _speak(self, socket: LiveConnection, session: Session, conn: bytes) -> str:
        """Send what is due, and notice when the peer has gone silent."""
        try:
            while True:
                for ticker, cause, detail in self._distrusted:
                    session.distrust(ticker, cause, dict(detail))
                self._distrusted.clear()
                self._drain_notes(session, conn)
                for command in session.commands(time.monotonic()):
                    await socket.send(command, text=True)
                for warning in session.warnings:
                    log.warning("%s", warning)
                session.warnings.clear()
                if session.ended or session.fatal:
                    return session.ended or "refused"
                if socket.silent_s > LIVENESS_S and not self._blocked:
                    return f"silent for {LIVENESS_S:.0f} s"
                self.counters.last_heard_ns = time.time_ns() - int(socket.silent_s * 1e9)
                await asyncio.sleep(2 * TICK_S)
        except ConnectionClosed as closed:
            return _closing(closed)

    def _drain_notes(self, session: Session, conn: bytes, recv_ns: int | None = None) -> None:
        for note in session.take_notes():
            if note.kind == "gap":
                self.counters.gaps += 1
                log.warning("Gap on sid %d: %s", note.sid, note.detail)
            self._journal.note(
                note.kind,
                note.detail,
                conn=conn,
                sid=note.sid,
                market_ticker=note.market_ticker,
                recv_ns=recv_ns,
            )

    async def _tick(self) -> None:
        beat_at = time.monotonic() + HEARTBEAT_S
        while True:
            self._journal.hand_over()
            if time.monotonic() >= beat_at:
                beat_at += HEARTBEAT_S
                followed, synced = self.markets
                self._journal.note(
                    "heartbeat",
                    {
                        "state": self.state.value,
                        "frames": self.counters.frames,
                        "markets": followed,
                        "synced": synced,
                        "last_heard_ns": self.counters.last_heard_ns,
                        "backlog_bytes": self._journal.backlog_bytes,
                    },
                )
            await asyncio.sleep(TICK_S)

    async def _pause(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return


def _backoff_s(attempt: int) -> float:
    """Full jitter: recorders that lost the exchange together do not come back together."""
    ceiling = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2**attempt)
    return random.uniform(BACKOFF_MIN_S / 2, ceiling)  # noqa: S311 - jitter, not a secret


def _closing(closed: ConnectionClosed) -> str:
    frame = closed.rcvd
    if frame is None:
        return "the connection broke without a close frame"
    return f"closed by the exchange: {frame.code} {frame.reason}".rstrip()


async def _close(socket: LiveConnection) -> None:
    """Leave politely, but do not wait for a peer that is gone."""
    try:
        await asyncio.wait_for(socket.close(), 1.0)
    except (TimeoutError, ConnectionClosed, OSError):
        socket.transport.abort()

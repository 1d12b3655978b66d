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
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from websockets.exceptions import ConnectionClosed

from kalshi_platform.exchange.auxiliary_channel import LIFECYCLE, TRADES, MissedFrames
from kalshi_platform.exchange.connection import LIVENESS_S, BatchedConnection, dial
from kalshi_platform.exchange.errors import CredentialsError, ExchangeError
from kalshi_platform.exchange.frames import LifecycleEvent, kind_of
from kalshi_platform.exchange.session import Session
from kalshi_platform.exchange.signing import Credentials
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.reader import NO_CONNECTION
from kalshi_platform.journal.writer import Writer
from kalshi_platform.printable import printable

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
BESIDE = (LIFECYCLE, TRADES)
"""What is recorded beside the books, in the order in which it is subscribed to."""
RECENT_TRADES = 32_768
"""Trades that are kept in memory, to tell those that the stream has missed from the others."""


@dataclass
class Counters:
    """What came since the start."""

    frames: int = 0
    deltas: int = 0
    snapshots: int = 0
    trades: int = 0
    malformed: int = 0
    gaps: int = 0
    connections: int = 0
    last_frame_ns: int = 0
    """Receive time of the last frame, this machine's clock; 0 before the first."""
    last_heard_ns: int = 0
    """When bytes of any kind last came, pings included."""
    disconnects: dict[str, int] = field(default_factory=dict)
    """Connections that ended, by cause, without the exchange's own words."""


@dataclass(frozen=True)
class MissedSpan:
    """What a channel beside the books has missed, and of which markets."""

    lost: MissedFrames
    conn: bytes
    since_ns: int
    until_ns: int
    tickers: frozenset[str]


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
        silent_since: float | None = None,
        recent_trades: Iterable[tuple[int, bytes]] = (),
        on_lifecycle_events: Callable[[Sequence[LifecycleEvent]], None] | None = None,
        on_lost: Callable[[MissedSpan], None] | None = None,
    ) -> None:
        """`silent_since`: when the recording before this one ended, by the monotonic clock, and the
        last trades that it had. The callbacks run in the event loop's thread and must be quick.
        """
        self._ws_url = ws_url
        self._credentials = credentials
        self._journal = journal
        self._tickers = list(tickers)
        self._use_yes_price = use_yes_price
        self._observed_yes_price: bool | None = None
        """What the last connection was found to send, where that is not what was asked for."""
        self._stop = asyncio.Event()
        self._session: Session | None = None
        self._conn = NO_CONNECTION
        self._distrusted: list[tuple[str, str, dict[str, object]]] = []
        self._on_life_events = on_lifecycle_events
        self._on_lost = on_lost
        self._silent_since = silent_since
        self._tickers_then: frozenset[str] = frozenset()
        self.recent_trades = deque(recent_trades, RECENT_TRADES)
        """(receive time in ns, frame) of the newest trades, whichever connection they came over."""
        self._blocked = False
        self.counters = Counters()
        self.connected = False
        self.unreached: str | None = None
        """Why the exchange was not reached the last time, as a sentence; None once it is."""
        self.ended = False
        """Whether `run` is over, and what it received was handed to the journal's writer."""

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

    def mark_book_stale(self, ticker: str, cause: str, detail: dict[str, object]) -> None:
        """A book was found to be wrong downstream. Call in the event loop's thread."""
        self._distrusted.append((ticker, cause, detail))

    def rescale(self, *, yes_price: bool) -> None:
        """Read no bids on the scale that the exchange was found to use. Call in the event loop's thread."""
        if self._session is not None and self.connected:
            self._session.rescale(time.monotonic(), yes_price=yes_price)

    def remark(self, kind: str, detail: Mapping[str, object], market_ticker: str = "") -> None:
        """Put a note into the journal for somebody else. Call in the event loop's thread."""
        self._journal.note(kind, detail, market_ticker=market_ticker)

    def recover(
        self, loss: MissedSpan, frames: Sequence[bytes], detail: Mapping[str, object]
    ) -> None:
        """Keep trades that the stream had missed. Call in the event loop's thread."""
        now_ns = time.time_ns()
        self._journal.extend(now_ns, loss.conn, [Kind.TRADE] * len(frames), list(frames))
        self.recent_trades.extend((now_ns, frame) for frame in frames)
        self._journal.note("recovered", detail, conn=loss.conn, sid=loss.lost.sid)

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
                    self.unreached = str(error)
                    log.warning("%s Trying again.", error)
                attempt = 0 if time.monotonic() - began > HEALTHY_S else attempt + 1
                if not self._stop.is_set():
                    await self._pause(_backoff_s(attempt))
        finally:
            ticking.cancel()
            await asyncio.gather(ticking, return_exceptions=True)
            self._journal.submit()
            self.ended = True

    async def _connection(self, attempt: int) -> None:
        """One connection, from dial to end; both are notes in the journal."""
        dialling = asyncio.ensure_future(dial(self._ws_url, self._credentials(), BatchedConnection))
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({dialling, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not dialling.done():
            dialling.cancel()
            return
        socket = await dialling
        identity = uuid.uuid4()
        conn = identity.bytes
        session = self._session = Session(
            self._tickers,
            use_yes_price=self._use_yes_price,
            observed_yes_price=self._observed_yes_price,
            auxiliary=BESIDE,
            silent_since=self._silent_since,
        )
        self.counters.connections += 1
        self._journal.note(
            "connected",
            {
                "url": self._ws_url,
                "use_yes_price": session.scale.yes_price,
                "asked_yes_price": self._use_yes_price,
                "markets": len(self._tickers),
                "attempt": attempt,
            },
            conn=conn,
        )
        log.info("Connected as %s: %d markets.", identity, len(self._tickers))
        self.connected, self.unreached = True, None
        self._conn = conn
        before = self.counters.frames
        began = time.monotonic()
        cause = "unexpected"
        try:
            cause = await self._converse(socket, session, conn)
        finally:
            try:
                await _close(socket)  # what comes until then is kept
            finally:
                seconds, frames = time.monotonic() - began, self.counters.frames - before
                self._note_end(session, conn, cause, seconds, frames)
        if session.fatal is not None:
            raise session.fatal

    def _note_end(
        self, session: Session, conn: bytes, cause: str, seconds: float, frames: int
    ) -> None:
        """What a connection that has ended leaves: to the journal, and to the next one."""
        self.connected = self._blocked = False
        self._conn = NO_CONNECTION
        ends = self.counters.disconnects
        kind = cause.partition(":")[0]
        ends[kind] = ends.get(kind, 0) + 1
        now = time.monotonic()
        silent_s = (time.time_ns() - self.counters.last_frame_ns) / 1e9
        self._silent_since = session.silent_since(max(now - seconds, now - silent_s))
        self._tickers_then = session.tickers
        self._observed_yes_price = session.scale.yes_price
        self._drain_notes(session, conn)
        detail = {"cause": cause, "frames": frames, "seconds": round(seconds, 3)}
        dead_s = min((time.time_ns() - self.counters.last_heard_ns) / 1e9, seconds)
        if dead_s > LIVENESS_S:
            detail["span_s"] = round(dead_s, 6)
        self._journal.note("disconnected", detail, conn=conn)
        log.info("Disconnected from %s: %s.", uuid.UUID(bytes=conn), cause)

    async def _converse(self, socket: BatchedConnection, session: Session, conn: bytes) -> str:
        """Go on until the connection is of no more use; says why.

        Frames are kept beyond that, until the connection is closed.
        """
        over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        due = asyncio.Event()

        def deliver(frames: list[bytes], recv_ns: int) -> None:
            try:
                self._keep(frames, recv_ns, session, conn, due)
                if self._journal.full and not self._blocked:
                    self._stop_reading(socket)
                if (session.ended or session.fatal) and not over.done():
                    over.set_result(session.ended or "refused")
            except BaseException as error:
                if over.done():
                    log.error("After the connection's end: %s", error, exc_info=True)
                else:
                    over.set_exception(error)  # raised where the connection is awaited

        socket.deliver_to(deliver)
        closing = asyncio.create_task(socket.wait_closed())
        speaking = asyncio.create_task(self._speak(socket, session, conn, due))
        stopping = asyncio.create_task(self._stop.wait())
        tasks = (closing, speaking, stopping)
        try:
            waited: set[asyncio.Future[Any]] = {over, *tasks}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if over.done():
                return over.result()
            if stopping.done():
                return "stopped"
            return speaking.result() if speaking.done() else _closing(socket)
        finally:
            if not over.done():
                over.set_result("over")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _keep(
        self, frames: list[bytes], recv_ns: int, session: Session, conn: bytes, due: asyncio.Event
    ) -> None:
        """Judge and journal what one read of the socket brought; where judging fails, journal it all the same."""
        counters, now, kept = self.counters, time.monotonic(), 0
        counters.frames += len(frames)
        counters.last_frame_ns = recv_ns
        try:
            while kept < len(frames):
                kinds = session.receive_run(frames[kept:] if kept else frames, now)
                until = kept + len(kinds)
                if session.has_notes:
                    self._journal.extend(recv_ns, conn, kinds[:-1], frames[kept : until - 1])
                    kept = until - 1
                    self._drain_notes(session, conn, recv_ns)
                    self._journal.extend(recv_ns, conn, kinds[-1:], frames[kept:until])
                else:
                    self._journal.extend(recv_ns, conn, kinds, frames[kept:until])
                kept = until
                deltas = kinds.count(Kind.DELTA)
                counters.deltas += deltas
                if deltas < len(kinds):
                    counters.snapshots += kinds.count(Kind.SNAPSHOT)
                    counters.malformed += kinds.count(Kind.MALFORMED)
                    if trades := kinds.count(Kind.TRADE):
                        counters.trades += trades
                        run = zip(frames[until - len(kinds) : until], kinds, strict=True)
                        self.recent_trades.extend((recv_ns, f) for f, k in run if k == Kind.TRADE)
                    if deltas + trades < len(kinds):
                        due.set()
                    self._pass_on(session, conn)
        except BaseException:
            rest = frames[kept:]
            self._journal.extend(recv_ns, conn, [kind_of(frame) for frame in rest], rest)
            raise

    def _pass_on(self, session: Session, conn: bytes) -> None:
        """Tell of life events and losses. Losses are told in wall time, which REST understands."""
        if session.lifecycle_events:
            events, session.lifecycle_events = session.lifecycle_events, []
            if self._on_life_events is not None:
                self._on_life_events(events)
        for lost in session.take_missed():
            ahead_ns = time.time_ns() - int(time.monotonic() * 1e9)
            since_ns, until_ns = (int(at * 1e9) + ahead_ns for at in (lost.since, lost.until))
            tickers = session.tickers
            if lost.cause == "connection":
                tickers |= self._tickers_then
            if self._on_lost is not None:
                self._on_lost(MissedSpan(lost, conn, since_ns, until_ns, tickers))

    def _stop_reading(self, socket: BatchedConnection) -> None:
        """Not reading lets TCP push back on the exchange, which may then end the subscription."""
        log.error(
            "The disk does not keep up: %d MiB wait for it, so the exchange is not read. %s",
            self._journal.backlog_bytes >> 20,
            self._journal.blocked or "",
        )
        self._blocked = True
        socket.transport.pause_reading()

    async def _speak(
        self, socket: BatchedConnection, session: Session, conn: bytes, due: asyncio.Event
    ) -> str:
        """Send what is due, and notice when the peer has gone silent."""
        try:
            while True:
                for ticker, cause, detail in self._distrusted:
                    session.mark_book_stale(ticker, cause, dict(detail))
                self._distrusted.clear()
                self._drain_notes(session, conn)
                for command in session.commands(time.monotonic()):
                    await socket.send(command, text=True)
                for warning in session.warnings:
                    log.warning("%s", warning)
                session.warnings.clear()
                if session.ended or session.fatal:
                    return session.ended or "refused"
                if self._blocked:
                    if not self._journal.full:
                        self._blocked = False
                        socket.transport.resume_reading()
                elif socket.silent_s > LIVENESS_S and not socket.has_unread_bytes:
                    return f"silent for {LIVENESS_S:.0f} s"
                self.counters.last_heard_ns = time.time_ns() - int(socket.silent_s * 1e9)
                await _either(due, 2 * TICK_S)
        except ConnectionClosed:
            await socket.wait_closed()
            return _closing(socket)

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
            self._journal.submit()
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
                    conn=self._conn,
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


def _closing(socket: BatchedConnection) -> str:
    frame = socket.protocol.close_rcvd
    if frame is None:
        return "the connection broke without a close frame"
    return printable(f"closed by the exchange: {frame.code} {frame.reason}".rstrip())


async def _either(event: asyncio.Event, seconds: float) -> None:
    """Wait until the event is set, which is undone, or the time has passed."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
    event.clear()


async def _close(socket: BatchedConnection) -> None:
    """Leave politely, reading on meanwhile, but do not wait for a peer that is gone."""
    try:
        await asyncio.wait_for(socket.close(), 1.0)
    except (TimeoutError, ConnectionClosed, OSError):
        socket.transport.abort()

"""Capture: receive frames, timestamp and journal them, detect gaps, request snapshots.

Capture never waits for a database and never drops a frame. Where the disk does not keep up it stops reading
the socket and reports that. Every connection's beginning, end and cause is a note in the journal. What a
frame means is decided by `exchange.session`; everything that may fail or wait is a task of `background`.
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

from kalshi_platform import backoff
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
"""Interval at which received frames are submitted to the disk; a kill can lose this much."""
HEARTBEAT_S = 10.0
BACKOFF_MIN_S, BACKOFF_MAX_S = 0.5, 30.0
HEALTHY_S = 30.0
"""A connection that lasted this long resets the back-off."""


class CaptureState(Enum):
    """What capture is doing, as the health report shows it."""

    STARTING = "starting"
    CONNECTING = "connecting"
    STREAMING = "streaming"
    QUIET = "quiet"
    """Connected and receiving bytes, but no frame for `QUIET_AFTER_S`."""
    BLOCKED = "blocked"
    """The disk does not keep up: the socket is not read."""
    STOPPED = "stopped"


QUIET_AFTER_S = 30.0
AUXILIARY_CHANNELS = (LIFECYCLE, TRADES)
"""The auxiliary channels to record, in the order in which they are subscribed to."""
RECENT_TRADES = 32_768
"""Trades kept in memory, so that the trade backfill can skip those that the stream delivered."""


@dataclass
class Counters:
    """Counts since the start."""

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
    """When bytes of any kind, pings included, were last received."""
    disconnects: dict[str, int] = field(default_factory=dict)
    """Connections that ended, by cause (without the exchange's own text)."""


@dataclass(frozen=True)
class MissedSpan:
    """A span that an auxiliary channel has missed, in wall time, and the markets concerned."""

    missed: MissedFrames
    conn: bytes
    since_ns: int
    until_ns: int
    tickers: frozenset[str]


class Capture:
    """Keeps one shard connected to the exchange and journals what it receives."""

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
        on_missed: Callable[[MissedSpan], None] | None = None,
    ) -> None:
        """`silent_since`: when the preceding recording ended, by the monotonic clock. `recent_trades`: its
        last trades. The callbacks run in the event loop's thread and must not block.
        """
        self._ws_url = ws_url
        self._credentials = credentials
        self._journal = journal
        self._tickers = list(tickers)
        self._use_yes_price = use_yes_price
        self._observed_yes_price: bool | None = None
        """The scale that the last connection was found to send; None before the first one."""
        self._stop = asyncio.Event()
        self._session: Session | None = None
        self._conn = NO_CONNECTION
        self._stale_books: list[tuple[str, str, dict[str, object]]] = []
        self._on_lifecycle_events = on_lifecycle_events
        self._on_missed = on_missed
        self._silent_since = silent_since
        self._reconnects = silent_since is not None
        """Whether a connection precedes the next one, of this start or of an earlier one."""
        self._previous_tickers: frozenset[str] = frozenset()
        self.recent_trades = deque(recent_trades, RECENT_TRADES)
        """(receive time in ns, frame) of the newest trades, across connections."""
        self._blocked = False
        self.counters = Counters()
        self.connected = False
        self.unreached: str | None = None
        """Why the last attempt to connect failed, as a sentence; None while connected."""
        self.ended = False
        """Whether `run` has returned and everything received was submitted to the journal's writer."""

    @property
    def state(self) -> CaptureState:
        """What capture is doing now."""
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
        """(number of followed markets, number of those whose book is synced)."""
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
        """Mark a book stale that a later stage found wrong. Call in the event loop's thread."""
        self._stale_books.append((ticker, cause, detail))

    def rescale(self, *, yes_price: bool) -> None:
        """Read no bids on the scale that the exchange was found to use. Call in the event loop's thread."""
        if self._session is not None and self.connected:
            self._session.rescale(time.monotonic(), yes_price=yes_price)

    def note(self, kind: str, detail: Mapping[str, object], market_ticker: str = "") -> None:
        """Append another component's note to the journal. Call in the event loop's thread."""
        self._journal.note(kind, detail, market_ticker=market_ticker)

    def record_backfill(
        self, span: MissedSpan, frames: Sequence[bytes], detail: Mapping[str, object]
    ) -> None:
        """Journal backfilled trades and a note about them. Call in the event loop's thread."""
        now_ns = time.time_ns()
        self._journal.extend(now_ns, span.conn, [Kind.TRADE] * len(frames), list(frames))
        self.recent_trades.extend((now_ns, frame) for frame in frames)
        self._journal.note("recovered", detail, conn=span.conn, sid=span.missed.sid)

    async def run(self) -> None:
        """Stay connected until `stop`. Raises: `ExchangeError` where reconnecting cannot help."""
        ticking = asyncio.create_task(self._tick())
        try:
            attempt = 0
            while not self._stop.is_set():
                began = time.monotonic()
                try:
                    await self._connect_once(attempt)
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

    async def _connect_once(self, attempt: int) -> None:
        """Run one connection from dial to end; both are noted in the journal."""
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
            auxiliary=AUXILIARY_CHANNELS,
            silent_since=self._silent_since,
            reconnects=self._reconnects,
        )
        self._reconnects = True
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
            cause = await self._run_connection(socket, session, conn)
        finally:
            try:
                await _close(socket)  # frames received until then are journalled
            finally:
                seconds, frames = time.monotonic() - began, self.counters.frames - before
                self._note_disconnect(session, conn, cause, seconds, frames)
        if session.fatal is not None:
            raise session.fatal

    def _note_disconnect(
        self, session: Session, conn: bytes, cause: str, seconds: float, frames: int
    ) -> None:
        """Note a connection's end and keep the state that the next connection needs."""
        self.connected = self._blocked = False
        self._conn = NO_CONNECTION
        ends = self.counters.disconnects
        kind = cause.partition(":")[0]
        ends[kind] = ends.get(kind, 0) + 1
        now = time.monotonic()
        silent_s = (time.time_ns() - self.counters.last_frame_ns) / 1e9
        self._silent_since = session.silent_since(max(now - seconds, now - silent_s))
        self._previous_tickers = session.tickers
        self._observed_yes_price = session.scale.yes_price
        while session.has_notes:
            self._drain_notes(session, conn)
        detail = {"cause": cause, "frames": frames, "seconds": round(seconds, 3)}
        dead_s = min((time.time_ns() - self.counters.last_heard_ns) / 1e9, seconds)
        if dead_s > LIVENESS_S:
            detail["span_s"] = round(dead_s, 6)
        self._journal.note("disconnected", detail, conn=conn)
        log.info("Disconnected from %s: %s.", uuid.UUID(bytes=conn), cause)

    async def _run_connection(
        self, socket: BatchedConnection, session: Session, conn: bytes
    ) -> str:
        """Run until the connection cannot be used any more; return the cause.

        Frames are journalled beyond that, until the connection is closed.
        """
        over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        wake = asyncio.Event()

        def deliver(frames: list[bytes], recv_ns: int) -> None:
            try:
                self._journal_frames(frames, recv_ns, session, conn, wake)
                if self._journal.full and not self._blocked:
                    self._stop_reading(socket)
                if (session.ended or session.fatal) and not over.done():
                    over.set_result(session.ended or "refused")
            except BaseException as error:
                if over.done():
                    log.error("A frame after the connection's end: %s", error, exc_info=True)
                else:
                    over.set_exception(error)  # raised where `over` is awaited

        socket.deliver_to(deliver)
        closing = asyncio.create_task(socket.wait_closed())
        speaking = asyncio.create_task(self._send_commands(socket, session, conn, wake))
        stopping = asyncio.create_task(self._stop.wait())
        tasks = (closing, speaking, stopping)
        try:
            waited: set[asyncio.Future[Any]] = {over, *tasks}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if over.done():
                return over.result()
            if stopping.done():
                return "stopped"
            return speaking.result() if speaking.done() else _close_cause(socket)
        finally:
            if not over.done():
                over.set_result("over")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _journal_frames(
        self, frames: list[bytes], recv_ns: int, session: Session, conn: bytes, wake: asyncio.Event
    ) -> None:
        """Process and journal the frames of one socket read; where processing fails, journal them anyway."""
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
                    kept = until
                    self._drain_notes(session, conn, recv_ns)
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
                        wake.set()
                    self._report_events(session, conn)
        except BaseException:
            unprocessed = frames[kept:]
            self._journal.extend(
                recv_ns, conn, [kind_of(frame) for frame in unprocessed], unprocessed
            )
            raise

    def _report_events(self, session: Session, conn: bytes) -> None:
        """Report lifecycle events and missed spans; spans in wall time, as REST uses it."""
        if session.lifecycle_events:
            events, session.lifecycle_events = session.lifecycle_events, []
            if self._on_lifecycle_events is not None:
                self._on_lifecycle_events(events)
        for missed in session.take_missed():
            ahead_ns = time.time_ns() - int(time.monotonic() * 1e9)
            since_ns, until_ns = (int(at * 1e9) + ahead_ns for at in (missed.since, missed.until))
            tickers = session.tickers
            if missed.cause == "connection":
                tickers |= self._previous_tickers
            if self._on_missed is not None:
                self._on_missed(MissedSpan(missed, conn, since_ns, until_ns, tickers))

    def _stop_reading(self, socket: BatchedConnection) -> None:
        """Pause reading: TCP back-pressure reaches the exchange, which may then end the subscription."""
        log.error(
            "The disk does not keep up: %d MiB wait for it, so the socket is not read. %s",
            self._journal.backlog_bytes >> 20,
            self._journal.blocked or "",
        )
        self._blocked = True
        socket.transport.pause_reading()

    async def _send_commands(
        self, socket: BatchedConnection, session: Session, conn: bytes, wake: asyncio.Event
    ) -> str:
        """Send due commands; return the cause where the peer has gone silent or the session ended."""
        try:
            while True:
                for ticker, cause, detail in self._stale_books:
                    session.mark_book_stale(ticker, cause, dict(detail))
                self._stale_books.clear()
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
                await _wait_event(wake, 2 * TICK_S)
        except ConnectionClosed:
            await socket.wait_closed()
            return _close_cause(socket)

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
    """Back-off with full jitter, so that recorders disconnected together do not reconnect together."""
    ceiling = backoff.wait_s(attempt + 1, BACKOFF_MIN_S, BACKOFF_MAX_S)
    return random.uniform(BACKOFF_MIN_S / 2, ceiling)  # noqa: S311 - jitter, not a secret


def _close_cause(socket: BatchedConnection) -> str:
    frame = socket.protocol.close_rcvd
    if frame is None:
        return "the connection broke without a close frame"
    return printable(f"closed by the exchange: {frame.code} {frame.reason}".rstrip())


async def _wait_event(event: asyncio.Event, seconds: float) -> None:
    """Wait until the event is set, and clear it, or until the time has passed."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
    event.clear()


async def _close(socket: BatchedConnection) -> None:
    """Close with a close frame while still reading; abort where the peer does not answer within 1 s."""
    try:
        await asyncio.wait_for(socket.close(), 1.0)
    except (TimeoutError, ConnectionClosed, OSError):
        socket.transport.abort()

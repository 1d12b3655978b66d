"""The state of one connection, without I/O: frames in, commands and notes out.

Sequence numbers. `seq` counts per sid (subscription id) across all its markets; `ok`, `unsubscribed` and
sid-scoped errors consume numbers as data does. A number that is not the next one is a gap: all books of
that subscription become stale, and a `gap` note records it.

Snapshots. The session re-requests missing snapshots until they arrive (`get_snapshot`; a second `subscribe`
would be a silent no-op), with back-off while gaps continue. A request has succeeded when the snapshot
arrives, not when a reply does: replies may be out of order, and a replayed recording has unknown ids.

Auxiliary channels (trades, lifecycle events) are kept in `auxiliary_channel` and never affect a book.
Sockets and the journal belong in `recorder.capture`. Times are seconds of a monotonic clock, passed in by
the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kalshi_platform.exchange.auxiliary_channel import (
    BATCH,
    LIFECYCLE,
    TRADES,
    AuxiliaryChannel,
    ChannelCommand,
    MissedFrames,
    auxiliary_channels,
)
from kalshi_platform.exchange.book import BookError, snapshot_extents
from kalshi_platform.exchange.errors import CredentialsError, ExchangeError, ProtocolError
from kalshi_platform.exchange.frames import (
    DecodeError,
    Head,
    LifecycleEvent,
    Reply,
    decode_head,
    decode_lifecycle_event,
    decode_reply,
    decode_snapshot,
    market_of,
)
from kalshi_platform.exchange.scale import Scale
from kalshi_platform.journal.kind import Kind
from kalshi_platform.printable import printable

CHANNEL = "orderbook_delta"
IN_FLIGHT = 8
"""Commands without a reply at a time; far below the exchange's limit of 10,000 a second."""
REPLY_TIMEOUT_S = 15.0
SNAPSHOT_TIMEOUT_S = 10.0
"""A snapshot that has not arrived by then is requested again."""
REQUESTS_BEFORE_RECONNECT = 5
RECOVERY_MIN_S, RECOVERY_MAX_S = 1.0, 30.0
"""Interval between rounds of snapshot requests: doubles with every gap, up to the maximum."""
SCAN_S = 0.25
"""Interval between scans for markets without a snapshot, when none was missing: each scan visits all."""
UNREADABLE_RETRY_S = 60.0
"""Delay before another request after an unreadable snapshot, from the second one in a row on."""
GAP_FREE_S = 60.0
"""After this long without a gap, the back-off starts from the minimum again."""

MAX_ERROR_TEXT = 500
"""Characters of the exchange's error text that are kept; the frame itself is recorded whole."""
TERMINAL_ERRORS = {10: "channel error", 25: "buffer overflow: this client read too slowly"}
RETRYABLE_ERRORS = {18, 27}
AUTHENTICATION_REQUIRED = 9
MARKET_LIMIT = 26
SCALE = "scale"
"""The cause of a gap at which the scale of no bids changed; `use_yes_price` is the new one."""
MALFORMED_SNAPSHOT = "malformed_snapshot"
"""The cause of a gap whose frame was received and could not be read."""
OTHER_SUBSCRIPTION = "other_subscription"
"""The cause of a gap of a book whose snapshot arrived on another subscription than the one with missed frames."""
GAP_CLOSED, RECONNECTED = "gap", "connected"
"""The causes of a `resynced` note: every book has a snapshot since a gap, or since a reconnect."""
REPLIES = frozenset(["subscribed", "ok", "unsubscribed", "error"])


@dataclass(frozen=True)
class Note:
    """An event to be recorded in the journal beside the frames."""

    kind: str
    detail: dict[str, Any]
    sid: int = 0
    market_ticker: str = ""


@dataclass
class _Market:
    added: bool = False
    """Whether a command to carry it was sent."""
    synced: bool = False
    sid: int = 0
    """The subscription on which its last snapshot arrived."""
    requested_at: float | None = None
    """When its snapshot was last requested; None before, and when a gap has made the request void."""
    requests: int = 0
    unreadable: int = 0
    """Consecutive unreadable snapshots."""
    known: bool = True
    """False after a snapshot with an empty market id: the exchange does not know the ticker."""


@dataclass
class _Gap:
    expected: int
    got: int
    since: float
    waiting: set[str]
    markets: int


@dataclass
class _Sid:
    channel: str = ""
    next_seq: int = 1
    gap: _Gap | None = None


@dataclass
class _Pending:
    at: float
    action: str
    tickers: Sequence[str] = field(default_factory=tuple)
    command: ChannelCommand | None = None
    """The command of an auxiliary channel; None for the order books' own."""


class Session:
    """The state of one connection. Feed it every frame; send what `commands` returns."""

    def __init__(
        self,
        tickers: Iterable[str] = (),
        *,
        use_yes_price: bool = False,
        observed_yes_price: bool | None = None,
        auxiliary: Iterable[str] = (),
        silent_since: float | None = None,
        reconnects: bool = False,
    ) -> None:
        """`auxiliary`: the channels to subscribe to besides the books: TRADES, LIFECYCLE. `silent_since`: when
        the preceding connection last received bytes, None without one. `use_yes_price`: the scale to
        request; `observed_yes_price`: the scale that an earlier connection was found to send. `reconnects`:
        whether another connection precedes this one, so that it ends an outage once every book is synced.
        """
        self.use_yes_price = use_yes_price
        self.scale = Scale(use_yes_price if observed_yes_price is None else observed_yes_price)
        self.ended: str | None = None
        """Why this connection cannot be used any more, set once; the caller reconnects."""
        self.fatal: ExchangeError | None = None
        """An error that a reconnect cannot resolve."""
        self.warnings: list[str] = []
        """Sentences for the log; the caller removes them."""
        self.lifecycle_events: list[LifecycleEvent] = []
        """Lifecycle events received; the caller removes them."""
        self._auxiliary = auxiliary_channels(auxiliary, silent_since)
        self._notes: list[Note] = []
        self._afterwards: list[Note] = []
        """Notes whose place is after the frame that caused them: part of the next call's notes."""
        self._sids: dict[int, _Sid] = {}
        self._book_sid: int | None = None
        self._markets: dict[str, _Market] = {}
        self._new: dict[str, None] = {}
        """Markets for which no command to carry them was sent yet."""
        self._leaving: set[str] = set()
        self._pending: dict[int, _Pending] = {}
        self._subscribe_sent_at: float | None = None
        self._next_id = 1
        self._missing: set[str] = set()
        """The markets that have had no snapshot yet on a connection that follows another."""
        self._next_recovery_at = 0.0
        self._next_scan_at = 0.0
        self._recovery_interval = RECOVERY_MIN_S
        self._last_gap_at = float("-inf")
        self.follow(tickers)
        if reconnects:
            self._missing |= self._markets.keys()
        self._resumed = len(self._missing)

    # -- called by the recorder --------------------------------------------------------------

    @property
    def tickers(self) -> frozenset[str]:
        """The markets that this connection follows."""
        return frozenset(self._markets)

    @property
    def synced(self) -> int:
        """The number of followed markets whose book is synced: no gap since its snapshot."""
        return sum(market.synced for market in self._markets.values())

    def follow(self, tickers: Iterable[str]) -> None:
        """Follow exactly these markets: add new ones and leave others, without a reconnect."""
        wanted = dict.fromkeys(tickers)
        for ticker in wanted:
            self._leaving.discard(ticker)
            if ticker not in self._markets:
                self._markets[ticker] = _Market()
                self._new[ticker] = None
                for channel in self._auxiliary.values():
                    channel.add(ticker)
        for ticker in [t for t in self._markets if t not in wanted]:
            if self._markets.pop(ticker).added:
                self._leaving.add(ticker)
            self._new.pop(ticker, None)
            for channel in self._auxiliary.values():
                channel.remove(ticker)
            self._notes.append(Note("left", {}, self._book_sid or 0, ticker))
            self._resume(ticker, self._book_sid or 0, None)
            for sid in self._sids.values():
                self._snapshot_arrived(sid, ticker, now=None)

    def take_missed(self) -> list[MissedFrames]:
        """What the auxiliary channels have missed since the last call."""
        missed: list[MissedFrames] = []
        for channel in self._auxiliary.values():
            missed += channel.missed
            channel.missed.clear()
        return missed

    def silent_since(self, last_received: float) -> float | None:
        """Since when an auxiliary channel has missed frames, if this connection ended at `last_received`.

        None where no channel was subscribed yet.
        """
        since = [
            last_received if channel.silent_since is None else channel.silent_since
            for channel in self._auxiliary.values()
            if channel.sid is not None or channel.silent_since is not None
        ]
        return min(since, default=None)

    def mark_book_stale(self, ticker: str, cause: str, detail: dict[str, Any]) -> None:
        """Mark a synced book stale that a check found wrong: note a gap and request a snapshot."""
        market = self._markets.get(ticker)
        if market is None or not market.synced:
            return
        market.synced = False
        market.requested_at = None
        self._next_scan_at = 0.0
        self._notes.append(Note("gap", {"cause": cause, **detail}, self._book_sid or 0, ticker))

    @property
    def has_notes(self) -> bool:
        """Whether `take_notes` would return any, now or with its next call."""
        return bool(self._notes or self._afterwards)

    def take_notes(self) -> list[Note]:
        """Return the notes since the last call, in order; those placed after a frame come with the next call."""
        notes, self._notes, self._afterwards = self._notes, self._afterwards, []
        return notes

    # -- frames in ---------------------------------------------------------------------------

    def receive(self, frame: bytes, now: float) -> Kind:
        """Process one frame and return its record kind. Notes that it caused belong before it."""
        return self.receive_run((frame,), now)[0]

    def receive_run(self, frames: Iterable[bytes], now: float) -> list[Kind]:
        """Process frames up to the first that causes a note; return the record kinds.

        That frame's kind is the last in the list. The notes of the next `take_notes` belong before it, those of
        the one after that behind it.
        """
        kinds = []
        for frame in frames:
            try:
                head = decode_head(frame)
            except DecodeError:
                kinds.append(Kind.MALFORMED)
                continue
            if head.seq:
                sid = self._sids.get(head.sid)
                if sid is not None and sid.next_seq == head.seq:
                    sid.next_seq += 1
                else:
                    self._check_sequence(head, now)
            if head.type == "orderbook_delta":
                kinds.append(Kind.DELTA)
            else:
                kinds.append(self._not_a_delta(head, frame, now))
            if self._notes or self._afterwards:
                break
        return kinds

    def _not_a_delta(self, head: Head, frame: bytes, now: float) -> Kind:
        if head.type == "orderbook_snapshot":
            return self._snapshot(head, frame, now)
        if head.type == TRADES:
            self._note_frame(head.sid, now)
            return Kind.TRADE
        if head.type in REPLIES:
            self._note_frame(head.sid, now)
            self._reply(frame, now)
        elif head.type == LIFECYCLE:
            self._note_frame(head.sid, now)
            self._lifecycle_event(frame)
        return Kind.CONTROL

    def _check_sequence(self, head: Head, now: float) -> None:
        """Handle the first number of a sid, or one that is not the next: note a gap where it is not 1."""
        sid = self._sids.setdefault(head.sid, _Sid(TRADES if head.type == TRADES else ""))
        expected = sid.next_seq
        sid.next_seq = head.seq + 1
        if head.seq == expected:
            return
        detail = {
            "cause": "sequence" if head.seq > expected else "repeated",
            "expected": expected,
            "got": head.seq,
            "missing": max(head.seq - expected, 0),
            "channel": sid.channel,
        }
        self._notes.append(Note("gap", detail, head.sid))
        if self._carries_books(head.sid, head.type):
            self._make_stale(head.sid, expected, head.seq, now)
            return
        channel = self._channel_of(head.sid)
        if channel is not None and head.seq > expected:
            channel.gap(head.seq - expected, now)

    def _make_stale(self, number: int, expected: int, got: int, now: float) -> None:
        """Mark all books stale and request their snapshots: frames before number `got` were missed."""
        if now - self._last_gap_at > GAP_FREE_S:
            self._recovery_interval = RECOVERY_MIN_S
        else:
            self._recovery_interval = min(self._recovery_interval * 2, RECOVERY_MAX_S)
        self._last_gap_at = now
        self._next_scan_at = 0.0
        sid = self._sids[number]
        waiting = set()
        for ticker, market in self._markets.items():
            if market.synced:
                market.synced, market.requested_at, market.requests = False, None, 0
                if market.sid != number:  # the gap's own note covers books of its subscription
                    detail = {"cause": OTHER_SUBSCRIPTION, "of": number}
                    self._notes.append(Note("gap", detail, market.sid, ticker))
            if market.added:
                waiting.add(ticker)
        since = sid.gap.since if sid.gap else now
        sid.gap = _Gap(expected, got, since, waiting, len(waiting))

    def _carries_books(self, sid: int, frame_type: str) -> bool:
        channel = self._sids[sid].channel
        return sid == self._book_sid or channel == CHANNEL or frame_type.startswith("orderbook_")

    def _snapshot(self, head: Head, frame: bytes, now: float) -> Kind:
        sid = self._sids.setdefault(head.sid, _Sid())
        try:
            snapshot = decode_snapshot(frame)
            yes, no = snapshot_extents(snapshot)
        except (*DecodeError, BookError) as error:
            self._unreadable_snapshot(head, sid, market_of(frame), str(error), now)
            return Kind.SNAPSHOT
        if self.scale.observe(yes, no, len(self._markets)):
            self._change_scale(head.sid, head.seq, now)
        ticker = snapshot.market_ticker
        known = self._markets.get(ticker)
        if known is None:  # no longer followed; its snapshot was already on its way
            self._afterwards.append(Note("left", {}, head.sid, ticker))
        else:
            known.synced, known.sid = True, head.sid
            known.requested_at = now
            known.requests = known.unreadable = 0
            if snapshot.market_id in {None, ""} and known.known:
                known.known = False
                self._notes.append(Note("unknown_market", {"market_id": ""}, head.sid, ticker))
                self.warnings.append(
                    f"The exchange does not know the market {ticker!r} (it sent an empty snapshot without"
                    " a market id). Check MARKET_TICKERS."
                )
        self._resume(ticker, head.sid, now)
        self._snapshot_arrived(sid, ticker, now)
        return Kind.SNAPSHOT

    def _unreadable_snapshot(
        self, head: Head, sid: _Sid, ticker: str, reason: str, now: float
    ) -> None:
        """Mark the book of an unreadable snapshot stale; all books where its market cannot be read either."""
        detail = {"cause": MALFORMED_SNAPSHOT, "seq": head.seq, "reason": reason[:MAX_ERROR_TEXT]}
        market = self._markets.get(ticker)
        if market is None and not ticker:
            numbers = {"expected": head.seq, "got": head.seq + 1, "missing": 1}
            self._notes.append(Note("gap", {**detail, **numbers}, head.sid))
            self._make_stale(head.sid, head.seq, head.seq + 1, now)
        elif market is not None:
            if market.synced:
                self._notes.append(Note("gap", detail, head.sid, ticker))
            if not market.unreadable:
                self.warnings.append(
                    f"A snapshot of {ticker} cannot be read ({printable(reason[:MAX_ERROR_TEXT])}): its book is"
                    " stale, and another one is requested. The frame is in stream_events as malformed."
                )
            pause_s = UNREADABLE_RETRY_S - SNAPSHOT_TIMEOUT_S if market.unreadable else 0.0
            market.unreadable += 1
            market.synced, market.requests = False, 0
            market.requested_at = now + pause_s if pause_s else None
            self._next_scan_at = 0.0

    def rescale(self, now: float, *, yes_price: bool) -> None:
        """Read no bids on this scale from now on, by evidence other than this session's snapshots."""
        sid = self._sids.get(self._book_sid or 0)
        if sid is None or self._book_sid is None or yes_price == self.scale.yes_price:
            return
        self.scale = Scale(yes_price)
        self._change_scale(self._book_sid, sid.next_seq, now)

    def _change_scale(self, number: int, seq: int, now: float) -> None:
        """Note that no bids are on the other scale from frame `seq` on, and request all snapshots."""
        yes_price = self.scale.yes_price
        detail = {
            "cause": SCALE,
            "seq": seq,
            "use_yes_price": yes_price,
            "asked": self.use_yes_price,
        }
        self._notes.append(Note("gap", detail, number))
        self.warnings.append(
            f"The exchange sends no bids {'on the YES scale' if yes_price else 'on their own scale'},"
            f" although use_yes_price={str(self.use_yes_price).lower()} was requested. They are read on that"
            " scale from now on, and all snapshots are requested again."
        )
        self._make_stale(number, seq, seq, now)

    def _resume(self, ticker: str, number: int, now: float | None) -> None:
        """Note that the outage before this connection is over once it has every market's snapshot."""
        if ticker not in self._missing:
            return
        self._missing.discard(ticker)
        if not self._missing:
            detail: dict[str, Any] = {"cause": RECONNECTED, "markets": self._resumed}
            if now is not None and self._subscribe_sent_at is not None:
                detail["seconds"] = round(now - self._subscribe_sent_at, 6)
            self._afterwards.append(Note("resynced", detail, number))

    def _snapshot_arrived(self, sid: _Sid, ticker: str, now: float | None) -> None:
        gap = sid.gap
        if gap is None or ticker not in gap.waiting:
            return
        gap.waiting.discard(ticker)
        if not gap.waiting:
            sid.gap = None
            number = next((n for n, s in self._sids.items() if s is sid), 0)
            detail: dict[str, Any] = {
                "cause": GAP_CLOSED,
                "expected": gap.expected,
                "got": gap.got,
                "markets": gap.markets,
            }
            if now is not None:
                detail["seconds"] = round(now - gap.since, 6)
            self._afterwards.append(Note("resynced", detail, number))

    def _reply(self, frame: bytes, now: float) -> None:
        try:
            reply = decode_reply(frame)
        except DecodeError:
            return  # its head was readable: it is recorded as a control frame and its number counts
        pending = self._pending.pop(reply.id, None)
        body = reply.msg if isinstance(reply.msg, dict) else {}
        if reply.type == "subscribed":
            number = body.get("sid")
            if isinstance(number, int):
                self._subscribed(number, str(body.get("channel", "")), now)
        elif reply.type == "unsubscribed":
            channel = self._channel_of(reply.sid)
            if reply.sid == self._book_sid:
                self.ended = "the exchange ended the order-book subscription"
            elif channel is not None:
                self._end_channel(channel, "unsubscribed", now)
        elif reply.type == "error" and not self._handle_channel_error(reply, body, pending, now):
            self._error(reply, body, pending, now)
        if (
            pending is not None
            and pending.command is not None
            and reply.type in {"subscribed", "ok"}
        ):
            channel = self._auxiliary[pending.command.channel]
            if channel.sid is None and reply.sid:  # an ok instead: the subscription existed already
                self._subscribed(reply.sid, channel.channel, now)
            channel.confirmed(pending.command, now)

    def _subscribed(self, sid: int, channel: str, now: float) -> None:
        self._sids.setdefault(sid, _Sid()).channel = channel
        if channel == CHANNEL:
            self._book_sid = sid
        elif channel in self._auxiliary:
            self._auxiliary[channel].subscribed(sid, now)

    def _error(
        self, reply: Reply, body: dict[str, Any], pending: _Pending | None, now: float
    ) -> None:
        code, text = _error_code_and_text(body)
        concerns_books = self._book_sid in {None, reply.sid} or not reply.sid
        if code in TERMINAL_ERRORS and concerns_books:
            self.ended = f"error {code}, {TERMINAL_ERRORS[code]}"
        elif code == AUTHENTICATION_REQUIRED:
            self.fatal = CredentialsError(
                "The exchange asks for authentication on an open connection (error 9)."
                " Check PROD_KEYID and PROD_KEYFILE."
            )
        elif code == MARKET_LIMIT:
            self.fatal = ProtocolError(
                f"The exchange allows no more markets on one subscription (error 26, {text}); it has"
                f" {len(self._markets)}. Record fewer markets."
            )
        elif code in RETRYABLE_ERRORS and pending is not None:
            self._next_recovery_at = max(self._next_recovery_at, now + RECOVERY_MIN_S)
            for ticker in pending.tickers:
                market = self._markets.get(ticker)
                if market is not None and not market.synced:
                    market.requested_at = None
                    self._next_scan_at = 0.0
                    if pending.action != "get_snapshot":
                        market.added = False
                        self._new[ticker] = None
        else:
            self.warnings.append(f"The exchange answered error {code}: {text or 'no text'}.")
        if (
            code not in RETRYABLE_ERRORS
            and self._book_sid is None
            and self._subscribe_sent_at is not None
        ):
            self.ended = self.ended or f"subscribing was refused: error {code}, {text}"

    # -- auxiliary channels ----------------------------------------------------------------------

    def _channel_of(self, sid: int) -> AuxiliaryChannel | None:
        return next((s for s in self._auxiliary.values() if sid and s.sid == sid), None)

    def _note_frame(self, sid: int, now: float) -> None:
        for channel in self._auxiliary.values():
            if channel.sid == sid:
                channel.last_frame_at = now

    def _lifecycle_event(self, frame: bytes) -> None:
        try:
            self.lifecycle_events.append(decode_lifecycle_event(frame))
        except DecodeError:
            self.warnings.append(
                "The exchange sent a market lifecycle event that cannot be read; the frame is in"
                " stream_events."
            )

    def _handle_channel_error(
        self, reply: Reply, body: dict[str, Any], pending: _Pending | None, now: float
    ) -> bool:
        """Handle an error that concerns an auxiliary channel; return whether it did."""
        command = pending.command if pending is not None else None
        channel = (
            self._auxiliary[command.channel] if command is not None else self._channel_of(reply.sid)
        )
        if channel is None:
            return False
        code, text = _error_code_and_text(body)
        if code in TERMINAL_ERRORS:
            self._end_channel(channel, f"error {code}, {TERMINAL_ERRORS[code]}", now)
        elif command is None:
            self.warnings.append(
                f"The exchange answered error {code} on {channel.channel}: {text}."
            )
        else:
            refused = code not in RETRYABLE_ERRORS
            channel.failed(command, now, refused=refused)
            if refused:
                detail = {
                    "channel": channel.channel,
                    "action": command.action,
                    "code": code,
                    "msg": text,
                }
                self._notes.append(Note("refused", detail, channel.sid or 0))
                self.warnings.append(
                    f"The exchange refuses channel {channel.channel} (error {code}, {text}): the books are"
                    " recorded without it, and the subscription is retried in some minutes."
                )
        return True

    def _end_channel(self, channel: AuxiliaryChannel, cause: str, now: float) -> None:
        detail = {"cause": "subscription_ended", "channel": channel.channel, "reason": cause}
        self._notes.append(Note("gap", detail, channel.sid or 0))
        self.warnings.append(
            f"The exchange ended channel {channel.channel} ({cause}): it is subscribed to again."
        )
        for number in [
            n
            for n, p in self._pending.items()
            if p.command and p.command.channel == channel.channel
        ]:
            del self._pending[number]
        channel.ended(now)

    def _channel_commands(self, now: float) -> Iterator[bytes]:
        for channel in self._auxiliary.values():
            commands = channel.due_commands(now)
            while len(self._pending) < IN_FLIGHT and (command := next(commands, None)) is not None:
                params: dict[str, Any] = {"skip_ticker_ack": True}
                if command.tickers:
                    params["market_tickers"] = list(command.tickers)
                if command.action == "subscribe":
                    params["channels"] = [command.channel]
                else:
                    params |= {"sids": [channel.sid], "action": command.action}
                cmd = "subscribe" if command.action == "subscribe" else "update_subscription"
                yield self._command(
                    cmd, command.action, params, command.tickers, now, command=command
                )

    # -- commands out ------------------------------------------------------------------------

    def commands(self, now: float) -> Iterator[bytes]:
        """Yield the commands that are due. Call it about ten times a second and after every reply."""
        if self.ended or self.fatal:
            return
        self._expire(now)
        if self._book_sid is None:
            yield from self._subscribe(now)
            if not self._markets:
                yield from self._channel_commands(now)  # lifecycle events announce new markets
            return
        if self._leaving:
            for batch in _batches(sorted(self._leaving)):
                yield self._update("delete_markets", batch, now)
            self._leaving.clear()
        for batch in _batches(list(self._new)):
            if len(self._pending) >= IN_FLIGHT:
                return
            yield self._request("add_markets", batch, now)
        yield from self._channel_commands(now)
        yield from self._recover(now)

    def _subscribe(self, now: float) -> Iterator[bytes]:
        if self._subscribe_sent_at is None:
            first = list(self._markets)[:BATCH]
            if not first:
                return
            self._subscribe_sent_at = now
            params = {
                "channels": [CHANNEL],
                "market_tickers": first,
                "use_yes_price": self.use_yes_price,
                "skip_ticker_ack": True,
            }
            self._mark_requested(first, now)
            yield self._command("subscribe", "subscribe", params, first, now)
        elif now - self._subscribe_sent_at > REPLY_TIMEOUT_S:
            self.ended = f"no reply to subscribe within {REPLY_TIMEOUT_S:.0f} s"

    def _recover(self, now: float) -> Iterator[bytes]:
        if now < self._next_recovery_at or now < self._next_scan_at:
            return
        missing = [
            ticker
            for ticker, market in self._markets.items()
            if market.added
            and not market.synced
            and (market.requested_at is None or now - market.requested_at > SNAPSHOT_TIMEOUT_S)
        ]
        if not missing:
            self._next_scan_at = now + SCAN_S
            return
        if any(self._markets[t].requests >= REQUESTS_BEFORE_RECONNECT for t in missing):
            self.ended = (
                f"{len(missing)} markets got no snapshot after {REQUESTS_BEFORE_RECONNECT} requests"
            )
            return
        self._next_recovery_at = now + self._recovery_interval
        for batch in _batches(missing):
            if len(self._pending) >= IN_FLIGHT:
                return
            yield self._request("get_snapshot", batch, now)

    def _request(self, action: str, tickers: Sequence[str], now: float) -> bytes:
        self._mark_requested(tickers, now)
        return self._update(action, tickers, now)

    def _mark_requested(self, tickers: Iterable[str], now: float) -> None:
        for ticker in tickers:
            market = self._markets[ticker]
            market.added = True
            self._new.pop(ticker, None)
            market.requested_at = now
            market.requests += 1

    def _update(self, action: str, tickers: Sequence[str], now: float) -> bytes:
        params = {
            "sids": [self._book_sid],
            "market_tickers": list(tickers),
            "action": action,
            "skip_ticker_ack": True,
        }
        return self._command("update_subscription", action, params, tickers, now)

    def _command(
        self,
        cmd: str,
        action: str,
        params: dict[str, Any],
        tickers: Sequence[str],
        now: float,
        *,
        command: ChannelCommand | None = None,
    ) -> bytes:
        number = self._next_id
        self._next_id += 1
        self._pending[number] = _Pending(now, action, tickers, command)
        return msgspec.json.encode({"id": number, "cmd": cmd, "params": params})

    def _expire(self, now: float) -> None:
        """Drop commands without a reply, so that others can be sent; missing snapshots are re-requested."""
        for number in [n for n, p in self._pending.items() if now - p.at > REPLY_TIMEOUT_S]:
            command = self._pending.pop(number).command
            if command is not None:
                self._auxiliary[command.channel].failed(command, now, refused=False)


def _error_code_and_text(body: dict[str, Any]) -> tuple[int | None, str]:
    """Code and text of an error. Either may be of any type, and the text may contain control characters."""
    code = body.get("code")
    text = printable(str(body.get("msg", ""))[:MAX_ERROR_TEXT])
    return (code if isinstance(code, int) else None), text


def _batches(tickers: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(tickers), BATCH):
        yield tickers[start : start + BATCH]

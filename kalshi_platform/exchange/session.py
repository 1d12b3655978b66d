"""One connection's conversation with the exchange, without I/O: frames in, commands and notes out.

It knows of the wire what a recorder must: which sid is the order book's, the next number of every
sid, which markets still owe a snapshot. `seq` counts per sid across all its markets; `ok`,
`unsubscribed` and sid-scoped errors consume numbers as data does. Channels beside the books (trades, life
events) are side_channel.py's; nothing that befalls them touches a book.

A market that owes a snapshot has an owner who brings it back: this session asks again
(`get_snapshot`; a second `subscribe` would be a silent no-op), at a pace that slows while gaps go
on. Success is judged by the snapshot's arrival, not by the reply to a command, since replies come
shuffled and a replayed recording answers with foreign ids.

Times are seconds of a monotonic clock, passed in by the caller.
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
    Ask,
    AuxiliaryChannel,
    MissedFrames,
    auxiliary_channels,
)
from kalshi_platform.exchange.book import BookError, snapshot_extents
from kalshi_platform.exchange.errors import CredentialsError, ExchangeError, ProtocolError
from kalshi_platform.exchange.frames import (
    DecodeError,
    Head,
    LifeEvent,
    Reply,
    decode_head,
    decode_life_event,
    decode_reply,
    decode_snapshot,
    subject,
)
from kalshi_platform.exchange.scale import Scale
from kalshi_platform.journal.kind import Kind
from kalshi_platform.printable import printable

CHANNEL = "orderbook_delta"
IN_FLIGHT = 8
"""Commands sent and not answered; the exchange allows 10,000 a second, politeness fewer."""
REPLY_PATIENCE_S = 15.0
SNAPSHOT_PATIENCE_S = 10.0
"""A snapshot that has not come by then is asked for again."""
ASKS_BEFORE_RECONNECT = 5
RECOVERY_MIN_S, RECOVERY_MAX_S = 1.0, 30.0
"""Between two rounds of snapshot requests: doubles with every gap, up to the maximum."""
LOOK_S = 0.25
"""Between two looks for markets that owe a snapshot, where the last one found none: each looks at all."""
UNREADABLE_AGAIN_S = 60.0
"""Before the next request for a snapshot that came and could not be read, from the second one on."""
CALM_S = 60.0
"""So long without a gap, and recovery is prompt again."""

LONGEST_TEXT = 500
"""Of what the exchange says in an error; the frame itself is recorded whole."""
TERMINAL_ERRORS = {10: "channel error", 25: "buffer overflow: this client read too slowly"}
TRY_AGAIN_ERRORS = {18, 27}
AUTHENTICATION_REQUIRED = 9
MARKET_LIMIT = 26
SCALE = "scale"
"""The cause of a gap from which on no bids are read on the other scale; `use_yes_price` says which."""
MALFORMED_SNAPSHOT = "malformed_snapshot"
"""The cause of a gap whose frame came and could not be read."""
OTHER_SUBSCRIPTION = "other_subscription"
"""The cause of a gap of one book whose snapshot came on another subscription than the one that missed frames."""
REPLIES = frozenset(["subscribed", "ok", "unsubscribed", "error"])


@dataclass(frozen=True)
class Note:
    """Something that happened, to be recorded beside the frames."""

    kind: str
    detail: dict[str, Any]
    sid: int = 0
    market_ticker: str = ""


@dataclass
class _Market:
    added: bool = False
    """Whether the subscription has been asked to carry it."""
    synced: bool = False
    sid: int = 0
    """The subscription that its last snapshot came on."""
    asked_at: float | None = None
    """When its snapshot was last asked for; None: not yet, or a gap has made the asking void."""
    asks: int = 0
    unreadable: int = 0
    """Snapshots in a row that came and could not be read."""
    known: bool = True
    """False after the exchange answered with an empty market id: no such ticker."""


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
    ask: Ask | None = None
    """What a channel beside the books asked for."""


class Session:
    """The state of one connection. Feed it every frame; send what `commands` returns."""

    def __init__(
        self,
        tickers: Iterable[str] = (),
        *,
        use_yes_price: bool = False,
        observed_yes_price: bool | None = None,
        beside: Iterable[str] = (),
        unheard_since: float | None = None,
    ) -> None:
        """`beside` the books, these channels: TRADES, LIFECYCLE. `unheard_since` is when the
        connection before this one was last heard, None where there was none. `use_yes_price` is asked
        for; `observed_yes_price` is what an earlier connection was found to send, where that differs.
        """
        self.use_yes_price = use_yes_price
        self.scale = Scale(use_yes_price if observed_yes_price is None else observed_yes_price)
        self.ended: str | None = None
        """Why this connection is of no more use; the caller dials anew."""
        self.fatal: ExchangeError | None = None
        """An error that dialling anew will not mend."""
        self.warnings: list[str] = []
        """Sentences for the log; the caller takes them away."""
        self.life_events: list[LifeEvent] = []
        """What the exchange told of markets' lives; the caller takes them away."""
        self._side = auxiliary_channels(beside, unheard_since)
        self._notes: list[Note] = []
        self._afterwards: list[Note] = []
        """Notes whose place is after the frame that caused them: part of the next call's notes."""
        self._sids: dict[int, _Sid] = {}
        self._book_sid: int | None = None
        self._markets: dict[str, _Market] = {}
        self._new: dict[str, None] = {}
        """Markets that the subscription has not been asked to carry."""
        self._leaving: set[str] = set()
        self._pending: dict[int, _Pending] = {}
        self._subscribe_sent_at: float | None = None
        self._next_id = 1
        self._next_recovery_at = 0.0
        self._next_look_at = 0.0
        self._recovery_interval = RECOVERY_MIN_S
        self._last_gap_at = float("-inf")
        self.follow(tickers)

    # -- what the recorder wants -------------------------------------------------------------

    @property
    def tickers(self) -> frozenset[str]:
        """The markets this connection follows."""
        return frozenset(self._markets)

    @property
    def synced(self) -> int:
        """How many of them have a book without a gap since its snapshot."""
        return sum(market.synced for market in self._markets.values())

    def follow(self, tickers: Iterable[str]) -> None:
        """Follow exactly these markets: new ones are added, others left, without a reconnect."""
        wanted = dict.fromkeys(tickers)
        for ticker in wanted:
            self._leaving.discard(ticker)
            if ticker not in self._markets:
                self._markets[ticker] = _Market()
                self._new[ticker] = None
                for side in self._side.values():
                    side.want(ticker)
        for ticker in [t for t in self._markets if t not in wanted]:
            if self._markets.pop(ticker).added:
                self._leaving.add(ticker)
            self._new.pop(ticker, None)
            for side in self._side.values():
                side.drop(ticker)
            self._notes.append(Note("left", {}, self._book_sid or 0, ticker))
            for sid in self._sids.values():
                self._arrived(sid, ticker, now=None)

    def take_lost(self) -> list[MissedFrames]:
        """What the channels beside the books have missed since the last call."""
        lost: list[MissedFrames] = []
        for side in self._side.values():
            lost += side.lost
            side.lost.clear()
        return lost

    def unheard_since(self, last_heard: float) -> float | None:
        """Since when a channel beside the books is deaf, should this connection, last heard then, have
        ended. None: there was nothing to hear yet.
        """
        since = [
            last_heard if side.unheard_since is None else side.unheard_since
            for side in self._side.values()
            if side.sid is not None or side.unheard_since is not None
        ]
        return min(since, default=None)

    def distrust(self, ticker: str, cause: str, detail: dict[str, Any]) -> None:
        """Somebody found a book to be wrong: record it, and ask for a snapshot."""
        market = self._markets.get(ticker)
        if market is None or not market.synced:
            return
        market.synced = False
        market.asked_at = None
        self._next_look_at = 0.0
        self._notes.append(Note("gap", {"cause": cause, **detail}, self._book_sid or 0, ticker))

    @property
    def has_notes(self) -> bool:
        """Whether `take_notes` has something to give."""
        return bool(self._notes)

    def take_notes(self) -> list[Note]:
        """Return the notes since the last call, in order; those placed after a frame come with the next call."""
        notes, self._notes, self._afterwards = self._notes, self._afterwards, []
        return notes

    # -- frames in ---------------------------------------------------------------------------

    def receive(self, frame: bytes, now: float) -> Kind:
        """Take one frame in and say what it is. Notes that it caused belong before it."""
        return self.receive_run((frame,), now)[0]

    def receive_run(self, frames: Iterable[bytes], now: float) -> list[Kind]:
        """Take frames in and say what they are, up to the first that caused a note.

        The notes belong before that frame, whose kind is the last of the list.
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
                    self._number(head, now)
            if head.type == "orderbook_delta":
                kinds.append(Kind.DELTA)
            else:
                kinds.append(self._not_a_delta(head, frame, now))
            if self._notes:
                break
        return kinds

    def _not_a_delta(self, head: Head, frame: bytes, now: float) -> Kind:
        if head.type == "orderbook_snapshot":
            return self._snapshot(head, frame, now)
        if head.type == TRADES:
            self._side_heard(head.sid, now)
            return Kind.TRADE
        if head.type in REPLIES:
            self._side_heard(head.sid, now)
            self._reply(frame, now)
        elif head.type == LIFECYCLE:
            self._side_heard(head.sid, now)
            self._life_event(frame)
        return Kind.CONTROL

    def _number(self, head: Head, now: float) -> None:
        """The first number of a sid, or one that is not the next."""
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
        side = self._side_of(head.sid)
        if side is not None and head.seq > expected:
            side.gap(head.seq - expected, now)

    def _make_stale(self, number: int, expected: int, got: int, now: float) -> None:
        """Ask for the snapshots of every market: what the numbers before `got` changed is not known."""
        if now - self._last_gap_at > CALM_S:
            self._recovery_interval = RECOVERY_MIN_S
        else:
            self._recovery_interval = min(self._recovery_interval * 2, RECOVERY_MAX_S)
        self._last_gap_at = now
        self._next_look_at = 0.0
        sid = self._sids[number]
        waiting = set()
        for ticker, market in self._markets.items():
            if market.synced:
                market.synced, market.asked_at, market.asks = False, None, 0
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
            self._unreadable(head, sid, subject(frame), str(error), now)
            return Kind.SNAPSHOT
        if self.scale.is_other(yes, no, len(self._markets)):
            self._change_scale(head.sid, head.seq, now)
        ticker = snapshot.market_ticker
        known = self._markets.get(ticker)
        if known is None:  # no longer followed; its snapshot was already on its way
            self._afterwards.append(Note("left", {}, head.sid, ticker))
        else:
            known.synced, known.sid = True, head.sid
            known.asked_at = now
            known.asks = known.unreadable = 0
            if snapshot.market_id in {None, ""} and known.known:
                known.known = False
                self._notes.append(Note("unknown_market", {"market_id": ""}, head.sid, ticker))
                self.warnings.append(
                    f"The exchange knows no market {ticker!r} (it sent an empty snapshot without a"
                    " market id). Check MARKET_TICKERS."
                )
        self._arrived(sid, ticker, now)
        return Kind.SNAPSHOT

    def _unreadable(self, head: Head, sid: _Sid, ticker: str, reason: str, now: float) -> None:
        """A snapshot that cannot be read leaves its book stale; one of no known market leaves all so."""
        detail = {"cause": MALFORMED_SNAPSHOT, "seq": head.seq, "reason": reason[:LONGEST_TEXT]}
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
                    f"A snapshot of {ticker} cannot be read ({printable(reason[:LONGEST_TEXT])}): its book is"
                    " stale, and another one is asked for. The frame is in stream_events as malformed."
                )
            pause_s = UNREADABLE_AGAIN_S - SNAPSHOT_PATIENCE_S if market.unreadable else 0.0
            market.unreadable += 1
            market.synced, market.asks = False, 0
            market.asked_at = now + pause_s if pause_s else None
            self._next_look_at = 0.0

    def rescale(self, now: float, *, yes_price: bool) -> None:
        """Read no bids on this scale from now on: evidence other than this session's snapshots shows it."""
        sid = self._sids.get(self._book_sid or 0)
        if sid is None or self._book_sid is None or yes_price == self.scale.yes_price:
            return
        self.scale = Scale(yes_price)
        self._change_scale(self._book_sid, sid.next_seq, now)

    def _change_scale(self, number: int, seq: int, now: float) -> None:
        """The exchange quotes no bids otherwise than was asked: from frame `seq` on they are read so."""
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
            f" although use_yes_price={str(self.use_yes_price).lower()} was asked for. They are read so from"
            " now on, and all books are asked for again."
        )
        self._make_stale(number, seq, seq, now)

    def _arrived(self, sid: _Sid, ticker: str, now: float | None) -> None:
        gap = sid.gap
        if gap is None or ticker not in gap.waiting:
            return
        gap.waiting.discard(ticker)
        if not gap.waiting:
            sid.gap = None
            number = next((n for n, s in self._sids.items() if s is sid), 0)
            detail: dict[str, Any] = {
                "expected": gap.expected,
                "got": gap.got,
                "markets": gap.markets,
            }
            if now is not None:
                detail["seconds"] = round(now - gap.since, 6)
            self._notes.append(Note("resynced", detail, number))

    def _reply(self, frame: bytes, now: float) -> None:
        try:
            reply = decode_reply(frame)
        except DecodeError:
            return  # the head was readable: recorded as a control frame, its number counted
        pending = self._pending.pop(reply.id, None)
        body = reply.msg if isinstance(reply.msg, dict) else {}
        if reply.type == "subscribed":
            number = body.get("sid")
            if isinstance(number, int):
                self._begun(number, str(body.get("channel", "")), now)
        elif reply.type == "unsubscribed":
            side = self._side_of(reply.sid)
            if reply.sid == self._book_sid:
                self.ended = "the exchange ended the order-book subscription"
            elif side is not None:
                self._side_ended(side, "unsubscribed", now)
        elif reply.type == "error" and not self._side_error(reply, body, pending, now):
            self._error(reply, body, pending, now)
        if pending is not None and pending.ask is not None and reply.type in {"subscribed", "ok"}:
            side = self._side[pending.ask.channel]
            if side.sid is None and reply.sid:  # it was open already: the answer is an ok
                self._begun(reply.sid, side.channel, now)
            side.confirmed(pending.ask, now)

    def _begun(self, sid: int, channel: str, now: float) -> None:
        self._sids.setdefault(sid, _Sid()).channel = channel
        if channel == CHANNEL:
            self._book_sid = sid
        elif channel in self._side:
            self._side[channel].begun(sid, now)

    def _error(
        self, reply: Reply, body: dict[str, Any], pending: _Pending | None, now: float
    ) -> None:
        code, text = _said(body)
        of_books = self._book_sid in {None, reply.sid} or not reply.sid
        if code in TERMINAL_ERRORS and of_books:
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
        elif code in TRY_AGAIN_ERRORS and pending is not None:
            self._next_recovery_at = max(self._next_recovery_at, now + RECOVERY_MIN_S)
            for ticker in pending.tickers:
                market = self._markets.get(ticker)
                if market is not None and not market.synced:
                    market.asked_at = None
                    self._next_look_at = 0.0
                    if pending.action != "get_snapshot":
                        market.added = False
                        self._new[ticker] = None
        else:
            self.warnings.append(f"The exchange answered error {code}: {text or 'no text'}.")
        if (
            code not in TRY_AGAIN_ERRORS
            and self._book_sid is None
            and self._subscribe_sent_at is not None
        ):
            self.ended = self.ended or f"subscribing was refused: error {code}, {text}"

    # -- beside the books ----------------------------------------------------------------------

    def _side_of(self, sid: int) -> AuxiliaryChannel | None:
        return next((s for s in self._side.values() if sid and s.sid == sid), None)

    def _side_heard(self, sid: int, now: float) -> None:
        for side in self._side.values():
            if side.sid == sid:
                side.heard_at = now

    def _life_event(self, frame: bytes) -> None:
        try:
            self.life_events.append(decode_life_event(frame))
        except DecodeError:
            self.warnings.append(
                "The exchange told something of a market's life that cannot be read; the frame is in"
                " stream_events."
            )

    def _side_error(
        self, reply: Reply, body: dict[str, Any], pending: _Pending | None, now: float
    ) -> bool:
        """Whether an error is of a channel beside the books; if so it is dealt with."""
        ask = pending.ask if pending is not None else None
        side = self._side[ask.channel] if ask is not None else self._side_of(reply.sid)
        if side is None:
            return False
        code, text = _said(body)
        if code in TERMINAL_ERRORS:
            self._side_ended(side, f"error {code}, {TERMINAL_ERRORS[code]}", now)
        elif ask is None:
            self.warnings.append(f"The exchange answered error {code} on {side.channel}: {text}.")
        else:
            refused = code not in TRY_AGAIN_ERRORS
            side.failed(ask, now, refused=refused)
            if refused:
                detail = {"channel": side.channel, "action": ask.action, "code": code, "msg": text}
                self._notes.append(Note("refused", detail, side.sid or 0))
                self.warnings.append(
                    f"The exchange refuses channel {side.channel} (error {code}, {text}): the books are"
                    " recorded without it, and it is asked for again in some minutes."
                )
        return True

    def _side_ended(self, side: AuxiliaryChannel, cause: str, now: float) -> None:
        detail = {"cause": "subscription_ended", "channel": side.channel, "reason": cause}
        self._notes.append(Note("gap", detail, side.sid or 0))
        self.warnings.append(f"Channel {side.channel} ended ({cause}): it is subscribed to anew.")
        for number in [
            n for n, p in self._pending.items() if p.ask and p.ask.channel == side.channel
        ]:
            del self._pending[number]
        side.ended(now)

    def _side_commands(self, now: float) -> Iterator[bytes]:
        for side in self._side.values():
            asks = side.asks(now)
            while len(self._pending) < IN_FLIGHT and (ask := next(asks, None)) is not None:
                params: dict[str, Any] = {"skip_ticker_ack": True}
                if ask.tickers:
                    params["market_tickers"] = list(ask.tickers)
                if ask.action == "subscribe":
                    params["channels"] = [ask.channel]
                else:
                    params |= {"sids": [side.sid], "action": ask.action}
                cmd = "subscribe" if ask.action == "subscribe" else "update_subscription"
                yield self._command(cmd, ask.action, params, ask.tickers, now, ask=ask)

    # -- commands out ------------------------------------------------------------------------

    def commands(self, now: float) -> Iterator[bytes]:
        """The commands that are due. Call often (ten times a second) and after every reply."""
        if self.ended or self.fatal:
            return
        self._expire(now)
        if self._book_sid is None:
            yield from self._subscribe(now)
            if not self._markets:
                yield from self._side_commands(now)  # life events tell when there is something
            return
        if self._leaving:
            for batch in _batches(sorted(self._leaving)):
                yield self._update("delete_markets", batch, now)
            self._leaving.clear()
        for batch in _batches(list(self._new)):
            if len(self._pending) >= IN_FLIGHT:
                return
            yield self._ask("add_markets", batch, now)
        yield from self._side_commands(now)
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
            self._asked(first, now)
            yield self._command("subscribe", "subscribe", params, first, now)
        elif now - self._subscribe_sent_at > REPLY_PATIENCE_S:
            self.ended = f"no reply to subscribe within {REPLY_PATIENCE_S:.0f} s"

    def _recover(self, now: float) -> Iterator[bytes]:
        if now < self._next_recovery_at or now < self._next_look_at:
            return
        owed = [
            ticker
            for ticker, market in self._markets.items()
            if market.added
            and not market.synced
            and (market.asked_at is None or now - market.asked_at > SNAPSHOT_PATIENCE_S)
        ]
        if not owed:
            self._next_look_at = now + LOOK_S
            return
        if any(self._markets[t].asks >= ASKS_BEFORE_RECONNECT for t in owed):
            self.ended = (
                f"{len(owed)} markets got no snapshot after {ASKS_BEFORE_RECONNECT} requests"
            )
            return
        self._next_recovery_at = now + self._recovery_interval
        for batch in _batches(owed):
            if len(self._pending) >= IN_FLIGHT:
                return
            yield self._ask("get_snapshot", batch, now)

    def _ask(self, action: str, tickers: Sequence[str], now: float) -> bytes:
        self._asked(tickers, now)
        return self._update(action, tickers, now)

    def _asked(self, tickers: Iterable[str], now: float) -> None:
        for ticker in tickers:
            market = self._markets[ticker]
            market.added = True
            self._new.pop(ticker, None)
            market.asked_at = now
            market.asks += 1

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
        ask: Ask | None = None,
    ) -> bytes:
        number = self._next_id
        self._next_id += 1
        self._pending[number] = _Pending(now, action, tickers, ask)
        return msgspec.json.encode({"id": number, "cmd": cmd, "params": params})

    def _expire(self, now: float) -> None:
        """A reply that never came must not hold up the others; the snapshots tell what is owed."""
        for number in [n for n, p in self._pending.items() if now - p.at > REPLY_PATIENCE_S]:
            ask = self._pending.pop(number).ask
            if ask is not None:
                self._side[ask.channel].failed(ask, now, refused=False)


def _said(body: dict[str, Any]) -> tuple[int | None, str]:
    """Code and text of an error; either may be anything, also what has no hash or moves the cursor."""
    code = body.get("code")
    text = printable(str(body.get("msg", ""))[:LONGEST_TEXT])
    return (code if isinstance(code, int) else None), text


def _batches(tickers: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(tickers), BATCH):
        yield tickers[start : start + BATCH]

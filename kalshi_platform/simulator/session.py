"""The exchange's side of one WebSocket connection, without I/O: commands in, frames out.

Call `publish` with everything that the exchange's `advance` returned, before anything else sees
the books again; call `work` now and then to answer commands and send snapshots; then `take` the
frames. Commands that are in flight together are answered in a shuffled order, and snapshots come
some at a time between the deltas of the books that are already live, as on the real wire.

A session numbers subscriptions from 1 (sid: one per channel) and, on sequenced channels, its
frames from 1 (seq: shared by all markets of the sid; acks and sid-scoped errors count).
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from kalshi_platform.simulator import frames
from kalshi_platform.simulator.command import Command, Params, Refused, decoded, id_of
from kalshi_platform.simulator.frames import Cleared, Delta, Happening, LifeEvent, Quote, Trade
from kalshi_platform.simulator.market import Market
from kalshi_platform.simulator.wire import CURRENT, Wire

ORDERBOOK, TRADE, TICKER, LIFECYCLE = "orderbook_delta", "trade", "ticker", "market_lifecycle_v2"
SEQUENCED = {ORDERBOOK, TRADE, LIFECYCLE}
PRIVATE = {"fill", "market_positions", "user_orders"}
CHANNELS = SEQUENCED | PRIVATE | {TICKER}

_BESIDE = {
    "trade_gap": (TRADE, "gap"),
    "trade_refused": (TRADE, "refused"),
    "trade_error10": (TRADE, "error10"),
    "lifecycle_gap": (LIFECYCLE, "gap"),
    "lifecycle_refused": (LIFECYCLE, "refused"),
}
_ON_DELTAS = {"gap", "duplicate", "truncated", "negative", "clock_fell"}
_MORE_THAN_ANY_LEVEL = -1_000_000_000_00
SNAPSHOTS_AT_A_TIME = 100
COMMANDS_PER_SECOND = 10_000
MAX_MARKETS = 500_000


class MarketSource(Protocol):
    """What a session needs from the exchange."""

    now_ns: int

    def market(self, ticker: str) -> Market | None:
        """The market of that ticker."""


@dataclass
class _Subscription:
    channel: str
    sid: int
    use_yes_price: bool
    seq: int = 0
    tickers: dict[str, None] = field(default_factory=dict)
    everything: bool = False
    """No filter: the messages of all markets."""
    live: set[str] = field(default_factory=set)
    """Tickers of order books whose snapshot has been sent."""
    waiting: deque[tuple[str, int | None]] = field(default_factory=deque)
    """Snapshots to send, each with the id of the get_snapshot that asked for it."""

    @property
    def sequenced(self) -> bool:
        return self.channel in SEQUENCED

    def next_seq(self) -> int | None:
        """Return the number of the next frame; None on a channel without a sequence."""
        if not self.sequenced:
            return None
        self.seq += 1
        return self.seq

    def wants(self, ticker: str) -> bool:
        return self.everything or ticker in self.tickers


class Session:
    """The state of one connection."""

    patient = False
    """Whether it may wait for a slow client; a live exchange does not."""

    def __init__(
        self,
        source: MarketSource,
        shuffle: random.Random,
        *,
        max_markets: int = MAX_MARKETS,
        yes_price: bool | None = None,
        last_sid: int = 0,
        wire: Wire = CURRENT,
        time_ns: Callable[[], int] | None = None,
    ) -> None:
        """`max_markets` per subscription; sids go on after `last_sid`. `yes_price` overrides
        `use_yes_price`. `time_ns` is the time of sending; None: the exchange's.
        """
        self._source = source
        self._wire = wire
        self._time_ns = time_ns or (lambda: source.now_ns)
        self._sent_ms: int | None = None
        """When the frames that are queued now are sent; None on a wire that does not say."""
        self._max_markets = max_markets
        self._yes_price = yes_price
        self._shuffle = shuffle
        self._commands: list[bytes | str] = []
        self._subscriptions: dict[str, _Subscription] = {}
        self._last_sid = last_sid
        self._out: list[bytes] = []
        self._tampering: Counter[str] = Counter()
        self._losing: Counter[str] = Counter()
        """Number of messages still to be dropped, by channel."""
        self._refusing: Counter[str] = Counter()
        """Number of subscriptions still to be refused, by channel."""
        self._faults_to_come: list[tuple[str, int]] = []
        self._command_second = (0, 0)
        self.sent: Counter[str] = Counter()
        """Frames by message type, since the start."""

    # in

    def receive(self, message: bytes | str) -> None:
        """Take a text message of the client; the next `work` answers it."""
        self._stamp()
        second, count = self._command_second
        now = self._source.now_ns // 1_000_000_000
        self._command_second = (now, count + 1 if now == second else 1)
        if self._command_second[1] > COMMANDS_PER_SECOND:
            self._send("error", frames.error(27, command_id=id_of(message), sent_ms=self._sent_ms))
        else:
            self._commands.append(message)

    @property
    def busy(self) -> bool:
        """Whether `work` has something to do."""
        return bool(self._commands) or any(s.waiting for s in self._subscriptions.values())

    def work(self, snapshots: int = SNAPSHOTS_AT_A_TIME) -> None:
        """Answer the pending commands, in any order; then send some snapshots."""
        self._stamp()
        commands, self._commands = self._commands, []
        self._shuffle.shuffle(commands)
        for message in commands:
            self._answer(message)
        book = self._subscriptions.get(ORDERBOOK)
        while book is not None and book.waiting and snapshots:
            snapshots -= 1
            ticker, command_id = book.waiting.popleft()
            if ticker in book.tickers or command_id is not None:
                self._send_snapshot(book, ticker, command_id or 0)
        if book is not None and book.live and self._faults_to_come:
            due, self._faults_to_come = self._faults_to_come, []
            for fault, count in due:
                self.tamper(fault, count)

    def publish(self, happenings: Iterable[Happening]) -> None:
        """Queue events for the subscriptions that want them."""
        subscribed = self._subscriptions
        if not subscribed:
            return
        self._stamp()
        book = subscribed.get(ORDERBOOK)
        trade, quote, life = (subscribed.get(name) for name in (TRADE, TICKER, LIFECYCLE))
        live = book.live if book is not None else ()
        for happening in happenings:
            if isinstance(happening, Delta):
                if happening.market.ticker in live and book is not None:
                    self._send_delta(book, happening)
            elif isinstance(happening, Quote):
                if quote is not None and quote.wants(happening.market.ticker):
                    self._send_on(quote, "ticker", happening.wire())
            elif isinstance(happening, Trade):
                if trade is not None and trade.wants(happening.market.ticker):
                    self._send_or_lose(trade, "trade", happening.wire())
            elif isinstance(happening, LifeEvent) and life is not None:
                self._send_or_lose(life, happening.kind, happening.msg)
            elif isinstance(happening, Cleared) and happening.market.ticker in live:
                self._send_snapshot(subscribed[ORDERBOOK], happening.market.ticker)

    # faults

    def tamper(self, fault: str, count: int) -> None:
        """Apply a fault of faults.py, now or to the next `count` deltas.

        Without a book on the wire it waits for the first one.
        """
        self._stamp()
        book = self._subscriptions.get(ORDERBOOK)
        if fault in _ON_DELTAS:
            self._tampering[fault] += count
        elif fault in _BESIDE:
            self._tamper_beside(fault, count)
        elif book is None or not book.live:
            self._faults_to_come.append((fault, count))
        elif fault == "malformed":
            for _ in range(count):
                self._send(fault, b'{"type":"orderbook_delta","sid":1,"seq":,"msg":{"mark\n')
        elif fault == "unknown_type":
            for _ in range(count):
                self._send_on(book, "orderbook_weather", '{"outlook":"fair"}')
        elif fault == "huge":
            self._send_huge(book, count << 20)
        elif fault == "error10":
            self._end(book, 10)
        elif fault == "error25":
            self.overflow()

    def _tamper_beside(self, fault: str, count: int) -> None:
        """Apply a fault of an auxiliary channel."""
        channel, what = _BESIDE[fault]
        if what == "gap":
            self._losing[channel] += count
        elif what == "refused":
            self._refusing[channel] += count
        elif channel in self._subscriptions:
            self._end(self._subscriptions[channel], 10)

    def overflow(self) -> None:
        """End every subscription with error 25, because the client does not keep up."""
        self._stamp()
        for subscription in list(self._subscriptions.values()):
            self._end(subscription, 25)

    # out

    def take(self) -> list[bytes]:
        """Return the frames to send now, oldest first."""
        out, self._out = self._out, []
        return out

    def live_tickers(self) -> frozenset[str]:
        """The markets whose snapshot this connection has been sent."""
        book = self._subscriptions.get(ORDERBOOK)
        return frozenset(book.live) if book is not None else frozenset()

    def state(self) -> list[dict[str, Any]]:
        """Return every subscription, as in GET /simulator/state."""
        return [
            {
                "channel": subscription.channel,
                "sid": subscription.sid,
                "seq": subscription.seq if subscription.sequenced else None,
                "markets": len(subscription.tickers),
                "live": len(subscription.live),
            }
            for subscription in self._subscriptions.values()
        ]

    def adopt(self, channel: str, sid: int, seq: int, tickers: Iterable[str]) -> None:
        """Continue a subscription that a replay has started and advanced to `seq`."""
        adopted = _Subscription(channel, sid, use_yes_price=False, seq=seq)
        adopted.tickers.update(dict.fromkeys(tickers))
        adopted.live.update(adopted.tickers)
        self._subscriptions[channel] = adopted

    # commands

    def _answer(self, message: bytes | str) -> None:
        command_id = id_of(message)
        try:
            self._obey(decoded(message))
        except Refused as refusal:
            self._send(
                "error", frames.error(refusal.code, command_id=command_id, sent_ms=self._sent_ms)
            )

    def _obey(self, command: Command) -> None:
        if command.cmd == "list_subscriptions":
            listed = [{"channel": s.channel, "sid": s.sid} for s in self._subscriptions.values()]
            self._reply("ok", command.id, listed)
            return
        handler = {
            "subscribe": self._subscribe,
            "unsubscribe": self._unsubscribe,
            "update_subscription": self._update,
        }.get(command.cmd)
        if handler is None:
            raise Refused(5)
        if command.params is None:
            raise Refused(2)
        handler(command.id, command.params)

    def _subscribe(self, command_id: int, params: Params) -> None:
        if not params.channels:
            raise Refused(3)
        if not set(params.channels) <= CHANNELS:
            raise Refused(8)
        tickers = params.tickers()
        if ORDERBOOK in params.channels and not tickers:
            raise Refused(14)
        for channel in params.channels:
            if self._refusing[channel]:
                self._refusing[channel] -= 1
                raise Refused(8)
        for channel in dict.fromkeys(params.channels):
            known = self._subscriptions.get(channel)
            if known is None:
                if len(tickers) > self._max_markets:
                    raise Refused(26)
                self._last_sid += 1
                asked = bool(params.use_yes_price)
                on_yes = asked if self._yes_price is None else self._yes_price
                new = _Subscription(channel, self._last_sid, on_yes)
                self._subscriptions[channel] = new
                new.everything = not tickers or channel == LIFECYCLE
                msg = {"channel": channel, "sid": new.sid}
                self._reply("subscribed", command_id, msg)
                self._greet(new, self._enlist(new, tickers), params.send_initial_snapshot)
            else:
                # tickers that are already there get no new snapshot
                fresh = self._enlist(known, tickers)
                self._acknowledge(known, command_id, params.skip_ticker_ack)
                self._greet(known, fresh, params.send_initial_snapshot)

    def _unsubscribe(self, command_id: int, params: Params) -> None:
        sids = params.all_sids()
        ended = [self._by_sid(sid) for sid in dict.fromkeys(sids)]
        for subscription in ended:
            del self._subscriptions[subscription.channel]
            self._reply("unsubscribed", command_id, None, subscription)

    def _update(self, command_id: int, params: Params) -> None:
        sids = params.all_sids()
        if len(sids) != 1:
            raise Refused(12)
        subscription = self._by_sid(sids[0])
        if params.action is None:
            raise Refused(15)
        tickers = params.tickers()
        if params.action == "get_snapshot":
            if not params.market_tickers or subscription.channel != ORDERBOOK:
                # as recorded: an error on a sid counts there, and names no command
                self._send_error(subscription, 14)
                return
            subscription.waiting.extend((ticker, command_id) for ticker in tickers)
            return
        if params.action not in {"add_markets", "delete_markets"}:
            raise Refused(13)
        if not tickers:
            raise Refused(14)
        if params.action == "add_markets":
            fresh = self._enlist(subscription, tickers)
            self._acknowledge(subscription, command_id, params.skip_ticker_ack)
            self._greet(subscription, fresh, params.send_initial_snapshot)
        else:
            for ticker in tickers:
                subscription.tickers.pop(ticker, None)
                subscription.live.discard(ticker)
            self._acknowledge(subscription, command_id, params.skip_ticker_ack)

    def _by_sid(self, sid: int) -> _Subscription:
        for subscription in self._subscriptions.values():
            if subscription.sid == sid:
                return subscription
        raise Refused(7)

    def _acknowledge(self, to: _Subscription, command_id: int, skip_tickers: bool) -> None:
        msg = {} if skip_tickers else {"market_tickers": sorted(to.tickers)}
        self._reply("ok", command_id, msg, to)

    def _enlist(self, on: _Subscription, tickers: list[str]) -> list[str]:
        """Add tickers to a subscription; return the new ones."""
        fresh = [ticker for ticker in tickers if ticker not in on.tickers]
        if len(on.tickers) + len(fresh) > self._max_markets:
            raise Refused(26)
        on.tickers.update(dict.fromkeys(fresh))
        return fresh

    def _greet(self, to: _Subscription, tickers: list[str], initial_quotes: bool) -> None:
        """Queue what a subscription is first sent for new tickers."""
        if to.channel == ORDERBOOK:
            to.waiting.extend((ticker, None) for ticker in tickers)
        elif to.channel == TICKER and initial_quotes:
            for ticker in tickers:
                market = self._source.market(ticker)
                if market is not None:
                    quote = Quote(market, self._source.now_ns // 1000)
                    self._send_on(to, "ticker", quote.wire())

    # sending

    def _stamp(self) -> None:
        """Give what is queued from now on the current time, once for all of a batch."""
        if self._wire is Wire.OCTOBER:
            self._sent_ms = self._time_ns() // 1_000_000

    def _send(self, kind: str, frame: bytes) -> None:
        self.sent[kind] += 1
        self._out.append(frame)

    def _send_on(self, on: _Subscription, kind: str, msg: str, command_id: int = 0) -> None:
        frame = frames.envelope(
            kind, on.sid, on.next_seq(), msg, command_id=command_id, sent_ms=self._sent_ms
        )
        self._send(kind, frame)

    def _reply(self, kind: str, command_id: int, msg: Any, on: _Subscription | None = None) -> None:
        """Answer a command, with the next number of a subscription if it concerns one."""
        sid, seq = (None, None) if on is None else (on.sid, on.next_seq())
        self._send(
            kind, frames.reply(kind, command_id, msg, sid=sid, seq=seq, sent_ms=self._sent_ms)
        )

    def _send_error(self, on: _Subscription, code: int) -> None:
        """Send an error on a subscription, which answers no command."""
        frame = frames.error(code, sid=on.sid, seq=on.next_seq(), sent_ms=self._sent_ms)
        self._send("error", frame)

    def _send_or_lose(self, on: _Subscription, kind: str, msg: str) -> None:
        if self._losing[on.channel]:
            self._losing[on.channel] -= 1
            self.sent["lost"] += 1
            on.next_seq()
        else:
            self._send_on(on, kind, msg)

    def _send_snapshot(self, book: _Subscription, ticker: str, command_id: int = 0) -> None:
        market = self._source.market(ticker)
        if market is None:
            msg = frames.unknown_market(ticker, self._wire)
        else:
            if ticker in book.tickers:
                book.live.add(ticker)
            msg = frames.snapshot(market, book.use_yes_price, self._wire)
        self._send_on(book, "orderbook_snapshot", msg, command_id)

    def _send_huge(self, book: _Subscription, size: int) -> None:
        """Encode the first live book again, padded to the requested size."""
        for ticker in book.tickers:
            market = self._source.market(ticker)
            if ticker in book.live and market is not None:
                msg = frames.snapshot(market, book.use_yes_price, self._wire)
                self._send_on(book, "orderbook_snapshot", msg + " " * max(size - len(msg), 0))
                return

    def _end(self, subscription: _Subscription, code: int) -> None:
        del self._subscriptions[subscription.channel]
        self._send_error(subscription, code)

    def _send_delta(self, book: _Subscription, delta: Delta) -> None:
        if self._tampering:
            self._send_spoilt(book, delta)
        else:
            self._send_true(book, delta)

    def _send_true(self, book: _Subscription, delta: Delta) -> None:
        book.seq += 1
        sent = "" if self._sent_ms is None else f',"sending_ts_ms":{self._sent_ms}'
        frame = (
            f'{{"type":"orderbook_delta","sid":{book.sid},"seq":{book.seq}{sent}'
            f',"msg":{delta.msg(book.use_yes_price, self._wire)}}}\n'
        ).encode()
        self.sent["orderbook_delta"] += 1
        self._out.append(frame)

    def _send_spoilt(self, book: _Subscription, delta: Delta) -> None:
        """Encode a delta, altered by the first pending fault."""
        fault = next(iter(self._tampering))
        self._tampering[fault] -= 1
        if not self._tampering[fault]:
            del self._tampering[fault]
        self.sent["lost" if fault == "gap" else fault] += 1
        if fault == "gap":
            book.seq += 1
        elif fault == "duplicate":
            self._send_true(book, delta)
            self._out.append(self._out[-1])
        elif fault == "truncated":
            self._send_true(book, delta)
            self._out[-1] = self._out[-1][: len(self._out[-1]) // 2]
        elif fault == "clock_fell":
            self._send_true(book, _altered(delta, qty=delta.qty, clock=delta.clock // 2))
        else:
            self._send_true(book, _altered(delta, qty=_MORE_THAN_ANY_LEVEL, clock=delta.clock))
            self._send_true(book, delta)


def _altered(delta: Delta, *, qty: int, clock: int) -> Delta:
    return Delta(delta.market, delta.side, delta.level, qty, ts_us=delta.ts_us, clock=clock)

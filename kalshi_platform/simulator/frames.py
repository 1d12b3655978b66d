"""Encode books, changes, trades, lifecycle messages and replies as JSON texts of the wire.

Frames are one JSON object and a newline. A message's `msg` is made once, however many
connections it goes to; the envelope around it carries each connection's own sid and seq. Texts
are put together by hand where they are sent thousands of times a second, and by msgspec elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from kalshi_platform.exchange.numbers import ONE_DOLLAR, contracts, dollars
from kalshi_platform.simulator.book import NO, SIDES, YES, Book
from kalshi_platform.simulator.market import Market
from kalshi_platform.simulator.wire import Wire

ERROR_TEXTS = {
    1: "Unable to process message",
    2: "Params required",
    3: "Channels required",
    4: "Subscription IDs required",
    5: "Unknown command",
    7: "Unknown subscription ID",
    8: "Unknown channel name",
    9: "Authentication required",
    10: "Channel error",
    11: "Invalid parameter",
    12: "Exactly one subscription ID is required",
    13: "Unsupported action",
    14: "Market Ticker required",
    15: "Action required",
    25: "Subscription buffer overflow",
    26: "Market limit for subscription exceeded",
    27: "Too many requests",
}


@functools.lru_cache(maxsize=256)
def _second(epoch: int) -> str:
    return datetime.fromtimestamp(epoch, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def rfc3339(us: int) -> str:
    """Unix microseconds as RFC 3339 in UTC, trailing zeros of the fraction trimmed."""
    second, micros = divmod(us, 1_000_000)
    if not micros:
        return f"{_second(second)}Z"
    return f"{_second(second)}.{micros:06d}".rstrip("0") + "Z"


def rfc3339_ms(ms: int) -> str:
    """Unix milliseconds as RFC 3339 in UTC, always with three digits of the fraction."""
    second, rest = divmod(ms, 1000)
    return f"{_second(second)}.{rest:03d}Z"


def envelope(
    kind: str,
    sid: int,
    seq: int | None,
    msg: str,
    *,
    command_id: int = 0,
    sent_ms: int | None = None,
) -> bytes:
    """Encode a frame around an encoded `msg`; a `sent_ms` of None is left out."""
    head = f'{{"type":"{kind}"'
    if command_id:
        head += f',"id":{command_id}'
    head += f',"sid":{sid}'
    if seq is not None:
        head += f',"seq":{seq}'
    if sent_ms is not None:
        head += f',"sending_ts_ms":{sent_ms}'
    return f'{head},"msg":{msg}}}\n'.encode()


def reply(
    kind: str,
    command_id: int,
    msg: Any,
    *,
    sid: int | None = None,
    seq: int | None = None,
    sent_ms: int | None = None,
) -> bytes:
    """Encode an answer to a command; `command_id` 0 and what is None are left out."""
    frame: dict[str, Any] = {"type": kind}
    if command_id:
        frame["id"] = command_id
    if sid is not None:
        frame["sid"] = sid
    if seq is not None:
        frame["seq"] = seq
    if sent_ms is not None:
        frame["sending_ts_ms"] = sent_ms
    if msg is not None:
        frame["msg"] = msg
    return msgspec.json.encode(frame) + b"\n"


def error(
    code: int,
    *,
    command_id: int = 0,
    sid: int | None = None,
    seq: int | None = None,
    sent_ms: int | None = None,
) -> bytes:
    """Encode an error frame, with a sid if one is given."""
    msg = {"code": code, "msg": ERROR_TEXTS[code]}
    return reply("error", command_id, msg, sid=sid, seq=seq, sent_ms=sent_ms)


def _ladder(book: Book, side: int, mirrored: bool) -> str:
    texts = book.grid.texts
    top = book.grid.levels - 1
    levels = ",".join(
        f'["{texts[top - level] if mirrored else texts[level]}","{size // 100}.{size % 100:02d}"]'
        for level, size in enumerate(book.sizes[side])
        if size
    )
    return f"[{levels}]"


def snapshot(market: Market, use_yes_price: bool, wire: Wire) -> str:
    """`msg` of a snapshot; the key of an empty side is absent. There is no time in it."""
    msg = market.wire_head
    if wire is Wire.OCTOBER:
        msg += f',"clock":{market.clock}'
    if market.book.best[YES] >= 0:
        msg += f',"yes_dollars_fp":{_ladder(market.book, YES, mirrored=False)}'
    if market.book.best[NO] >= 0:
        msg += f',"no_dollars_fp":{_ladder(market.book, NO, mirrored=use_yes_price)}'
    return msg + "}"


def unknown_market(ticker: str, wire: Wire) -> str:
    """`msg` of the snapshot that answers for a ticker that does not exist."""
    clock = {"clock": 0} if wire is Wire.OCTOBER else {}
    return msgspec.json.encode({"market_ticker": ticker, "market_id": "", **clock}).decode()


class Delta:
    """A level's change. Its texts are encoded when the first connection needs them.

    `clock` is the one that its market had after the action. All connections have the same wire.
    """

    __slots__ = ("_plain", "_yes_priced", "clock", "level", "market", "qty", "side", "ts_us")

    def __init__(
        self, market: Market, side: int, level: int, qty: int, *, ts_us: int, clock: int
    ) -> None:
        self.market = market
        self.side = side
        self.level = level
        self.qty = qty
        self.ts_us = ts_us
        self.clock = clock
        self._plain: str | None = None
        self._yes_priced: str | None = None

    def msg(self, use_yes_price: bool, wire: Wire) -> str:
        """`msg` of the delta, no-side prices on the YES scale if requested."""
        if use_yes_price and self.side == NO:
            if self._yes_priced is None:
                grid = self.market.listing.grid
                self._yes_priced = self._text(grid.texts[grid.levels - 1 - self.level], wire)
            return self._yes_priced
        if self._plain is None:
            self._plain = self._text(self.market.listing.grid.texts[self.level], wire)
        return self._plain

    def _text(self, price: str, wire: Wire) -> str:
        ms = self.ts_us // 1000
        if wire is Wire.AUGUST:
            clock, ts = "", rfc3339(self.ts_us)
        else:
            clock, ts = f',"clock":{self.clock}', rfc3339_ms(ms)
        return (
            f'{self.market.wire_head}{clock},"price_dollars":"{price}"'
            f',"delta_fp":"{contracts(self.qty)}","side":"{SIDES[self.side]}","ts":"{ts}","ts_ms":{ms}}}'
        )


class Cleared:
    """The book was emptied after the close: sent as an unsolicited empty snapshot."""

    __slots__ = ("market", "ts_us")

    def __init__(self, market: Market, ts_us: int) -> None:
        self.market = market
        self.ts_us = ts_us


class Trade:
    """A trade. The taker's side is the outcome that it bought."""

    __slots__ = ("_fields", "_msg", "market", "qty", "taker", "trade_id", "ts_us", "yes_price")

    def __init__(
        self, market: Market, *, taker: int, yes_price: int, qty: int, ts_us: int, trade_id: str
    ) -> None:
        self.market = market
        self.taker = taker
        self.yes_price = yes_price
        self.qty = qty
        self.ts_us = ts_us
        self.trade_id = trade_id
        self._fields = {
            "yes_price_dollars": dollars(yes_price),
            "no_price_dollars": dollars(ONE_DOLLAR - yes_price),
            "count_fp": contracts(qty),
            "taker_side": SIDES[taker],
            "taker_outcome_side": SIDES[taker],
            "taker_book_side": ("bid", "ask")[taker],
            "is_block_trade": False,
            "trade_id": trade_id,
        }
        self._msg: str | None = None

    def wire(self) -> str:
        """`msg` of the trade channel: times in seconds and milliseconds."""
        if self._msg is None:
            times = {"ts": self.ts_us // 1_000_000, "ts_ms": self.ts_us // 1000}
            fields = {"market_ticker": self.market.ticker, **self._fields, **times}
            self._msg = msgspec.json.encode(fields).decode()
        return self._msg

    def rest(self) -> dict[str, Any]:
        """The trade as in GET /markets/trades."""
        return {
            "ticker": self.market.ticker,
            **self._fields,
            "created_time": rfc3339(self.ts_us),
        }


class LifeEvent:
    """A lifecycle message of a market or an event."""

    __slots__ = ("kind", "msg", "ts_us")

    def __init__(self, kind: str, msg: Mapping[str, Any], ts_us: int) -> None:
        self.kind = kind
        self.msg = msgspec.json.encode(msg).decode()
        self.ts_us = ts_us


class Quote:
    """The top of a book after a change, with the market's totals at that moment."""

    __slots__ = ("_msg", "interest", "last", "market", "no", "totals", "ts_us", "yes")

    def __init__(self, market: Market, ts_us: int) -> None:
        book = market.book
        yes, no = book.best
        self.market = market
        self.ts_us = ts_us
        self.yes = (yes, book.sizes[YES][yes] if yes >= 0 else 0)
        self.no = (no, book.sizes[NO][no] if no >= 0 else 0)
        self.last = (market.last_price, market.last_qty)
        self.totals = (market.volume, market.turnover)
        self.interest = market.open_interest
        self._msg: str | None = None

    def wire(self) -> str:
        """`msg` of the ticker channel; an empty ask shows 1.0000 with size 0.00."""
        if self._msg is None:
            grid = self.market.listing.grid
            (yes, yes_qty), (no, no_qty) = self.yes, self.no
            self._msg = msgspec.json.encode(
                {
                    "market_ticker": self.market.ticker,
                    "market_id": self.market.market_id,
                    "price_dollars": dollars(self.last[0]),
                    "yes_bid_dollars": grid.texts[yes] if yes >= 0 else "0.0000",
                    "yes_ask_dollars": dollars(ONE_DOLLAR - (grid.prices[no] if no >= 0 else 0)),
                    "yes_bid_size_fp": contracts(yes_qty),
                    "yes_ask_size_fp": contracts(no_qty),
                    "last_trade_size_fp": contracts(self.last[1]),
                    "volume_fp": contracts(self.totals[0]),
                    "open_interest_fp": contracts(self.interest),
                    "dollar_volume": self.totals[1] // 1_000_000,
                    "dollar_open_interest": self.interest * self.last[0] // 1_000_000,
                    "ts": self.ts_us // 1_000_000,
                    "ts_ms": self.ts_us // 1000,
                    "time": rfc3339(self.ts_us),
                }
            ).decode()
        return self._msg


Happening = Delta | Trade | Quote | Cleared | LifeEvent

"""Trades that the stream has missed, fetched from the exchange's REST interface.

Between the last frame before a loss and the first one after it, REST lists every trade; those that the
stream did bring are told apart by their ids. What is fetched goes into the journal as trade frames
without a `seq`, so that all that follows (rows, stores, rebuilds) knows of one kind of trade only.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.exchange.answers import Trade
from kalshi_platform.exchange.frames import DecodeError, trade_id
from kalshi_platform.exchange.rest import RestClient
from kalshi_platform.journal import reader
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.reader import LogOffset
from kalshi_platform.recorder.capture import RECENT_TRADES, MissedSpan

MARGIN_S = 10
"""Our clock and the exchange's may be so far apart."""
AFTER_S = 30.0
"""So long after a loss REST is asked. Its answers are cached for 15 s; and what it lists of the margin
must have come over the stream by then, or it would be kept twice."""
REMEMBERED_S = 60
"""Of so much before its end the journal is asked for trades at a start: more than the margin."""
LONGEST_S = 3_600
MOST_TRADES = 50_000
"""Beyond either, a loss is only named: on the whole exchange that is more than REST gives in a while."""
ASKED_ALONE = 40
"""Up to so many markets are asked for one by one: two seconds of the lowest tier's limit."""

LONG_BYTES = 8 << 20
"""A journal segment of more than so much reaches back far enough by itself."""

Recent = Sequence[tuple[int, bytes]] | deque[tuple[int, bytes]]
"""(receive time in ns, frame) of the trades that the stream brought lately."""


@dataclass(frozen=True)
class Memory:
    """What the journal knew last."""

    last_ns: int
    """Receive time of its last record, 0 where it is new."""
    trades: Recent

    def last_heard(self, now_ns: int, now: float) -> float | None:
        """That time by a monotonic clock that shows `now` at `now_ns`; None where it is new."""
        return now - (now_ns - self.last_ns) / 1e9 if self.last_ns else None


@dataclass(frozen=True)
class Found:
    """What REST had of a loss."""

    frames: tuple[bytes, ...]
    """To be journalled, oldest first."""
    reason: str = ""
    """Why nothing was fetched, as a sentence."""


def ask(rest: RestClient, loss: MissedSpan) -> Found:
    """The trades that REST lists around a loss, of its markets. Raises `ExchangeError` where it cannot."""
    span_s = (loss.until_ns - loss.since_ns) / 1e9
    if span_s > LONGEST_S:
        return Found((), f"it lasted {span_s:.0f} s, which is more than the {LONGEST_S} s to fetch")
    trades: dict[str, tuple[datetime, bytes]] = {}  # pages that move on while read tell some twice
    for number, (trade, sent) in enumerate(_listed(rest, loss)):
        if number >= MOST_TRADES:
            return Found((), f"the exchange lists more than {MOST_TRADES:,} trades of that time")
        if trade.ticker in loss.tickers:
            trades[trade.trade_id] = (trade.created_time, _frame(loss.lost.sid, sent))
    return Found(tuple(frame for _, frame in sorted(trades.values())))


def _listed(rest: RestClient, loss: MissedSpan) -> Iterator[tuple[Trade, bytes]]:
    """Market by market where they are few, else all of the exchange's trades of that time."""
    few = len(loss.tickers) <= ASKED_ALONE
    for ticker in sorted(loss.tickers) if few else (None,):
        yield from rest.trades_as_sent(
            ticker=ticker,
            min_ts=loss.since_ns // 10**9 - MARGIN_S,
            max_ts=loss.until_ns // 10**9 + 1 + MARGIN_S,
        )


def missed(listed: Found, loss: MissedSpan, recent: Recent) -> Found:
    """Those of `listed` that the stream has not brought."""
    if len(recent) >= RECENT_TRADES and recent[0][0] > loss.since_ns - MARGIN_S * 10**9:
        return Found(
            (), "more trades came since than are remembered, so what is missing is not known"
        )
    known = ids(frame for _, frame in recent)
    return Found(tuple(f for f in listed.frames if trade_id(f) not in known), listed.reason)


def _frame(sid: int, sent: bytes) -> bytes:
    return b'{"type":"trade","sid":%d,"msg":%s}' % (sid, sent)


def ids(frames: Iterable[bytes]) -> set[str]:
    """The ids of trade frames. One that cannot be read has none; it is `malformed` to the load."""
    found = set()
    for frame in frames:
        try:
            found.add(trade_id(frame))
        except DecodeError:
            continue
    return found


def remembered(folder: Path, before_n: int) -> Memory:
    """What the journal's records before `before_n` know: when the last one came, and its last trades.

    Reads the last segment, or the last two where the last is short.
    """
    earlier = [first_n for first_n in reader.segments(folder) if first_n < before_n][-2:]
    if earlier and reader.segment_path(folder, earlier[-1]).stat().st_size > LONG_BYTES:
        del earlier[:-1]
    last_ns = 0
    trades: list[tuple[int, bytes]] = []
    if not earlier:
        return Memory(0, ())
    for block in reader.read(folder, LogOffset(earlier[0], 0, earlier[0])):
        if isinstance(block, reader.LostRange):
            continue
        if block.first_n >= before_n:
            break
        recv_ns = block.batch.column("recv_ns")
        last_ns = pc.max(recv_ns).as_py()
        is_trade = pc.equal(block.batch.column("kind"), pa.scalar(int(Kind.TRADE), pa.uint8()))
        found = block.batch.filter(is_trade)
        trades += zip(
            found.column("recv_ns").to_pylist(), found.column("frame").to_pylist(), strict=True
        )
    horizon = last_ns - REMEMBERED_S * 10**9
    return Memory(last_ns, [(at, frame) for at, frame in trades if at >= horizon])

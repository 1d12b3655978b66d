"""Trade backfill: trades that the stream has missed, fetched over REST.

REST lists every trade of the span between the last frame before a gap and the first one after it; trade ids
exclude those that the stream delivered. Fetched trades are journalled as trade frames without a `seq`, so
that decoding, stores and rebuilds handle one kind of trade only. When to fetch is decided in `upkeep`.
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
"""Maximum difference between this machine's clock and the exchange's."""
DELAY_S = 30.0
"""Delay after a span before REST is queried: its responses are cached for 15 s, and trades within the margin
after the span must have arrived over the stream by then, or they would be stored twice."""
HISTORY_S = 60
"""At a start, trades of this much time before the journal's end are loaded: more than the margin."""
MAX_SPAN_S = 3_600
MAX_TRADES = 50_000
"""A span beyond either limit is only reported: REST could not deliver it in reasonable time."""
SINGLE_REQUESTS_MAX = 40
"""Up to this many markets are requested one by one: two seconds of the lowest tier's limit."""

LONG_BYTES = 8 << 20
"""A journal segment larger than this reaches back far enough by itself."""

RecentTrades = Sequence[tuple[int, bytes]] | deque[tuple[int, bytes]]
"""(receive time in ns, frame) of the trades that the stream delivered most recently."""


@dataclass(frozen=True)
class History:
    """The end of the preceding recording, from the journal."""

    last_ns: int
    """Receive time of the journal's last record; 0 for a new journal."""
    trades: RecentTrades

    def last_received(self, now_ns: int, now: float) -> float | None:
        """`last_ns` on the monotonic clock, which shows `now` at `now_ns`; None for a new journal."""
        return now - (now_ns - self.last_ns) / 1e9 if self.last_ns else None


@dataclass(frozen=True)
class Backfill:
    """The result of a backfill."""

    frames: tuple[bytes, ...]
    """Trade frames to journal, oldest first."""
    reason: str = ""
    """Why nothing was fetched; empty where it was."""


def fetch(rest: RestClient, span: MissedSpan) -> Backfill:
    """Fetch the trades of a missed span's markets, with a margin around it. Raises: `ExchangeError`."""
    span_s = (span.until_ns - span.since_ns) / 1e9
    if span_s > MAX_SPAN_S:
        return Backfill(
            (), f"it lasted {span_s:.0f} s, which is more than the {MAX_SPAN_S} s to fetch"
        )
    # By id, because pages shift while they are read: some trades occur twice.
    trades: dict[str, tuple[datetime, bytes]] = {}
    for number, (trade, sent) in enumerate(_listed(rest, span)):
        if number >= MAX_TRADES:
            return Backfill((), f"the exchange lists more than {MAX_TRADES:,} trades of that time")
        if trade.ticker in span.tickers:
            trades[trade.trade_id] = (trade.created_time, _frame(span.missed.sid, sent))
    return Backfill(tuple(frame for _, frame in sorted(trades.values())))


def _listed(rest: RestClient, span: MissedSpan) -> Iterator[tuple[Trade, bytes]]:
    """List trades market by market where these are few, else all of the exchange's trades of the span."""
    few = len(span.tickers) <= SINGLE_REQUESTS_MAX
    for ticker in sorted(span.tickers) if few else (None,):
        yield from rest.trades_as_sent(
            ticker=ticker,
            min_ts=span.since_ns // 10**9 - MARGIN_S,
            max_ts=span.until_ns // 10**9 + 1 + MARGIN_S,
        )


def select_missed(listed: Backfill, span: MissedSpan, recent: RecentTrades) -> Backfill:
    """Select those of `listed` that the stream has not delivered."""
    if len(recent) >= RECENT_TRADES and recent[0][0] > span.since_ns - MARGIN_S * 10**9:
        return Backfill(
            (), "more trades were received since than are kept, so the missing ones are not known"
        )
    known = ids(frame for _, frame in recent)
    return Backfill(tuple(f for f in listed.frames if trade_id(f) not in known), listed.reason)


def _frame(sid: int, sent: bytes) -> bytes:
    return b'{"type":"trade","sid":%d,"msg":%s}' % (sid, sent)


def ids(frames: Iterable[bytes]) -> set[str]:
    """The ids of trade frames. Unreadable frames are skipped; the loader stores them as `malformed`."""
    known = set()
    for frame in frames:
        try:
            known.add(trade_id(frame))
        except DecodeError:
            continue
    return known


def load_history(folder: Path, before_n: int) -> History:
    """Load the last receive time and the last trades from the journal's records before `before_n`.

    Reads the last segment, or the last two where the last is short.
    """
    earlier = [first_n for first_n in reader.segments(folder) if first_n < before_n][-2:]
    if earlier and reader.segment_path(folder, earlier[-1]).stat().st_size > LONG_BYTES:
        del earlier[:-1]
    last_ns = 0
    trades: list[tuple[int, bytes]] = []
    if not earlier:
        return History(0, ())
    for part in reader.read(folder, LogOffset(earlier[0], 0, earlier[0])):
        if isinstance(part, reader.LostRange):
            continue
        if part.first_n >= before_n:
            break
        last_ns = pc.max(part.batch.column("recv_ns")).as_py()
        is_trade = pc.equal(part.batch.column("kind"), pa.scalar(int(Kind.TRADE), pa.uint8()))
        received = part.batch.filter(is_trade)
        trades += zip(
            received.column("recv_ns").to_pylist(),
            received.column("frame").to_pylist(),
            strict=True,
        )
    horizon = last_ns - HISTORY_S * 10**9
    return History(last_ns, [(at, frame) for at, frame in trades if at >= horizon])

"""How much of an hour each market's book could be believed.

A book is verified from its snapshot to whatever breaks it: a gap on its sid, the end of its
connection, a negative level, being left. A market is followed from its first sight in the hour (or
the hour's first instant, where the checkpoint has it) until it is left or the hour ends; time that
its recorder was not there counts as followed and not verified. A recorder that was killed writes nothing more
in the hour: its connections fall silent, whatever other shards record. What the next hours tell of that is an
`unheard` row of the hour. What broke a book follows
from the order of the events; their times only say for how long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import msgspec

from kalshi_platform.schema import CONNECTION_ENDS, STALE_EVENTS

BREAKING = ("snapshot", *STALE_EVENTS)
"""The kinds of stream_events that coverage depends on."""
CHECKPOINT = "checkpoint"
"""In the place of a kind: a book of a checkpoint."""
SILENCE = timedelta(seconds=30)
"""Three heartbeats: with nothing recorded of a connection for longer, its recorder was away."""
ANY = ""
"""In the place of a connection: a heartbeat of a version that did not say which was alive."""


@dataclass
class _Market:
    followed_from: datetime
    conn: str = ""
    sid: int = 0
    verified_from: datetime | None = None
    verified: timedelta = timedelta()
    followed_to: datetime | None = None


@dataclass(frozen=True)
class Coverage:
    """Market-seconds of one hour."""

    verified_s: float
    followed_s: float
    by_market: dict[str, float] = field(default_factory=dict)
    """Verified seconds of each market."""

    @property
    def ratio(self) -> float | None:
        """0 to 1; None where no market was followed."""
        return self.verified_s / self.followed_s if self.followed_s > 0 else None


def coverage(
    start: datetime,
    end: datetime,
    events: Iterable[dict[str, Any]],
    signs: Mapping[str, datetime],
) -> Coverage:
    """Coverage of `start` to `end`.

    `events`: stream_events of the hour in order, those of BREAKING suffice, and in their places the books
    of its checkpoints, as events of kind CHECKPOINT with a `verified`. `signs`: each connection's last
    sign of life in it, and that of all connections under ANY.
    """
    markets: dict[str, _Market] = {}
    for event in events:
        at = event["ingest_ts"]
        kind, conn, ticker = event["kind"], event["conn_id"], event["market_ticker"]
        if kind == "snapshot":
            market = markets.setdefault(ticker, _Market(at))
            market.conn, market.sid, market.followed_to = conn, event["sid"], None
            if market.verified_from is None:
                market.verified_from = at
        elif kind == CHECKPOINT:
            _checkpoint(markets, event, start)
        elif ticker:  # a gap of one book, or the market was left
            if ticker in markets:
                _end(markets[ticker], at)
                if kind == "left":
                    markets[ticker].followed_to = at
        else:
            dated_back = kind in {"disconnected", "gap"}
            broken_at = at - timedelta(seconds=_span_s(event)) if dated_back else at
            for market in markets.values():
                same_sid = kind in CONNECTION_ENDS or market.sid == event["sid"]
                if market.conn == conn and same_sid:
                    _end(market, broken_at)
    for market in markets.values():
        sign = max(signs.get(market.conn, start), signs.get(ANY, start))
        _end(market, sign if end - sign > SILENCE else end)
    followed = sum(
        (((m.followed_to or end) - m.followed_from).total_seconds() for m in markets.values()), 0.0
    )
    by_market = {ticker: m.verified.total_seconds() for ticker, m in markets.items()}
    return Coverage(sum(by_market.values()), followed, by_market)


def _checkpoint(markets: dict[str, _Market], event: dict[str, Any], start: datetime) -> None:
    """A book as a checkpoint has it. One of a clock that was set back also has books that have ended."""
    at, ticker = event["ingest_ts"], event["market_ticker"]
    if at > start and not event["verified"]:
        if ticker in markets:
            _end(markets[ticker], at)
        return
    market = markets.setdefault(ticker, _Market(at))
    market.conn, market.sid = event["conn_id"], event["sid"]
    if not event["verified"]:
        _end(market, at)
    elif market.verified_from is None:
        market.verified_from = at


def _end(market: _Market, at: datetime) -> None:
    if market.verified_from is not None:
        market.verified += max(at - market.verified_from, timedelta())
        market.verified_from = None


def _span_s(event: dict[str, Any]) -> float:
    """For how long the connection had been dead when its end was written down, or frames may have been
    missing when a later one showed it."""
    return float(msgspec.json.decode(event["detail"]).get("span_s", 0.0))

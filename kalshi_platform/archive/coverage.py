"""Coverage: for how much of an hour each market's book is synced (`verified`).

A book is synced from its snapshot until an event makes it stale: a gap on its sid, the end of its connection,
a negative level, leaving the market. A market is followed from its first event in the hour (or the hour's
first instant, if the checkpoint has it) until it is left or the hour ends; time without its recorder counts
as followed and not synced. A snapshot that proves its market unchanged makes the time since it was stale synced.
A killed recorder writes no disconnect event: its connections fall silent, whatever
other shards record, and a later start adds an `unheard` row to the hour. Which events make a book stale
follows from their order; their times only determine the durations. Reading the events belongs in `hours`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import msgspec

from kalshi_platform.schema import CONNECTION_ENDS, STALE_EVENTS, UNCHANGED

RELEVANT_KINDS = ("snapshot", "resynced", *STALE_EVENTS)
"""The kinds of stream_events that coverage depends on."""
CHECKPOINT = "checkpoint"
"""The kind of an event that stands for a book of a checkpoint."""
SILENCE = timedelta(seconds=30)
"""Three heartbeats: with nothing recorded of a connection for longer, its recorder was not running."""
ANY_CONNECTION = ""
"""The connection of a heartbeat from a version that did not record which connection was alive."""


Span = tuple[datetime, datetime]
"""From, included, to, excluded."""


@dataclass
class _Market:
    followed_from: datetime
    conn: str = ""
    sid: int = 0
    verified_from: datetime | None = None
    stale_from: datetime | None = None
    """None where it was never synced, or is."""
    verified: timedelta = timedelta()
    followed_to: datetime | None = None
    spans: list[Span] = field(default_factory=list)


@dataclass(frozen=True)
class Coverage:
    """Market-seconds of one hour."""

    verified_s: float
    followed_s: float
    by_market: dict[str, float] = field(default_factory=dict)
    """Verified seconds of each market."""
    synced: dict[str, list[Span]] = field(default_factory=dict)
    """When each followed market's book was synced, ascending; empty where it never was."""
    followed: dict[str, Span] = field(default_factory=dict)
    """When each market was followed."""

    @property
    def ratio(self) -> float | None:
        """0 to 1; None where no market was followed."""
        return self.verified_s / self.followed_s if self.followed_s > 0 else None


def coverage(
    start: datetime,
    end: datetime,
    events: Iterable[dict[str, Any]],
    signs: Mapping[str, datetime],
    silence: timedelta = SILENCE,
) -> Coverage:
    """Compute the coverage of `start` to `end`.

    `events`: the hour's stream_events in order (those of `RELEVANT_KINDS` suffice), and in their places the
    books of its checkpoints, as events of kind `CHECKPOINT` with a `verified`. `signs`: the last receive time
    of each connection in the hour; under `ANY_CONNECTION` that of connections that are not known. `silence`: a
    connection of which nothing was recorded for longer before `end` counts as ended at its last sign.
    """
    markets: dict[str, _Market] = {}
    for event in events:
        at = event["ingest_ts"]
        kind, conn, ticker = event["kind"], event["conn_id"], event["market_ticker"]
        if kind == "snapshot":
            _snapshot(markets.setdefault(ticker, _Market(at)), event)
        elif kind == CHECKPOINT:
            _checkpoint(markets, event, start)
        elif kind == "resynced":
            if ticker in markets and UNCHANGED in event["detail"]:  # by a snapshot of a later hour
                _count_as_synced(markets[ticker], end)
        elif ticker:  # a gap of one book, or leaving the market
            if ticker in markets:
                _mark_stale(markets[ticker], at)
                if kind == "left":
                    markets[ticker].followed_to = at
        else:
            dated_back = kind in {"disconnected", "gap"}
            broken_at = at - timedelta(seconds=_stale_span_s(event)) if dated_back else at
            for market in markets.values():
                same_sid = kind in CONNECTION_ENDS or market.sid == event["sid"]
                if market.conn == conn and same_sid:
                    _mark_stale(market, broken_at)
    for market in markets.values():
        sign = max(signs.get(market.conn, start), signs.get(ANY_CONNECTION, start))
        _mark_stale(market, sign if end - sign > silence else end)
    followed = sum(
        (((m.followed_to or end) - m.followed_from).total_seconds() for m in markets.values()), 0.0
    )
    by_market = {ticker: m.verified.total_seconds() for ticker, m in markets.items()}
    return Coverage(
        sum(by_market.values()),
        followed,
        by_market,
        {ticker: m.spans for ticker, m in markets.items()},
        {ticker: (m.followed_from, m.followed_to or end) for ticker, m in markets.items()},
    )


def _snapshot(market: _Market, event: dict[str, Any]) -> None:
    market.conn, market.sid, market.followed_to = event["conn_id"], event["sid"], None
    if market.verified_from is None:
        if UNCHANGED in event["detail"]:
            _count_as_synced(market, event["ingest_ts"])
        market.verified_from = event["ingest_ts"]


def _checkpoint(markets: dict[str, _Market], event: dict[str, Any], start: datetime) -> None:
    """Apply a checkpoint's book. A checkpoint after the clock was set back also has books that have ended."""
    at, ticker = event["ingest_ts"], event["market_ticker"]
    if at > start and not event["verified"]:
        if ticker in markets:
            _mark_stale(markets[ticker], at)
        return
    market = markets.setdefault(ticker, _Market(at))
    market.conn, market.sid = event["conn_id"], event["sid"]
    if not event["verified"]:
        _mark_stale(market, at)
        market.stale_from = market.stale_from or at
    elif market.verified_from is None:
        market.verified_from = at


def _mark_stale(market: _Market, at: datetime) -> None:
    if market.verified_from is not None:
        market.stale_from = max(at, market.verified_from)
        _count(market, market.verified_from, market.stale_from)
        market.verified_from = None


def _count_as_synced(market: _Market, until: datetime) -> None:
    """Count the time since a book became stale as synced: nothing was missed in it."""
    since = market.verified_from or market.stale_from
    if since is not None:
        _count(market, since, until)
    market.verified_from = market.stale_from = None


def _count(market: _Market, since: datetime, until: datetime) -> None:
    if since < until:
        market.verified += until - since
        market.spans.append((since, until))


def _stale_span_s(event: dict[str, Any]) -> float:
    """How long before the event the book became stale, in seconds: since the connection had been silent, or
    since frames may have been missing."""
    return float(msgspec.json.decode(event["detail"]).get("span_s", 0.0))

"""Which markets are to be followed at a moment, from what is known of their lives. No I/O.

Markets open and close at times that REST lists, and the exchange says nothing when they do: the clock
does. What it does say (a market created, its close moved, its result determined) is heeded at once. A
market is let go only for something that is known of it: never because a list did not have it.
Times are Unix seconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from kalshi_platform.exchange.answers import Market
from kalshi_platform.exchange.frames import LifecycleEvent
from kalshi_platform.exchange.numbers import qty_units

JOIN_BEFORE_S = 5.0
"""So long before it opens a market is joined: its first order and its first trade are seen."""
LEAVE_AFTER_S = 30.0
"""So long after its end a market is still followed: its last frames and the empty snapshot of its close
come up to some seconds later."""
CACHED_S = 15.0
"""So old may an answer of REST be."""
OVER = frozenset(["closed", "determined", "disputed", "amended", "finalized"])


@dataclass(frozen=True)
class MarketSelection:
    """What somebody wants recorded."""

    tickers: tuple[str, ...] = ()
    series: tuple[str, ...] = ()
    events: frozenset[str] = frozenset()
    everything: bool = False
    min_volume: int = 0
    """1e-2 contracts that a market must have traded, where it is wanted as a part of everything."""

    @property
    def follows_openings(self) -> bool:
        """Whether markets join by themselves."""
        return self.everything or bool(self.series) or bool(self.events)

    def wants(self, event_ticker: str, volume: int) -> bool:
        """Whether a market of that event is wanted, once it has traded so much."""
        return (
            (self.everything and volume >= self.min_volume)
            or event_ticker in self.events
            or any(self._within(event_ticker, one) for one in self.series)
        )

    def may_want(self, ticker: str) -> bool:
        """The same of a market of which nothing is known but its ticker."""
        return (
            self.everything
            or any(self._within(ticker, one) for one in self.series)
            or any(self._within(ticker, one) for one in self.events)
        )

    @staticmethod
    def _within(ticker: str, group: str) -> bool:
        """Tickers are built by appending: SERIES-EVENT-MARKET."""
        return ticker == group or ticker.startswith(group + "-")


@dataclass
class _Life:
    event_ticker: str
    open_s: float
    close_s: float
    wanted: bool
    over_s: float | None = None
    """When it was learnt that the market has ended."""


class Universe:
    """The markets of a wish, and where each is in its life."""

    def __init__(self, wish: MarketSelection) -> None:
        self.wish = wish
        self.as_of_s = 0.0
        """Up to when REST's list is known."""
        self.unsure = False
        """Whether the exchange told of a market that is not known yet: ask REST soon."""
        self._lives: dict[str, _Life] = {}
        self._named: dict[str, None] = {}
        """Tickers of the wish that the exchange knows."""
        self._changes_s = -inf
        """When `wanted` gives another answer; earlier, it need not be asked."""

    @property
    def unknown(self) -> list[str]:
        """Tickers of the wish that the exchange does not know, as far as has been asked."""
        return [ticker for ticker in self.wish.tickers if ticker not in self._named]

    def rename(self, tickers: Iterable[str]) -> None:
        """The wish names these tickers now, and no others."""
        wish = self.wish
        self.wish = MarketSelection(
            tuple(dict.fromkeys(tickers)),
            wish.series,
            wish.events,
            wish.everything,
            wish.min_volume,
        )
        self._named = {ticker: None for ticker in self.wish.tickers if ticker in self._named}
        self._changes_s = -inf

    def listed(self, markets: Iterable[Market], now_s: float) -> None:
        """What REST lists, or a part of it."""
        named = set(self.wish.tickers)
        for market in markets:
            if market.ticker in named:
                self._named[market.ticker] = None
            self._put(market, now_s)
        self._changes_s = -inf

    def _put(self, market: Market, now_s: float) -> None:
        known = self._lives.get(market.ticker)
        over = market.status in OVER
        volume = qty_units(market.volume_fp) if market.volume_fp is not None else 0
        wanted = self.wish.wants(market.event_ticker, volume)
        if known is None and (over or not (wanted or self.wish.may_want(market.ticker))):
            return
        open_s = market.open_time.timestamp() if market.open_time else -inf
        close_s = market.close_time.timestamp() if market.close_time else inf
        if market.status == "active":  # whatever its times say
            open_s = min(open_s, now_s)
            close_s = inf if now_s >= close_s + CACHED_S else close_s
        self._lives[market.ticker] = _Life(
            market.event_ticker,
            open_s,
            close_s,
            wanted or (known is not None and known.wanted),
            (now_s if known is None or known.over_s is None else known.over_s) if over else None,
        )

    def heed(self, event: LifecycleEvent, now_s: float) -> None:
        """What the exchange tells of a market's life."""
        ticker, known = event.market_ticker, self._lives.get(event.market_ticker)
        if event.event_type == "created":
            if ticker in self.wish.tickers:
                self._named[ticker] = None
            wanted = self.wish.wants(event.event_ticker, 0)
            if known is None and (wanted or self.wish.may_want(ticker)):
                close_s = inf if event.close_ts is None else float(event.close_ts)
                open_s = -inf if event.open_ts is None else float(event.open_ts)
                self._lives[ticker] = _Life(event.event_ticker, open_s, close_s, wanted)
        elif known is None:
            self.unsure = self.unsure or (
                event.event_type in {"activated", "close_date_updated"}
                and self.wish.may_want(ticker)
            )
            return
        elif event.event_type == "activated":
            known.open_s, known.over_s = min(known.open_s, now_s), None
        elif event.event_type == "close_date_updated" and event.close_ts is not None:
            known.close_s = float(event.close_ts)
        elif event.event_type in {"determined", "settled"}:
            known.over_s = now_s if known.over_s is None else known.over_s
        self._changes_s = -inf

    def ask_again(self) -> None:
        """Let `wanted` be asked, whatever it said last."""
        self._changes_s = -inf

    def is_due(self, now_s: float) -> bool:
        """Whether `wanted` may give another answer than before."""
        return now_s >= self._changes_s

    def wanted(self, now_s: float) -> list[str]:
        """The tickers to follow now; markets that have ended are forgotten."""
        found = dict(self._named)
        changes_s = inf
        for ticker, life in list(self._lives.items()):
            leaves_s = self._leaves_s(life)
            if now_s >= leaves_s and self._is_sure(life):
                del self._lives[ticker]
                continue
            joins_s = life.open_s - JOIN_BEFORE_S
            if life.wanted and now_s >= joins_s:
                found[ticker] = None
            changes_s = min(changes_s, *(at for at in (joins_s, leaves_s) if at > now_s), inf)
        self._changes_s = changes_s
        return list(found)

    def _leaves_s(self, life: _Life) -> float:
        end_s = life.close_s if life.over_s is None else min(life.over_s, life.close_s)
        return end_s + LEAVE_AFTER_S

    def _is_sure(self, life: _Life) -> bool:
        """Whether the end is known to be one: a close may have been moved since REST was last read."""
        return life.over_s is not None or self.as_of_s >= life.close_s + CACHED_S

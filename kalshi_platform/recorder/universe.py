"""Which markets to follow at a given time, from their listed times and lifecycle events. No I/O.

Markets open and close at the times that REST lists; the exchange sends no message then, so the clock
decides. Lifecycle events (a market created, its close moved, its result determined) apply at once. A market
is left only because of its own times, status or events, never because a list does not contain it. Times are
Unix seconds. Querying REST belongs in `market_selection`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from kalshi_platform.exchange.answers import Market
from kalshi_platform.exchange.frames import LifecycleEvent
from kalshi_platform.exchange.numbers import qty_units

JOIN_BEFORE_S = 5.0
"""A market is joined this long before it opens, so that its first order and trade are recorded."""
LEAVE_AFTER_S = 30.0
"""A market is followed this long after its end: its last frames and the empty snapshot of its close arrive
up to some seconds later."""
CACHED_S = 15.0
"""Maximum age of a REST response, which the exchange caches."""
ENDED_STATUSES = frozenset(["closed", "determined", "disputed", "amended", "finalized"])


@dataclass(frozen=True)
class MarketSelection:
    """Which markets the settings select for recording."""

    tickers: tuple[str, ...] = ()
    series: tuple[str, ...] = ()
    events: frozenset[str] = frozenset()
    everything: bool = False
    min_volume: int = 0
    """Minimum traded volume in 1e-2 contracts of a market that is selected by `everything`."""

    @property
    def follows_openings(self) -> bool:
        """Whether the selection includes markets that are listed later."""
        return self.everything or bool(self.series) or bool(self.events)

    def wants(self, event_ticker: str, volume: int) -> bool:
        """Whether a market of that event, with that traded volume, is selected."""
        return (
            (self.everything and volume >= self.min_volume)
            or event_ticker in self.events
            or any(self._within(event_ticker, one) for one in self.series)
        )

    def may_want(self, ticker: str) -> bool:
        """Whether a market might be selected, judged by its ticker alone."""
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
class _MarketState:
    event_ticker: str
    open_s: float
    close_s: float
    wanted: bool
    ended_s: float | None = None
    """When the market's end became known; None before."""


class Universe:
    """The markets of a selection and their open and close times."""

    def __init__(self, selection: MarketSelection) -> None:
        self.selection = selection
        self.as_of_s = 0.0
        """The time of the last list from REST."""
        self.refresh_needed = False
        """Whether a lifecycle event named an unknown market: query REST soon."""
        self._markets: dict[str, _MarketState] = {}
        self._known_tickers: dict[str, None] = {}
        """Tickers of the selection that the exchange knows."""
        self._next_change_s = -inf
        """When the result of `wanted` changes next."""

    @property
    def unknown(self) -> list[str]:
        """Tickers of the selection that no list from the exchange has contained yet."""
        return [ticker for ticker in self.selection.tickers if ticker not in self._known_tickers]

    def set_tickers(self, tickers: Iterable[str]) -> None:
        """Replace the tickers of the selection."""
        selection = self.selection
        self.selection = MarketSelection(
            tuple(dict.fromkeys(tickers)),
            selection.series,
            selection.events,
            selection.everything,
            selection.min_volume,
        )
        self._known_tickers = {
            ticker: None for ticker in self.selection.tickers if ticker in self._known_tickers
        }
        self._next_change_s = -inf

    def apply_list(self, markets: Iterable[Market], now_s: float) -> None:
        """Apply a list of markets from REST, which may be partial."""
        named = set(self.selection.tickers)
        for market in markets:
            if market.ticker in named:
                self._known_tickers[market.ticker] = None
            self._update(market, now_s)
        self._next_change_s = -inf

    def _update(self, market: Market, now_s: float) -> None:
        known = self._markets.get(market.ticker)
        over = market.status in ENDED_STATUSES
        volume = qty_units(market.volume_fp) if market.volume_fp is not None else 0
        wanted = self.selection.wants(market.event_ticker, volume)
        if known is None and (over or not (wanted or self.selection.may_want(market.ticker))):
            return
        open_s = market.open_time.timestamp() if market.open_time else -inf
        close_s = market.close_time.timestamp() if market.close_time else inf
        if market.status == "active":  # the status overrides the listed times
            open_s = min(open_s, now_s)
            close_s = inf if now_s >= close_s + CACHED_S else close_s
        self._markets[market.ticker] = _MarketState(
            market.event_ticker,
            open_s,
            close_s,
            wanted or (known is not None and known.wanted),
            (now_s if known is None or known.ended_s is None else known.ended_s) if over else None,
        )

    def apply_event(self, event: LifecycleEvent, now_s: float) -> None:
        """Apply a lifecycle event."""
        ticker, known = event.market_ticker, self._markets.get(event.market_ticker)
        if event.event_type == "created":
            if ticker in self.selection.tickers:
                self._known_tickers[ticker] = None
            wanted = self.selection.wants(event.event_ticker, 0)
            if known is None and (wanted or self.selection.may_want(ticker)):
                close_s = inf if event.close_ts is None else float(event.close_ts)
                open_s = -inf if event.open_ts is None else float(event.open_ts)
                self._markets[ticker] = _MarketState(event.event_ticker, open_s, close_s, wanted)
        elif known is None:
            self.refresh_needed = self.refresh_needed or (
                event.event_type in {"activated", "close_date_updated"}
                and self.selection.may_want(ticker)
            )
            return
        elif event.event_type == "activated":
            known.open_s, known.ended_s = min(known.open_s, now_s), None
        elif event.event_type == "close_date_updated" and event.close_ts is not None:
            known.close_s = float(event.close_ts)
        elif event.event_type in {"determined", "settled"}:
            known.ended_s = now_s if known.ended_s is None else known.ended_s
        self._next_change_s = -inf

    def invalidate(self) -> None:
        """Make `is_due` true until the next `wanted`."""
        self._next_change_s = -inf

    def is_due(self, now_s: float) -> bool:
        """Whether the result of `wanted` may have changed."""
        return now_s >= self._next_change_s

    def wanted(self, now_s: float) -> list[str]:
        """The tickers to follow now; drops markets that have ended."""
        tickers = dict(self._known_tickers)
        changes_s = inf
        for ticker, market in list(self._markets.items()):
            leaves_s = self._leaves_s(market)
            if now_s >= leaves_s and self._end_is_known(market):
                del self._markets[ticker]
                continue
            joins_s = market.open_s - JOIN_BEFORE_S
            if market.wanted and now_s >= joins_s:
                tickers[ticker] = None
            changes_s = min(changes_s, *(at for at in (joins_s, leaves_s) if at > now_s), inf)
        self._next_change_s = changes_s
        return list(tickers)

    def _leaves_s(self, market: _MarketState) -> float:
        end_s = market.close_s if market.ended_s is None else min(market.ended_s, market.close_s)
        return end_s + LEAVE_AFTER_S

    def _end_is_known(self, market: _MarketState) -> bool:
        """Whether the market has certainly ended: its close may have been moved since the last list."""
        return market.ended_s is not None or self.as_of_s >= market.close_s + CACHED_S

"""Which markets to record: the settings' wish, checked against what the exchange lists.

A list that could not be had changes nothing: no answer never means "no markets".
"""

from __future__ import annotations

import logging
import time

from kalshi_platform.errors import SettingsError
from kalshi_platform.exchange.rest import RestClient
from kalshi_platform.recording.shares import share
from kalshi_platform.settings import Settings

log = logging.getLogger(__name__)

REFRESH_S = 15.0
"""Between two looks at the exchange's list: markets open and close without a message."""
LEAVE_AFTER_S = 30.0
"""A market that is no longer listed as open is followed so much longer: its last frames and the
empty snapshot of its close come up to some seconds later."""


class Watchlist:
    """One shard's markets to follow, kept current."""

    def __init__(self, settings: Settings, shard: int = 0) -> None:
        self._settings = settings
        self._shard = shard
        self._fixed: tuple[str, ...] | None = None
        self._last_seen: dict[str, float] = {}

    @property
    def follows_openings(self) -> bool:
        """Whether the list changes by itself: a series, or all of the simulator."""
        return bool(self._settings.market_series) or self._everything

    @property
    def _everything(self) -> bool:
        s = self._settings
        return s.exchange.simulated and not s.market_tickers and not s.market_series

    def refresh(self, rest: RestClient) -> list[str]:
        """The tickers that this shard follows now; there may be none.

        Raises `SettingsError` when there is nothing to follow, `ExchangeError` when the exchange
        does not answer.
        """
        now = time.monotonic()
        if self._fixed is None:
            self._fixed = self._known(rest)
        for series in self._settings.market_series or ((None,) if self._everything else ()):
            for market in rest.open_markets(series):
                self._last_seen[market.ticker] = now
        self._last_seen = {t: at for t, at in self._last_seen.items() if now - at < LEAVE_AFTER_S}
        wanted = list(dict.fromkeys([*self._fixed, *self._last_seen]))
        if not wanted and not self.follows_openings:
            raise SettingsError(
                "There is nothing to record: set MARKET_TICKERS or MARKET_SERIES (for example"
                " MARKET_SERIES=KXHIGHNY)."
            )
        return share(wanted, self._shard, self._settings.stream_shards)

    def _known(self, rest: RestClient) -> tuple[str, ...]:
        asked = self._settings.market_tickers
        unknown = rest.unknown_tickers(asked) if asked else set()
        if not unknown:
            return asked
        names = ", ".join(sorted(unknown))
        if unknown == set(asked) and not self._settings.market_series:
            raise SettingsError(
                f"MARKET_TICKERS names no market that the exchange knows: {names}. Tickers are as in the"
                " address of a market's page, in capitals."
            )
        log.warning("The exchange knows no market %s: not recorded. Check MARKET_TICKERS.", names)
        return tuple(ticker for ticker in asked if ticker not in unknown)

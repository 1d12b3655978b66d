"""What goes on beside capture, on its event loop: keeping the list of markets, fetching missed trades.

REST is asked in threads, so that the loop is never held up; what is known of the markets (`markets.py`)
changes in the loop's thread alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from datetime import UTC, datetime

from kalshi_platform.errors import SettingsError
from kalshi_platform.exchange.errors import CredentialsError, ExchangeError
from kalshi_platform.exchange.frames import LifeEvent
from kalshi_platform.exchange.rest import RestClient
from kalshi_platform.exchange.side_channel import TRADES
from kalshi_platform.recording import recovery
from kalshi_platform.recording.capture import Capture, Loss
from kalshi_platform.recording.markets import Watchlist
from kalshi_platform.recording.recovery import Found
from kalshi_platform.settings import Settings

log = logging.getLogger(__name__)

TURN_S = 0.25
"""Between two looks at the clock: markets open and close without a message."""
RETRY_S = 5.0
"""After a list that could not be had."""
RECOVERY_TRIES = 10
RECOVERY_RETRY_S = 30.0


class Upkeep:
    """The markets that a capture follows, and the trades that its stream has missed."""

    def __init__(self, settings: Settings, rest: RestClient, shard: int) -> None:
        """Raises `SettingsError` where the settings name nothing to record."""
        self._rest = rest
        self._watchlist = Watchlist(settings, time.time, shard)
        self._losses: asyncio.Queue[Loss] = asyncio.Queue()

    async def first_list(self) -> list[str]:
        """The markets to begin with, as soon as the exchange tells.

        Raises `SettingsError` where the wish comes to nothing, `CredentialsError` where the key does.
        """
        while True:
            try:
                await self._look()
                return self._watchlist.wanted() or []
            except CredentialsError:
                raise
            except ExchangeError as error:
                log.warning("%s Trying again in %.0f s.", error, RETRY_S)
                await asyncio.sleep(RETRY_S)

    def heed(self, events: Sequence[LifeEvent]) -> None:
        """What the exchange tells of markets' lives."""
        self._watchlist.heed(events)

    def make_up_for(self, loss: Loss) -> None:
        """Something was missed: trades are fetched, life events make up for themselves at REST."""
        if loss.lost.channel == TRADES:
            self._losses.put_nowait(loss)
        else:
            self._watchlist.unsettle()

    async def keep_looking(self) -> None:
        """Look at REST and at MARKET_FILE, now and then."""
        while True:
            await asyncio.sleep(TURN_S)
            self._watchlist.reread()
            try:
                await self._look()
            except SettingsError as error:
                log.warning("%s", error)
            except ExchangeError as error:
                log.warning("The list of markets stays as it is: %s", error)
                await asyncio.sleep(RETRY_S)

    async def _look(self) -> None:
        look = self._watchlist.look()
        if look is not None:
            self._watchlist.take(look, await asyncio.to_thread(look.take, self._rest))

    async def keep_following(self, capture: Capture) -> None:
        """Let markets join and leave as their times come."""
        while True:
            await asyncio.sleep(TURN_S)
            wanted = self._watchlist.wanted()
            if wanted is not None:
                capture.follow(wanted)

    async def keep_recovering(self, capture: Capture) -> None:
        """Fetch missed trades, one loss after the other."""
        while True:
            loss = await self._losses.get()
            await asyncio.sleep(max(loss.until_ns / 1e9 + recovery.AFTER_S - time.time(), 0.0))
            found = await self._recovered(loss, capture)
            detail: dict[str, object] = {
                "channel": loss.lost.channel,
                "cause": loss.lost.cause,
                "since": _iso(loss.since_ns),
                "until": _iso(loss.until_ns),
                "missing": loss.lost.missing,
                "trades": len(found.frames),
            }
            if found.reason:
                detail["reason"] = found.reason
                log.warning("Trades that the stream missed were not fetched: %s.", found.reason)
            capture.recover(loss, found.frames, detail)

    async def _recovered(self, loss: Loss, capture: Capture) -> Found:
        for _ in range(RECOVERY_TRIES):
            try:
                listed = await asyncio.to_thread(recovery.ask, self._rest, loss)
                return recovery.missed(listed, loss, capture.recent_trades)
            except ExchangeError as error:
                log.warning("Missed trades cannot be fetched now: %s", error)
                reason = str(error)
                await asyncio.sleep(RECOVERY_RETRY_S)
        return Found((), reason)


def _iso(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9, UTC).isoformat(timespec="milliseconds")

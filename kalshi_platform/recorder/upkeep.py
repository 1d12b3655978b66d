"""What goes on beside capture, on its event loop: keeping the list of markets, fetching missed trades.

REST is asked in threads, so that the loop is never held up; what is known of the markets (`markets.py`)
changes in the loop's thread alone. Each is a task of `tasks.py`: it may fail in any way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime

from kalshi_platform.errors import SettingsError
from kalshi_platform.exchange.auxiliary_channel import TRADES
from kalshi_platform.exchange.errors import CredentialsError
from kalshi_platform.exchange.frames import LifecycleEvent
from kalshi_platform.exchange.items import Unreadable
from kalshi_platform.exchange.rest import RestClient
from kalshi_platform.recorder import trade_backfill
from kalshi_platform.recorder.background import Tasks
from kalshi_platform.recorder.capture import Capture, MissedSpan
from kalshi_platform.recorder.market_selection import Watchlist
from kalshi_platform.recorder.trade_backfill import Found
from kalshi_platform.settings import Settings

log = logging.getLogger(__name__)

LOOK_UP, SELECTION, BACKFILL = "market look-up", "market selection", "trade backfill"
"""The names of the tasks."""
TURN_S = 0.25
"""Between two looks at the clock: markets open and close without a message."""
RETRY_S = 5.0
"""After a list that could not be had."""
RECOVERY_TRIES = 10


class Upkeep:
    """The markets that a capture follows, and the trades that its stream has missed."""

    def __init__(self, settings: Settings, rest: RestClient, shard: int, tasks: Tasks) -> None:
        """Raises `SettingsError` where the settings name nothing to record."""
        self._rest = rest
        self._tasks = tasks
        self._watchlist = Watchlist(settings, time.time, shard)
        self._losses: deque[MissedSpan] = deque()
        self._tried = 0
        """How often the trades of the first of them have been asked for."""

    async def first_list(self) -> list[str]:
        """The markets to begin with, as soon as the exchange tells.

        Raises `SettingsError` where the wish comes to nothing, `CredentialsError` where the key does.
        """
        while True:
            try:
                await self._look()
                tickers = self._watchlist.wanted() or []
            except (CredentialsError, SettingsError):
                raise
            except Exception as error:  # noqa: BLE001 - named there, and tried again
                self._tasks.failed(LOOK_UP, error, RETRY_S)
                await asyncio.sleep(RETRY_S)
            else:
                self._tasks.succeeded(LOOK_UP)
                return tickers

    def heed(self, events: Sequence[LifecycleEvent]) -> None:
        """What the exchange tells of markets' lives. What cannot be taken from there, REST is asked for."""
        with self._tasks.surviving(SELECTION):
            try:
                self._watchlist.heed(events)
            except BaseException:
                self._watchlist.unsettle()
                raise

    def make_up_for(self, loss: MissedSpan) -> None:
        """Something was missed: trades are fetched, life events make up for themselves at REST."""
        with self._tasks.surviving(BACKFILL):
            if loss.lost.channel == TRADES:
                self._losses.append(loss)
            else:
                self._watchlist.unsettle()

    async def look_up(self) -> None:
        """Look at REST and at MARKET_FILE, where it is time to."""
        await asyncio.sleep(TURN_S)
        self._watchlist.reread()
        await self._look()

    async def _look(self) -> None:
        look = self._watchlist.look()
        if look is not None:
            found: list[Unreadable] = []
            markets = await asyncio.to_thread(look.take, self._rest, found.append)
            for each in found:
                self._tasks.tell(each)
            self._watchlist.take(look, markets)

    async def select(self, capture: Capture) -> None:
        """Let markets join and leave where their times have come."""
        await asyncio.sleep(TURN_S)
        try:
            wanted = self._watchlist.wanted()
            if wanted is not None:
                capture.follow(wanted)
        except BaseException:
            self._watchlist.ask_again()
            raise

    async def backfill(self, capture: Capture) -> None:
        """Fetch the missed trades of the first loss that waits; it is tried again where that fails."""
        await asyncio.sleep(TURN_S)
        if not self._losses:
            return
        loss = self._losses[0]
        await asyncio.sleep(max(loss.until_ns / 1e9 + trade_backfill.AFTER_S - time.time(), 0.0))
        self._tried += 1
        try:
            listed = await asyncio.to_thread(trade_backfill.ask, self._rest, loss)
            found = trade_backfill.missed(listed, loss, capture.recent_trades)
            self._keep(found, loss, capture)
        except Exception as error:
            if self._tried < RECOVERY_TRIES:
                raise
            self._keep(Found((), str(error) or type(error).__name__), loss, capture)
        self._losses.popleft()
        self._tried = 0

    def _keep(self, found: Found, loss: MissedSpan, capture: Capture) -> None:
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


def _iso(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9, UTC).isoformat(timespec="milliseconds")

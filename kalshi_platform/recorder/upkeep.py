"""Background work on capture's event loop: the list of markets, the exchange's schedule, backfill of missed trades.

REST requests run in threads, so that they never block the loop; market state (`market_selection`) changes
only in the loop's thread. Each method runs as a task of `background`, which handles every failure.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec

from kalshi_platform.errors import SettingsError
from kalshi_platform.exchange import maintenance
from kalshi_platform.exchange.auxiliary_channel import TRADES
from kalshi_platform.exchange.errors import CredentialsError
from kalshi_platform.exchange.frames import LifecycleEvent
from kalshi_platform.exchange.items import Unreadable
from kalshi_platform.exchange.maintenance import Maintenance
from kalshi_platform.exchange.rest import RestClient
from kalshi_platform.recorder import trade_backfill
from kalshi_platform.recorder.background import Tasks
from kalshi_platform.recorder.capture import Capture, MissedSpan
from kalshi_platform.recorder.market_selection import Watchlist
from kalshi_platform.recorder.trade_backfill import Backfill
from kalshi_platform.settings import Settings

log = logging.getLogger(__name__)

LOOK_UP, SELECTION, BACKFILL = "market look-up", "market selection", "trade backfill"
TIMETABLE = "exchange schedule"
"""The names of the tasks."""
INTERVAL_S = 0.25
"""Interval between turns: markets open and close by the clock, without a message."""
RETRY_S = 5.0
"""Delay after a failed first query."""
BACKFILL_ATTEMPTS = 10
TIMETABLE_S = 3600.0
"""Interval at which the exchange's schedule is read."""


class Upkeep:
    """Keeps the markets that a capture follows current, and backfills trades that its stream missed."""

    def __init__(self, settings: Settings, rest: RestClient, shard: int, tasks: Tasks) -> None:
        """Raises: `SettingsError` where the settings select nothing to record."""
        self._rest = rest
        self._tasks = tasks
        self._watchlist = Watchlist(settings, time.time, shard)
        self._missed_spans: deque[MissedSpan] = deque()
        self._maintenance: Maintenance | None = None
        """The windows that were noted last; None before the first."""
        self._attempts = 0
        """Attempts to backfill the first of the missed spans."""

    async def first_selection(self) -> list[str]:
        """The markets to begin with; retries until the exchange lists them.

        Raises: `SettingsError` where the selection has no known market, `CredentialsError` for a bad key.
        """
        while True:
            try:
                await self._look()
                tickers = self._watchlist.wanted() or []
            except (CredentialsError, SettingsError):
                raise
            except Exception as error:  # noqa: BLE001 - reported and retried
                self._tasks.failed(LOOK_UP, error, RETRY_S)
                await asyncio.sleep(RETRY_S)
            else:
                self._tasks.succeeded(LOOK_UP)
                return tickers

    def apply_events(self, events: Sequence[LifecycleEvent]) -> None:
        """Apply lifecycle events; where that fails, query REST for the changes."""
        with self._tasks.guarded(SELECTION):
            try:
                self._watchlist.apply_events(events)
            except BaseException:
                self._watchlist.request_refresh()
                raise

    def handle_missed(self, span: MissedSpan) -> None:
        """Queue a missed span of trades for the backfill; for missed lifecycle events query REST."""
        with self._tasks.guarded(BACKFILL):
            if span.missed.channel == TRADES:
                self._missed_spans.append(span)
            else:
                self._watchlist.request_refresh()

    async def look_up(self) -> None:
        """Reload MARKET_FILE and query REST, where due."""
        await asyncio.sleep(INTERVAL_S)
        self._watchlist.reload_file()
        await self._look()

    async def _look(self) -> None:
        query = self._watchlist.due_query()
        if query is not None:
            unreadable: list[Unreadable] = []
            markets = await asyncio.to_thread(query.fetch, self._rest, unreadable.append)
            for item in unreadable:
                self._tasks.report_unreadable(item)
            self._watchlist.apply(query, markets)

    async def select(self, capture: Capture) -> None:
        """Let markets join and leave at their times."""
        await asyncio.sleep(INTERVAL_S)
        try:
            wanted = self._watchlist.wanted()
            if wanted is not None:
                capture.follow(wanted)
        except BaseException:
            self._watchlist.invalidate()
            raise

    async def note_schedule(self, capture: Capture) -> None:
        """Note the exchange's maintenance windows where they have changed: clocks are not compared across them."""
        schedule = await asyncio.to_thread(self._rest.schedule)
        windows = maintenance.from_schedule(schedule.standard_hours, schedule.maintenance_windows)
        if windows != self._maintenance:
            capture.note(maintenance.SCHEDULE, msgspec.to_builtins(windows))
            self._maintenance = windows
        await asyncio.sleep(TIMETABLE_S)

    async def backfill(self, capture: Capture) -> None:
        """Backfill the first queued span; a failure leaves it queued for another attempt."""
        await asyncio.sleep(INTERVAL_S)
        if not self._missed_spans:
            return
        span = self._missed_spans[0]
        await asyncio.sleep(max(span.until_ns / 1e9 + trade_backfill.DELAY_S - time.time(), 0.0))
        self._attempts += 1
        try:
            listed = await asyncio.to_thread(trade_backfill.fetch, self._rest, span)
            result = trade_backfill.select_missed(listed, span, capture.recent_trades)
            self._keep(result, span, capture)
        except Exception as error:
            if self._attempts < BACKFILL_ATTEMPTS:
                raise
            self._keep(Backfill((), str(error) or type(error).__name__), span, capture)
        self._missed_spans.popleft()
        self._attempts = 0

    def _keep(self, result: Backfill, span: MissedSpan, capture: Capture) -> None:
        detail: dict[str, object] = {
            "channel": span.missed.channel,
            "cause": span.missed.cause,
            "since": _iso(span.since_ns),
            "until": _iso(span.until_ns),
            "missing": span.missed.missing,
            "trades": len(result.frames),
        }
        if result.reason:
            detail["reason"] = result.reason
            log.warning("Trades that the stream missed were not fetched: %s.", result.reason)
        capture.record_backfill(span, result.frames, detail)


def _iso(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9, UTC).isoformat(timespec="milliseconds")

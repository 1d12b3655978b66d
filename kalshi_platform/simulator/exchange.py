"""Simulate the exchange: all markets, driven by the clock that is passed in. No I/O.

`advance(now)` returns the events since the last call, in order; the books already include them. Tests
compare a recorder with these books. Sessions and faults are in other modules.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import random
import uuid
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable

from kalshi_platform.exchange.numbers import dollars
from kalshi_platform.simulator import catalog, market
from kalshi_platform.simulator.book import NO, YES, Book, BookView
from kalshi_platform.simulator.catalog import SECOND, Series, Slot
from kalshi_platform.simulator.errors import SimulatorError
from kalshi_platform.simulator.frames import Cleared, Delta, Happening, LifeEvent, Quote, Trade
from kalshi_platform.simulator.market import Listing, Market
from kalshi_platform.simulator.orderflow import OrderFlow, Print
from kalshi_platform.simulator.portfolio import Portfolio

_NAMESPACE = uuid.UUID("2f1d7a58-3a0e-4a3c-9f55-6a54d7d9d3c1")
RECENT_TRADES = 10_000
KEPT_AFTER_SETTLEMENT_NS = 3600 * SECOND
_FALLEN_BEHIND_NS = SECOND
_CLOCK_NS = SECOND // 10_000
"""A market that is open at the start has had one change in each of these since its opening.

So a restarted simulator's clocks are above all of the one before: no client takes its books for the old ones.
"""


class Exchange:
    """All markets and the order flow over them. Times are Unix nanoseconds."""

    def __init__(
        self,
        *,
        markets: int,
        rate: float,
        seed: int,
        now_ns: int,
        rolling_markets: int,
        rolling_seconds: float,
    ) -> None:
        self._seed = seed
        self._random = random.Random(f"{seed}:exchange")  # noqa: S311  a model, not a secret
        self._pause_ns = SECOND / rate if rate else math.inf
        self._markets: dict[str, Market] = {}
        self._flows: dict[str, OrderFlow] = {}
        self._agenda: list[tuple[int, int, Callable[[int], None]]] = []
        self._count = itertools.count()
        self._happened: list[Happening] = []
        self._next_ns: float = now_ns + self._pause_ns
        self.now_ns = now_ns
        self.trades: deque[Trade] = deque(maxlen=RECENT_TRADES)
        self.portfolio = Portfolio(f"{seed}:{now_ns}", self._change)
        self.maintenance: tuple[int, int] | None = None
        """The last maintenance, from when to when; None: there was none."""
        self.deltas = 0
        """Deltas since the start."""
        self.shed_seconds = 0.0
        """Seconds of order flow that were skipped because the machine could not keep up."""
        for listing in catalog.long_lived(markets - rolling_markets, now_ns, rolling_markets):
            self._begin(listing)
        for index in range(rolling_markets):
            slot = Slot(index, rolling_markets, int(rolling_seconds * SECOND))
            open_ns = slot.opening_at_or_before(now_ns)
            self._begin(slot.listing(open_ns))
            self._list_next(slot, open_ns + slot.lifetime_ns)
        self._reweigh()
        self._happened.clear()

    # markets and books

    def market(self, ticker: str) -> Market | None:
        """Return the market of that ticker, if it is listed."""
        return self._markets.get(ticker)

    def markets(self) -> Iterable[Market]:
        """Return all listed markets, oldest first."""
        return self._markets.values()

    @property
    def series(self) -> tuple[Series, ...]:
        """All series with a market."""
        used = {listed.listing.series_ticker for listed in self._markets.values()}
        return tuple(s for s in (*catalog.LONG_LIVED, *catalog.ROLLING) if s.ticker in used)

    def books(self) -> dict[str, BookView]:
        """Return every market's current book."""
        return {ticker: listed.view() for ticker, listed in self._markets.items()}

    # events

    def advance(self, now_ns: int, limit: int | None = None) -> list[Happening]:
        """Advance to `now_ns`: at most `limit` steps of order flow, and all scheduled actions; return the events."""
        steps = 0
        while True:
            due = self._agenda[0][0] if self._agenda else math.inf
            if min(due, self._next_ns) > now_ns:
                break
            if due <= self._next_ns:
                at, _, act = heapq.heappop(self._agenda)
                act(at)
            elif limit is not None and steps >= limit:
                break
            else:
                steps += 1
                self._step_one(int(self._next_ns))
        if self._next_ns < now_ns - _FALLEN_BEHIND_NS:
            self.shed_seconds += (now_ns - self._next_ns) / SECOND
            self._next_ns = now_ns
        self.now_ns = now_ns
        happened, self._happened = self._happened, []
        return happened

    def happened(self) -> list[Happening]:
        """Return the events of own orders since the last call of this method or of `advance`."""
        happened, self._happened = self._happened, []
        return happened

    def resume(self, now_ns: int) -> None:
        """Continue the order flow after a pause, without catching up."""
        self._next_ns = max(self._next_ns, now_ns)

    def cross(self, seconds: float) -> list[Happening]:
        """Cross the busiest market's book for `seconds`, with a real order that is removed afterwards.

        Raises SimulatorError if no market has bids on both sides.
        """
        for listed in self._active:
            best_no = listed.book.best[NO]
            if best_no >= 0 and listed.book.best[YES] >= 0:
                break
        else:
            raise SimulatorError("No market has bids on both sides, so none can be crossed.")
        level = listed.listing.grid.levels - 1 - best_no
        listed.halted = True
        self._reweigh()
        self._change(listed, [(YES, level, 100)], self.now_ns)
        self._at(self.now_ns + int(seconds * SECOND), lambda at: self._uncross(listed, level, at))
        happened, self._happened = self._happened, []
        return happened

    def close_early(self, seconds: float) -> list[Happening]:
        """Close the busiest rolling market `seconds` from now, and send `close_date_updated`.

        Raises SimulatorError if no rolling market is open.
        """
        early = next((listed for listed in self._active if listed.listing.rolling), None)
        if early is None:
            raise SimulatorError("No rolling market is open, so none can close early.")
        close_s = math.ceil(self.now_ns / SECOND + seconds)
        early.listing = dataclasses.replace(early.listing, close_ns=close_s * SECOND)
        early.updated_us = self.now_ns // 1000
        self._at(close_s * SECOND, lambda at: self._close(early, at))
        self._send_lifecycle(early, "close_date_updated", self.now_ns, close_ts=close_s)
        return self.happened()

    def maintain(self, seconds: float) -> list[Happening]:
        """Stop the order flow for `seconds`; markets open and close by their times all the same."""
        end_ns = self.now_ns + int(seconds * SECOND)
        self.maintenance = (self.now_ns, end_ns)
        self._next_ns = max(self._next_ns, end_ns)
        return []

    def reset_clocks(self, _: float) -> list[Happening]:
        """Let the clock of every market that has one begin again at 1; the books stay."""
        for listed in self._markets.values():
            listed.clock = min(listed.clock, 1)
        return []

    def halt(self, seconds: float) -> list[Happening]:
        """Deactivate the busiest market for `seconds`, and send `deactivated` and `activated`.

        Raises SimulatorError if no market is open.
        """
        if not self._active:
            raise SimulatorError("No market is open, so none can be halted.")
        halted = self._active[0]
        halted.status = market.INACTIVE
        halted.updated_us = self.now_ns // 1000
        self._reweigh()
        self._send_lifecycle(halted, "deactivated", self.now_ns, is_deactivated=True)
        self._at(self.now_ns + int(seconds * SECOND), lambda at: self._reactivate(halted, at))
        return self.happened()

    def _reactivate(self, halted: Market, at_ns: int) -> None:
        if halted.status == market.INACTIVE:  # else it has closed meanwhile
            halted.status = market.ACTIVE
            halted.updated_us = at_ns // 1000
            self._reweigh()
            self._send_lifecycle(halted, "activated", at_ns, is_deactivated=False)

    def _send_lifecycle(self, changed: Market, event_type: str, at_ns: int, **more: object) -> None:
        msg = {"market_ticker": changed.ticker, "event_type": event_type, **more}
        self._send("market_lifecycle_v2", msg, at_ns // 1000)

    def _uncross(self, crossed: Market, level: int, at_ns: int) -> None:
        left = min(crossed.book.sizes[YES][level], 100)
        if left:
            self._change(crossed, [(YES, level, -left)], at_ns)
        crossed.halted = False
        self._reweigh()

    def _step_one(self, at_ns: int) -> None:
        rng = self._random
        if not self._active:
            self._next_ns = at_ns + self._pause_ns
            return
        chosen = self._active[
            bisect_right(
                self._cumulative, rng.random() * self._cumulative[-1], hi=len(self._active) - 1
            )
        ]
        deltas = self._step(chosen, at_ns)
        self._next_ns = at_ns - math.log(1.0 - rng.random()) * self._pause_ns * deltas

    def _step(self, chosen: Market, at_ns: int) -> int:
        changes, prints = self._flows[chosen.ticker].step(chosen.book)
        changes = self.portfolio.spare(chosen, changes, bool(prints), at_ns // 1000)
        for match in prints:
            self._record_trade(chosen, match, at_ns // 1000)
        chosen.clock += len(prints)
        self._change(chosen, changes, at_ns, applied=True)
        return len(changes)

    def _change(
        self, chosen: Market, changes: list[tuple[int, int, int]], at_ns: int, applied: bool = False
    ) -> None:
        ts_us = at_ns // 1000
        top_touched = False
        best = chosen.book.best
        if changes:
            chosen.clock += 1
        for side, level, qty in changes:
            if not applied:
                chosen.book.change(side, level, qty)
            top_touched = top_touched or level >= best[side]
            self._happened.append(Delta(chosen, side, level, qty, ts_us=ts_us, clock=chosen.clock))
        self.deltas += len(changes)
        if top_touched:
            self._happened.append(Quote(chosen, ts_us))

    def _record_trade(self, chosen: Market, match: Print, ts_us: int) -> None:
        price, qty = chosen.listing.grid.prices[match.yes_level], match.qty
        chosen.last_price, chosen.last_qty = price, qty
        chosen.volume += qty
        chosen.turnover += price * qty
        # half of the trades open new interest on both sides, the others transfer it
        if self._random.random() < 0.5:
            chosen.open_interest += qty
        trade_id = str(uuid.UUID(int=self._random.getrandbits(128)))
        trade = Trade(
            chosen, taker=match.taker, yes_price=price, qty=qty, ts_us=ts_us, trade_id=trade_id
        )
        self.trades.append(trade)
        self._happened.append(trade)

    # lifecycle of a market

    def _at(self, at_ns: int, act: Callable[[int], None]) -> None:
        heapq.heappush(self._agenda, (at_ns, next(self._count), act))

    def _reweigh(self) -> None:
        self._active = [
            listed
            for listed in self._markets.values()
            if listed.status == market.ACTIVE and not listed.halted
        ]
        self._active.sort(key=lambda listed: -listed.listing.weight)
        self._cumulative = list(
            itertools.accumulate(listed.listing.weight for listed in self._active)
        )

    def _add(self, listing: Listing) -> Market:
        """Add a market with an empty book; its id and its order flow depend on seed and ticker only."""
        name = f"{self._seed}:{listing.ticker}"
        new = Market(listing, str(uuid.uuid5(_NAMESPACE, name)), Book(listing.grid))
        new.updated_us = listing.created_ns // 1000
        self._markets[listing.ticker] = new
        self._flows[listing.ticker] = OrderFlow(listing.grid, name)
        return new

    def _begin(self, listing: Listing) -> None:
        """Add a market that is already open when the exchange starts."""
        new = self._add(listing)
        self._flows[listing.ticker].opening(new.book, listing.sides)
        new.clock = max((self.now_ns - listing.open_ns) // _CLOCK_NS, 1)
        new.status = market.ACTIVE
        self._at(listing.close_ns, lambda at: self._close(new, at))

    def _list_next(self, slot: Slot, open_ns: int) -> None:
        listing = slot.listing(open_ns)
        known = {listed.listing.event_ticker for listed in self._markets.values()}
        new = self._add(listing)
        ts_us = listing.created_ns // 1000
        if listing.event_ticker not in known:
            self._send("event_lifecycle", _event_created(listing), ts_us)
        self._send("market_lifecycle_v2", _created(listing), ts_us)
        self._at(open_ns, lambda at: self._open(new, slot, at))

    def _open(self, opened: Market, slot: Slot, at_ns: int) -> None:
        # a scheduled opening has no message; the first orders have
        opened.status = market.ACTIVE
        self._reweigh()
        if self._pause_ns < math.inf:
            changes = self._flows[opened.ticker].opening(opened.book, opened.listing.sides)
            self._change(opened, changes, at_ns, applied=True)
        self._at(opened.listing.close_ns, lambda at: self._close(opened, at))
        self._list_next(slot, opened.listing.close_ns)

    def _close(self, closed: Market, at_ns: int) -> None:
        # nor has a scheduled close; orders in flight still arrive for some milliseconds
        if closed.status not in {market.ACTIVE, market.INACTIVE}:
            return  # it has closed early
        rng = self._random
        self.portfolio.cancel_all(closed, at_ns)
        closed.status = market.CLOSED
        self._reweigh()
        if self._pause_ns < math.inf:
            for late_ns in sorted(rng.randrange(10_000_000) for _ in range(rng.randrange(4))):
                self._at(at_ns + late_ns, lambda at: self._late(closed, at))
        self._at(
            at_ns + rng.randrange(20_000_000, 3_200_000_000), lambda at: self._clear(closed, at)
        )

    def _late(self, closed: Market, at_ns: int) -> None:
        self._step(closed, at_ns)

    def _clear(self, closed: Market, at_ns: int) -> None:
        if closed.book.best != [-1, -1]:
            closed.clock += 1
            closed.book.clear()
        closed.updated_us = at_ns // 1000
        self._happened.append(Cleared(closed, at_ns // 1000))
        self._happened.append(Quote(closed, at_ns // 1000))
        wait_ns = self._random.randrange(1 * SECOND, 6 * SECOND)
        self._at(at_ns + wait_ns, lambda at: self._determine(closed, at))

    def _determine(self, closed: Market, at_ns: int) -> None:
        closed.status = market.DETERMINED
        closed.result = "yes" if self._flows[closed.ticker].fair >= 0.5 else "no"
        closed.updated_us = at_ns // 1000
        msg = {
            "market_ticker": closed.ticker,
            "event_type": "determined",
            "result": closed.result,
            "determination_ts": at_ns // SECOND,
            "settlement_value": settlement_value(closed),
        }
        self._send("market_lifecycle_v2", msg, at_ns // 1000)
        wait_ns = self._random.randrange(1 * SECOND, 6 * SECOND)
        self._at(at_ns + wait_ns, lambda at: self._settle(closed, at))

    def _settle(self, closed: Market, at_ns: int) -> None:
        closed.status = market.FINALIZED
        closed.settled_ns = at_ns
        self.portfolio.settle(closed, at_ns // 1000)
        closed.updated_us = at_ns // 1000
        # the real exchange sends some settlements several times
        for _ in range(1 if self._random.random() < 0.7 else self._random.randrange(2, 9)):
            msg = {
                "market_ticker": closed.ticker,
                "event_type": "settled",
                "settled_ts": at_ns // SECOND,
            }
            self._send("market_lifecycle_v2", msg, at_ns // 1000)
        self._at(at_ns + KEPT_AFTER_SETTLEMENT_NS, lambda _: self._forget(closed))

    def _forget(self, closed: Market) -> None:
        del self._markets[closed.ticker], self._flows[closed.ticker]

    def _send(self, kind: str, msg: dict[str, object], ts_us: int) -> None:
        self._happened.append(LifeEvent(kind, msg, ts_us))


def settlement_value(settled: Market) -> str:
    """Return what a YES contract paid, in dollars."""
    return dollars(10_000 if settled.result == "yes" else 0)


def _event_created(listing: Listing) -> dict[str, object]:
    return {
        "event_ticker": listing.event_ticker,
        "exchange_index": 0,
        "title": listing.title,
        "subtitle": listing.subtitle,
        "collateral_return_type": "MECNET",
        "series_ticker": listing.series_ticker,
    }


def _created(listing: Listing) -> dict[str, object]:
    return {
        "market_ticker": listing.ticker,
        "event_type": "created",
        "exchange_index": 0,
        "open_ts": listing.open_ns // SECOND,
        "close_ts": listing.close_ns // SECOND,
        "price_level_structure": listing.grid.name,
        "additional_metadata": {
            "name": listing.subtitle,
            "title": listing.title,
            "yes_sub_title": listing.subtitle,
            "no_sub_title": listing.subtitle,
            "rules_primary": f"If {listing.subtitle.lower()}, then the market resolves to Yes.",
            "rules_secondary": "",
            "can_close_early": False,
            "event_ticker": listing.event_ticker,
            "expected_expiration_ts": listing.close_ns // SECOND,
            "strike_type": "greater",
        },
    }

"""Report what the checks examined: engines, markets and decisions, and the age of the newest.

A check without a finding means something only together with this. Ages are measured by the server's clock; the
checks are in audit.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple

from kalshi_platform.clickhouse import queries
from kalshi_platform.clickhouse.client import Client, translated
from kalshi_platform.inventory.audit import DECISIONS, SNAPSHOTS, Parameters, moment
from kalshi_platform.inventory.tables import Standing, standing
from kalshi_platform.printable import printable

DECISIONS_STALE_S = 300
"""An engine decides every few seconds; after this time without a decision it counts as stopped."""
AHEAD_S = 60
"""An engine whose newest decision lies this far in the future has a wrong clock, and no age."""
RECENT = timedelta(days=1)
"""An engine that has been silent for longer is retired, unless it is the newest of all."""
RETIRED = timedelta(days=30)
"""After this time without any decision there is no market maker."""
PAPER = "paper"
"""Common name of the paper engines, whose id changes with each start."""
_ENOUGH = 20
"""After this many decisions at whole seconds the engine counts as writing whole seconds."""
_NAMED = 5
"""How many engines or markets a message names."""


class Concern(Enum):
    """Why the checks' result is limited."""

    STALE = "stale"
    MISSING = "missing"
    NOT_JUDGEABLE = "not judgeable"


@dataclass(frozen=True)
class Caution:
    """A concern as a sentence."""

    concern: Concern
    text: str


class _Row(NamedTuple):
    """A row of judged.sql."""

    engine: str
    market: str
    first: datetime
    last: datetime
    silent_s: float
    decisions: int
    begun: datetime
    ended: datetime
    unknown: int
    exposed: int
    most_open_orders: int
    blank: int
    precise: int


@dataclass(frozen=True)
class Engine:
    """One engine_instance_id with recent decisions."""

    name: str
    first: datetime
    last: datetime
    silent_s: float
    """Seconds since its newest decision, by the server's clock; negative if the engine's clock is ahead."""
    markets: int
    decisions: int
    """In the window, as are the following counts."""
    exposed: int = 0
    """Decisions with exposure from open orders."""
    most_open_orders: int = 0
    blank: int = 0
    """Decisions with position 0 and without a convention."""
    precise: int = 0
    """Decisions whose time is not a whole second."""

    def __str__(self) -> str:
        return printable(self.name) or "without an engine_instance_id"


@dataclass(frozen=True)
class Market:
    """One market with decisions in the window."""

    ticker: str
    decisions: int
    unknown: int
    """Decisions without a position."""
    first: datetime
    last: datetime
    engines: frozenset[str]
    snapshot: datetime | None
    """Its newest snapshot, also from before the window."""


@dataclass(frozen=True)
class Judged:
    """The engines, markets and decisions that the checks examined."""

    parameters: Parameters
    now: datetime
    """By the server's clock."""
    tables: Standing
    markets: Sequence[Market]
    """Markets with decisions in the window."""
    engines: Sequence[Engine]
    """Engines that decided in the window or in the last day; if none did, the last one."""
    decisions_stale_s: float
    snapshots_stale_s: float

    @cached_property
    def decisions(self) -> int:
        """Number of decisions in the window."""
        return sum(market.decisions for market in self.markets)

    @cached_property
    def unknown(self) -> int:
        """Number of decisions in the window without a position."""
        return sum(market.unknown for market in self.markets)

    @cached_property
    def deciders(self) -> frozenset[str]:
        """The engines with decisions in the window."""
        return frozenset().union(*(market.engines for market in self.markets))

    @cached_property
    def newest(self) -> Engine | None:
        """The engine with the newest decision."""
        return max(self.engines, key=lambda engine: engine.last, default=None)

    @cached_property
    def stopped(self) -> list[Engine]:
        """Engines that have stopped, and that no other engine has replaced."""
        followed = _followed(self.engines)
        return [
            engine
            for engine in self.engines
            if engine.silent_s > self.decisions_stale_s and engine.name not in followed
        ]

    @cached_property
    def ahead(self) -> list[Engine]:
        """Engines whose clock is so far ahead that the age of their decisions is unknown."""
        return [engine for engine in self.engines if engine.silent_s < -AHEAD_S]

    def in_words(self) -> str:
        """Describe engines, markets, decisions and the newest age in a sentence; the age is rounded."""
        if not self.decisions:
            return "no decisions"
        text = (
            f"{_counted(self.decisions, 'decision')} of {_counted(len(self.markets), 'market')} by"
            f" {_counted(len(self.deciders), 'engine')}"
        )
        if self.newest is not None:
            text += f", the newest at {moment(self.newest.last)} UTC, {_age(self.newest.silent_s)}"
        if self.unknown:
            text += f"; {self.unknown:,} of them without a position"
        with_one = sum(market.snapshot is not None for market in self.markets)
        return f"{text}; snapshots of {with_one:,} of these markets"

    def figures(self) -> dict[str, Any]:
        """Return the same as values; the age in whole seconds, None if no engine has decided lately."""
        newest = self.newest
        return {
            "engines": len(self.deciders),
            "markets": len(self.markets),
            "decisions": self.decisions,
            "decisions_without_position": self.unknown,
            "markets_with_snapshot": sum(m.snapshot is not None for m in self.markets),
            "newest_decision_at": None if newest is None else newest.last,
            "newest_decision_age_s": None if newest is None else round(newest.silent_s),
        }

    def cautions(self) -> list[Caution]:
        """Return what is stale, missing or cannot be audited, each in a sentence."""
        return [*self._of_decisions(), *self._of_snapshots()]

    def notes(self) -> list[str]:
        """Return recommendations for engines, each in a sentence."""
        notes = self.tables.coarse()
        for engine in self.engines:
            if engine.exposed and not engine.most_open_orders:
                notes.append(
                    f"engine {engine} counts exposure from open orders and never an open order. If it does"
                    " not write open_orders_count, check B takes all of it for phantom exposure: insert the"
                    " number of its open orders with every decision."
                )
            if 0 < engine.blank == engine.decisions and self.tables.takes_flat():
                notes.append(
                    f"engine {engine} writes no position, and {DECISIONS} takes zero for it: it is judged as"
                    " if it were flat. Write pos_filled, pos_open_exposure and pos_total_est with every"
                    f" decision, or have it not judged: {self.tables.unknown_by_default()}."
                )
            if not engine.precise and engine.decisions >= _ENOUGH:
                notes.append(
                    f"engine {engine} writes whole seconds as ts: what came first within a second is not"
                    " known, and a check may take the one for the other. Write UTC with milliseconds."
                )
        return notes

    def _of_decisions(self) -> Iterable[Caution]:
        market = (
            f" of {printable(self.parameters.market_ticker)}"
            if self.parameters.market_ticker
            else ""
        )
        if why := self.tables.why_not(DECISIONS):
            yield Caution(Concern.MISSING, f"no decisions: {why}")
            return
        if not self.engines:
            yield Caution(Concern.MISSING, f"no decisions{market} in the last {RETIRED.days} days.")
        for engine in self.stopped:
            yield Caution(Concern.STALE, f"{silence(engine)}{market}.")
        for engine in self.ahead:
            yield Caution(Concern.NOT_JUDGEABLE, f"{lead(engine)}.")
        if self.unknown:
            yield Caution(
                Concern.NOT_JUDGEABLE,
                f"{self.unknown:,} of {_counted(self.decisions, 'decision')} have no position: their engine"
                " writes the columns from before migration 010, or nan. Write pos_filled,"
                " pos_open_exposure and pos_total_est with every decision.",
            )

    def _of_snapshots(self) -> Iterable[Caution]:
        if not self.markets:
            return
        if why := self.tables.why_not(SNAPSHOTS):
            yield Caution(Concern.MISSING, f"no snapshots: {why}")
            return
        limit = timedelta(seconds=self.snapshots_stale_s)
        stale = [
            (market, market.last - market.snapshot)
            for market in self.markets
            if market.snapshot is not None and market.last - market.snapshot > limit
        ]
        missing = [m for m in self.markets if m.snapshot is None and self.now - m.first > limit]
        remedy = "The last run of mm_position_snapshots in Dagster says why."
        if stale:
            named = _listed(
                [f"{printable(m.ticker)} ({duration(by.total_seconds())})" for m, by in stale]
            )
            yield Caution(
                Concern.STALE,
                f"snapshots of {_counted(len(stale), 'market')} are older than the decisions by more than"
                f" {duration(self.snapshots_stale_s)}: {named}. {remedy}",
            )
        if missing:
            named = _listed([printable(m.ticker) for m in missing])
            yield Caution(
                Concern.MISSING,
                f"{_counted(len(missing), 'market')} with decisions and without a snapshot: {named}."
                f" {remedy}",
            )


def look(
    client: Client,
    parameters: Parameters,
    start: datetime,
    *,
    max_age_s: float | None = None,
    paper: bool = True,
) -> Judged:
    """Find what the checks examine in the window that starts at `start`.

    `max_age_s` replaces both default ages. Without `paper`, paper engines are ignored among those that may stop.
    """
    tables = standing(client)
    now = start + timedelta(minutes=parameters.lookback_minutes)
    stale = (DECISIONS_STALE_S, parameters.stale_after_s) if max_age_s is None else (max_age_s,) * 2
    if tables.why_not(DECISIONS):
        return Judged(parameters, now, tables, (), (), *stale)
    rows = _rows(client, parameters, start, min(start, now - RECENT))
    engines = _engines(rows)
    if not engines:
        engines = _engines(_rows(client, parameters, start, now - RETIRED))[-1:]
    snapshots = _snapshots(client, parameters) if SNAPSHOTS in tables.usable else {}
    return Judged(
        parameters,
        now,
        tables,
        _markets(rows, snapshots),
        [engine for engine in engines if paper or engine.name != PAPER],
        *stale,
    )


def silence(engine: Engine) -> str:
    """Say how long an engine has not decided."""
    return (
        f"engine {engine} has not decided for {duration(engine.silent_s)}, its newest decision is of"
        f" {moment(engine.last)} UTC"
    )


def lead(engine: Engine) -> str:
    """Say how far an engine's clock is ahead."""
    return (
        f"the newest decision of engine {engine} lies {duration(-engine.silent_s)} in the future: its clock"
        " is ahead, and how old its decisions are is not known"
    )


def duration(seconds: float) -> str:
    """Format a time span: 45 s, 3 min, 2 h 5 min, 3 d 4 h."""
    whole = int(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if hours < 2:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if days < 2 else f"{days} d {hours % 24} h"


def _engines(rows: Sequence[_Row]) -> list[Engine]:
    """Return the engines by their newest decision; paper engines count as one."""
    of_name: dict[str, list[_Row]] = {}
    for row in rows:
        name = PAPER if row.engine.startswith(f"{PAPER}-") else row.engine
        of_name.setdefault(name, []).append(row)
    engines = [
        Engine(
            name,
            first=min(row.first for row in found),
            last=max(row.last for row in found),
            silent_s=min(row.silent_s for row in found),
            markets=len({row.market for row in found}),
            decisions=sum(row.decisions for row in found),
            exposed=sum(row.exposed for row in found),
            most_open_orders=max(row.most_open_orders for row in found),
            blank=sum(row.blank for row in found),
            precise=sum(row.precise for row in found),
        )
        for name, found in of_name.items()
    ]
    return sorted(engines, key=lambda engine: (engine.last, engine.name))


def _markets(rows: Sequence[_Row], snapshots: Mapping[str, datetime]) -> list[Market]:
    of_market: dict[str, list[_Row]] = {}
    for row in rows:
        if row.decisions:
            of_market.setdefault(row.market, []).append(row)
    return [
        Market(
            ticker,
            decisions=sum(row.decisions for row in found),
            unknown=sum(row.unknown for row in found),
            first=min(row.begun for row in found),
            last=max(row.ended for row in found),
            engines=frozenset(row.engine for row in found),
            snapshot=snapshots.get(ticker),
        )
        for ticker, found in sorted(of_market.items())
    ]


def _snapshots(client: Client, parameters: Parameters) -> dict[str, datetime]:
    with translated():
        rows = client.query(
            "SELECT market_ticker, toDateTime64(max(ts), 3, 'UTC') FROM mm_position_snapshots"
            " WHERE isFinite(pos_filled)"
            " AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})"
            " GROUP BY market_ticker",
            parameters={"markets": parameters.markets},
        ).result_rows
    return {str(ticker): at for ticker, at in rows}


def _rows(client: Client, parameters: Parameters, start: datetime, recent: datetime) -> list[_Row]:
    with translated():
        rows = client.query(
            queries.text("inventory/judged"),
            parameters={
                "since": moment(start),
                "recent": moment(recent),
                "markets": parameters.markets,
            },
        ).result_rows
    return [_Row(*row) for row in rows]


def _followed(engines: Sequence[Engine]) -> set[str]:
    """Return the engines that another one has replaced: an engine that starts replaces the one that stopped last
    before it, and only that one.
    """
    followed: set[str] = set()
    for engine in sorted(engines, key=lambda e: e.first):
        before = [e for e in engines if e.last < engine.first and e.name not in followed]
        if before:
            followed.add(max(before, key=lambda e: e.last).name)
    return followed


def _age(seconds: float) -> str:
    if seconds < 0:
        return (
            f"{duration(-seconds)} ahead of the server's clock"
            if seconds < -AHEAD_S
            else "just now"
        )
    return "less than a minute old" if seconds < 60 else f"{duration(seconds // 60 * 60)} old"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    more = len(names) - _NAMED
    return f"{shown} and {more:,} more" if more > 0 else shown

"""Breaks: what the checks find, as a person counts it: once while it lasts, with its kind and reason.

Findings of one check and market that follow one another within a minute are one break. It is open
while the market's decisions go on being wrong, and closes by itself once they have been right for a
minute. At each look it is classified again, by all that is known then. The checks themselves are in
audit.py, what was recorded around a break in evidence.py, and what follows from it in explain.py.
"""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from kalshi_platform.clickhouse.client import Client, acknowledged, translated
from kalshi_platform.inventory import audit, evidence, explain
from kalshi_platform.inventory.audit import Check, Outcome, Parameters, moment
from kalshi_platform.inventory.evidence import Market
from kalshi_platform.inventory.explain import Case, number
from kalshi_platform.inventory.findings import NO_LIMIT, QUIET, Episode
from kalshi_platform.inventory.tables import usable

TABLE = "mm_inventory_breaks"

MARKETS_AT_ONCE = 20
"""Whose rows are in memory together: of each market at most `evidence.MOST_ROWS` of each table."""

_NAMESPACE = uuid.UUID("0a2f6a51-6f0b-4a51-9f57-3b0d6ab1d2f4")


@dataclass(frozen=True)
class Break:
    """Something that is, or was, wrong with what the engine believes to hold."""

    break_id: uuid.UUID
    check_name: str
    market_ticker: str
    kind: str
    opened_at: datetime
    last_seen_at: datetime
    closed_at: datetime | None
    """None while it is open."""
    findings: int
    worst: float
    """Contracts; seconds for a stale snapshot."""
    explanation: str

    @property
    def age(self) -> timedelta:
        """From its first finding to its last one so far."""
        return self.last_seen_at - self.opened_at

    def headline(self) -> str:
        """State, age, kind, market and check on one line."""
        state = "open" if self.closed_at is None else "closed"
        return (
            f"{state}, {self.age.total_seconds():.0f} s from {moment(self.opened_at)}: {self.kind},"
            f" {self.market_ticker}, {self.check_name}, {self.findings} findings, worst"
            f" {number(self.worst)}"
        )

    def row(self) -> dict[str, Any]:
        """The columns of `mm_inventory_breaks`, `updated_at` excepted."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


class _Found(NamedTuple):
    """An episode of a check's findings."""

    check: Check
    episode: Episode

    @property
    def engine(self) -> str:
        """The engine of its latest finding; empty where the check does not say."""
        return str(self.episode.latest.get("engine_instance_id", ""))


@dataclass(frozen=True)
class _Look:
    """One look at the tables, and what is the same for all its findings."""

    client: Client
    parameters: Parameters
    start: datetime
    tables: frozenset[str]
    newest: Mapping[str, datetime]
    """The newest decision of each market."""
    known: Mapping[tuple[str, str], Sequence[Break]]
    """By check and market."""
    values: Mapping[str, Any]
    """Of the parameters of the checks' SQL."""

    def over(self, found: _Found) -> bool:
        """Whether the market's decisions have been right for long enough since."""
        check, episode = found
        newest = self.newest.get(episode.market_ticker, episode.last)
        return check is not audit.FRESH and newest - episode.last > QUIET


def examine(
    client: Client,
    checks: Iterable[Check],
    parameters: Parameters,
    *,
    start: datetime | None = None,
    outcomes: Sequence[Outcome] | None = None,
) -> list[Break]:
    """The breaks of the window, oldest first; nothing is written.

    Those that `mm_inventory_breaks` knows keep their number and their beginning. `outcomes`: what a sweep of the
    same window has found; it is not asked again then.
    """
    there = usable(client)
    if audit.DECISIONS not in there:
        return []
    start = audit.since(client, parameters) if start is None else start
    if outcomes is None:
        outcomes = audit.sweep(client, checks, parameters, start=start)
    found = [_Found(each.check, episode) for each in outcomes for episode in each.episodes]
    if not found:
        return []
    look = _Look(
        client,
        parameters,
        start,
        there,
        newest=_newest_decisions(client, start),
        known=_by_market(_known(client, start)) if TABLE in there else {},
        values=audit.bound(client, there, parameters, start),
    )
    rolled = _rolled_markets(look, [each.check for each in found])
    skews: dict[str, timedelta | None] = {}
    made: list[Break] = []
    for batch in _batches(found):
        explained = explain.explain_all(_cases(look, batch, rolled, skews))
        made += [_break(look, each, *why) for each, why in zip(batch, explained, strict=True)]
    return sorted(made, key=lambda each: (each.opened_at, each.market_ticker, each.check_name))


def update(
    client: Client,
    checks: Iterable[Check],
    parameters: Parameters,
    *,
    outcomes: Sequence[Outcome] | None = None,
) -> list[Break]:
    """Bring `mm_inventory_breaks` up to date; returns the breaks that are open now.

    Doing it twice changes nothing. An open break that is found no more is closed. `outcomes`: what a sweep of all
    markets over the look-back has found just now.
    """
    checks = tuple(checks)
    if TABLE not in usable(client):
        return []
    start = audit.since(client, parameters)
    every = replace(parameters, market_ticker="")
    found = examine(client, checks, every, start=start, outcomes=outcomes)
    ids = {each.break_id for each in found}
    known = {each.break_id: each for each in _known(client, start)}
    names = {check.name for check in checks}
    over = [
        replace(each, closed_at=each.last_seen_at)
        for each in known.values()
        if each.closed_at is None and each.break_id not in ids and each.check_name in names
    ]
    changed = [each for each in (*found, *over) if known.get(each.break_id) != each]
    if changed:
        with translated():
            now = client.query("SELECT now64(3, 'UTC')").result_rows[0][0]
            summary = client.insert(
                TABLE,
                [[*each.row().values(), now] for each in changed],
                column_names=[*changed[0].row(), "updated_at"],
                settings={"async_insert": 0},
            )
        acknowledged(client, TABLE, summary, len(changed))
    return [each for each in found if each.closed_at is None]


# -- finding -----------------------------------------------------------------------------------


def _batches(found: Iterable[_Found]) -> Iterator[list[_Found]]:
    """The findings of so many markets at a time, an engine's markets one after the other."""
    of_market: dict[str, list[_Found]] = {}
    for each in found:
        of_market.setdefault(each.episode.market_ticker, []).append(each)
    markets = sorted(of_market.values(), key=lambda findings: findings[0].engine)
    for begin in range(0, len(markets), MARKETS_AT_ONCE):
        yield list(itertools.chain.from_iterable(markets[begin : begin + MARKETS_AT_ONCE]))


def _cases(
    look: _Look,
    found: Sequence[_Found],
    rolled: frozenset[str],
    skews: dict[str, timedelta | None],
) -> list[Case]:
    """The breaks with what was recorded around them, asked for all of them at once.

    `skews`: by engine, what the markets before have shown.
    """
    seconds: dict[str, set[datetime]] = {}
    for _, episode in found:
        seconds.setdefault(episode.market_ticker, set()).update((episode.first, episode.last))
    markets = evidence.gather(look.client, look.tables, look.values, look.start, seconds)
    for engine in {each.engine for each in found if each.check is audit.DIVERGENCE}:
        skews[engine] = evidence.skew(markets.values(), engine) or skews.get(engine)
    return [
        Case(
            check=check,
            market_ticker=episode.market_ticker,
            first=episode.first,
            last=episode.last,
            example=episode.example,
            clearest=episode.clearest,
            latest=episode.latest,
            over=look.over(each),
            newest=look.newest.get(episode.market_ticker, episode.last),
            market=markets.get(episode.market_ticker, Market()),
            skew=skews.get(each.engine),
            rolled=episode.market_ticker in rolled,
            stale_after_s=look.parameters.stale_after_s,
        )
        for each in found
        for check, episode in (each,)
    ]


def _newest_decisions(client: Client, start: datetime) -> dict[str, datetime]:
    with translated():
        rows = client.query(
            "SELECT market_ticker, max(ts) FROM mm_decisions"
            " WHERE ts >= {since:DateTime64(3, 'UTC')} GROUP BY market_ticker",
            parameters={"since": moment(start)},
        ).result_rows
    return {str(ticker): at for ticker, at in rows}


def _known(client: Client, start: datetime) -> list[Break]:
    with translated():
        rows = client.query(
            f"SELECT {', '.join(each.name for each in fields(Break))} FROM {TABLE} FINAL"  # noqa: S608
            " WHERE closed_at IS NULL OR last_seen_at >= {since:DateTime64(3, 'UTC')}"
            " ORDER BY opened_at, break_id",
            parameters={"since": moment(start - QUIET)},
        ).result_rows
    return [Break(*row) for row in rows]


def _by_market(known: Iterable[Break]) -> dict[tuple[str, str], list[Break]]:
    found: dict[tuple[str, str], list[Break]] = {}
    for each in known:
        found.setdefault((each.check_name, each.market_ticker), []).append(each)
    return found


def _rolled_markets(look: _Look, checks: Iterable[Check]) -> frozenset[str]:
    """Markets of breaks whose inventory was rolled forward; asked only where it matters."""
    if not {audit.DIVERGENCE, audit.IDENTITY} & set(checks):
        return frozenset()
    with translated():
        rows = look.client.query(
            f"SELECT DISTINCT market_ticker FROM ({audit.ROLLED.sql(look.parameters)})",  # noqa: S608
            parameters={**look.values, "limit": NO_LIMIT},
        ).result_rows
    return frozenset(str(ticker) for (ticker,) in rows)


def _break(look: _Look, found: _Found, kind: str, explanation: str) -> Break:
    check, episode = found
    ticker = episode.market_ticker
    opened, last = episode.first, episode.last
    if check is audit.FRESH:
        opened = last - timedelta(seconds=episode.worst)
    before = next(
        (
            each
            for each in look.known.get((check.name, ticker), ())
            if opened <= each.last_seen_at + QUIET and last >= each.opened_at
        ),
        None,
    )
    if before is not None:
        opened = min(opened, before.opened_at)
    named = f"{check.name}:{ticker}:{moment(opened)}"
    worst = max(episode.worst, before.worst if before is not None else 0.0)
    return Break(
        break_id=before.break_id if before is not None else uuid.uuid5(_NAMESPACE, named),
        check_name=check.name,
        market_ticker=ticker,
        kind=str(kind),
        opened_at=opened,
        last_seen_at=last,
        closed_at=last if look.over(found) else None,
        findings=max(episode.findings, before.findings if before is not None else 0),
        worst=worst if math.isfinite(worst) else math.inf,
        explanation=explanation,
    )

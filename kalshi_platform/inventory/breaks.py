"""Combine the checks' findings into breaks, with a kind and an explanation each, and keep them in ClickHouse.

Findings of one check and market within a minute of each other are one break. It stays open while the
market's decisions are wrong, and closes once they have been right for a minute. Every run classifies it
again, with the evidence known by then. The checks are in audit.py, the rows recorded around a break in
evidence.py, the classification in explain.py.
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
"""Markets whose rows are in memory together: of each at most `evidence.MOST_ROWS` of each table."""

_NAMESPACE = uuid.UUID("0a2f6a51-6f0b-4a51-9f57-3b0d6ab1d2f4")


@dataclass(frozen=True)
class Break:
    """A period in which a check found an engine's inventory to be wrong."""

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
    """Contracts; for a stale snapshot, seconds."""
    explanation: str

    @property
    def age(self) -> timedelta:
        """Time from its first finding to its last one so far."""
        return self.last_seen_at - self.opened_at

    def headline(self) -> str:
        """Return state, age, kind, market and check on one line."""
        state = "open" if self.closed_at is None else "closed"
        return (
            f"{state}, {self.age.total_seconds():.0f} s from {moment(self.opened_at)}: {self.kind},"
            f" {self.market_ticker}, {self.check_name}, {self.findings} findings, worst"
            f" {number(self.worst)}"
        )

    def row(self) -> dict[str, Any]:
        """Return the columns of `mm_inventory_breaks`, except `updated_at`."""
        return {column.name: getattr(self, column.name) for column in fields(self)}


class _Found(NamedTuple):
    """An episode of a check's findings."""

    check: Check
    episode: Episode

    @property
    def engine(self) -> str:
        """The engine of its latest finding; empty if the check does not have it."""
        return str(self.episode.latest.get("engine_instance_id", ""))


@dataclass(frozen=True)
class _Run:
    """One run over the tables: what all its findings share."""

    client: Client
    parameters: Parameters
    start: datetime
    tables: frozenset[str]
    newest: Mapping[str, datetime]
    """The newest decision of each market."""
    known: Mapping[tuple[str, str], Sequence[Break]]
    """By check and market."""
    values: Mapping[str, Any]
    """Values of the parameters of the checks' SQL."""

    def over(self, found: _Found) -> bool:
        """Whether the market's decisions have been right for long enough since the last finding."""
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
    """Return the breaks of the window, oldest first; write nothing.

    Breaks that `mm_inventory_breaks` has keep their id and their start. `outcomes`: the result of a sweep of the
    same window, which is then not run again.
    """
    tables = usable(client)
    if audit.DECISIONS not in tables:
        return []
    start = audit.since(client, parameters) if start is None else start
    if outcomes is None:
        outcomes = audit.sweep(client, checks, parameters, start=start)
    found = [_Found(outcome.check, episode) for outcome in outcomes for episode in outcome.episodes]
    if not found:
        return []
    run = _Run(
        client,
        parameters,
        start,
        tables,
        newest=_newest_decisions(client, start),
        known=_by_market(_known(client, start)) if TABLE in tables else {},
        values=audit.bound(client, tables, parameters, start),
    )
    rolled = _rolled_markets(run, [finding.check for finding in found])
    skews: dict[str, timedelta | None] = {}
    made: list[Break] = []
    for batch in _batches(found):
        explained = explain.explain_all(_cases(run, batch, rolled, skews))
        made += [_break(run, each, *why) for each, why in zip(batch, explained, strict=True)]
    return sorted(
        made, key=lambda a_break: (a_break.opened_at, a_break.market_ticker, a_break.check_name)
    )


def update(
    client: Client,
    checks: Iterable[Check],
    parameters: Parameters,
    *,
    outcomes: Sequence[Outcome] | None = None,
) -> list[Break]:
    """Bring `mm_inventory_breaks` up to date; return the breaks that are open now.

    Idempotent. An open break that is no longer found is closed. `outcomes`: the result of a sweep of all
    markets over the look-back that has just run.
    """
    checks = tuple(checks)
    if TABLE not in usable(client):
        return []
    start = audit.since(client, parameters)
    every = replace(parameters, market_ticker="")
    found = examine(client, checks, every, start=start, outcomes=outcomes)
    ids = {a_break.break_id for a_break in found}
    known = {known_break.break_id: known_break for known_break in _known(client, start)}
    names = {check.name for check in checks}
    over = [
        replace(known_break, closed_at=known_break.last_seen_at)
        for known_break in known.values()
        if known_break.closed_at is None
        and known_break.break_id not in ids
        and known_break.check_name in names
    ]
    changed = [each for each in (*found, *over) if known.get(each.break_id) != each]
    if changed:
        with translated():
            now = client.query("SELECT now64(3, 'UTC')").result_rows[0][0]
            summary = client.insert(
                TABLE,
                [[*a_break.row().values(), now] for a_break in changed],
                column_names=[*changed[0].row(), "updated_at"],
                settings={"async_insert": 0},
            )
        acknowledged(client, TABLE, summary, len(changed))
    return [a_break for a_break in found if a_break.closed_at is None]


# -- finding -----------------------------------------------------------------------------------


def _batches(found: Iterable[_Found]) -> Iterator[list[_Found]]:
    """Yield the findings of MARKETS_AT_ONCE markets at a time, ordered by engine."""
    of_market: dict[str, list[_Found]] = {}
    for finding in found:
        of_market.setdefault(finding.episode.market_ticker, []).append(finding)
    markets = sorted(of_market.values(), key=lambda findings: findings[0].engine)
    for begin in range(0, len(markets), MARKETS_AT_ONCE):
        yield list(itertools.chain.from_iterable(markets[begin : begin + MARKETS_AT_ONCE]))


def _cases(
    run: _Run,
    found: Sequence[_Found],
    rolled: frozenset[str],
    skews: dict[str, timedelta | None],
) -> list[Case]:
    """Return the breaks with the rows recorded around them, read for all of them at once.

    `skews`: by engine, the clock skew that earlier markets have shown.
    """
    seconds: dict[str, set[datetime]] = {}
    for _, episode in found:
        seconds.setdefault(episode.market_ticker, set()).update((episode.first, episode.last))
    markets = evidence.gather(run.client, run.tables, run.values, run.start, seconds)
    for engine in {finding.engine for finding in found if finding.check is audit.DIVERGENCE}:
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
            over=run.over(finding),
            newest=run.newest.get(episode.market_ticker, episode.last),
            market=markets.get(episode.market_ticker, Market()),
            skew=skews.get(finding.engine),
            rolled=episode.market_ticker in rolled,
            stale_after_s=run.parameters.stale_after_s,
        )
        for finding in found
        for check, episode in (finding,)
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
            f"SELECT {', '.join(column.name for column in fields(Break))} FROM {TABLE} FINAL"  # noqa: S608
            " WHERE closed_at IS NULL OR last_seen_at >= {since:DateTime64(3, 'UTC')}"
            " ORDER BY opened_at, break_id",
            parameters={"since": moment(start - QUIET)},
        ).result_rows
    return [Break(*row) for row in rows]


def _by_market(known: Iterable[Break]) -> dict[tuple[str, str], list[Break]]:
    found: dict[tuple[str, str], list[Break]] = {}
    for known_break in known:
        found.setdefault((known_break.check_name, known_break.market_ticker), []).append(
            known_break
        )
    return found


def _rolled_markets(run: _Run, checks: Iterable[Check]) -> frozenset[str]:
    """Return the markets whose inventory was rolled forward; queried only for checks that need it."""
    if not {audit.DIVERGENCE, audit.IDENTITY} & set(checks):
        return frozenset()
    with translated():
        rows = run.client.query(
            f"SELECT DISTINCT market_ticker FROM ({audit.ROLLED.sql(run.parameters)})",  # noqa: S608
            parameters={**run.values, "limit": NO_LIMIT},
        ).result_rows
    return frozenset(str(ticker) for (ticker,) in rows)


def _break(run: _Run, found: _Found, kind: str, explanation: str) -> Break:
    check, episode = found
    ticker = episode.market_ticker
    opened, last = episode.first, episode.last
    if check is audit.FRESH:
        opened = last - timedelta(seconds=episode.worst)
    before = next(
        (
            each
            for each in run.known.get((check.name, ticker), ())
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
        closed_at=last if run.over(found) else None,
        findings=max(episode.findings, before.findings if before is not None else 0),
        worst=worst if math.isfinite(worst) else math.inf,
        explanation=explanation,
    )

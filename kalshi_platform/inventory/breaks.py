"""Breaks: what the checks find, as a person counts it: once while it lasts, with its kind and reason.

Findings of one check and market that follow one another within a minute are one break. It is open
while the market's decisions go on being wrong, and closes by itself once they have been right for a
minute. At each look it is classified again, by all that is known then. The checks themselves are in
audit.py, what was recorded around a break in evidence.py, and what follows from it in explain.py.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from typing import Any

from kalshi_platform.inventory import audit, evidence, explain
from kalshi_platform.inventory.audit import Check, Parameters, moment
from kalshi_platform.inventory.evidence import Market
from kalshi_platform.inventory.explain import Case, number
from kalshi_platform.storage.clickhouse import Client, acknowledged, translated

TABLE = "mm_inventory_breaks"

QUIET = timedelta(seconds=60)
"""So long in order, and a break is over; what comes later is another one."""
MOST_EXPLAINED = 500
"""Breaks of one look: beyond them something is wrong that no list explains."""

_NAMESPACE = uuid.UUID("0a2f6a51-6f0b-4a51-9f57-3b0d6ab1d2f4")
_MEASURED: Mapping[str, tuple[str, str]] = {
    audit.DRIFT.name: ("bucket", "abs(unaccounted)"),
    audit.EXPOSURE.name: ("ts", "abs(pos_open_exposure)"),
    audit.DIVERGENCE.name: ("ts", "abs(difference)"),
    audit.IDENTITY.name: ("ts", "greatest(abs(difference), abs(exposure_difference))"),
    audit.ROLLED.name: ("ts", "abs(difference)"),
    audit.FRESH.name: ("ts", "without_snapshot_s"),
}
"""By check: the column with a finding's time, and how bad it is."""
_STRICTLY_DRIFTED = ("bucket", "greatest(moved_within, moved_since)")


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


@dataclass(frozen=True)
class _Episode:
    """Findings of one check and market without a minute between two of them."""

    check: Check
    market_ticker: str
    first: datetime
    last: datetime
    findings: int
    worst: float
    example: Mapping[str, Any]
    """The first finding's row."""
    clearest: Mapping[str, Any]
    """The first row of those with the least in transit."""
    latest: Mapping[str, Any]
    """The last finding's row so far."""


@dataclass(frozen=True)
class _Look:
    """One look at the tables, and what is the same for all its findings."""

    client: Client
    parameters: Parameters
    start: datetime
    tables: frozenset[str]
    newest: Mapping[str, datetime]
    """The newest decision of each market."""
    known: Sequence[Break]
    values: Mapping[str, Any]
    """Of the parameters of the checks' SQL."""

    def over(self, episode: _Episode) -> bool:
        """Whether the market's decisions have been right for long enough since."""
        newest = self.newest.get(episode.market_ticker, episode.last)
        return episode.check is not audit.FRESH and newest - episode.last > QUIET


def examine(
    client: Client,
    checks: Iterable[Check],
    parameters: Parameters,
    *,
    start: datetime | None = None,
) -> list[Break]:
    """The breaks of the window, oldest first; nothing is written.

    Those that `mm_inventory_breaks` knows keep their number and their beginning.
    """
    checks = tuple(checks)
    there = audit.tables(client)
    if audit.DECISIONS not in there:
        return []
    start = audit.since(client, parameters) if start is None else start
    values = audit.bound(client, there, replace(parameters, limit=audit.NO_LIMIT), start)
    look = _Look(
        client,
        parameters,
        start,
        there,
        newest=_newest_decisions(client, start),
        known=_known(client, start) if TABLE in there else [],
        values=values,
    )
    episodes = [
        episode
        for check in checks
        if set(check.needs) <= there
        for episode in _episodes(look, check)
    ]
    found = [
        _break(look, episode, *explained)
        for episode, explained in zip(
            episodes, explain.explain_all(_cases(look, episodes)), strict=True
        )
    ]
    return sorted(found, key=lambda each: (each.opened_at, each.market_ticker, each.check_name))


def update(client: Client, checks: Iterable[Check], parameters: Parameters) -> list[Break]:
    """Bring `mm_inventory_breaks` up to date; returns the breaks that are open now.

    Doing it twice changes nothing. An open break that is found no more is closed.
    """
    checks = tuple(checks)
    if TABLE not in audit.tables(client):
        return []
    start = audit.since(client, parameters)
    found = examine(client, checks, replace(parameters, market_ticker=""), start=start)
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


def _episodes(look: _Look, check: Check) -> list[_Episode]:
    at, measure = _MEASURED[check.name]
    if check is audit.DRIFT and look.parameters.strict_runbook:
        at, measure = _STRICTLY_DRIFTED
    found = check.sql(look.parameters, look.tables)
    transit = "in_transit" if " AS in_transit" in found else "0"
    # the check's own SQL inside; nothing here comes from a user
    sql = f"""
        SELECT market_ticker, min(at), max(at), count(), max(measure),
            argMin(finding, at), argMin(finding, (uncertain, at)), argMax(finding, at)
        FROM (
            SELECT *, sum(begins) OVER (PARTITION BY market_ticker ORDER BY at, n) AS episode
            FROM (
                SELECT *, n = 1 OR at > previous + toIntervalSecond({{quiet_s:UInt32}}) AS begins
                FROM (
                    SELECT market_ticker, toDateTime64({at}, 3, 'UTC') AS at,
                        if(isNaN({measure}), 0, toFloat64({measure})) AS measure, tuple(*) AS finding,
                        toFloat64({transit}) AS uncertain,
                        row_number() OVER by_time AS n, lagInFrame(at) OVER by_time AS previous
                    FROM ({found})
                    WINDOW by_time AS (PARTITION BY market_ticker ORDER BY {at}
                        ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
                )
            )
        )
        GROUP BY market_ticker, episode
        ORDER BY min(at), market_ticker
        LIMIT {{most:UInt32}}
    """  # noqa: S608
    values = {**look.values, "quiet_s": int(QUIET.total_seconds()), "most": MOST_EXPLAINED}
    plain = {"join_use_nulls": 0}
    with translated():
        rows = look.client.query(sql, parameters=values, settings=plain).result_rows
        if not rows:
            return []
        columns = [
            str(row[0])
            for row in look.client.query(
                f"DESCRIBE TABLE ({found})", parameters=values, settings=plain
            ).result_rows
        ]
    return [
        _Episode(
            check,
            str(ticker),
            first,
            last,
            int(count),
            float(worst),
            _named(columns, example),
            _named(columns, clearest),
            _named(columns, latest),
        )
        for ticker, first, last, count, worst, example, clearest, latest in rows
    ]


def _cases(look: _Look, episodes: Sequence[_Episode]) -> list[Case]:
    """The breaks with what was recorded around them, asked for all of them at once."""
    seconds: dict[str, set[datetime]] = {}
    for episode in episodes:
        seconds.setdefault(episode.market_ticker, set()).update((episode.first, episode.last))
    markets = evidence.gather(look.client, look.tables, look.values, look.start, seconds)
    diverged = any(episode.check is audit.DIVERGENCE for episode in episodes)
    engines = {str(episode.latest.get("engine_instance_id", "")) for episode in episodes}
    skews = {
        engine: evidence.skew(markets.values(), engine) if diverged else None for engine in engines
    }
    rolled = _rolled_markets(look, episodes)
    return [
        Case(
            check=episode.check,
            market_ticker=episode.market_ticker,
            first=episode.first,
            last=episode.last,
            example=episode.example,
            clearest=episode.clearest,
            latest=episode.latest,
            over=look.over(episode),
            newest=look.newest.get(episode.market_ticker, episode.last),
            market=markets.get(episode.market_ticker, Market()),
            skew=skews[str(episode.latest.get("engine_instance_id", ""))],
            rolled=episode.market_ticker in rolled,
            stale_after_s=look.parameters.stale_after_s,
        )
        for episode in episodes
    ]


def _named(columns: Sequence[str], example: Any) -> Mapping[str, Any]:
    return dict(example) if isinstance(example, dict) else dict(zip(columns, example, strict=True))


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


def _rolled_markets(look: _Look, episodes: Sequence[_Episode]) -> frozenset[str]:
    """Markets of breaks whose inventory was rolled forward; asked only where it matters."""
    if not any(episode.check in {audit.DIVERGENCE, audit.IDENTITY} for episode in episodes):
        return frozenset()
    with translated():
        rows = look.client.query(
            f"SELECT DISTINCT market_ticker FROM ({audit.ROLLED.sql(look.parameters)})",  # noqa: S608
            parameters=dict(look.values),
        ).result_rows
    return frozenset(str(ticker) for (ticker,) in rows)


def _break(look: _Look, episode: _Episode, kind: str, explanation: str) -> Break:
    check, ticker = episode.check, episode.market_ticker
    opened, last = episode.first, episode.last
    if check is audit.FRESH:
        opened = last - timedelta(seconds=episode.worst)
    before = next(
        (
            each
            for each in look.known
            if (each.check_name, each.market_ticker) == (check.name, ticker)
            and opened <= each.last_seen_at + QUIET
            and last >= each.opened_at
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
        closed_at=last if look.over(episode) else None,
        findings=max(episode.findings, before.findings if before is not None else 0),
        worst=worst if math.isfinite(worst) else math.inf,
        explanation=explanation,
    )

"""Breaks: what the checks find, as a person counts it: once while it lasts, with its kind and reason.

Findings of one check and market that follow one another within a minute are one break. It is open
while the market's decisions go on being wrong, and closes by itself once they have been right for a
minute. The checks themselves are in audit.py.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from kalshi_platform.inventory import audit
from kalshi_platform.inventory.audit import Check, Parameters, moment
from kalshi_platform.inventory.semantics import YES_POSITIVE
from kalshi_platform.storage import queries
from kalshi_platform.storage.clickhouse import Client, acknowledged, translated

TABLE = "mm_inventory_breaks"

QUIET = timedelta(seconds=60)
"""So long in order, and a break is over; what comes later is another one."""
NEAR = timedelta(seconds=2)
"""An action so close to a drift is its cause, written a moment beside it."""
BRIEF = timedelta(seconds=5)
"""A divergence that passes within this was the engine learning of a fill."""
MOST_EXPLAINED = 500
"""Breaks of one look: beyond them something is wrong that no list explains."""

TIMING = "timing"
MISSING_FILL = "missing fill"
UNKNOWN_ORDER = "unknown order"
ROLLED = "rolled inventory"
WRONG_CONVENTION = "wrong convention"
STALE_SNAPSHOT = "stale snapshot"
UNEXPLAINED = "unexplained"

_NAMESPACE = uuid.UUID("0a2f6a51-6f0b-4a51-9f57-3b0d6ab1d2f4")
_SAME = 1e-6
_SHOWN_CHARACTERS = 160
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)

_MEASURED: Mapping[str, tuple[str, str]] = {
    audit.DRIFT.name: ("bucket", "greatest(moved_within, moved_since)"),
    audit.EXPOSURE.name: ("ts", "abs(pos_open_exposure)"),
    audit.DIVERGENCE.name: ("ts", "abs(difference)"),
    audit.IDENTITY.name: ("ts", "abs(difference)"),
    audit.ROLLED.name: ("ts", "abs(difference)"),
    audit.FRESH.name: ("ts", "without_snapshot_s"),
}
"""By check: the column with a finding's time, and how bad it is."""


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
            f" {_number(self.worst)}"
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
    rolled: frozenset[str]
    """Markets whose inventory was rolled forward."""


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
    look = _Look(
        client,
        parameters,
        start,
        there,
        newest=_newest_decisions(client, start),
        known=_known(client, start) if TABLE in there else [],
        rolled=_rolled_markets(client, parameters, start),
    )
    found = [
        _break(look, episode)
        for check in checks
        if set(check.needs) <= there
        for episode in _episodes(look, check)
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
    # the check's own SQL inside; nothing here comes from a user
    sql = f"""
        SELECT market_ticker, min(at), max(at), count(), max(measure), argMin(finding, at)
        FROM (
            SELECT *, sum(begins) OVER (PARTITION BY market_ticker ORDER BY at, n) AS episode
            FROM (
                SELECT *, n = 1 OR at > previous + toIntervalSecond({{quiet_s:UInt32}}) AS begins
                FROM (
                    SELECT market_ticker, toDateTime64({at}, 3, 'UTC') AS at,
                        toFloat64({measure}) AS measure, tuple(*) AS finding,
                        row_number() OVER by_time AS n, lagInFrame(at) OVER by_time AS previous
                    FROM ({check.sql(look.parameters)})
                    WINDOW by_time AS (PARTITION BY market_ticker ORDER BY {at}
                        ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
                )
            )
        )
        GROUP BY market_ticker, episode
        ORDER BY min(at), market_ticker
        LIMIT {{most:UInt32}}
    """  # noqa: S608
    bound = {
        **replace(look.parameters, limit=audit.NO_LIMIT).bound(look.start),
        "quiet_s": int(QUIET.total_seconds()),
        "most": MOST_EXPLAINED,
    }
    plain = {"join_use_nulls": 0}
    with translated():
        rows = look.client.query(sql, parameters=bound, settings=plain).result_rows
        columns = [
            str(row[0])
            for row in look.client.query(
                f"DESCRIBE TABLE ({check.sql(look.parameters)})",
                parameters=bound,
                settings=plain,
            ).result_rows
        ]
    return [
        _Episode(
            check, str(ticker), first, last, int(count), float(worst), _named(columns, example)
        )
        for ticker, first, last, count, worst, example in rows
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


def _rolled_markets(client: Client, parameters: Parameters, start: datetime) -> frozenset[str]:
    bound = replace(parameters, limit=audit.NO_LIMIT).bound(start)
    with translated():
        rows = client.query(
            f"SELECT DISTINCT market_ticker FROM ({audit.ROLLED.sql(parameters)})",  # noqa: S608
            parameters=bound,
        ).result_rows
    return frozenset(str(ticker) for (ticker,) in rows)


def _break(look: _Look, episode: _Episode) -> Break:
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
    over = check is not audit.FRESH and look.newest.get(ticker, last) - last > QUIET
    kind, explanation = _explain(look, episode, over)
    named = f"{check.name}:{ticker}:{moment(opened)}"
    return Break(
        break_id=before.break_id if before is not None else uuid.uuid5(_NAMESPACE, named),
        check_name=check.name,
        market_ticker=ticker,
        kind=kind,
        opened_at=opened,
        last_seen_at=last,
        closed_at=last if over else None,
        findings=max(episode.findings, before.findings if before is not None else 0),
        worst=max(episode.worst, before.worst if before is not None else 0.0),
        explanation=explanation,
    )


# -- explaining --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Around:
    """What was recorded around a finding."""

    block_codes: Sequence[str] = ()
    inv_convention: str = ""
    resting: float = 0.0
    """What the five resting fields add up to, signed."""
    action: tuple[Any, ...] | None = None
    reject: tuple[Any, ...] | None = None
    actions: int = 0
    responses: int = 0
    orphans: int = 0
    """Responses to actions that nobody recorded."""

    def sentence(self) -> str:
        """The context, as the end of a sentence."""
        parts = [
            f"block_codes were {', '.join(self.block_codes)}"
            if self.block_codes
            else "nothing was blocked"
        ]
        if self.action is not None:
            kind, side, api_side, size, price, request = self.action
            what = f"{kind} {side} of {_number(size)} {api_side} at {_number(price)}"
            parts.append(f"the last action was {what} {_shortened(request)}".rstrip())
        else:
            parts.append("no action was recorded")
        if self.reject is not None:
            parts.append(f"order {self.reject[1]} was rejected: {_shortened(self.reject[0])}")
        return "; ".join(parts)


def _explain(look: _Look, episode: _Episode, over: bool) -> tuple[str, str]:
    """The kind of a break, and one sentence."""
    check, row = episode.check, episode.example
    begin = episode.first
    if check is audit.DRIFT and row["previous_total_est"] is not None:
        begin = min(begin, row.get("last_action_bucket") or begin)
        begin = max(begin, episode.first - timedelta(seconds=30))
    around = _look_around(look, episode, begin)
    if check is audit.DRIFT:
        kind, said = _explain_drift(episode, around)
    elif check is audit.EXPOSURE:
        kind = UNKNOWN_ORDER
        said = (
            f"the engine counts {_number(row['pos_open_exposure'])} contracts of exposure from"
            " orders although it has none open"
        )
    elif check is audit.DIVERGENCE:
        kind, said = _explain_divergence(look, episode, over, around)
    elif check is audit.IDENTITY:
        kind, said = _explain_identity(look, episode, around)
    elif check is audit.ROLLED:
        kind = ROLLED
        said = (
            f"inv_before {_number(row['inv_before'])} is the estimate of the decision before, while"
            f" {_number(row['pos_filled'])} is filled"
        )
    else:
        kind = STALE_SNAPSHOT
        said = f"no snapshot of the exchange's position for {_number(row['without_snapshot_s'])} s"
    return kind, f"{kind.capitalize()}: {said}; {around.sentence()}."


def _look_around(look: _Look, episode: _Episode, begin: datetime) -> _Around:
    if not {audit.ACTIONS, "mm_order_responses"} <= look.tables:
        return _Around()
    at = episode.first + timedelta(seconds=1 if episode.check is audit.DRIFT else 0)
    bound = {
        "market_ticker": episode.market_ticker,
        "at": moment(at),
        "since": moment(min(begin, episode.first) - NEAR),
        "until": moment(at + NEAR),
    }
    with translated():
        row = look.client.query(queries.text("inventory/around"), parameters=bound).result_rows[0]
    decision, action, reject, actions, responses = row
    answered = _cells(responses) or (0, 0)
    codes, _, convention, resting = _cells(decision) or ((), "", "", 0.0)
    return _Around(
        tuple(codes),
        convention,
        resting,
        _cells(action),
        _cells(reject),
        int(actions or 0),
        *answered,
    )


def _cells(value: Any) -> tuple[Any, ...] | None:
    """A tuple column, whatever the driver made of it; None where the subquery had no row."""
    if value is None:
        return None
    cells = tuple(value.values()) if isinstance(value, dict) else tuple(value)
    return None if all(cell is None for cell in cells) else cells


def _explain_drift(episode: _Episode, around: _Around) -> tuple[str, str]:
    row = episode.example
    moved = _number(max(row["moved_within"], row["moved_since"]))
    said = f"the estimated position moved by {moved} contracts with no action recorded"
    if around.orphans:
        said += f", yet {around.orphans} answers to unrecorded actions came"
        return UNKNOWN_ORDER, said
    if around.actions or around.responses:
        return TIMING, f"{said} in that second; orders were sent or answered beside it"
    return UNEXPLAINED, said


def _explain_identity(look: _Look, episode: _Episode, around: _Around) -> tuple[str, str]:
    row = episode.example
    said = (
        f"pos_total_est {_number(row['pos_total_est'])} is not pos_filled"
        f" {_number(row['pos_filled'])} plus pos_open_exposure {_number(row['pos_open_exposure'])}"
    )
    if abs(row["pos_total_est"] - row["pos_filled"] - around.resting) < _SAME:
        return UNKNOWN_ORDER, f"{said}, but it is with the {_number(around.resting)} that rest"
    return (ROLLED if episode.market_ticker in look.rolled else UNEXPLAINED), said


def _explain_divergence(
    look: _Look, episode: _Episode, over: bool, around: _Around
) -> tuple[str, str]:
    row = episode.example
    ours, theirs, apart = row["pos_filled"], row["snapshot_pos_filled"], row["difference"]
    lasted = episode.last - episode.first
    stale = row["snapshot_age_s"] > look.parameters.stale_after_s
    said = (
        f"the engine has {_number(ours)} and the exchange said {_number(theirs)}"
        f" {_number(row['snapshot_age_s'])} s before"
    )
    after, missing, uncounted = (
        _reconciled(look, episode) if "mm_fills" in look.tables else (0.0, 0.0, 0.0)
    )
    if theirs and abs(ours + theirs) < _SAME:
        named = around.inv_convention or "none"
        kind = WRONG_CONVENTION
        said += f", the same with the other sign (inv_convention {named})"
    elif around.inv_convention.lower() not in YES_POSITIVE:
        kind = WRONG_CONVENTION
        said += f", and inv_convention is {around.inv_convention}"
    elif after and abs(ours - theirs - after) < _SAME:
        kind = STALE_SNAPSHOT if stale else TIMING
        said += f", and fills of {_number(after)} since then account for it"
    elif stale:
        kind = STALE_SNAPSHOT
    elif abs(missing) > _SAME:
        kind = MISSING_FILL
        said += f", and fills of {_number(missing)} were never recorded"
    elif over and lasted <= BRIEF:
        kind = TIMING
        said += f", for {lasted.total_seconds():.1f} s only"
    elif uncounted:
        kind = MISSING_FILL
        said += f", and recorded fills of {_number(uncounted)} are not in pos_filled"
    elif episode.market_ticker in look.rolled:
        kind = ROLLED
        said += ", and inventory was rolled forward"
    else:
        kind = UNEXPLAINED
        said += f", {_number(apart)} apart"
    return kind, said


def _reconciled(look: _Look, episode: _Episode) -> tuple[float, float, float]:
    """Signed fills since the snapshot; what the snapshot has that no recorded fill accounts for; and
    the recorded fills before it, where the engine still has the position from before them.
    """
    row = episode.example
    with translated():
        found = look.client.query(
            queries.text("inventory/reconciled"),
            parameters={
                "market_ticker": episode.market_ticker,
                "snapshot_ts": moment(row["snapshot_ts"]),
                "at": moment(episode.first),
            },
        ).result_rows[0]
    after, before_ts, before_pos, between = found
    if before_ts <= _NEVER:
        return float(after), 0.0, 0.0  # no snapshot before it to count from
    missing = float(row["snapshot_pos_filled"] - before_pos - between)
    stayed = abs(row["pos_filled"] - before_pos) < _SAME
    return float(after), missing, float(between) if stayed else 0.0


def _number(value: float) -> str:
    return f"{value:.6f}".rstrip("0").rstrip(".")


def _shortened(text: str) -> str:
    one_line = " ".join(str(text).split())
    return one_line if len(one_line) <= _SHOWN_CHARACTERS else f"{one_line[:_SHOWN_CHARACTERS]}…"

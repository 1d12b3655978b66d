"""Define the inventory checks and run them.

Each check's SQL is in `infra/queries/inventory/<check>.sql`, for the command and for Dagster's checks alike. Nothing
is written or explained here: see breaks.py. Which engines and markets were audited is in judged.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any

import pyarrow as pa

from kalshi_platform.clickhouse import queries
from kalshi_platform.clickhouse.client import Client, translated
from kalshi_platform.inventory import findings
from kalshi_platform.inventory.findings import Episode
from kalshi_platform.inventory.rows import TABLES
from kalshi_platform.inventory.tables import standing

DECISIONS = "mm_decisions"
ACTIONS = "mm_order_actions"
SNAPSHOTS = "mm_position_snapshots"

REACHES = timedelta(seconds=2)
"""A fill reaches the engine, and the exchange's report, within this."""
FOLLOWS_SETTLEMENT = timedelta(seconds=10)
"""An engine clears a settled position within this."""

RACE = timedelta(seconds=60)
"""Findings this recent may be explained by rows that are just arriving; an engine's clock may be behind."""
_WINDOW = ("since", "markets", "position_writers", "writing_since")
_EMPTY = "''"
_ZEROS = {pa.float64(): "toFloat64(0)", pa.uint32(): "0", pa.uint8(): "0"}


@dataclass(frozen=True)
class Check:
    """One check: a row of its SQL's result is an anomaly."""

    name: str
    title: str
    question: str
    needs: tuple[str, ...]
    """The tables that it reads; if one is missing, the check is skipped."""
    money: bool
    """Whether an anomaly means a wrong position, and not only a suspicion."""
    worst: str
    """SQL expression of a finding's size, from the columns of its SQL: contracts, or seconds."""
    at: str = "ts"
    """The column with a finding's time."""

    def sql(self, parameters: Parameters, tables: frozenset[str] = frozenset(TABLES)) -> str:
        """Return the check's SQL; with `strict_runbook`, A, B and C are word for word the runbook's.

        `snapshot="latest"` uses the runbook's SQL for check C, too, because the newest snapshot may be later than
        the fills. A table that is not in `tables`, and that the check does not need, is replaced by an empty one.
        """
        plain = parameters.strict_runbook or (
            self is DIVERGENCE and parameters.snapshot == "latest"
        )
        folder = "inventory/strict" if plain and self in RUNBOOK else "inventory"
        text = queries.text(f"{folder}/{self.name}")
        for table in sorted(TABLES.keys() - tables):
            text = text.replace(f"FROM {table}\n", f"FROM {_empty_table(table)}\n")
        return text


DRIFT = Check(
    "drift_without_actions",
    "Check A: Drift Without Actions",
    "Does the estimated position move only when orders are sent?",
    (DECISIONS, ACTIONS),
    money=False,
    worst="abs(unaccounted)",
    at="bucket",
)
EXPOSURE = Check(
    "open_exposure_mismatch",
    "Check B: Open Exposure Mismatch",
    "Is there no exposure where there is no order?",
    (DECISIONS,),
    money=True,
    worst="abs(pos_open_exposure)",
)
DIVERGENCE = Check(
    "decision_snapshot_divergence",
    "Check C: Decision vs Snapshot Divergence",
    "Does the engine hold what the exchange says that it holds?",
    (DECISIONS, SNAPSHOTS),
    money=True,
    worst="abs(difference)",
)
IDENTITY = Check(
    "position_identity",
    "Position Identity",
    "Is pos_total_est = pos_filled + pos_open_exposure?",
    (DECISIONS,),
    money=True,
    worst="greatest(abs(difference), abs(exposure_difference))",
)
ROLLED = Check(
    "inventory_not_rolled",
    "Inventory Not Rolled",
    "Does inv_before follow the filled position, and never the last estimate?",
    (DECISIONS,),
    money=True,
    worst="abs(difference)",
)
FRESH = Check(
    "snapshots_fresh",
    "Snapshots Fresh",
    "Does the exchange's own word keep up with the engine?",
    (DECISIONS, SNAPSHOTS),
    money=False,
    worst="without_snapshot_s",
)

RUNBOOK = (DRIFT, EXPOSURE, DIVERGENCE)
"""Checks A, B and C of the runbook."""
CHECKS = (*RUNBOOK, IDENTITY, ROLLED, FRESH)


@dataclass(frozen=True)
class Parameters:
    """What the checks examine, and their thresholds. Sizes in contracts."""

    lookback_minutes: int = 120
    market_ticker: str = ""
    """One market; empty: all."""
    drift_threshold: float = 1.0
    open_epsilon: float = 0.01
    filled_threshold: float = 0.5
    stale_after_s: int = 660
    """A snapshot every 5 minutes, and two of them missed."""
    snapshot: str = "as_of"
    """The snapshot that a decision is compared with: `as_of`, the latest at or before it, or `latest`, the newest."""
    limit: int = 200
    strict_runbook: bool = False
    """Checks A, B and C exactly as in the runbook, without fills and answers since the snapshot."""

    @property
    def markets(self) -> list[str]:
        """The markets to examine; empty: all."""
        return [self.market_ticker] if self.market_ticker else []

    def bound(self, since: datetime) -> dict[str, Any]:
        """Return the values of the SQL's parameters."""
        return {
            "since": moment(since),
            "markets": self.markets,
            "drift_threshold": self.drift_threshold,
            "open_epsilon": self.open_epsilon,
            "filled_threshold": self.filled_threshold,
            "stale_after_s": self.stale_after_s,
            "snapshot": self.snapshot,
            "strict_runbook": self.strict_runbook,
            "limit": self.limit,
            "reaches_ms": _milliseconds(REACHES),
            "settles_ms": _milliseconds(FOLLOWS_SETTLEMENT),
        }


class Status(Enum):
    """The status of a check."""

    CLEAR = "clear"
    ANOMALIES = "anomalies"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Outcome:
    """The result of a check."""

    check: Check
    columns: tuple[str, ...] = ()
    rows: Sequence[tuple[Any, ...]] = field(default=(), repr=False)
    """At most `limit` rows, in the SQL's order."""
    total: int = 0
    """Number of rows."""
    markets: int = 0
    """Number of markets with a row, including those beyond the limit."""
    episodes: Sequence[Episode] = field(default=(), repr=False)
    """Episodes, from which breaks.py makes breaks."""
    notice: str = ""
    """Why the check was skipped, or what it left out, for people."""
    skipped: bool = False

    @property
    def status(self) -> Status:
        """The status."""
        if self.skipped:
            return Status.SKIPPED
        return Status.ANOMALIES if self.total else Status.CLEAR


def moment(at: datetime) -> str:
    """Format a time for the SQL's parameters: UTC, milliseconds."""
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]


def bound(
    client: Client, tables: frozenset[str], parameters: Parameters, start: datetime
) -> dict[str, Any]:
    """Return the values of all parameters of the checks' SQL, including those queried once for all checks."""
    values = parameters.bound(start)
    settled = _settled(client, values) if DECISIONS in tables else []
    writers = _position_writers(client, values) if DECISIONS in tables else []
    return {
        **values,
        "position_writers": [name for name, _ in writers],
        "writing_since": [at for _, at in writers],
        "settled_tickers": [ticker for ticker, _ in settled],
        "settled_at": [at for _, at in settled],
    }


def _position_writers(client: Client, values: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return the engines that write position columns, and since when (milliseconds). From then on, a position of
    theirs that is not a number is a fault.

    Queried only if a decision has such a position.
    """
    window = (
        "FROM mm_decisions WHERE ts >= {since:DateTime64(3, 'UTC')}"
        " AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})"
    )
    named = {name: values[name] for name in ("since", "markets")}
    with translated():
        strange = client.query(
            f"SELECT 1 {window} AND NOT isFinite(pos_total_est + pos_filled + pos_open_exposure)"
            " LIMIT 1",
            parameters=named,
        ).row_count
        if not strange:
            return []
        rows = client.query(
            "SELECT concat(engine_instance_id, ' ', engine_version) AS writer,"
            f" min(toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC'))) {window}"
            " AND (NOT isNaN(pos_filled) OR NOT isNaN(pos_open_exposure) OR NOT isNaN(pos_total_est)"
            " OR open_orders_count != 0 OR inv_convention != '') GROUP BY writer ORDER BY writer",
            parameters=named,
        ).result_rows
    return [(str(name), int(at)) for name, at in rows]


def _settled(client: Client, values: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return the markets that the platform's catalog has as settled, and when (milliseconds).

    Empty if the database has no catalog, as an engine's own database may.
    """
    with translated():
        known = client.query(
            "SELECT 1 FROM system.columns WHERE database = currentDatabase()"
            " AND table = 'market_catalog' AND name = 'settlement_ts'"
        ).row_count
        if not known:
            return []
        rows = client.query(
            "SELECT market_ticker, toUnixTimestamp64Milli(toDateTime64(argMax(settlement_ts, as_of), 3, 'UTC')) AS at"
            " FROM market_catalog"
            " WHERE settlement_ts IS NOT NULL AND settlement_ts <= now64(6, 'UTC')"
            " AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})"
            " AND market_ticker IN"
            " (SELECT market_ticker FROM mm_decisions WHERE ts >= {since:DateTime64(3, 'UTC')})"
            " GROUP BY market_ticker ORDER BY market_ticker",
            parameters={name: values[name] for name in ("since", "markets")},
        ).result_rows
    return [(str(ticker), int(at)) for ticker, at in rows]


def _empty_table(table: str) -> str:
    """Return SQL that replaces a missing table: its columns, and no row."""
    columns = ", ".join(
        f"{'toDateTime64(0, 3)' if pa.types.is_timestamp(field.type) else _ZEROS.get(field.type, _EMPTY)}"
        f" AS {field.name}"
        for field in TABLES[table].arrow
    )
    return f"(SELECT {columns} WHERE 0) AS {table}"


def _milliseconds(span: timedelta) -> int:
    return span // timedelta(milliseconds=1)


def since(client: Client, parameters: Parameters) -> datetime:
    """Return the window's start by the server's clock, on a whole second."""
    start = _now(client) - timedelta(minutes=parameters.lookback_minutes)
    return start.replace(microsecond=0)


def _now(client: Client) -> datetime:
    """Return the time by the server's clock."""
    with translated():
        row = client.query("SELECT now64(3, 'UTC')").first_row
    assert row is not None  # noqa: S101 - one row always
    now: datetime = row[0]
    return now.astimezone(UTC)


def sweep(
    client: Client,
    checks: Iterable[Check],
    parameters: Parameters,
    *,
    start: datetime | None = None,
) -> list[Outcome]:
    """Run the checks over the window that starts at `start` (default: now minus the look-back).

    Without a market maker the result is notices, not findings. Raises `StoreUnavailable` and
    `StoreRefused` as the store does.
    """
    checks = tuple(checks)
    tables = standing(client)
    start = since(client, parameters) if start is None else start
    if why := tables.why_not(DECISIONS):
        return [_skipped(check, why) for check in checks]
    values = bound(client, tables.usable, parameters, start)
    decisions, unjudged = _decisions(client, values)
    nothing = "" if decisions else _no_decisions(client, parameters)
    outcomes = []
    for check in checks:
        why = next((why for table in check.needs if (why := tables.why_not(table))), nothing)
        if not why and check is not FRESH:
            why = _why_not_run(client, check, decisions, unjudged)
        outcomes.append(
            _skipped(check, why)
            if why
            else _run(client, check, check.sql(parameters, tables.usable), values, unjudged)
        )
    return outcomes


def _run(
    client: Client, check: Check, sql: str, values: Mapping[str, Any], unjudged: int
) -> Outcome:
    question = findings.Question(sql, check.at, check.worst)
    if "AS moved_within" in sql:  # the runbook's own check A has other columns
        question = question._replace(worst="greatest(moved_within, moved_since)")
    found = findings.read(client, question, values)
    if found.total:
        # Tables are not read at one instant, and an engine writes meanwhile: the second run has the rows
        # that explain decisions of the first. Real faults are found again.
        found = findings.again(client, question, values, found, _now(client) - RACE)
    notice = ""
    if unjudged and check is not FRESH:
        notice = (
            f"{unjudged} decisions have no position columns (an engine from before migration 010, or one"
            " that writes nan): they are not judged."
        )
    return Outcome(
        check,
        found.columns,
        found.rows,
        total=found.total,
        markets=found.markets,
        episodes=found.episodes,
        notice=notice,
    )


def _decisions(client: Client, bound: Mapping[str, Any]) -> tuple[int, int]:
    """Return (the number of decisions in the window, the number of those without a position)."""
    with translated():
        row = client.query(
            "SELECT count(), countIf("
            "isNaN(pos_filled) AND isNaN(pos_open_exposure) AND isNaN(pos_total_est)"
            " AND NOT arrayExists((writer, begun) -> writer = concat(engine_instance_id, ' ', engine_version)"
            " AND toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC')) >= begun,"
            " {position_writers:Array(String)}, {writing_since:Array(Int64)}))"
            " FROM mm_decisions"
            " WHERE ts >= {since:DateTime64(3, 'UTC')}"
            " AND (empty({markets:Array(String)}) OR market_ticker IN {markets:Array(String)})",
            parameters={name: bound[name] for name in _WINDOW},
        ).first_row
    assert row is not None  # noqa: S101 - a count has one row
    return int(row[0]), int(row[1])


def _empty(client: Client, table: str) -> bool:
    with translated():
        return not client.query(
            "SELECT 1 FROM {table:Identifier} LIMIT 1", parameters={"table": table}
        ).row_count


def _skipped(check: Check, notice: str) -> Outcome:
    return Outcome(check, notice=notice, skipped=True)


def _why_not_run(client: Client, check: Check, decisions: int, unjudged: int) -> str:
    """Return why a check of a window with decisions cannot run; empty if it can."""
    if unjudged == decisions:
        return (
            f"none of {decisions:,} decisions has a position: their engine writes the columns from before"
            " migration 010, or nan."
        )
    if SNAPSHOTS in check.needs and _empty(client, SNAPSHOTS):
        return f"{SNAPSHOTS} is empty: nothing to compare with."
    return ""


def _no_decisions(client: Client, parameters: Parameters) -> str:
    market = f" of {parameters.market_ticker}" if parameters.market_ticker else ""
    quiet = f"no decisions{market} in the last {parameters.lookback_minutes} minutes"
    if _empty(client, DECISIONS):
        return f"{quiet}: {DECISIONS} is empty, no market maker has written to it yet."
    return f"{quiet}."

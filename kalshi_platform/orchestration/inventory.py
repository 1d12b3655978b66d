"""The market maker's inventory in Dagster: its tables and the exchange's positions as assets, and the checks.

The checks run the same SQL as `kalshi-platform qa`, which is in inventory/audit.py.

No `from __future__ import annotations` in modules that define ops: Dagster reads the types.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from datetime import datetime
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster import MetadataValue

from kalshi_platform.errors import PlatformError
from kalshi_platform.inventory.rows import TABLES
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.printable import markdown

if TYPE_CHECKING:
    from kalshi_platform.inventory.audit import Outcome
    from kalshi_platform.inventory.breaks import Break
    from kalshi_platform.inventory.judged import Judged

GROUP = "inventory"
SHOWN = 100
"""Most rows of a table in the UI; `kalshi-platform qa` shows more."""

_OWNER = ["team:trading"]
_KINDS = {"clickhouse"}


def _about(table: str) -> dict[str, Any]:
    """Metadata of a table for the UI: its columns, and its documentation."""
    return {
        "dagster/table_name": table,
        "dagster/column_schema": dg.TableSchema(
            [dg.TableColumn(field.name, str(field.type)) for field in TABLES[table].arrow]
        ),
        "docs": MetadataValue.path("docs/inventory.md"),
    }


def _written_by_engines(name: str, description: str) -> dg.AssetSpec:
    return dg.AssetSpec(
        name,
        description=f"{description} Written by the market maker with `kalshi_platform.inventory`.",
        group_name=GROUP,
        kinds=_KINDS,
        owners=_OWNER,
        tags={"layer": "live"},
        metadata=_about(name),
    )


mm_decisions = _written_by_engines(
    "mm_decisions", "Every decision of the market maker, with its own view of its inventory."
)
mm_order_actions = _written_by_engines("mm_order_actions", "Every order sent, replaced, cancelled.")
mm_order_responses = _written_by_engines("mm_order_responses", "What the exchange answered.")


@dg.asset(
    name="mm_position_snapshots",
    group_name=GROUP,
    kinds=_KINDS,
    owners=_OWNER,
    tags={"layer": "raw"},
    metadata=_about("mm_position_snapshots"),
    description=(
        "The positions that the exchange reports: signed, YES positive, settled markets included."
        " A report that fails, or that is older than the last recorded fill, writes nothing."
    ),
)
def mm_position_snapshots(
    context: dg.AssetExecutionContext, platform: KalshiResource
) -> dg.MaterializeResult[None]:
    """Read the exchange's positions and write them beside the decisions."""
    from kalshi_platform.clickhouse.client import connect
    from kalshi_platform.exchange.rest import RestClient
    from kalshi_platform.inventory import positions

    settings = platform.settings()
    if not settings.use_clickhouse:
        raise dg.Failure(
            description="USE_CLICKHOUSE=0: there is no table to write to.", allow_retries=False
        )
    try:
        with (
            closing(connect(settings, log_comment="mm_position_snapshots")) as client,
            RestClient(settings.exchange) as rest,
        ):
            report = positions.take(rest, positions.known_markets(client))
            positions.store(client, report)
    except PlatformError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error
    held = [entry for entry in report.snapshots if entry.position]
    metadata: dict[str, Any] = {
        "dagster/row_count": MetadataValue.int(len(report.snapshots)),
        "markets held": MetadataValue.int(len(held)),
        "source": MetadataValue.text(platform.source),
        "left out": MetadataValue.json(dict(report.left_out)),
        "positions": _table(positions.as_rows(report)[:SHOWN]),
    }
    if report.unreadable:
        metadata["incomplete"] = MetadataValue.json([str(entry) for entry in report.unreadable])
        for entry in report.unreadable:
            context.log.error(f"The report is incomplete. {entry}")
    if report.as_of is not None:
        metadata["as of"] = MetadataValue.timestamp(report.as_of)
    return dg.MaterializeResult(metadata=metadata)


_CHECKED: Mapping[str, tuple[str, str]] = {
    "drift_without_actions": (
        "mm_decisions",
        "The estimated position moved by a contract or more, and no order was sent.",
    ),
    "open_exposure_mismatch": ("mm_decisions", "Exposure from open orders, without an open order."),
    "decision_snapshot_divergence": (
        "mm_decisions",
        "The filled position differs from the exchange's by half a contract or more.",
    ),
    "position_identity": ("mm_decisions", "pos_total_est = pos_filled + pos_open_exposure."),
    "inventory_not_rolled": (
        "mm_decisions",
        "inv_before is the filled position, never the estimate of the decision before.",
    ),
    "snapshots_fresh": (
        "mm_position_snapshots",
        "The exchange's positions are at most 11 minutes older than the newest decision.",
    ),
    "decisions_fresh": (
        "mm_decisions",
        "Every engine that has decided has decided again within 5 minutes, by the server's clock.",
    ),
}
DECISIONS_FRESH = "decisions_fresh"


@dg.multi_asset_check(
    name="inventory_checks",
    specs=[
        dg.AssetCheckSpec(name, asset=asset, description=description)
        for name, (asset, description) in _CHECKED.items()
    ],
    can_subset=True,
)
def inventory_checks(
    context: dg.AssetCheckExecutionContext, platform: KalshiResource
) -> Iterator[dg.AssetCheckResult]:
    """Run the selected checks, and bring `mm_inventory_breaks` up to date."""
    from kalshi_platform.clickhouse.client import connect
    from kalshi_platform.inventory import audit, breaks, judged

    wanted = {key.name for key in context.selected_asset_check_keys}
    settings = platform.settings()
    if not settings.use_clickhouse:
        for name in sorted(wanted):
            yield _passed(name, "ClickHouse is not used (USE_CLICKHOUSE=0).")
        return
    checks = [check for check in audit.CHECKS if check.name in wanted]
    parameters = audit.Parameters(limit=SHOWN)
    try:
        with closing(connect(settings, log_comment="inventory_qa")) as client:
            start = audit.since(client, parameters)
            # with a key, paper decisions from before it was set belong to no current engine
            looked_at = judged.look(client, parameters, start, paper=not settings.has_key)
            outcomes = audit.sweep(client, checks, parameters, start=start) if checks else []
            still_open = (
                breaks.update(client, checks, parameters, outcomes=outcomes) if checks else []
            )
    except PlatformError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error
    if DECISIONS_FRESH in wanted:
        yield _decisions_fresh(looked_at)
    for outcome in outcomes:
        of_check = [entry for entry in still_open if entry.check_name == outcome.check.name]
        yield _result(outcome, looked_at, of_check)


def _passed(name: str, notice: str) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=True,
        asset_key=_CHECKED[name][0],
        check_name=name,
        description=markdown(f"Nothing to check: {notice}"),
    )


def _decisions_fresh(looked_at: "Judged") -> dg.AssetCheckResult:
    """Fail if an engine has stopped, or if its clock is ahead and hides whether it has."""
    from kalshi_platform.inventory import audit, judged

    if not looked_at.engines:
        never = looked_at.tables.why_not(audit.DECISIONS) or (
            f"no engine has decided in the last {judged.RETIRED.days} days."
        )
        return _passed(DECISIONS_FRESH, never)
    wrong = [
        *(judged.silence(engine) for engine in looked_at.stopped),
        *(judged.lead(engine) for engine in looked_at.ahead),
    ]
    return dg.AssetCheckResult(
        passed=not wrong,
        asset_key=_CHECKED[DECISIONS_FRESH][0],
        check_name=DECISIONS_FRESH,
        severity=dg.AssetCheckSeverity.ERROR,
        description=markdown(
            "; ".join([wrong[0][0].upper() + wrong[0][1:], *wrong[1:]]) + "."
            if wrong
            else f"Every engine is deciding. {looked_at.in_words()}."
        ),
        metadata={
            "judged": MetadataValue.text(looked_at.in_words()),
            "engines": _table(
                [
                    {
                        "engine": str(engine),
                        "newest_decision": engine.last,
                        "silent_s": engine.silent_s,
                        "decisions": engine.decisions,
                        "markets": engine.markets,
                        "stopped": engine in looked_at.stopped,
                    }
                    for engine in looked_at.engines
                ][-SHOWN:]
            ),
        },
    )


def _result(
    outcome: "Outcome", looked_at: "Judged", still_open: Sequence["Break"]
) -> dg.AssetCheckResult:
    """The result of an inventory check, with offenders and open breaks as tables."""
    if outcome.skipped:
        return _passed(outcome.check.name, outcome.notice)
    metadata: dict[str, Any] = {
        "judged": MetadataValue.text(looked_at.in_words()),
        "anomalies": MetadataValue.int(outcome.total),
        "markets": MetadataValue.int(outcome.markets),
    }
    if outcome.notice:
        metadata["note"] = MetadataValue.text(outcome.notice)
    if outcome.rows:
        records = [dict(zip(outcome.columns, row, strict=True)) for row in outcome.rows]
        metadata["offenders"] = _table(records)
    if still_open:
        metadata["breaks"] = _table(
            [
                {
                    "kind": entry.kind,
                    "market_ticker": entry.market_ticker,
                    "opened_at": entry.opened_at,
                    "age_s": entry.age.total_seconds(),
                    "worst": entry.worst,
                    "explanation": entry.explanation,
                }
                for entry in still_open
            ][:SHOWN]
        )
    severity = dg.AssetCheckSeverity.ERROR if outcome.check.money else dg.AssetCheckSeverity.WARN
    found = (
        f"{outcome.total} anomalies in {outcome.markets} markets, {len(still_open)} breaks open."
    )
    return dg.AssetCheckResult(
        passed=not outcome.total,
        asset_key=_CHECKED[outcome.check.name][0],
        check_name=outcome.check.name,
        severity=severity,
        description=markdown(
            found if outcome.total else f"{outcome.check.question} Yes: {looked_at.in_words()}."
        ),
        metadata=metadata,
    )


def _table(records: Sequence[Mapping[str, Any]]) -> MetadataValue:
    columns = list(records[0]) if records else ["nothing"]
    return MetadataValue.table(
        records=[
            dg.TableRecord({name: _cell(value) for name, value in record.items()})
            for record in records
        ],
        schema=dg.TableSchema(columns=[dg.TableColumn(name) for name in columns]),
    )


def _cell(value: Any) -> str | int | float | bool:
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds")
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, str | int | bool) else "" if value is None else str(value)


inventory_qa = dg.define_asset_job(
    "inventory_qa",
    selection=dg.AssetSelection.checks(inventory_checks),
    description="Every inventory check, over the last two hours.",
)
inventory_qa_schedule = dg.ScheduleDefinition(
    name="inventory_qa_schedule",
    job=inventory_qa,
    cron_schedule="*/5 * * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
)

take_positions = dg.define_asset_job(
    "mm_position_snapshots_job",
    selection=dg.AssetSelection.assets("mm_position_snapshots"),
    description="The exchange's positions, written beside the decisions.",
)


@dg.schedule(
    name="mm_position_snapshots_schedule",
    job=take_positions,
    cron_schedule="2-59/5 * * * *",  # between two runs of inventory_qa
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
)
def mm_position_snapshots_schedule(platform: KalshiResource) -> dg.RunRequest | dg.SkipReason:
    """Every five minutes, if ClickHouse is used."""
    if not platform.settings().use_clickhouse:
        return dg.SkipReason("USE_CLICKHOUSE=0: there is no table to write to.")
    return dg.RunRequest()


ASSETS = (mm_decisions, mm_order_actions, mm_order_responses, mm_position_snapshots)
CHECKS = (inventory_checks,)
JOBS = (inventory_qa, take_positions)
SCHEDULES = (inventory_qa_schedule, mm_position_snapshots_schedule)

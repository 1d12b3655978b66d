"""Healthy trading is green: four market-hours of each variation that a market maker meets every day (two for
each seed), with engines that keep their books right. The runbook's literal checks find in them what their
definitions say.
"""

from __future__ import annotations

import bisect
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from kalshi_platform.clickhouse.client import Client, connect
from kalshi_platform.inventory import audit, breaks
from kalshi_platform.inventory.audit import Parameters, Status
from kalshi_platform.inventory.breaks import Break
from kalshi_platform.settings import Settings
from kalshi_platform_tests.inventory.scenarios import (
    MINUTE,
    SECOND,
    Engine,
    Market,
    Options,
    insert,
)

pytestmark = pytest.mark.timeout(600)

LOOKBACK_MINUTES = 70
EVERYTHING = 1_000_000


@dataclass(frozen=True)
class Hours:
    """Some market-hours: how their markets are, and how many engines quote each."""

    name: str
    markets: Sequence[Options]
    engines: int = 1


_OTHER = Options(minutes=60, no_bids=True, begins_with=-735)
_SETTLING = tuple(
    Options(
        minutes=30,
        settles_at=22 * MINUTE + n * 97 * SECOND,
        result=result,
        begins_with=415 * (n - 1),
    )
    for n, result in enumerate(("yes", "no", "void", "yes"))
)
_EVENTFUL = Options(
    minutes=60,
    loop_ms=700,
    jitter=0.6,
    exchange_cancels_every=70 * SECOND,
    settles_at=55 * MINUTE,
    records_all_fills=True,
    skew_ms=-40,
    no_bids=True,
)

HOURS = (
    Hours("fills", (Options(minutes=60, begins_with=1250), replace(_OTHER, taker_every=5000))),
    Hours("own-time", (Options(minutes=60, fills_at="engine"), replace(_OTHER, skew_ms=60))),
    Hours(
        "acknowledged-late",
        (
            Options(minutes=60, loop_ms=450, jitter=0.9, price_every=4 * SECOND),
            replace(_OTHER, loop_ms=450, jitter=0.9, replaces=0.0),
        ),
    ),
    Hours(
        "canceled-by-exchange",
        (
            Options(minutes=60, exchange_cancels_every=90 * SECOND),
            replace(_OTHER, exchange_cancels_every=25 * SECOND, records_events=False),
        ),
    ),
    Hours("settlements", _SETTLING),
    Hours(
        "two-engines",
        (Options(minutes=60), replace(_OTHER, records_all_fills=True)),
        engines=2,
    ),
    Hours("together", (_EVENTFUL, replace(_EVENTFUL, fills_at="engine", begins_with=950)), 2),
)
SEEDS = (1, 2)
CASES = [(hours, seed) for hours in HOURS for seed in SEEDS]
IDS = [f"{hours.name}-{seed}" for hours, seed in CASES]


def made(hours: Hours, seed: int, start_ms: int) -> list[Market]:
    """The markets of some hours, with all that happened in them."""
    markets = []
    for number, options in enumerate(hours.markets):
        ticker = f"KXHEALTHY-{hours.name.upper()}-S{seed}M{number}"
        market = Market(ticker, seed * 100 + number, start_ms, options)
        for engine in range(hours.engines):
            Engine(market, f"{hours.name}-{seed}-{engine}", options)
        markets.append(market.run())
    return markets


@dataclass(frozen=True)
class Judged:
    """The audit's result for all the hours."""

    client: Client
    parameters: Parameters
    markets: dict[str, list[Market]]
    """By case."""
    statuses: dict[str, Status]
    found: dict[str, dict[str, int]]
    """By case: the checks that are red, and how many rows each has."""
    breaks: dict[str, list[Break]]


@pytest.fixture(scope="module")
def judged(migrated_once: Settings) -> Iterator[Judged]:
    """All hours in one database, looked at once."""
    start = datetime.now(UTC).replace(microsecond=0) - timedelta(minutes=LOOKBACK_MINUTES - 5)
    start_ms = int(start.timestamp()) * 1000
    markets = {name: made(*case, start_ms) for name, case in zip(IDS, CASES, strict=True)}
    parameters = Parameters(lookback_minutes=LOOKBACK_MINUTES, limit=EVERYTHING)
    with closing(connect(migrated_once)) as client:
        insert(client, itertools.chain(*markets.values()))
        outcomes = audit.sweep(client, audit.CHECKS, parameters)
        by_case: dict[str, list[Break]] = defaultdict(list)
        for each in breaks.examine(client, audit.CHECKS, parameters):
            by_case[case_of(each.market_ticker)].append(each)
        yield Judged(
            client,
            parameters,
            markets,
            {outcome.check.name: outcome.status for outcome in outcomes},
            counted(outcomes),
            by_case,
        )


def case_of(ticker: str) -> str:
    """Which case a market belongs to."""
    name, _, seed = ticker.removeprefix("KXHEALTHY-").lower().rpartition("-s")
    return f"{name}-{seed.partition('m')[0]}"


def counted(outcomes: Sequence[audit.Outcome]) -> dict[str, dict[str, int]]:
    """By case and check: how many rows were found."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for outcome in outcomes:
        assert len(outcome.rows) == outcome.total, "the limit cut the rows"
        at = outcome.columns.index("market_ticker") if outcome.rows else 0
        for row in outcome.rows:
            found[case_of(row[at])][outcome.check.name] += 1
    return {case: dict(checks) for case, checks in found.items()}


@pytest.mark.parametrize("case", IDS)
def test_the_model_keeps_its_own_books_right(judged: Judged, case: str) -> None:
    """Without this, the tests below would judge the model and not the audit."""
    for market in judged.markets[case]:
        assert len(market.fills) > 20
        late = [fill for fill in market.fills if fill.at > market.end - SECOND]
        for engine in market.engines:
            assert late or engine.position == market.position
            for order in engine.live.values():
                assert late or order.leaving or order.seen in {order.remaining, order.size}
        decisions = [row for table, _, row in market.rows if table == "mm_decisions"]
        for row in decisions:
            total = row["pos_filled"] + row["pos_open_exposure"]
            assert abs(row["pos_total_est"] - total) < 1e-6
            assert (row["open_orders_count"] == 0) <= (row["pos_open_exposure"] == 0)


def test_every_check_was_asked(judged: Judged) -> None:
    assert Status.SKIPPED not in judged.statuses.values()
    assert set(judged.statuses) == {check.name for check in audit.CHECKS}


@pytest.mark.parametrize("case", IDS)
def test_healthy_hours_are_green(judged: Judged, case: str) -> None:
    assert judged.found.get(case, {}) == {}


@pytest.mark.parametrize("case", IDS)
def test_healthy_hours_have_no_breaks(judged: Judged, case: str) -> None:
    assert [
        found_break.headline() + " " + found_break.explanation
        for found_break in judged.breaks[case]
    ] == []


# -- the runbook's literal definitions ---------------------------------------------------------


def written(market: Market, table: str) -> list[dict[str, Any]]:
    """A table's rows of a market, in order of their time."""
    rows = [row for name, _, row in market.rows if name == table]
    return sorted(rows, key=lambda row: (row["ts"], row.get("decision_id", "")))


def literal_drifts(market: Market, threshold: float = 1.0) -> int:
    """Check A as the runbook words it."""
    acted = {row["ts"] // SECOND for row in written(market, "mm_order_actions")}
    buckets: dict[int, list[float]] = defaultdict(list)
    for row in written(market, "mm_decisions"):
        buckets[row["ts"] // SECOND].append(row["pos_total_est"])
    found = 0
    before: tuple[int, float] | None = None
    for second, totals in sorted(buckets.items()):
        lowest, highest = min(totals), max(totals)
        drifted = second not in acted and round(highest - lowest, 6) >= threshold
        if before is not None and not acted.intersection(range(before[0], second + 1)):
            moved = max(abs(highest - before[1]), abs(lowest - before[1]))
            drifted = drifted or round(moved, 6) >= threshold
        found += drifted
        before = second, totals[-1]
    return found


def literal_divergences(market: Market, threshold: float = 0.5) -> int:
    """Check C as the runbook words it."""
    snapshots = written(market, "mm_position_snapshots")
    times = [row["ts"] for row in snapshots]
    found = 0
    for row in written(market, "mm_decisions"):
        at = bisect.bisect_right(times, row["ts"])
        if at:
            apart = row["pos_filled"] - snapshots[at - 1]["pos_filled"]
            found += round(abs(apart), 6) >= threshold
    return found


@pytest.fixture(scope="module")
def literally(judged: Judged) -> dict[str, dict[str, int]]:
    """What the runbook's literal checks find, by case and check."""
    strict: dict[str, Any] = {"strict_runbook": True}
    parameters = replace(judged.parameters, **strict)
    return counted(audit.sweep(judged.client, audit.RUNBOOK, parameters))


@pytest.mark.parametrize("case", IDS)
def test_the_strict_runbook_finds_what_its_definitions_say(
    judged: Judged, literally: dict[str, dict[str, int]], case: str
) -> None:
    expected = {
        audit.DRIFT.name: sum(map(literal_drifts, judged.markets[case])),
        audit.DIVERGENCE.name: sum(map(literal_divergences, judged.markets[case])),
    }
    found = literally.get(case, {})
    assert found == {check: rows for check, rows in expected.items() if rows}
    assert found[audit.DIVERGENCE.name] > 500  # fills come between two snapshots


def test_the_strict_runbook_is_red_where_the_default_is_green(
    literally: dict[str, dict[str, int]],
) -> None:
    red = {
        case.rpartition("-")[0] for case, found in literally.items() if audit.DRIFT.name in found
    }
    assert red >= {hours.name for hours in HOURS} - {"fills", "own-time"}

"""What was recorded around a break is found by bisection: the same rows that looking at each one finds, and in
a time that does not grow with the rows elsewhere.
"""

from __future__ import annotations

import itertools
import time
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.inventory import audit, evidence, explain
from kalshi_platform.inventory.evidence import Fill, Market, Moved, Report, between
from kalshi_platform.inventory.explain import Case, explain_all
from kalshi_platform.inventory.kinds import Kind

START = datetime(2026, 11, 22, tzinfo=UTC)
SECONDS = st.integers(0, 200).map(lambda tenths: START + timedelta(seconds=tenths / 10))
AMOUNTS = st.sampled_from([-10.0, -2.5, -0.01, 0.01, 2.5, 10.0])
FILLS = st.lists(st.tuples(SECONDS, AMOUNTS), max_size=20).map(
    lambda rows: [fill(at, amount) for at, amount in sorted(rows)]
)
MOVES = st.lists(st.tuples(SECONDS, AMOUNTS, st.booleans()), max_size=20).map(
    lambda rows: [Moved(at, "engine-1", by, expected) for at, by, expected in sorted(rows)]
)
REPORTS = st.lists(st.tuples(SECONDS, AMOUNTS), max_size=6).map(
    lambda rows: [Report(at, held, "positions", "") for at, held in sorted(rows)]
)


def fill(at: datetime, amount: float) -> Fill:
    name = f"fill {at:%H:%M:%S.%f}"
    return Fill(at, at, amount, name, "", "engine-1", False, name)


@given(FILLS, SECONDS, SECONDS)
def test_a_span_is_that_of_looking_at_each_row(
    fills: list[Fill], begin: datetime, end: datetime
) -> None:
    assert between(fills, begin, end) == [fill for fill in fills if begin <= fill.at <= end]


@given(FILLS, REPORTS)
def test_unrecorded_is_what_the_fills_between_two_reports_leave(
    fills: list[Fill], reports: list[Report]
) -> None:
    plainly = [
        (before.at, after, beyond)
        for before, after in itertools.pairwise(reports)
        if (
            beyond := round(
                after.position
                - before.position
                - sum(fill.amount for fill in fills if before.at < fill.at <= after.at),
                6,
            )
        )
    ]
    assert Market(reports=reports, fills=fills).unrecorded == plainly


@given(FILLS, MOVES)
def test_rolled_moves_have_no_fill_beside_them(fills: list[Fill], moves: list[Moved]) -> None:
    plainly = [
        move
        for move in moves
        if move.expected and not any(abs(move.at - fill.at) <= audit.REACHES for fill in fills)
    ]
    assert Market(fills=fills, moved=moves).rolled == plainly


@given(st.lists(AMOUNTS, max_size=12), st.sampled_from([0.01, 2.5, 5.0, 7.49, 10.0, 12.5]))
def test_fills_in_a_row_add_up_as_each_run_of_them_does(amounts: list[float], apart: float) -> None:
    plainly = any(
        abs(abs(sum(amounts[begin:end])) - apart) < evidence.SAME
        for begin, end in itertools.combinations(range(len(amounts) + 1), 2)
    )
    assert explain._adds_up(amounts, apart) is plainly
    assert explain._adds_up(amounts, -apart) is plainly


@pytest.mark.parametrize("apart", [float("nan"), float("inf"), float("-inf")])
def test_fills_never_add_up_to_what_is_no_number(apart: float) -> None:
    assert not explain._adds_up([10.0, -10.0], apart)


@given(FILLS, MOVES)
def test_each_move_follows_one_fill_and_the_closest_that_is_left(
    fills: list[Fill], moves: list[Moved]
) -> None:
    left, plainly = list(moves), []
    for fill in fills:
        near = [move for move in left if move.by == fill.amount]
        if near:
            closest = min(near, key=lambda move: abs(move.at - fill.at))
            plainly.append(closest.at - fill.at)
            left.remove(closest)
    assert list(evidence._followed(Market(fills=fills, moved=moves), "engine-1")) == plainly
    assert list(evidence._followed(Market(fills=fills, moved=moves), "another")) == []


def test_hundreds_of_breaks_with_many_fills_take_seconds() -> None:
    """Holding every move against every fill for each break, as it was, takes hours here."""
    many = evidence.MOST_ROWS
    moments = [START + timedelta(seconds=n * 0.3) for n in range(many)]
    market = Market(
        reports=[Report(at, 0.0, "positions", "") for at in moments[:: many // 20]],
        fills=[fill(at, 10.0 if n % 2 else -10.0) for n, at in enumerate(moments)],
        moved=[
            Moved(at + timedelta(seconds=1), "engine-1", 10.0 if n % 2 else -10.0, True)
            for n, at in enumerate(moments)
        ],
    )
    began = time.perf_counter()
    assert evidence.skew([market], "engine-1") is None
    cases = [case(market, moments[n * 40 % many]) for n in range(500)]
    explained = explain_all(cases)
    assert time.perf_counter() - began < 30
    assert {kind for kind, _ in explained} == {Kind.UNEXPLAINED}


def case(market: Market, at: datetime) -> Case:
    """A break of a second that nothing accounts for."""
    row = {
        "ts": at,
        "pos_filled": 3.33,
        "difference": 3.33,
        "snapshot_pos_filled": 0.0,
        "accounted_for": 0.0,
        "snapshot_age_s": 1.0,
        "engine_instance_id": "engine-1",
        "in_transit": 0.0,
    }
    return Case(
        check=audit.DIVERGENCE,
        market_ticker="KXMANY",
        first=at,
        last=at + timedelta(seconds=1),
        example=row,
        clearest=row,
        latest=row,
        over=True,
        newest=at + timedelta(hours=1),
        market=market,
        skew=timedelta(seconds=5),
        rolled=False,
        stale_after_s=660,
    )

"""A break is counted once while it lasts, has its cause as kind, and closes by itself."""

from __future__ import annotations

from typing import Any

import pytest

from kalshi_platform.inventory import audit, breaks
from kalshi_platform.inventory.audit import Parameters
from kalshi_platform.inventory.breaks import Break
from kalshi_platform.inventory.kinds import Kind
from kalshi_platform_tests.inventory.planted import Planted, ago


def only(planted: Planted, check: audit.Check) -> Break:
    (found,) = breaks.examine(planted.client, [check], Parameters())
    return found


def stored(planted: Planted, columns: str) -> list[tuple[Any, ...]]:
    rows = planted.client.query(
        f"SELECT {columns} FROM mm_inventory_breaks FINAL ORDER BY opened_at"
    ).result_rows
    return [tuple(row) for row in rows]


def test_a_break_stays_one_while_it_lasts_and_closes_by_itself(planted: Planted) -> None:
    planted.snapshot(ago(1000), 0)
    for second in range(10):
        planted.decision(ago(900 - second), filled=5)
    (first,) = breaks.update(planted.client, [audit.DIVERGENCE], Parameters())
    assert (first.findings, first.worst, first.closed_at) == (10, 5.0, None)
    planted.decision(ago(880), filled=8)
    (grown,) = breaks.update(planted.client, [audit.DIVERGENCE], Parameters())
    assert (grown.break_id, grown.opened_at) == (first.break_id, first.opened_at)
    assert (grown.findings, grown.worst, grown.age.total_seconds()) == (11, 8.0, 20.0)
    planted.decision(ago(870), filled=0)
    assert (
        len(breaks.update(planted.client, [audit.DIVERGENCE], Parameters())) == 1
    )  # not for long yet
    planted.decision(ago(800), filled=0)
    assert breaks.update(planted.client, [audit.DIVERGENCE], Parameters()) == []
    assert stored(planted, "break_id, closed_at") == [(first.break_id, ago(880))]
    planted.decision(ago(700), filled=5)
    (another,) = breaks.update(planted.client, [audit.DIVERGENCE], Parameters())
    assert another.break_id != first.break_id
    assert len(stored(planted, "break_id")) == 2


def test_looking_twice_writes_nothing_new(planted: Planted) -> None:
    planted.decision(ago(100), exposure=3, open_orders_count=0)
    breaks.update(planted.client, audit.CHECKS, Parameters())
    breaks.update(planted.client, audit.CHECKS, Parameters())
    rows = planted.client.query("SELECT count() FROM mm_inventory_breaks").result_rows
    assert rows == [(1,)]


def test_a_break_that_the_window_has_left_behind_is_closed(planted: Planted) -> None:
    planted.decision(ago(3000), exposure=3, open_orders_count=0)
    assert len(breaks.update(planted.client, audit.CHECKS, Parameters())) == 1
    assert breaks.update(planted.client, audit.CHECKS, Parameters(lookback_minutes=10)) == []
    assert stored(planted, "closed_at") == [(ago(3000),)]


def test_timing_ends_with_its_bound_while_the_difference_lasts(planted: Planted) -> None:
    planted.snapshot(ago(200), 0)
    planted.decision(ago(130), filled=0)
    planted.fill(ago(100), 5)
    for second in range(5, 20):
        planted.decision(ago(100 - second), filled=0)
    assert only(planted, audit.DIVERGENCE).kind == Kind.TIMING
    for second in range(20, 60):
        planted.decision(ago(100 - second), filled=0)
    found = only(planted, audit.DIVERGENCE)
    assert (found.kind, found.closed_at) == (Kind.MISSING_FILL, None)


@pytest.mark.parametrize("recorded", [0.0, 4.0])
def test_a_snapshot_without_its_fills_is_a_missing_fill(planted: Planted, recorded: float) -> None:
    planted.snapshot(ago(300), 2)
    if recorded:
        planted.fill(ago(250), recorded, fill_id="one")
        planted.fill(ago(250), recorded, fill_id="one")  # recorded twice, filled once
    planted.snapshot(ago(200), 12)
    planted.decision(ago(190), filled=2 + recorded)
    found = only(planted, audit.DIVERGENCE)
    assert found.kind == Kind.MISSING_FILL
    assert f"fills of {10 - recorded:g} were never recorded" in found.explanation


def test_a_recorded_fill_not_counted_is_a_missing_fill(planted: Planted) -> None:
    planted.snapshot(ago(300), 2)
    planted.fill(ago(250), 10)
    planted.snapshot(ago(200), 12)
    planted.decision(ago(190), filled=2)
    found = only(planted, audit.DIVERGENCE)
    assert found.kind == Kind.MISSING_FILL
    assert "recorded fills of 10 are not in pos_filled" in found.explanation


def test_the_other_sign_is_a_wrong_convention(planted: Planted) -> None:
    planted.snapshot(ago(300), -7)
    planted.decision(ago(290), filled=7, inv_convention="no_positive")
    found = only(planted, audit.DIVERGENCE)
    assert found.kind == Kind.WRONG_CONVENTION
    assert "no_positive" in found.explanation


def test_a_divergence_that_passes_at_once_is_timing(planted: Planted) -> None:
    planted.snapshot(ago(300), 4)
    planted.decision(ago(299), filled=0)
    planted.decision(ago(298), filled=4)
    planted.decision(ago(200), filled=4)
    found = only(planted, audit.DIVERGENCE)
    assert (found.kind, found.closed_at) == (Kind.TIMING, ago(299))


@pytest.mark.parametrize(
    ("action_at", "answered", "kind"),
    [
        (None, False, Kind.UNEXPLAINED),
        (99.5, False, Kind.UNEXPLAINED),  # an action of another amount explains nothing
        (None, True, Kind.UNKNOWN_ORDER),
    ],
)
def test_a_drift_is_timing_an_unknown_order_or_unexplained(
    planted: Planted, action_at: float | None, answered: bool, kind: str
) -> None:
    planted.decision(ago(100.9), exposure=0)
    planted.decision(ago(100.1), exposure=5)
    if action_at is not None:
        planted.action(ago(action_at))
    if answered:
        planted.response(ago(100.5))
    assert only(planted, audit.DRIFT).kind == kind


def test_an_explanation_names_block_request_and_rejection(planted: Planted) -> None:
    planted.action(ago(101), action_id="a-1", request_json='{"client_order_id":"x-7"}')
    planted.response(
        ago(100.9), action_id="a-1", client_order_id="x-7", reject_reason="post_only_cross"
    )
    planted.decision(ago(100), exposure=5, open_orders_count=0, block_codes=["max_long"], allowed=0)
    found = only(planted, audit.EXPOSURE)
    assert found.kind == Kind.UNKNOWN_ORDER
    for named in (
        "max_long",
        '{"client_order_id":"x-7"}',
        "order x-7 was rejected: post_only_cross",
    ):
        assert named in found.explanation
    assert found.explanation.count("\n") == 0


def test_exposure_unlike_the_resting_sizes_is_an_unknown_order(planted: Planted) -> None:
    planted.action(ago(101))
    planted.decision(ago(100), filled=2, exposure=3, pos_open_exposure=9, pos_total_est=5)
    found = only(planted, audit.IDENTITY)
    assert found.kind == Kind.UNKNOWN_ORDER
    planted.decision(ago(10), filled=2, exposure=0, pos_total_est=4)
    kinds = [each.kind for each in breaks.examine(planted.client, [audit.IDENTITY], Parameters())]
    assert kinds == [Kind.UNKNOWN_ORDER, Kind.UNEXPLAINED]


def test_a_stale_snapshot_begins_with_the_last_one(planted: Planted) -> None:
    planted.snapshot(ago(2000), 0)
    planted.decision(ago(2000))
    planted.decision(ago(100))
    found = only(planted, audit.FRESH)
    assert (found.kind, found.opened_at) == (Kind.STALE_SNAPSHOT, ago(2000))
    (first,) = breaks.update(planted.client, [audit.FRESH], Parameters())
    planted.decision(ago(50))
    (again,) = breaks.update(planted.client, [audit.FRESH], Parameters())
    assert (again.break_id, again.worst) == (first.break_id, 1950.0)
    planted.snapshot(ago(40), 0)
    assert breaks.update(planted.client, [audit.FRESH], Parameters()) == []
    assert len(stored(planted, "break_id")) == 1

"""Each check finds its own fault at every size beyond its threshold, and nothing short of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from kalshi_platform.inventory import audit
from kalshi_platform.inventory.audit import Check, Parameters, Status
from kalshi_platform_tests.inventory.planted import TICKER, Planted, ago


def total(planted: Planted, check: Check, **parameters: object) -> int:
    """How many rows the check finds."""
    (outcome,) = audit.sweep(planted.client, [check], Parameters(**parameters))  # type: ignore[arg-type]
    assert outcome.status is not Status.SKIPPED, outcome.notice
    return outcome.total


def held(
    planted: Planted,
    check: Check,
    cases: Sequence[tuple[float, int]],
    plant: Callable[[float, str], None],
    **parameters: object,
) -> None:
    """Plant each case in a market of its own, and hold the rows that the check finds there against its number.

    They are looked at side by side: for a handful of rows, reading its SQL takes the engine most of a second.
    """
    for n, (value, _) in enumerate(cases):
        plant(value, f"{TICKER}-{n}")
    (outcome,) = audit.sweep(planted.client, [check], Parameters(**parameters))  # type: ignore[arg-type]
    assert outcome.status is not Status.SKIPPED, outcome.notice
    assert len(outcome.rows) == outcome.total, "the limit cut the rows"
    at = outcome.columns.index("market_ticker")
    found = Counter(row[at] for row in outcome.rows)
    assert [(value, found[f"{TICKER}-{n}"]) for n, (value, _) in enumerate(cases)] == list(cases)
    assert found.total() == sum(number for _, number in cases)


# -- A -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", ["first", "second"])
def test_each_test_has_empty_tables(planted: Planted, turn: str) -> None:
    assert planted.client.query("SELECT count() FROM mm_decisions").first_row == (0,), turn
    planted.decision(ago(100))


def test_a_drift_within_a_second_is_found_from_the_threshold_on(planted: Planted) -> None:
    def plant(moved: float, ticker: str) -> None:
        planted.decision(ago(100.9), exposure=7.3, market_ticker=ticker)
        planted.decision(ago(100.2), exposure=7.3 + moved, market_ticker=ticker)

    cases = [(0.01, 0), (0.99, 0), (1.0, 1), (1.01, 1), (-1.0, 1), (-0.99, 0), (250, 1)]
    held(planted, audit.DRIFT, cases, plant)


@pytest.mark.parametrize(("moved", "found"), [(0.99, 0), (1.0, 1), (-3.5, 1)])
def test_a_drift_since_the_last_decision_counts_from_the_threshold(
    planted: Planted, moved: float, found: int
) -> None:
    planted.decision(ago(100), exposure=0.1)
    planted.decision(ago(97), exposure=0.1 + moved)
    assert total(planted, audit.DRIFT) == found
    assert total(planted, audit.DRIFT, drift_threshold=abs(moved) + 0.01) == 0


def test_a_spike_that_returns_within_the_second_is_a_drift(planted: Planted) -> None:
    for after, exposure in ((0.1, 0.0), (0.4, 5.0), (0.7, 0.0)):
        planted.decision(ago(100 - after), exposure=exposure)
    assert total(planted, audit.DRIFT) == 1


def test_an_action_up_to_its_buckets_end_explains_a_drift(
    planted: Planted,
) -> None:
    def plant(action_at: float, ticker: str) -> None:
        planted.decision(ago(100.5), exposure=0, market_ticker=ticker)
        planted.decision(ago(95.5), exposure=5, market_ticker=ticker)
        planted.action(ago(action_at), market_ticker=ticker)

    cases = [
        (100.9, 0),  # an earlier moment of the second of the decision before
        (98.5, 0),  # in between
        (95.01, 0),  # in the bucket, even after the decision
        (94.99, 1),  # a second too late
        (101.01, 1),  # the second before the decision before
    ]
    held(planted, audit.DRIFT, cases, plant, strict_runbook=True)


def test_an_action_explains_a_drift_of_its_own_amount(planted: Planted) -> None:
    def plant(size: float, ticker: str) -> None:
        of = {"action_id": f"a-{size}", "market_ticker": ticker}
        planted.decision(ago(100.5), exposure=0, market_ticker=ticker)
        planted.action(ago(98), size=size, **of)
        planted.response(ago(97.9), **of)
        planted.decision(ago(95.5), exposure=5, market_ticker=ticker)

    held(planted, audit.DRIFT, [(5, 0), (5.99, 0), (6, 1), (4, 1), (10, 1)], plant)


def test_exposure_that_creeps_below_the_threshold_is_a_drift(planted: Planted) -> None:
    for second in range(5):
        planted.decision(ago(100.5 - second), exposure=0.9 * second)
    assert total(planted, audit.DRIFT) == 3


def test_an_order_is_counted_until_the_exchanges_word_of_its_end(planted: Planted) -> None:
    planted.action(ago(100.2), action_id="a-1", client_order_id="o-1")
    planted.decision(ago(100.5), exposure=0)
    planted.decision(ago(99.5), exposure=10)
    planted.response(ago(90), action_id="a-1", client_order_id="o-1", status="canceled")
    planted.decision(ago(90.5), exposure=10)
    planted.decision(ago(89.1), exposure=0)
    assert total(planted, audit.DRIFT) == 0
    planted.decision(ago(88.1), exposure=10)
    assert total(planted, audit.DRIFT) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_position_that_is_no_number_is_found(planted: Planted, value: float) -> None:
    planted.decision(ago(100.5), filled=3)
    planted.decision(ago(99.5), filled=3, pos_filled=value)
    planted.snapshot(ago(110), 3)
    assert total(planted, audit.DIVERGENCE) == 1
    assert total(planted, audit.IDENTITY) == 1


def test_a_fill_counts_from_the_snapshot_on_once(planted: Planted) -> None:
    planted.snapshot(ago(100), 2)
    planted.fill(ago(80), 5, fill_id="f-1", engine_instance_id="engine-1")
    planted.fill(ago(80), 5, fill_id="f-1", engine_instance_id="engine-2")
    planted.decision(ago(70), filled=7)
    assert total(planted, audit.DIVERGENCE) == 0
    assert total(planted, audit.DIVERGENCE, strict_runbook=True) == 1
    assert total(planted, audit.DIVERGENCE, snapshot="latest") == 1
    planted.decision(ago(69), filled=12)
    assert total(planted, audit.DIVERGENCE) == 1


def test_an_action_of_another_market_explains_nothing(planted: Planted) -> None:
    planted.decision(ago(100.5), exposure=0)
    planted.decision(ago(95.5), exposure=5)
    planted.action(ago(98), market_ticker="ANOTHER")
    assert total(planted, audit.DRIFT) == 1


def test_a_fill_is_no_drift(planted: Planted) -> None:
    planted.action(ago(101))
    planted.decision(ago(100), filled=0, exposure=10)
    planted.decision(ago(90), filled=4, exposure=6)
    planted.decision(ago(80), filled=10, exposure=0)
    assert total(planted, audit.DRIFT) == 0


def test_the_last_decision_may_lie_before_the_window(planted: Planted) -> None:
    planted.decision(ago(3 * 3600), exposure=0)
    planted.decision(ago(60), exposure=5)
    assert total(planted, audit.DRIFT, lookback_minutes=120) == 1
    planted.action(ago(2.5 * 3600), size=5)
    assert total(planted, audit.DRIFT, lookback_minutes=120) == 0


# -- B -----------------------------------------------------------------------------------------


def test_exposure_without_an_order_is_found_beyond_epsilon(planted: Planted) -> None:
    def plant(exposure: float, ticker: str) -> None:
        for age, orders in ((50, 0), (40, 1)):
            planted.decision(
                ago(age), exposure=exposure, open_orders_count=orders, market_ticker=ticker
            )

    cases = [(0.0, 0), (0.01, 0), (-0.01, 0), (0.02, 1), (-0.02, 1), (40, 1)]
    held(planted, audit.EXPOSURE, cases, plant)


# -- C -----------------------------------------------------------------------------------------


def test_a_divergence_is_found_from_the_threshold_on(planted: Planted) -> None:
    def plant(apart: float, ticker: str) -> None:
        planted.snapshot(ago(60), -3.2, market_ticker=ticker)
        planted.decision(ago(50), filled=-3.2 + apart, market_ticker=ticker)

    cases = [(0, 0), (0.49, 0), (0.5, 1), (-0.5, 1), (-0.49, 0), (12, 1)]
    held(planted, audit.DIVERGENCE, cases, plant)


def test_a_decision_is_held_against_the_snapshot_at_or_before_it(planted: Planted) -> None:
    planted.snapshot(ago(4 * 3600), 1)
    planted.decision(ago(70), filled=1)
    planted.fill(ago(65), 1)
    planted.snapshot(ago(60), 2)
    planted.decision(ago(60), filled=2)
    planted.fill(ago(55), 7)
    planted.snapshot(ago(50), 9)
    assert total(planted, audit.DIVERGENCE) == 0
    assert total(planted, audit.DIVERGENCE, snapshot="latest") == 2


def test_a_decision_before_any_snapshot_is_not_judged(planted: Planted) -> None:
    planted.decision(ago(70), filled=1)
    planted.snapshot(ago(60), 9)
    assert total(planted, audit.DIVERGENCE) == 0


# -- the checks of the UI ------------------------------------------------------------------------


def test_the_identity_holds_up_to_epsilon(planted: Planted) -> None:
    def plant(off: float, ticker: str) -> None:
        planted.decision(
            ago(50), filled=5, exposure=-2.1, pos_total_est=2.9 + off, market_ticker=ticker
        )

    held(planted, audit.IDENTITY, [(0, 0), (0.01, 0), (0.02, 1), (-0.02, 1), (8, 1)], plant)


@pytest.mark.parametrize(
    ("expected", "filled", "found"),
    [
        (5.0, 0.0, 1),  # expected five, computes five, holds nothing
        (-5.0, 0.0, 1),
        (0.5, 0.0, 1),
        (0.49, 0.0, 0),  # below the threshold
        (5.0, 5.0, 0),  # the expectation came true
        (0.0, 3.0, 1),  # expected to be flat, computes flat, holds three
    ],
)
def test_inventory_that_follows_the_estimate_is_found(
    planted: Planted, expected: float, filled: float, found: int
) -> None:
    planted.decision(ago(60), filled=filled, inv_before=filled, inv_after_est=expected)
    planted.decision(ago(50), filled=filled, inv_before=expected, inv_after_est=expected)
    assert total(planted, audit.ROLLED) == found


def test_a_roll_is_found_for_as_long_as_it_lasts(planted: Planted) -> None:
    planted.decision(ago(60), filled=0, inv_before=0, inv_after_est=5)
    for second in range(10):
        planted.decision(ago(50 - second), filled=0, inv_before=5, inv_after_est=5)
    assert total(planted, audit.ROLLED) == 10


def test_an_engine_with_zero_inventory_columns_rolls_nothing(
    planted: Planted,
) -> None:
    for second in range(3):
        planted.decision(ago(60 - second), filled=5, inv_before=0, inv_after_est=0)
    assert total(planted, audit.ROLLED) == 0


def test_a_snapshot_is_stale_after_eleven_minutes(planted: Planted) -> None:
    def plant(age: float, ticker: str) -> None:
        planted.snapshot(ago(age), 0, market_ticker=ticker)
        planted.decision(ago(6000), filled=0, market_ticker=ticker)
        planted.decision(ago(0), filled=0, market_ticker=ticker)

    held(planted, audit.FRESH, [(10, 0), (660, 0), (661, 1), (5000, 1)], plant)


def test_an_engine_that_has_just_begun_needs_no_snapshot_yet(planted: Planted) -> None:
    planted.decision(ago(600))
    planted.decision(ago(0))
    assert total(planted, audit.FRESH) == 0
    planted.decision(ago(700))
    assert total(planted, audit.FRESH) == 1


# -- around the checks ---------------------------------------------------------------------------


def test_decisions_from_before_the_migration_are_not_audited(planted: Planted) -> None:
    planted.client.command(
        "INSERT INTO mm_decisions (ts, decision_id, market_ticker, inv_before, inv_after_est)"
        f" SELECT now64(3) - 100, generateUUIDv4(), '{TICKER}', 0, 0"
    )
    planted.decision(ago(50), filled=8)
    for outcome in audit.sweep(planted.client, audit.RUNBOOK[:2], Parameters()):
        assert outcome.status is Status.CLEAR
        assert outcome.notice.startswith("1 decisions have no position columns")


def test_without_a_market_maker_every_check_says_so_calmly(planted: Planted) -> None:
    for outcome in audit.sweep(planted.client, audit.CHECKS, Parameters()):
        assert outcome.status is Status.SKIPPED
        assert outcome.notice.startswith(
            "no decisions in the last 120 minutes: mm_decisions is empty"
        )
    planted.client.command("DROP TABLE mm_decisions")
    for outcome in audit.sweep(planted.client, audit.CHECKS, Parameters()):
        assert outcome.status is Status.SKIPPED
        assert "there is no table mm_decisions" in outcome.notice

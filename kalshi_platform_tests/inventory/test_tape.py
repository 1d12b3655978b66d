"""The public tape distinguishes an invented fill from one that another's trade has offset."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from kalshi_platform.inventory import audit, breaks, tables
from kalshi_platform.inventory.audit import Parameters
from kalshi_platform.inventory.breaks import Break
from kalshi_platform.inventory.kinds import Kind
from kalshi_platform_tests.inventory.planted import Planted, ago

EITHER = "the public tape does not say"


def undone(planted: Planted, **fill: str) -> None:
    """A fill of 2, and a report that has nothing of it."""
    planted.snapshot(ago(600), 0)
    planted.decision(ago(590), filled=0)
    planted.fill(ago(500), 2, **fill)
    for second in range(499, 250, -20):
        planted.decision(ago(second), filled=2)
    planted.snapshot(ago(300), 0)


def diverged(planted: Planted) -> Break:
    (found,) = breaks.examine(planted.client, [audit.DIVERGENCE], Parameters())
    return found


@pytest.mark.parametrize(
    "fill",
    [
        {"fill_id": "trade-1"},
        {"fill_id": "fill-1", "raw_json": json.dumps({"trade_id": "trade-1"})},
    ],
)
def test_a_fill_that_is_on_the_tape_was_not_invented(
    planted: Planted, fill: dict[str, str]
) -> None:
    undone(planted, **fill)
    planted.trade(ago(500), "trade-1")
    planted.trade(ago(400), "of another")
    found = diverged(planted)
    assert found.kind == Kind.MISSING_FILL
    assert "fills of -2 were never recorded" in found.explanation


def test_a_fill_that_the_tape_lacks_beside_others_was_invented(planted: Planted) -> None:
    undone(planted, fill_id="trade-1")
    planted.fill(ago(550), 5, fill_id="trade-0")
    planted.fill(ago(540), -5, fill_id="trade-00")
    planted.trade(ago(550), "trade-0")
    planted.trade(ago(540), "trade-00")
    planted.trade(ago(450), "of another")
    found = diverged(planted)
    assert found.kind == Kind.INVENTED_FILL
    assert "fill trade-1 of 2 was recorded" in found.explanation
    assert "nor has the public tape" in found.explanation


@pytest.mark.parametrize("taped", [(550, 540), (450, 440)])
def test_a_tape_that_does_not_cover_a_fill_proves_nothing(
    planted: Planted, taped: tuple[int, int]
) -> None:
    undone(planted, fill_id="trade-1")
    for second, signed in zip(taped, (5, -5), strict=True):
        planted.fill(ago(second), signed, fill_id=f"taped {second}")
        planted.trade(ago(second), f"taped {second}")
    found = diverged(planted)
    assert found.kind == Kind.INVENTED_FILL
    assert EITHER in found.explanation


def test_a_tape_with_other_ids_proves_nothing(planted: Planted) -> None:
    undone(planted, fill_id="number 1 of the engine's own")
    planted.trade(ago(550), "of another")
    planted.trade(ago(450), "of another, too")
    found = diverged(planted)
    assert found.kind == Kind.INVENTED_FILL
    assert EITHER in found.explanation


def test_a_tape_with_a_gap_proves_nothing(planted: Planted) -> None:
    undone(planted, fill_id="trade-1")
    for second, signed in ((550, 5), (540, -5)):
        planted.fill(ago(second), signed, fill_id=f"taped {second}")
        planted.trade(ago(second), f"taped {second}")
    planted.trade(ago(450), "of another")
    assert "nor has the public tape" in diverged(planted).explanation
    planted.event(ago(480), "recovered", {"trades": 0, "missing": 3, "reason": ""})
    assert "nor has the public tape" in diverged(planted).explanation
    planted.event(ago(480), "recovered", {"trades": 0, "missing": 3, "reason": "HTTP 503"})
    assert EITHER in diverged(planted).explanation


def test_the_tape_of_another_market_is_no_evidence(planted: Planted) -> None:
    undone(planted, fill_id="trade-1")
    planted.trade(ago(500), "trade-1", market_ticker="KXANOTHER")
    assert diverged(planted).kind == Kind.INVENTED_FILL


def nothing(_: Planted) -> None:
    """The market was not followed."""


def gone(planted: Planted) -> None:
    planted.client.command("RENAME TABLE trades TO trades_aside")


def foreign(planted: Planted) -> None:
    gone(planted)
    planted.client.command("CREATE TABLE trades (trade_id String) ENGINE = MergeTree ORDER BY ()")


@pytest.fixture
def own_tape(planted: Planted) -> Iterator[Planted]:
    """A database whose tape the test may replace; afterwards it is as before."""
    yield planted
    if planted.client.command("EXISTS TABLE trades_aside"):
        planted.client.command("DROP TABLE IF EXISTS trades SYNC")
        planted.client.command("RENAME TABLE trades_aside TO trades")


@pytest.mark.parametrize("tape", [nothing, gone, foreign])
def test_without_the_tape_the_sentence_says_it_may_be_either(
    own_tape: Planted, tape: Callable[[Planted], None]
) -> None:
    tape(own_tape)
    assert (tables.TAPE in tables.usable(own_tape.client)) == (tape is nothing)
    undone(own_tape, fill_id="trade-1")
    found = diverged(own_tape)
    assert found.kind == Kind.INVENTED_FILL
    assert EITHER in found.explanation

"""A short campaign: `make chaos` runs the long one."""

from __future__ import annotations

import pytest

from kalshi_platform_tests.chaos.campaign import report, run
from kalshi_platform_tests.chaos.up import folder as temporary


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_any_kills_lose_and_double_nothing() -> None:
    said: list[str] = []
    with temporary("chaos-") as folder:
        outcome = run(folder, count=5, seed=11, rate=600.0, only="kill", say=said.append)
    assert outcome.sound, (said, outcome)
    assert outcome.proof.frames > 2_000
    assert "journalled frames lost | 0" in report(outcome, 600.0, 11)

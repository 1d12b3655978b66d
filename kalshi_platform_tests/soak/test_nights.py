"""Some pairs of faults, with every time shortened: `make nights` has the times as they are."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kalshi_platform_tests.soak.nights import PAIRS, SHORT, run


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_faults_at_a_time_are_each_reported_once_and_closed(
    tmp_path: Path, clickhouse_url: str
) -> None:
    lines: list[str] = []
    pairs = random.Random(4).sample(PAIRS, 2)
    found = run(tmp_path, clickhouse_url, pairs, SHORT, seed=4, say=lines.append)
    assert [night for night in found if not night.sound] == [], lines

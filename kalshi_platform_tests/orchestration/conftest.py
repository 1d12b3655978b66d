"""A real Dagster instance for each test, and a platform whose streamer does what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from kalshi_platform_tests.orchestration.stand_in import StandInPlatform


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    """An instance that goes with the test."""
    with dg.DagsterInstance.ephemeral() as made:
        yield made


@pytest.fixture
def platform(tmp_path: Path) -> StandInPlatform:
    """The platform on a data folder of its own, with nothing prepared."""
    for prepared in (StandInPlatform.streamers, StandInPlatform.hours, StandInPlatform.rebuilt):
        prepared.clear()
    return StandInPlatform(
        overrides={"kalshi_data_dir": str(tmp_path / "data"), "use_clickhouse": "0"}
    )

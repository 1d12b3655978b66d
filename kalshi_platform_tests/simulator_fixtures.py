"""pytest plugin (named in conftest.py): fixtures that start an exchange simulator for a test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kalshi_platform.simulator.catalog import Slot
from kalshi_platform.simulator.config import SimulatorConfig
from kalshi_platform.simulator.server import Simulator, running

StartSimulator = Callable[..., Simulator]


def long_lives(rolling_markets: int, margin_s: int = 120) -> float:
    """A lifetime in seconds with which no rolling market opens or closes within some minutes of now.

    Rolling markets follow the wall clock; a test that does not expect a change must not see one by chance.
    """
    now_ns = time.time_ns()
    for lifetime_s in range(600, 14_400, 60):
        slots = [Slot(i, rolling_markets, lifetime_s * 10**9) for i in range(rolling_markets)]
        ages_s = [(now_ns - slot.opening_at_or_before(now_ns)) / 10**9 for slot in slots]
        if all(margin_s < age_s < lifetime_s - margin_s for age_s in ages_s):
            return float(lifetime_s)
    raise AssertionError(f"no lifetime suits {rolling_markets} rolling markets at {now_ns} ns")


@pytest.fixture(scope="session")
def simulator_key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One key for all simulators of the session, since generating an RSA key is slow."""
    return tmp_path_factory.mktemp("simulator") / "key.pem"


@pytest.fixture
def start_simulator(simulator_key_file: Path) -> Iterator[StartSimulator]:
    """Start simulators with any fields of `SimulatorConfig`; they stop when the test ends.

    Markets roll during the test only if it gives `rolling_seconds`.
    """
    with ExitStack() as stack:

        def start(**config: Any) -> Simulator:
            config.setdefault("key_file", simulator_key_file)
            asked = SimulatorConfig(**config)
            if "rolling_seconds" not in config:
                asked = replace(asked, rolling_seconds=long_lives(asked.rolling))
            return stack.enter_context(running(asked))

        yield start


@pytest.fixture
def simulator(start_simulator: StartSimulator) -> Simulator:
    """A simulator with default settings."""
    return start_simulator()

"""pytest fixtures: an exchange of one's own for a test. A plugin; conftest.py names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from kalshi_platform.simulator.config import SimulatorConfig
from kalshi_platform.simulator.server import Simulator, running

StartSimulator = Callable[..., Simulator]


@pytest.fixture(scope="session")
def simulator_key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One key for all simulators of the session: making an RSA key takes a moment."""
    return tmp_path_factory.mktemp("simulator") / "key.pem"


@pytest.fixture
def start_simulator(simulator_key_file: Path) -> Iterator[StartSimulator]:
    """Start simulators with any fields of `SimulatorConfig`; they stop with the test."""
    with ExitStack() as stack:

        def start(**config: Any) -> Simulator:
            config.setdefault("key_file", simulator_key_file)
            return stack.enter_context(running(SimulatorConfig(**config)))

        yield start


@pytest.fixture
def simulator(start_simulator: StartSimulator) -> Simulator:
    """A simulator with the defaults."""
    return start_simulator()

"""A few hundred inputs of each fuzzed thing, the same in every run. `make fuzz` goes on for minutes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kalshi_platform_tests.fuzz.targets import TARGETS

EXAMPLES = {"http": 60, "sql": 300}


@st.composite
def inputs(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed with some bytes changed, or bytes of no origin."""
    data = bytearray(draw(st.sampled_from(seeds) | st.binary(max_size=200)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(at + draw(st.integers(0, 3)), len(data))
        data[at:end] = draw(st.binary(max_size=3))
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_what_a_fuzzed_thing_promises_holds(name: str) -> None:
    target = TARGETS[name]
    with target.open() as run:
        for seed in target.seeds:
            run(seed)

        @settings(
            max_examples=EXAMPLES.get(name, 200),
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(data=inputs(list(target.seeds)))
        def holds(data: bytes) -> None:
            run(data)

        holds()

"""Waits double up to a limit, for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform import backoff


def test_waits_double_up_to_the_longest() -> None:
    assert [backoff.wait_s(n, 0.5, 3.0) for n in range(1, 6)] == [0.5, 1.0, 2.0, 3.0, 3.0]


@given(st.integers(1, 10**9))
def test_no_number_of_failures_exceeds_the_longest_wait(failures: int) -> None:
    assert backoff.wait_s(failures, 0.5, 30.0) <= 30.0

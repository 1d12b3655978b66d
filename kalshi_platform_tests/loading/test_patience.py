"""How long a loader waits before it retries."""

from __future__ import annotations

import tenacity

from kalshi_platform.errors import StoreError, StoreRefused, StoreUnavailable
from kalshi_platform.loading import loader


def waits(error: StoreError, attempts: int) -> list[float]:
    found = []
    for number in range(1, attempts + 1):
        attempt = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
        attempt.attempt_number = number
        attempt.set_exception((type(error), error, None))
        found.append(loader._retry_wait_s(attempt))
    return found


def test_a_refusing_store_is_retried_soon_then_rarely() -> None:
    """At the first start of `up` the tables are created while the streamer starts."""
    found = waits(StoreRefused("There is no such table."), 12)
    assert sum(found[:4]) < 10
    assert found == sorted(found)
    assert found[-1] == loader.REFUSED_RETRY_S


def test_an_unreachable_store_is_retried_often() -> None:
    assert max(waits(StoreUnavailable("ClickHouse is away."), 12)) <= 10

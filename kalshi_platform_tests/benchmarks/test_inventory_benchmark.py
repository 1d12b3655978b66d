"""The decisions that the audit is timed on are a healthy market maker's, but for what is planted."""

from __future__ import annotations

from contextlib import closing

import pytest

from kalshi_platform.clickhouse.client import connect
from kalshi_platform.inventory import audit, judged
from kalshi_platform.inventory.audit import Parameters, Status
from kalshi_platform_tests.benchmarks import inventory
from kalshi_platform_tests.clickhouse.tables import settings_for


@pytest.mark.parametrize("wrong_every", [2, 0])
def test_something_is_wrong_where_it_is_planted_and_nowhere_else(
    clickhouse_url: str, clickhouse_database: str, wrong_every: int
) -> None:
    settings = settings_for(clickhouse_url, clickhouse_database)
    inventory.prepared(settings, 20_000, markets=8, wrong_every=wrong_every)
    with closing(connect(settings)) as client:
        start = audit.since(client, Parameters())
        seen = judged.look(client, Parameters(), start)
        found = audit.sweep(client, audit.CHECKS, Parameters(), start=start)
    assert (seen.decisions, len(seen.markets), len(seen.deciders)) == (20_000, 8, 2)
    assert seen.cautions() == []
    anomalous = {outcome.check for outcome in found if outcome.status is not Status.CLEAR}
    planted = {audit.EXPOSURE, audit.DIVERGENCE, audit.IDENTITY, audit.ROLLED, audit.DRIFT}
    assert anomalous == (planted if wrong_every else set())

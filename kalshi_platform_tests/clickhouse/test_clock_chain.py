"""infra/queries/clock_chain.sql: what the exchange's clocks prove across gaps and connections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kalshi_platform.clickhouse import queries
from kalshi_platform.clickhouse.client import Client
from kalshi_platform.schema import ORDERBOOK_EVENTS, STREAM_EVENTS
from kalshi_platform_tests.clickhouse.tables import insert, migrated
from kalshi_platform_tests.loading.test_market_clocks import THREE, Model, built


@pytest.fixture
def client(clickhouse_url: str, clickhouse_database: str) -> Iterator[Client]:
    """A client of a migrated database."""
    with migrated(clickhouse_url, clickhouse_database) as client:
        yield client


def chain(client: Client) -> list[dict[str, Any]]:
    answer = client.query(queries.text("clock_chain"))
    return [dict(zip(answer.column_names, row, strict=True)) for row in answer.result_rows]


def test_the_chain_shows_per_market_where_nothing_was_missed(client: Client) -> None:
    model = Model()
    model.run([("snapshot", 0)] * 3)
    model.act("A-1", THREE, 1)
    model.disconnect()
    model.act("B-2", THREE[:1], 4)  # while no connection is open
    model.run([])
    rows, _ = built(model.records)
    for dataset in (ORDERBOOK_EVENTS, STREAM_EVENTS):
        table = rows[0].tables[dataset.name]
        insert(client, dataset, table.to_pylist())
    links = {row["market_ticker"]: row for row in chain(client)}
    found = {t: (r["link"], r["after"], r["clock"], bool(r["unchanged"])) for t, r in links.items()}
    assert found == {
        "A-1": ("same", 1, 1, True),
        "B-2": ("higher", 0, 4, False),
        "C-3": ("same", 0, 0, True),
    }
    assert not any(row["same_connection"] for row in links.values())

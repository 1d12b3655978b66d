"""A short way to ask the shared server something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

Ask = Callable[..., httpx.Response]


@pytest.fixture(scope="session")
def web() -> Iterator[httpx.Client]:
    """One client for all requests: making one costs more than most requests."""
    with httpx.Client(timeout=60, verify=False) as client:  # plain HTTP: no certificates to load
        yield client


@pytest.fixture
def ask(web: httpx.Client, clickhouse_url: str, clickhouse_database: str) -> Ask:
    """`ask(sql, data, **params)`: POST to the shared server, in the test's own database."""

    def post(sql: str, data: Any = None, headers: Any = None, **params: str) -> httpx.Response:
        options = {"database": clickhouse_database, **params}
        if data is None:
            return web.post(clickhouse_url, params=options, content=sql, headers=headers)
        options["query"] = sql
        return web.post(clickhouse_url, params=options, content=data, headers=headers)

    return post

"""A short way to ask the shared server something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest

Ask = Callable[..., httpx.Response]


@pytest.fixture
def ask(clickhouse_url: str, clickhouse_database: str) -> Ask:
    """`ask(sql, data, **params)`: POST to the shared server, in the test's own database."""

    def post(sql: str, data: Any = None, headers: Any = None, **params: str) -> httpx.Response:
        options = {"database": clickhouse_database, **params}
        if data is None:
            return httpx.post(
                clickhouse_url, params=options, content=sql, headers=headers, timeout=60
            )
        options["query"] = sql
        return httpx.post(clickhouse_url, params=options, content=data, headers=headers, timeout=60)

    return post

"""Fixtures to query the shared server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

Ask = Callable[..., httpx.Response]
FOR_EVER = "SELECT sum(cityHash64(number)) FROM numbers(1000000000000) SETTINGS max_threads = 1"
PATIENCE_S = 60.0
"""Timeout of a short operation on a busy machine."""


def running_now(ask: Ask, mark: str) -> int:
    """The number of running queries with this log comment, or INSERTs with it in their text, without parser queries."""
    query = (
        "SELECT count() FROM system.processes WHERE Settings['log_comment'] = {mark:String}"
        " OR query_kind = 'Insert' AND position(query, {mark:String}) > 0"
    )
    return int(ask(query, param_mark=mark).text)


def wait_until_running(ask: Ask, mark: str, count: int) -> None:
    """Wait until that many of them run."""
    deadline = time.monotonic() + PATIENCE_S
    while running_now(ask, mark) != count:
        assert time.monotonic() < deadline, f"never {count} of the queries running"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def web() -> Iterator[httpx.Client]:
    """One client for all requests, since creating one costs more than most requests."""
    with httpx.Client(timeout=60, verify=False) as client:  # plain HTTP: no certificates to load
        yield client


@pytest.fixture
def ask(web: httpx.Client, clickhouse_url: str, clickhouse_database: str) -> Ask:
    """`ask(sql, data, **params)`: POST to the shared server in the test's own database."""

    def post(sql: str, data: Any = None, headers: Any = None, **params: str) -> httpx.Response:
        options = {"database": clickhouse_database, **params}
        if data is None:
            return web.post(clickhouse_url, params=options, content=sql, headers=headers)
        options["query"] = sql
        return web.post(clickhouse_url, params=options, content=data, headers=headers)

    return post

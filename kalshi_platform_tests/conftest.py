"""Fixtures that every room's tests share: one embedded ClickHouse, and a fresh database in it."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from kalshi_platform.embedded_clickhouse import running
from kalshi_platform_tests.clickhouse import two_shards

# Partitions are defined when Dagster's definitions are imported: they must begin before any test's hour.
os.environ["ARCHIVE_BEGINS"] = "2025-11-01"

# A test, and a program that it starts, uses its current folder, never this checkout's `.env` and data.
os.environ["KALSHI_HOME"] = "."

# A shell starts background jobs with SIGINT ignored. Dagster handles SIGTERM the same way as SIGINT, and
# child processes inherit ignored signals: without this reset none of them could be terminated.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

MEMORY = Path("/dev/shm")
LEAST_FREE_BYTES = 8 << 30
"""Several times the size of the temporary folders of a whole run."""

# Temporary folders are in memory if it has room. On a disk the tests mostly wait for fsync, which proves nothing
# without a power failure (journal/faulty_disk.py simulates one). To use a disk: TMPDIR=/tmp make test.
if (
    "TMPDIR" not in os.environ
    and MEMORY.is_dir()
    and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC  # tests build programs, and run them
    and shutil.disk_usage(MEMORY).free > LEAST_FREE_BYTES
):
    os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)

# A deadline per example measures the machine: on a busy one it fails correct code.
# The suite draws the same examples each time, so that its result depends on the change alone. `make explore` draws
# new ones, and more of them; CI does not run it (properties.py says when to).
for profile, derandomize in (("suite", True), ("explore", False)):
    hypothesis_settings.register_profile(
        profile,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        derandomize=derandomize,
        print_blob=not derandomize,
    )
hypothesis_settings.load_profile("suite")

DATABASE_TIMEOUT_S = 120.0
"""To create or drop a database: each of its tables is a folder that must be deleted from disk."""

pytest_plugins = [
    "kalshi_platform_tests.simulator_fixtures",
    "kalshi_platform_tests.store_fixtures",
]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect tests with the garbage collector off, and exempt the million imported objects from later collections."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def clickhouse_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an embedded ClickHouse of this test run; user `default`, no password.

    With CLICKHOUSE_CLUSTER=two it emulates a cluster of two shards: clickhouse/two_shards.py.
    """
    start = two_shards.running if two_shards.ON_CLUSTER else running
    with start(tmp_path_factory.mktemp("clickhouse")) as url:
        yield url


@pytest.fixture(scope="session")
def _databases() -> Iterator[httpx.Client]:
    """A client that creates and drops databases."""
    # plain HTTP, so certificates need not be loaded
    with httpx.Client(verify=False, timeout=DATABASE_TIMEOUT_S) as client:
        yield client


@pytest.fixture
def clickhouse_database(clickhouse_url: str, _databases: httpx.Client) -> Iterator[str]:
    """The name of a new, empty database, which is dropped afterwards."""
    name = two_shards.database_name()
    if two_shards.ON_CLUSTER:
        yield name
        return
    _databases.post(clickhouse_url, content=f"CREATE DATABASE {name}").raise_for_status()
    yield name
    _databases.post(clickhouse_url, content=f"DROP DATABASE {name} SYNC").raise_for_status()

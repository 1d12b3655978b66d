"""What every room's tests share: one embedded ClickHouse, and a fresh database in it."""

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

# Partitions are defined when Dagster's definitions are imported: let them begin before any test's hour.
os.environ["ARCHIVE_BEGINS"] = "2025-11-01"

# The folder that a test, or a program that it starts, is in: never this checkout's `.env` and data.
os.environ["KALSHI_HOME"] = "."

# A shell starts what it puts into the background with SIGINT ignored. Dagster gives SIGTERM the same
# handler, and programs that are started inherit what is ignored: none of them could be asked to end.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

MEMORY = Path("/dev/shm")
LEAST_FREE_BYTES = 8 << 30
"""Several times what the temporary folders of a whole run come to."""

# Temporary folders are in memory, where there is room. On a disk the tests mostly wait for it to sync, which shows
# nothing: it loses no power meanwhile (journal/faulty_disk.py stands for one that does). Elsewhere: TMPDIR=/tmp make test.
if (
    "TMPDIR" not in os.environ
    and MEMORY.is_dir()
    and not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC  # tests build programs, and run them
    and shutil.disk_usage(MEMORY).free > LEAST_FREE_BYTES
):
    os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)

# A deadline for an example, and for making a few, measures the machine: starved, it fails what is right.
# The suite draws the same examples each time, so that a change alone decides how it ends; new ones, and more of
# them, are drawn by `make explore` alone, which CI does not run (properties.py says who does).
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
"""For making or dropping a database: every table of it is a folder that the disk must forget."""

pytest_plugins = [
    "kalshi_platform_tests.simulator_fixtures",
    "kalshi_platform_tests.store_fixtures",
]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect without garbage collections, and leave what was imported out of later ones: a million objects that stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def clickhouse_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an embedded ClickHouse of this test run; user `default`, no password.

    With CLICKHOUSE_CLUSTER=two it is one that stands in for a cluster: clickhouse/two_shards.py.
    """
    start = two_shards.running if two_shards.ON_CLUSTER else running
    with start(tmp_path_factory.mktemp("clickhouse")) as url:
        yield url


@pytest.fixture(scope="session")
def _databases() -> Iterator[httpx.Client]:
    """What makes and drops databases."""
    # plain HTTP: no certificates to load
    with httpx.Client(verify=False, timeout=DATABASE_TIMEOUT_S) as client:
        yield client


@pytest.fixture
def clickhouse_database(clickhouse_url: str, _databases: httpx.Client) -> Iterator[str]:
    """The name of a database that is empty now and dropped afterwards."""
    name = two_shards.database_name()
    if two_shards.ON_CLUSTER:
        yield name
        return
    _databases.post(clickhouse_url, content=f"CREATE DATABASE {name}").raise_for_status()
    yield name
    _databases.post(clickhouse_url, content=f"DROP DATABASE {name} SYNC").raise_for_status()

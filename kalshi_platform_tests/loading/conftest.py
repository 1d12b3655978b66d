"""What tests of the loads share: a migrated database for each module, and settings on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from kalshi_platform.settings import Settings
from kalshi_platform_tests.conftest import DATABASE_TIMEOUT_S
from kalshi_platform_tests.storage.tables import prepare, settings_for
from kalshi_platform_tests.storage.two_shards import database_name


@pytest.fixture(scope="module")
def database(clickhouse_url: str) -> Iterator[str]:
    """A migrated database for this module."""
    name = database_name()
    prepare(settings_for(clickhouse_url, name, hot_retention_days=36_500))
    yield name
    httpx.post(
        clickhouse_url, content=f"DROP DATABASE {name} SYNC", timeout=DATABASE_TIMEOUT_S
    ).raise_for_status()


@pytest.fixture
def settings(tmp_path: Path, clickhouse_url: str, database: str) -> Settings:
    """Settings with a data folder of its own and the module's database."""
    return settings_for(
        clickhouse_url, database, kalshi_data_dir=tmp_path, hot_retention_days=36_500
    )

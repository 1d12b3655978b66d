"""Fixtures of the stores' tests: a migrated database for each module, and settings for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kalshi_platform.settings import Settings
from kalshi_platform_tests.clickhouse.tables import database_of_a_module, settings_for


@pytest.fixture(scope="module")
def database(clickhouse_url: str) -> Iterator[str]:
    """A migrated database for the test module."""
    with database_of_a_module(clickhouse_url) as settings:
        yield settings.clickhouse_database


@pytest.fixture
def settings(tmp_path: Path, clickhouse_url: str, database: str) -> Settings:
    """Settings with a fresh data folder and the module's database."""
    return settings_for(
        clickhouse_url, database, kalshi_data_dir=tmp_path, hot_retention_days=36_500
    )

"""A migrated database to plant rows in, and the command that audits it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.client import connect
from kalshi_platform.commands.main import main
from kalshi_platform.inventory.tables import usable
from kalshi_platform.settings import Settings
from kalshi_platform_tests.clickhouse.tables import database_of_a_module
from kalshi_platform_tests.inventory.planted import Planted

Run = Callable[..., Result]
_WRITTEN = "SELECT DISTINCT table FROM system.parts WHERE active AND database = currentDatabase()"
"""Tables that have parts, be it empty ones: the others have nothing to lose, and no tokens of inserts."""


@pytest.fixture(scope="module")
def migrated_once(clickhouse_url: str) -> Iterator[Settings]:
    """Settings of a database that the tests of a module share, one after the other."""
    with database_of_a_module(clickhouse_url) as settings:
        yield settings


@pytest.fixture
def planted(migrated_once: Settings) -> Iterator[Planted]:
    """The market maker's tables, empty."""
    with closing(connect(migrated_once)) as client:
        there = usable(client)
        for (table,) in client.query(_WRITTEN).result_rows:
            if table in there:
                client.command(f"TRUNCATE TABLE {table}")
        yield Planted(client)
        if usable(client) != there:  # a test dropped some
            migrations.migrate(migrated_once)


@pytest.fixture
def run(migrated_once: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """`kalshi-platform`, in an empty folder, on the test's database."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLICKHOUSE_URL", migrated_once.clickhouse_url)
    monkeypatch.setenv("CLICKHOUSE_DATABASE", migrated_once.clickhouse_database)
    for name in ("HOST", "PORT", "USER", "PASSWORD", "DATABASE", "SECURE"):
        monkeypatch.delenv(f"CH_{name}", raising=False)

    def invoke(*args: str) -> Result:
        platform_settings.current.cache_clear()  # each command is a process of its own
        return CliRunner().invoke(main, args, catch_exceptions=True)

    yield invoke
    platform_settings.current.cache_clear()

"""`migrate` works from any folder, any number of times."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import migrations
from kalshi_platform.commands.migrate import command


def test_migrate_brings_a_database_up_to_date_from_any_folder(
    clickhouse_url: str,
    clickhouse_database: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLICKHOUSE_URL", clickhouse_url)
    monkeypatch.setenv("CLICKHOUSE_DATABASE", clickhouse_database)
    platform_settings.current.cache_clear()
    try:

        def migrate(*args: str) -> list[str]:
            result = CliRunner().invoke(command, args)
            assert result.exit_code == 0, result.output
            return result.stdout.splitlines()

        every = [str(m) for m in migrations.available()]
        assert migrate("--status") == [f"{name}  pending" for name in every]
        assert migrate()[:-1] == [f"applied {name}" for name in every]
        assert [line.split("  ")[:2] for line in migrate("--status")] == [
            [name, "applied"] for name in every
        ]
        (again,) = migrate()
        assert (
            again == f"{clickhouse_database} is up to date: {len(every)} migrations, 30 days kept"
        )
    finally:
        platform_settings.current.cache_clear()

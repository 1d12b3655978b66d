"""A writer other than the loader never creates a second archive in place of a missing one."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner

from kalshi_platform import settings as platform_settings
from kalshi_platform.analytics.hourly import compute_hour
from kalshi_platform.commands.main import main
from kalshi_platform.errors import StoreError
from kalshi_platform.journal import journal_identity
from kalshi_platform.loading import adoption
from kalshi_platform.loading.presence import known_archive
from kalshi_platform.loading.rebuild import rebuild
from kalshi_platform.recorder import market_catalog
from kalshi_platform.recorder.market_catalog import Catalog
from kalshi_platform.schema import MARKET_CATALOG
from kalshi_platform.settings import Settings
from kalshi_platform_tests.loading.recorder import BEGIN_NS, Recorder

HOUR = datetime.fromtimestamp(BEGIN_NS // 10**9 // 3600 * 3600, UTC)
EMPTY = MARKET_CATALOG.arrow.empty_table()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a folder whose archive has the rows of one recording."""
    settings = platform_settings.load(kalshi_data_dir=tmp_path / "data", use_clickhouse=False)
    Recorder(settings, ("parquet",)).run()
    return settings


def compact(settings: Settings) -> None:
    """As its command does."""
    variables = {"KALSHI_DATA_DIR": str(settings.data_dir), "USE_CLICKHOUSE": "false"}
    raised = CliRunner().invoke(main, ["compact", "--all"], env=variables).exception
    if raised is not None:
        raise raised


WRITERS: dict[str, Callable[[Settings], object]] = {
    "the catalogue": lambda settings: market_catalog.store(
        settings, Catalog(EMPTY, EMPTY, 0, HOUR)
    ),
    "analytics": lambda settings: compute_hour(settings, HOUR),
    "an hour built again": lambda settings: rebuild(settings, HOUR),
    "compaction": compact,
    "adopt": lambda settings: adoption.adopt(settings, 0),
}


@pytest.mark.parametrize("leaves_its_mount_point", [False, True])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_writer_refuses_a_missing_archive(
    writer: str, leaves_its_mount_point: bool, settings: Settings, tmp_path: Path
) -> None:
    root, write = settings.archive_dir, WRITERS[writer]
    write(settings)
    journal_of = journal_identity.read(settings.journal_dir())
    root.rename(tmp_path / "away")
    if leaves_its_mount_point:
        root.mkdir()
    with pytest.raises(StoreError, match=f"The archive in {root} is gone"):
        write(settings)
    assert not root.exists() or not list(root.iterdir())
    assert journal_identity.read(settings.journal_dir()) == journal_of
    if leaves_its_mount_point:
        root.rmdir()
    (tmp_path / "away").rename(root)  # the remedy
    write(settings)


def test_a_running_writer_detects_a_missing_archive(settings: Settings, tmp_path: Path) -> None:
    archive = known_archive(settings)
    settings.archive_dir.rename(tmp_path / "away")
    with pytest.raises(StoreError, match="is gone"):
        archive.write_whole(MARKET_CATALOG.name, "markets.parquet", EMPTY)
    assert not settings.archive_dir.exists()


def test_before_the_first_load_no_archive_is_required(tmp_path: Path) -> None:
    settings = platform_settings.load(kalshi_data_dir=tmp_path / "data", use_clickhouse=False)
    for name in ("the catalogue", "compaction"):
        WRITERS[name](settings)
    assert (settings.archive_dir / MARKET_CATALOG.name).is_dir()

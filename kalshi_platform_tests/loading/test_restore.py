"""An archive goes back into an empty ClickHouse, and is the same there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.errors import PlatformError
from kalshi_platform.loading.load import Load
from kalshi_platform.loading.restore import Restored, parse_hours, restore
from kalshi_platform.loading.stores import ClickHouseStore, ParquetStore
from kalshi_platform.settings import Settings
from kalshi_platform.storage import clickhouse, migrations
from kalshi_platform.storage.archive import LocalArchive
from kalshi_platform.storage.errors import StoreRefused
from kalshi_platform_tests.loading.test_load import SMALL, journal_of, load_all, recording


def quiet(_: Restored) -> None: ...


@pytest.fixture
def archived(tmp_path: Path, clickhouse_url: str, clickhouse_database: str) -> Settings:
    """Settings of an empty database, and an archive of two hours."""
    settings = platform_settings.load(
        kalshi_data_dir=tmp_path,
        clickhouse_url=clickhouse_url,
        clickhouse_database=clickhouse_database,
        hot_retention_days=36_500,
    )
    migrations.migrate(settings)
    writer = journal_of(settings.journal_dir(), recording())
    load_all(
        Load(
            settings.journal_dir(),
            writer,
            ParquetStore(LocalArchive(settings.archive_dir), 0, lambda _: None),
            SMALL,
        )
    )
    writer.close()
    return settings


def levels(settings: Settings) -> list[Sequence[Any]]:
    sql = "SELECT market_ticker, side, price, size FROM latest_levels FINAL WHERE size > 0 ORDER BY ALL"
    return list(clickhouse.connect(settings).query(sql).result_rows)


def test_restored_twice_is_there_once_and_the_book_is_the_same(archived: Settings) -> None:
    first = restore(archived, LocalArchive(archived.archive_dir), None, quiet)
    again = restore(archived, LocalArchive(archived.archive_dir), None, quiet)
    assert first == again
    assert {it.dataset for it in first} == {
        "orderbook_events",
        "stream_events",
        "book_checkpoints",
        "trades",
    }
    client = clickhouse.connect(archived)
    assert client.query(
        "SELECT count(), uniqExact(seq, side, price) FROM orderbook_events"
    ).result_rows == [(403, 403)]
    restored = levels(archived)
    assert restored
    for name in ("latest_levels", *{it.dataset for it in first}):
        client.command(f"TRUNCATE TABLE {name}")
    writer = journal_of(archived.journal_dir().with_name("other"), recording())
    load_all(
        Load(
            archived.journal_dir().with_name("other"),
            writer,
            ClickHouseStore(archived, str(writer.id)),
            SMALL,
        )
    )
    writer.close()
    assert levels(archived) == restored


@pytest.mark.parametrize(
    "lost", ["orderbook_events", "stream_events", "book_checkpoints", "trades"]
)
def test_a_server_that_was_killed_with_a_token_and_without_its_rows_gets_them_again(
    lost: str, archived: Settings
) -> None:
    """ClickHouse writes a token down before the rows: a kill in between leaves the token alone."""
    first = restore(archived, LocalArchive(archived.archive_dir), None, quiet)
    client = clickhouse.connect(archived)
    client.command(f"ALTER TABLE {lost} DELETE WHERE true SETTINGS mutations_sync = 2")
    for _ in range(2):
        assert restore(archived, LocalArchive(archived.archive_dir), None, quiet) == first


def test_a_span_of_hours_is_restored_alone(archived: Settings) -> None:
    hours = sorted(
        {it.hour for it in restore(archived, LocalArchive(archived.archive_dir), None, quiet)}
    )
    clickhouse.connect(archived).command("TRUNCATE TABLE orderbook_events")
    for other in ("stream_events", "book_checkpoints", "trades"):
        clickhouse.connect(archived).command(f"TRUNCATE TABLE {other}")
    done = restore(archived, LocalArchive(archived.archive_dir), (hours[1], hours[1]), quiet)
    assert {it.hour for it in done} == {hours[1]}


def test_rows_that_are_there_already_and_differ_are_refused(archived: Settings) -> None:
    restore(archived, LocalArchive(archived.archive_dir), None, quiet)
    clickhouse.connect(archived).command(
        "INSERT INTO orderbook_events SELECT * REPLACE (seq + 1000 AS seq) FROM orderbook_events LIMIT 1"
    )
    with pytest.raises(StoreRefused, match="empty database"):
        restore(archived, LocalArchive(archived.archive_dir), None, quiet)


@pytest.mark.parametrize("text", ["yesterday", "2026-11-22", "2026-11-22-14..2026-11-22-13"])
def test_hours_that_cannot_be_read_are_a_sentence(text: str) -> None:
    with pytest.raises(PlatformError, match="--hours"):
        parse_hours(text)

"""The hot tables' retention is shortened by a setting, never by a default."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import hot_retention, migrations
from kalshi_platform.clickhouse.client import Client
from kalshi_platform.commands.main import main
from kalshi_platform.errors import StoreRefused
from kalshi_platform.schema import STREAM_EVENTS, ZERO_UUID
from kalshi_platform_tests.clickhouse.tables import insert, migrated, settings_for

AGES = (10, 100, 100, 399)
"""Days since the rows of `old` were received."""


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce the platform to some of its migrations, which are applied faster."""
    every = migrations.available()
    monkeypatch.setattr(
        migrations, "available", lambda: tuple(m for m in every if m.version in {1, 2, 13, 15, 17})
    )


@pytest.fixture
def old(clickhouse_url: str, clickhouse_database: str) -> Iterator[Client]:
    """A database that keeps 400 days and has rows of most of them."""
    with migrated(clickhouse_url, clickhouse_database, retention_days=400) as client:
        now = datetime.now(UTC)
        at = [now - timedelta(days=age) for age in AGES]
        rows = [{"ingest_ts": moment, "kind": "ok", "conn_id": ZERO_UUID} for moment in at]
        insert(client, STREAM_EVENTS, rows)
        yield client


@pytest.fixture
def elsewhere(
    clickhouse_url: str,
    clickhouse_database: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[None]:
    """Commands run in a folder without `.env`: no HOT_RETENTION_DAYS."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOT_RETENTION_DAYS", raising=False)
    monkeypatch.setenv("CLICKHOUSE_URL", clickhouse_url)
    monkeypatch.setenv("CLICKHOUSE_DATABASE", clickhouse_database)
    platform_settings.current.cache_clear()
    yield
    platform_settings.current.cache_clear()


def migrate(*options: str) -> str:
    platform_settings.current.cache_clear()
    result = CliRunner().invoke(main, ["migrate", *options])
    assert result.exit_code == 0, result.output
    return result.output


def rows(client: Client) -> int:
    client.command("OPTIMIZE TABLE stream_events FINAL")  # what has expired goes with a merge
    found = client.query("SELECT count() FROM stream_events").first_row
    assert found
    return int(found[0])


@pytest.mark.usefixtures("elsewhere")
def test_a_default_shortens_nothing_and_reports_deletions(old: Client) -> None:
    output = migrate()
    assert (
        "Not changed, for HOT_RETENTION_DAYS is not set here: stream_events: 400 days → 30 days,"
        " which deletes 3 rows of 2 days." in output
    )
    assert "400 days kept" in output
    assert rows(old) == len(AGES)
    assert set(hot_retention.kept(old).values()) == {400}


@pytest.mark.usefixtures("elsewhere")
def test_the_named_remedy_shortens_the_retention(old: Client) -> None:
    output = migrate("--apply-retention")
    assert "stream_events: 400 days → 30 days, which deletes 3 rows of 2 days" in output
    assert "30 days kept" in output
    assert rows(old) == 1


@pytest.mark.usefixtures("elsewhere")
def test_a_given_setting_shortens_and_status_shows_it_before(
    old: Client,
) -> None:
    Path(".env").write_text("HOT_RETENTION_DAYS=50\n", encoding="utf-8")
    change = "stream_events: 400 days → 50 days, which deletes 3 rows of 2 days"
    assert f"HOT_RETENTION_DAYS=50: {change}" in migrate("--status")
    assert set(hot_retention.kept(old).values()) == {400}
    assert change in migrate()
    assert rows(old) == 1
    assert "stream_events" not in migrate("--status")


@pytest.mark.usefixtures("elsewhere")
def test_a_default_lengthens_nothing_either(clickhouse_url: str, clickhouse_database: str) -> None:
    with migrated(clickhouse_url, clickhouse_database, retention_days=7) as client:
        assert "7 days kept" in migrate()
        assert set(hot_retention.kept(client).values()) == {7}


@pytest.mark.usefixtures("elsewhere")
def test_a_new_database_gets_the_default(clickhouse_url: str, clickhouse_database: str) -> None:
    assert "30 days kept" in migrate()
    assert clickhouse_url
    assert clickhouse_database


@pytest.mark.usefixtures("elsewhere")
def test_restored_tables_without_bookkeeping_keep_their_rows(
    old: Client,
) -> None:
    """A backup of some tables was restored: they are the platform's, and not known as new."""
    old.command("DROP TABLE schema_migrations")
    for view in ("top_of_book", "book_at"):
        old.command(f"DROP VIEW {view}")
    old.command("ALTER TABLE stream_events REMOVE TTL")
    migrate()
    assert rows(old) == len(AGES)
    assert hot_retention.kept(old)["stream_events"] is None


def test_the_retention_is_altered_only_where_it_differs(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    def keep(days: int) -> set[str]:
        settings = settings_for(clickhouse_url, clickhouse_database, hot_retention_days=days)
        return {change.table for change in migrations.update_retention(client, settings)}

    with migrated(clickhouse_url, clickhouse_database, retention_days=30) as client:
        assert set(hot_retention.kept(client).values()) == {30}
        assert keep(30) == set()
        assert keep(7) == set(hot_retention.kept(client))
        assert set(hot_retention.kept(client).values()) == {7}
        assert keep(hot_retention.FOR_EVER_DAYS) == set(hot_retention.kept(client))
        assert set(hot_retention.kept(client).values()) == {None}
        assert keep(36_500) == set()


def test_a_hundred_years_of_retention_lose_nothing(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    with migrated(clickhouse_url, clickhouse_database) as client:
        for days in (hot_retention.FOR_EVER_DAYS - 1, 36_500):
            settings = settings_for(clickhouse_url, clickhouse_database, hot_retention_days=days)
            migrations.update_retention(client, settings)
            client.command(
                f"INSERT INTO stream_events (ingest_ts, kind) VALUES (now64(6), '{days}')"
            )
            client.command("OPTIMIZE TABLE stream_events FINAL")
        assert client.query("SELECT count() FROM stream_events").first_row == (2,)


def test_no_ttl_is_put_on_a_table_of_another_owner(
    clickhouse_url: str, clickhouse_database: str
) -> None:
    with migrated(clickhouse_url, clickhouse_database) as client:
        client.command("RENAME TABLE book_checkpoints TO former")
        client.command("CREATE TABLE book_checkpoints (ts DateTime) ENGINE = MergeTree ORDER BY ts")
        with pytest.raises(StoreRefused, match=r"book_checkpoints \("):
            migrations.update_retention(client, settings_for(clickhouse_url, clickhouse_database))


@pytest.mark.parametrize(
    ("days", "words"),
    [
        ([30, 30], "30 days"),
        ([1], "1 day"),
        ([7, 30], "7 to 30 days"),
        ([7, None], "7 to for ever"),
        ([None, None], "for ever"),
        ([], "nothing"),
    ],
)
def test_days_in_words(days: list[int | None], words: str) -> None:
    assert hot_retention.in_words(days) == words

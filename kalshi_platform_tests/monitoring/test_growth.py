"""How fast what is kept grows, and when the disk is full."""

from __future__ import annotations

import os
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.monitoring import growth
from kalshi_platform.monitoring.growth import Growth, days_until_full
from kalshi_platform.storage import migrations
from kalshi_platform.storage.archive import LocalArchive, Manifest, part_name
from kalshi_platform.storage.clickhouse import connect


def of(size: int, per_day: float | None, settles_at: float | None = None) -> Growth:
    return Growth("it", size, per_day, settles_at, None)


@pytest.mark.parametrize(
    ("growths", "free", "days"),
    [
        ([of(0, 10)], 100, 10),
        ([of(0, 10), of(0, 10)], 100, 5),
        ([of(0, 10, 50)], 100, None),  # it settles before
        ([of(0, 10, 50), of(0, 1)], 100, 50),
        ([of(80, 10, 50)], 1, None),  # it has more than it will settle at
        ([of(5, None)], 1, None),
        ([of(0, 200)], 100, 0),
        ([], 0, None),
    ],
)
def test_the_disk_is_full_when_what_grows_has_used_it_up(
    growths: list[Growth], free: int, days: float | None
) -> None:
    assert days_until_full(growths, free) == days


def test_the_archive_grows_by_its_sealed_hours(tmp_path: Path) -> None:
    settings = platform_settings.load(
        _env_file=None, kalshi_data_dir=tmp_path, use_clickhouse=False
    )
    this_hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    for back, size in ((1, 1000), (2, 3000), (0, 9999)):  # the open hour does not count
        hour = this_hour - timedelta(hours=back)
        folder = LocalArchive(settings.archive_dir).folder("orderbook_events", hour)
        folder.mkdir(parents=True)
        (folder / part_name(0, 0, 1)).write_bytes(b"x" * size)
        if back:
            manifest = Manifest(
                dataset="orderbook_events",
                hour=f"{hour:%Y-%m-%dT%H:00:00Z}",
                complete=True,
                rows=1,
                bytes=size,
                markets=1,
                gaps=0,
                verified_seconds=None,
                coverage=None,
                first=None,
                last=None,
                checksum="",
                parts=[],
            )
            LocalArchive(settings.archive_dir).write_manifest(manifest)
    (it,) = [each for each in growth.measure(settings) if each.what == "Parquet archive"]
    assert it.per_day == 2000 * 24
    assert it.settles_at is None


def test_clickhouse_grows_by_the_rows_of_the_last_day_and_settles(
    clickhouse_url: str, clickhouse_database: str, tmp_path: Path
) -> None:
    settings = platform_settings.load(
        _env_file=None,
        kalshi_data_dir=tmp_path,
        clickhouse_url=clickhouse_url,
        clickhouse_database=clickhouse_database,
        hot_retention_days=10,
    )
    migrations.migrate(settings)
    with closing(connect(settings)) as client:
        client.command(
            "INSERT INTO orderbook_events (type, ingest_ts, market_ticker, side, price, qty, size)"
            " SELECT 'delta', now64(6) - toIntervalHour(12) + toIntervalSecond(number), 'T', 'yes',"
            " 0.5, 1, 1 FROM numbers(3600)"
        )
        (it,) = [each for each in growth.measure(settings) if each.what == "ClickHouse"]
        table = client.query(
            "SELECT sum(bytes_on_disk) FROM system.parts WHERE active AND table = 'orderbook_events'"
            " AND database = currentDatabase()"
        ).first_row
    assert table is not None
    assert it.per_day is not None
    assert it.per_day >= 2 * int(table[0]) * 0.99  # half a day holds it all
    assert it.settles_at == pytest.approx(10 * it.per_day)
    assert it.path is None  # it is not in our folder


def test_a_clickhouse_that_is_away_is_left_out(tmp_path: Path) -> None:
    settings = platform_settings.load(
        _env_file=None, kalshi_data_dir=tmp_path, clickhouse_url="http://127.0.0.1:9"
    )
    assert [each.what for each in growth.measure(settings)] == [
        "journal",
        "Parquet archive",
        "Dagster",
    ]


def test_dagsters_runs_of_the_last_day_are_its_growth(tmp_path: Path) -> None:
    settings = platform_settings.load(
        _env_file=None, kalshi_data_dir=tmp_path, use_clickhouse=False
    )
    folder = tmp_path / "dagster" / "storage" / "history" / "runs"
    folder.mkdir(parents=True)
    now = datetime.now(UTC).timestamp()
    for hours_ago in (1, 2, 30):
        path = folder / f"{hours_ago:08d}-0000-0000-0000-000000000000.db"
        path.write_bytes(b"x" * 40_960)
        os.utime(path, (now - 3600 * hours_ago,) * 2)
    (it,) = [each for each in growth.measure(settings) if each.what == "Dagster"]
    assert it.per_day == pytest.approx(2 * 40_960, rel=0.01)
    assert it.settles_at == pytest.approx(2 * 40_960 * 7, rel=0.01)

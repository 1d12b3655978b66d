"""Growth rates of the stored data, and the forecast of a full disk."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import LocalArchive, Manifest, part_name
from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.client import connect
from kalshi_platform.commands import doctor
from kalshi_platform.health import growth
from kalshi_platform.health.growth import Growth, days_until_full
from kalshi_platform.recorder.streamer import Streamer
from kalshi_platform.settings import Settings
from kalshi_platform.simulator.server import Simulator
from kalshi_platform_tests.object_store import BUCKET, KEY, KEY_ID, ObjectStore, object_store
from kalshi_platform_tests.simulator_fixtures import StartSimulator
from kalshi_platform_tests.small_disk import small_disk


def growth_of(size: int, per_day: float | None, settles_at: float | None = None) -> Growth:
    return Growth("it", size, per_day, settles_at, None)


@pytest.mark.parametrize(
    ("growths", "free", "days"),
    [
        ([growth_of(0, 10)], 100, 10),
        ([growth_of(0, 10), growth_of(0, 10)], 100, 5),
        ([growth_of(0, 10, 50)], 100, None),  # it settles before
        ([growth_of(0, 10, 50), growth_of(0, 1)], 100, 50),
        ([growth_of(80, 10, 50)], 1, None),  # it has more than it will settle at
        ([growth_of(5, None)], 1, None),
        ([growth_of(0, 200)], 100, 0.5),
        ([growth_of(0, 10, 50), growth_of(0, 10)], 60, 3),
        ([growth_of(0, 10, 50), growth_of(0, 10)], 110, 6),
        ([], 0, None),
    ],
)
def test_days_until_full_follow_the_growing_data(
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
    (found,) = [item for item in growth.measure(settings) if item.name == "Parquet archive"]
    assert found.per_day == 2000 * 24
    assert found.settles_at is None


def test_clickhouse_grows_by_the_last_days_rows_and_settles(
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
        (found,) = [item for item in growth.measure(settings) if item.name == "ClickHouse"]
        table = client.query(
            "SELECT sum(bytes_on_disk) FROM system.parts WHERE active AND table = 'orderbook_events'"
            " AND database = currentDatabase()"
        ).first_row
    assert table is not None
    assert found.per_day is not None
    assert found.per_day >= 2 * int(table[0]) * 0.99  # half a day holds it all
    assert found.settles_at == pytest.approx(10 * found.per_day)
    assert found.path is None  # the server's data is not in our folder


def test_an_unreachable_clickhouse_is_left_out(tmp_path: Path) -> None:
    settings = platform_settings.load(
        _env_file=None, kalshi_data_dir=tmp_path, clickhouse_url="http://127.0.0.1:9"
    )
    assert [item.name for item in growth.measure(settings)] == [
        "journal",
        "Parquet archive",
        "Dagster",
    ]


def test_an_unreachable_object_store_is_left_out(tmp_path: Path) -> None:
    settings = platform_settings.load(
        _env_file=None,
        kalshi_data_dir=tmp_path,
        use_clickhouse=False,
        parquet_dir="s3://archive/x",
        s3_endpoint_url="http://127.0.0.1:9",
        aws_region="us-east-1",
        aws_access_key_id="id",
        aws_secret_access_key="key",
    )
    assert [item.name for item in growth.measure(settings)] == ["journal", "Dagster"]
    assert "Parquet archive cannot be reached" in doctor._growth(settings).text


def recording_into(store: ObjectStore, simulator: Simulator, data: Path) -> Settings:
    """Settings whose journal is kept for two seconds after the store has it."""
    settings = platform_settings.load(
        _env_file=None,
        kalshi_data_dir=data,
        use_clickhouse=False,
        kalshi_ws_url=simulator.ws_url,
        kalshi_rest_url=simulator.rest_url,
        parquet_dir=f"s3://{BUCKET}/growth",
        s3_endpoint_url=store.url,
        aws_region="us-east-1",
        aws_access_key_id=KEY_ID,
        aws_secret_access_key=KEY,
    )
    key_file = settings.exchange.key_file
    key_file.parent.mkdir(parents=True)
    shutil.copy(simulator.key_file, key_file)
    return settings.model_copy(update={"journal_retention_hours": 2 / 3600})


class Ballast:
    """Writes notes of random bytes to a journal at a constant rate, independent of the machine's load."""

    def __init__(self, streamer: Streamer, bytes_per_s: float) -> None:
        self._streamer = streamer
        self._rate = bytes_per_s
        self._began = time.monotonic()
        self._put = 0

    def step(self) -> None:
        while self._put < self._rate * (time.monotonic() - self._began):
            self._streamer._note("heartbeat", {"ballast": os.urandom(16_384).hex()})
            self._put += 16_384  # the journal compresses the digits to about that
        time.sleep(0.02)


def test_a_disk_fills_at_the_forecast_time_while_a_store_is_down(
    tmp_path: Path, start_simulator: StartSimulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kalshi_platform.journal.writer.SEGMENT_BYTES", 128 << 10)
    monkeypatch.setattr("kalshi_platform.recorder.streamer.PRUNE_S", 0.2)
    monkeypatch.setattr(growth, "LEAST_S", 1.0)
    simulator = start_simulator(markets=1, rate=0, rolling_markets=0)
    with small_disk(tmp_path, megabytes=12) as disk, object_store() as store:
        settings = recording_into(store, simulator, disk / "data")
        store.stop()
        streamer = Streamer(settings)
        streamer.start()
        ballast = Ballast(streamer, 500_000)

        def free() -> int:
            return growth.free_bytes(settings.data_dir)

        while free() > 8 << 20:
            ballast.step()
        assert streamer.health().trouble is not None
        forecast_s = (growth.days_until_full(growth.measure(settings), free()) or 1e9) * 86_400
        finding = doctor._growth(settings)
        began = time.monotonic()
        while free() > 64 << 10:
            ballast.step()
            assert time.monotonic() - began < 120
        fact_s = time.monotonic() - began
        streamer.stop(3.0)
    assert forecast_s == pytest.approx(fact_s, rel=0.25)
    assert finding.mark is doctor.Mark.BAD
    assert "the disk is full in 0 hours" in finding.text


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
    (found,) = [item for item in growth.measure(settings) if item.name == "Dagster"]
    assert found.per_day == pytest.approx(2 * 40_960, rel=0.01)
    assert found.settles_at == pytest.approx(2 * 40_960 * 7, rel=0.01)

"""The stores are compared row by row: every planted difference is found and named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from kalshi_platform.archive import LocalArchive
from kalshi_platform.clickhouse.client import Client, connect
from kalshi_platform.loading import hot_hour
from kalshi_platform.loading.loader import Loader, Pace
from kalshi_platform.loading.sinks import ClickHouseSink, ParquetSink
from kalshi_platform.quality import continuity, parity
from kalshi_platform.quality.parity import Parity, compare_hours
from kalshi_platform.schema import TABLES
from kalshi_platform.settings import Settings
from kalshi_platform_tests.archived import paths
from kalshi_platform_tests.loading.test_loader import (
    FIRST_HOUR,
    SECOND_HOUR,
    journal_of,
    load_all,
    recording,
)

PACE = Pace(rows=60, seconds=0.0, first_s=0.0)
NOW = datetime(2026, 11, 23, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalshi_platform.loading.shared_rows.CHUNK_ROWS", 30)


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    """Two hours in both stores, the first one sealed."""
    with closing(connect(settings)) as emptying:
        for name in TABLES:
            emptying.command(f"TRUNCATE TABLE {name}")
    writer = journal_of(settings.journal_dir(), recording())
    for store in (
        ParquetSink(LocalArchive(settings.archive_dir), 0, lambda _: None),
        ClickHouseSink(settings, str(writer.id)),
    ):
        load_all(Loader(settings.journal_dir(), writer, store, PACE))
    writer.close()
    with closing(connect(settings)) as client:
        yield client


def compared(settings: Settings, client: Client, *, behind: bool = False) -> Parity:
    hot = continuity.extent(client)
    return compare_hours(settings, client, hot, NOW, behind=behind)


def the_difference(settings: Settings, client: Client) -> parity.Difference:
    (found,) = compared(settings, client).differences
    assert found.hour == f"{FIRST_HOUR:%Y-%m-%d %H:00}"
    return found


def in_first_hour(settings: Settings) -> int:
    manifest = LocalArchive(settings.archive_dir).read_manifest("orderbook_events", FIRST_HOUR)
    assert manifest is not None
    return manifest.rows


def test_equal_stores_are_equal_and_an_hour_is_compared_once(
    settings: Settings, client: Client
) -> None:
    found = compared(settings, client)
    assert found.compared == (FIRST_HOUR,)  # the second is not sealed
    assert found.rows > in_first_hour(settings)
    assert (found.equal, found.waiting, found.differences) == (1, 0, ())
    again = compared(settings, client)
    assert (again.compared, again.equal) == ((), 1)


def test_many_rows_are_read_in_pieces_with_the_same_result(
    settings: Settings, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hot_hour, "BATCH_ROWS", 7)
    found = compared(settings, client)
    assert (found.equal, found.differences) == (1, ())


def test_a_row_that_clickhouse_lost_is_found(settings: Settings, client: Client) -> None:
    client.command("DELETE FROM orderbook_events WHERE seq = 20")
    found = the_difference(settings, client)
    rows = in_first_hour(settings)
    assert found.dataset == "orderbook_events"
    assert (found.rows_parquet, found.rows_clickhouse) == (rows, rows - 1)
    assert found.what == f"ClickHouse lacks 1 of the archive's {rows:,} rows."


def test_a_row_that_clickhouse_has_twice_is_found(settings: Settings, client: Client) -> None:
    client.command("INSERT INTO stream_events SELECT * FROM stream_events WHERE kind = 'connected'")
    found = the_difference(settings, client)
    assert found.dataset == "stream_events"
    assert found.rows_clickhouse == found.rows_parquet + 1


def test_a_value_that_was_changed_in_a_file_is_found(settings: Settings, client: Client) -> None:
    compared(settings, client)  # already found equal: the file's change alone brings it back
    path = paths(settings.archive_dir, "orderbook_events", FIRST_HOUR)[-1]
    table = pq.read_table(path, partitioning=None)
    changed = pc.add(table["qty"], pa.scalar(1)).cast(table.schema.field("qty").type)
    pq.write_table(table.set_column(table.schema.get_field_index("qty"), "qty", changed), path)
    found = the_difference(settings, client)
    assert found.rows_parquet == found.rows_manifest == found.rows_clickhouse
    assert found.checksum_parquet != found.checksum_manifest == found.checksum_clickhouse
    assert "with different values" in found.what


def test_a_file_that_is_gone_or_damaged_is_found(settings: Settings, client: Client) -> None:
    first, second = paths(settings.archive_dir, "orderbook_events", FIRST_HOUR)[:2]
    first.unlink()
    assert "The files" in the_difference(settings, client).what
    second.write_bytes(second.read_bytes()[:100])
    assert f"{second} cannot be read" in the_difference(settings, client).what


def test_a_difference_is_reported_until_it_is_repaired(settings: Settings, client: Client) -> None:
    client.command("CREATE OR REPLACE TABLE taken AS orderbook_events")
    client.command("INSERT INTO taken SELECT * FROM orderbook_events WHERE seq = 20")
    client.command("DELETE FROM orderbook_events WHERE seq = 20")
    the_difference(settings, client)
    the_difference(settings, client)
    client.command("INSERT INTO orderbook_events SELECT * FROM taken")
    assert compared(settings, client).differences == ()


def test_an_hour_clickhouse_has_in_part_so_far_is_no_difference(
    settings: Settings, client: Client
) -> None:
    moment = f"'{SECOND_HOUR - timedelta(seconds=30):%Y-%m-%d %H:%M:%S}'"
    for table in ("orderbook_events", "stream_events"):
        client.command(f"DELETE FROM {table} WHERE ingest_ts > {moment}")
    found = compared(settings, client)
    assert (found.compared, found.behind, found.differences) == ((), (FIRST_HOUR,), ())


def test_a_difference_under_a_lagging_load_proves_nothing(
    settings: Settings, client: Client
) -> None:
    client.command("DELETE FROM orderbook_events WHERE seq = 20")
    found = compared(settings, client, behind=True)
    assert (found.behind, found.differences) == ((FIRST_HOUR,), ())
    the_difference(settings, client)


def test_hours_from_before_clickhouse_are_not_held_against_it(
    settings: Settings, client: Client
) -> None:
    for table in ("orderbook_events", "stream_events", "book_checkpoints", "trades"):
        clock = "ts" if table == "book_checkpoints" else "ingest_ts"
        client.command(f"DELETE FROM {table} WHERE {clock} < '{SECOND_HOUR:%Y-%m-%d %H:%M:%S}'")
    hot = continuity.extent(client)
    assert hot.first >= SECOND_HOUR
    found = compared(settings, client)
    assert (found.cold_only, found.differences) == (1, ())


def test_no_run_compares_more_hours_than_it_may(settings: Settings, client: Client) -> None:
    hot = continuity.extent(client)
    found = compare_hours(settings, client, hot, NOW, limit=0)
    assert (found.compared, found.waiting) == ((), 1)


def test_results_that_cannot_be_kept_are_only_compared_again(
    settings: Settings, client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    (settings.data_dir / "checks").write_text("in the way")
    for _ in range(2):
        found = compared(settings, client)
        assert (found.compared, found.equal) == ((FIRST_HOUR,), 1)
    assert "cannot be written" in caplog.text

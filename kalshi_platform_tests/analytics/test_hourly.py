"""An hour's analytics in both stores: the same rows and bytes, whatever ran or was killed before."""

from __future__ import annotations

import hashlib
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from kalshi_platform.analytics.computed import COMPUTED
from kalshi_platform.analytics.hourly import compute_hour, replace_hour
from kalshi_platform.archive import LocalArchive, checksum
from kalshi_platform.clickhouse.client import Client, connect
from kalshi_platform.errors import StoreRefused
from kalshi_platform.schema import ANALYTICS, SPREADS, Dataset
from kalshi_platform.settings import Settings
from kalshi_platform_tests.analytics.recording import HOUR, record_hour
from kalshi_platform_tests.archived import paths
from kalshi_platform_tests.clickhouse.tables import prepare, settings_for


@pytest.fixture
def recorded(clickhouse_url: str, clickhouse_database: str, tmp_path: Path) -> Settings:
    """Settings of an archive with one recorded hour, and of a migrated database."""
    settings = settings_for(
        clickhouse_url, clickhouse_database, parquet_dir=tmp_path, hot_retention_days=36_500
    )
    prepare(settings)
    record_hour(tmp_path)
    return settings


def hot(client: Client, dataset: Dataset) -> pa.Table:
    """What ClickHouse has of a dataset, in the schema's types."""
    columns = ", ".join(
        f"toString({c.name}) AS {c.name}"
        if "UUID" in c.clickhouse or "Enum" in c.clickhouse
        else c.name
        for c in dataset.columns
    )
    found = client.query_arrow(f"SELECT {columns} FROM {dataset.name}")
    return pa.table(
        [
            found[f.name].cast(pa.string() if pa.types.is_dictionary(f.type) else f.type)
            for f in dataset.arrow
        ],
        names=dataset.arrow.names,
    )


def digests(root: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name in COMPUTED
        for path in LocalArchive(root).folder(name, HOUR).iterdir()
    }


def test_computing_an_hour_again_gives_the_same_rows_in_both_stores(
    recorded: Settings,
) -> None:
    first = compute_hour(recorded, HOUR)
    before = digests(recorded.archive_dir)
    second = compute_hour(recorded, HOUR)
    assert digests(recorded.archive_dir) == before
    assert first.report == second.report
    with closing(connect(recorded)) as client:
        for dataset in ANALYTICS:
            cold = pa.concat_tables(LocalArchive(recorded.archive_dir).read(dataset.name, HOUR))
            assert cold.schema == dataset.arrow
            assert cold.num_rows > 0
            rows = hot(client, dataset)
            assert rows.num_rows == cold.num_rows
            assert checksum.rows_checksum(rows) == checksum.rows_checksum(cold)
            (report,) = [r for r in second.report.datasets if r.dataset == dataset.name]
            assert report.checksum == checksum.text(checksum.rows_checksum(cold))
            assert report.complete
            assert report.gaps == 1


def test_the_next_run_repairs_one_killed_anywhere(recorded: Settings) -> None:
    compute_hour(recorded, HOUR)
    (table,) = LocalArchive(recorded.archive_dir).read(SPREADS.name, HOUR)
    client = connect(recorded)
    staging = f"spreads_staging_{HOUR:%Y%m%d%H}"
    try:
        # killed after some of the inserts: rows in the staging table, none in their place
        client.command(f"CREATE TABLE {staging} AS spreads")
        client.command(f"INSERT INTO {staging} SELECT * FROM spreads LIMIT 5")
        client.command("TRUNCATE TABLE spreads")
        replace_hour(client, SPREADS, HOUR, [table])
        assert client.query("SELECT count() FROM spreads").first_row == (table.num_rows,)
        # killed after the rows were put in place: the staging table is still there, whole
        client.command(f"CREATE TABLE {staging} AS spreads")
        client.command(f"INSERT INTO {staging} SELECT * FROM spreads")
        replace_hour(client, SPREADS, HOUR, [table])
        assert client.query("SELECT count() FROM spreads").first_row == (table.num_rows,)
        assert client.query(f"EXISTS TABLE {staging}").first_row == (0,)
    finally:
        client.close()


def test_an_hour_is_replaced_and_its_neighbours_stay(recorded: Settings) -> None:
    compute_hour(recorded, HOUR)
    (table,) = LocalArchive(recorded.archive_dir).read(SPREADS.name, HOUR)
    later = HOUR + timedelta(hours=1)
    moved = table.set_column(
        2,
        table.schema.field("ingest_ts"),
        pa.array([later] * table.num_rows, table.schema.field("ingest_ts").type),
    )
    client = connect(recorded)
    try:
        replace_hour(client, SPREADS, later, [moved])
        replace_hour(client, SPREADS, HOUR, [table.slice(0, 7)])
        counts = "SELECT toStartOfHour(ingest_ts) AS h, count() FROM spreads GROUP BY h ORDER BY h"
        assert [n for _, n in client.query(counts).result_rows] == [7, table.num_rows]
        replace_hour(client, SPREADS, HOUR, [table.slice(0, 0)])
        assert [n for _, n in client.query(counts).result_rows] == [table.num_rows]
    finally:
        client.close()


def test_an_open_hour_is_incomplete_and_computed_again_when_sealed(
    tmp_path: Path,
) -> None:
    settings = settings_for(
        "http://127.0.0.1:1", "none", parquet_dir=tmp_path, use_clickhouse=False
    )
    record_hour(tmp_path, sealed=False, deltas=100)
    early = compute_hour(settings, HOUR).report
    assert {d.complete for d in early.datasets} == {False}
    record_hour(tmp_path)
    sealed = compute_hour(settings, HOUR).report
    assert {d.complete for d in sealed.datasets} == {True}
    manifest = LocalArchive(tmp_path).read_manifest(SPREADS.name, HOUR)
    assert manifest is not None
    assert manifest.complete
    assert manifest.rows == sealed.datasets[0].rows
    assert [p.file for p in manifest.parts] == ["hour.parquet"]


def test_an_hour_without_a_recording_is_refused_unchanged(tmp_path: Path) -> None:
    settings = settings_for(
        "http://127.0.0.1:1", "none", parquet_dir=tmp_path, use_clickhouse=False
    )
    with pytest.raises(StoreRefused, match=r"2026-09-21 15:00 UTC .* Materialise orderbook_events"):
        compute_hour(settings, HOUR)


def test_one_dataset_alone_can_be_computed(tmp_path: Path) -> None:
    settings = settings_for(
        "http://127.0.0.1:1", "none", parquet_dir=tmp_path, use_clickhouse=False
    )
    record_hour(tmp_path)
    report = compute_hour(settings, HOUR, ["depth"]).report
    assert [d.dataset for d in report.datasets] == ["depth"]
    assert not paths(tmp_path, "spreads", HOUR)

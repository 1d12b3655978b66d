"""Every row has the number of its journal record; rows of versions without it stay unchanged."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import msgspec
import polars as pl
import pyarrow as pa
import pytest

from kalshi_platform.archive import (
    LocalArchive,
    batches,
    checksum,
    compaction,
    hours,
    local_file,
    write_durably,
)
from kalshi_platform.archive.export import publish
from kalshi_platform.archive.parquet import table_of
from kalshi_platform.clickhouse.client import connect
from kalshi_platform.errors import StoreRefused
from kalshi_platform.journal import reader
from kalshi_platform.loading.loader import Loader, Pace
from kalshi_platform.loading.rebuild import rebuild
from kalshi_platform.loading.restore import restore
from kalshi_platform.loading.sinks import ClickHouseSink, ParquetSink
from kalshi_platform.schema import DATASETS, ORDERBOOK_EVENTS, PLACE
from kalshi_platform.settings import Settings
from kalshi_platform_tests.archived import paths, without_records
from kalshi_platform_tests.clickhouse.tables import arrow, prepare, settings_for
from kalshi_platform_tests.clickhouse.two_shards import database_name
from kalshi_platform_tests.conftest import DATABASE_TIMEOUT_S
from kalshi_platform_tests.loading.test_loader import (
    FIRST_HOUR,
    SECOND_HOUR,
    archived,
    journal_of,
    load_all,
    recording,
)
from kalshi_platform_tests.quality.test_parity import compared

PACE = Pace(rows=40, seconds=0.0, first_s=0.0)
SHARD = 3


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalshi_platform.loading.shared_rows.CHUNK_ROWS", 30)


@pytest.fixture
def settings(tmp_path: Path, clickhouse_url: str) -> Iterator[Settings]:
    """An empty database, and two hours of a shard's journal in the archive."""
    name = database_name()
    made = settings_for(clickhouse_url, name, kalshi_data_dir=tmp_path, hot_retention_days=36_500)
    prepare(made)
    writer = journal_of(made.journal_dir(SHARD), recording())
    load_all(
        Loader(
            made.journal_dir(SHARD),
            writer,
            ParquetSink(LocalArchive(made.archive_dir), SHARD, lambda _: None),
            PACE,
            shard=SHARD,
        )
    )
    writer.close()
    yield made
    httpx.post(
        clickhouse_url, content=f"DROP DATABASE {name} SYNC", timeout=DATABASE_TIMEOUT_S
    ).raise_for_status()


def loaded_into_clickhouse(settings: Settings) -> None:
    writer = journal_of(settings.journal_dir(SHARD).with_name("again"), recording())
    load_all(
        Loader(
            settings.journal_dir(SHARD).with_name("again"),
            writer,
            ClickHouseSink(settings, str(writer.id)),
            PACE,
            shard=SHARD,
        )
    )
    writer.close()


def numbered(root: Path) -> dict[str, int]:
    """How many rows of each dataset have a record."""
    return {name: archived(root, name)["record"].count() for name in hours.BUILT}


def test_every_row_has_the_shard_and_record_of_its_frame(settings: Settings) -> None:
    folder = settings.journal_dir(SHARD)
    frames: dict[int, dict[str, object]] = {}
    for block in reader.record_ranges(folder, reader.oldest_offset(folder)):
        for n, frame in enumerate(block.batch.column("frame").to_pylist(), block.first_n):
            frames[n] = msgspec.json.decode(frame)
    met = set()
    for name in ("orderbook_events", "trades", "stream_events"):
        rows = archived(settings.archive_dir, name)
        assert rows["shard"].unique().to_list() == [SHARD]
        for row in rows.to_dicts():
            frame = frames[row["record"]]
            if row["seq"]:
                assert (row["sid"], row["seq"]) == (frame["sid"], frame["seq"])
            else:
                assert row["kind"] == frame["kind"]
        met |= set(rows["record"])
    assert met == frames.keys()  # each record made a row
    events = archived(settings.archive_dir, "orderbook_events")
    levels = events.filter(pl.col("type") == "snapshot")
    assert levels.height == 3
    assert levels["record"].n_unique() == 1  # of one frame
    books = archived(settings.archive_dir, "book_checkpoints")
    (first,) = books["record"].unique()
    assert first == events.filter(pl.col("ingest_ts") >= SECOND_HOUR)["record"].min()
    assert books["shard"].unique().to_list() == [SHARD]


def test_an_hour_without_records_stays_valid_and_gains_them(
    settings: Settings,
) -> None:
    root = settings.archive_dir
    without_records(root, FIRST_HOUR)
    archive = LocalArchive(root)
    old = {name: archive.read_manifest(name, FIRST_HOUR) for name in hours.BUILT}
    aside = settings.journals_dir.rename(
        settings.data_dir / "aside"
    )  # otherwise the loader would load them
    restore(settings, archive, None, lambda _: None)
    aside.rename(settings.journals_dir)
    with closing(connect(settings)) as client:
        counts = client.query("SELECT count(), count(record) FROM orderbook_events").result_rows
        assert counts[0][0] > counts[0][1] > 0  # the second hour has them
        assert [d.what for d in compared(settings, client).differences] == []
        done: list[compaction.Compacted] = []
        compaction.compact(archive, [FIRST_HOUR], done.append, _never)
        assert {it.dataset: it.checksum for it in done} == {
            name: manifest.checksum for name, manifest in old.items() if manifest is not None
        }
        publish(
            archive,
            root.with_name("public"),
            span=None,
            wanted={"orderbook_events"},
            done=lambda _: None,
            left=lambda _: None,
        )
        assert [d.what for d in compared(settings, client).differences] == []
        before = numbered(root)
        rebuild(settings, FIRST_HOUR)
        assert numbered(root)["orderbook_events"] > before["orderbook_events"]
        assert archived(root, "orderbook_events")["record"].null_count() == 0
        assert hours.is_sealed(archive, FIRST_HOUR)
        assert [d.what for d in compared(settings, client).differences] == []


def _never(hour: object, error: Exception) -> None:
    raise AssertionError(f"{hour}: {error}")


def test_an_hour_of_two_versions_reads_as_one(settings: Settings) -> None:
    root = settings.archive_dir
    without_records(root, FIRST_HOUR, parts=1)
    archive = LocalArchive(root)
    whole = hours.describe(archive, FIRST_HOUR, complete=True)
    manifest = archive.read_manifest("orderbook_events", FIRST_HOUR)
    assert manifest is not None
    assert manifest.checksum == next(
        d.checksum for d in whole.datasets if d.dataset == "orderbook_events"
    )
    compaction.compact(archive, [FIRST_HOUR], lambda _: None, _never)
    (path,) = paths(root, "orderbook_events", FIRST_HOUR)
    records = table_of(local_file(path), ORDERBOOK_EVENTS.arrow, ["record"])["record"]
    assert 0 < records.null_count < len(records)
    rebuild(settings, FIRST_HOUR)
    assert hours.is_sealed(archive, FIRST_HOUR)
    restore(settings, archive, None, lambda _: None)


def test_a_changed_record_number_is_a_difference(settings: Settings) -> None:
    loaded_into_clickhouse(settings)
    with closing(connect(settings)) as client:
        assert not compared(settings, client).differences
        client.command(
            "ALTER TABLE trades UPDATE record = record + 1 WHERE seq = 1",
            settings={"mutations_sync": 2},
        )
        shutil.rmtree(settings.data_dir / "checks")
        (found,) = compared(settings, client).differences
    assert found.dataset == "trades"
    assert "with different values" in found.what


def test_a_row_without_a_record_keeps_its_old_checksum() -> None:
    rows = [
        {"market_ticker": t, "seq": n, "type": "delta", "side": "yes"} for n, t in enumerate("ABC")
    ]
    old = arrow(ORDERBOOK_EVENTS, rows)
    assert checksum.rows_checksum(old) == checksum.rows_checksum(old.drop_columns(list(PLACE)))
    new = arrow(ORDERBOOK_EVENTS, [row | {"shard": 0, "record": n} for n, row in enumerate(rows)])
    content = checksum.content(new)
    assert (content.filled, content.earlier[0]) == ((3, 0), checksum.rows_checksum(old))
    assert content.total != content.earlier[0]
    swapped = arrow(
        ORDERBOOK_EVENTS, [r | {"shard": 0, "record": 2 - n} for n, r in enumerate(rows)]
    )
    assert not content.agrees_with(checksum.content(swapped))
    assert content.agrees_with(checksum.content(old))
    mixed = pa.concat_tables([new.slice(0, 1), old.slice(1)])
    halves = checksum.content(mixed.slice(0, 2)) + checksum.content(mixed.slice(2))
    assert checksum.content(mixed) == halves
    assert mixed.num_rows == halves.rows
    assert not content.agrees_with(checksum.content(mixed.slice(1)))


@pytest.mark.parametrize("dataset", hours.BUILT)
def test_a_file_without_the_columns_reads_as_null(dataset: str, tmp_path: Path) -> None:
    schema = DATASETS[dataset].arrow
    table = arrow(DATASETS[dataset], [{"market_ticker": t} | _enums(dataset) for t in ("A", "B")])
    old = table.drop_columns(list(PLACE))
    path = tmp_path / "part-0-0-2.parquet"
    write_durably(path, [old], old.schema)
    file = local_file(path)
    (read,) = batches(file, schema)
    assert read.equals(table)
    assert read.schema == schema
    assert table_of(file, schema).equals(table)
    assert table_of(file, schema, ["record", "market_ticker"], ["B"]).to_pylist() == [
        {"record": None, "market_ticker": "B"}
    ]


def _enums(dataset: str) -> dict[str, str]:
    return {c.name: "yes" for c in DATASETS[dataset].columns if c.name == "side"}


def test_a_file_with_missing_or_unknown_columns_is_refused(tmp_path: Path) -> None:
    schema = ORDERBOOK_EVENTS.arrow
    table = arrow(ORDERBOOK_EVENTS, [{"market_ticker": "A", "side": "yes"}])
    lacking, later = tmp_path / "lacking.parquet", tmp_path / "later.parquet"
    write_durably(lacking, [short := table.drop_columns(["seq"])], short.schema)
    longer = table.append_column("hue", pa.array([1]))
    write_durably(later, [longer], longer.schema)
    for read in (
        lambda: list(batches(local_file(lacking), schema)),
        lambda: table_of(local_file(lacking), schema),
    ):
        with pytest.raises(StoreRefused, match=r"lacking\.parquet cannot be read"):
            read()
    with pytest.raises(StoreRefused, match=r"has the columns hue, .* Install that version"):
        list(batches(local_file(later), schema))

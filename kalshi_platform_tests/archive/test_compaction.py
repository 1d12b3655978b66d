"""Compaction: one sorted file per hour with the same rows, for any reader and after any kill."""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from kalshi_platform import durable
from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import (
    ASIDE,
    LocalArchive,
    Manifest,
    atomic_swap,
    compaction,
    hours,
    local,
)
from kalshi_platform.commands.compact import command
from kalshi_platform.errors import StoreError, StoreRefused, StoreUnavailable
from kalshi_platform.journal import reader as journal
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.reader import LogOffset
from kalshi_platform.loading.loader import Loader
from kalshi_platform.loading.rebuild import rebuild
from kalshi_platform.loading.rows import Rows
from kalshi_platform.loading.sinks import ParquetSink
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import floor_hour
from kalshi_platform_tests import wire
from kalshi_platform_tests.archived import paths
from kalshi_platform_tests.deaths import Killed, die_at
from kalshi_platform_tests.loading.test_loader import (
    FIRST_HOUR,
    SECOND_HOUR,
    SMALL,
    START_NS,
    journal_of,
    load_all,
    recording,
)

EVENTS = "orderbook_events"


def record(settings: Settings, records: list[wire.Record]) -> None:
    writer = journal_of(settings.journal_dir(), records)
    store = ParquetSink(LocalArchive(settings.archive_dir), 0, lambda _: None)
    load_all(Loader(settings.journal_dir(), writer, store, SMALL))
    writer.close()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder: one sealed hour of two markets, and one that is not sealed."""
    folder = tmp_path_factory.mktemp("recorded")
    conn = wire.conn_id(7)
    snapshot = wire.snapshot("B-3", 1, {}, {3_300: 5}, sid=4)
    other = [wire.connected(conn, START_NS), (START_NS, conn, int(Kind.SNAPSHOT), snapshot)]
    for n in range(60):
        frame = wire.delta("B-3", 2 + n, "no", 3_300 + 100 * (n % 5), 11, sid=4)
        other.append((START_NS + (n + 1) * wire.SECOND, conn, int(Kind.DELTA), frame))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("kalshi_platform.loading.shared_rows.CHUNK_ROWS", 30)
        made = platform_settings.load(kalshi_data_dir=folder, use_clickhouse=False)
        record(made, sorted([*recording(), *other], key=lambda it: it[0]))
    return folder


@pytest.fixture
def settings(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a recording that the test may change."""
    monkeypatch.setattr(compaction, "LINGER_S", 0.0)
    shutil.copytree(recorded, tmp_path / "data")
    return platform_settings.load(kalshi_data_dir=tmp_path / "data", use_clickhouse=False)


def rows(root: Path, dataset: str, hour: datetime = FIRST_HOUR) -> pl.DataFrame:
    """The hour's rows, in a fixed order."""
    table = pa.concat_tables(LocalArchive(root).read(dataset, hour)).unify_dictionaries()
    return pl.DataFrame(pl.from_arrow(table)).cast({pl.Categorical: pl.String}).sort(pl.all())


def run(root: Path, *wanted: datetime) -> list[compaction.Compacted]:
    """Compact; fail if any hour is refused."""
    done: list[compaction.Compacted] = []

    def refused(_: datetime, error: StoreError) -> None:
        raise error

    compaction.compact(
        LocalArchive(root), wanted or compaction.pending(LocalArchive(root)), done.append, refused
    )
    return done


def names(root: Path, dataset: str = EVENTS) -> list[str]:
    return [path.name for path in paths(root, dataset, FIRST_HOUR)]


def sealed(root: Path, dataset: str = EVENTS) -> Manifest:
    manifest = LocalArchive(root).read_manifest(dataset, FIRST_HOUR)
    assert manifest is not None
    return manifest


def test_a_sealed_hour_becomes_one_sorted_file(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "ROW_GROUP_ROWS", 64)
    monkeypatch.setattr(compaction, "RANGE_ROWS", 80)
    root = settings.archive_dir
    before = {name: rows(root, name) for name in (EVENTS, "stream_events")}
    manifest, files = sealed(root), names(root)
    described = hours.describe(LocalArchive(root), FIRST_HOUR, complete=True)
    assert compaction.pending(LocalArchive(root)) == [FIRST_HOUR]
    done = {it.dataset: it for it in run(root)}
    assert compaction.pending(LocalArchive(root)) == []
    assert done[EVENTS].files_before == len(files) > 1
    for name, table in before.items():
        assert hours.is_compacted(names(root, name))
        assert rows(root, name).equals(table)
    now = sealed(root)
    assert (now.rows, now.checksum, now.compacted) == (manifest.rows, manifest.checksum, True)
    assert [part.file for part in now.parts] == names(root)
    assert now.merged == sorted(files)
    (path,) = paths(root, EVENTS, FIRST_HOUR)
    table = pq.read_table(path, partitioning=None)
    plain = pl.DataFrame(pl.from_arrow(table)).cast({pl.Categorical: pl.String})
    assert plain.equals(plain.sort(compaction.SORTED_BY[EVENTS], nulls_last=False))
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(n) for n in range(metadata.num_row_groups)]
    of_one_market = 0
    for group in groups:
        assert next(column.column_index for column in group.sorting_columns) == 5
        ticker = group.column(5).statistics
        of_one_market += ticker.min == ticker.max
    assert of_one_market == len(groups) > 2
    after = hours.describe(LocalArchive(root), FIRST_HOUR, complete=True)
    assert [(d.rows, d.checksum, d.gaps, d.coverage) for d in after.datasets] == [
        (d.rows, d.checksum, d.gaps, d.coverage) for d in described.datasets
    ]
    assert hours.is_sealed(LocalArchive(root), FIRST_HOUR)
    assert not hours.is_sealed(LocalArchive(root), SECOND_HOUR)


def test_an_unsealed_or_missing_hour_is_refused(settings: Settings) -> None:
    root = settings.archive_dir
    for hour, why in (
        (SECOND_HOUR, "not sealed"),
        (floor_hour(datetime.now().astimezone()), "still open"),
        (FIRST_HOUR.replace(year=2020), "has nothing"),
    ):
        with pytest.raises(StoreRefused, match=why):
            run(root, hour)
    assert len(names(root)) > 1


def test_a_second_compaction_at_once_is_refused(settings: Settings) -> None:
    with (
        LocalArchive(settings.archive_dir).compacting(),
        pytest.raises(StoreUnavailable, match="Another compaction is running"),
    ):
        run(settings.archive_dir)


@pytest.mark.parametrize("damage", ["cut short", "a row less", "missing", "foreign"])
def test_files_that_differ_from_the_manifest_are_refused(damage: str, settings: Settings) -> None:
    root = settings.archive_dir
    path = paths(root, EVENTS, FIRST_HOUR)[1]
    whole = path.read_bytes()
    if damage == "cut short":
        path.write_bytes(whole[:200])
    elif damage == "a row less":
        pq.write_table(pq.read_table(path, partitioning=None)[1:], path)
    elif damage == "missing":
        path.unlink()
    else:
        shutil.copy(path, path.with_name("copy.parquet"))
    left = {p: p.read_bytes() for p in paths(root, EVENTS, FIRST_HOUR)}
    with pytest.raises(StoreRefused, match=r"cannot be read|its manifest says|not the platform"):
        run(root)
    assert {p: p.read_bytes() for p in paths(root, EVENTS, FIRST_HOUR)} == left


def test_without_atomic_swap_the_parts_stay(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = settings.archive_dir
    before = rows(root, EVENTS)

    def not_offered(one: Path, other: Path) -> None:
        raise OSError(errno.EINVAL, f"{one}, {other}")

    monkeypatch.setattr(durable, "swap", not_offered)
    with pytest.raises(StoreRefused, match="cannot swap two folders"):
        run(root)
    assert rows(root, EVENTS).equals(before)
    monkeypatch.undo()
    run(root)
    assert rows(root, EVENTS).equals(before)


_ACTS: tuple[tuple[Any, str], ...] = (
    (durable, "sync"),
    (atomic_swap, "swap"),
    (Path, "mkdir"),
    (Path, "rename"),
    (Path, "replace"),
    (Path, "write_bytes"),
    (pq.ParquetWriter, "write_table"),
    (shutil, "rmtree"),
)
"""The disk operations of a compaction."""


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_compaction_step_keeps_each_row_once(
    after: bool, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = settings.archive_dir
    shutil.rmtree(root / "stream_events")  # half of the steps test the same
    before = rows(root, EVENTS)
    parts = root.with_name("parts")
    shutil.copytree(root, parts)
    step = deaths = 0
    while True:
        step += 1
        shutil.rmtree(root)
        shutil.copytree(parts, root)
        with monkeypatch.context() as patched:
            patched.setattr(local, "GRACE_S", -1.0)
            die_at(patched, step, _ACTS, after=after)
            try:
                run(root)
            except Killed:
                deaths += 1
            else:
                break
        assert rows(root, EVENTS).equals(before)
        assert hours.is_sealed(LocalArchive(root), FIRST_HOUR)
        monkeypatch.setattr(local, "GRACE_S", -1.0)
        run(root)
        assert rows(root, EVENTS).equals(before)
        assert hours.is_compacted(names(root))
        assert [it.name for it in (root / ASIDE).glob("*/*")] == []
    assert deaths > 8


def test_a_reader_across_the_swap_gets_all_rows_or_an_error(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader silently skips files that are gone, as Arrow and DuckDB do."""
    root = settings.archive_dir
    before = rows(root, EVENTS)
    listed: list[Path] = []
    exchange = atomic_swap.swap

    def just_listed(one: Path, other: Path) -> None:
        listed.extend(other.glob("*.parquet"))
        exchange(one, other)

    monkeypatch.setattr(atomic_swap, "swap", just_listed)
    run(root)
    still_there = [path for path in listed if path.exists() and EVENTS in str(path)]
    assert len(still_there) == 1
    assert pl.read_parquet(still_there).height == before.height


def _polars(folder: Path) -> list[int]:
    glob = f"{folder}/**/*.parquet"
    return pl.read_parquet(glob, hive_partitioning=True, columns=["seq"])["seq"].to_list()


def _pyarrow(folder: Path) -> list[int]:
    found = ds.dataset(folder, partitioning="hive").to_table(columns=["seq"])
    return found["seq"].to_pylist()  # type: ignore[no-any-return]


def _duckdb(folder: Path) -> list[int]:
    duckdb = pytest.importorskip("duckdb")
    sql = f"SELECT seq FROM read_parquet('{folder}/date=*/hour=*/*.parquet')"
    with duckdb.connect() as connection:
        return [seq for (seq,) in connection.execute(sql).fetchall()]


@pytest.mark.parametrize("reader", [_polars, _pyarrow, _duckdb])
def test_readers_during_swaps_get_each_row_once_or_an_error(
    reader: Callable[[Path], list[int]], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compaction, "LINGER_S", 0.1)
    shutil.rmtree(settings.archive_dir / "stream_events")
    roots = [settings.archive_dir.with_name(f"copy-{n}") for n in range(8)]
    for root in roots:
        shutil.copytree(settings.archive_dir, root)
    expected = sorted(reader(roots[0] / EVENTS))
    assert (
        len(expected) == rows(roots[0], EVENTS).height + rows(roots[0], EVENTS, SECOND_HOUR).height
    )
    current = roots[0]
    ended = threading.Event()
    wrong: list[list[int]] = []
    whole = 0

    def read_on() -> None:
        nonlocal whole
        while not ended.is_set():
            try:
                got = sorted(reader(current / EVENTS))
            except Exception:  # noqa: BLE001 - a reader that says so may list again
                continue
            whole += got == expected
            if got != expected:
                wrong.append(got)

    def wait_for_a_reading() -> None:
        before, deadline = whole, time.monotonic() + 60
        while whole == before and not wrong:
            assert time.monotonic() < deadline, "no reader has read"
            time.sleep(0.005)

    thread = threading.Thread(target=read_on)
    thread.start()
    try:
        for root in roots:
            current = root
            wait_for_a_reading()
            run(root)
            wait_for_a_reading()
    finally:
        ended.set()
        thread.join()
    assert wrong == []
    assert whole > len(roots)
    assert sorted(reader(roots[-1] / EVENTS)) == expected


def test_late_rows_are_visible_and_compacted_next_time(
    settings: Settings,
) -> None:
    root = settings.archive_dir
    run(root)
    before = rows(root, EVENTS)
    late = next(LocalArchive(root).read(EVENTS, SECOND_HOUR))
    at = late.schema.get_field_index("ingest_ts")
    stamps = pa.array([FIRST_HOUR] * late.num_rows, late.schema.field(at).type)
    _late_write(root, late.set_column(at, late.schema.field(at), stamps))
    assert rows(root, EVENTS).height == before.height + late.num_rows == sealed(root).rows
    assert not sealed(root).compacted
    assert compaction.pending(LocalArchive(root)) == [FIRST_HOUR]
    run(root)
    assert hours.is_compacted(names(root))
    assert sealed(root).rows == before.height + late.num_rows
    # Killed before the cursor was written: the streamer writes its range again.
    _late_write(root, late.set_column(at, late.schema.field(at), stamps))
    assert rows(root, EVENTS).height == before.height + late.num_rows
    assert hours.is_compacted(names(root))


def _late_write(root: Path, table: pa.Table) -> None:
    store = ParquetSink(LocalArchive(root), 0, lambda _: None)
    store.write(90_000, 90_010, [Rows(90_000, 90_010, {EVENTS: table})])


def test_a_part_written_during_compaction_is_kept(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = settings.archive_dir
    before = rows(root, EVENTS)
    late = next(LocalArchive(root).read(EVENTS, FIRST_HOUR))
    vouch = compaction.stage_compacted_manifest

    def meanwhile(*arguments: Any) -> None:
        vouch(*arguments)
        _late_write(root, late)

    with monkeypatch.context() as patched:
        patched.setattr(compaction, "stage_compacted_manifest", meanwhile)
        with pytest.raises(StoreUnavailable, match="changed while it was compacted"):
            run(root)
    assert rows(root, EVENTS).height == before.height + late.num_rows
    run(root)
    assert rows(root, EVENTS).height == before.height + late.num_rows
    assert hours.is_compacted(names(root))


@pytest.mark.parametrize("damage", ["none", "compacted file lost", "compacted file damaged"])
def test_a_compacted_hour_is_rebuilt_as_one_file(damage: str, settings: Settings) -> None:
    root = settings.archive_dir
    run(root)
    before, manifest = rows(root, EVENTS), sealed(root)
    (path,) = paths(root, EVENTS, FIRST_HOUR)
    if damage == "compacted file lost":
        path.unlink()
    elif damage == "compacted file damaged":
        path.write_bytes(path.read_bytes()[:500])
    report = rebuild(settings, FIRST_HOUR)
    assert report.complete
    assert names(root) == [path.name]
    assert rows(root, EVENTS).equals(before)
    assert sealed(root) == manifest


def test_a_rebuild_keeps_late_rows_of_other_records(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    root = settings.archive_dir
    _late_write(root, next(LocalArchive(root).read(EVENTS, FIRST_HOUR)))
    run(root)
    before = rows(root, EVENTS)
    rebuild(settings, FIRST_HOUR)
    assert rows(root, EVENTS).equals(before)
    assert "not changed from the journal" in caplog.text
    paths(root, EVENTS, FIRST_HOUR)[0].unlink()
    with pytest.raises(StoreRefused, match="cannot be rebuilt"):
        rebuild(settings, FIRST_HOUR)


@pytest.mark.parametrize("compacted", [False, True])
def test_a_rebuild_with_lost_records_removes_no_row(
    compacted: bool, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """The records had been loaded before the disk damaged the journal."""
    root, folder = settings.archive_dir, settings.journal_dir()
    if compacted:
        run(root)
    before = {name: rows(root, name) for name in hours.RECORDED if paths(root, name, FIRST_HOUR)}
    segment = journal.segment_path(folder, 0)
    data = segment.read_bytes()
    segment.write_bytes(data[:3_000] + bytes(500) + data[3_500:])
    segment.rename(journal.set_aside(segment))
    assert any(isinstance(it, journal.LostRange) for it in journal.read(folder, LogOffset(0, 0, 0)))
    report = rebuild(settings, FIRST_HOUR)
    assert report.complete
    assert {name: rows(root, name).equals(it) for name, it in before.items()} == dict.fromkeys(
        before, True
    )
    assert "has lost records of" in caplog.text
    paths(root, EVENTS, FIRST_HOUR)[0].unlink()
    with pytest.raises(StoreRefused, match="cannot be rebuilt"):
        rebuild(settings, FIRST_HOUR)


def test_the_command_compacts_hours_and_reports_refusals(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = settings.archive_dir
    monkeypatch.setenv("KALSHI_DATA_DIR", str(root.parent))
    refused = CliRunner().invoke(command, ["--hour", f"{SECOND_HOUR:%Y-%m-%d-%H}"])
    assert refused.exit_code == 1
    assert "is not sealed" in refused.stderr
    done = CliRunner().invoke(command, ["--hour", f"{FIRST_HOUR:%Y-%m-%d-%H}"])
    assert done.exit_code == 0, done.output
    assert EVENTS in done.stdout
    assert hours.is_compacted(names(root))
    again = CliRunner().invoke(command, ["--all"])
    assert again.exit_code == 0
    assert "Nothing to compact" in again.stdout


# -- what a reader of one market reads ---------------------------------------------------------


def _polars_of(folder: Path, ticker: str) -> int:
    scan = pl.scan_parquet(folder / "**/*.parquet", hive_partitioning=True)
    return scan.filter(pl.col("market_ticker") == ticker).collect().height


def _pyarrow_of(folder: Path, ticker: str) -> int:
    found = ds.dataset(folder, format="parquet", partitioning="hive").to_table(
        filter=ds.field("market_ticker") == ticker
    )
    return int(found.num_rows)


def _duckdb_of(folder: Path, ticker: str) -> int:
    duckdb = pytest.importorskip("duckdb", reason="duckdb is a development dependency")
    sql = "SELECT count(seq), count(size) FROM read_parquet(?) WHERE market_ticker = ?"
    found = duckdb.execute(sql, [f"{folder}/*/*/*.parquet", ticker]).fetchone()
    return int(found[0])


@pytest.mark.parametrize("count", [_polars_of, _pyarrow_of, _duckdb_of])
def test_a_reader_of_one_market_reads_only_its_row_groups(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, count: Callable[[Path, str], int]
) -> None:
    monkeypatch.setattr(compaction, "ROW_GROUP_ROWS", 16)
    root = settings.archive_dir
    run(root)
    (path,) = paths(root, EVENTS, FIRST_HOUR)
    ticker = "B-3"
    wanted = rows(root, EVENTS).filter(pl.col("market_ticker") == ticker).height
    for other in LocalArchive(root).folder(EVENTS, SECOND_HOUR).glob("*.parquet"):
        other.unlink()
    # Reading another row group fails: it has zeros in place of compressed pages.
    damaged = bytearray(path.read_bytes())
    metadata = pq.read_metadata(path)
    skipped = 0
    for group in (metadata.row_group(i) for i in range(metadata.num_row_groups)):
        columns = {
            group.column(i).path_in_schema: group.column(i) for i in range(metadata.num_columns)
        }
        of = columns["market_ticker"].statistics
        if of.min <= ticker <= of.max:
            continue
        skipped += 1
        for column in columns.values():
            start = column.dictionary_page_offset or column.data_page_offset
            damaged[start : start + column.total_compressed_size] = bytes(
                column.total_compressed_size
            )
    path.write_bytes(damaged)
    assert skipped > 0
    assert count(root / EVENTS, ticker) == wanted > 0
    with pytest.raises(Exception):  # noqa: B017 - each reader has its own
        count(root / EVENTS, rows_of_another(metadata, ticker))


def rows_of_another(metadata: pq.FileMetaData, ticker: str) -> str:
    """A market whose rows are in none of the row groups that `ticker` may be in."""
    names = [
        c for c in range(metadata.num_columns) if metadata.schema.column(c).name == "market_ticker"
    ]
    for i in range(metadata.num_row_groups):
        of = metadata.row_group(i).column(names[0]).statistics
        if not of.min <= ticker <= of.max:
            return str(of.min)
    raise AssertionError("there is no other market")

"""The archive on object storage: each row once for any reader, after any kill, error or outage."""

from __future__ import annotations

import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from click.testing import CliRunner
from pydantic import SecretStr

from kalshi_platform import durable
from kalshi_platform import settings as platform_settings
from kalshi_platform.analytics.hourly import compute_hour
from kalshi_platform.archive import (
    Archive,
    LocalArchive,
    archive_at,
    compaction,
    hours,
    local,
    object_storage,
    open_archive,
    part_name,
    table_of,
    watermarks,
)
from kalshi_platform.clickhouse.client import connect
from kalshi_platform.commands import compact as compact_command
from kalshi_platform.commands import doctor
from kalshi_platform.errors import StoreRefused, StoreUnavailable
from kalshi_platform.journal.writer import Writer
from kalshi_platform.loading.loader import Loader, Pace
from kalshi_platform.loading.rebuild import rebuild
from kalshi_platform.loading.restore import Verdict, restore
from kalshi_platform.loading.rows import Rows
from kalshi_platform.loading.sinks import ClickHouseSink, ParquetSink
from kalshi_platform.quality import continuity
from kalshi_platform.quality.parity import compare_hours
from kalshi_platform.recorder.streamer import Streamer
from kalshi_platform.schema import MARKET_CATALOG, SPREADS
from kalshi_platform.settings import Settings
from kalshi_platform.simulator.server import Simulator
from kalshi_platform.utc_hours import HOUR, hour_of_ns, hour_start_ns
from kalshi_platform_tests import object_store
from kalshi_platform_tests.analytics.test_docs import PAGE, SNIPPETS
from kalshi_platform_tests.clickhouse.tables import arrow, prepare
from kalshi_platform_tests.deaths import Killed, die_at
from kalshi_platform_tests.loading.test_loader import (
    FIRST_HOUR,
    SECOND_HOUR,
    journal_of,
    recording,
)
from kalshi_platform_tests.object_store import BUCKET, KEY, KEY_ID, ObjectStore

EVENTS = "orderbook_events"
PACE = Pace(rows=60, seconds=0.0, first_s=0.0)
FIRST = f"{EVENTS}/date={FIRST_HOUR:%Y-%m-%d}/hour={FIRST_HOUR:%H}"


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store.object_store() as running:
        yield running


@pytest.fixture(autouse=True)
def _small_and_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalshi_platform.loading.shared_rows.CHUNK_ROWS", 30)
    monkeypatch.setattr("kalshi_platform.loading.loader._retry_wait_s", lambda _: 0.05)
    # Wait long enough for the attempt that finds the store reachable again.
    monkeypatch.setattr("kalshi_platform.loading.loader.DRAIN_GIVE_UP_S", 60.0)


@pytest.fixture
def _events_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other datasets are sent in the same way, and cost the same time."""
    monkeypatch.setattr(hours, "RECORDED", (EVENTS,))


@pytest.fixture
def settings(store: ObjectStore, tmp_path: Path) -> Settings:
    """Settings of an archive that is empty, without ClickHouse."""
    return settings_of(store, tmp_path, use_clickhouse=False)


def settings_of(store: ObjectStore, data: Path, **more: Any) -> Settings:
    given: dict[str, Any] = {
        "kalshi_data_dir": data,
        "parquet_dir": f"s3://{BUCKET}/{uuid.uuid4().hex}",
        "s3_endpoint_url": store.url,
        "aws_region": "us-east-1",
        "aws_access_key_id": KEY_ID,
        "aws_secret_access_key": KEY,
        "hot_retention_days": 36_500,
        "keep_frames": False,  # test_frames.py has them in both kinds of archive
        **more,
    }
    return platform_settings.load(_env_file=None, **given)


@pytest.fixture
def with_clickhouse(
    store: ObjectStore, tmp_path: Path, clickhouse_url: str, clickhouse_database: str
) -> Settings:
    made = settings_of(
        store,
        tmp_path,
        clickhouse_url=clickhouse_url,
        clickhouse_database=clickhouse_database,
    )
    prepare(made)
    return made


def record(settings: Settings) -> None:
    """Two hours in every store, the first one sealed."""
    writer = journal_of(settings.journal_dir(), recording())
    load_all(Loader(settings.journal_dir(), writer, parquet(settings), PACE))
    if settings.use_clickhouse:
        hot = ClickHouseSink(settings, str(writer.id))
        load_all(Loader(settings.journal_dir(), writer, hot, PACE))
    writer.close()


def load_all(load: Loader) -> None:
    load.start()
    load.drain()
    assert load.join(120), load.failure or load.trouble


def wait_for(condition: Callable[[], bool], load: Loader) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, (load.lag, load.failure, load.trouble)
        time.sleep(0.05)


def parquet(settings: Settings) -> ParquetSink:
    return ParquetSink(open_archive(settings), 0, lambda _: None)


def keys(store: ObjectStore, settings: Settings) -> list[str]:
    """The archive's objects, below its prefix."""
    prefix = f"{(settings.archive_base or '').partition('/')[2]}/"
    return [key.removeprefix(prefix) for key in store.objects() if key.startswith(prefix)]


def options(store: ObjectStore) -> dict[str, str]:
    return {
        "aws_endpoint_url": store.url,
        "aws_allow_http": "true",
        "aws_region": "us-east-1",
        "aws_access_key_id": KEY_ID,
        "aws_secret_access_key": KEY,
    }


def globbed(store: ObjectStore, settings: Settings, dataset: str = EVENTS) -> pl.DataFrame:
    """The rows of a dataset as a plain reader reads them, in a fixed order."""
    glob = f"{settings.archive_url}/{dataset}/**/*.parquet"
    found = pl.read_parquet(glob, hive_partitioning=False, storage_options=options(store))
    return found.cast({pl.Categorical: pl.String}).sort(pl.all())


def rows(archive: Archive, dataset: str = EVENTS, hour: datetime = FIRST_HOUR) -> pl.DataFrame:
    table = pa.concat_tables(archive.read(dataset, hour)).unify_dictionaries()
    return pl.DataFrame(pl.from_arrow(table)).cast({pl.Categorical: pl.String}).sort(pl.all())


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """The first hour's events, as an archive on a local disk has them."""
    made = platform_settings.load(
        _env_file=None,
        kalshi_data_dir=tmp_path_factory.mktemp("local"),
        use_clickhouse=False,
    )
    record(made)
    return rows(open_archive(made))


# -- sealing -----------------------------------------------------------------------------------


def test_a_sealed_hour_is_one_sorted_object(
    store: ObjectStore, settings: Settings, expected: pl.DataFrame
) -> None:
    record(settings)
    archive = open_archive(settings)
    assert [key for key in keys(store, settings) if key.startswith(EVENTS)] == [
        f"{FIRST}/_manifest.json",
        f"{FIRST}/{object_storage.SORTED}",
    ]
    assert globbed(store, settings).equals(expected)
    (table,) = archive.read(EVENTS, FIRST_HOUR)
    plain = pl.DataFrame(pl.from_arrow(table)).cast({pl.Categorical: pl.String})
    assert plain.equals(plain.sort(compaction.SORTED_BY[EVENTS], nulls_last=False))
    manifest = archive.read_manifest(EVENTS, FIRST_HOUR)
    assert manifest is not None
    assert (manifest.rows, manifest.compacted) == (expected.height, True)
    assert [part.file for part in manifest.parts] == [object_storage.SORTED]
    assert hours.is_sealed(archive, FIRST_HOUR)
    assert not hours.is_sealed(archive, SECOND_HOUR)
    assert archive.hours(EVENTS) == [FIRST_HOUR, SECOND_HOUR]
    assert archive.first_day() == FIRST_HOUR.date()
    report = hours.describe(archive, SECOND_HOUR, complete=False)
    assert {d.dataset for d in report.datasets} == set(hours.BUILT)
    assert report.datasets[0].path == f"{settings.archive_url}/{FIRST}".replace(
        f"hour={FIRST_HOUR:%H}", f"hour={SECOND_HOUR:%H}"
    )
    waiting = LocalArchive(settings.archive_dir)
    assert waiting.hours(EVENTS) == [SECOND_HOUR]
    assert [
        str(p) for p in (settings.archive_dir / object_storage.OUTGOING).rglob("*.parquet")
    ] == []
    assert hours.unsealed(archive, FIRST_HOUR, SECOND_HOUR + HOUR) == [SECOND_HOUR]


def test_foreign_names_in_the_bucket_are_ignored_and_listed(
    store: ObjectStore, settings: Settings
) -> None:
    archive = open_archive(settings)
    base = settings.archive_base
    assert base is not None
    names = [
        "notes.txt",
        f"{EVENTS}/date=2026-11-28.bak/hour=07/part-0-0-1.parquet",
        f"{EVENTS}/date=2026-13-45/hour=07/part-0-0-1.parquet",
        f"{EVENTS}/date=2026-11-28/hour=24/x.parquet",
        f"{EVENTS}/date=2026-11-28/hour=07/copy.parquet",
        f"{EVENTS}/date=2026-11-28/notes",
    ]
    for name in names:
        with store.files().open_output_stream(f"{base}/{name}") as stream:
            stream.write(b"not ours")
    assert archive.first_day() == date(2026, 11, 28)
    assert archive.hours(EVENTS) == []
    assert archive.files(EVENTS, datetime(2026, 11, 28, 7, tzinfo=UTC)) == []
    assert set(archive.foreign()) == set(names)


def test_a_bucket_leaves_nothing_to_compact(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(settings)
    archive = open_archive(settings)
    assert compaction.pending(archive) == []
    assert list(compaction.compact_hour(archive, FIRST_HOUR)) == []
    monkeypatch.setattr(platform_settings, "load", lambda: settings)
    done = CliRunner().invoke(compact_command.command, ["--hour", f"{FIRST_HOUR:%Y-%m-%d-%H}"])
    assert done.exit_code == 0, done.output
    assert "Nothing to compact" in done.stdout


def late(settings: Settings, table: pa.Table, first_n: int = 90_000) -> None:
    parquet(settings).write(first_n, first_n + 10, [Rows(first_n, first_n + 10, {EVENTS: table})])


def test_late_rows_are_one_more_object_once(
    store: ObjectStore, settings: Settings, expected: pl.DataFrame
) -> None:
    record(settings)
    archive = open_archive(settings)
    table = next(archive.read(EVENTS, FIRST_HOUR)).slice(0, 7)
    for _ in range(2):  # killed before the cursor was written: the loader writes its range again
        late(settings, table)
        assert globbed(store, settings).height == expected.height + 7
    names = [file.name for file in archive.files(EVENTS, FIRST_HOUR)]
    assert names[0] == object_storage.SORTED
    assert len(names) == 2
    manifest = archive.read_manifest(EVENTS, FIRST_HOUR)
    assert manifest is not None
    assert manifest.rows == expected.height + 7
    assert [part.file for part in manifest.parts] == names
    assert compaction.pending(archive) == []
    assert LocalArchive(settings.archive_dir).hours(EVENTS) == [SECOND_HOUR]


def _half_removed(folder: Any) -> None:
    for path in [p for p in Path(folder).rglob("*") if p.is_file()][:1]:
        path.unlink()


_ACTS: tuple[tuple[Any, str], ...] = (
    (durable, "sync"),
    (Path, "rename"),
    (Path, "replace"),
    (object_storage.ObjectArchive, "_put_bytes"),
    (shutil, "rmtree"),
    (LocalArchive, "remove"),
)
"""The operations of sending, on the disk and at the store."""


@pytest.mark.usefixtures("_events_alone")
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_sending_step_keeps_each_row_once(
    after: bool, store: ObjectStore, settings: Settings, expected: pl.DataFrame, tmp_path: Path
) -> None:
    """Passes an hour again, as after a kill, and reads after each."""
    writer = journal_of(settings.journal_dir(), recording())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ParquetSink, "pass_hours_before", lambda *_: None)  # nothing is sealed
        load_all(Loader(settings.journal_dir(), writer, parquet(settings), PACE))
    writer.close()
    kept = tmp_path / "kept"
    shutil.copytree(settings.archive_dir, kept)
    step = deaths = 0
    while True:
        step += 1
        shutil.rmtree(settings.archive_dir)
        shutil.copytree(kept, settings.archive_dir)
        archive = open_archive(settings)
        archive.remove_hour(EVENTS, FIRST_HOUR)
        with pytest.MonkeyPatch.context() as patched:
            die_at(patched, step, _ACTS, after=after, midway={"rmtree": _half_removed})
            try:
                parquet(settings).pass_hours_before(SECOND_HOUR)
            except Killed:
                deaths += 1
            else:
                break
        seen = [key for key in keys(store, settings) if key.endswith(".parquet")]
        assert not seen or globbed(store, settings).equals(expected)
        assert rows(archive).equals(expected)  # sent or waiting: never both, never neither
        parquet(settings).pass_hours_before(SECOND_HOUR)
        assert globbed(store, settings).equals(expected)
        assert hours.is_sealed(archive, FIRST_HOUR)
        assert LocalArchive(settings.archive_dir).hours(EVENTS) == [SECOND_HOUR]
    assert deaths > 8


@pytest.mark.usefixtures("_events_alone")
def test_rows_sealed_and_written_again_are_stored_once(
    store: ObjectStore, settings: Settings, expected: pl.DataFrame, tmp_path: Path
) -> None:
    """An hour beyond all watermarks gets its first rows and is sealed with them; the loader is killed before it
    commits, and writes the planned range again."""
    made = settings_of(store, tmp_path / "made", use_clickhouse=False)
    record(made)
    table = pa.concat_tables(open_archive(made).read(EVENTS, FIRST_HOUR))
    archive = open_archive(settings)

    def load_planned() -> None:
        into = parquet(settings)
        into._passed = SECOND_HOUR
        into.write(0, 60, [Rows(0, 60, {EVENTS: table})])

    step = deaths = 0
    while True:
        step += 1
        shutil.rmtree(settings.archive_dir, ignore_errors=True)
        archive.remove_hour(EVENTS, FIRST_HOUR)
        with pytest.MonkeyPatch.context() as patched:
            die_at(patched, step, _ACTS, after=False, midway={"rmtree": _half_removed})
            try:
                load_planned()
            except Killed:
                deaths += 1
            else:
                break
        load_planned()
        assert globbed(store, settings).equals(expected), step
        assert hours.is_sealed(archive, FIRST_HOUR)
        manifest = archive.read_manifest(EVENTS, FIRST_HOUR)
        assert manifest is not None
        assert (manifest.rows, len(manifest.merged)) == (expected.height, 1)
    assert deaths > 8
    assert LocalArchive(settings.archive_dir).hours(EVENTS) == []


# -- readers -----------------------------------------------------------------------------------


def _polars(store: ObjectStore, root: str) -> list[int]:
    glob = f"{root}/**/*.parquet"
    found = pl.scan_parquet(glob, hive_partitioning=False, storage_options=options(store))
    return found.select("seq").collect()["seq"].to_list()


def _pyarrow(store: ObjectStore, root: str) -> list[int]:
    place = root.removeprefix("s3://")
    found = ds.dataset(place, partitioning="hive", filesystem=store.files())
    return found.to_table(columns=["seq"])["seq"].to_pylist()  # type: ignore[no-any-return]


@pytest.mark.usefixtures("_events_alone")
@pytest.mark.parametrize("reader", [_polars, _pyarrow])
def test_readers_during_sealing_and_late_rows_see_each_row_once(
    reader: Callable[[ObjectStore, str], list[int]], store: ObjectStore, settings: Settings
) -> None:
    """An hour is visible with all its rows or not at all; late rows appear once."""
    writer = journal_of(settings.journal_dir(), recording())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ParquetSink, "pass_hours_before", lambda *_: None)
        load_all(Loader(settings.journal_dir(), writer, parquet(settings), PACE))
    writer.close()
    ended = threading.Event()
    reads: list[list[int]] = []
    troubles: list[str] = []

    def read_on() -> None:
        while not ended.is_set():
            try:
                reads.append(sorted(reader(store, f"{settings.archive_url}/{EVENTS}")))
            except Exception as error:  # noqa: BLE001 - an empty archive is an error to some
                troubles.append(str(error))

    def wait_for_a_reading_of(count: int) -> None:
        deadline = time.monotonic() + 60
        while count not in map(len, reads):
            assert time.monotonic() < deadline, (count, set(map(len, reads)), troubles[-1:])
            time.sleep(0.02)

    tables = list(LocalArchive(settings.archive_dir).read(EVENTS, FIRST_HOUR))
    sealed = sum(table.num_rows for table in tables)
    table = tables[0].slice(0, 5)
    seq = pa.array([10_000 + n for n in range(5)], table.schema.field("seq").type)
    at = table.schema.get_field_index("seq")
    thread = threading.Thread(target=read_on)
    thread.start()
    try:
        time.sleep(0.1)
        parquet(settings).pass_hours_before(SECOND_HOUR)
        wait_for_a_reading_of(sealed)
        for n in range(3):
            late(settings, table.set_column(at, table.schema.field(at), seq), 90_000 + 10 * n)
            wait_for_a_reading_of(sealed + 5 * (n + 1))
    finally:
        ended.set()
        thread.join()
    hour = sorted(_polars(store, f"{settings.archive_url}/{FIRST}"))
    whole = [n for n in hour if n < 10_000]
    assert len(whole) > 100
    for got in reads:
        once = [n for n in got if n < 10_000]
        assert once in ([], whole)
        assert len(got) - len(once) in range(0, 16, 5)
    assert len({len(got) for got in reads if got}) > 2
    assert sorted(reader(store, f"{settings.archive_url}/{EVENTS}")) == hour


# -- rebuilding, restoring, computing ------------------------------------------------------------


@pytest.mark.parametrize("damage", ["none", "lost", "damaged"])
def test_an_intact_hour_is_not_written_by_a_rebuild(
    damage: str, store: ObjectStore, settings: Settings, expected: pl.DataFrame
) -> None:
    record(settings)
    archive = open_archive(settings)
    before = archive.read_manifest(EVENTS, FIRST_HOUR)
    key = f"{settings.archive_base}/{FIRST}/{object_storage.SORTED}"
    files = store.files()
    if damage == "lost":
        files.delete_file(key)
    elif damage == "damaged":
        with files.open_output_stream(key) as stream:
            stream.write(b"PAR1 no longer")
    store.requests.clear()
    report = rebuild(settings, FIRST_HOUR)
    assert report.complete
    assert globbed(store, settings).equals(expected)
    after = archive.read_manifest(EVENTS, FIRST_HOUR)
    assert after == before
    written = [r for r in store.requests if r.startswith("PUT") and object_storage.SORTED in r]
    assert len(written) == (damage != "none")


def test_a_rebuild_keeps_late_rows_of_other_records(store: ObjectStore, settings: Settings) -> None:
    record(settings)
    late(settings, next(open_archive(settings).read(EVENTS, FIRST_HOUR)).slice(0, 7))
    before = globbed(store, settings)
    rebuild(settings, FIRST_HOUR)
    assert globbed(store, settings).equals(before)


def test_a_rebuild_sends_a_waiting_hour(
    store: ObjectStore, settings: Settings, expected: pl.DataFrame
) -> None:
    writer = journal_of(settings.journal_dir(), recording())
    load = Loader(settings.journal_dir(), writer, parquet(settings), PACE)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "kalshi_platform.archive.sealing.seal",
            lambda archive, hour, proceed: hours.seal(archive, hour, proceed=proceed),
        )  # killed before
        load_all(load)
    writer.close()
    assert not [key for key in keys(store, settings) if key.endswith(".parquet")]
    rebuild(settings, FIRST_HOUR)
    assert globbed(store, settings).equals(expected)


@pytest.mark.parametrize("step", ["set apart", "sent in part"])
def test_a_rebuild_finishes_a_killed_sealing(
    step: str, store: ObjectStore, settings: Settings, expected: pl.DataFrame
) -> None:
    calls = 0
    put = object_storage.ObjectArchive._put

    def killed(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if step == "set apart" or calls == 2:
            raise Killed
        put(*arguments)

    writer = journal_of(settings.journal_dir(), recording())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(object_storage.ObjectArchive, "_put", killed)
        load = Loader(settings.journal_dir(), writer, parquet(settings), PACE)
        load.start()
        load.drain()
        assert not load.join(120)
    writer.close()
    sent = [key for key in keys(store, settings) if key.endswith(".parquet")]
    assert len(sent) == calls - 1
    watermarks.advance(settings.journals_dir, 0, SECOND_HOUR)
    report = rebuild(settings, FIRST_HOUR)
    assert report.complete
    assert {it.dataset for it in report.datasets} == {*hours.BUILT} - {"book_checkpoints"}
    assert globbed(store, settings).equals(expected)
    assert not list((settings.archive_dir / object_storage.OUTGOING).rglob("*.parquet"))


def test_a_lost_object_is_restored_from_clickhouse(
    store: ObjectStore, with_clickhouse: Settings, expected: pl.DataFrame
) -> None:
    settings = with_clickhouse
    record(settings)

    def compared() -> Any:
        with closing(connect(settings)) as client:
            return compare_hours(
                settings, client, continuity.extent(client), datetime.now().astimezone()
            )

    store.requests.clear()
    assert compared().compared == (FIRST_HOUR,)
    assert compared().equal == 1
    store.requests.clear()
    assert compared().compared == ()  # nothing has changed
    assert not [r for r in store.requests if "GET" in r and "list-type" not in r]
    shutil.rmtree(settings.journal_dir())
    store.files().delete_file(f"{settings.archive_base}/{FIRST}/{object_storage.SORTED}")
    (lost,) = compared().differences
    assert "lacks" in lost.what
    rebuild(settings, FIRST_HOUR)
    assert globbed(store, settings).equals(expected)
    assert compared().differences == ()
    archive = open_archive(settings)
    (file,) = archive.files(EVENTS, FIRST_HOUR)
    again = next(archive.read(EVENTS, FIRST_HOUR)).slice(0, 7)
    archive.write(EVENTS, FIRST_HOUR, part_name(0, 90_000, 90_010), [again], again.schema)
    with store.files().open_output_stream(file.key) as stream:
        stream.write(b"PAR1 no longer")
    rebuild(settings, FIRST_HOUR)  # ClickHouse also has the rows waiting behind a damaged object
    assert globbed(store, settings).equals(expected)
    assert len(list((settings.archive_dir / object_storage.REPLACED).iterdir())) == 1


def test_an_empty_clickhouse_is_filled_from_the_bucket(
    store: ObjectStore,
    with_clickhouse: Settings,
    expected: pl.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = settings_of(
        store, tmp_path / "first", parquet_dir=with_clickhouse.parquet_dir, use_clickhouse=False
    )
    record(first)
    done = restore(with_clickhouse, open_archive(with_clickhouse), None, lambda _: None)
    assert {it.hour for it in done} == {FIRST_HOUR}  # the second hour waits where it was recorded
    for name in ("s3_endpoint_url", "aws_region"):
        monkeypatch.setenv(name.upper(), str(getattr(with_clickhouse, name)))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    elsewhere = archive_at(with_clickhouse.archive_url)
    again = restore(with_clickhouse, elsewhere, (FIRST_HOUR, FIRST_HOUR), lambda _: None)
    assert {it.verdict for it in again} == {Verdict.EQUAL}
    assert [(it.rows, it.checksum) for it in again] == [(it.rows, it.checksum) for it in done]
    with closing(connect(with_clickhouse)) as client:
        assert client.query("SELECT count() FROM orderbook_events").result_rows == [
            (expected.height,)
        ]


def test_analytics_are_computed_from_and_stored_in_the_bucket(
    store: ObjectStore, settings: Settings
) -> None:
    record(settings)
    for _ in range(2):
        store.requests.clear()
        computed = compute_hour(settings, FIRST_HOUR)
        assert computed.report.complete
        for dataset in computed.report.datasets:
            found = globbed(store, settings, dataset.dataset)
            assert found.height == dataset.rows > 0
    written = [r for r in store.requests if r.startswith("PUT") and ".parquet" in r]
    assert written == []  # the same bytes are there already
    open_hour = compute_hour(settings, SECOND_HOUR)  # its rows wait here
    assert not open_hour.report.complete
    assert open_hour.report.datasets


def test_a_sweep_keeps_an_hour_being_computed(
    store: ObjectStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "GRACE_S", -1.0)
    archive = open_archive(settings)
    table = SPREADS.arrow.empty_table()
    with archive.writing(SPREADS.name, FIRST_HOUR, "hour.parquet", table.schema) as add:
        compaction.sweep(archive)
        add(table)
    assert [file.name for file in archive.files(SPREADS.name, FIRST_HOUR)] == ["hour.parquet"]


def test_the_market_catalogue_is_one_replaced_object(
    store: ObjectStore, settings: Settings
) -> None:
    archive = open_archive(settings)
    assert archive.whole("market_catalog", "markets.parquet") is None
    for rows in (0, 1):
        table = arrow(MARKET_CATALOG, [{"market_ticker": "A-1"}] * rows)
        file = archive.write_whole("market_catalog", "markets.parquet", table)
        assert archive.whole("market_catalog", "markets.parquet") == file
        assert table_of(file, MARKET_CATALOG.arrow).num_rows == rows
    assert keys(store, settings) == ["market_catalog/markets.parquet"]


# -- outages and refusals of the store -----------------------------------------------------------------


def test_after_a_store_outage_each_row_is_stored_once(
    store: ObjectStore, settings: Settings, expected: pl.DataFrame
) -> None:
    writer = journal_of(settings.journal_dir(), recording())
    load = Loader(settings.journal_dir(), writer, parquet(settings), PACE)
    store.stop()
    load.start()
    wait_for(lambda: load.trouble is not None, load)
    assert "cannot be reached (NETWORK_CONNECTION" in str(load.trouble)
    assert not load.refused
    store.start()
    wait_for(lambda: load.lag == 0, load)
    load.drain()
    assert load.join(120), load.failure or load.trouble
    writer.close()
    assert globbed(store, settings).equals(expected)
    assert hours.is_sealed(open_archive(settings), FIRST_HOUR)


def test_with_intermittent_errors_each_row_is_stored_once(
    store: ObjectStore, settings: Settings, expected: pl.DataFrame
) -> None:
    asked: dict[str, int] = {"PUT": 0, "GET": 0, "HEAD": 0}
    failing = {
        n + m for n in (1, 9, 40) for m in range(3)
    }  # more failures in a row than the client's attempts

    def now_and_then(method: str, path: str) -> int | None:
        if settings.archive_url.rpartition("/")[2] not in path:
            return None
        asked[method] += 1
        return 503 if asked[method] in failing else None

    writer = journal_of(settings.journal_dir(), recording())
    load = Loader(settings.journal_dir(), writer, parquet(settings), PACE)
    store.fault = now_and_then
    load.start()
    try:
        wait_for(lambda: load.lag == 0, load)
    finally:
        store.fault = None
        load.drain()
    assert load.join(120), load.failure or load.trouble
    writer.close()
    assert min(asked.values()) > 9, asked
    assert globbed(store, settings).equals(expected)


def test_an_upload_whose_last_response_is_lost_is_recognised(
    store: ObjectStore, settings: Settings, tmp_path: Path
) -> None:
    """The existing object is recognised before it is sent again."""
    archive = open_archive(settings)
    assert isinstance(archive, object_storage.ObjectArchive)
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * (45 << 10))
    key = f"{settings.archive_base}/large.parquet"
    lost = iter([503] * 2)  # as many as the client's attempts
    store.lost = lambda method, asked: (
        next(lost, None) if method == "POST" and "uploadId" in asked else None
    )
    try:
        with pytest.raises(StoreUnavailable, match="during CompleteMultipartUpload"):
            archive._send(path, key)
        store.requests.clear()
        archive._send(path, key)
    finally:
        store.lost = None
    assert not [r for r in store.requests if r.startswith(("PUT", "POST"))]
    assert keys(store, settings) == ["large.parquet"]


def test_a_partial_upload_creates_no_object(
    store: ObjectStore, settings: Settings, tmp_path: Path
) -> None:
    """Ten megabytes and more go in parts; closing what has failed must not make an object of the rest."""
    archive = open_archive(settings)
    assert isinstance(archive, object_storage.ObjectArchive)
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * (25 << 12))
    key = f"{settings.archive_base}/large.parquet"
    store.requests.clear()
    store.fault = lambda method, asked: 500 if method == "PUT" and "partNumber=2" in asked else None
    with pytest.raises(StoreUnavailable, match="during UploadPart"):
        archive._put(path, key)
    store.fault = None
    assert keys(store, settings) == []
    assert not [r for r in store.requests if r.startswith("POST") and "uploadId" in r]
    archive._put(path, key)
    assert keys(store, settings) == ["large.parquet"]
    with store.files().open_input_stream(key) as stream:
        assert stream.read() == path.read_bytes()


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (403, "the key may not do that"),
        (301, "in another region"),
        (418, "it answers 418"),
    ],
)
def test_a_lasting_refusal_names_the_remedy(
    fault: int, sentence: str, store: ObjectStore, settings: Settings
) -> None:
    store.fault = lambda *_: fault
    try:
        with pytest.raises(StoreRefused, match=sentence) as refused:
            parquet(settings).pass_hours_before(SECOND_HOUR)
    finally:
        store.fault = None
    assert KEY not in str(refused.value)
    assert KEY_ID not in str(refused.value)


def test_a_missing_bucket_is_reported_by_loader_and_doctor(
    store: ObjectStore, tmp_path: Path
) -> None:
    good = settings_of(store, tmp_path, use_clickhouse=False)
    assert doctor._archive(good).mark is doctor.Mark.GOOD
    assert keys(store, good) == []
    bad = settings_of(store, tmp_path, parquet_dir="s3://nowhere/x", use_clickhouse=False)
    found = doctor._archive(bad)
    assert found.mark is doctor.Mark.BAD
    assert "there is no such bucket" in found.text


def test_an_unknown_key_is_reported_without_the_key(store: ObjectStore, settings: Settings) -> None:
    wrong = settings.model_copy(
        update={
            "aws_access_key_id": SecretStr("WRONG-ID"),
            "aws_secret_access_key": SecretStr("wrong-secret"),
        }
    )
    store.require_keys(True)
    try:
        found = doctor._archive(wrong)
        with pytest.raises(StoreRefused) as refused:
            hours.is_sealed(open_archive(wrong), FIRST_HOUR)
    finally:
        store.require_keys(False)
    for text in (str(refused.value), found.text, repr(wrong), repr(open_archive(wrong))):
        assert "wrong-secret" not in text
        assert "WRONG-ID" not in text
    assert "AWS_ACCESS_KEY_ID" in found.text
    assert found.mark is doctor.Mark.BAD


# -- the whole pipeline---------------------------------------------------------------------------


def test_the_streamer_records_into_a_bucket(
    store: ObjectStore, with_clickhouse: Settings, simulator: Simulator, tmp_path: Path
) -> None:
    settings = with_clickhouse.model_copy(
        update={"kalshi_ws_url": simulator.ws_url, "kalshi_rest_url": simulator.rest_url}
    )
    key_file = settings.exchange.key_file
    key_file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(simulator.key_file, key_file)
    streamer = Streamer(settings)
    streamer.start()
    deadline = time.monotonic() + 120
    while (health := streamer.health()).deltas < 300 or health.stores["parquet"].lag > 1_000:
        assert time.monotonic() < deadline, health
        time.sleep(0.1)
    assert streamer.stop(60)
    # An open hour waits locally; one that ended meanwhile has been sent.
    open_hour = f"/hour={hour_of_ns(time.time_ns()):%H}/"
    assert [k for k in keys(store, settings) if open_hour in k and k.endswith(".parquet")] == []
    archive = open_archive(settings)
    recorded = archive.hours(EVENTS)
    count = sum(table.num_rows for hour in recorded for table in archive.read(EVENTS, hour))
    writer = Writer(settings.journal_dir())
    hour_after = hour_of_ns(time.time_ns()) + HOUR
    writer.note("heartbeat", {}, recv_ns=hour_start_ns(hour_after))
    writer.submit()
    assert writer.wait_durable(writer.next_n, 60)
    for into in (parquet(settings), ClickHouseSink(settings, str(writer.id))):
        load_all(Loader(settings.journal_dir(), writer, into, PACE))
    writer.close()
    found = globbed(store, settings)
    assert found.height == count
    assert found.select("conn_id", "sid", "seq", "side", "price").is_unique().all()
    with closing(connect(settings)) as client:
        hot = continuity.extent(client)
        parity = compare_hours(settings, client, hot, hour_after)
    assert parity.compared == tuple(reversed(recorded))
    assert parity.differences == ()


# -- the docs ------------------------------------------------------------------------------------


def test_the_polars_snippet_of_the_docs_runs_on_a_bucket(
    store: ObjectStore, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(settings)
    compute_hour(settings, FIRST_HOUR, ["spreads"])
    for name, value in options(store).items():
        monkeypatch.setenv(name.upper(), value)
    names: dict[str, Any] = {"archive": settings.archive_url, "chart": str(tmp_path / "c.png")}
    exec(compile(SNIPPETS["Polars"], "Polars", "exec"), names)
    names["plt"].close("all")
    assert set(names["result"]["market_ticker"]) == {"A-1"}  # the other has no spread
    (snippet,) = re.findall(
        r"^## An archive on object storage\n.*?```python\n(.*?)```",
        PAGE.read_text("utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    here = f"date={FIRST_HOUR:%Y-%m-%d}/hour={FIRST_HOUR:%H}"
    exec(snippet.replace("date=2026-11-22/hour=14", here).replace("KXFED-27-T0.5", "A-1"), names)
    assert names["events"].height == names["hour"].collect().height > 0

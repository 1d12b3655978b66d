"""Several shards, one archive: an hour is sealed after all watermarks, and books are never confused."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.analytics.books import books
from kalshi_platform.archive import (
    FROM_CLICKHOUSE,
    LocalArchive,
    compaction,
    hours,
    sealing,
    watermarks,
)
from kalshi_platform.archive.hours import HourReport
from kalshi_platform.archive.row_statistics import RowStatistics
from kalshi_platform.clickhouse import client
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.writer import Writer
from kalshi_platform.loading.loader import Loader
from kalshi_platform.loading.rebuild import rebuild
from kalshi_platform.loading.restore import restore
from kalshi_platform.loading.sinks import ClickHouseSink, ParquetSink
from kalshi_platform.schema import DATASETS
from kalshi_platform.settings import Settings
from kalshi_platform_tests import wire
from kalshi_platform_tests.archived import paths
from kalshi_platform_tests.clickhouse.tables import prepare
from kalshi_platform_tests.loading.test_loader import (
    FIRST_HOUR,
    PATIENCE_S,
    SECOND_HOUR,
    SMALL,
    START_NS,
    archived,
    load_all,
)

THIRD_HOUR = SECOND_HOUR + timedelta(hours=1)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalshi_platform.loading.shared_rows.CHUNK_ROWS", 30)
    monkeypatch.setattr(compaction, "LINGER_S", 0.0)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return platform_settings.load(
        kalshi_data_dir=tmp_path, use_clickhouse=False, stream_shards=2, hot_retention_days=36_500
    )


@pytest.fixture
def hot(tmp_path: Path, clickhouse_url: str, clickhouse_database: str) -> Settings:
    """Settings with a ClickHouse database of the test's own."""
    made = platform_settings.load(
        kalshi_data_dir=tmp_path,
        clickhouse_url=clickhouse_url,
        clickhouse_database=clickhouse_database,
        stream_shards=2,
        hot_retention_days=36_500,
    )
    prepare(made)
    return made


def at(seconds: float) -> int:
    """Receive time, `seconds` after the beginning; the hour turns after 100."""
    return START_NS + int(seconds * wire.SECOND)


def life(
    shard: int, ticker: str, begin: float, end: float, *, conn: int | None = None
) -> list[wire.Record]:
    """One connection of a shard with one market: a delta a second, a heartbeat every ten."""
    who = wire.conn_id(conn or 10 + shard)
    records: list[wire.Record] = [
        wire.started(at(begin)),
        wire.connected(who, at(begin)),
        (at(begin), who, Kind.SNAPSHOT, wire.snapshot(ticker, 1, {4_000: 900, 3_900: 40}, {})),
    ]
    for n in range(int(end - begin)):
        when = at(begin + 1 + n)
        price = 4_000 if n % 2 else 4_100 + 100 * (n % 5)
        records.append((when, who, Kind.DELTA, wire.delta(ticker, 2 + n, "yes", price, 3)))
        if n % 10 == 9:
            records.append((when, who, Kind.NOTE, wire.note("heartbeat", {"state": "streaming"})))
    return records


class Shard:
    """One shard's journal and its load into the archive, life after life."""

    def __init__(self, settings: Settings, number: int) -> None:
        self.settings = settings
        self.number = number
        self.folder = settings.journal_dir(number)
        self.reports: list[HourReport] = []

    def record(self, records: Sequence[wire.Record], *, load: bool = True) -> None:
        """Journal the records and, unless `load` is false, load them into the archive."""
        writer = self.writer(records)
        if load:
            self.load(writer)
        writer.close()

    def writer(self, records: Sequence[wire.Record]) -> Writer:
        writer = Writer(self.folder)
        watermarks.register(self.settings.journals_dir, self.number, empty=not writer.next_n)
        for record in records:
            writer.append(*record)
        writer.submit()
        assert writer.wait_durable(writer.next_n, PATIENCE_S)
        return writer

    def store(self) -> ParquetSink:
        root, journals = self.settings.archive_dir, self.settings.journals_dir
        return ParquetSink(LocalArchive(root), self.number, self.reports.append, journals)

    def load(self, writer: Writer) -> None:
        load_all(Loader(self.folder, writer, self.store(), SMALL, shard=self.number))

    def heat(self) -> None:
        """Load the journal into ClickHouse."""
        writer = Writer(self.folder)
        store = ClickHouseSink(self.settings, str(writer.id))
        load_all(Loader(self.folder, writer, store, SMALL, shard=self.number))
        writer.close()

    def sealed(self) -> list[datetime]:
        return [report.hour for report in self.reports if report.complete]


@pytest.fixture(autouse=True)
def _long_ago(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shard registers its watermark when its records begin."""
    monkeypatch.setattr(watermarks, "_now", lambda: FIRST_HOUR)


def test_an_hour_is_sealed_once_by_the_last_shard(settings: Settings) -> None:
    fast, slow = Shard(settings, 0), Shard(settings, 1)
    writer = slow.writer(life(1, "B-2", 2, 90))
    slow.load(writer)
    fast.record(life(0, "A-1", 0, 200))
    root = settings.archive_dir
    assert not hours.is_sealed(LocalArchive(root), FIRST_HOUR)
    assert watermarks.blocking_shards(settings.journals_dir, FIRST_HOUR) == [1]
    assert rebuild(settings, FIRST_HOUR).complete is False  # not by hand either
    assert not hours.is_sealed(LocalArchive(root), FIRST_HOUR)
    writer.append(*wire.started(at(101)))
    writer.submit()
    assert writer.wait_durable(writer.next_n, PATIENCE_S)
    slow.load(writer)
    assert hours.is_sealed(LocalArchive(root), FIRST_HOUR)
    assert (fast.sealed(), slow.sealed()) == ([], [FIRST_HOUR])
    manifest = LocalArchive(root).read_manifest("orderbook_events", FIRST_HOUR)
    assert manifest is not None
    assert manifest.markets == 2
    assert manifest.rows == (99 + 2) + (88 + 2)
    writer.close()


def test_the_open_hour_is_reported_by_the_first_shard_only(settings: Settings) -> None:
    first, second = Shard(settings, 0), Shard(settings, 1)
    first.record(life(0, "A-1", 0, 50))
    second.record(life(1, "B-2", 1, 50))
    assert [(r.hour, r.complete) for r in first.reports] == [(FIRST_HOUR, False)]
    assert second.reports == []


def test_a_killed_shard_keeps_its_hours_unsealed(
    settings: Settings,
) -> None:
    lives, killed = Shard(settings, 0), Shard(settings, 1)
    killed.record(life(1, "B-2", 0, 60), load=False)  # in the journal, in no store
    lives.record(life(0, "A-1", 0, 4_000))
    root = settings.archive_dir
    assert not hours.is_sealed(LocalArchive(root), FIRST_HOUR)
    assert not hours.is_sealed(LocalArchive(root), SECOND_HOUR)
    killed.record(life(1, "B-2", 3_710, 3_800, conn=21))
    assert killed.sealed() == [FIRST_HOUR, SECOND_HOUR]
    assert archived(root, "orderbook_events").height == (4_000 + 2) + (60 + 2) + (90 + 2)


def test_an_hour_of_a_killed_recorder_is_sealed_once(settings: Settings) -> None:
    """The next start's first record ends its connection, as of the last frame, in the hour before."""
    shard = Shard(settings, 0)
    shard.record(life(0, "A-1", 0, 60))
    shard.record(life(0, "A-1", 150, 170, conn=20))
    shard.record(life(0, "A-1", 3_710, 3_720, conn=30))
    first, second = (shard.reports[n] for n, it in enumerate(shard.reports) if it.complete)
    assert (first.hour, second.hour) == (FIRST_HOUR, SECOND_HOUR)
    for sealed in (first, second):
        assert kinds(settings, sealed.hour).count("unheard") == 1
        rows = {dataset.dataset: dataset.rows for dataset in sealed.datasets}
        assert rows["stream_events"] == len(kinds(settings, sealed.hour))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    "step", [(sealing, "seal"), (watermarks, "advance")], ids=["seal", "advance"]
)
def test_a_kill_while_an_hour_is_passed_is_finished_by_the_next_start(
    step: tuple[object, str], after: bool, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = Shard(settings, 0)
    shard.record(life(0, "A-1", 0, 60))
    writer = shard.writer(life(0, "A-1", 150, 160, conn=20))
    act = getattr(*step)

    def killed(*args: object) -> None:
        if after:
            act(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(*step, killed)
        load = Loader(shard.folder, writer, shard.store(), SMALL)
        load.start()
        deadline = time.monotonic() + PATIENCE_S
        while not isinstance(load.failure, KeyboardInterrupt):
            assert time.monotonic() < deadline, load.trouble
            time.sleep(0.01)
        load.drain()
        assert load.join(PATIENCE_S) is False
    shard.load(writer)
    writer.close()
    archive = LocalArchive(settings.archive_dir)
    assert hours.is_sealed(archive, FIRST_HOUR)
    assert watermarks.watermark_of(settings.journals_dir, 0).before == SECOND_HOUR
    assert kinds(settings, FIRST_HOUR).count("unheard") == 1
    sealed = [report for report in shard.reports if report.complete][-1]
    rows = {dataset.dataset: dataset.rows for dataset in sealed.datasets}
    assert rows["stream_events"] == len(kinds(settings, FIRST_HOUR))
    assert archived(settings.archive_dir, "orderbook_events").height == (60 + 2) + (10 + 2)


def test_an_archive_restored_to_an_earlier_state_is_sealed_hour_by_hour(
    settings: Settings, tmp_path: Path
) -> None:
    """The watermark is of the archive that was lost: no hour is sealed before it is loaded again."""
    shard = Shard(settings, 0)
    shard.record(life(0, "A-1", 0, 60))
    shutil.copytree(settings.archive_dir, tmp_path / "backup")
    shard.record(life(0, "A-1", 150, 170, conn=20))
    shard.record(life(0, "A-1", 3_690, 3_710, conn=30))
    assert shard.sealed() == [FIRST_HOUR, SECOND_HOUR]
    held = archived(settings.archive_dir, "stream_events").sort("record", "kind")
    shutil.rmtree(settings.archive_dir)
    shutil.move(tmp_path / "backup", settings.archive_dir)
    shard.record([wire.started(at(3_720))])
    sealed = shard.sealed()[2:]
    assert sealed == [FIRST_HOUR, SECOND_HOUR]
    again = archived(settings.archive_dir, "stream_events").sort("record", "kind")
    assert again.filter(pl.col("ingest_ts") <= held["ingest_ts"].max()).equals(held)


def kinds(settings: Settings, hour: datetime) -> list[str]:
    """The kinds of an hour's stream events."""
    tables = LocalArchive(settings.archive_dir).read("stream_events", hour)
    return [str(kind) for table in tables for kind in table["kind"].to_pylist()]


def test_a_resting_shard_blocks_no_hour(
    settings: Settings,
) -> None:
    lives, stops = Shard(settings, 0), Shard(settings, 1)
    stops.record(life(1, "B-2", 0, 60))
    store = lives.store()
    writer = lives.writer(life(0, "A-1", 0, 150))
    load_all(Loader(lives.folder, writer, store, SMALL))
    assert lives.sealed() == []
    stops.store().drained(seal=False)
    writer.append(at(151), wire.conn_id(10), Kind.DELTA, wire.delta("A-1", 152, "yes", 100, 3))
    writer.submit()
    assert writer.wait_durable(writer.next_n, PATIENCE_S)
    load_all(Loader(lives.folder, writer, store, SMALL))
    assert lives.sealed() == [FIRST_HOUR]
    writer.close()


def test_draining_the_last_shard_seals_the_waiting_hours(settings: Settings) -> None:
    lives, former = Shard(settings, 0), Shard(settings, 1)
    writer = former.writer(life(1, "B-2", 0, 60))
    lives.record(life(0, "A-1", 0, 150))
    store = former.store()
    load_all(Loader(former.folder, writer, store, SMALL, shard=former.number))
    store.drained(seal=True)
    assert former.sealed() == [FIRST_HOUR]
    writer.close()


def test_sealing_waits_for_the_change_lock_loading_does_not(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kalshi_platform.loading.sinks.SEAL_LOCK_TIMEOUT_S", 0.0)
    shard = Shard(settings, 0)
    store = shard.store()
    writer = shard.writer(life(0, "A-1", 0, 150))
    with LocalArchive(settings.archive_dir).changing():
        load_all(Loader(shard.folder, writer, store, SMALL))
        assert archived(settings.archive_dir, "orderbook_events").height == 150 + 2
        assert shard.sealed() == []
    writer.append(*wire.started(at(151)))
    writer.submit()
    assert writer.wait_durable(writer.next_n, PATIENCE_S)
    load_all(Loader(shard.folder, writer, store, SMALL))
    assert shard.sealed() == [FIRST_HOUR]
    writer.close()


def test_concurrent_loading_sealing_and_compaction_is_exact(
    settings: Settings,
) -> None:
    """Two loaders with late rows over six hours, and a compaction that never pauses."""
    turns = [100 + 3_600 * n for n in range(6)]
    for number, ticker in enumerate(["A-1", "B-2"]):
        who, records = wire.conn_id(10 + number), life(number, ticker, 0, 1)
        seq = 3
        for n, turn in enumerate(turns):
            for step in range(240):  # every so often the clock is an hour back
                back = 3_600 if n and step % 40 == number * 7 else 0
                frame = wire.delta(ticker, seq, "yes", 4_000, 1)
                records.append((at(turn + 1 + 10 * step - back), who, int(Kind.DELTA), frame))
                seq += 1
        Shard(settings, number).record(records, load=False)
    argv = [sys.executable, "-c", LOADING, str(settings.data_dir)]
    processes = [subprocess.Popen([*argv, str(number)], stdout=-1, text=True) for number in (0, 1)]
    root = settings.archive_dir
    refused: list[str] = []
    while any(process.poll() is None for process in processes):
        compaction.compact(
            LocalArchive(root),
            compaction.pending(LocalArchive(root)),
            lambda _: None,
            lambda _, error: refused.append(str(error)),
        )
    reports = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], reports
    events = archived(root, "orderbook_events")
    assert events.height == 2 * (2 + 1 + 6 * 240)
    assert not events.select("conn_id", "seq", "side", "price").is_duplicated().any()
    sealed = Counter(line for said in reports for line in said.split("\n") if line)
    passed = [
        hour
        for hour in LocalArchive(root).hours("orderbook_events")
        if hours.is_sealed(LocalArchive(root), hour)
    ]
    assert len(passed) == 6  # all but the one that goes on
    assert set(sealed) == {f"{hour:%Y-%m-%d %H}" for hour in passed}
    for hour in passed:
        for name, found in content(root, hour).items():
            manifest = LocalArchive(root).read_manifest(name, hour)
            assert manifest is not None
            assert (manifest.rows, manifest.checksum) == (found.rows, found.checksum)
    # A refusal falls between a late row and its seal; it does not last.
    compaction.compact(
        LocalArchive(root), compaction.pending(LocalArchive(root)), lambda _: None, _raise
    )
    assert all(
        hours.is_compacted([p.name for p in paths(root, name, hour)])
        for hour in passed
        for name in content(root, hour)
    )


LOADING = """
import sys
from pathlib import Path
from kalshi_platform import settings as platform_settings
from kalshi_platform.loading.loader import Loader, Pace
from kalshi_platform.loading.sinks import ParquetSink
from kalshi_platform.journal.writer import Writer
from kalshi_platform.archive import LocalArchive
data, shard = Path(sys.argv[1]), int(sys.argv[2])
settings = platform_settings.load(kalshi_data_dir=data, use_clickhouse=False, stream_shards=2)
folder = settings.journal_dir(shard)
def reports(report):
    if report.complete:
        print(f"{report.hour:%Y-%m-%d %H}")
store = ParquetSink(LocalArchive(settings.archive_dir), shard, reports, settings.journals_dir)
writer = Writer(folder)
load = Loader(folder, writer, store, Pace(rows=60, seconds=0.0, first_s=0.0), shard=shard)
load.start()
load.drain()
assert load.join(120), load.failure or load.trouble
writer.close()
"""
"""A process that loads one shard's journal into the archive, and prints the hours that it seals."""


def test_a_returning_shard_blocks_its_current_hour(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = Shard(settings, 1)
    shard.record(life(1, "B-2", 0, 60))
    shard.store().drained(seal=False)
    monkeypatch.setattr(watermarks, "_now", lambda: SECOND_HOUR)
    assert watermarks.lowest(settings.journals_dir) == SECOND_HOUR
    watermarks.register(settings.journals_dir, 1, empty=False)
    assert watermarks.blocking_shards(settings.journals_dir, FIRST_HOUR) == []
    assert watermarks.blocking_shards(settings.journals_dir, SECOND_HOUR) == [1]


@pytest.mark.parametrize("mark", [None, b"", b"{", b'{"before": 7}'])
def test_a_journal_without_a_watermark_blocks_every_hour(
    mark: bytes | None, settings: Settings
) -> None:
    shard = Shard(settings, 1)
    shard.record(life(1, "B-2", 0, 60), load=False)
    path = shard.folder / watermarks.FILE
    path.unlink() if mark is None else path.write_bytes(mark)
    watermarks.register(settings.journals_dir, 1, empty=False)
    assert watermarks.blocking_shards(settings.journals_dir, FIRST_HOUR - timedelta(days=100)) == [
        1
    ]


def test_each_checkpoint_has_only_its_shards_markets(settings: Settings) -> None:
    for number, ticker in enumerate(["A-1", "B-2"]):
        Shard(settings, number).record(life(number, ticker, number, 130))
    books = archived(settings.archive_dir, "book_checkpoints")
    assert set(books.select("market_ticker", "conn_id").cast(pl.String).rows()) == {
        ("A-1", "00000000-0000-0000-0000-00000000000a"),
        ("B-2", "00000000-0000-0000-0000-00000000000b"),
    }


def test_late_rows_of_one_shard_seal_again_after_the_other(settings: Settings) -> None:
    one, other = Shard(settings, 0), Shard(settings, 1)
    late = [
        (at(70 + n), wire.conn_id(10), int(Kind.DELTA), wire.delta("A-1", 152 + n, "yes", 100, 1))
        for n in range(4)
    ]
    waiting = other.writer(life(1, "B-2", 0, 60))
    one.record([*life(0, "A-1", 0, 150), *late[:2]])
    assert one.sealed() == []
    other.load(waiting)
    waiting.append(*wire.started(at(110)))
    waiting.submit()
    assert waiting.wait_durable(waiting.next_n, PATIENCE_S)
    other.load(waiting)
    assert other.sealed() == [FIRST_HOUR]
    one.record(late[2:])
    assert one.sealed() == [FIRST_HOUR]
    manifest = LocalArchive(settings.archive_dir).read_manifest("orderbook_events", FIRST_HOUR)
    events = archived(settings.archive_dir, "orderbook_events")
    assert manifest is not None
    assert manifest.rows == events.filter(pl.col("ingest_ts") < SECOND_HOUR).height
    waiting.close()


def two_hours(settings: Settings) -> None:
    """Both shards over the turn of the hour."""
    for number, ticker in enumerate(["A-1", "B-2"]):
        Shard(settings, number).record(life(number, ticker, number, 130))


def content(root: Path, hour: datetime = FIRST_HOUR) -> dict[str, RowStatistics]:
    archive = LocalArchive(root)
    return {
        name: compaction.statistics_of(archive.files(name, hour), DATASETS[name])
        for name in hours.BUILT
        if archive.files(name, hour)
    }


@pytest.mark.parametrize("compacted", [False, True])
def test_an_hour_of_two_shards_is_rebuilt_from_both_journals(
    compacted: bool, settings: Settings
) -> None:
    two_hours(settings)
    root = settings.archive_dir
    before = content(root)
    if compacted:
        compaction.compact(LocalArchive(root), [FIRST_HOUR], lambda _: None, _raise)
        (path,) = paths(root, "orderbook_events", FIRST_HOUR)
        path.write_bytes(path.read_bytes()[:100])
    else:
        for shard in (0, 1):
            files = paths(root, "orderbook_events", FIRST_HOUR)
            next(path for path in files if path.name.startswith(f"part-{shard}-")).unlink()
    report = rebuild(settings, FIRST_HOUR)
    assert report.complete
    assert content(root) == before


def test_a_pruned_journals_rows_are_rebuilt_from_clickhouse(
    hot: Settings,
) -> None:
    two_hours(hot)
    for number in (0, 1):
        Shard(hot, number).heat()
    root = hot.archive_dir
    before = content(root)
    shutil.rmtree(hot.journal_dir(1))
    lost = paths(root, "orderbook_events", FIRST_HOUR)
    next(path for path in lost if path.name.startswith("part-1-")).unlink()
    for _ in range(2):  # the second time the hour is whole, and the other journal adds nothing
        report = rebuild(hot, FIRST_HOUR)
        assert report.complete
        assert content(root) == before
    assert [path.name for path in paths(root, "orderbook_events", FIRST_HOUR)] == [FROM_CLICKHOUSE]


def test_coverage_ends_with_a_killed_shards_last_record(
    settings: Settings,
) -> None:
    """The other shard keeps recording, so the hour itself is not silent."""
    Shard(settings, 1).record(life(1, "B-2", 0, 40))
    Shard(settings, 0).record(life(0, "A-1", 0, 150))
    Shard(settings, 1).record(life(1, "B-2", 140, 150, conn=21))
    manifest = LocalArchive(settings.archive_dir).read_manifest("stream_events", FIRST_HOUR)
    assert manifest is not None
    assert manifest.verified_by_market == pytest.approx({"A-1": 100, "B-2": 40}, abs=0.1)


def test_one_shards_start_leaves_other_shards_books_synced(settings: Settings) -> None:
    Shard(settings, 0).record(life(0, "A-1", 0, 130))
    killed = Shard(settings, 1)
    killed.record(life(1, "B-2", 0, 30))
    killed.record(life(1, "B-2", 60, 130, conn=21))
    manifest = LocalArchive(settings.archive_dir).read_manifest("stream_events", FIRST_HOUR)
    assert manifest is not None
    assert manifest.verified_by_market == pytest.approx({"A-1": 100, "B-2": 70}, abs=0.1)
    names = ("orderbook_events", "stream_events", "book_checkpoints")
    rows = [list(LocalArchive(settings.archive_dir).read(name, FIRST_HOUR)) for name in names]
    events, stream, checkpoints = rows
    found = books(FIRST_HOUR, events, checkpoints, stream)
    stale = found.frames.market[~found.frames.verified]
    assert {found.tickers[market] for market in stale} == {"B-2"}


def test_a_market_moving_between_shards_is_covered_by_both(
    settings: Settings,
) -> None:
    """Its new shard's parts come first by name."""
    end = (
        at(50),
        wire.conn_id(11),
        int(Kind.NOTE),
        wire.note("disconnected", {"cause": "stopped"}),
    )
    Shard(settings, 1).record([*life(1, "M-1", 0, 50), end])
    Shard(settings, 1).store().drained(seal=False)
    Shard(settings, 0).record(life(0, "M-1", 60, 130))
    manifest = LocalArchive(settings.archive_dir).read_manifest("stream_events", FIRST_HOUR)
    assert manifest is not None
    assert manifest.verified_by_market == pytest.approx({"M-1": 90}, abs=0.1)
    compaction.compact(LocalArchive(settings.archive_dir), [FIRST_HOUR], lambda _: None, _raise)
    after = hours.describe(LocalArchive(settings.archive_dir), FIRST_HOUR, complete=True)
    assert after.verified_by_market == manifest.verified_by_market


# -- the newest book wins ----------------------------------------------------------------------


def book(settings: Settings, ticker: str = "M-1") -> dict[tuple[str, int], int]:
    """`latest_levels`, prices in 1e-4 dollars, sizes in 1e-2 contracts."""
    rows = (
        client.connect(settings)
        .query(
            "SELECT toString(side), toInt64(price * 10000), toInt64(size * 100) FROM latest_levels FINAL"
            " WHERE size > 0 AND market_ticker = {ticker:String}",
            parameters={"ticker": ticker},
        )
        .result_rows
    )
    return {(side, price): size for side, price, size in rows}


def book_at(settings: Settings, seconds: float, ticker: str = "M-1") -> dict[tuple[str, int], int]:
    instant = datetime.fromtimestamp(at(seconds) / 1e9, FIRST_HOUR.tzinfo)
    rows = (
        client.connect(settings)
        .query(
            "SELECT toString(side), toInt64(price * 10000), toInt64(size * 100)"
            " FROM book_at(ticker = {ticker:String}, at = {at:DateTime64(6, 'UTC')})",
            parameters={"ticker": ticker, "at": instant},
        )
        .result_rows
    )
    return {(side, price): size for side, price, size in rows}


def holding(conn: int, begin: float, end: float, levels: dict[int, int]) -> list[wire.Record]:
    """A connection that follows M-1 with these YES levels, the first of them touched at its end."""
    who = wire.conn_id(conn)
    touch = wire.delta("M-1", 2, "yes", next(iter(levels)), 100)
    return [
        wire.started(at(begin)),
        wire.connected(who, at(begin)),
        (at(begin), who, Kind.SNAPSHOT, wire.snapshot("M-1", 1, levels, {})),
        (at(end), who, Kind.DELTA, touch),
    ]


@pytest.mark.parametrize("late", ["the old shard", "the new shard", "half of the old shard"])
def test_after_a_move_the_new_shards_book_wins(late: str, hot: Settings) -> None:
    """Level 48 was gone when the new shard subscribed: its journal has no row of it."""
    old, new = Shard(hot, 1), Shard(hot, 0)
    moves = holding(11, 0, 10, {5_000: 100, 4_800: 700})
    comes = holding(10, 20, 30, {5_000: 300, 4_700: 50})
    if late == "half of the old shard":
        old.record(moves[:3], load=False)
        old.heat()
        moves = moves[3:]
    old.record(moves, load=False)
    new.record(comes, load=False)
    for shard in (new, old) if late != "the new shard" else (old, new):
        shard.heat()
    # The old shard, or the process that drains it, is started once more.
    old.record([wire.started(at(40))], load=False)
    old.heat()
    assert book(hot) == {("yes", 5_000): 400, ("yes", 4_700): 50}
    assert book_at(hot, 15) == {("yes", 5_000): 200, ("yes", 4_800): 700}
    assert book_at(hot, 35) == {("yes", 5_000): 400, ("yes", 4_700): 50}
    count = client.connect(hot).query("SELECT count() FROM orderbook_events").result_rows
    assert count == [(6,)]


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_recordings_the_newest_subscription_wins(first: int, hot: Settings) -> None:
    """Two subscriptions to one book, recorded at once by mistake: every row is kept, none is confused."""
    early = holding(11, 0, 25, {5_000: 100, 4_800: 700})
    # The exchange: 4_800 is taken away at 15, and 5_000 grows by 100 at 25, which both see.
    gone = (at(15), wire.conn_id(11), int(Kind.DELTA), wire.delta("M-1", 2, "yes", 4_800, -700))
    grown = (at(25), wire.conn_id(11), int(Kind.DELTA), wire.delta("M-1", 3, "yes", 5_000, 100))
    Shard(hot, 1).record([*early[:3], gone, grown], load=False)
    Shard(hot, 0).record(holding(10, 20, 25.001, {5_000: 100}), load=False)
    for number in (first, 1 - first):
        Shard(hot, number).heat()
    assert book(hot) == {("yes", 5_000): 200}
    assert book_at(hot, 26) == {("yes", 5_000): 200}
    proof = (Path(__file__).parents[2] / "infra" / "queries" / "lossless_proof.sql").read_text()
    rows = client.connect(hot).query(proof).named_results()
    found = [(row["frames"], row["unexplained_holes"], row["doubled"]) for row in rows]
    assert sorted(found) == [(2, 0, 0), (3, 0, 0)]


def test_restoring_a_moved_market_gives_the_new_shards_book(hot: Settings) -> None:
    Shard(hot, 1).record(holding(11, 0, 10, {5_000: 100, 4_800: 700}))
    Shard(hot, 0).record(holding(10, 20, 30, {5_000: 300, 4_700: 50}))
    shutil.rmtree(hot.journals_dir)  # else its records are left to the loader
    restore(hot, LocalArchive(hot.archive_dir), None, lambda _: None)
    assert book(hot) == {("yes", 5_000): 400, ("yes", 4_700): 50}


def _raise(_: datetime, error: Exception) -> None:
    raise error

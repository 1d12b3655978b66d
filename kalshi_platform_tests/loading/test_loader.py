"""The loader: exactly once into the archive, whenever and however it ends, hour by hour."""

from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import FROM_CLICKHOUSE, LocalArchive, hours
from kalshi_platform.archive.hours import HourReport
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.errors import StoreRefused, StoreUnavailable
from kalshi_platform.exchange.columnar import Decoded
from kalshi_platform.journal import reader
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.ledger import Ledger
from kalshi_platform.journal.writer import Writer
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.loader import Loader, Pace
from kalshi_platform.loading.rebuild import rebuild
from kalshi_platform.loading.rows import Rows, build_rows
from kalshi_platform.loading.sinks import ClickHouseSink, ParquetSink
from kalshi_platform.loading.traces import Trace
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import floor_hour, hour_of_ns
from kalshi_platform_tests import wire
from kalshi_platform_tests.archived import paths
from kalshi_platform_tests.clickhouse.tables import prepare

HOUR_NS = 3600 * wire.SECOND
START_NS = wire.NOON_NS // HOUR_NS * HOUR_NS + 3_500 * wire.SECOND  # 100 s before the hour
FIRST_HOUR = hour_of_ns(START_NS)
SECOND_HOUR = FIRST_HOUR + timedelta(hours=1)
SMALL = Pace(rows=40, seconds=0.0, first_s=0.0)
PATIENCE_S = 120.0
"""Time-out for short operations on a busy machine."""


def recording(frames: int = 400, step_s: float = 1.0, number: int = 1) -> list[wire.Record]:
    """One connection over the turn of an hour: two markets, a trade every seven frames and a heartbeat
    every ten.
    """
    conn, at = wire.conn_id(number), START_NS + 1_000 * (number - 1)
    records: list[wire.Record] = [
        wire.started(at),
        wire.connected(conn, at),
        (at, conn, Kind.SNAPSHOT, wire.snapshot("A-1", 1, {4_800: 1_000, 4_700: 500}, {5_100: 70})),
        (at, conn, Kind.SNAPSHOT, wire.snapshot("EMPTY-2", 2, {}, {})),
    ]
    for n in range(frames):
        at += int(step_s * wire.SECOND)
        frame = wire.delta("A-1", 3 + n, "yes", 4_800 if n % 3 else 4_600, 5 if n % 2 else 7)
        records.append((at, conn, Kind.DELTA, frame))
        if n % 7 == 6:
            trade = wire.trade("A-1", n // 7 + 1, 4_800, 5)
            records.append((at, conn, Kind.TRADE, trade))
        if n % 10 == 9:
            records.append((at, bytes(16), Kind.NOTE, wire.note("heartbeat", {})))
    return records


def journal_of(folder: Path, records: Sequence[wire.Record], openings: int = 1) -> Writer:
    """A journal with this many segments and 23 records per batch, and the last segment's writer."""
    writer = Writer(folder)
    for n, record in enumerate(records):
        if n and n % -(-len(records) // openings) == 0:
            writer.close()
            writer = Writer(folder)
        writer.append(*record)
        if n % 23 == 0:
            writer.submit()
            assert writer.wait_durable(
                writer.next_n, PATIENCE_S
            )  # otherwise waiting batches are joined
    writer.submit()
    assert writer.wait_durable(len(records), PATIENCE_S)
    return writer


def load_all(load: Loader) -> None:
    load.start()
    load.drain()
    assert load.join(PATIENCE_S), load.failure or load.trouble


def archived(root: Path, dataset: str) -> pl.DataFrame:
    return pl.read_parquet(f"{root}/{dataset}/**/*.parquet", hive_partitioning=False)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalshi_platform.loading.shared_rows.CHUNK_ROWS", 30)
    # Wait long enough for the attempt that finds the fault corrected.
    monkeypatch.setattr("kalshi_platform.loading.loader.DRAIN_GIVE_UP_S", 60.0)


@pytest.fixture
def settings(tmp_path: Path, clickhouse_url: str, clickhouse_database: str) -> Settings:
    made = platform_settings.load(
        kalshi_data_dir=tmp_path,
        clickhouse_url=clickhouse_url,
        clickhouse_database=clickhouse_database,
        hot_retention_days=36_500,
    )
    prepare(made)
    return made


def test_a_sealed_hour_begins_with_every_live_book(
    tmp_path: Path,
) -> None:
    reports: list[HourReport] = []
    writer = journal_of(tmp_path / "journal", recording())
    load_all(
        Loader(
            tmp_path / "journal",
            writer,
            ParquetSink(LocalArchive(tmp_path / "archive"), 0, reports.append),
            SMALL,
        )
    )
    writer.close()
    root = tmp_path / "archive"
    assert hours.is_sealed(LocalArchive(root), FIRST_HOUR)
    assert not hours.is_sealed(LocalArchive(root), SECOND_HOUR)
    assert [(r.hour, r.complete) for r in reports] == [
        (FIRST_HOUR, False),
        (FIRST_HOUR, True),
        (SECOND_HOUR, False),
    ]
    checkpoint = archived(root, "book_checkpoints")
    books = {row["market_ticker"]: row for row in checkpoint.to_dicts()}
    assert set(books) == {"A-1", "EMPTY-2"}
    assert books["EMPTY-2"]["side"] is None
    events = archived(root, "orderbook_events")
    before = events.filter(pl.col("ingest_ts") < SECOND_HOUR)
    last_sizes = {(r["side"], r["price"]): r["size"] for r in before.to_dicts()}
    at_hour = {(r["side"], r["price"]): r["size"] for r in checkpoint.to_dicts() if r["side"]}
    assert at_hour == last_sizes
    manifest = LocalArchive(root).read_manifest("orderbook_events", FIRST_HOUR)
    assert manifest is not None
    assert manifest.rows == before.height
    assert manifest.markets == 1
    assert manifest.gaps == 0
    assert manifest.coverage == 1.0


def archive_all(folder: Path, writer: Writer, root: Path) -> None:
    """Load a journal into an archive of one shard."""
    load_all(Loader(folder, writer, ParquetSink(LocalArchive(root), 0, lambda _: None), SMALL))


class Front:
    """A store in front of another one; subclasses inject faults."""

    def __init__(self, store: ParquetSink | ClickHouseSink) -> None:
        self.name, self.datasets = store.name, store.datasets
        self.place, self.remedy = store.place, store.remedy
        self.ledger: Ledger = store.ledger
        self._store = store

    def holds(self, trace: Trace) -> bool | None:
        return self._store.holds(trace)

    def written_from(self, n: int, since: datetime) -> tuple[int, int] | None:
        return self._store.written_from(n, since)

    def write(self, first_n: int, end_n: int, rows: Sequence[Rows]) -> None:
        self._store.write(first_n, end_n, rows)

    def begin_hour(self, hour: datetime, books: Iterator[pa.Table], n: int) -> None:
        self._store.begin_hour(hour, books, n)

    def abandon(self) -> None:
        self._store.abandon()


class Dying(Front):
    """A working store that raises an unexpected error at a chosen call."""

    def __init__(self, store: ParquetSink | ClickHouseSink, calls: int, *, after: bool) -> None:
        super().__init__(store)
        self._left = calls
        self._after = after
        self.dead = False

    def write(self, first_n: int, end_n: int, rows: Sequence[Rows]) -> None:
        self._call(lambda: self._store.write(first_n, end_n, rows))

    def begin_hour(self, hour: datetime, books: Iterator[pa.Table], n: int) -> None:
        self._call(lambda: self._store.begin_hour(hour, books, n))

    def _call(self, act: Callable[[], None]) -> None:
        self._left -= 1
        self.dead = self._left <= 0
        if self._left == 0 and not self._after:
            raise RuntimeError("killed before")
        act()
        if self._left == 0:
            raise RuntimeError("killed after")


@pytest.mark.parametrize("chunk", [30, 10_000])
@pytest.mark.parametrize("kind", ["parquet", "clickhouse"])
def test_each_row_is_stored_once_after_a_kill_at_any_step(
    kind: str, chunk: int, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies again and again, before and after every kind of write, at random distances; in a journal of
    many openings, of which one chunk holds a part of one, or all.
    """
    monkeypatch.setattr("kalshi_platform.loading.shared_rows.CHUNK_ROWS", chunk)
    records = recording()
    writer = journal_of(tmp_path / "journal", records, openings=9)
    dice = random.Random(3)

    def store() -> ParquetSink | ClickHouseSink:
        if kind == "parquet":
            return ParquetSink(LocalArchive(tmp_path / "archive"), 0, lambda _: None)
        return ClickHouseSink(settings, str(writer.id))

    deaths = 0
    while True:
        dying = Dying(store(), dice.randint(1, 4 if chunk == 30 else 2), after=dice.random() < 0.5)
        load = Loader(tmp_path / "journal", writer, dying, Pace(dice.randint(5, 90), 0.0, 0.0))
        load.start()
        load.drain()
        ended = load.join(PATIENCE_S)
        if load.failure is None:
            assert ended, load.trouble
            break
        assert "killed" in str(load.failure)
        deaths += 1
    writer.close()
    assert deaths > 3
    expected = sum(k == Kind.DELTA for _, _, k, _ in records) + 3
    trades = sum(k == Kind.TRADE for _, _, k, _ in records)
    others = len(records) - (expected - 3) - trades
    if kind == "parquet":
        events = archived(tmp_path / "archive", "orderbook_events")
        assert events.height == expected
        assert not events.is_duplicated().any()
        assert archived(tmp_path / "archive", "stream_events").height == others
        of_trades = archived(tmp_path / "archive", "trades")
        assert of_trades.height == of_trades["trade_id"].n_unique() == trades
    else:
        client = clickhouse.connect(settings)
        assert client.query(
            "SELECT count(), uniqExact(seq, side, price) FROM orderbook_events"
        ).result_rows == [(expected, expected)]
        assert client.query("SELECT count() FROM stream_events").result_rows == [(others,)]
        assert client.query("SELECT count(), uniqExact(trade_id) FROM trades").result_rows == [
            (trades, trades)
        ]
        assert client.query(
            "SELECT uniqExact(market_ticker) FROM book_checkpoints"
        ).result_rows == [(2,)]


@pytest.mark.parametrize("kind", ["parquet", "clickhouse"])
def test_a_loader_restarts_by_itself_after_a_fault(
    kind: str, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kalshi_platform.loading.loader.RESTART_S", 0.01)
    records = recording()
    writer = journal_of(tmp_path / "journal", records, openings=9)
    store = (
        ParquetSink(LocalArchive(tmp_path / "archive"), 0, lambda _: None)
        if kind == "parquet"
        else ClickHouseSink(settings, str(writer.id))
    )
    faults = [Dying(store, calls, after=calls % 2 == 0) for calls in (1, 2, 3, 4)]

    class Faulty(Front):
        """Raises one fault after the other, then none."""

        def write(self, first_n: int, end_n: int, rows: Sequence[Rows]) -> None:
            self._now().write(first_n, end_n, rows)

        def begin_hour(self, hour: datetime, books: Iterator[pa.Table], n: int) -> None:
            self._now().begin_hour(hour, books, n)

        def _now(self) -> Dying | ParquetSink | ClickHouseSink:
            return next((it for it in faults if not it.dead), store)

    said = []
    load = Loader(tmp_path / "journal", writer, Faulty(store), SMALL)
    load.start()
    deadline = time.monotonic() + PATIENCE_S
    while load.lag or load.committed is None or load.trouble:
        if load.trouble:
            assert load.refused
            said.append(load.trouble)
        assert time.monotonic() < deadline, (load.lag, load.trouble)
        time.sleep(0.001)
    load.drain()
    assert load.join(PATIENCE_S)
    writer.close()
    assert load.errors == {"fault": 4}
    assert any("stopped by a fault of the program (RuntimeError: killed" in it for it in said)
    expected = sum(k == Kind.DELTA for _, _, k, _ in records) + 3
    if kind == "parquet":
        events = archived(tmp_path / "archive", "orderbook_events")
        assert events.height == events.unique().height == expected
        return
    counts = clickhouse.connect(settings).query(
        "SELECT count(), uniqExact(seq, side, price) FROM orderbook_events"
    )
    assert counts.result_rows == [(expected, expected)]


class Noting(Front):
    """A store that keeps only its ledger and records the writes that it receives."""

    def __init__(self, folder: Path, act: Callable[[], None] = lambda: None) -> None:
        super().__init__(ParquetSink(LocalArchive(folder / "archive"), 0, lambda _: None))
        self.writes: list[tuple[int, int, int]] = []
        """(first record, end, rows) of each write."""
        self._act = act

    def write(self, first_n: int, end_n: int, rows: Sequence[Rows]) -> None:
        self._act()
        self.writes.append((first_n, end_n, sum(each.count for each in rows)))

    def begin_hour(self, hour: datetime, books: Iterator[pa.Table], n: int) -> None:
        pass


def test_a_slow_store_does_not_wait_for_more_records_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records that came while a range was written have waited `gather_s` already when it took that long."""
    folder, wait_s = tmp_path / "journal", 2 * PATIENCE_S
    records = snapshots(8, 5)
    writer = journal_of(folder, records[:5])
    passed_s = 0.0

    def clock(real: Callable[[], float] = time.monotonic) -> float:
        return real() + passed_s

    def write() -> None:
        nonlocal passed_s
        for record in records[5:]:
            writer.append(*record)
        writer.submit()
        assert writer.wait_durable(len(records), PATIENCE_S)
        passed_s += wait_s
        records.clear()

    monkeypatch.setattr("kalshi_platform.loading.loader.time.monotonic", clock)
    count, store = len(records), Noting(tmp_path, lambda: write() if records else None)
    load = Loader(folder, writer, store, Pace(1_000, seconds=0.0, first_s=0.0, gather_s=wait_s))
    load.start()
    deadline = clock() + wait_s + PATIENCE_S
    while load.committed is None or load.committed.n < count:
        assert clock() < deadline, (load.lag, load.trouble)
        time.sleep(0.01)
    load.drain()
    assert load.join(PATIENCE_S)
    writer.close()
    assert [(first, end) for first, end, _ in store.writes] == [(0, 5), (5, count)]


def snapshots(count: int, levels: int) -> list[wire.Record]:
    """One connection's first books."""
    conn = wire.conn_id(1)
    ladder = {100 + level: 5 for level in range(levels)}
    return [
        wire.started(START_NS),
        wire.connected(conn, START_NS),
        *(
            (START_NS, conn, int(Kind.SNAPSHOT), wire.snapshot(f"M-{n}", n + 1, ladder, {}))
            for n in range(count)
        ),
    ]


def test_writes_are_bounded_by_rows(tmp_path: Path) -> None:
    """Each snapshot is one record and a hundred rows."""
    writer = journal_of(tmp_path / "journal", snapshots(60, 100))
    store = Noting(tmp_path)
    load_all(Loader(tmp_path / "journal", writer, store, Pace(rows=250, seconds=0.0, first_s=0.0)))
    writer.close()
    assert sum(rows for *_, rows in store.writes) == 60 * 101 + 2
    assert max(rows for *_, rows in store.writes) <= 250 + 101


def test_writes_are_bounded_by_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalshi_platform.loading.shared_rows.CHUNK_BYTES", 150_000)
    conn = wire.conn_id(1)
    records = snapshots(0, 0) + [
        (START_NS, conn, int(Kind.MALFORMED), b"x" * 100_000) for _ in range(50)
    ]
    writer = journal_of(tmp_path / "journal", records)
    store = Noting(tmp_path)
    pace = Pace(rows=1_000, seconds=60.0, first_s=60.0, bytes=500_000)
    load_all(Loader(tmp_path / "journal", writer, store, pace))
    writer.close()
    assert len(store.writes) >= 8
    assert sum(rows for *_, rows in store.writes) == len(records)


@pytest.mark.parametrize("at", ["resuming", "replaying what was planned", "deriving"])
def test_an_abandoned_loader_ends_at_once(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It checks after each range: the rest of the journal may have any length."""
    folder = tmp_path / "journal"
    writer = journal_of(folder, recording(1_200))
    if at != "deriving":
        store = Noting(tmp_path)
        load_all(Loader(folder, writer, store, Pace(rows=10_000, seconds=60.0, first_s=60.0)))
        shutil.rmtree(folder / "load" / "hours")
        for state in (folder / "load").glob("*.state"):
            state.unlink()
    if at == "replaying what was planned":
        shutil.rmtree(tmp_path / "archive")  # a version without a record there
        beginning, end = reader.oldest_offset(folder), reader.offset_of(folder, writer.durable.n)
        plan = {"committed": astuple(beginning), "planned": astuple(end)}
        (folder / "load" / "parquet.json").write_text(json.dumps(plan))
    pieces = 0

    def slowly(decoded: Decoded, state: BookState, shard: int) -> tuple[Rows, BookState]:
        nonlocal pieces
        pieces += 1
        time.sleep(0.05)
        return build_rows(decoded, state, shard)

    monkeypatch.setattr("kalshi_platform.loading.loader.build_rows", slowly)
    monkeypatch.setattr("kalshi_platform.loading.shared_rows.build_rows", slowly)
    load = Loader(folder, writer, Noting(tmp_path), Pace(rows=10_000, seconds=60.0, first_s=60.0))
    load.start()
    load.drain()
    deadline = time.monotonic() + PATIENCE_S
    while not pieces:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert load.join(0.2) is False
    wait_for_the_end_of("load-parquet")
    writer.close()
    assert load.failure is None
    assert 0 < pieces < 1_200 / 30


def test_a_store_behind_is_reported_even_while_it_loads(tmp_path: Path) -> None:
    """The age is that of the oldest record that it lacks; a recent write does not change it."""
    begins_ns = time.time_ns() - 150 * wire.SECOND
    records: list[wire.Record] = [
        (begins_ns + n * wire.SECOND // 10, conn, kind, frame)
        for n, (_, conn, kind, frame) in enumerate(recording(400))
    ]
    writer = journal_of(tmp_path / "journal", records)
    go_on = threading.Semaphore(2)

    def slowly() -> None:
        assert go_on.acquire(timeout=PATIENCE_S)

    store = Noting(tmp_path, slowly)
    load = Loader(tmp_path / "journal", writer, store, SMALL)
    load.start()
    deadline = time.monotonic() + PATIENCE_S
    while len(store.writes) < 2 or load.committed is None or load.committed.n < store.writes[1][1]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert load.trouble is None
    assert load.oldest_ns == records[store.writes[1][1]][0]
    assert "parquet is 1" in str(load.late)
    assert f"{load.lag:,} records wait" in str(load.late)
    for _ in range(400):
        go_on.release()
    load.drain()
    assert load.join(PATIENCE_S)
    assert (load.oldest_ns, load.late) == (0, None)
    writer.close()


def wait_for_the_end_of(thread: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while any(each.name == thread for each in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_intermittent_store_gets_each_row_once(
    tmp_path: Path,
) -> None:
    class Flaky(Front):
        def __init__(self) -> None:
            super().__init__(ParquetSink(LocalArchive(tmp_path / "archive"), 0, lambda _: None))
            self.dice = random.Random(1)

        def write(self, first_n: int, end_n: int, rows: Sequence[Rows]) -> None:
            if self.dice.random() < 0.3:
                raise StoreUnavailable("the store is asleep")
            super().write(first_n, end_n, rows)
            if self.dice.random() < 0.3:
                raise StoreUnavailable("the answer was lost")

    writer = journal_of(tmp_path / "journal", recording(200))
    load = Loader(tmp_path / "journal", writer, Flaky(), SMALL)
    load_all(load)
    writer.close()
    assert archived(tmp_path / "archive", "orderbook_events").height == 203
    assert load.rows["orderbook_events"] == 203  # each once, after any number of attempts
    assert load.errors["unreachable"] > 0


def test_a_refusing_store_is_reported_and_loses_nothing(
    tmp_path: Path,
) -> None:
    class Refusing(Front):
        def write(self, first_n: int, end_n: int, rows: Sequence[Rows]) -> None:
            raise StoreRefused("the table is missing", code=60, name="UNKNOWN_TABLE")

        def begin_hour(self, hour: datetime, books: Iterator[pa.Table], n: int) -> None:
            raise AssertionError("nothing was written: no hour can begin")

    records = recording(50)
    writer = journal_of(tmp_path / "journal", records)
    archive = ParquetSink(LocalArchive(tmp_path / "archive"), 0, lambda _: None)
    load = Loader(tmp_path / "journal", writer, Refusing(archive), SMALL)
    load.start()
    load.drain()
    deadline = time.monotonic() + PATIENCE_S
    while load.trouble is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert load.join(1.0) is False
    assert load.refused
    assert load.trouble == "the table is missing"
    assert load.lag == len(records)
    assert load.errors["60 UNKNOWN_TABLE"] >= 1
    assert not load.rows
    writer.close()


@pytest.mark.parametrize("lost", ["the cursor's state", "all states but the hour's", "every state"])
def test_lost_saved_books_are_rebuilt(lost: str, tmp_path: Path) -> None:
    records = recording()
    writer = journal_of(tmp_path / "journal", records)
    root = tmp_path / "archive"
    archive_all(tmp_path / "journal", writer, root)
    notes = tmp_path / "journal" / "load"
    (state,) = notes.glob("*.state")
    if lost == "the cursor's state":
        state.write_bytes(state.read_bytes()[:50])
    else:
        state.unlink()
    if lost == "every state":
        shutil.rmtree(notes / "hours")
    at = records[-1][0]
    writer.append(at, wire.conn_id(1), Kind.DELTA, wire.delta("A-1", 403, "no", 5_100, 30))
    writer.submit()
    assert writer.wait_durable(writer.next_n, PATIENCE_S)
    archive_all(tmp_path / "journal", writer, root)
    writer.close()
    last = archived(root, "orderbook_events").sort("seq").tail(1)
    assert last["seq"][0] == 403
    assert float(last["size"][0]) == 1.0  # 0.70 from the snapshot, and 0.30
    assert archived(root, "orderbook_events").height == 404


def test_an_unwritable_folder_is_reported_until_corrected(
    tmp_path: Path,
) -> None:
    writer = journal_of(tmp_path / "journal", recording(50))
    in_the_way = tmp_path / "journal" / "load" / "parquet.tmp"  # where the cursor is written first
    in_the_way.mkdir(parents=True)
    load = Loader(
        tmp_path / "journal",
        writer,
        ParquetSink(LocalArchive(tmp_path / "archive"), 0, lambda _: None),
        SMALL,
    )
    load.start()
    while load.trouble is None:
        assert load.failure is None
        time.sleep(0.01)
    assert "cannot be written" in load.trouble
    in_the_way.rmdir()
    load.drain()
    assert load.join(PATIENCE_S)
    writer.close()
    assert archived(tmp_path / "archive", "orderbook_events").height == 53
    assert load.errors["disk"] >= 1


def test_a_clock_set_back_over_the_hour_seals_it_again(
    tmp_path: Path,
) -> None:
    records = recording(200)
    conn = wire.conn_id(1)
    last_seq = 202
    late = [
        (
            START_NS + (50 + n) * wire.SECOND,
            conn,
            int(Kind.DELTA),
            wire.delta("A-1", last_seq + 1 + n, "no", 5_000, 10),
        )
        for n in range(5)
    ]
    writer = journal_of(tmp_path / "journal", [*records, *late])
    root = tmp_path / "archive"
    archive_all(tmp_path / "journal", writer, root)
    writer.close()
    events = archived(root, "orderbook_events")
    assert events.height == 3 + 200 + 5
    manifest = LocalArchive(root).read_manifest("orderbook_events", FIRST_HOUR)
    assert manifest is not None
    assert manifest.rows == events.filter(pl.col("ingest_ts") < SECOND_HOUR).height
    for hour in (FIRST_HOUR, SECOND_HOUR):
        for path in paths(root, "orderbook_events", hour):
            stamps = pl.read_parquet(path)["ingest_ts"]
            assert {floor_hour(stamp) for stamp in stamps} == {hour}


def test_an_hour_begun_during_downtime_has_stale_books(
    tmp_path: Path,
) -> None:
    records = recording(60)  # ends 40 s before the hour
    back = START_NS + 1_000 * wire.SECOND
    conn = wire.conn_id(2)
    records += [
        wire.started(back),
        wire.connected(conn, back),
        (back, conn, Kind.SNAPSHOT, wire.snapshot("A-1", 1, {4_800: 10}, {})),
    ]
    writer = journal_of(tmp_path / "journal", records)
    root = tmp_path / "archive"
    archive_all(tmp_path / "journal", writer, root)
    writer.close()
    (books,) = LocalArchive(root).read("book_checkpoints", SECOND_HOUR)
    known = {(row["market_ticker"], row["verified"]) for row in books.to_pylist()}
    assert known == {("A-1", False), ("EMPTY-2", False)}
    second = hours.describe(LocalArchive(root), SECOND_HOUR, complete=True)
    assert second.verified_by_market["EMPTY-2"] == 0
    first = LocalArchive(root).read_manifest("orderbook_events", FIRST_HOUR)
    assert first is not None
    assert first.verified_seconds == pytest.approx(2 * 60)
    assert first.coverage == pytest.approx(0.6)
    assert first.verified_by_market == pytest.approx({"A-1": 60, "EMPTY-2": 60})
    ends = archived(root, "stream_events").filter(pl.col("kind") == "disconnected")
    assert ends.height == 1
    assert '"span_s":940.0' in ends["detail"][0]


def test_an_hour_rebuilt_from_the_journal_is_identical(tmp_path: Path, settings: Settings) -> None:
    writer = journal_of(settings.journal_dir(), recording())
    root = settings.archive_dir
    archive_all(settings.journal_dir(), writer, root)
    writer.close()
    before = {path: pl.read_parquet(path) for path in root.rglob("*.parquet")}
    lost = paths(root, "orderbook_events", FIRST_HOUR)
    lost[0].unlink()
    lost[1].write_bytes(lost[1].read_bytes()[:100])
    report = rebuild(settings.model_copy(update={"keep_frames": False}), FIRST_HOUR)
    assert report.complete
    after = {path: pl.read_parquet(path) for path in root.rglob("*.parquet")}
    assert after.keys() == before.keys()
    assert all(after[path].equals(before[path]) for path in before)


def test_an_hour_is_rebuilt_from_clickhouse_alone(tmp_path: Path, settings: Settings) -> None:
    writer = journal_of(settings.journal_dir(), recording())
    root = settings.archive_dir
    archive_all(settings.journal_dir(), writer, root)
    load_all(
        Loader(settings.journal_dir(), writer, ClickHouseSink(settings, str(writer.id)), SMALL)
    )
    writer.close()
    shutil.rmtree(settings.journal_dir())
    sealed = {
        name: LocalArchive(root).read_manifest(name, FIRST_HOUR)
        for name in ("orderbook_events", "stream_events", "trades")
    }
    paths(root, "orderbook_events", FIRST_HOUR)[0].unlink()
    report = rebuild(settings, FIRST_HOUR)
    for dataset in report.datasets:
        manifest = sealed[dataset.dataset]
        assert manifest is not None
        assert dataset.checksum == manifest.checksum
        assert dataset.rows == manifest.rows
    assert [p.name for p in paths(root, "orderbook_events", FIRST_HOUR)] == [FROM_CLICKHOUSE]


def test_an_unavailable_hour_is_an_error(tmp_path: Path, settings: Settings) -> None:
    writer = journal_of(settings.journal_dir(), recording())
    root = settings.archive_dir
    archive_all(settings.journal_dir(), writer, root)
    writer.close()
    shutil.rmtree(settings.journal_dir())
    paths(root, "orderbook_events", FIRST_HOUR)[0].unlink()
    with pytest.raises(StoreRefused, match="cannot be rebuilt"):
        rebuild(settings, FIRST_HOUR)


def test_the_checksum_depends_only_on_values() -> None:
    from kalshi_platform.archive.checksum import rows_checksum
    from kalshi_platform.schema import PRICE

    table = pa.table(
        {
            "name": pa.array(["a", "b", "a"]).dictionary_encode(),
            "price": pa.array([1, 2, None], PRICE),
            "seq": pa.array([1, 2, 3], pa.uint64()),
        }
    )
    plain = table.set_column(0, "name", table["name"].cast(pa.string()))
    shuffled = table.take(pa.array([2, 0, 1]))
    assert rows_checksum(table) == rows_checksum(plain) == rows_checksum(shuffled)
    parts = rows_checksum(table.slice(0, 1)) + rows_checksum(table.slice(1))
    assert parts % 2**64 == rows_checksum(table)
    changed = table.set_column(2, "seq", pa.array([1, 2, 4], pa.uint64()))
    assert rows_checksum(changed) != rows_checksum(table)
    swapped = table.set_column(2, "seq", pa.array([2, 1, 3], pa.uint64()))
    assert rows_checksum(swapped) != rows_checksum(table)

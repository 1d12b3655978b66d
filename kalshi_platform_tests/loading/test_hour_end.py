"""The end of an hour with many books: bounded writes, each checkpoint once after any kill, no waiting.

Limits are made small, so that few books are many batches.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kalshi_platform.archive import LocalArchive, checksum, hours, rows_of, watermarks
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.errors import StoreUnavailable
from kalshi_platform.exchange.columnar import decode
from kalshi_platform.journal.kind import Kind
from kalshi_platform.loading import state_files
from kalshi_platform.loading.book_state import BookState, Ladders
from kalshi_platform.loading.loader import Loader, Pace
from kalshi_platform.loading.rebuild import rebuild
from kalshi_platform.loading.rows import build_rows
from kalshi_platform.loading.shared_rows import SharedRows
from kalshi_platform.loading.sinks import ClickHouseSink, ParquetSink
from kalshi_platform.loading.sorted_levels import SortedLevels
from kalshi_platform.loading.state_files import checkpoint_batches
from kalshi_platform.schema import BOOK_CHECKPOINTS
from kalshi_platform.settings import Settings
from kalshi_platform_tests import wire
from kalshi_platform_tests.loading.test_loader import (
    FIRST_HOUR,
    HOUR_NS,
    PATIENCE_S,
    SECOND_HOUR,
    SMALL,
    START_NS,
    Front,
    Noting,
    archive_all,
    archived,
    journal_of,
    load_all,
    recording,
    settings,
    wait_for_the_end_of,
)

__all__ = ["settings"]  # a fixture

BATCH_ROWS = 20
BEGIN_NS = START_NS + 90 * wire.SECOND
LEVELS = {"yes": {4_000 + price: 100 + price for price in range(5)}, "no": {3_000: 700}}


def ticker(market: int) -> str:
    return f"M-{market:03}"


def over_the_hour(markets: int, at: int = BEGIN_NS) -> list[wire.Record]:
    """A snapshot of each market and of an empty one before an hour's end, and a delta for each after it."""
    conn = wire.conn_id(1)
    frames = [wire.snapshot(ticker(n), n + 1, LEVELS["yes"], LEVELS["no"]) for n in range(markets)]
    frames.append(wire.snapshot("EMPTY", markets + 1, {}, {}))
    after = at + 20 * wire.SECOND
    return [
        wire.started(at),
        wire.connected(conn, at),
        *((at, conn, int(Kind.SNAPSHOT), frame) for frame in frames),
        *(
            (after, conn, int(Kind.DELTA), wire.delta(ticker(n), markets + 2 + n, "yes", 4_000, 5))
            for n in range(markets)
        ),
    ]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_files, "CHECKPOINT_ROWS", BATCH_ROWS)
    monkeypatch.setattr("kalshi_platform.loading.shared_rows.CHUNK_ROWS", 30)


def state_after(records: Sequence[wire.Record]) -> BookState:
    return build_rows(decode(wire.blocks(records)), BookState())[1]


def test_checkpoint_batches_are_bounded_and_deterministic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = state_after(over_the_hour(11)[:14])
    found = list(checkpoint_batches(before, SECOND_HOUR))
    assert [batch.num_rows for batch in found] == [25, 18, 18, 6]  # EMPTY has a row, the others 6
    tickers = [batch["market_ticker"].unique().to_pylist() for batch in found]
    assert len(set(itertools.chain(*tickers))) == sum(map(len, tickers)) == 12
    levels = SortedLevels.of(before.ladders.all())
    merged = BookState(**{**vars(before), "ladders": Ladders(levels)})
    assert list(checkpoint_batches(merged, SECOND_HOUR)) == found
    monkeypatch.setattr(state_files, "CHECKPOINT_ROWS", 1 << 17)
    (whole,) = checkpoint_batches(before, SECOND_HOUR)
    assert pl.DataFrame(whole).equals(pl.concat([pl.DataFrame(batch) for batch in found]))


class Dying(Front):
    """Stops when asked for one checkpoint batch more than `batches`; earlier batches are written."""

    def __init__(self, store: ParquetSink | ClickHouseSink, batches: int) -> None:
        super().__init__(store)
        self._batches = batches
        self.given = 0

    def begin_hour(self, hour: datetime, books: Iterator[pa.Table], n: int) -> None:
        self._store.begin_hour(hour, self._mortal(books), n)

    def _mortal(self, books: Iterator[pa.Table]) -> Iterator[pa.Table]:
        for batch in books:
            if self.given == self._batches:
                raise RuntimeError("killed")
            self.given += 1
            yield batch


@pytest.mark.parametrize("kind", ["parquet", "clickhouse"])
def test_each_checkpoint_is_stored_once_after_a_kill(
    kind: str, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads after each kill; the last start splits the batches differently, as another version may."""
    markets = 11
    records = over_the_hour(markets)
    writer = journal_of(tmp_path / "journal", records)
    archive = LocalArchive(tmp_path / "archive")
    client = clickhouse.connect(settings)
    inserted = list[int]()
    for kills in range(3):
        store: ParquetSink | ClickHouseSink = (
            ParquetSink(archive, 0, lambda _: None)
            if kind == "parquet"
            else ClickHouseSink(settings, str(writer.id))
        )
        load = Loader(tmp_path / "journal", writer, Dying(store, kills), SMALL)
        load.start()
        load.drain()
        load.join(PATIENCE_S)
        assert "killed" in str(load.failure)
        assert load.committed is not None
        assert load.committed.n == markets + 3  # no record of the hour itself is loaded
        if kind == "parquet":
            assert archive.files(BOOK_CHECKPOINTS.name, SECOND_HOUR) == []
            continue
        ((count, books),) = client.query(
            "SELECT count(), uniqExact(market_ticker) FROM book_checkpoints"
        ).result_rows
        inserted.append(count)
        assert count == max(6 * books - 5, 0)  # EMPTY has one row
        for market in range(markets):
            assert book_at(client, ticker(market), SECOND_HOUR) == expected_book()
    if kind == "clickhouse":
        assert inserted == [0, 25, 43]
    monkeypatch.setattr(state_files, "CHECKPOINT_ROWS", 7)
    store = (
        ParquetSink(archive, 0, lambda _: None)
        if kind == "parquet"
        else ClickHouseSink(settings, str(writer.id))
    )
    load_all(Loader(tmp_path / "journal", writer, store, SMALL))
    writer.close()
    if kind == "parquet":
        (file,) = archive.files(BOOK_CHECKPOINTS.name, SECOND_HOUR)
        assert pq.ParquetFile(file.path).num_row_groups > 3
        found = archived(tmp_path / "archive", BOOK_CHECKPOINTS.name)
        events = archived(tmp_path / "archive", "orderbook_events").height
    else:
        found = pl.DataFrame(client.query_arrow("SELECT * FROM book_checkpoints"))
        ((events,),) = client.query("SELECT count() FROM orderbook_events").result_rows
        assert book_at(client, ticker(0), SECOND_HOUR) == expected_book()
    assert found.height == 6 * markets + 1
    assert not found.select("market_ticker", "side", "price").is_duplicated().any()
    assert events == 7 * markets


def book_at(client: clickhouse.Client, market: str, at: datetime) -> list[tuple[Any, ...]]:
    rows = client.query(
        "SELECT side, price, size FROM book_at(ticker = {ticker:String}, at = {at:DateTime64(6, 'UTC')})"
        " ORDER BY side, price",
        parameters={"ticker": market, "at": at + timedelta(seconds=1)},
    ).result_rows
    return [tuple(row) for row in rows]


def expected_book() -> list[tuple[Any, ...]]:
    return [
        (side, Decimal(price) / 10_000, Decimal(size) / 100)
        for side, ladder in LEVELS.items()
        for price, size in ladder.items()
    ]


def test_a_failed_checkpoint_insert_resumes_at_its_batch(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accepted inserts are not sent again, not even by the same process."""
    writer = journal_of(tmp_path / "journal", over_the_hour(11))
    insert = clickhouse.insert_arrow
    sent = list[str]()

    def failing(client: clickhouse.Client, table: str, rows: pa.Table, token: str) -> None:
        if table == BOOK_CHECKPOINTS.name and rows.num_rows:
            sent.append(token)
            if len(sent) == 3:
                raise StoreUnavailable("the connection broke")
        insert(client, table, rows, token)

    monkeypatch.setattr(clickhouse, "insert_arrow", failing)
    monkeypatch.setattr("kalshi_platform.loading.loader.DRAIN_GIVE_UP_S", 60.0)
    load_all(Loader(tmp_path / "journal", writer, ClickHouseSink(settings, str(writer.id)), SMALL))
    writer.close()
    assert len(sent) == 5
    assert len(set(sent)) == 4
    ((count,),) = (
        clickhouse.connect(settings).query("SELECT count() FROM book_checkpoints").result_rows
    )
    assert count == 67


def test_a_store_hanging_at_an_hours_end_delays_no_other(
    tmp_path: Path,
) -> None:
    begins_ns = (time.time_ns() // HOUR_NS - 1) * HOUR_NS - 10 * wire.SECOND
    writer = journal_of(tmp_path / "journal", over_the_hour(11, begins_ns))
    go_on = threading.Event()

    class Hanging(Noting):
        def begin_hour(self, hour: datetime, books: Iterator[pa.Table], n: int) -> None:
            assert go_on.wait(PATIENCE_S)

    derivation = SharedRows(tmp_path / "journal")
    hanging = Hanging(tmp_path / "other")
    hanging.name = "clickhouse"
    hung, other = (
        Loader(tmp_path / "journal", writer, store, SMALL, shared_rows=derivation)
        for store in (hanging, Noting(tmp_path))
    )
    hung.start()
    other.start()
    deadline = time.monotonic() + PATIENCE_S
    while other.committed is None or other.lag or hung.committed is None or hung.committed.n < 14:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert (hung.trouble, hung.lag) == (None, 11)
    assert "clickhouse is" in str(hung.late)
    assert "11 records wait" in str(hung.late)
    assert other.late is None
    go_on.set()
    for load in (hung, other):
        load.drain()
        assert load.join(PATIENCE_S)
    assert hung.late is None
    writer.close()


def test_stopping_during_a_checkpoint_is_immediate(tmp_path: Path) -> None:
    writer = journal_of(tmp_path / "journal", over_the_hour(200))
    batches = 0

    class Slow(Noting):
        def begin_hour(self, hour: datetime, books: Iterator[pa.Table], n: int) -> None:
            nonlocal batches
            for _ in books:
                batches += 1
                time.sleep(0.05)

    load = Loader(tmp_path / "journal", writer, Slow(tmp_path), Pace(10_000, 0.0, 0.0))
    load.start()
    load.drain()
    deadline = time.monotonic() + PATIENCE_S
    while not batches:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert load.join(0.1) is False
    wait_for_the_end_of("load-parquet")
    writer.close()
    assert load.failure is None
    assert 0 < batches < 200 * 6 / BATCH_ROWS / 2


@pytest.mark.parametrize("seals", [False, True], ids=["described", "sealed"])
def test_stopping_while_sealing_leaves_it_to_the_next_start(
    seals: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = journal_of(tmp_path / "journal", over_the_hour(100))
    archive = LocalArchive(tmp_path / "archive")
    counted = 0
    of_rows = checksum.content

    def slowly(table: pa.Table) -> checksum.Content:
        nonlocal counted
        counted += 1
        time.sleep(0.05)
        return of_rows(table)

    with monkeypatch.context() as patched:
        patched.setattr(hours, "COUNTED_ROWS", 3)
        patched.setattr(checksum, "content", slowly)
        if seals:
            patched.setattr(ParquetSink, "_is_first_of", lambda *_: False)
        load = Loader(
            tmp_path / "journal",
            writer,
            ParquetSink(archive, 0, lambda _: None),
            Pace(10_000, 0.0, 0.0),
        )
        load.start()
        load.drain()
        deadline = time.monotonic() + PATIENCE_S
        while not counted:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert load.join(0.1) is False
        wait_for_the_end_of("load-parquet")
    assert load.failure is None
    assert 0 < counted < 100 * 6 / 3 / 2
    assert not hours.is_sealed(archive, FIRST_HOUR)
    store = ParquetSink(archive, 0, lambda _: None)
    load_all(Loader(tmp_path / "journal", writer, store, Pace(10_000, 0.0, 0.0)))
    writer.close()
    assert hours.is_sealed(archive, FIRST_HOUR)
    assert archived(tmp_path / "archive", "orderbook_events").height == 700
    assert archived(tmp_path / "archive", BOOK_CHECKPOINTS.name).height == 601


def test_a_rebuilt_hour_without_known_parts_is_split_by_rows(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kalshi_platform.loading.rebuild.RANGE_ROWS", 40)
    writer = journal_of(settings.journal_dir(), recording())
    archive_all(settings.journal_dir(), writer, settings.archive_dir)
    writer.close()
    archive = LocalArchive(settings.archive_dir)
    before = archived(settings.archive_dir, "orderbook_events").sort("record", "side", "price")
    for dataset in hours.RECORDED:
        archive.remove_hour(dataset, FIRST_HOUR)
    watermarks.advance(settings.journals_dir, 0, SECOND_HOUR)
    assert rebuild(settings, FIRST_HOUR).complete
    sizes = [rows_of(file) for file in archive.files("orderbook_events", FIRST_HOUR)]
    assert len(sizes) > 1
    assert max(sizes) <= 40 + 30
    after = archived(settings.archive_dir, "orderbook_events").sort("record", "side", "price")
    assert after.equals(before)

"""A recorder in one process, without an exchange: each start journals generated frames and loads them.

For tests of what becomes of its folders and state files between its starts and while it runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import polars as pl

from kalshi_platform.archive import open_archive
from kalshi_platform.archive.archive_ledger import ArchiveLedger
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.clickhouse.clickhouse_ledger import open_table_ledger
from kalshi_platform.journal import reader
from kalshi_platform.journal.journal_identity import JournalIdentity
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.reader import LogOffset
from kalshi_platform.journal.writer import StartPoint, Writer
from kalshi_platform.loading import cursor, numbering
from kalshi_platform.loading.loader import Loader, Pace
from kalshi_platform.loading.sinks import ClickHouseSink, ParquetSink
from kalshi_platform.settings import Settings
from kalshi_platform_tests import wire

DATASETS = ("orderbook_events", "trades", "stream_events")
KINDS = ("clickhouse", "parquet")
PACE = Pace(rows=25, seconds=0.0, first_s=0.0)
PATIENCE_S = 90.0
BEGIN_NS = wire.NOON_NS // (3600 * wire.SECOND) * 3600 * wire.SECOND + 3_400 * wire.SECOND
Store = ClickHouseSink | ParquetSink


@dataclass
class Recorder:
    """A data folder with one shard. Each start has its own connection with two books and trades."""

    settings: Settings
    kinds: Sequence[str] = KINDS
    asks_stores: bool = True
    """Whether a start chooses its first record number by the stores' ledgers, as a streamer does."""
    at_ns: int = BEGIN_NS
    conns: Iterator[int] = field(default_factory=lambda: iter(range(1, 1_000)))

    @property
    def folder(self) -> Path:
        return self.settings.journal_dir()

    @contextmanager
    def started(self) -> Iterator[Start]:
        """One start; at the end the journal is closed and loaded as far as the stores accept it."""
        writer = Writer(
            self.folder, claims=cursor.claims(self.folder), choose_start=self._choose_start
        )
        newest = writer.identity.starts[-1]
        detail = {"journal": str(writer.id), "epoch": newest.epoch, "start": newest.token}
        writer.note("started", detail, recv_ns=self.at_ns)
        writer.submit()
        assert writer.wait_durable(writer.next_n, PATIENCE_S)
        start = Start(self, writer, next(self.conns))
        try:
            yield start
        finally:
            writer.close()
            for load in start.loads.values():
                load.drain()
                load.join(PATIENCE_S)

    def run(self, frames: int = 60) -> Start:
        """Run one start that records, loads as much as possible, and ends."""
        with self.started() as start:
            start.record(frames)
            start.load()
        return start

    def stores(self, writer: Writer) -> dict[str, Store]:
        made: dict[str, Store] = {
            "parquet": ParquetSink(open_archive(self.settings), 0, lambda _: None),
            "clickhouse": ClickHouseSink(self.settings, str(writer.id)),
        }
        return {kind: made[kind] for kind in self.kinds}

    def _choose_start(self, known: JournalIdentity, free: int) -> StartPoint:
        stores: dict[str, numbering.OpenLedger] = {
            "parquet": lambda: ArchiveLedger(open_archive(self.settings), 0),
            "clickhouse": lambda: open_table_ledger(self.settings, 0),
        }
        asked = {kind: stores[kind] for kind in self.kinds} if self.asks_stores else {}
        return numbering.choose_start(self.folder, asked, known, free)

    # -- contents ----------------------------------------------------------------------------

    def journalled(self) -> list[int]:
        """The numbers of all records in the journal."""
        numbers = list[int]()
        for first_n in reader.segments(self.folder):
            path = reader.segment_path(self.folder, first_n)
            for block in reader.read_segment(path, LogOffset(first_n, 0, first_n), None):
                numbers += range(block.first_n, block.first_n + block.rows)
        return numbers

    def rows(self, kind: str, dataset: str) -> pl.DataFrame:
        """Every row of a dataset in one store."""
        if kind == "parquet":
            paths = sorted((self.settings.archive_dir / dataset).rglob("*.parquet"))
            return pl.concat([pl.read_parquet(path, hive_partitioning=False) for path in paths])
        client = clickhouse.connect(self.settings)
        return pl.DataFrame(pl.from_arrow(client.query_arrow(f"SELECT * FROM {dataset}")))


@dataclass
class Start:
    """One start of a recorder."""

    recorder: Recorder
    writer: Writer
    number: int
    loads: dict[str, Loader] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _seq: int = 2
    _connected: bool = False

    def record(self, frames: int) -> None:
        """Journal so many deltas, and trades, notes and a snapshot among them."""
        recorder, writer, conn = self.recorder, self.writer, wire.conn_id(self.number)
        if not self._connected:
            self._connected = True
            for record in (
                wire.connected(conn, recorder.at_ns),
                (recorder.at_ns, conn, Kind.SNAPSHOT, wire.snapshot("A-1", 1, {4_800: 900}, {})),
                (recorder.at_ns, conn, Kind.SNAPSHOT, wire.snapshot("B-2", 2, {4_700: 900}, {})),
            ):
                writer.append(*record)
        for n in range(frames):
            recorder.at_ns += 2 * wire.SECOND
            self._seq += 1
            ticker = "A-1" if n % 3 else "B-2"
            frame = wire.delta(ticker, self._seq, "yes", 4_800, 5 if n % 2 else 7)
            writer.append(recorder.at_ns, conn, Kind.DELTA, frame)
            if n % 7 == 6:
                trade = wire.trade(
                    "A-1", self._seq, 4_800, 5, number=self.number * 10_000 + self._seq
                )
                writer.append(recorder.at_ns, conn, Kind.TRADE, trade)
            if n % 11 == 10:
                writer.note("heartbeat", {}, recv_ns=recorder.at_ns)
            if n % 13 == 12:
                writer.submit()
        writer.submit()
        assert writer.wait_durable(writer.next_n, PATIENCE_S)

    def load(self, *, wait: bool = True) -> None:
        """Load into every store; with `wait` until each has everything or reports a problem."""
        for kind, store in self.recorder.stores(self.writer).items():
            if kind not in self.loads:
                self.loads[kind] = Loader(
                    self.recorder.folder,
                    self.writer,
                    store,
                    PACE,
                    note=partial(self._noted, kind),
                )
                self.loads[kind].start()
        if wait:
            self.wait()

    def _noted(self, kind: str, what: str, detail: Mapping[str, object]) -> None:
        self.notes.append(f"{kind}: {what} {detail}")

    def wait(self) -> None:
        """Wait until every store has everything or reports a problem."""
        deadline = time.monotonic() + PATIENCE_S
        for load in self.loads.values():
            while load.trouble is None and (load.committed is None or load.lag):
                assert time.monotonic() < deadline, (load.name, load.committed, load.lag)
                time.sleep(0.005)

    def wait_for_stores(self) -> None:
        """Wait until every store has everything, ignoring temporary problems."""
        deadline = time.monotonic() + PATIENCE_S
        for load in self.loads.values():
            while load.committed is None or load.lag or load.trouble:
                assert time.monotonic() < deadline, (load.name, load.trouble)
                time.sleep(0.01)

    @property
    def trouble(self) -> str | None:
        """The first problem that a loader reports."""
        return next((load.trouble for load in self.loads.values() if load.trouble), None)


def assert_each_record_once(recorder: Recorder, *, beside: Sequence[int] = ()) -> None:
    """Assert that each store has every record of the journal and of `beside` exactly once."""
    expected = {*recorder.journalled(), *beside}
    for kind in recorder.kinds:
        held: set[int] = set()
        for dataset in DATASETS:
            rows = recorder.rows(kind, dataset)
            doubled = rows.filter(rows.is_duplicated())
            assert doubled.is_empty(), (kind, dataset, doubled.height)
            held |= set(rows["record"].to_list())
        assert held == expected, (kind, sorted(held ^ expected)[:20])

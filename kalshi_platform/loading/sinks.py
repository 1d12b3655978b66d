"""The two stores that the load writes to. Writing a journal range twice leaves each as once.

Neither knows the other: ClickHouse may be away for an hour while Parquet goes on.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Protocol

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.archive import Archive, hours, part_name, part_range, sealing, watermarks
from kalshi_platform.archive.archive_ledger import ArchiveLedger
from kalshi_platform.archive.hours import HourReport
from kalshi_platform.clickhouse import clickhouse_ledger, client, queries, verified_inserts
from kalshi_platform.clickhouse.clickhouse_ledger import TableLedger
from kalshi_platform.clickhouse.verified_inserts import Insert
from kalshi_platform.errors import StoreUnavailable
from kalshi_platform.journal.ledger import Ledger
from kalshi_platform.loading.rows import Rows
from kalshi_platform.loading.traces import Trace
from kalshi_platform.schema import (
    BOOK_CHECKPOINTS,
    DATASETS,
    LATEST_LEVELS,
    ORDERBOOK_EVENTS,
    STREAM_EVENTS,
    TRADES,
    Dataset,
)
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import HOUR, floor_hour, hour_of_ns

log = logging.getLogger(__name__)

SEAL_PATIENCE_S = 2.0
"""For the archive's lock, when hours are to be sealed: recording's files do not wait for a rebuild."""


class Abandoned(Exception):
    """The process ends: what is under way is left to the next start."""


class Sink(Protocol):
    """Where rows go. Every method may be called again with the same arguments, to no effect."""

    name: str
    datasets: frozenset[str]
    """What it takes of the rows."""
    ledger: Ledger
    """Its own record of what was loaded there."""
    place: str
    """Where it is, as people call it."""
    remedy: str
    """What to do where it is lost for good: a clause."""

    def holds(self, trace: Trace) -> bool | None:
        """Whether the row is there that a record leaves; None where that cannot be told."""

    def written_from(self, n: int, since: datetime) -> tuple[int, int] | None:
        """The last of the ranges that were written one after the other from record `n` on, by what they
        are called in the store; None where there is none, or where they have no names.
        """

    def write(self, first_n: int, end_n: int, rows: Sequence[Rows]) -> None:
        """Make the rows of journal records first_n to end_n - 1 durable.

        Raises `StoreUnavailable` where another try may help, `StoreRefused` where none will.
        """

    def begin_hour(self, hour: datetime, books: Iterator[pa.Table], n: int) -> None:
        """Record `n` is the first of `hour`; every earlier record has been written.

        `books`: the hour's checkpoint, whole books at a time. It may raise.
        """

    def abandon(self) -> None:
        """The process ends: leave what takes long, with `Abandoned`, at the next place where that is safe."""


class ClickHouseSink:
    """Inserts with deterministic tokens: a range that was inserted is not inserted again.

    What was inserted is counted in ClickHouse before a write returns (`verified_inserts`).
    """

    name = "clickhouse"
    datasets = frozenset(DATASETS)
    remedy = (
        "restore it from a backup, or from the archive (kalshi-platform restore), or set"
        " CLICKHOUSE_DATABASE to a new name and run kalshi-platform migrate: that database gets what the"
        " journal still has"
    )

    def __init__(
        self, settings: Settings, journal_id: str, log_comment: str = "", *, shard: int = 0
    ) -> None:
        self._settings = settings
        self.place = clickhouse_ledger.place(settings)
        self.ledger: Ledger = TableLedger(shard, self._connected, self.place)
        self._journal_id = journal_id
        self._shard = shard
        self._log_comment = client.comment(log_comment)  # of who makes it; a thread will use it
        self._client: client.Client | None = None
        self._password = ""
        """Of the client. The embedded ClickHouse may get another while this process runs."""
        self._sure_from: int | None = None
        """From this record on, what is inserted is inserted for the first time; None: who knows."""
        self._from_before: datetime | None = None
        """Oldest row that this process has written of what came before it began to record."""

    def look(self) -> None:
        """Raise `StoreError` where ClickHouse does not answer."""
        client.ping(self._settings)

    def write(self, first_n: int, end_n: int, rows: Sequence[Rows]) -> None:
        """One insert per table. `latest_levels` goes last: it is never ahead of the events.

        Counted at the end, or table by table where an insert may be a repetition: ClickHouse may take that
        for done (`verified_inserts`), and no table may be ahead of those before it.
        """
        sure = self._sure_from is not None and first_n >= self._sure_from
        self._sure_from = None  # until all of this is there
        inserts = []
        for name in rows[0].tables:
            table = concatenated([r.tables[name] for r in rows])
            if name == LATEST_LEVELS.name and len(rows) > 1:
                table = _last_of_each_level(table)
            token = f"{self._journal_id}:{first_n}-{end_n}:{name}"
            if name == LATEST_LEVELS.name and not sure:
                token = f"{token}:{uuid.uuid4()}"  # the newest version of a level wins: twice is as once
            inserts.append(self._insert(name, table, token))
            if not sure:
                verified_inserts.ensure(self._connected(), inserts[-1:])
        if sure:
            verified_inserts.ensure(self._connected(), inserts)
        self._forget_former_books(rows)
        self._sure_from = end_n

    def _forget_former_books(self, rows: Sequence[Rows]) -> None:
        """Take from `latest_levels` what a book's newest snapshot no longer has.

        A load knows only the books of its own journal. A market that has moved has levels there that
        another shard put, before its new shard's first snapshot or, loaded late, after it. So both
        look: who writes snapshots, and who has written the rest of a former life.
        """
        streams = [r.tables[STREAM_EVENTS.name] for r in rows]
        tables = [t for r in rows for name, t in r.tables.items() if name != BOOK_CHECKPOINTS.name]
        times = [pc.min(table["ingest_ts"]).as_py() for table in tables]
        kinds = {kind for table in streams for kind in table["kind"].unique().to_pylist()}
        since = min((at for at in [*times, self._from_before] if at is not None), default=None)
        self._from_before = None if "started" in kinds else since
        if since is not None and kinds & {"snapshot", "started"}:
            with client.translated():
                self._connected().command(
                    queries.text("forget_former_books"), parameters={"since": since}
                )

    def holds(self, trace: Trace) -> bool | None:
        """See `Sink`. Of rows that retention may have taken, nothing can be told."""
        kept_ns = (self._settings.hot_retention_days - 1) * 86_400_000_000_000
        if trace.recv_ns < time.time_ns() - kept_ns:
            return None
        with client.translated():
            found = self._connected().query(
                f"SELECT count() FROM {trace.dataset} WHERE market_ticker = {{ticker:String}}"  # noqa: S608 - the schema's own name
                " AND ingest_ts = fromUnixTimestamp64Micro({at:Int64}, 'UTC')"
                " AND conn_id = {conn:UUID} AND sid = {sid:UInt32} AND seq = {seq:UInt64}"
                " AND ifNull(record, {record:UInt64}) = {record:UInt64}",
                parameters={
                    "ticker": trace.market_ticker,
                    "at": trace.recv_ns // 1000,
                    "conn": trace.conn,
                    "sid": trace.sid,
                    "seq": trace.seq,
                    "record": trace.record,
                },
            )
        return bool(found.result_rows[0][0])

    def written_from(self, n: int, since: datetime) -> tuple[int, int] | None:
        """See `Sink`. Rows of ClickHouse do not say in which range they came."""
        return None

    def begin_hour(self, hour: datetime, books: Iterator[pa.Table], n: int) -> None:
        """The books at the hour's first instant, for `book_at`, insert by insert.

        Between two inserts some books have their checkpoint and others do not. Each is there whole or
        not at all, and without one a reader begins at the base before, which leads to the same book.
        The hour's own rows follow the last insert: where a row of record `n` or a later one is, the
        checkpoint is whole. One that is begun once more goes on with the books that are not there.
        """
        first_time = self._sure_from is not None and n >= self._sure_from
        self._sure_from = None  # nothing tells one that is begun once more
        there = frozenset() if first_time else self._checkpointed(hour, n)
        of_hour = f"{self._journal_id}:{n}:{hour:%Y-%m-%dT%H}:{BOOK_CHECKPOINTS.name}"
        for batch in books:
            missing = _without(batch, there)
            if missing.num_rows:
                first, last = missing["market_ticker"][0], missing["market_ticker"][-1]
                token = f"{of_hour}:{first}:{last}:{missing.num_rows}"
                inserted = self._insert(BOOK_CHECKPOINTS.name, missing, token)
                verified_inserts.ensure(self._connected(), [inserted])

    def _checkpointed(self, hour: datetime, n: int) -> frozenset[str]:
        """The books, as `_without` names them, that an hour's checkpoint already has."""
        with client.translated():
            found = self._connected().query(
                f"SELECT DISTINCT toString(conn_id), market_ticker FROM {BOOK_CHECKPOINTS.name}"  # noqa: S608 - the schema's own name
                " WHERE ts = {hour:DateTime64(6, 'UTC')} AND shard = {shard:UInt32} AND record = {n:UInt64}",
                parameters={"hour": hour, "shard": self._shard, "n": n},
            )
        return frozenset(f"{conn} {ticker}" for conn, ticker in found.result_rows)

    def abandon(self) -> None:
        """See `Sink`. One insert is bounded."""

    def _insert(self, name: str, table: pa.Table, token: str) -> Insert:
        client.insert_arrow(self._connected(), name, table, token)
        return Insert(name, table, token, verified_inserts.KEYS[name])

    def _connected(self) -> client.Client:
        password = client.password(self._settings)
        if self._client is None or password != self._password:
            if self._client is not None:
                self._client.close()
            self._client = client.connect(self._settings, log_comment=self._log_comment)
            self._password = password
        return self._client


class ParquetSink:
    """One file per hour that the range touches, named for the range.

    Other shards write beside it, and an hour is sealed once, by whoever finds that all have passed it
    (`passage`). Without `journals` it is alone, and seals what it has passed.
    """

    name = "parquet"
    datasets = frozenset(name for name, dataset in DATASETS.items() if dataset.archived)
    remedy = "restore it from a backup, or set PARQUET_DIR to a new place: that gets what the journal still has"

    def __init__(
        self,
        archive: Archive,
        shard: int,
        report: Callable[[HourReport], None],
        journals: Path | None = None,
    ) -> None:
        self._archive = archive
        self._shard = shard
        self.place = str(archive)
        self.ledger: Ledger = ArchiveLedger(archive, shard)
        self._report = report
        self._journals = journals
        self._passed = (
            watermarks.watermark_of(journals, shard).before if journals else watermarks.BEGINNING
        )
        """What comes for an earlier hour is late: the others need not wait for it."""
        self._looked_to = self._everywhere
        """Up to here, hours were looked for that all have passed and nobody has sealed."""
        self._looked_back = False
        self._open_hour_reported: datetime | None = None
        self._abandoned = threading.Event()

    def look(self) -> None:
        """Raise `StoreError` where the archive is not there."""
        self._archive.look()

    def holds(self, trace: Trace) -> bool | None:
        """See `Sink`. By the names of the hour's parts, those that a compaction took in included."""
        hour = hour_of_ns(trace.recv_ns)
        named, others = self._ranges(hour, hour)
        if any(first <= trace.record < end for first, end in named):
            return True
        return None if others else False

    def written_from(self, n: int, since: datetime) -> tuple[int, int] | None:
        """See `Sink`."""
        named, _ = self._ranges(since, None)
        ends = dict(named)
        last = None
        while n in ends:
            last = (n, ends.pop(n))
            n = last[1]
        return last

    def _ranges(self, since: datetime, until: datetime | None) -> tuple[set[tuple[int, int]], bool]:
        """The record ranges of this shard's parts in some hours, and whether files of other names are there."""
        named: set[tuple[int, int]] = set()
        others = False
        for dataset in (ORDERBOOK_EVENTS.name, TRADES.name, STREAM_EVENTS.name):
            for hour, listed in self._archive.listing(dataset, since, until).items():
                manifest = self._archive.read_manifest(dataset, hour)
                names = [file.name for file in listed.files]
                cuts = [
                    part_range(name) for name in [*names, *(manifest.merged if manifest else ())]
                ]
                named |= {
                    cut[1:] for cut in cuts if cut and cut[0] == self._shard and cut[1] < cut[2]
                }
                unnamed = None in cuts[: len(names)]
                others |= unnamed and not (manifest and manifest.merged)
        return named, others

    def write(self, first_n: int, end_n: int, rows: Sequence[Rows]) -> None:
        """Write the range's files; an hour that was sealed before is sealed anew."""
        pieces = [
            (hour, DATASETS[name], part)
            for name in rows[0].tables
            for hour, part in by_hour(
                concatenated([r.tables[name] for r in rows]), DATASETS[name].time
            )
        ]
        touched = sorted({hour for hour, _, _ in pieces})
        late = {
            hour
            for hour in touched
            if hour < max(touched[-1], self._passed) or hours.is_sealed(self._archive, hour)
        }
        news = [hour for hour in touched if hour not in late and self._is_first_of(hour)]
        for hour, dataset, part in pieces:
            self._write_part(dataset, hour, first_n, end_n, [part], late=hour in late)
        for hour in sorted(late):
            if hour < self._everywhere or hours.is_sealed(self._archive, hour):
                with self._archive.changing():
                    self._seal(hour)
        for hour in news:
            self._open_hour_reported = hour
            going_on = self._insist_on_going_on
            self._report(hours.describe(self._archive, hour, complete=False, proceed=going_on))
        self._seal_passed()

    def _is_first_of(self, hour: datetime) -> bool:
        """Whether nobody has told of this open hour, which has no rows of another shard."""
        if self._open_hour_reported == hour:
            return False
        ours = f"part-{self._shard}-"
        present = self._archive.files(STREAM_EVENTS.name, hour)
        return all(file.name.startswith(ours) for file in present)

    def _write_part(
        self,
        dataset: Dataset,
        hour: datetime,
        first_n: int,
        end_n: int,
        tables: Iterable[pa.Table],
        *,
        late: bool,
    ) -> None:
        """Write an hour's part; rows that a compaction has taken in already are there."""
        name = part_name(self._shard, first_n, end_n)
        with self._archive.changing() if late else nullcontext():
            manifest = self._archive.read_manifest(dataset.name, hour) if late else None
            if manifest is None or name not in manifest.merged:
                self._archive.write(dataset.name, hour, name, tables, dataset.arrow)

    def begin_hour(self, hour: datetime, books: Iterator[pa.Table], n: int) -> None:
        """Write the checkpoint, say how far this journal is, and seal what all have passed.

        The checkpoint is one file, written batch by batch: no reader sees a part of it.
        """
        if (first := next(books, None)) is not None:
            late = hours.is_sealed(self._archive, hour)
            self._write_part(
                BOOK_CHECKPOINTS, hour, n, n, itertools.chain([first], books), late=late
            )
        if self._journals is not None:
            watermarks.advance(self._journals, self._shard, hour)
        self._passed = hour
        self._seal_passed(look_back=True)

    def abandon(self) -> None:
        """See `Sink`. An hour that is being sealed is sealed by the next start."""
        self._abandoned.set()

    def _insist_on_going_on(self) -> None:
        if self._abandoned.is_set():
            raise Abandoned

    def drained(self, *, seal: bool) -> None:
        """Nothing more will come of this journal for now: no hour waits for it.

        Hours that waited for it alone are sealed with the next write of another shard, or here.
        """
        if self._journals is not None:
            watermarks.release(self._journals, self._shard)
            if seal:
                self._seal_passed(look_back=True)

    @property
    def _everywhere(self) -> datetime:
        """Every earlier hour has been passed by all."""
        return self._passed if self._journals is None else watermarks.lowest(self._journals)

    def _seal_passed(self, *, look_back: bool = False) -> None:
        """Seal what all have passed and nobody has sealed; later, where it cannot be done now.

        `look_back`: also what was left from before this process.
        """
        if look_back and not self._looked_back:
            self._looked_back, self._looked_to = True, watermarks.BEGINNING
        limit = self._everywhere
        if limit <= self._looked_to:
            return
        with ExitStack() as held:
            try:
                held.enter_context(self._archive.changing(SEAL_PATIENCE_S))
            except StoreUnavailable as error:
                log.info("Hours are sealed with the next write: %s", error)
                return
            for hour in hours.unsealed(self._archive, self._looked_to, limit):
                self._seal(hour)
        self._looked_to = limit

    def _seal(self, hour: datetime) -> None:
        report = sealing.seal(self._archive, hour, self._insist_on_going_on)
        log.info("Sealed %s: %s", f"{hour:%Y-%m-%d %H:00}", _brief(report))
        self._report(report)


def concatenated(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables one below the other, with one dictionary a column."""
    joined = pa.concat_tables(tables)
    return joined.unify_dictionaries() if len(tables) > 1 else joined


def _without(books: pa.Table, there: frozenset[str]) -> pa.Table:
    """The rows of the books that are not among `there`, conn_id and market."""
    if not there:
        return books
    keys = pc.binary_join_element_wise(
        *(books[name].cast(pa.string()) for name in ("conn_id", "market_ticker")), " "
    )
    return books.filter(pc.invert(pc.is_in(keys, pa.array(sorted(there), pa.string()))))


def _last_of_each_level(table: pa.Table) -> pa.Table:
    """Of rows in order, the last of each level: the only one that matters."""
    keys = pl.DataFrame(
        {
            "ticker": pl.Series(table["market_ticker"].cast(pa.string())),
            "side": pl.Series(table["side"].cast(pa.string())),
            "price": pl.Series(table["price"]),
        }
    ).with_row_index()
    last = keys.unique(subset=["ticker", "side", "price"], keep="last", maintain_order=True)
    return table.take(last["index"].to_arrow())


def by_hour(table: pa.Table, time: str) -> list[tuple[datetime, pa.Table]]:
    """The table cut by the hour of its column `time`; mostly one piece."""
    if not table.num_rows:
        return []
    at, kind = table[time], table.schema.field(time).type
    span = pc.min_max(at).as_py()
    hour, last = floor_hour(span["min"]), floor_hour(span["max"])
    if hour == last:
        return [(hour, table)]
    pieces = []
    while hour <= last:
        inside = pc.and_(
            pc.greater_equal(at, pa.scalar(hour, kind)), pc.less(at, pa.scalar(hour + HOUR, kind))
        )
        piece = table.filter(inside)
        if piece.num_rows:
            pieces.append((hour, piece))
        hour += HOUR
    return pieces


def _brief(report: HourReport) -> str:
    return ", ".join(f"{d.dataset} {d.rows:,} rows" for d in report.datasets) or "nothing"

"""The sinks of the loader: ClickHouse and the Parquet archive. Writes are idempotent per journal range.

The sinks are independent: while ClickHouse is unreachable, Parquet continues. Which range to write is decided
by `loader`; verifying inserts belongs in `clickhouse.verified_inserts`, the layout of files in `archive`.
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
from kalshi_platform.arrow_columns import microseconds
from kalshi_platform.clickhouse import clickhouse_ledger, client, queries, verified_inserts
from kalshi_platform.clickhouse.clickhouse_ledger import TableLedger
from kalshi_platform.clickhouse.verified_inserts import Insert
from kalshi_platform.errors import StoreUnavailable
from kalshi_platform.journal.ledger import Ledger
from kalshi_platform.loading.frame_rows import JournalFrames
from kalshi_platform.loading.rows import Rows
from kalshi_platform.loading.traces import Trace
from kalshi_platform.schema import (
    BOOK_CHECKPOINTS,
    DATASETS,
    FRAMES,
    LATEST_LEVELS,
    ORDERBOOK_EVENTS,
    STREAM_EVENTS,
    TRADES,
    Dataset,
)
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import HOUR, floor_hour, hour_of_ns

log = logging.getLogger(__name__)

SEAL_LOCK_TIMEOUT_S = 2.0
"""Time-out for the archive's lock when hours are to be sealed: new parts must not wait for a rebuild."""


class Abandoned(Exception):
    """The process is stopping: unfinished work is left to the next start."""


class Sink(Protocol):
    """Where rows are written. Calling a method again with the same arguments has no further effect."""

    name: str
    datasets: frozenset[str]
    """The datasets that it stores."""
    ledger: Ledger
    """The store's ledger."""
    place: str
    """The store's location, for messages."""
    remedy: str
    """What to do where the store is lost for good, as a clause."""

    def holds(self, trace: Trace) -> bool | None:
        """Whether the store has a record's row; None where that cannot be determined."""

    def written_from(self, n: int, since: datetime) -> tuple[int, int] | None:
        """The last of the consecutive ranges written from record `n` on, by their names in the store.

        None where there is none or the store does not name ranges.
        """

    def write(self, first_n: int, end_n: int, rows: Sequence[Rows]) -> None:
        """Make the rows of journal records first_n to end_n - 1 durable.

        Raises: `StoreUnavailable` where a retry may help, `StoreRefused` where none will.
        """

    def begin_hour(self, hour: datetime, books: Iterator[pa.Table], n: int) -> None:
        """Begin `hour` with record `n`; every earlier record has been written.

        `books`: the hour's checkpoint in batches of whole books. The iterator may raise.
        """

    def abandon(self) -> None:
        """Stop long work at the next safe place by raising `Abandoned`: the process is stopping."""


class ClickHouseSink:
    """Inserts with deterministic tokens, so that a range is never stored twice.

    A write returns only after ClickHouse was verified to have the rows (`verified_inserts`).
    """

    name = "clickhouse"
    datasets = frozenset(name for name, dataset in DATASETS.items() if dataset.hot)
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
        self._log_comment = client.comment(log_comment)  # of the caller; another thread will use it
        self._client: client.Client | None = None
        self._password = ""
        """The client's password. The embedded ClickHouse may get another while this process runs."""
        self._first_unsent: int | None = None
        """First record known not to have been sent before; None if unknown."""
        self._oldest_carried: datetime | None = None
        """Time of the oldest written row of records from before this process began to record."""

    def look(self) -> None:
        """Raise `StoreError` where ClickHouse does not answer."""
        client.ping(self._settings)

    def write(self, first_n: int, end_n: int, rows: Sequence[Rows]) -> None:
        """Insert table by table, `latest_levels` last: it must never be ahead of the events.

        Verified together at the end, or after each table where an insert may be a repetition: ClickHouse may
        ignore it (`verified_inserts`), and no table may be ahead of those before it.
        """
        first_time = self._first_unsent is not None and first_n >= self._first_unsent
        self._first_unsent = None  # unknown until all of this is stored
        inserts = []
        for name in rows[0].tables:
            table = concatenated([r.tables[name] for r in rows])
            if name == LATEST_LEVELS.name and len(rows) > 1:
                table = _last_of_each_level(table)
            token = f"{self._journal_id}:{first_n}-{end_n}:{name}"
            if name == LATEST_LEVELS.name and not first_time:
                token = f"{token}:{uuid.uuid4()}"  # the newest version of a level wins, so repeating is safe
            inserts.append(self._insert(name, table, token))
            if not first_time:
                verified_inserts.ensure(self._connected(), inserts[-1:])
        if first_time:
            verified_inserts.ensure(self._connected(), inserts)
        self._drop_former_levels(rows)
        self._first_unsent = end_n

    def _drop_former_levels(self, rows: Sequence[Rows]) -> None:
        """Remove levels from `latest_levels` that a book's newest snapshot does not have.

        A loader knows only the books of its own journal. A market that has moved to another shard may have
        levels there from its former shard, loaded before the new shard's first snapshot or late, after it. So
        both loaders check: the one that writes snapshots, and the one that writes rows of an earlier start.
        """
        streams = [r.tables[STREAM_EVENTS.name] for r in rows]
        tables = [t for r in rows for name, t in r.tables.items() if name != BOOK_CHECKPOINTS.name]
        times = [pc.min(table["ingest_ts"]).as_py() for table in tables]
        kinds = {kind for table in streams for kind in table["kind"].unique().to_pylist()}
        since = min((at for at in [*times, self._oldest_carried] if at is not None), default=None)
        self._oldest_carried = None if "started" in kinds else since
        if since is not None and kinds & {"snapshot", "started"}:
            with client.translated():
                self._connected().command(
                    queries.text("forget_former_books"), parameters={"since": since}
                )

    def holds(self, trace: Trace) -> bool | None:
        """See `Sink`. None for rows that retention may have deleted."""
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
        """See `Sink`. Rows in ClickHouse do not name the range with which they were written."""
        return None

    def begin_hour(self, hour: datetime, books: Iterator[pa.Table], n: int) -> None:
        """Insert the books at the hour's first instant, for `book_at`, in batches.

        Between two inserts, some books have their checkpoint and others do not. Each book is stored completely
        or not at all; without one, a reader begins at the checkpoint before, which leads to the same book. The
        hour's own rows follow the last insert: where a row of record `n` or later exists, the checkpoint is
        complete. A repeated call inserts only the books that are missing.
        """
        first_time = self._first_unsent is not None and n >= self._first_unsent
        self._first_unsent = None  # a repeated call must check what is stored
        stored = frozenset() if first_time else self._checkpointed(hour, n)
        of_hour = f"{self._journal_id}:{n}:{hour:%Y-%m-%dT%H}:{BOOK_CHECKPOINTS.name}"
        for batch in books:
            missing = _exclude_books(batch, stored)
            if missing.num_rows:
                first, last = missing["market_ticker"][0], missing["market_ticker"][-1]
                token = f"{of_hour}:{first}:{last}:{missing.num_rows}"
                inserted = self._insert(BOOK_CHECKPOINTS.name, missing, token)
                verified_inserts.ensure(self._connected(), [inserted])

    def _checkpointed(self, hour: datetime, n: int) -> frozenset[str]:
        """The books, as `_exclude_books` names them, that the hour's checkpoint already has."""
        with client.translated():
            found = self._connected().query(
                f"SELECT DISTINCT toString(conn_id), market_ticker FROM {BOOK_CHECKPOINTS.name}"  # noqa: S608 - the schema's own name
                " WHERE ts = {hour:DateTime64(6, 'UTC')} AND shard = {shard:UInt32} AND record = {n:UInt64}",
                parameters={"hour": hour, "shard": self._shard, "n": n},
            )
        return frozenset(f"{conn} {ticker}" for conn, ticker in found.result_rows)

    def abandon(self) -> None:
        """See `Sink`. Nothing to do: each insert is bounded."""

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
    """Writes one file per touched hour, named for the journal range.

    Other shards write to the same archive. An hour is sealed once, by the first shard that finds every
    watermark beyond it (`archive.watermarks`). Without `journals` the shard is alone and seals by its own.
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
        frames: JournalFrames | None = None,
    ) -> None:
        """`frames`: the journal whose frames are kept; None: none are."""
        self._archive = archive
        self._frames = frames
        self._shard = shard
        self.place = str(archive)
        self.ledger: Ledger = ArchiveLedger(archive, shard)
        self._report = report
        self._journals = journals
        self._passed = (
            watermarks.watermark_of(journals, shard).before if journals else watermarks.BEGINNING
        )
        """This shard's watermark: rows of an earlier hour are late, and other shards do not wait for them."""
        self._looked_to = self._lowest_watermark()
        """Unsealed hours before this were sealed already."""
        self._looked_back = False
        self._open_hour_reported: datetime | None = None
        self._abandoned = threading.Event()

    def look(self) -> None:
        """Raise `StoreError` where the archive cannot be reached."""
        self._archive.look()

    def holds(self, trace: Trace) -> bool | None:
        """See `Sink`. Decided by the names of the hour's parts, including compacted ones."""
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
        """The record ranges of this shard's parts in a span of hours, and whether there are other files."""
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
        """Write the range's files; an hour that was sealed before is sealed again."""
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
        for hour in touched if self._frames is not None else ():
            # first: a range whose built rows are stored counts as written
            frames = self._frames_of(hour, first_n, end_n, rows)
            if (first := next(frames, None)) is not None:
                tables = itertools.chain([first], frames)
                self._write_part(FRAMES, hour, first_n, end_n, tables, late=hour in late)
        for hour, dataset, part in pieces:
            self._write_part(dataset, hour, first_n, end_n, [part], late=hour in late)
        for hour in sorted(late):
            if hour < self._lowest_watermark() or hours.is_sealed(self._archive, hour):
                with self._archive.changing():
                    self._seal(hour)
        if touched and touched[-1] > self._passed:
            self.pass_hours_before(touched[-1])
        for hour in news:
            self._open_hour_reported = hour
            going_on = self._raise_if_abandoned
            self._report(hours.describe(self._archive, hour, complete=False, proceed=going_on))
        self._seal_complete_hours()

    def _frames_of(
        self, hour: datetime, first_n: int, end_n: int, rows: Sequence[Rows]
    ) -> Iterator[pa.Table]:
        """Yield the frames of an hour among these records."""
        if self._frames is None:
            return
        for table in self._frames.tables(first_n, end_n, rows):
            for of_hour, part in by_hour(table, FRAMES.time):
                if of_hour == hour:
                    yield part

    def _is_first_of(self, hour: datetime) -> bool:
        """Whether this open hour has not been reported yet and has no rows of another shard."""
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
        """Write an hour's part, unless a compaction has already merged it."""
        name = part_name(self._shard, first_n, end_n)
        with self._archive.changing() if late else nullcontext():
            manifest = self._archive.read_manifest(dataset.name, hour) if late else None
            if manifest is None or name not in manifest.merged:
                self._archive.write(dataset.name, hour, name, tables, dataset.arrow)

    def begin_hour(self, hour: datetime, books: Iterator[pa.Table], n: int) -> None:
        """Write the checkpoint, which is one file: readers see it completely or not at all.

        The hours before are passed with the first rows of this one.
        """
        if (first := next(books, None)) is not None:
            late = hours.is_sealed(self._archive, hour)
            self._write_part(
                BOOK_CHECKPOINTS, hour, n, n, itertools.chain([first], books), late=late
            )
        if self._frames is not None:
            self._frames.archive_books(self._archive, hour, n)
        if hour <= self._passed:
            # Records are loaded again, or the journal rested: the hour's first rows pass the hours before.
            self._advance(watermarks.BEGINNING)
            self._looked_back = False

    def pass_hours_before(self, hour: datetime) -> None:
        """Advance the watermark to `hour`, whose first rows are written, and seal the hours that are complete.

        The first record of an hour may have a row of an earlier one: a recorder that was killed leaves its
        connection open, and the next start ends it as of the last frame (`unheard`). So an hour that is sealed
        before that record is written would be sealed twice. Sealing comes first: a start that finds the
        watermark advanced looks for no earlier hour before the next one begins.
        """
        self._seal_complete_hours(hour, look_back=True)
        self._advance(hour)

    def _advance(self, hour: datetime) -> None:
        if self._journals is not None:
            watermarks.advance(self._journals, self._shard, hour)
        self._passed = hour

    def abandon(self) -> None:
        """See `Sink`. An hour being sealed is left to the next start."""
        self._abandoned.set()

    def _raise_if_abandoned(self) -> None:
        if self._abandoned.is_set():
            raise Abandoned

    def drained(self, *, seal: bool) -> None:
        """Release this shard's watermark: its journal is archived completely and has no writer.

        Hours that waited for this shard only are sealed with the next write of another shard, or here if `seal`.
        """
        if self._journals is not None:
            watermarks.release(self._journals, self._shard)
            if seal:
                self._seal_complete_hours(look_back=True)

    def _lowest_watermark(self, own: datetime | None = None) -> datetime:
        """Every earlier hour is complete in all journals; `own`: this shard's watermark, where it will advance."""
        if self._journals is None:
            return own or self._passed
        return watermarks.lowest(self._journals, None if own is None else (self._shard, own))

    def _seal_complete_hours(self, own: datetime | None = None, *, look_back: bool = False) -> None:
        """Seal unsealed hours before the lowest watermark; leave them for later where the archive is locked.

        `own`: this shard's watermark, where it will advance. `look_back`: include hours from before this process.
        """
        if look_back and not self._looked_back:
            self._looked_back, self._looked_to = True, watermarks.BEGINNING
        limit = self._lowest_watermark(own)
        if limit <= self._looked_to:
            return
        with ExitStack() as stack:
            try:
                stack.enter_context(self._archive.changing(SEAL_LOCK_TIMEOUT_S))
            except StoreUnavailable as error:
                log.info("Hours are sealed with the next write: %s", error)
                return
            for hour in hours.unsealed(self._archive, self._looked_to, limit):
                self._seal(hour)
        self._looked_to = limit

    def _seal(self, hour: datetime) -> None:
        report = sealing.seal(self._archive, hour, self._raise_if_abandoned)
        log.info("Sealed %s: %s", f"{hour:%Y-%m-%d %H:00}", _brief(report))
        self._report(report)


def concatenated(tables: Sequence[pa.Table]) -> pa.Table:
    """Concatenate tables, with one dictionary per column."""
    joined = pa.concat_tables(tables)
    return joined.unify_dictionaries() if len(tables) > 1 else joined


def _exclude_books(books: pa.Table, stored: frozenset[str]) -> pa.Table:
    """The rows of books that are not in `stored`, which has `conn_id` and ticker joined by a space."""
    if not stored:
        return books
    keys = pc.binary_join_element_wise(
        *(books[name].cast(pa.string()) for name in ("conn_id", "market_ticker")), " "
    )
    return books.filter(pc.invert(pc.is_in(keys, pa.array(sorted(stored), pa.string()))))


def _last_of_each_level(table: pa.Table) -> pa.Table:
    """The last row of each level: `latest_levels` needs no other."""
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
    """Split a table by the hour of its column `time`; usually one part."""
    if not table.num_rows:
        return []
    at, kind = table[time], table.schema.field(time).type
    span = pc.min_max(microseconds(at)).as_py()
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

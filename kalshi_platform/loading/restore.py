"""From the archive to ClickHouse: what is cold becomes hot again, and nothing that is hot is doubled.

Each dataset's hour is compared first, row by row, as a multiset of row checksums:

    equal                               nothing is done
    absent in ClickHouse                inserted
    fewer rows, and no other ones       the missing rows are inserted (an interrupted restore, lost rows)
    other rows                          refused and left as it is; with `replace`, the archive's take their place

then compared again. So it may be interrupted at any moment and run again, beside the platform too: rows of
records that a loader has yet to bring to ClickHouse are left to it (`unloaded`), and an hour that is not
sealed is not touched, but where no recorder writes to the journals. Inserts have tokens made of their
rows, for one that was still on its way when its restore was killed.

The book now (`latest_levels`) is derived from the newest snapshots at the end, each time.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.archive import (
    Archive,
    File,
    batches,
    checksum,
    hours,
    open_archive,
    rows_of,
    watermarks,
)
from kalshi_platform.archive.checksum import U64, Content
from kalshi_platform.archive.local import locked
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.clickhouse import hot_retention, partitions, queries
from kalshi_platform.clickhouse.cluster import place
from kalshi_platform.errors import PlatformError, StoreRefused, StoreUnavailable
from kalshi_platform.loading import hot_hour
from kalshi_platform.loading.unloaded import Unloaded
from kalshi_platform.schema import (
    DATASETS,
    RECORDED,
    STREAM_EVENTS,
    Dataset,
)
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import HOUR

RESTORED = tuple(
    dataset.name for dataset in sorted(RECORDED, key=lambda dataset: dataset is STREAM_EVENTS)
)
"""`stream_events` last, as the loader writes: what it reaches to is whole."""
BATCH_ROWS = 500_000
ROWS_COMPARED = 16_000_000
"""Row checksums of each store that are in memory at once; an hour of more rows is read several times."""
TRIES = 5
"""Inserts that ClickHouse acknowledges without having the rows afterwards, before it is taken to be away."""
EXPIRES_SOON = timedelta(hours=2)


class Verdict(Enum):
    """What became of a dataset's hour."""

    EQUAL = "equal"
    INSERTED = "inserted"
    COMPLETED = "completed"
    REPLACED = "replaced"
    DIFFERS = "differs"
    UNSOUND = "the archive's files are not what its manifest says"
    OPEN = "not sealed yet"
    EXPIRED = "older than ClickHouse keeps"

    @property
    def is_there(self) -> bool:
        """Whether ClickHouse has the archive's rows."""
        return self in {Verdict.EQUAL, Verdict.INSERTED, Verdict.COMPLETED, Verdict.REPLACED}


@dataclass(frozen=True)
class Restored:
    """One dataset's hour, after it was looked at."""

    dataset: str
    hour: datetime
    verdict: Verdict
    rows: int = 0
    """Of the archive, without those that are left to a loader."""
    inserted: int = 0
    left: int = 0
    """Rows of the archive that a loader has yet to bring."""
    checksum: str = ""
    what: str = ""
    """A sentence about what is in the way, with what to do; empty where nothing is."""


def parse_hours(text: str) -> tuple[datetime, datetime]:
    """`2026-11-22-14` or `2026-11-22-14..2026-11-23-02`, both ends included, UTC."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d-\d\d)(?:\.\.(\d{4}-\d\d-\d\d-\d\d))?", text)
    if match is None:
        raise PlatformError(
            f"--hours {text!r} is not YYYY-MM-DD-HH, nor two of them joined by '..'."
        )
    first, last = (
        datetime.strptime(t, "%Y-%m-%d-%H").replace(tzinfo=UTC)
        for t in (match[1], match[2] or match[1])
    )
    if last < first:
        raise PlatformError(f"--hours {text!r} ends before it begins.")
    return first, last


def restore(
    settings: Settings,
    archive: Archive,
    span: tuple[datetime, datetime] | None,
    progress: Callable[[Restored], None],
    *,
    replace: bool = False,
) -> list[Restored]:
    """Bring the hours of an archive into ClickHouse; says of each dataset's hour what became of it.

    `replace`: where ClickHouse has other rows of a sealed hour, the archive's take their place. An hour that
    cannot be restored stops no other. Raises `StoreRefused` where the archive has nothing of the span,
    `StoreUnavailable` while another restore is at work.
    """
    with ExitStack() as held:
        lock = settings.data_dir / "restore.lock"
        held.enter_context(locked(lock, 0, "Another restore is at work"))
        client = clickhouse.connect(settings, log_comment="restore")
        held.callback(client.close)
        for name in RESTORED:
            partitions.remove_left_over(client, name, _staging(name))
        work = _Restore(settings, client, archive, replace=replace)
        done = []
        for hour in _hours(archive, span):
            for restored in work.hour(hour):
                progress(restored)
                done.append(restored)
        if not done:
            raise StoreRefused(
                f"The archive in {archive} has no hour of that span. `--from` is the folder that holds"
                " orderbook_events/."
            )
        with clickhouse.translated():
            client.command(queries.text("latest_levels_from_events"))
        return done


def _staging(table: str) -> str:
    """Where an hour's rows are collected before they take the place of others."""
    return f"{table}_staging_restore"


def _hours(archive: Archive, span: tuple[datetime, datetime] | None) -> list[datetime]:
    """The hours of which the archive has anything, ascending."""
    first, last = span or (None, None)
    return sorted({h for name in RESTORED for h in archive.listing(name, first, last)})


class _Restore:
    """One restore under way."""

    def __init__(
        self, settings: Settings, client: clickhouse.Client, archive: Archive, *, replace: bool
    ) -> None:
        self._journals = settings.journals_dir
        self._client = client
        self._archive = archive
        self._replace = replace
        self._is_own = str(archive) == str(open_archive(settings))
        self._unloaded = Unloaded(settings, client)
        self._kept = hot_retention.kept(client)
        self._one_server = all(
            (where := place(client, name)) is not None and where.cluster is None
            for name in RESTORED
        )

    def hour(self, hour: datetime) -> Iterator[Restored]:
        """Restore the datasets of an hour."""
        days = [d for name in RESTORED if (d := self._kept.get(name)) is not None]
        if days and hour + HOUR < datetime.now(UTC) - timedelta(days=min(days)) + EXPIRES_SOON:
            what = (
                f"{hour:%Y-%m-%d %H:00} UTC is older than the {min(days)} days that ClickHouse keeps, which"
                " would delete it at once. Set HOT_RETENTION_DAYS to more and run kalshi-platform migrate."
            )
            yield Restored(STREAM_EVENTS.name, hour, Verdict.EXPIRED, what=what)
            return
        with ExitStack() as held:
            if not (sealed := self._is_sealed(hour)) and not self._hold_journals(held):
                what = (
                    f"{hour:%Y-%m-%d %H:00} UTC is not sealed: its recorder still writes it. Run this again"
                    " when it is, some minutes after the hour's end."
                )
                yield Restored(STREAM_EVENTS.name, hour, Verdict.OPEN, what=what)
                return
            for name in RESTORED:
                yield self._again_where_it_changed(DATASETS[name], hour, sealed=sealed)

    def _is_sealed(self, hour: datetime) -> bool:
        try:
            return hours.is_sealed(self._archive, hour)
        except StoreRefused:  # a damaged manifest, which the comparison names
            return True

    def _hold_journals(self, held: ExitStack) -> bool:
        """Whether no recorder writes to this archive's journals, until `held` is left."""
        if not self._is_own:
            return False
        for shard in watermarks.shards(self._journals):
            lock = filelock.FileLock(self._journals / f"shard-{shard}" / "lock")
            try:
                held.enter_context(lock.acquire(timeout=0))
            except filelock.Timeout:
                return False
        return True

    def _again_where_it_changed(
        self, dataset: Dataset, hour: datetime, *, sealed: bool
    ) -> Restored:
        """Restore, again where the hour was compacted or rebuilt under our eyes."""
        for _ in range(TRIES):
            try:
                return self._dataset(dataset, hour, sealed=sealed)
            except StoreUnavailable as error:
                changed = error
        raise changed

    def _dataset(self, dataset: Dataset, hour: datetime, *, sealed: bool) -> Restored:
        files = self._archive.files(dataset.name, hour)
        left_to_loaders = self._unloaded.of(hour)  # after the listing: what is listed is journalled
        found = _Found(self._client, dataset, hour, files, left_to_loaders)
        if what := self._unsound(found, sealed=sealed):
            return Restored(dataset.name, hour, Verdict.UNSOUND, what=what)
        wanted = _content(found.cold())
        outcome = Restored(
            dataset.name,
            hour,
            Verdict.EQUAL,
            rows=wanted.rows,
            left=sum(rows_of(file) for file in files) - wanted.rows,
            checksum=checksum.text(wanted.total),
        )
        was_there = 0
        for attempt in range(TRIES):
            partitions.synced(self._client, dataset.name)
            there = _content(found.hot())
            if there.agrees_with(wanted):
                return outcome
            apart = _compare(found, wanted, there)
            if apart.others and sealed:
                if not self._replace or left_to_loaders:
                    what = _differs(dataset, hour, wanted, apart)
                    return dataclasses.replace(outcome, verdict=Verdict.DIFFERS, what=what)
                self._put_in_place(found, wanted)
                return dataclasses.replace(outcome, verdict=Verdict.REPLACED, inserted=wanted.rows)
            if not len(apart.lacking):  # of an hour that is not sealed, the archive lags
                return outcome
            if attempt and not self._one_server:
                break  # replicas commit rows and tokens together: these will come, and not twice
            was_there = there.rows if not attempt else was_there
            placed = _both_placed(wanted, there)
            inserted = self._insert(
                dataset.name, hour, apart.missing(found.cold(), placed=placed), attempt
            )
            outcome = dataclasses.replace(
                outcome,
                verdict=Verdict.COMPLETED if was_there else Verdict.INSERTED,
                inserted=outcome.inserted + inserted,
            )
        raise StoreRefused(
            f"{found}: ClickHouse acknowledged {outcome.inserted:,} rows and has not got them. Run this again;"
            " if it stays so, look at ClickHouse's own log."
        )

    def _unsound(self, found: _Found, *, sealed: bool) -> str:
        """What is wrong with an hour's files: a sentence; empty where they are what its manifest says."""
        try:
            manifest = self._archive.read_manifest(found.dataset.name, found.hour)
            whole = _content(found.archived())
        except StoreRefused as error:
            return str(error)
        vouched = (manifest.rows, manifest.checksum) if manifest else (0, checksum.text(0))
        if not sealed or (whole.rows, checksum.text(whole.total)) == vouched:
            return ""
        return (
            f"{found}: its files hold {whole.rows:,} rows, its manifest vouches for {vouched[0]:,}, or their"
            " checksums differ. Materialise the hour again."
        )

    def _insert(
        self, table: str, hour: datetime, rows: Iterable[pa.Table], attempt: int = 0
    ) -> int:
        """Insert rows under tokens made of them; `attempt` makes other tokens of the same rows."""
        inserted = 0
        again = f":{attempt}" if attempt else ""
        for batch in rows:
            summed = checksum.text(checksum.rows_checksum(batch))
            token = f"restore:{table}:{hour:%Y-%m-%dT%H}:{batch.num_rows}:{summed}{again}"
            clickhouse.insert_arrow(self._client, table, batch, token)
            inserted += batch.num_rows
        return inserted

    def _put_in_place(self, found: _Found, wanted: Content) -> None:
        """Let the archive's rows take the place of an hour's rows: collected beside, compared, exchanged."""
        name, hour = found.dataset.name, found.hour
        staging = _staging(name)
        span = partitions.Span(found.dataset.time, hour, hour + HOUR)
        with partitions.replacing_span(self._client, name, f"{hour:%Y%m%d}", span, staging):
            self._insert(staging, hour, found.cold())
            if (collected := _content(found.hot(staging))) != wanted:
                raise StoreRefused(
                    f"{found}: {collected.rows:,} of {wanted.rows:,} rows went into {staging}. ClickHouse has"
                    " its rows as before; run this again."
                )
        if not (there := _content(found.hot())).agrees_with(wanted):
            raise StoreRefused(
                f"{found}: ClickHouse has {there.rows:,} rows after they were replaced, the archive"
                f" {wanted.rows:,}. Run this again."
            )


@dataclass(frozen=True)
class _Found:
    """A dataset's hour, in the archive and in ClickHouse."""

    client: clickhouse.Client
    dataset: Dataset
    hour: datetime
    files: Sequence[File]
    left_to_loaders: Mapping[int, int]

    def __str__(self) -> str:
        return f"{self.dataset.name} of {self.hour:%Y-%m-%d %H:00} UTC"

    def archived(self) -> Iterator[pa.Table]:
        """All rows of the archive."""
        for file in self.files:
            yield from batches(file, self.dataset.arrow, BATCH_ROWS)

    def cold(self) -> Iterator[pa.Table]:
        """The archive's rows that ClickHouse must have."""
        return (_without(table, self.left_to_loaders) for table in self.archived())

    def hot(self, table: str | None = None) -> Iterator[pa.Table]:
        """Those that ClickHouse has, in the dataset's table or in another one."""
        tables = hot_hour.tables(self.client, self.dataset, self.hour, table)
        return (_without(each, self.left_to_loaders) for each in tables)


# -- which rows are where ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Apart:
    """How the archive's rows and ClickHouse's differ."""

    lacking: U64
    """Checksums of the rows that ClickHouse lacks, ascending."""
    times: U64
    """How often it lacks each of them."""
    others: int
    """Rows of ClickHouse that the archive does not have, or not so often."""

    def missing(self, tables: Iterable[pa.Table], *, placed: bool) -> Iterator[pa.Table]:
        """Take from the archive's tables the rows that ClickHouse lacks."""
        wanted = self.times.copy()
        for table in tables:
            numbers = checksum.row_numbers(table, placed=placed)
            order = np.argsort(numbers, kind="stable")
            values, first, counts = np.unique(numbers[order], return_index=True, return_counts=True)
            at = np.minimum(np.searchsorted(self.lacking, values), len(self.lacking) - 1)
            found = self.lacking[at] == values
            take = np.where(found, np.minimum(wanted[at], counts.astype(np.uint64)), np.uint64(0))
            wanted[at[found]] -= take[found]
            rank = np.arange(len(order)) - np.repeat(first, counts)
            taken = np.sort(order[rank < np.repeat(take, counts).astype(np.int64)])
            if len(taken):
                yield table.take(pa.array(taken))


def _compare(found: _Found, wanted: Content, there: Content) -> _Apart:
    """Compare the rows of both as multisets, some of the checksums' range at a time."""
    placed = _both_placed(wanted, there)
    passes = 1 + max(wanted.rows, there.rows) // ROWS_COMPARED
    lacking, times, others = [], [], 0
    for part in range(passes):
        archived, archived_times = _counted(found.cold(), part, passes, placed=placed)
        held, held_times = _counted(found.hot(), part, passes, placed=placed)
        common = np.zeros(len(archived), np.uint64)
        if len(held):
            at = np.minimum(np.searchsorted(held, archived), len(held) - 1)
            common = np.where(held[at] == archived, np.minimum(held_times[at], archived_times), 0)
        others += int(held_times.sum()) - int(common.sum())
        short = archived_times > common
        lacking.append(archived[short])
        times.append((archived_times - common)[short])
    order = np.argsort(joined := np.concatenate(lacking))
    return _Apart(joined[order], np.concatenate(times)[order], others)


def _counted(
    tables: Iterable[pa.Table], part: int, passes: int, *, placed: bool
) -> tuple[U64, U64]:
    """The different row checksums of one part of their range, ascending, and how often each comes."""
    numbers = [checksum.row_numbers(table, placed=placed) for table in tables]
    mine = [each[each % np.uint64(passes) == part] for each in numbers]
    values, times = np.unique(np.concatenate([np.zeros(0, np.uint64), *mine]), return_counts=True)
    return values, times.astype(np.uint64)


def _both_placed(one: Content, other: Content) -> bool:
    """Whether `shard` and `record` can be compared: one store may have rows of a version without them."""
    return one.placed == one.rows and other.placed == other.rows


def _content(tables: Iterable[pa.Table]) -> Content:
    found = Content()
    for table in tables:
        found += checksum.content(table)
    return found


def _without(table: pa.Table, left_to_loaders: Mapping[int, int]) -> pa.Table:
    """The rows of records that are loaded. Rows without a record are left out, too: nothing tells of them."""
    if not left_to_loaders:
        return table
    keep = pc.is_valid(table["record"])
    for shard, first_n in left_to_loaders.items():
        unloaded = pc.and_(
            pc.equal(table["shard"], shard), pc.greater_equal(table["record"], first_n)
        )
        keep = pc.and_(keep, pc.invert(pc.fill_null(unloaded, fill_value=True)))
    return table.filter(keep)


def _differs(dataset: Dataset, hour: datetime, wanted: Content, apart: _Apart) -> str:
    return (
        f"{dataset.name} of {hour:%Y-%m-%d %H:00} UTC: ClickHouse has {apart.others:,} rows that the archive"
        f" does not have, and lacks {int(apart.times.sum()):,} of its {wanted.rows:,}. Nothing was changed."
        f" To have the archive's rows: kalshi-platform restore --hours {hour:%Y-%m-%d-%H} --replace."
    )


def refusals(done: Sequence[Restored], *, asked_for: bool) -> list[str]:
    """Sentences about what is not restored; `asked_for`: hours were named, so that none may be missing."""
    passed_over = set() if asked_for else {Verdict.OPEN, Verdict.EXPIRED}
    return [it.what for it in done if not it.verdict.is_there and it.verdict not in passed_over]

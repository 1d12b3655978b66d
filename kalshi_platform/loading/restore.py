"""Restores hours from the archive to ClickHouse without storing any row twice.

Each dataset's hour is compared first, row by row, as a multiset of row checksums:

    equal                               nothing is done
    absent in ClickHouse                inserted
    fewer rows, and no other ones       the missing rows are inserted (an interrupted restore, lost rows)
    other rows                          refused and left unchanged; with `replace`, replaced by the archive's rows

Then it is compared again. A restore can be interrupted at any moment and run again, even while the platform
runs: rows of records that a loader has not loaded yet are left to it (`unloaded`), and an unsealed hour is
restored only while no recorder writes to the journals. Insert tokens are derived from the rows, for inserts
that were still in flight when a restore was killed.

At the end, the current book (`latest_levels`) is rebuilt from the newest snapshots.
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
    BUILT,
    DATASETS,
    STREAM_EVENTS,
    Dataset,
)
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import HOUR

RESTORED = tuple(
    dataset.name for dataset in sorted(BUILT, key=lambda dataset: dataset is STREAM_EVENTS)
)
"""`stream_events` last, as the loader writes: up to where it reaches, the other datasets are complete."""
BATCH_ROWS = 500_000
COMPARED_ROWS = 16_000_000
"""Row checksums of each store in memory at once; an hour with more rows is read several times."""
ATTEMPTS = 5
"""Attempts to insert rows that ClickHouse acknowledges but does not have afterwards."""
EXPIRES_SOON = timedelta(hours=2)


class Verdict(Enum):
    """The result for a dataset's hour."""

    EQUAL = "equal"
    INSERTED = "inserted"
    COMPLETED = "completed"
    REPLACED = "replaced"
    DIFFERS = "differs"
    UNSOUND = "the archive's files are not what its manifest says"
    OPEN = "not sealed yet"
    EXPIRED = "older than ClickHouse keeps"

    @property
    def in_clickhouse(self) -> bool:
        """Whether ClickHouse has the archive's rows now."""
        return self in {Verdict.EQUAL, Verdict.INSERTED, Verdict.COMPLETED, Verdict.REPLACED}


@dataclass(frozen=True)
class Restored:
    """The result for one dataset's hour."""

    dataset: str
    hour: datetime
    verdict: Verdict
    rows: int = 0
    """Rows of the archive, without those left to a loader."""
    inserted: int = 0
    left: int = 0
    """Rows of the archive that a loader has yet to load."""
    checksum: str = ""
    what: str = ""
    """The problem and its remedy, as a sentence; empty without one."""


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
    """Restore the hours of an archive into ClickHouse; `progress` receives the result for each dataset's hour.

    `replace`: where ClickHouse has other rows of a sealed hour, they are replaced by the archive's. An hour that
    cannot be restored does not stop the others.

    Raises: `StoreRefused` where the archive has nothing of the span, `StoreUnavailable` while another restore
    is running.
    """
    with ExitStack() as stack:
        lock = settings.data_dir / "restore.lock"
        stack.enter_context(locked(lock, 0, "Another restore is running"))
        client = clickhouse.connect(settings, log_comment="restore")
        stack.callback(client.close)
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
                f"The archive in {archive} has no hour of that span. `--from` is the folder that contains"
                " orderbook_events/."
            )
        with clickhouse.translated():
            client.command(queries.text("latest_levels_from_events"))
        return done


def _staging(table: str) -> str:
    """The table in which an hour's rows are collected before they replace others."""
    return f"{table}_staging_restore"


def _hours(archive: Archive, span: tuple[datetime, datetime] | None) -> list[datetime]:
    """The hours of a span of which the archive has files, ascending."""
    first, last = span or (None, None)
    return sorted({h for name in RESTORED for h in archive.listing(name, first, last)})


class _Restore:
    """One run of `restore`."""

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
        with ExitStack() as stack:
            if not (sealed := self._is_sealed(hour)) and not self._hold_journals(stack):
                what = (
                    f"{hour:%Y-%m-%d %H:00} UTC is not sealed: its recorder still writes it. Run this again"
                    " when it is, some minutes after the hour's end."
                )
                yield Restored(STREAM_EVENTS.name, hour, Verdict.OPEN, what=what)
                return
            for name in RESTORED:
                yield self._restore_with_retries(DATASETS[name], hour, sealed=sealed)

    def _is_sealed(self, hour: datetime) -> bool:
        try:
            return hours.is_sealed(self._archive, hour)
        except StoreRefused:  # a damaged manifest, which the comparison reports
            return True

    def _hold_journals(self, stack: ExitStack) -> bool:
        """Lock this archive's journals until `stack` closes; return False while a recorder writes to one."""
        if not self._is_own:
            return False
        for shard in watermarks.shards(self._journals):
            lock = filelock.FileLock(self._journals / f"shard-{shard}" / "lock")
            try:
                stack.enter_context(lock.acquire(timeout=0))
            except filelock.Timeout:
                return False
        return True

    def _restore_with_retries(self, dataset: Dataset, hour: datetime, *, sealed: bool) -> Restored:
        """Restore; retry where the hour was compacted or rebuilt meanwhile."""
        for _ in range(ATTEMPTS):
            try:
                return self._restore_dataset(dataset, hour, sealed=sealed)
            except StoreUnavailable as error:
                changed = error
        raise changed

    def _restore_dataset(self, dataset: Dataset, hour: datetime, *, sealed: bool) -> Restored:
        files = self._archive.files(dataset.name, hour)
        left_to_loaders = self._unloaded.of(hour)  # after listing: listed rows are in the journal
        copies = _HourCopies(self._client, dataset, hour, files, left_to_loaders)
        if what := self._manifest_mismatch(copies, sealed=sealed):
            return Restored(dataset.name, hour, Verdict.UNSOUND, what=what)
        wanted = _content(copies.cold())
        outcome = Restored(
            dataset.name,
            hour,
            Verdict.EQUAL,
            rows=wanted.rows,
            left=sum(rows_of(file) for file in files) - wanted.rows,
            checksum=checksum.text(wanted.total),
        )
        rows_before = 0
        for attempt in range(ATTEMPTS):
            partitions.synced(self._client, dataset.name)
            hot_content = _content(copies.hot())
            if hot_content.agrees_with(wanted):
                return outcome
            difference = _compare(copies, wanted, hot_content)
            if difference.others and sealed:
                if not self._replace or left_to_loaders:
                    what = _differs(dataset, hour, wanted, difference)
                    return dataclasses.replace(outcome, verdict=Verdict.DIFFERS, what=what)
                self._replace_rows(copies, wanted)
                return dataclasses.replace(outcome, verdict=Verdict.REPLACED, inserted=wanted.rows)
            if not len(
                difference.lacking
            ):  # the archive of an unsealed hour may lag behind ClickHouse
                return outcome
            if attempt and not self._one_server:
                break  # replicas commit rows and tokens together: the rows will appear, and only once
            rows_before = hot_content.rows if not attempt else rows_before
            groups = checksum.comparable(wanted, hot_content)
            inserted = self._insert(
                dataset.name, hour, difference.missing(copies.cold(), groups=groups), attempt
            )
            outcome = dataclasses.replace(
                outcome,
                verdict=Verdict.COMPLETED if rows_before else Verdict.INSERTED,
                inserted=outcome.inserted + inserted,
            )
        raise StoreRefused(
            f"{copies}: ClickHouse acknowledged {outcome.inserted:,} rows but does not have them. Run this"
            " again; if the problem persists, check ClickHouse's own log."
        )

    def _manifest_mismatch(self, copies: _HourCopies, *, sealed: bool) -> str:
        """How an hour's files differ from its manifest, as a sentence; empty where they do not."""
        try:
            manifest = self._archive.read_manifest(copies.dataset.name, copies.hour)
            content = _content(copies.archived())
        except StoreRefused as error:
            return str(error)
        expected = (manifest.rows, manifest.checksum) if manifest else (0, checksum.text(0))
        if not sealed or (content.rows, checksum.text(content.total)) == expected:
            return ""
        return (
            f"{copies}: its files hold {content.rows:,} rows and its manifest has {expected[0]:,}, or their"
            " checksums differ. Materialise the hour again."
        )

    def _insert(
        self, table: str, hour: datetime, rows: Iterable[pa.Table], attempt: int = 0
    ) -> int:
        """Insert rows with tokens derived from them; another `attempt` gives other tokens for the same rows."""
        inserted = 0
        again = f":{attempt}" if attempt else ""
        for batch in rows:
            summed = checksum.text(checksum.rows_checksum(batch))
            token = f"restore:{table}:{hour:%Y-%m-%dT%H}:{batch.num_rows}:{summed}{again}"
            clickhouse.insert_arrow(self._client, table, batch, token)
            inserted += batch.num_rows
        return inserted

    def _replace_rows(self, copies: _HourCopies, wanted: Content) -> None:
        """Replace an hour's rows by the archive's: collect them in a staging table, compare, swap."""
        name, hour = copies.dataset.name, copies.hour
        staging = _staging(name)
        span = partitions.Span(copies.dataset.time, hour, hour + HOUR)
        with partitions.replacing_span(self._client, name, f"{hour:%Y%m%d}", span, staging):
            self._insert(staging, hour, copies.cold())
            if (collected := _content(copies.hot(staging))) != wanted:
                raise StoreRefused(
                    f"{copies}: {collected.rows:,} of {wanted.rows:,} rows were inserted into {staging}."
                    " ClickHouse's rows are unchanged; run this again."
                )
        if not (hot_content := _content(copies.hot())).agrees_with(wanted):
            raise StoreRefused(
                f"{copies}: ClickHouse has {hot_content.rows:,} rows after they were replaced, the archive"
                f" {wanted.rows:,}. Run this again."
            )


@dataclass(frozen=True)
class _HourCopies:
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
        return (_exclude_unloaded(table, self.left_to_loaders) for table in self.archived())

    def hot(self, table: str | None = None) -> Iterator[pa.Table]:
        """The rows that ClickHouse has, in the dataset's table or in another one."""
        tables = hot_hour.tables(self.client, self.dataset, self.hour, table)
        return (_exclude_unloaded(rows, self.left_to_loaders) for rows in tables)


# -- comparing rows ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Difference:
    """How the archive's rows and ClickHouse's differ."""

    lacking: U64
    """Checksums of the rows that ClickHouse lacks, ascending."""
    times: U64
    """How many copies of each it lacks."""
    others: int
    """Rows of ClickHouse that the archive does not have, or has fewer times."""

    def missing(self, tables: Iterable[pa.Table], *, groups: int) -> Iterator[pa.Table]:
        """Yield those rows of the archive's tables that ClickHouse lacks; `groups` as for `row_numbers`."""
        wanted = self.times.copy()
        for table in tables:
            numbers = checksum.row_numbers(table, groups=groups)
            order = np.argsort(numbers, kind="stable")
            values, first, counts = np.unique(numbers[order], return_index=True, return_counts=True)
            at = np.minimum(np.searchsorted(self.lacking, values), len(self.lacking) - 1)
            is_lacking = self.lacking[at] == values
            take = np.where(
                is_lacking, np.minimum(wanted[at], counts.astype(np.uint64)), np.uint64(0)
            )
            wanted[at[is_lacking]] -= take[is_lacking]
            rank = np.arange(len(order)) - np.repeat(first, counts)
            taken = np.sort(order[rank < np.repeat(take, counts).astype(np.int64)])
            if len(taken):
                yield table.take(pa.array(taken))


def _compare(copies: _HourCopies, wanted: Content, hot_content: Content) -> _Difference:
    """Compare the rows of both as multisets, some of the checksums' range at a time."""
    groups = checksum.comparable(wanted, hot_content)
    passes = 1 + max(wanted.rows, hot_content.rows) // COMPARED_ROWS
    lacking, times, others = [], [], 0
    for part in range(passes):
        cold, cold_times = _counted(copies.cold(), part, passes, groups)
        hot, hot_times = _counted(copies.hot(), part, passes, groups)
        common = np.zeros(len(cold), np.uint64)
        if len(hot):
            at = np.minimum(np.searchsorted(hot, cold), len(hot) - 1)
            common = np.where(hot[at] == cold, np.minimum(hot_times[at], cold_times), 0)
        others += int(hot_times.sum()) - int(common.sum())
        short = cold_times > common
        lacking.append(cold[short])
        times.append((cold_times - common)[short])
    order = np.argsort(joined := np.concatenate(lacking))
    return _Difference(joined[order], np.concatenate(times)[order], others)


def _counted(tables: Iterable[pa.Table], part: int, passes: int, groups: int) -> tuple[U64, U64]:
    """The distinct row checksums with residue `part` modulo `passes`, ascending, and their counts."""
    numbers = [checksum.row_numbers(table, groups=groups) for table in tables]
    selected = [sums[sums % np.uint64(passes) == part] for sums in numbers]
    values, times = np.unique(
        np.concatenate([np.zeros(0, np.uint64), *selected]), return_counts=True
    )
    return values, times.astype(np.uint64)


def _content(tables: Iterable[pa.Table]) -> Content:
    content = Content()
    for table in tables:
        content += checksum.content(table)
    return content


def _exclude_unloaded(table: pa.Table, left_to_loaders: Mapping[int, int]) -> pa.Table:
    """The rows of loaded records. Rows without a record are excluded, too: whether they are loaded is unknown."""
    if not left_to_loaders:
        return table
    keep = pc.is_valid(table["record"])
    for shard, first_n in left_to_loaders.items():
        unloaded = pc.and_(
            pc.equal(table["shard"], shard), pc.greater_equal(table["record"], first_n)
        )
        keep = pc.and_(keep, pc.invert(pc.fill_null(unloaded, fill_value=True)))
    return table.filter(keep)


def _differs(dataset: Dataset, hour: datetime, wanted: Content, difference: _Difference) -> str:
    return (
        f"{dataset.name} of {hour:%Y-%m-%d %H:00} UTC: ClickHouse has {difference.others:,} rows that the archive"
        f" does not have, and lacks {int(difference.times.sum()):,} of its {wanted.rows:,}. Nothing was changed."
        f" To have the archive's rows: kalshi-platform restore --hours {hour:%Y-%m-%d-%H} --replace."
    )


def refusals(done: Sequence[Restored], *, asked_for: bool) -> list[str]:
    """Sentences about hours that were not restored; `asked_for`: hours were named, so none may be skipped."""
    skipped = set() if asked_for else {Verdict.OPEN, Verdict.EXPIRED}
    return [
        restored.what
        for restored in done
        if not restored.verdict.in_clickhouse and restored.verdict not in skipped
    ]

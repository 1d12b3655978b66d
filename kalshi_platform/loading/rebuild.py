"""Rebuilds an archived hour: from the journals while these are kept, else from ClickHouse.

From the journals, every part is built again and replaces itself under the same name, so that a reader sees
each row once at any time. A compacted hour is built and compacted beside the archive, and replaces the present
one if it has the same rows. From ClickHouse, for hours whose files are lost or damaged, the hour becomes one
file per dataset; the old files are set aside under hidden names. Sealing belongs in `archive.sealing`.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pyarrow as pa

from kalshi_platform.archive import (
    FROM_CLICKHOUSE,
    Archive,
    LocalArchive,
    Manifest,
    checksum,
    compaction,
    hours,
    open_archive,
    part_name,
    part_range,
    sealing,
    watermarks,
)
from kalshi_platform.archive.hours import HourReport
from kalshi_platform.archive.row_statistics import RowStatistics
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.errors import PlatformError, StoreError, StoreRefused
from kalshi_platform.exchange.columnar import decode_range
from kalshi_platform.journal import reader
from kalshi_platform.journal.clock import ReceiveClock
from kalshi_platform.journal.reader import LogOffset, LostRange, RecordRange
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.presence import known_archive
from kalshi_platform.loading.rows import Rows, build_rows
from kalshi_platform.loading.shared_rows import chunks, split_at_checkpoints
from kalshi_platform.loading.sinks import by_hour, concatenated
from kalshi_platform.loading.state_files import checkpoint_batches, hour_state
from kalshi_platform.schema import BOOK_CHECKPOINTS, DATASETS, Dataset
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import HOUR, floor_hour, hour_of_ns

log = logging.getLogger(__name__)

RANGE_ROWS = 262_144
RANGE_BYTES = 64 << 20
"""Maximum size of a part where the hour's former split into parts is not known."""


@dataclass(frozen=True)
class _Source:
    """One shard's journal from an hour's first record on, with the books before it."""

    shard: int
    folder: Path
    state: BookState
    position: LogOffset


def rebuild(settings: Settings, hour: datetime) -> HourReport:
    """Rebuild a past hour and seal it; an open hour, or one for which a shard's watermark is missing, is only described.

    The report has no datasets where neither archive, journals nor ClickHouse have rows of the hour.

    Raises: `StoreRefused` where neither the journals nor ClickHouse have the lost rows, `StoreUnavailable` while
    another process changes sealed hours.
    """
    archive = known_archive(settings)
    if floor_hour(datetime.now(UTC)) <= hour or not _may_rebuild(settings, hour):
        return hours.describe(archive, hour, complete=False)
    sources = _journal_sources(settings, hour)
    compaction.withdraw_announcement(archive, hour)
    with archive.changing():
        _finish_sealing(archive, hour)
        if _is_compacted(archive, hour):
            same = bool(sources) and _from_journals_compacted(sources, archive, hour)
            if not same and not _is_intact(archive, hour):
                _from_clickhouse(settings, archive, hour)
        else:
            others = _other_origins(sources, archive, hour)
            complete = bool(sources) and not others
            if None not in others:  # otherwise the file from ClickHouse has the journals' rows, too
                complete &= _from_journals(sources, archive, hour)
            # Without a manifest, parts are compared with nothing: they are all that their loaders wrote.
            has_reference = not sources or others or hours.is_sealed(archive, hour)
            if not complete and has_reference and not _is_intact(archive, hour):
                _from_clickhouse(settings, archive, hour)
        return sealing.seal(archive, hour)


def _finish_sealing(archive: Archive, hour: datetime) -> None:
    """Complete a killed sealing, of which some datasets were sent and others still wait."""
    if archive.swaps_hours or hours.is_sealed(archive, hour) or not _is_compacted(archive, hour):
        return
    try:
        sealing.seal(archive, hour)
    except StoreRefused as error:
        log.warning("%s", error)


def _may_rebuild(settings: Settings, hour: datetime) -> bool:
    """Whether the hour is sealed or every shard's watermark is beyond it: until then only streamers write it."""
    if hours.is_sealed(open_archive(settings), hour):
        return True
    waiting = watermarks.blocking_shards(settings.journals_dir, hour)
    if waiting:
        log.info("The hour %s is open: it waits for the shards %s.", hour, waiting)
    return not waiting


def _other_origins(sources: Sequence[_Source], archive: Archive, hour: datetime) -> set[int | None]:
    """The shards of the hour's parts that are not in `sources`; None stands for a file not from a journal."""
    origins = {cut[0] if (cut := part_range(name)) else None for name in _parts(archive, hour)}
    return origins - {source.shard for source in sources}


# -- from the journal --------------------------------------------------------------------------


def _journal_sources(settings: Settings, hour: datetime) -> list[_Source]:
    """The journals that still have the hour, of configured shards and others."""
    sources = []
    for shard in watermarks.shards(settings.journals_dir):
        folder = settings.journal_dir(shard)
        start = _hour_start(folder, hour)
        if start is not None:
            sources.append(_Source(shard, folder, *start))
    return sources


def _hour_start(folder: Path, hour: datetime) -> tuple[BookState, LogOffset] | None:
    """The books before the hour's first record and that record's log offset; None if not kept."""
    beginning = reader.oldest_offset(folder)
    state = hour_state(folder, hour)
    if state is not None and state.n >= beginning.n:
        return state, reader.offset_of(folder, state.n)
    if beginning.n == 0:  # the journal's first hour begins without books
        first = next(reader.read(folder, beginning), None)
        if (
            isinstance(first, RecordRange)
            and hour_of_ns(first.batch.column("recv_ns")[0].as_py()) == hour
        ):
            return BookState(), beginning
    return None


def _is_compacted(archive: Archive, hour: datetime) -> bool:
    """Whether rows of the hour were compacted, with or without further parts beside them."""
    return any(
        any(file.name.startswith(hours.COMPACTED) for file in archive.files(name, hour))
        or ((manifest := archive.read_manifest(name, hour)) is not None and manifest.merged)
        for name in hours.RECORDED
    )


def _from_journals(sources: Sequence[_Source], archive: Archive, hour: datetime) -> bool:
    """Rebuild each journal's parts; return False where a damaged journal lacks records of the hour.

    From the damage on, that journal's parts are left as they were loaded.
    """
    complete = True
    for source in sources:
        try:
            _from_journal(source, archive, hour)
        except _LostRecords as error:
            log.warning("%s", error)
            complete = False
    return complete


class _LostRecords(PlatformError):
    """A journal lacks records of the hour: a damaged segment was set aside."""

    def __init__(self, folder: Path, hour: datetime) -> None:
        super().__init__(
            f"The journal in {folder} has lost records of {hour:%Y-%m-%d %H:00} UTC:"
            " the hour is not rebuilt from it."
        )


def _from_journals_compacted(sources: Sequence[_Source], archive: Archive, hour: datetime) -> bool:
    """Replace the hour's files by rebuilt ones with the same rows; return False where the journals give other rows.

    That happens where rows came late, in the journal of a later hour, or where a shard's journal no longer has
    the hour. The archive is not changed then.
    """
    manifests = {name: archive.read_manifest(name, hour) for name in hours.RECORDED}
    folder_of_parts = archive.staging("rebuild", hour)
    scratch = LocalArchive(folder_of_parts)
    try:
        for source in sources:
            _from_journal(source, scratch, hour)
        staged_hours: list[tuple[str, Path]] = []
        for name in hours.RECORDED:
            derived, manifest = scratch.files(name, hour), manifests[name]
            if not derived and manifest is None:
                continue
            staged = archive.staging(name, hour)
            built = compaction.build(derived, DATASETS[name], staged) if derived else None
            if manifest is None or built is None or not _same_rows(manifest, built[0]):
                log.warning(
                    "%s of %s: the journals give %s rows, the archive's manifest has %s. The archive"
                    " is not changed from the journals.",
                    name,
                    f"{hour:%Y-%m-%d %H:00} UTC",
                    f"{built[0].rows:,}" if built else "no",
                    f"{manifest.rows:,}" if manifest else "none",
                )
                return False
            now = msgspec.structs.replace(manifest, checksum=built[0].checksum)
            compaction.stage_compacted_manifest(staged, now, built[1])
            staged_hours.append((name, staged))
    except _LostRecords as error:
        log.warning("%s", error)
        return False
    finally:
        shutil.rmtree(folder_of_parts)
    for name, staged in staged_hours:
        archive.replace_hour(name, hour, staged)
    return True


def _same_rows(manifest: Manifest, built: RowStatistics) -> bool:
    """Whether the rows are those of the manifest; rows of an earlier version may gain the columns of `LATER`."""
    sums = {checksum.text(total) for total in (built.content.total, *built.content.earlier)}
    return manifest.rows == built.rows and manifest.checksum in sums


def _from_journal(source: _Source, archive: Archive, hour: datetime) -> None:
    state, shard = source.state, source.shard
    books = checkpoint_batches(state, hour, shard) if state.n else iter(())
    if (first := next(books, None)) is not None:
        name = part_name(shard, state.n, state.n)
        _write(archive, BOOK_CHECKPOINTS, hour, name, itertools.chain([first], books))
    ranges = _ranges(archive, hour, shard)
    begins = {begin for begin, _ in ranges}
    edges = begins | {end for _, end in ranges}
    pending: list[Rows] = []
    first_n = state.n
    for part in _hour_ranges(source, hour, edges):
        rows, state = build_rows(decode_range(part), state, shard)
        pending.append(rows)
        if state.n in edges or (first_n not in begins and _is_full(pending)):
            _write_range(archive, hour, shard, first_n, pending)
            pending, first_n = [], state.n
    if pending:
        _write_range(archive, hour, shard, first_n, pending)


def _is_full(pending: list[Rows]) -> bool:
    count, size = sum(rows.count for rows in pending), sum(rows.bytes for rows in pending)
    return count >= RANGE_ROWS or size >= RANGE_BYTES


def _ranges(archive: Archive, hour: datetime, shard: int) -> set[tuple[int, int]]:
    """The record ranges of a shard's parts of the hour, without the checkpoint's empty range."""
    cuts = [cut for name in _parts(archive, hour) if (cut := part_range(name))]
    return {(first_n, end_n) for k, first_n, end_n in cuts if k == shard and first_n < end_n}


def _parts(archive: Archive, hour: datetime) -> set[str]:
    """The names of the hour's files: existing ones and those that its manifests list."""
    names = set()
    for dataset in hours.RECORDED:
        names |= {file.name for file in archive.files(dataset, hour)}
        manifest = archive.read_manifest(dataset, hour)
        names |= {part.file for part in manifest.parts} if manifest else set()
    return names


def _hour_ranges(source: _Source, hour: datetime, edges: set[int]) -> Iterator[RecordRange]:
    """Yield the hour's record ranges, cut at the edges and at checkpoints.

    Ends where a later hour begins, but not before the last edge: late rows are in the journal of a later hour.

    Raises: `_LostRecords` where records of the hour are lost.
    """
    clock = source.state.clock
    last = max(edges, default=0)
    for read_part in chunks(reader.read(source.folder, source.position)):
        for part, opens in split_at_checkpoints(read_part, clock):
            is_later = opens is not None and opens > hour and clock.is_new_hour(opens)
            if is_later and part.first_n >= last:
                return
            if isinstance(part, LostRange) or part.unread is not None:
                raise _LostRecords(source.folder, hour)
            recv_ns = part.batch.column("recv_ns").to_numpy()
            clock = ReceiveClock(int(recv_ns[-1]), max(clock.newest_ns, int(recv_ns.max())))
            rest = part
            for edge in sorted(e for e in edges if rest.first_n < e < rest.first_n + rest.rows):
                head, rest = rest.cut(edge - rest.first_n)
                yield head
            yield rest


def _write_range(
    archive: Archive, hour: datetime, shard: int, first_n: int, pending: list[Rows]
) -> None:
    name = part_name(shard, first_n, pending[-1].end_n)
    for dataset in DATASETS.values():
        if not dataset.archived or dataset.name not in pending[0].tables:
            continue
        table = concatenated([rows.tables[dataset.name] for rows in pending])
        for of_hour, part in by_hour(table, dataset.time):
            if of_hour == hour:
                _write(archive, dataset, hour, name, [part])


def _write(
    archive: Archive, dataset: Dataset, hour: datetime, name: str, tables: Iterable[pa.Table]
) -> None:
    archive.write(dataset.name, hour, name, tables, dataset.arrow)


# -- from ClickHouse ---------------------------------------------------------------------------


def _is_intact(archive: Archive, hour: datetime) -> bool:
    """Whether the hour has exactly the files of its manifests, with their rows."""
    for dataset in hours.RECORDED:
        manifest = archive.read_manifest(dataset, hour)
        present = {file.name for file in archive.files(dataset, hour)}
        if manifest is None:
            if present:
                return False
            continue
        if present != {part.file for part in manifest.parts if part.rows}:
            return False
    try:
        report = hours.describe(archive, hour, complete=True)
    except StoreError as error:
        log.warning("%s", error)
        return False
    return bool(report.datasets) and all(
        (m := archive.read_manifest(d.dataset, hour)) is not None and m.checksum == d.checksum
        for d in report.datasets
    )


def _from_clickhouse(settings: Settings, archive: Archive, hour: datetime) -> None:
    if not settings.use_clickhouse:
        raise StoreRefused(_not_rebuildable(hour, "ClickHouse is not in use (USE_CLICKHOUSE=0)"))
    client = clickhouse.connect(settings, log_comment=f"rebuild {hour:%Y-%m-%dT%H}")
    for name in hours.RECORDED:
        dataset = DATASETS[name]
        table = select_hour(client, dataset, hour)
        manifest = archive.read_manifest(name, hour)
        if manifest is not None and table.num_rows < manifest.rows:
            why = f"ClickHouse has {table.num_rows:,} of {manifest.rows:,} rows of {name}"
            raise StoreRefused(_not_rebuildable(hour, why))
        while files := archive.files(name, hour):  # sent objects first, then waiting parts
            for file in files:
                archive.set_aside(file)
        if table.num_rows:
            _write(archive, dataset, hour, FROM_CLICKHOUSE, [table])


def select_hour(client: clickhouse.Client, dataset: Dataset, hour: datetime) -> pa.Table:
    """Read a dataset's hour from ClickHouse, with the archive's types."""
    clock = dataset.time
    order = ", ".join(
        c.name
        for c in dataset.columns
        if c.name in {clock, "conn_id", "sid", "seq", "side", "price"}
    )
    query = (
        f"SELECT {select_list(dataset)} FROM {dataset.name}"  # noqa: S608 - names are the schema's own
        f" WHERE {clock} >= {{start:DateTime64(6, 'UTC')}} AND {clock} < {{end:DateTime64(6, 'UTC')}}"
        f" ORDER BY shard NULLS FIRST, record NULLS FIRST, {order}"
    )
    with clickhouse.translated():
        rows = client.query_arrow(query, parameters={"start": hour, "end": hour + HOUR})
    return as_archived(rows, dataset)


def select_list(dataset: Dataset) -> str:
    """A dataset's columns for a SELECT whose result is read as Arrow."""
    # Arrow has no UUIDs and no enum names, so both are selected as strings.
    return ", ".join(
        f"toString({c.name}) AS {c.name}"
        if "UUID" in c.clickhouse or "Enum" in c.clickhouse
        else c.name
        for c in dataset.columns
    )


def as_archived(rows: pa.Table, dataset: Dataset) -> pa.Table:
    """Convert a result of `select_list` to the archive's types."""
    return pa.Table.from_arrays(
        [_cast(rows[field.name], field.type) for field in dataset.arrow], schema=dataset.arrow
    )


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if pa.types.is_dictionary(kind):
        return column.cast(pa.string()).dictionary_encode().cast(kind)
    return column.cast(kind)


def _not_rebuildable(hour: datetime, why: str) -> str:
    return (
        f"The hour {hour:%Y-%m-%d %H:00} UTC cannot be rebuilt: the journal no longer has it, and {why}."
        " Its files are as they were; restore them from a backup."
    )

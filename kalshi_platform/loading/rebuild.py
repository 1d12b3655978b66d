"""Rebuilds an archived hour: from the journals while these are kept, else from the frames in the archive, else
from ClickHouse.

From the journals' records, every part is built again and replaces itself under the same name, so that a reader
sees each row once at any time. A compacted hour is built and compacted beside the archive, and replaces the present
one if it has the same rows. The archive's frames are the same records, of any age; the books before the hour are
beside them (`state_files`). Frames themselves are written again where they are missing and a journal has them. From
ClickHouse, for hours whose files are lost or damaged, the hour becomes one file per dataset; the old files are set
aside under hidden names. Sealing belongs in `archive.sealing`.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.archive import (
    FROM_CLICKHOUSE,
    Archive,
    LocalArchive,
    Manifest,
    RowGroup,
    checksum,
    compaction,
    hours,
    open_archive,
    part_name,
    part_range,
    row_groups,
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
from kalshi_platform.journal.reader import JournalRange, LogOffset, LostRange, RecordRange
from kalshi_platform.loading import frame_rows
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.frame_rows import REPLICA, Numbers, frames_table
from kalshi_platform.loading.presence import known_archive
from kalshi_platform.loading.rows import Rows, build_rows
from kalshi_platform.loading.shared_rows import chunks, split_at_checkpoints
from kalshi_platform.loading.sinks import by_hour, concatenated
from kalshi_platform.loading.state_files import (
    UnreadableState,
    archived_hour_state,
    checkpoint_batches,
    hour_state,
)
from kalshi_platform.schema import BOOK_CHECKPOINTS, DATASETS, FRAMES, Dataset
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import HOUR, floor_hour, hour_of_ns

log = logging.getLogger(__name__)

RANGE_ROWS = 262_144
RANGE_BYTES = 64 << 20
"""Maximum size of a part where the hour's former split into parts is not known."""


JOURNAL, FROM_FRAMES, CLICKHOUSE = "journal", "frames", "ClickHouse"
"""What an hour was rebuilt from (`HourReport.rebuilt_from`)."""
HOURS_BEFORE, HOURS_AFTER = 2, 26
"""Frames of an hour that were received while the clock was set back may be in the folders of so many hours."""


@dataclass(frozen=True)
class _Source:
    """One shard's records from an hour's first record on, with the books before it."""

    shard: int
    state: BookState
    read: Callable[[int], Iterator[JournalRange]]
    """Reads them, at least up to the given record; raises `_LostRecords` where they have a hole before it."""
    where: str
    origin: str


def rebuild(settings: Settings, hour: datetime) -> HourReport:
    """Rebuild a past hour and seal it; an open hour, or one for which a shard's watermark is missing, is only described.

    The report has no datasets where neither archive, journals nor ClickHouse have rows of the hour.

    Raises: `StoreRefused` where neither the journals nor frames nor ClickHouse have the lost rows,
    `StoreUnavailable` while another process changes sealed hours.
    """
    archive = known_archive(settings)
    if floor_hour(datetime.now(UTC)) <= hour or not _may_rebuild(settings, hour):
        return hours.describe(archive, hour, complete=False)
    compaction.withdraw_announcement(archive, hour)
    with archive.changing():
        _finish_sealing(archive, hour)
        origin = _rebuilt(settings, archive, hour)
        return dataclasses.replace(sealing.seal(archive, hour), rebuilt_from=origin)


def _rebuilt(settings: Settings, archive: Archive, hour: datetime) -> str:
    """Rebuild the hour; returns what it was rebuilt from, empty where its files were left as they are."""
    journals = _journal_sources(settings, hour)
    frames = _frame_sources(archive, hour)
    has_frames = _is_intact(archive, hour, (FRAMES.name,))
    again = (
        settings.keep_frames
        and not has_frames
        and _shards_of_frames(archive, hour) <= {source.shard for source in journals}
    )
    if _is_compacted(archive, hour):
        for sources in _choices(journals, frames):
            if _from_records_compacted(sources, archive, hour, frames=again):
                return _origin(sources)
    else:
        if again and journals:
            _set_aside(archive, FRAMES.name, hour)
        for sources in _choices(journals, frames) or [[]]:
            others = _other_origins(sources, archive, hour)
            complete = bool(sources) and not others
            if None not in others:  # otherwise the file from ClickHouse has the journals' rows, too
                complete &= _from_records(sources, archive, hour, frames=again)
            # Without a manifest, parts are compared with nothing: they are all that their loaders wrote.
            has_reference = not sources or others or hours.is_sealed(archive, hour)
            if complete or not has_reference:
                return _origin(sources)
    if not _is_intact(archive, hour, hours.BUILT):
        _from_clickhouse(settings, archive, hour)
        return CLICKHOUSE
    if not has_frames:
        _refuse_lost_frames(archive, hour)
    return ""


def _shards_of_frames(archive: Archive, hour: datetime) -> set[int]:
    """The shards whose frames the hour's parts have, as their names say."""
    manifest = archive.read_manifest(FRAMES.name, hour)
    names = {file.name for file in archive.files(FRAMES.name, hour)}
    names |= {*manifest.merged, *(part.file for part in manifest.parts)} if manifest else set()
    return {cut[0] for name in names if (cut := part_range(name))}


def _choices(journals: list[_Source], frames: list[_Source]) -> list[list[_Source]]:
    """The sources to try, in order: journals, completed by frames of other shards; frames alone."""
    kept = {source.shard for source in journals}
    mixed = journals + [source for source in frames if source.shard not in kept]
    return [choice for choice in ([mixed, frames] if journals else [frames]) if choice]


def _origin(sources: Sequence[_Source]) -> str:
    return " and ".join(sorted({source.origin for source in sources}, reverse=True))


def _refuse_lost_frames(archive: Archive, hour: datetime) -> None:
    """Raise `StoreRefused` where the hour's manifest names frames that are lost or damaged."""
    manifest = archive.read_manifest(FRAMES.name, hour)
    if manifest is None:
        return  # none were kept, or the hour was not sealed with them
    raise StoreRefused(
        f"The frames in {archive.where(FRAMES.name, hour)} are damaged or lost, and no journal has their records"
        " any more. Restore that folder from a backup. Without one, remove it: the hour's other rows stay, and"
        " it can then only be rebuilt from ClickHouse."
    )


def _set_aside(archive: Archive, dataset: str, hour: datetime) -> None:
    while files := archive.files(dataset, hour):  # sent objects first, then waiting parts
        for file in files:
            archive.set_aside(file)


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


# -- from the journal, or from frames ----------------------------------------------------------


def _journal_sources(settings: Settings, hour: datetime) -> list[_Source]:
    """The journals that still have the hour, of configured shards and others."""
    sources = []
    for shard in watermarks.shards(settings.journals_dir):
        folder = settings.journal_dir(shard)
        start = _hour_start(folder, hour)
        if start is not None:
            state, offset = start
            read = partial(_read_journal, folder, offset)
            sources.append(_Source(shard, state, read, f"The journal in {folder}", JOURNAL))
    return sources


def _read_journal(folder: Path, offset: LogOffset, _until_n: int) -> Iterator[JournalRange]:
    return reader.read(folder, offset)


def _frame_sources(archive: Archive, hour: datetime) -> list[_Source]:
    """The shards of which the archive has the hour's frames and the books before them."""
    sources = []
    try:
        files = archive.files(FRAMES.name, hour)
        groups = [group for file in files for group in row_groups(file, FRAMES.sort)]
        low = sorted((group.low for group in groups), reverse=True)
        first = {(shard, replica): n for shard, replica, n in low}
        for shard in sorted({shard for shard, replica in first if replica == REPLICA}):
            state = archived_hour_state(archive, shard, hour)
            if state is None and first[shard, REPLICA] == 0:
                state = BookState()  # the shard's first hour begins without books
            if state is not None:
                read = partial(_read_frames, archive, hour, shard, state.n)
                sources.append(
                    _Source(shard, state, read, _place_of_frames(archive, hour), FROM_FRAMES)
                )
    except (StoreRefused, UnreadableState) as error:
        log.warning("%s", error)
        return []
    return sources


def _place_of_frames(archive: Archive, hour: datetime) -> str:
    return f"The archive's folder {archive.where(FRAMES.name, hour)}"


def _read_frames(
    archive: Archive, hour: datetime, shard: int, first_n: int, until_n: int
) -> Iterator[RecordRange]:
    """Yield a shard's records from `first_n` on, as far as the archive has them without a hole.

    Raises: `_LostRecords` where that is not up to record `until_n`.
    """
    around = archive.listing(FRAMES.name, hour - HOURS_BEFORE * HOUR, hour + HOURS_AFTER * HOUR)
    files = [file for listed in around.values() for file in listed.files]

    def wanted(group: RowGroup) -> bool:
        return group.low[0] <= shard <= group.high[0] and group.high[-1] >= first_n

    n = first_n
    try:
        for part in _of_shard(compaction.merged(files, FRAMES, wanted), shard, first_n):
            if part.first_n != n:
                break
            yield part
            n = part.end.n
    except StoreRefused as error:
        log.warning("%s", error)
    if n < until_n:
        raise _LostRecords(_place_of_frames(archive, hour), hour)


def _of_shard(tables: Iterable[pa.Table], shard: int, first_n: int) -> Iterator[RecordRange]:
    """The records of one shard from `first_n` on, in ranges without a hole."""
    for table in tables:
        wanted = pc.and_(
            pc.equal(table["shard"], pa.scalar(shard, pa.uint32())),
            pc.greater_equal(table["record"], pa.scalar(first_n, pa.uint64())),
        )
        yield from frame_rows.records(table.filter(wanted))


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


def _from_records(
    sources: Sequence[_Source], archive: Archive, hour: datetime, *, frames: bool
) -> bool:
    """Rebuild each shard's parts; return False where its records of the hour have a hole.

    From the hole on, that shard's parts are left as they were loaded. `frames`: write the journals' frames, too.
    """
    complete = True
    for source in sources:
        try:
            _from_records_of(source, archive, hour, frames=frames)
        except _LostRecords as error:
            log.warning("%s", error)
            complete = False
    return complete


class _LostRecords(PlatformError):
    """Records of the hour are missing: a damaged segment was set aside, or frames were not kept."""

    def __init__(self, where: str, hour: datetime) -> None:
        super().__init__(
            f"{where} has lost records of {hour:%Y-%m-%d %H:00} UTC: the hour is not rebuilt from there."
        )


def _from_records_compacted(
    sources: Sequence[_Source], archive: Archive, hour: datetime, *, frames: bool
) -> bool:
    """Replace the hour's files by rebuilt ones with the same rows; return False where the journals give other rows.

    That happens where rows came late, in the journal of a later hour, or where a shard's journal no longer has
    the hour. The archive is not changed then.
    """
    manifests = {name: archive.read_manifest(name, hour) for name in hours.RECORDED}
    folder_of_parts = archive.staging("rebuild", hour)
    scratch = LocalArchive(folder_of_parts)
    try:
        for source in sources:
            _from_records_of(source, scratch, hour, frames=frames)
        staged_hours: list[tuple[str, Path]] = []
        for name in hours.RECORDED:
            derived, manifest = scratch.files(name, hour), manifests[name]
            if not derived and (manifest is None or name == FRAMES.name):
                continue  # frames that are intact are not written again
            staged = archive.staging(name, hour)
            built = compaction.build(derived, DATASETS[name], staged) if derived else None
            if name == FRAMES.name and manifest is None:
                staged_hours.append((name, staged))  # sealing writes its manifest
                continue
            if manifest is None or built is None or not _same_rows(manifest, built[0]):
                log.warning(
                    "%s of %s: %s rows from the %s, the archive's manifest has %s. The archive"
                    " is not changed from the %s.",
                    name,
                    f"{hour:%Y-%m-%d %H:00} UTC",
                    f"{built[0].rows:,}" if built else "no",
                    _origin(sources),
                    f"{manifest.rows:,}" if manifest else "none",
                    _origin(sources),
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


def _from_records_of(source: _Source, archive: Archive, hour: datetime, *, frames: bool) -> None:
    state, shard = source.state, source.shard
    books = checkpoint_batches(state, hour, shard) if state.n else iter(())
    if (first := next(books, None)) is not None:
        name = part_name(shard, state.n, state.n)
        _write(archive, BOOK_CHECKPOINTS, hour, name, itertools.chain([first], books))
    ranges = _ranges(archive, hour, shard)
    begins = {begin for begin, _ in ranges}
    edges = begins | {end for _, end in ranges}
    pending: list[Rows] = []
    kept: list[pa.Table] = []
    frames = frames and source.origin == JOURNAL
    first_n = state.n
    for part in _hour_ranges(source, hour, edges):
        rows, state = build_rows(decode_range(part), state, shard)
        pending.append(rows)
        if frames:
            kept.append(frames_table(part, Numbers(part.first_n, state.n, [rows]), shard))
        if state.n in edges or (first_n not in begins and _is_full(pending)):
            _write_range(archive, hour, part_name(shard, first_n, state.n), pending, kept)
            pending, kept, first_n = [], [], state.n
    if pending:
        _write_range(archive, hour, part_name(shard, first_n, state.n), pending, kept)


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
    for read_part in chunks(source.read(last)):
        for part, opens in split_at_checkpoints(read_part, clock):
            is_later = opens is not None and opens > hour and clock.is_new_hour(opens)
            if is_later and part.first_n >= last:
                return
            if isinstance(part, LostRange) or part.unread is not None:
                raise _LostRecords(source.where, hour)
            recv_ns = part.batch.column("recv_ns").to_numpy()
            clock = ReceiveClock(int(recv_ns[-1]), max(clock.newest_ns, int(recv_ns.max())))
            rest = part
            for edge in sorted(e for e in edges if rest.first_n < e < rest.first_n + rest.rows):
                head, rest = rest.cut(edge - rest.first_n)
                yield head
            yield rest


def _write_range(
    archive: Archive, hour: datetime, name: str, pending: list[Rows], frames: Sequence[pa.Table]
) -> None:
    of_hour_frames = [part for t in frames for at, part in by_hour(t, FRAMES.time) if at == hour]
    if of_hour_frames:
        _write(archive, FRAMES, hour, name, of_hour_frames)
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


def _is_intact(archive: Archive, hour: datetime, names: Sequence[str]) -> bool:
    """Whether the hour has exactly the files of these datasets' manifests, with their rows; at least one."""
    found = False
    for name in names:
        manifest = archive.read_manifest(name, hour)
        files = archive.files(name, hour)
        if manifest is None:
            if files:
                return False
            continue
        if {file.name for file in files} != {part.file for part in manifest.parts if part.rows}:
            return False
        try:
            content = compaction.statistics_of(files, DATASETS[name])
        except StoreError as error:
            log.warning("%s", error)
            return False
        if (content.rows, content.checksum) != (manifest.rows, manifest.checksum):
            return False
        found = True
    return found


def _from_clickhouse(settings: Settings, archive: Archive, hour: datetime) -> None:
    if not settings.use_clickhouse:
        raise StoreRefused(_not_rebuildable(hour, "ClickHouse is not in use (USE_CLICKHOUSE=0)"))
    client = clickhouse.connect(settings, log_comment=f"rebuild {hour:%Y-%m-%dT%H}")
    for name in hours.BUILT:
        dataset = DATASETS[name]
        table = select_hour(client, dataset, hour)
        manifest = archive.read_manifest(name, hour)
        if manifest is not None and table.num_rows < manifest.rows:
            why = f"ClickHouse has {table.num_rows:,} of {manifest.rows:,} rows of {name}"
            raise StoreRefused(_not_rebuildable(hour, why))
        _set_aside(archive, name, hour)
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
        f"The hour {hour:%Y-%m-%d %H:00} UTC cannot be rebuilt: neither the journal nor the archive's frames"
        f" have it, and {why}."
        " Its files are as they were; restore them from a backup."
    )

"""An archived hour, built again: from the journal while that is kept, else from ClickHouse.

From the journal every part is derived anew and replaces itself, name for name, so that a reader
sees each row once at every instant. A compacted hour is derived and compacted beside the archive, and
exchanged for what is there if it has the same rows. From ClickHouse, for hours whose files are lost or
damaged, the hour becomes one file per dataset; what was there is put aside under a hidden name.
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
from kalshi_platform.loading.shared_rows import at_openings, chunks
from kalshi_platform.loading.sinks import by_hour, concatenated
from kalshi_platform.loading.state_files import checkpoint_batches, hour_state
from kalshi_platform.schema import BOOK_CHECKPOINTS, DATASETS, Dataset
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import HOUR, floor_hour, hour_of_ns

log = logging.getLogger(__name__)

RANGE_ROWS = 262_144
RANGE_BYTES = 64 << 20
"""Of one file, where nothing says how the hour was cut before."""


@dataclass(frozen=True)
class _Source:
    """One shard's journal, from the books before an hour's first record on."""

    shard: int
    folder: Path
    state: BookState
    position: LogOffset


def rebuild(settings: Settings, hour: datetime) -> HourReport:
    """Build a past hour again and seal it; one that is still open, or that a shard has not passed yet,
    is only described.

    The report has no datasets where nothing of the hour is known anywhere. Raises `StoreRefused`
    where neither the journals nor ClickHouse can give back what is lost, `StoreUnavailable` while
    somebody else changes sealed hours.
    """
    archive = known_archive(settings)
    if floor_hour(datetime.now(UTC)) <= hour or not _passed(settings, hour):
        return hours.describe(archive, hour, complete=False)
    sources = _in_journals(settings, hour)
    compaction.withdraw_announcement(archive, hour)
    with archive.changing():
        _finish_sealing(archive, hour)
        if _is_compacted(archive, hour):
            same = bool(sources) and _from_journals_compacted(sources, archive, hour)
            if not same and not _sound(archive, hour):
                _from_clickhouse(settings, archive, hour)
        else:
            strangers = _parts_of_others(sources, archive, hour)
            whole = bool(sources) and not strangers
            if None not in strangers:  # else what ClickHouse gave holds the journals' rows too
                whole &= _from_journals(sources, archive, hour)
            # parts that nobody has vouched for yet are all that their loads wrote
            vouched = not sources or strangers or hours.is_sealed(archive, hour)
            if not whole and vouched and not _sound(archive, hour):
                _from_clickhouse(settings, archive, hour)
        return sealing.seal(archive, hour)


def _finish_sealing(archive: Archive, hour: datetime) -> None:
    """Of an hour whose sealing was killed, some datasets have been sent and others wait."""
    if archive.swaps_hours or hours.is_sealed(archive, hour) or not _is_compacted(archive, hour):
        return
    try:
        sealing.seal(archive, hour)
    except StoreRefused as error:
        log.warning("%s", error)


def _passed(settings: Settings, hour: datetime) -> bool:
    """Whether every shard is done with the hour: until then its files are the streamers' alone."""
    if hours.is_sealed(open_archive(settings), hour):
        return True
    waiting = watermarks.blocking_shards(settings.journals_dir, hour)
    if waiting:
        log.info("The hour %s is open: shards %s have not passed it.", hour, waiting)
    return not waiting


def _parts_of_others(
    sources: Sequence[_Source], archive: Archive, hour: datetime
) -> set[int | None]:
    """Whose parts the hour has besides these journals'; None: not from a journal at all."""
    whose = {cut[0] if (cut := part_range(name)) else None for name in _parts(archive, hour)}
    return whose - {source.shard for source in sources}


# -- from the journal --------------------------------------------------------------------------


def _in_journals(settings: Settings, hour: datetime) -> list[_Source]:
    """The journals that still have the hour, of whatever shard: configured or not."""
    found = []
    for shard in watermarks.shards(settings.journals_dir):
        folder = settings.journal_dir(shard)
        start = _in_journal(folder, hour)
        if start is not None:
            found.append(_Source(shard, folder, *start))
    return found


def _in_journal(folder: Path, hour: datetime) -> tuple[BookState, LogOffset] | None:
    """The books before the hour's first record, and where that record is; None if not kept."""
    beginning = reader.oldest_offset(folder)
    state = hour_state(folder, hour)
    if state is not None and state.n >= beginning.n:
        return state, reader.offset_of(folder, state.n)
    if beginning.n == 0:  # the journal's very first hour begins with no books at all
        first = next(reader.read(folder, beginning), None)
        if (
            isinstance(first, RecordRange)
            and hour_of_ns(first.batch.column("recv_ns")[0].as_py()) == hour
        ):
            return BookState(), beginning
    return None


def _is_compacted(archive: Archive, hour: datetime) -> bool:
    """Whether a compaction took in rows of the hour, be there parts beside them or not."""
    return any(
        any(file.name.startswith(hours.COMPACTED) for file in archive.files(name, hour))
        or ((manifest := archive.read_manifest(name, hour)) is not None and manifest.merged)
        for name in hours.RECORDED
    )


def _from_journals(sources: Sequence[_Source], archive: Archive, hour: datetime) -> bool:
    """Derive each journal's parts anew; False where a damaged one no longer has all of the hour.

    What was loaded before the damage stays: of that one, no part is changed from there on.
    """
    whole = True
    for source in sources:
        try:
            _from_journal(source, archive, hour)
        except _LostRecords as error:
            log.warning("%s", error)
            whole = False
    return whole


class _LostRecords(PlatformError):
    """A journal that lacks records of the hour: a damaged segment was set aside."""

    def __init__(self, folder: Path, hour: datetime) -> None:
        super().__init__(
            f"The journal in {folder} has lost records of {hour:%Y-%m-%d %H:00} UTC:"
            " the hour is not built from it."
        )


def _from_journals_compacted(sources: Sequence[_Source], archive: Archive, hour: datetime) -> bool:
    """Replace the hour's files by new ones of the same rows; False where the journals give others.

    They do where rows came late, in the journal of a later hour, or where a shard's journal no longer
    has the hour: what the archive has then stays.
    """
    manifests = {name: archive.read_manifest(name, hour) for name in hours.RECORDED}
    folder_of_parts = archive.staging("rebuild", hour)
    scratch = LocalArchive(folder_of_parts)
    try:
        for source in sources:
            _from_journal(source, scratch, hour)
        built = []
        for name in hours.RECORDED:
            derived, manifest = scratch.files(name, hour), manifests[name]
            if not derived and manifest is None:
                continue
            staged = archive.staging(name, hour)
            found = compaction.build(derived, DATASETS[name], staged) if derived else None
            if manifest is None or found is None or not _same(manifest, found[0]):
                log.warning(
                    "%s of %s: the journals give %s rows, the archive vouches for %s. The archive"
                    " is not changed from the journals.",
                    name,
                    f"{hour:%Y-%m-%d %H:00} UTC",
                    f"{found[0].rows:,}" if found else "no",
                    f"{manifest.rows:,}" if manifest else "none",
                )
                return False
            now = msgspec.structs.replace(manifest, checksum=found[0].checksum)
            compaction.stage_compacted_manifest(staged, now, found[1])
            built.append((name, staged))
    except _LostRecords as error:
        log.warning("%s", error)
        return False
    finally:
        shutil.rmtree(folder_of_parts)
    for name, staged in built:
        archive.replace_hour(name, hour, staged)
    return True


def _same(manifest: Manifest, built: RowStatistics) -> bool:
    """Whether they are the same rows; those of a version without record numbers gain them."""
    sums = (built.checksum, checksum.text(built.content.placeless))
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
    for piece in _pieces(source, hour, edges):
        rows, state = build_rows(decode_range(piece), state, shard)
        pending.append(rows)
        if state.n in edges or (first_n not in begins and _is_full(pending)):
            _write_range(archive, hour, shard, first_n, pending)
            pending, first_n = [], state.n
    if pending:
        _write_range(archive, hour, shard, first_n, pending)


def _is_full(pending: list[Rows]) -> bool:
    rows, size = sum(it.count for it in pending), sum(it.bytes for it in pending)
    return rows >= RANGE_ROWS or size >= RANGE_BYTES


def _ranges(archive: Archive, hour: datetime, shard: int) -> set[tuple[int, int]]:
    """The records of each of a shard's parts of the hour, but for the checkpoint's."""
    cuts = [cut for name in _parts(archive, hour) if (cut := part_range(name))]
    return {(first_n, end_n) for of, first_n, end_n in cuts if of == shard and first_n < end_n}


def _parts(archive: Archive, hour: datetime) -> set[str]:
    """The names of the hour's files, those that are there and those that its manifests list."""
    names = set()
    for dataset in hours.RECORDED:
        names |= {file.name for file in archive.files(dataset, hour)}
        manifest = archive.read_manifest(dataset, hour)
        names |= {part.file for part in manifest.parts} if manifest else set()
    return names


def _pieces(source: _Source, hour: datetime, edges: set[int]) -> Iterator[RecordRange]:
    """The hour's blocks, cut at the edges and at openings; ends where a later hour is new, behind the last edge:
    rows that came late are in the journal of a later hour.

    Raises `_LostRecords` where some of the hour's are lost.
    """
    clock = source.state.clock
    last = max(edges, default=0)
    for stretch in chunks(reader.read(source.folder, source.position)):
        for piece, opens in at_openings(stretch, clock):
            is_later = opens is not None and opens > hour and clock.is_new_hour(opens)
            if is_later and piece.first_n >= last:
                return
            if isinstance(piece, LostRange) or piece.unread is not None:
                raise _LostRecords(source.folder, hour)
            recv_ns = piece.batch.column("recv_ns").to_numpy()
            clock = ReceiveClock(int(recv_ns[-1]), max(clock.newest_ns, int(recv_ns.max())))
            rest = piece
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
        for of_hour, piece in by_hour(table, dataset.time):
            if of_hour == hour:
                _write(archive, dataset, hour, name, [piece])


def _write(
    archive: Archive, dataset: Dataset, hour: datetime, name: str, tables: Iterable[pa.Table]
) -> None:
    archive.write(dataset.name, hour, name, tables, dataset.arrow)


# -- from ClickHouse ---------------------------------------------------------------------------


def _sound(archive: Archive, hour: datetime) -> bool:
    """Whether the hour's files are all there and hold what its manifests say."""
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
        raise StoreRefused(_lost(hour, "ClickHouse is not in use (USE_CLICKHOUSE=0)"))
    client = clickhouse.connect(settings, log_comment=f"rebuild {hour:%Y-%m-%dT%H}")
    for name in hours.RECORDED:
        dataset = DATASETS[name]
        table = select_hour(client, dataset, hour)
        manifest = archive.read_manifest(name, hour)
        if manifest is not None and table.num_rows < manifest.rows:
            why = f"ClickHouse has {table.num_rows:,} of {manifest.rows:,} rows of {name}"
            raise StoreRefused(_lost(hour, why))
        while there := archive.files(name, hour):  # what was sent, then what waits behind it
            for file in there:
                archive.set_aside(file)
        if table.num_rows:
            _write(archive, dataset, hour, FROM_CLICKHOUSE, [table])


def select_hour(client: clickhouse.Client, dataset: Dataset, hour: datetime) -> pa.Table:
    """A dataset's hour as ClickHouse has it, in the archive's own types."""
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
        found = client.query_arrow(query, parameters={"start": hour, "end": hour + HOUR})
    return as_archived(found, dataset)


def select_list(dataset: Dataset) -> str:
    """A dataset's columns for a SELECT that is to be read as Arrow."""
    # Arrow has neither UUIDs nor names of enum values: both come as text.
    return ", ".join(
        f"toString({c.name}) AS {c.name}"
        if "UUID" in c.clickhouse or "Enum" in c.clickhouse
        else c.name
        for c in dataset.columns
    )


def as_archived(found: pa.Table, dataset: Dataset) -> pa.Table:
    """What ClickHouse answered to `select_list`, in the archive's own types."""
    return pa.Table.from_arrays(
        [_as(found[field.name], field.type) for field in dataset.arrow], schema=dataset.arrow
    )


def _as(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    if pa.types.is_dictionary(kind):
        return column.cast(pa.string()).dictionary_encode().cast(kind)
    return column.cast(kind)


def _lost(hour: datetime, why: str) -> str:
    return (
        f"The hour {hour:%Y-%m-%d %H:00} UTC cannot be rebuilt: the journal no longer has it, and {why}."
        " Its files are as they were; restore them from a backup."
    )

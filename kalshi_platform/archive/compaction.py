"""Compaction: the parts of a sealed hour become one file, sorted for reading.

1. *Build*: the sorted file is built beside the archive and compared with the parts and the manifest, by row
   count and checksum. An hour that differs from its manifest is refused and left unchanged.
2. *Announce*: an empty file with the new file's name is added to the parts.
3. *Swap*: the folders are swapped in one step. The old one is kept aside for a while, then removed.

A kill at any moment leaves either the parts or the one file. The announcement is for readers that list names
and silently skip files that no longer exist when opened (Arrow and DuckDB do): such a reader, having listed
the parts before the swap, still has the announced name, which then holds every row. A reader that fails on
a missing file has to list again. Replacing the folder belongs in `local`.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.archive import (
    Archive,
    File,
    Manifest,
    Part,
    RowGroup,
    batches,
    hours,
    local_file,
    part_range,
    row_group,
    row_groups,
    rows_of,
    stage_manifest,
    write_durably,
)
from kalshi_platform.archive.row_statistics import RowStatistics
from kalshi_platform.errors import StoreError, StoreRefused, StoreUnavailable
from kalshi_platform.schema import (
    DATASETS,
    FRAMES,
    RECORDED,
    Dataset,
)
from kalshi_platform.utc_hours import floor_hour

log = logging.getLogger(__name__)

SORTED_BY = {dataset.name: dataset.sort for dataset in RECORDED}
ROW_GROUP_ROWS = 65_536
"""The minimum that a reader of one market reads; docs/data.md has the figures."""
ZSTD_LEVEL = 9
LINGER_S = 0.5
"""Time from announcement to swap: readers that listed the hour before the announcement have opened it by then."""
ROW_GROUP_BYTES = 32 << 20
"""The most bytes of a row group of frames, unless a single frame is longer."""
RANGE_ROWS = 2_000_000
"""Rows sorted at a time, in groups of markets: bounds memory, except for a single larger market."""


@dataclass(frozen=True)
class Compacted:
    """The result for one dataset's hour. Sizes are in bytes."""

    dataset: str
    hour: datetime
    rows: int
    files_before: int
    bytes_before: int
    bytes_after: int
    checksum: str


def pending(archive: Archive) -> list[datetime]:
    """The sealed hours of which some dataset is not compacted yet, ascending."""
    if not archive.swaps_hours:
        return []
    now = floor_hour(datetime.now(UTC))
    parts = {
        hour
        for name in hours.RECORDED
        for hour in archive.hours(name)
        if hour < now and not hours.is_compacted([file.name for file in archive.files(name, hour)])
    }
    return [hour for hour in sorted(parts) if _is_sealed(archive, hour)]


def _is_sealed(archive: Archive, hour: datetime) -> bool:
    try:
        return hours.is_sealed(archive, hour)
    except StoreRefused:
        return True  # a damaged manifest: reported when the hour is compacted


def compact(
    archive: Archive,
    wanted: Iterable[datetime],
    done: Callable[[Compacted], None],
    refused: Callable[[datetime, StoreError], None],
) -> None:
    """Compact the `wanted` hours one after the other; a refused hour does not stop the others.

    Raises: `StoreUnavailable` where another compaction is running.
    """
    with archive.compacting():
        for hour in wanted:
            try:
                _sweep(archive)
                for compacted in compact_hour(archive, hour):
                    done(compacted)
            except StoreError as error:
                refused(hour, error)
            except OSError as error:
                refused(hour, _disk_error(hour, error))
        _sweep(archive)


def _disk_error(hour: datetime, error: OSError) -> StoreUnavailable:
    return StoreUnavailable(
        f"{error.filename} cannot be accessed ({error.strerror}), so {hour:%Y-%m-%d %H:00} UTC stays as it"
        " is. Correct that; the next compaction compacts it."
    )


def sweep(archive: Archive) -> None:
    """Remove replaced hours and abandoned work; each compaction does this, too.

    Raises: `StoreUnavailable` where a compaction is running.
    """
    with archive.compacting():
        _sweep(archive)


def _sweep(archive: Archive) -> None:
    try:
        with archive.changing(timeout_s=0):
            archive.sweep()
    except StoreUnavailable as error:
        log.info("Replaced hours are not removed yet: %s", error)


def compact_hour(archive: Archive, hour: datetime) -> Iterator[Compacted]:
    """Compact the datasets of a sealed hour, skipping compacted ones.

    The caller holds `archive.compacting`.

    Raises: `StoreRefused` where the hour is not sealed or its files differ from its manifest,
    `StoreUnavailable` where it changed meanwhile.
    """
    if floor_hour(datetime.now(UTC)) <= hour:
        raise StoreRefused(
            f"The hour {hour:%Y-%m-%d %H:00} UTC is still open: the streamer writes to it."
        )
    if not any(archive.files(name, hour) for name in hours.RECORDED):
        raise StoreRefused(f"The archive in {archive} has nothing of {hour:%Y-%m-%d %H:00} UTC.")
    if not hours.is_sealed(archive, hour):
        raise StoreRefused(
            f"The hour {hour:%Y-%m-%d %H:00} UTC is not sealed: the streamer may still write to it. It is"
            " sealed when every shard's watermark is beyond it, or when orderbook_events is materialised for it."
        )
    if not archive.swaps_hours:
        return  # on object storage an hour is sorted before it is sent
    withdraw_announcement(archive, hour)
    prepared = [
        _prepare(archive, DATASETS[name], hour)
        for name in hours.RECORDED
        if (files := archive.files(name, hour))
        and not hours.is_compacted([file.name for file in files])
    ]
    announced = [_announce(archive, built) for built in prepared]
    time.sleep(LINGER_S)
    for built, files in zip(prepared, announced, strict=True):
        with archive.changing():
            _verify_unchanged(archive, built, files)
            archive.replace_hour(built.dataset.name, hour, built.staged)
        yield Compacted(
            built.dataset.name,
            hour,
            built.content.rows,
            len(built.before),
            sum(file.bytes for file in built.before),
            built.part.bytes,
            built.content.checksum,
        )


@dataclass(frozen=True)
class _Prepared:
    dataset: Dataset
    hour: datetime
    before: list[File]
    staged: Path
    content: RowStatistics
    part: Part


def _prepare(archive: Archive, dataset: Dataset, hour: datetime) -> _Prepared:
    listed = archive.listed(dataset.name, hour)
    listed.refuse_foreign(archive.where(dataset.name, hour))
    before = list(listed.files)
    manifest = archive.read_manifest(dataset.name, hour)
    if manifest is None:
        raise StoreRefused(f"{dataset.name} of {hour:%Y-%m-%d %H:00} UTC is not sealed.")
    staged = archive.staging(dataset.name, hour)
    content, part = build(before, dataset, staged)
    if (content.rows, content.checksum) != (manifest.rows, manifest.checksum):
        raise StoreRefused(
            f"{manifest.dataset} of {manifest.hour}: its files hold {content.rows:,} rows of checksum"
            f" {content.checksum}, its manifest says {manifest.rows:,} of {manifest.checksum}. Nothing"
            " was changed. Materialise that hour again, then compact it."
        )
    stage_compacted_manifest(staged, manifest, part)
    return _Prepared(dataset, hour, before, staged, content, part)


def _announce(archive: Archive, built: _Prepared) -> list[File]:
    """Add an empty file with the new name to the parts; return the hour's files."""
    schema, name = built.dataset.arrow, built.dataset.name
    with archive.changing():
        _verify_unchanged(archive, built, built.before)
        archive.write(name, built.hour, built.part.file, [schema.empty_table()], schema)
        return archive.files(name, built.hour)


def withdraw_announcement(archive: Archive, hour: datetime) -> None:
    """Remove the empty announced files that a killed compaction left."""
    if not archive.swaps_hours:
        return
    with archive.changing():
        for name in hours.RECORDED:
            files = archive.files(name, hour)
            for file in files if len(files) > 1 else ():
                if file.name.startswith(hours.COMPACTED) and not rows_of(file):
                    archive.remove(file)


def _verify_unchanged(archive: Archive, built: _Prepared, files: list[File]) -> None:
    if archive.files(built.dataset.name, built.hour) != files:
        raise StoreUnavailable(
            f"{built.dataset.name} of {built.hour:%Y-%m-%d %H:00} UTC changed while it was compacted, and"
            " stays as it is. The next compaction compacts it."
        )


def stage_compacted_manifest(staged: Path, manifest: Manifest, part: Part) -> None:
    """Write a compacted hour's manifest beside its one file; `manifest` is that of the parts."""
    merged = {part.file for part in manifest.parts if part_range(part.file)}
    after = msgspec.structs.replace(
        manifest,
        bytes=part.bytes,
        parts=[part],
        compacted=True,
        merged=sorted(merged | set(manifest.merged)),
    )
    stage_manifest(staged, after)


# -- building ----------------------------------------------------------------------------------


def build(sources: Sequence[File], dataset: Dataset, staged: Path) -> tuple[RowStatistics, Part]:
    """Write the rows of all `sources` into one sorted file in `staged` and read it back to verify it.

    The file name is derived from the file's bytes, so one name never denotes two different files.

    Raises: `StoreRefused` where a file cannot be read or the written file differs.
    """
    schema = dataset.arrow
    content = statistics_of(sources, dataset)
    unnamed = staged / f"{hours.COMPACTED}0.parquet"
    if dataset is FRAMES:
        tables = _bounded(merged(sources, dataset))
    else:
        tables = _sorted_tables(sources, dataset, content.by_market)
    size = write_durably(
        unnamed, tables, schema, level=ZSTD_LEVEL, sorted_by=SORTED_BY[dataset.name]
    )
    written = statistics_of([local_file(unnamed)], dataset)
    if written != content:
        raise StoreRefused(
            f"{unnamed} was written from {content.rows:,} rows of checksum {content.checksum} and reads"
            f" as {written.rows:,} of {written.checksum}. Nothing was changed. Is the disk failing?"
        )
    with unnamed.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    path = unnamed.rename(staged / f"{hours.COMPACTED}{digest}.parquet")
    return content, Part(path.name, content.rows, size)


def statistics_of(sources: Sequence[File], dataset: Dataset) -> RowStatistics:
    """Statistics of all rows of some files."""
    statistics = RowStatistics(dataset)
    for file in sources:
        for table in batches(file, dataset.arrow):
            statistics.add(table)
    return statistics


def _sorted_tables(
    sources: Sequence[File], dataset: Dataset, by_market: Counter[str]
) -> Iterator[pa.Table]:
    """Yield all rows in order, one row group at a time."""
    keys = SORTED_BY[dataset.name]
    ranges = _ranges(by_market) if keys[0] == "market_ticker" else [frozenset(by_market)]
    for tickers in ranges:
        tables = [
            table if len(ranges) == 1 else _of_markets(table, tickers)
            for file in sources
            for table in batches(file, dataset.arrow)
        ]
        rows = pa.concat_tables(tables).unify_dictionaries().combine_chunks()
        order = _order(rows, keys)
        for start in range(0, len(order), ROW_GROUP_ROWS):
            yield own_dictionaries(rows.take(pa.array(order[start : start + ROW_GROUP_ROWS])))


def merged(
    sources: Sequence[File], dataset: Dataset, wanted: Callable[[RowGroup], bool] = lambda _: True
) -> Iterator[pa.Table]:
    """Yield the rows of files in the order of their keys, which are whole numbers and never null.

    Row groups whose keys overlap are read together: the files should be sorted by those keys already, as the
    journal's records are. `wanted`: leave out other row groups.
    """
    keys = SORTED_BY[dataset.name]
    groups = [group for file in sources for group in row_groups(file, keys) if wanted(group)]
    together: list[RowGroup] = []
    for group in sorted(groups, key=lambda group: (group.low, group.high)):
        if together and group.low > max(held.high for held in together):
            yield _read_sorted(together, dataset)
            together = []
        together.append(group)
    if together:
        yield _read_sorted(together, dataset)


def _read_sorted(groups: Sequence[RowGroup], dataset: Dataset) -> pa.Table:
    rows = pa.concat_tables([row_group(group, dataset.arrow) for group in groups])
    rows = rows.unify_dictionaries()
    if len(groups) == 1:
        return rows
    rows = rows.combine_chunks()
    return rows.take(pa.array(_order(rows, SORTED_BY[dataset.name])))


def _bounded(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the rows as tables for a row group each: of one shard, and of bounded size."""
    waiting: list[pa.Table] = []
    for table in _of_one_shard(tables):
        for start in range(0, table.num_rows, ROW_GROUP_ROWS):
            piece = table.slice(start, ROW_GROUP_ROWS)
            held = [*waiting, piece]
            if waiting and (
                waiting[0]["shard"][0] != piece["shard"][0]
                or sum(part.num_rows for part in held) > ROW_GROUP_ROWS
                or sum(part.nbytes for part in held) > ROW_GROUP_BYTES
            ):
                yield own_dictionaries(pa.concat_tables(waiting).combine_chunks())
                held = [piece]
            waiting = held
    if waiting:
        yield own_dictionaries(pa.concat_tables(waiting).combine_chunks())


def _of_one_shard(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Split sorted tables where another shard begins."""
    for table in tables:
        shard = table["shard"].to_numpy()
        edges = [0, *(np.flatnonzero(np.diff(shard.astype(np.int64))) + 1).tolist(), len(shard)]
        for start, end in pairwise(edges):
            if start < end:
                yield table.slice(start, end - start)


def _ranges(by_market: Counter[str]) -> list[frozenset[str]]:
    """Group the markets, sorted by name, so that a group has at most `RANGE_ROWS` rows or one market."""
    groups: list[list[str]] = []
    room = 0
    for ticker, count in sorted(by_market.items()):
        if not groups or count > room:
            groups.append([])
            room = RANGE_ROWS
        groups[-1].append(ticker)
        room -= count
    return [frozenset(group) for group in groups]


def _of_markets(table: pa.Table, tickers: frozenset[str]) -> pa.Table:
    column = table["market_ticker"].combine_chunks()
    wanted = pa.array([ticker in tickers for ticker in column.dictionary.to_pylist()], pa.bool_())
    return table.filter(wanted.take(column.indices))


def _order(rows: pa.Table, keys: Sequence[str]) -> npt.NDArray[np.uint32]:
    """The sort permutation: the present index of each row of the sorted table; stable."""
    numbers = pl.DataFrame({name: _sort_keys(rows[name].chunk(0)) for name in keys})
    order: npt.NDArray[np.uint32] = (
        numbers.select(pl.arg_sort_by(keys, maintain_order=True)).to_series().to_numpy()
    )
    return order


def _sort_keys(array: pa.Array) -> npt.NDArray[np.int64]:
    """Integers that sort as the values do; nulls sort first."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        values = array.dictionary.to_pylist()
        rank = np.empty(len(values) + 1, np.int64)
        rank[np.array(sorted(range(len(values)), key=values.__getitem__), np.int64)] = np.arange(
            len(values)
        )
        codes = array.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)
        numbers = rank[codes]
    elif pa.types.is_decimal(kind):
        words = np.frombuffer(array.buffers()[1], np.int64)  # the low word: values are below 2**63
        numbers = words[2 * array.offset : 2 * (array.offset + len(array)) : 2].copy()
    else:
        array = array.cast(pa.int64())
        numbers = array.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    ordered: npt.NDArray[np.int64] = numbers
    if array.null_count:
        ordered[array.is_null().to_numpy(zero_copy_only=False)] = np.iinfo(np.int64).min
    return ordered


def own_dictionaries(rows: pa.Table) -> pa.Table:
    """Re-encode dictionaries with only the values that occur in these rows."""
    for at, field in enumerate(rows.schema):
        if pa.types.is_dictionary(field.type):
            own = pc.dictionary_encode(rows[field.name].cast(pa.string()))
            rows = rows.set_column(at, field, own.cast(field.type))
    return rows

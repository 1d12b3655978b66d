"""Compaction: the parts of a sealed hour become one file, sorted for reading.

1. The hour is *built* beside the archive and held against its parts and its manifest, by row count and
   content checksum. What no manifest vouches for is refused and left as it was.
2. The new file's name is *announced*: a file of that name and no rows joins the parts.
3. The folders are *exchanged* in one step. What was there lies aside for a while, then goes.

A kill at any instant leaves the parts or the one file. The announcement is for readers that list names
and leave out, without a word, those that are gone when they look closer (Arrow and DuckDB do): one that
listed the parts and looks after the exchange is left with the announced name, which has every row then.
One that opens the parts after the exchange finds no such file, and has to list again.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
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
    batches,
    hours,
    local_file,
    part_range,
    rows_of,
    stage_manifest,
    write_durably,
)
from kalshi_platform.archive.row_statistics import RowStatistics
from kalshi_platform.errors import StoreError, StoreRefused, StoreUnavailable
from kalshi_platform.schema import (
    DATASETS,
    RECORDED,
    Dataset,
)
from kalshi_platform.utc_hours import floor_hour

log = logging.getLogger(__name__)

SORTED_BY = {dataset.name: dataset.sort for dataset in RECORDED}
ROW_GROUP_ROWS = 65_536
"""What a reader of one market reads at least; docs/data.md has the figures."""
ZSTD_LEVEL = 9
LINGER_S = 0.5
"""From announcement to exchange: whoever listed the hour before the announcement has looked by then."""
RANGE_ROWS = 2_000_000
"""Sorted at a time, market by market: bounds memory, but for a market with more."""


@dataclass(frozen=True)
class Compacted:
    """What became of one dataset's hour. Sizes are in bytes."""

    dataset: str
    hour: datetime
    rows: int
    files_before: int
    bytes_before: int
    bytes_after: int
    checksum: str


def pending(archive: Archive) -> list[datetime]:
    """The sealed hours of which some dataset is not one compacted file yet, ascending."""
    if not archive.exchanges:
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
        return True  # a damaged manifest: told when the hour's turn comes


def compact(
    archive: Archive,
    wanted: Iterable[datetime],
    done: Callable[[Compacted], None],
    refused: Callable[[datetime, StoreError], None],
) -> None:
    """Compact the `wanted` hours one after the other; an hour that is refused stops no other.

    Raises `StoreUnavailable` where another compaction is at work.
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
        f"{error.filename} cannot be had ({error.strerror}), so {hour:%Y-%m-%d %H:00} UTC stays as it is."
        " Mend that; the next compaction takes it."
    )


def sweep(archive: Archive) -> None:
    """Remove replaced hours and unfinished work that nobody needs; each compaction does it, too.

    Raises `StoreUnavailable` where a compaction is at work.
    """
    with archive.compacting():
        _sweep(archive)


def _sweep(archive: Archive) -> None:
    try:
        with archive.changing(timeout_s=0):
            archive.sweep()
    except StoreUnavailable as error:
        log.info("What lies aside stays there for now: %s", error)


def compact_hour(archive: Archive, hour: datetime) -> Iterator[Compacted]:
    """Compact the datasets of a sealed hour; those that are compacted already are passed over.

    The caller holds `archive.compacting`. Raises `StoreRefused` where the hour is not sealed or its
    files are not what its manifest says, `StoreUnavailable` where it changed meanwhile.
    """
    if floor_hour(datetime.now(UTC)) <= hour:
        raise StoreRefused(
            f"The hour {hour:%Y-%m-%d %H:00} UTC is still open: its files are the streamer's."
        )
    if not any(archive.files(name, hour) for name in hours.RECORDED):
        raise StoreRefused(f"The archive in {archive} has nothing of {hour:%Y-%m-%d %H:00} UTC.")
    if not hours.is_sealed(archive, hour):
        raise StoreRefused(
            f"The hour {hour:%Y-%m-%d %H:00} UTC is not sealed: the streamer may still write to it. It"
            " is sealed when the streamer passes it, or when orderbook_events is materialised for it."
        )
    if not archive.exchanges:
        return  # it was sorted before it was sent
    withdraw(archive, hour)
    prepared = [
        _prepare(archive, DATASETS[name], hour)
        for name in hours.RECORDED
        if (files := archive.files(name, hour))
        and not hours.is_compacted([file.name for file in files])
    ]
    announced = [_announce(archive, it) for it in prepared]
    time.sleep(LINGER_S)
    for it, look in zip(prepared, announced, strict=True):
        with archive.changing():
            _insist_unchanged(archive, it, look)
            archive.replace_hour(it.dataset.name, hour, it.staged)
        yield Compacted(
            it.dataset.name,
            hour,
            it.content.rows,
            len(it.before),
            sum(file.bytes for file in it.before),
            it.part.bytes,
            it.content.checksum,
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
    listed.insist_on_ours(archive.where(dataset.name, hour))
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
    vouch(staged, manifest, part)
    return _Prepared(dataset, hour, before, staged, content, part)


def _announce(archive: Archive, it: _Prepared) -> list[File]:
    """Put a file of the new name and no rows beside the parts; returns what is there now."""
    schema = it.dataset.arrow
    with archive.changing():
        _insist_unchanged(archive, it, it.before)
        archive.write(it.dataset.name, it.hour, it.part.file, [schema.empty_table()], schema)
        return archive.files(it.dataset.name, it.hour)


def withdraw(archive: Archive, hour: datetime) -> None:
    """Take back what somebody who was killed had announced: it has no rows."""
    if not archive.exchanges:
        return
    with archive.changing():
        for name in hours.RECORDED:
            files = archive.files(name, hour)
            for file in files if len(files) > 1 else ():
                if file.name.startswith(hours.COMPACTED) and not rows_of(file):
                    archive.remove(file)


def _insist_unchanged(archive: Archive, it: _Prepared, look: list[File]) -> None:
    if archive.files(it.dataset.name, it.hour) != look:
        raise StoreUnavailable(
            f"{it.dataset.name} of {it.hour:%Y-%m-%d %H:00} UTC changed while it was compacted, and keeps"
            " what it has. The next compaction takes it."
        )


def vouch(staged: Path, manifest: Manifest, part: Part) -> None:
    """Put the manifest of a compacted hour beside its one file; `manifest` is that of its parts."""
    merged = {each.file for each in manifest.parts if part_range(each.file)}
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
    """Write the rows of all `sources` into one sorted file in `staged`, and prove that it has them.

    Its name follows from its bytes: a name never stands for two different files. Raises `StoreRefused`
    where a file cannot be read or the proof fails.
    """
    schema = dataset.arrow
    content = survey(sources, dataset)
    unnamed = staged / f"{hours.COMPACTED}0.parquet"
    tables = _sorted(sources, dataset, content.by_market)
    size = write_durably(
        unnamed, tables, schema, level=ZSTD_LEVEL, sorted_by=SORTED_BY[dataset.name]
    )
    written = survey([local_file(unnamed)], dataset)
    if written != content:
        raise StoreRefused(
            f"{unnamed} was written from {content.rows:,} rows of checksum {content.checksum} and reads"
            f" as {written.rows:,} of {written.checksum}. Nothing was changed. Is the disk failing?"
        )
    with unnamed.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    path = unnamed.rename(staged / f"{hours.COMPACTED}{digest}.parquet")
    return content, Part(path.name, content.rows, size)


def survey(sources: Sequence[File], dataset: Dataset) -> RowStatistics:
    """Statistics of all rows of some files."""
    statistics = RowStatistics(dataset)
    for file in sources:
        for table in batches(file, dataset.arrow):
            statistics.add(table)
    return statistics


def _sorted(
    sources: Sequence[File], dataset: Dataset, by_market: Counter[str]
) -> Iterator[pa.Table]:
    """All rows in order, a row group at a time."""
    keys = SORTED_BY[dataset.name]
    ranges = _ranges(by_market) if keys[0] == "market_ticker" else [frozenset(by_market)]
    for tickers in ranges:
        pieces = [
            table if len(ranges) == 1 else _of_markets(table, tickers)
            for file in sources
            for table in batches(file, dataset.arrow)
        ]
        rows = pa.concat_tables(pieces).unify_dictionaries().combine_chunks()
        order = _order(rows, keys)
        for start in range(0, len(order), ROW_GROUP_ROWS):
            yield own_dictionaries(rows.take(pa.array(order[start : start + ROW_GROUP_ROWS])))


def _ranges(by_market: Counter[str]) -> list[frozenset[str]]:
    """The markets by name, in groups of at most RANGE_ROWS rows or of one market."""
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
    """Where each row of the sorted table is now; equal rows stay in their order."""
    numbers = pl.DataFrame({name: _number(rows[name].chunk(0)) for name in keys})
    order: npt.NDArray[np.uint32] = (
        numbers.select(pl.arg_sort_by(keys, maintain_order=True)).to_series().to_numpy()
    )
    return order


def _number(array: pa.Array) -> npt.NDArray[np.int64]:
    """Integers in the order of the values; null is before them all."""
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
    """Dictionaries of the values that occur alone: a row group has no use for the others."""
    for at, field in enumerate(rows.schema):
        if pa.types.is_dictionary(field.type):
            own = pc.dictionary_encode(rows[field.name].cast(pa.string()))
            rows = rows.set_column(at, field, own.cast(field.type))
    return rows

"""Rows of a dataset, of some markets and hours, as a Polars frame."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import cache, lru_cache
from typing import TypeVar

import polars as pl
import pyarrow as pa

from kalshi_platform.archive import Archive, File, Listed, LocalArchive, Manifest
from kalshi_platform.schema import DATASETS

TICKER, KNOWN, VERIFIED = "market_ticker", "known_at", "verified"
AT_ONCE = 8
"""Hours that are read at once from object storage, where each costs round trips."""
SMALL_BYTES = 1 << 20
"""Objects up to this size are read whole."""
KEPT_MANIFESTS = 4_096
"""Manifests that are kept in memory: of four datasets, those of 42 days."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def for_each(
    archive: Archive, work: Callable[[Item], Result], items: Sequence[Item]
) -> list[Result]:
    """Do some work that reads the archive for each item: several at once where the archive is on object storage."""
    if isinstance(archive, LocalArchive) or len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(work, items))


@lru_cache(maxsize=KEPT_MANIFESTS)
def manifest(archive: Archive, dataset: str, hour: datetime, version: str) -> Manifest | None:
    """Read an hour's manifest, of which `version` is the listed file's: the same one is read once."""
    return archive.read_manifest(dataset, hour)


def frame(tables: Iterable[pa.Table], schema: pa.Schema) -> pl.DataFrame:
    """Convert Arrow tables of one schema to one frame; text with few values becomes plain text."""
    found = pl.DataFrame(pa.concat_tables([schema.empty_table(), *tables]))
    return found.with_columns(pl.col(pl.Categorical).cast(pl.String))


def read(
    archive: Archive, dataset: str, listed: Mapping[datetime, Listed], tickers: Sequence[str]
) -> pl.DataFrame:
    """Read the rows of some markets, hour after hour in the order of the files.

    On a local disk, and where all objects are small, Polars reads all hours at once. What it cannot read is read file by file, which handles files of older
    versions and names the file that is damaged.

    Raises: as `Archive.read`.
    """
    empty = _empty(dataset)
    files = [file for of_hour in listed.values() for file in of_hour.files]
    local = isinstance(archive, LocalArchive)
    if local or all(file.bytes <= SMALL_BYTES for file in files):
        try:
            contents = [file.path for file in files] if local else for_each(archive, _bytes, files)
            return _scanned(contents, empty, tickers)
        except (pl.exceptions.PolarsError, OSError):
            pass
    tables = for_each(
        archive, lambda hour: list(archive.read(dataset, hour, None, tickers)), list(listed)
    )
    return frame((table for of_hour in tables for table in of_hour), DATASETS[dataset].arrow)


@cache
def _empty(dataset: str) -> pl.DataFrame:
    return frame([], DATASETS[dataset].arrow)


def _bytes(file: File) -> bytes:
    """Read a small object whole: one request, where its footer and its columns apart are several."""
    with file.filesystem.open_input_stream(file.key) as stream:
        content: bytes = stream.read()
    return content


def _scanned(
    paths: list[str] | list[bytes], empty: pl.DataFrame, tickers: Sequence[str]
) -> pl.DataFrame:
    if not paths:
        return empty
    rows = pl.scan_parquet(
        paths,
        schema=empty.schema,
        hive_partitioning=False,
        missing_columns="insert",
        extra_columns="ignore",
        glob=False,
    )
    return rows.filter(pl.col(TICKER).is_in(tickers)).collect()

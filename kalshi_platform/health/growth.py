"""Sizes and growth rates of what the platform stores, and a forecast of when the disk is full.

Sizes are allocated bytes on disk. Rates are those of the last day, or of the recorded part of it; None if that
is too short. Data with a retention grows to `settles_at` bytes and no further. The journal's retention does not
bound it while a store lacks records, since records that a store still needs are never removed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from kalshi_platform.archive import Listed, open_archive, watermarks
from kalshi_platform.archive.hours import RECORDED
from kalshi_platform.clickhouse import queries
from kalshi_platform.clickhouse.client import Client, connect, translated
from kalshi_platform.clickhouse.hot_retention import FOR_EVER_DAYS, RETAINED
from kalshi_platform.errors import StoreError
from kalshi_platform.health import health_report
from kalshi_platform.health.metrics import folder_bytes
from kalshi_platform.journal import reader
from kalshi_platform.journal.reader import JournalError
from kalshi_platform.schema import DATASETS
from kalshi_platform.settings import Settings

DAY_S = 86_400.0
LEAST_S = 600.0
"""The shortest span in seconds from which a rate is computed."""
HORIZON_DAYS = 3650


@dataclass(frozen=True)
class Growth:
    """Size and growth of one kind of data."""

    name: str
    bytes: int
    per_day: float | None
    """Bytes a day at the present rate."""
    settles_at: float | None
    """Size in bytes at which its retention stops the growth; None: it grows for ever."""
    path: Path | None
    """Its folder; None if it is on another machine."""


def measure(settings: Settings) -> list[Growth]:
    """Measure every kind of data. A store that cannot be reached is left out."""
    found = [_journal(settings)]
    with suppress(StoreError):  # other checks report it
        found.append(_archive(settings))
    found.append(_dagster(settings))
    if settings.use_clickhouse:
        with (
            suppress(StoreError),
            closing(connect(settings, log_comment="growth")) as client,
        ):
            found.append(_clickhouse(settings, client))
    return found


def days_until_full(growths: Iterable[Growth], free: int) -> float | None:
    """Days until `free` bytes are used up at the current rates; None: not within ten years."""
    growing = [
        (growth.per_day, _grows_for(growth, growth.per_day)) for growth in growths if growth.per_day
    ]
    day, left = 0.0, float(free)
    for end in sorted({min(days, HORIZON_DAYS) for _, days in growing}):
        rate = sum(per_day for per_day, days in growing if days >= end)
        if rate * (end - day) > left:
            return day + left / rate
        day, left = end, left - rate * (end - day)
    return None


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(_existing(folder)).free


def on_disk_of(growth: Growth, folder: Path) -> bool:
    """Whether the data is on the same disk as a folder."""
    return growth.path is not None and _device(growth.path) == _device(folder)


def _device(folder: Path) -> int:
    return _existing(folder).stat().st_dev


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _grows_for(growth: Growth, per_day: float) -> float:
    """Days until its retention stops the growth."""
    if growth.settles_at is None:
        return float(HORIZON_DAYS)
    return max(growth.settles_at - growth.bytes, 0.0) / per_day


def _journal(settings: Settings) -> Growth:
    """The journals of all shards. The segments' modification times show how long each took to fill."""
    folder = settings.journal_dir(0).parent
    per_day: float | None = None
    settles_at: float | None = 0.0
    days = settings.journal_retention_hours / 24
    for k in watermarks.shards(folder):
        shard = settings.journal_dir(k)
        paths = [reader.segment_path(shard, first_n) for first_n in reader.segments(shard)]
        ended = [(stat.st_mtime, stat.st_size) for stat in _stats(paths)]
        rate = _rate([*_began(shard), *ended])
        if rate is None:
            continue
        per_day = (per_day or 0.0) + rate
        settles_at = (
            None if settles_at is None or _store_in_trouble(shard) else settles_at + rate * days
        )
    return Growth("journal", folder_bytes(folder), per_day, settles_at if per_day else None, folder)


def _began(shard: Path) -> list[tuple[float, int]]:
    """The time of the journal's first record, as an empty file that ends then, so that the first segment counts."""
    try:
        received_ns = reader.received_ns(shard, reader.oldest_offset(shard))
    except JournalError:
        return []  # the loader reports it
    return [(received_ns / 1e9, 0)] if received_ns else []


def _store_in_trouble(shard: Path) -> bool:
    """Whether a store is in trouble, so that the journal outgrows its retention; True if that is unknown."""
    try:
        report = health_report.read(shard)
        return report is not None and any(store["trouble"] for store in report["stores"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True


def _stats(paths: Iterable[Path]) -> list[os.stat_result]:
    """The stat results of the files that still exist."""
    found = []
    for path in paths:
        with suppress(FileNotFoundError):
            found.append(path.stat())
    return found


def _rate(ended: Sequence[tuple[float, int]]) -> float | None:
    """Bytes per day of files that were filled one after the other, from their end times and sizes."""
    if len(ended) < 2:
        return None
    ended = sorted(ended)
    ended = [end for end in ended[:-1] if end[0] > ended[-1][0] - DAY_S] + ended[-1:]
    if len(ended) < 2:
        return None
    spent_s = ended[-1][0] - ended[0][0]
    return sum(size for _, size in ended[1:]) / spent_s * DAY_S if spent_s >= LEAST_S else None


def _archive(settings: Settings) -> Growth:
    """The archive, at the rate of the last day's sealed hours: open hours are larger before compaction."""
    archive = open_archive(settings)
    this_hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    names = [name for name, dataset in DATASETS.items() if dataset.archived]
    span = (this_hour - timedelta(hours=25), this_hour - timedelta(hours=1))
    by_hour: dict[datetime, dict[str, Listed]] = {}
    for name in names:
        for hour, listed in archive.listing(name, *span).items():
            by_hour.setdefault(hour, {})[name] = listed
    per_hour = [
        sum(file.bytes for listed in by_name.values() for file in listed.files)
        for by_name in by_hour.values()
        if (recorded := [by_name[n] for n in RECORDED if n in by_name and by_name[n].files])
        and all(listed.manifest is not None for listed in recorded)
    ]
    per_day = sum(per_hour) / len(per_hour) * 24 if per_hour else None
    if settings.archive_base is None:
        root = settings.archive_dir
        return Growth("Parquet archive", folder_bytes(root), per_day, None, root)
    size = sum(
        file.bytes
        for name in names
        for listed in archive.listing(name).values()
        for file in listed.files
    )
    return Growth("Parquet archive", size, per_day, None, None)


def _clickhouse(settings: Settings, client: Client) -> Growth:
    """The tables with HOT_RETENTION_DAYS, at the rate of bytes per row times rows of the last day."""
    with translated(settings):
        rows = client.query(
            queries.text("growth/hot_tables"), parameters={"tables": list(RETAINED)}
        ).result_rows
        spans = client.query(queries.text("growth/last_day")).first_row
    total = sum(int(row[1]) for row in rows)
    events = next((int(row[2]) for row in rows if row[0] == "orderbook_events"), 0)
    per_day = None
    if events and spans and spans[1] >= LEAST_S:
        lately, seconds = int(spans[0]), min(float(spans[1]), DAY_S)
        per_day = total / events * lately / seconds * DAY_S
    bounded = settings.hot_retention_days < FOR_EVER_DAYS
    settles_at = per_day * settings.hot_retention_days if per_day and bounded else None
    path = settings.embedded_clickhouse_dir if settings.embedded_clickhouse else None
    size = folder_bytes(path) if path is not None else total
    return Growth("ClickHouse", size, per_day, settles_at, path)


def _dagster(settings: Settings) -> Growth:
    """Dagster's storage in files, at the rate of the remaining files of the last day.

    Most of it is runs, which are deleted after DAGSTER_RUN_RETENTION_DAYS.
    """
    folder = settings.data_dir / "dagster"
    now = time.time()
    runs = _stats(folder.glob("storage/history/runs/*-*.db"))
    oldest = min((stat.st_mtime for stat in runs), default=now)
    span_s = min(now - oldest, DAY_S)
    lately = [stat.st_blocks * 512 for stat in runs if stat.st_mtime > now - DAY_S]
    per_day = sum(lately) / span_s * DAY_S if span_s >= LEAST_S else None
    settles_at = None if per_day is None else per_day * settings.dagster_run_retention_days
    return Growth("Dagster", folder_bytes(folder), per_day, settles_at, folder)

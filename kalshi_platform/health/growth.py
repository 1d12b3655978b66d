"""How much the platform keeps, how fast that grows, and when the disk is full.

Sizes are what files take on the disk. Rates are of the last day, or of as much of it as was recorded;
None where there is too little to tell. What a retention bounds grows to `settles_at` and no further. The
journal's does not bound it while a store lacks what it has: nothing is removed that a store still needs.
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
"""A rate of less than ten minutes is none."""
HORIZON_DAYS = 3650


@dataclass(frozen=True)
class Growth:
    """One of the things that are kept."""

    what: str
    bytes: int
    per_day: float | None
    """Bytes a day at the present rate."""
    settles_at: float | None
    """Bytes at which its retention holds it, at that rate; None: it grows for ever."""
    path: Path | None
    """Where it is; None: on another machine."""


def measure(settings: Settings) -> list[Growth]:
    """Everything that is kept, as it is now. A store is left out where it cannot be asked."""
    found = [_journal(settings)]
    with suppress(StoreError):  # said by those who need it
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
    """Days until `free` bytes are used up at the present rates; None: not within ten years."""
    known = [(each.per_day, _grows_for(each, each.per_day)) for each in growths if each.per_day]
    day, left = 0.0, float(free)
    for end in sorted({min(days, HORIZON_DAYS) for _, days in known}):
        rate = sum(per_day for per_day, days in known if days >= end)
        if rate * (end - day) > left:
            return day + left / rate
        day, left = end, left - rate * (end - day)
    return None


def free_bytes(folder: Path) -> int:
    """Free bytes where a folder is, or would be."""
    return shutil.disk_usage(_existing(folder)).free


def on_disk_of(it: Growth, folder: Path) -> bool:
    """Whether a thing takes its room from the disk that a folder is on."""
    return it.path is not None and _device(it.path) == _device(folder)


def _device(folder: Path) -> int:
    return _existing(folder).stat().st_dev


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())


def _grows_for(it: Growth, per_day: float) -> float:
    """Days until it has settled."""
    if it.settles_at is None:
        return float(HORIZON_DAYS)
    return max(it.settles_at - it.bytes, 0.0) / per_day


def _journal(settings: Settings) -> Growth:
    """All shards. The segments' times of change say how long they took to fill."""
    folder = settings.journal_dir(0).parent
    per_day: float | None = None
    settles_at: float | None = 0.0
    days = settings.journal_retention_hours / 24
    for k in watermarks.shards(folder):
        shard = settings.journal_dir(k)
        paths = [reader.segment_path(shard, first_n) for first_n in reader.segments(shard)]
        ended = [(it.st_mtime, it.st_size) for it in _stats(paths)]
        rate = _rate([*_began(shard), *ended])
        if rate is None:
            continue
        per_day = (per_day or 0.0) + rate
        settles_at = None if settles_at is None or _holds(shard) else settles_at + rate * days
    return Growth("journal", folder_bytes(folder), per_day, settles_at if per_day else None, folder)


def _began(shard: Path) -> list[tuple[float, int]]:
    """When the journal's first record came, as the end of a file of no size: its first segment counts, too."""
    try:
        received_ns = reader.received_ns(shard, reader.beginning(shard))
    except JournalError:
        return []  # said by its load
    return [(received_ns / 1e9, 0)] if received_ns else []


def _holds(shard: Path) -> bool:
    """Whether a store is in trouble, so that the journal keeps more than its retention; also where the
    streamer's report does not say.
    """
    try:
        report = health_report.read(shard)
        return report is not None and any(it["trouble"] for it in report["stores"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True


def _stats(paths: Iterable[Path]) -> list[os.stat_result]:
    """Of the files that are there; some go meanwhile."""
    found = []
    for path in paths:
        with suppress(FileNotFoundError):
            found.append(path.stat())
    return found


def _rate(ended: Sequence[tuple[float, int]]) -> float | None:
    """Bytes a day of files that were filled one after the other, from their ends and sizes."""
    if len(ended) < 2:
        return None
    ended = sorted(ended)
    ended = [it for it in ended[:-1] if it[0] > ended[-1][0] - DAY_S] + ended[-1:]
    if len(ended) < 2:
        return None
    spent_s = ended[-1][0] - ended[0][0]
    return sum(size for _, size in ended[1:]) / spent_s * DAY_S if spent_s >= LEAST_S else None


def _archive(settings: Settings) -> Growth:
    """The sealed hours of the last day: what is open is not compacted, and would count too much."""
    archive = open_archive(settings)
    this_hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    names = [name for name, dataset in DATASETS.items() if dataset.archived]
    span = (this_hour - timedelta(hours=25), this_hour - timedelta(hours=1))
    of_hours: dict[datetime, dict[str, Listed]] = {}
    for name in names:
        for hour, listed in archive.listing(name, *span).items():
            of_hours.setdefault(hour, {})[name] = listed
    per_hour = [
        sum(file.bytes for listed in by_name.values() for file in listed.files)
        for by_name in of_hours.values()
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
    """The tables that keep HOT_RETENTION_DAYS: bytes of a row, times the rows of the last day."""
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
    """Dagster's own storage, where it is in files: what was written in the last day and is there yet.

    Most of it are runs, which go after DAGSTER_RUN_RETENTION_DAYS.
    """
    folder = settings.data_dir / "dagster"
    now = time.time()
    runs = _stats(folder.glob("storage/history/runs/*-*.db"))
    oldest = min((it.st_mtime for it in runs), default=now)
    span_s = min(now - oldest, DAY_S)
    lately = [it.st_blocks * 512 for it in runs if it.st_mtime > now - DAY_S]
    per_day = sum(lately) / span_s * DAY_S if span_s >= LEAST_S else None
    settles_at = None if per_day is None else per_day * settings.dagster_run_retention_days
    return Growth("Dagster", folder_bytes(folder), per_day, settles_at, folder)

"""From the archive to an empty ClickHouse: what is cold becomes hot again, exactly once.

Every archived file goes in under a token made of its name and content, so that a restore that was
interrupted can be run again. The book now (`latest_levels`) is derived from the newest hour.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from kalshi_platform.errors import PlatformError
from kalshi_platform.loading.rebuild import select_hour
from kalshi_platform.settings import Settings
from kalshi_platform.storage import arrival, checksum, clickhouse, queries
from kalshi_platform.storage.archive import Archive, batches
from kalshi_platform.storage.checksum import Content
from kalshi_platform.storage.errors import StoreRefused
from kalshi_platform.storage.schema import (
    BOOK_CHECKPOINTS,
    DATASETS,
    ORDERBOOK_EVENTS,
    STREAM_EVENTS,
    TRADES,
)

RESTORED = (ORDERBOOK_EVENTS.name, STREAM_EVENTS.name, BOOK_CHECKPOINTS.name, TRADES.name)
BATCH_ROWS = 500_000


@dataclass(frozen=True)
class Restored:
    """One dataset's hour, after it went in."""

    dataset: str
    hour: datetime
    rows: int
    checksum: str


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
) -> list[Restored]:
    """Bring the hours of an archive into ClickHouse, then hold counts and checksums against it.

    Raises `StoreRefused` where the archive has nothing of the span, where ClickHouse has other rows
    of an hour already, or where what went in is not what the archive holds.
    """
    client = clickhouse.connect(settings, log_comment="restore")
    done = []
    for name in RESTORED:
        for hour in archive.hours(name):
            if span is not None and not span[0] <= hour <= span[1]:
                continue
            restored = _hour(client, archive, name, hour)
            progress(restored)
            done.append(restored)
    if not done:
        raise StoreRefused(
            f"The archive in {archive} has no hour of that span. `--from` is the folder that holds orderbook_events/."
        )
    with clickhouse.translated():
        client.command(queries.text("latest_levels_from_events"))
    return done


def _hour(client: clickhouse.Client, archive: Archive, name: str, hour: datetime) -> Restored:
    dataset = DATASETS[name]
    archived = Content()
    for file in archive.files(name, hour):
        for number, table in enumerate(batches(file, dataset.arrow, BATCH_ROWS)):
            content = checksum.content(table)
            summed = checksum.text(content.total)
            token = f"restore:{name}:{hour:%Y-%m-%dT%H}:{file.name}:{number}:{summed}"
            arrival.insist(client, name, table, token, arrival.KEYS[name])
            archived += content
    found = checksum.content(select_hour(client, dataset, hour))
    if not found.agrees_with(archived):
        raise StoreRefused(
            f"{name} of {hour:%Y-%m-%d %H:00} UTC: the archive holds {archived.rows:,} rows, ClickHouse"
            f" now {found.rows:,}, and their checksums differ. Restore into an empty database"
            " (CLICKHOUSE_DATABASE), with HOT_RETENTION_DAYS long enough for that hour."
        )
    return Restored(name, hour, archived.rows, checksum.text(archived.total))

"""Names in the archive, and the hours that they stand for.

<root>/<dataset>/date=YYYY-MM-DD/hour=HH/part-<shard>-<first n>-<end n>.parquet
<root>/<dataset>/date=YYYY-MM-DD/hour=HH/hour-<digest of the file>.parquet    once compacted
<root>/<dataset>/date=YYYY-MM-DD/hour=HH/_manifest.json

Hours are those of the receive time, UTC.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

HOUR = timedelta(hours=1)
MANIFEST = "_manifest.json"
_HOUR_PATH = re.compile(r"date=(\d{4}-\d\d-\d\d)/hour=(\d\d)$")


def floor_hour(at: datetime) -> datetime:
    """The hour that `at` is in."""
    return at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def hour_of_ns(ns: int) -> datetime:
    """The hour of a time in ns since the epoch."""
    return datetime.fromtimestamp(ns // 3_600_000_000_000 * 3600, UTC)


def hour_start_ns(hour: datetime) -> int:
    """An hour's first instant in ns since the epoch."""
    return int(hour.timestamp()) * 1_000_000_000


def hour_path(dataset: str, hour: datetime) -> str:
    """Where a dataset's hour is, below the archive's root."""
    return f"{dataset}/date={hour:%Y-%m-%d}/hour={hour:%H}"


def hour_of_path(path: str) -> datetime | None:
    """The hour whose folder `path` is; None for another folder."""
    match = _HOUR_PATH.search(path)
    return datetime.fromisoformat(f"{match[1]}T{match[2]}:00:00+00:00") if match else None


def part_name(shard: int, first_n: int, end_n: int) -> str:
    """Name of the file that holds the rows of journal records first_n to end_n - 1."""
    return f"part-{shard}-{first_n:015d}-{end_n:015d}.parquet"


def part_range(name: str) -> tuple[int, int, int] | None:
    """(shard, first_n, end_n) of a part's name; None for a file of another origin."""
    pieces = name.removesuffix(".parquet").split("-")
    if len(pieces) != 4 or pieces[0] != "part" or not all(p.isdigit() for p in pieces[1:]):
        return None
    return int(pieces[1]), int(pieces[2]), int(pieces[3])

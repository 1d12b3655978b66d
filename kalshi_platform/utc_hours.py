"""UTC hours, the partitions of archive and checkpoints, and times in nanoseconds since the epoch."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

HOUR = timedelta(hours=1)
HOUR_NS = 3_600_000_000_000


def floor_hour(at: datetime) -> datetime:
    """The start of the UTC hour that contains `at`."""
    return at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def hour_of_ns(ns: int) -> datetime:
    """The start of the UTC hour that contains a time in ns since the epoch."""
    return datetime.fromtimestamp(ns // HOUR_NS * 3600, UTC)


def time_of_ns(ns: int) -> datetime:
    """Convert ns since the epoch to a datetime, rounded down to the microsecond."""
    return datetime.fromtimestamp(ns // 1_000_000_000, UTC) + timedelta(
        microseconds=ns % 1_000_000_000 // 1000
    )


def hour_start_ns(hour: datetime) -> int:
    """The start of an hour in ns since the epoch."""
    return int(hour.timestamp()) * 1_000_000_000

"""Hours of UTC, by which the archive and the checkpoints are cut, and times in nanoseconds since the epoch."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

HOUR = timedelta(hours=1)
HOUR_NS = 3_600_000_000_000


def floor_hour(at: datetime) -> datetime:
    """The hour that `at` is in."""
    return at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def hour_of_ns(ns: int) -> datetime:
    """The hour of a time in ns since the epoch."""
    return datetime.fromtimestamp(ns // HOUR_NS * 3600, UTC)


def time_of_ns(ns: int) -> datetime:
    """A time in ns since the epoch, rounded down to the microsecond."""
    return datetime.fromtimestamp(ns // 1_000_000_000, UTC) + timedelta(
        microseconds=ns % 1_000_000_000 // 1000
    )


def hour_start_ns(hour: datetime) -> int:
    """An hour's first instant in ns since the epoch."""
    return int(hour.timestamp()) * 1_000_000_000

"""When the exchange's clocks may begin again: its maintenance windows. No I/O.

The `clock` of a market (protocol reference, section 11.1) never falls, except across exchange maintenance. So two
clocks are compared only if no window lies between them. The time outside of windows is divided into *eras*,
each named by the end of the window before it; two clocks are comparable if they are of one era. What counts
is the receive time. The windows of the documentation hold until a schedule was read; capture records the
schedule as a note of kind `schedule`, so that an hour that is built again is judged by the same windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from typing import Any
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
import numpy.typing as npt

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
EASTERN = ZoneInfo("America/New_York")
"""The time zone of the weekly schedule."""
SCHEDULE = "schedule"
"""The kind of the journal note with the maintenance windows."""
NOT_COMPARABLE = -1
"""The era of an instant within maintenance, and of a clock that is not known."""
_BEFORE = timedelta(days=8)
"""Covers the latest weekly window before an instant."""
_AFTER = timedelta(days=2)
_SECOND_NS = 1_000_000_000


class WeeklyWindow(msgspec.Struct, frozen=True):
    """Hours of one weekday in which the exchange is closed, in Eastern time as HH:MM; `until` 00:00 is the day's end."""

    day: str
    since: str
    until: str


class Window(msgspec.Struct, frozen=True):
    """A single maintenance window."""

    since: datetime
    until: datetime


class Maintenance(msgspec.Struct, frozen=True):
    """All maintenance windows that are known."""

    weekly: tuple[WeeklyWindow, ...] = (WeeklyWindow("thursday", "03:00", "05:00"),)
    windows: tuple[Window, ...] = ()

    def era(self, ns: int) -> int:
        """The era of an instant (ns since the epoch), as the end of the window before it in Unix seconds.

        0 where no window is known before it, `NOT_COMPARABLE` within one.
        """
        era, _ = self._era_and_end(ns)
        return era

    def eras(self, ns: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The era of each instant."""
        if not len(ns):
            return np.empty(0, np.int64)
        first, last = int(ns.min()), int(ns.max())
        era, end_ns = self._era_and_end(first)
        if last < end_ns:  # nearly every range of the journal is within one era
            return np.full(len(ns), era, np.int64)
        return np.array([self.era(instant) for instant in ns.tolist()], np.int64)

    def _era_and_end(self, ns: int) -> tuple[int, int]:
        """An instant's era, and the ns at which another begins or may begin."""
        day = ns // (86_400 * _SECOND_NS)
        era, end_ns = 0, (day + 1) * 86_400 * _SECOND_NS
        for since_ns, until_ns in _windows_around(self, day):
            if since_ns <= ns < until_ns:
                return NOT_COMPARABLE, min(end_ns, until_ns)
            if until_ns <= ns:
                era = until_ns // _SECOND_NS
            else:
                end_ns = min(end_ns, since_ns)
        return era, end_ns


def from_schedule(
    standard_hours: Sequence[Mapping[str, Any]], maintenance_windows: Sequence[Mapping[str, Any]]
) -> Maintenance:
    """Read the maintenance windows of `/exchange/schedule`.

    The hours of a weekday in which no session is open count as weekly maintenance.

    Raises: KeyError, TypeError, ValueError where a value cannot be read.
    """
    weekly = {
        window
        for week in standard_hours
        for day in DAYS
        if day in week
        for window in _closed(day, week[day])
    }
    windows = {
        Window(_instant(window["start_datetime"]), _instant(window["end_datetime"]))
        for window in maintenance_windows
    }
    return Maintenance(
        tuple(sorted(weekly, key=lambda w: (DAYS.index(w.day), w.since))),
        tuple(sorted(windows, key=lambda w: (w.since, w.until))),
    )


def _closed(day: str, sessions: Iterable[Mapping[str, Any]]) -> Iterator[WeeklyWindow]:
    """The windows of a day between its sessions; a session that closes at 00:00 ends with the day."""
    at = "00:00"
    for opens, closes in sorted(
        (_clock_time(s["open_time"]), _clock_time(s["close_time"])) for s in sessions
    ):
        if opens > at:
            yield WeeklyWindow(day, at, opens)
        if closes == "00:00":
            return
        at = max(at, closes)
    yield WeeklyWindow(day, at, "00:00")


def _clock_time(text: str) -> str:
    return time.fromisoformat(text).strftime("%H:%M")


def _instant(text: str) -> datetime:
    instant = datetime.fromisoformat(text)
    if instant.tzinfo is None:
        raise ValueError(f"{text!r} names no time zone")
    return instant.astimezone(UTC)


@lru_cache(maxsize=64)
def _windows_around(maintenance: Maintenance, day: int) -> tuple[tuple[int, int], ...]:
    """The windows (ns since the epoch) near a UTC day, ascending and merged."""
    middle = datetime.fromtimestamp(day * 86_400, UTC)
    first, last = middle - _BEFORE, middle + _AFTER
    windows = [(w.since, w.until) for w in maintenance.windows if w.since < last]
    for offset in range((last - first).days + 1):
        local = (first + timedelta(days=offset)).date()
        windows += [
            _weekly(window, local)
            for window in maintenance.weekly
            if DAYS[local.weekday()] == window.day
        ]
    merged: list[tuple[int, int]] = []
    for since, until in sorted((_ns(since), _ns(until)) for since, until in windows):
        if merged and since <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], until))
        else:
            merged.append((since, until))
    return tuple(merged)


def _weekly(window: WeeklyWindow, day: date) -> tuple[datetime, datetime]:
    since, until = time.fromisoformat(window.since), time.fromisoformat(window.until)
    ends = day + timedelta(days=1) if until == time() else day
    return (
        datetime.combine(day, since, EASTERN),
        datetime.combine(ends, until, EASTERN),
    )


def _ns(instant: datetime) -> int:
    return round(instant.timestamp()) * _SECOND_NS

"""A record of when the platform stopped its own processes, to recognise a planned SIGTERM.

`up` and the platform's code server note the time when they stop; a run that was stopped finds such a time shortly
before its own end. An unreadable file counts as no stop. Whether a run's code server notes its stops at all is
decided in `run_failures.py`.

`begin` creates the file in its full, final size, and notes are written in place, so that a full disk does not
prevent them. (A copy-on-write file system, such as btrfs or APFS, needs free space even so.)
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import msgspec

from kalshi_platform import durable, typed_json

KEPT = 64
"""Stops that are kept. A run's end is classified for a day, and a day has fewer stops."""
SIZE = 2048
"""Bytes of the file; a time takes at most 20."""
TOGETHER_S = 3.0
"""Seconds within which the notes of `up` and of the code server are one stop. If a whole container receives the signal,
a run may end this long before the note. A run created this soon after a note was still created by the old process.
A signal does not say who sent it: one by hand this soon before a stop counts as the stop, which ends the run anyway."""
ASKED_S = 60.0
"""Seconds after the note within which a stopped run ends: the code server stops its runs 10 s after its own signal,
and containers are killed after 60 s (`stop_grace_period`, `terminationGracePeriodSeconds`)."""

SOCKET = "code.sock"
"""The socket name of `up`'s code server; `dagster dev` gives its own a random name."""

asked_here = threading.Event()
"""Set in a code server that has received a stop signal."""


def begin(data_dir: Path) -> None:
    """Create the file, or restore its size, so that stops can be noted. Raises `OSError`."""
    path = _path(data_dir)
    if not path.exists() or path.stat().st_size != SIZE:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.replace(path, _encoded(_times(data_dir)))


def note(data_dir: Path) -> None:
    """Note that the platform's processes are being stopped now. Raises `OSError`."""
    begin(data_dir)
    now, times = round(time.time(), 3), _times(data_dir)
    if times and 0.0 <= now - times[-1] <= TOGETHER_S:
        return  # the same stop
    with _path(data_dir).open("r+b") as file:
        file.write(_encoded([*times, now]))


def planned(data_dir: Path, created: float, ended: float) -> bool:
    """Whether the platform stopped a run with these times of creation and end (seconds since the epoch)."""
    first = max(created - TOGETHER_S, ended - ASKED_S)
    return any(first <= at <= ended + TOGETHER_S for at in _times(data_dir))


def _times(data_dir: Path) -> list[float]:
    """The noted stops, oldest first; empty if they cannot be read."""
    try:
        return typed_json.decode(_path(data_dir).read_bytes(), list[float])
    except (OSError, msgspec.DecodeError):
        return []


def _encoded(times: list[float]) -> bytes:
    return msgspec.json.encode(times[-KEPT:]).ljust(SIZE)


def _path(data_dir: Path) -> Path:
    return data_dir / "checks" / "planned_stops.json"

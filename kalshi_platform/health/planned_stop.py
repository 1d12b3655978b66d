"""When the platform asked its own processes to end: what tells a planned SIGTERM from one that it did not send.

`up` and the platform's code server note the time when they ask, and a run that was asked finds it shortly before its
own end. Where nothing can be read, no stop is known of. Whether a run's code server notes its stops at all is not said
here (`run_failures.py` knows).

`begin` makes the file in its whole size, which it keeps, and a note is written in place: a full disk takes it. (A file
system that copies on write, such as btrfs or APFS, needs room all the same.)
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import msgspec

from kalshi_platform import durable, typed_json

KEPT = 64
"""Stops that are remembered. A run's end is judged again for a day, and a day has fewer."""
SIZE = 2048
"""Bytes of the file: each time takes at most 20."""
TOGETHER_S = 3.0
"""What belongs to one stop comes within so long: the notes of `up` and of the code server, and, where a whole container
gets the signal at once, the end of a run before the note. A run that is made so soon after a note is still made by what
ends."""
ASKED_S = 60.0
"""A run that was asked ends within so long of the note: the code server asks 10 s after it was asked itself, and
containers are killed after 60 s (`stop_grace_period`, `terminationGracePeriodSeconds`)."""

SOCKET = "code.sock"
"""The name of the socket of `up`'s code server; `dagster dev` gives its own a name by chance."""

asked_here = threading.Event()
"""Set where this very process, a code server, was asked to end."""


def begin(data_dir: Path) -> None:
    """Make the file, or make it whole, so that stops can be noted. Raises `OSError`."""
    path = _path(data_dir)
    if not path.exists() or path.stat().st_size != SIZE:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.replace(path, _encoded(_times(data_dir)))


def note(data_dir: Path) -> None:
    """The processes of the platform are asked to end now. Raises `OSError`."""
    begin(data_dir)
    now, times = round(time.time(), 3), _times(data_dir)
    if times and 0.0 <= now - times[-1] <= TOGETHER_S:
        return  # the same stop
    with _path(data_dir).open("r+b") as file:
        file.write(_encoded([*times, now]))


def planned(data_dir: Path, created: float, ended: float) -> bool:
    """Whether a run that was created and ended then (seconds since the epoch) was asked to by the platform."""
    first = max(created - TOGETHER_S, ended - ASKED_S)
    return any(first <= at <= ended + TOGETHER_S for at in _times(data_dir))


def _times(data_dir: Path) -> list[float]:
    """The stops that were noted, in this order; none where that cannot be read."""
    try:
        return typed_json.decode(_path(data_dir).read_bytes(), list[float])
    except (OSError, msgspec.DecodeError):
        return []


def _encoded(times: list[float]) -> bytes:
    return msgspec.json.encode(times[-KEPT:]).ljust(SIZE)


def _path(data_dir: Path) -> Path:
    return data_dir / "checks" / "planned_stops.json"

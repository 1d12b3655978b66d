"""When the platform asked its own processes to end: what tells a planned SIGTERM from one that it did not send.

`up` and the code server note the time when they ask. A run that was asked looks for a note since it began. Where
neither has run on the data folder (`dagster dev` starts Dagster's own code server), nothing is known of any stop,
and each counts as planned. The note has a fixed size and is written in place: it needs no room on a full disk.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

KEPT = 8
"""So many stops are remembered, each of them by its second."""
SIZE = 512
LATE_S = 15.0
"""A process that is asked may end so long after the asking: flushing takes a while."""

asked_here = threading.Event()
"""Set where this very process, a code server, was asked to end."""


def begin(data_dir: Path) -> None:
    """From now on stops are noted here. Raises `OSError`."""
    path = _path(data_dir)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"[]".ljust(SIZE))


def note(data_dir: Path) -> None:
    """The processes of the platform are asked to end now. Raises `OSError`."""
    begin(data_dir)
    times = [*(_times(data_dir) or ()), time.time()][-KEPT:]
    with _path(data_dir).open("r+b") as file:
        file.write(json.dumps(times).encode().ljust(SIZE))


def planned(data_dir: Path, began: float, ended: float) -> bool:
    """Whether a process that began and ended then (seconds since the epoch) was asked to by the platform."""
    times = _times(data_dir)
    return times is None or any(began <= at <= ended + LATE_S for at in times)


def _times(data_dir: Path) -> list[float] | None:
    """The stops that were noted, none where that cannot be read; None where none ever is."""
    try:
        return [float(at) for at in json.loads(_path(data_dir).read_bytes())]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        return []


def _path(data_dir: Path) -> Path:
    return data_dir / "checks" / "planned_stops.json"

"""The last result of the sensor `streamer_supervisor`, as a file for `up` and `doctor`.

Those two cannot read Dagster's storage. The decisions themselves are made in `orchestration/supervisor.py`.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from kalshi_platform import durable, typed_json

TICKING_S = 60.0
"""A running supervisor writes its result about every 5 s."""


class Supervised(msgspec.Struct, frozen=True):
    """The supervisor's decision about one shard."""

    reason: str
    """The decision and its reason."""
    failures: int = 0
    """Consecutive failed runs."""
    why: str = ""
    """Why the last of them failed."""


class Supervision(msgspec.Struct, frozen=True):
    """The decisions about all shards, by number."""

    at: float
    """Seconds since the epoch."""
    shards: dict[int, Supervised]

    @property
    def ticking(self) -> bool:
        """Whether the supervisor is running, so that it will start streamers."""
        return time.time() - self.at < TICKING_S


def note(data_dir: Path, found: Supervision) -> None:
    """Write the result. Raises `OSError`."""
    durable.replace_unsynced(_path(data_dir), msgspec.json.encode(found))


def read(data_dir: Path) -> Supervision | None:
    """The last result; None if no supervisor has run, or the file cannot be read."""
    try:
        return typed_json.decode(_path(data_dir).read_bytes(), Supervision)
    except (OSError, msgspec.DecodeError):
        return None


def _path(data_dir: Path) -> Path:
    return data_dir / "checks" / "supervisor.json"

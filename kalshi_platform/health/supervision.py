"""What `streamer_supervisor` found at its last tick, for `up` and `doctor`, which cannot see into Dagster."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from kalshi_platform import typed_json

TICKING_S = 60.0
"""A supervisor that lives notes what it found every 5 s or so."""


class Supervised(msgspec.Struct, frozen=True):
    """One shard."""

    reason: str
    """What was decided, and why."""
    failures: int = 0
    """Runs that have failed in a row."""
    why: str = ""
    """Why the last of them failed."""


class Supervision(msgspec.Struct, frozen=True):
    """All shards, by number."""

    at: float
    """Seconds since the epoch."""
    shards: dict[int, Supervised]

    @property
    def ticking(self) -> bool:
        """Whether the supervisor is at work, so that a streamer is to be expected."""
        return time.time() - self.at < TICKING_S


def note(data_dir: Path, found: Supervision) -> None:
    """Leave what was found. Raises `OSError`."""
    path = _path(data_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.encode(found))
    temporary.replace(path)


def read(data_dir: Path) -> Supervision | None:
    """What was found last; None where no supervisor has looked, or what it left cannot be read."""
    try:
        return typed_json.decode(_path(data_dir).read_bytes(), Supervision)
    except (OSError, msgspec.DecodeError):
        return None


def _path(data_dir: Path) -> Path:
    return data_dir / "checks" / "supervisor.json"

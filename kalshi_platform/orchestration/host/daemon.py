"""The state of Dagster's daemon, for `doctor`, which runs outside of Dagster."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg

from kalshi_platform.orchestration.observation import SHARD_TAG


@dataclass(frozen=True)
class Daemon:
    """The daemon's state, as its heartbeats show it."""

    silent: tuple[str, ...]
    """The parts (SENSOR, SCHEDULER, …) whose heartbeat is too old or reports errors."""
    last_beat: datetime | None
    """The newest heartbeat of any part; None: it has never run here."""
    streamers: int
    """Streamer runs that are started according to Dagster."""


def home(data_dir: Path) -> Path | None:
    """DAGSTER_HOME, else the folder that `up` created in the data folder; None if neither exists."""
    named = os.environ.get("DAGSTER_HOME")
    folder = Path(named) if named else data_dir / "dagster"
    return folder if (folder / "dagster.yaml").is_file() else None


def look(folder: Path) -> Daemon:
    """Read the daemon's state from the Dagster instance of a DAGSTER_HOME."""
    with dg.DagsterInstance.from_config(str(folder)) as instance:
        statuses = instance.get_daemon_statuses()
        beats = [
            status.last_heartbeat.timestamp
            for status in statuses.values()
            if status.last_heartbeat is not None
        ]
        started = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])
        runs = instance.get_runs(filters=started, limit=100)
        return Daemon(
            silent=tuple(sorted(name for name, status in statuses.items() if not status.healthy)),
            last_beat=datetime.fromtimestamp(max(beats), UTC) if beats else None,
            streamers=sum(SHARD_TAG in run.tags for run in runs),
        )

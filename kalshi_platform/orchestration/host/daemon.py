"""Whether Dagster's daemon lives, for whoever stands outside of Dagster (`doctor`)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg

from kalshi_platform.orchestration.observation import SHARD_TAG


@dataclass(frozen=True)
class Daemon:
    """The daemon, as its heartbeats tell."""

    silent: tuple[str, ...]
    """Its parts (SENSOR, SCHEDULER, …) whose heartbeat is too old or reports errors."""
    last_beat: datetime | None
    """The newest heartbeat of any part; None: it has never run here."""
    streamers: int
    """Streamer runs that Dagster believes to be running."""


def home(data_dir: Path) -> Path | None:
    """DAGSTER_HOME, else what `up` made in the data folder; None where there is neither."""
    named = os.environ.get("DAGSTER_HOME")
    folder = Path(named) if named else data_dir / "dagster"
    return folder if (folder / "dagster.yaml").is_file() else None


def look(folder: Path) -> Daemon:
    """Ask the instance of a DAGSTER_HOME."""
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
            silent=tuple(sorted(name for name, it in statuses.items() if not it.healthy)),
            last_beat=datetime.fromtimestamp(max(beats), UTC) if beats else None,
            streamers=sum(SHARD_TAG in run.tags for run in runs),
        )

"""The observed state of a shard: its runs in Dagster, their processes, its health report.

Read-only. Decisions are made in `supervisor.py` and carried out in `sensors.py`.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
from dagster import DagsterRunStatus as Status

from kalshi_platform.health import health_report
from kalshi_platform.orchestration import run_failures
from kalshi_platform.orchestration.supervisor import (
    DRAINING,
    HEALTH_S,
    Ended,
    Health,
    Observation,
    Phase,
    Process,
    Run,
)
from kalshi_platform.processes import Identity
from kalshi_platform.settings import Settings

log = logging.getLogger(__name__)

JOB = "stream_orderbook"
STOPPED = "stopped"
SHARD_TAG = "kalshi/shard"
"""Tag of every streamer run: the shard that it records."""
PROCESS_TAG = "kalshi/process"
"""Tag of a started run: its worker process, as pid@start time."""
SOURCE_TAG = "kalshi/source"
"""Tag of every streamer run: exchange or simulator."""
OTHER_RUNS = 2
"""Slots of Dagster's run queue that are reserved for other jobs."""

_PHASES = {
    Status.NOT_STARTED: Phase.WAITING,
    Status.QUEUED: Phase.WAITING,
    Status.MANAGED: Phase.WAITING,
    Status.STARTING: Phase.STARTING,
    Status.STARTED: Phase.STARTED,
    Status.CANCELING: Phase.CANCELING,
}
_ENDED = [Status.SUCCESS, Status.FAILURE, Status.CANCELED]


def observe(
    instance: dg.DagsterInstance, shard: int, settings: Settings, blocker: str | None = None
) -> Observation:
    """Observe one shard.

    Processes are inspected before the ended runs are read, so that a run that ends in between is seen as ended,
    not as dead.
    """
    tags = {SHARD_TAG: str(shard)}
    health = read_health(settings.journal_dir(shard))
    active = instance.get_run_records(
        dg.RunsFilter(tags=tags, statuses=list(_PHASES)), ascending=True, limit=50
    )
    ended = instance.get_run_records(dg.RunsFilter(tags=tags, statuses=_ENDED), limit=1)
    return Observation(
        runs=tuple(_run(record) for record in active),
        ended=_ended(instance, ended[0], settings.data_dir) if ended else None,
        health=health,
        jitter=random.random(),  # noqa: S311
        server_since=psutil.Process().create_time(),  # sensors are evaluated in the code server
        shards=settings.stream_shards,
        blocker=blocker,
    )


def slots(instance: dg.DagsterInstance) -> int | None:
    """Dagster's limit of concurrent runs (max_concurrent_runs); None: no limit."""
    queue = instance.get_concurrency_config().run_queue_config
    return None if queue is None or queue.max_concurrent_runs < 0 else queue.max_concurrent_runs


def shards(instance: dg.DagsterInstance, settings: Settings) -> int:
    """The number of shards: STREAM_SHARDS, limited by the slots of Dagster's run queue."""
    room = slots(instance)
    if room is None:
        return settings.stream_shards
    return min(settings.stream_shards, max(room - OTHER_RUNS, 1))


def active_shards(instance: dg.DagsterInstance) -> set[int]:
    """The shards that have an unfinished run."""
    records = instance.get_run_records(dg.RunsFilter(job_name=JOB, statuses=list(_PHASES)))
    return {int(record.dagster_run.tags.get(SHARD_TAG, "0")) for record in records}


def processes(instance: dg.DagsterInstance) -> list[Identity]:
    """The processes of all started streamer runs."""
    records = instance.get_run_records(dg.RunsFilter(job_name=JOB, statuses=[Status.STARTED]))
    found = [_process(record.dagster_run) for record in records]
    return [process.identity for process in found if process is not None]


def others_in_the_way(
    folders: Mapping[int, Path], shard: int, shards: int, now: float
) -> str | None:
    """A sentence about a streamer that records with another number of shards; None if there is none.

    `folders`: the journal folders of all shards, by number.
    """
    for other, folder in folders.items():
        health = read_health(folder) if other != shard else None
        if (
            health is not None
            and health.process.alive
            and (health.holds or now - health.updated < HEALTH_S)
            and health.state not in {DRAINING, STOPPED}
            and health.shards != shards
        ):
            return (
                f"Process {health.process.identity.pid} records shard {other} of {health.shards}, and"
                f" STREAM_SHARDS is {shards}: it ends first."
            )
    return None


def waiting_runs(instance: dg.DagsterInstance, shard: int) -> int:
    """The number of a shard's queued runs."""
    statuses = [status for status, phase in _PHASES.items() if phase is Phase.WAITING]
    return instance.get_runs_count(dg.RunsFilter(tags={SHARD_TAG: str(shard)}, statuses=statuses))


def read_health(folder: Path) -> Health | None:
    """The report of a journal's streamer, or None if it is missing or damaged.

    A running streamer rewrites its report each second, so a damaged one (after a power failure) belongs to no
    running process: it is logged, and must not keep the next run from starting.
    """
    try:
        raw = health_report.read(folder)
        if raw is None:
            return None
        identity = Identity(int(raw["pid"]), float(raw["pid_started"]))
        alive = identity.alive
        set_ns = _clock_set_by_ns(raw) if alive else 0
        return Health(
            process=Process(identity, alive),
            updated=(raw["updated_ns"] + set_ns) / 1e9,
            last_frame=_seconds(raw["last_frame_ns"], set_ns),
            last_durable=_seconds(raw["last_durable_ns"], set_ns),
            state=str(raw["state"]),
            last_heard=_seconds(raw["last_heard_ns"], set_ns),
            trouble=raw["trouble"],
            shards=int(raw.get("shards", 1)),
            unflushed=int(raw.get("journal_backlog_bytes", 0)),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        path = folder / health_report.FILE
        log.warning("%s is damaged (%s): it counts as no report.", path, error)
        return None


def _clock_set_by_ns(raw: Mapping[str, Any]) -> int:
    """By how many ns the wall clock was set since the report, or ran on while the machine slept.

    Without this correction a healthy streamer would look hung after a step forward, and a hung one healthy after
    a step back. The report must be from this boot, which a running process proves: monotonic time restarts at
    each boot.
    """
    monotonic_ns = raw.get("updated_monotonic_ns")
    if monotonic_ns is None:
        # written by a streamer of an earlier version, which still runs after the upgrade
        return 0
    age_ns = time.monotonic_ns() - int(monotonic_ns)
    return time.time_ns() - age_ns - int(raw["updated_ns"])


def _seconds(ns: int | None, set_ns: int) -> float | None:
    return (ns + set_ns) / 1e9 if ns else None  # 0: not set yet


def _run(record: dg.RunRecord) -> Run:
    run = record.dagster_run
    phase = _PHASES[run.status]
    since = record.create_timestamp.timestamp()
    if phase is Phase.STARTING:
        since = record.update_timestamp.timestamp()
    elif phase is not Phase.WAITING and record.start_time is not None:
        since = record.start_time
    return Run(run.run_id, phase, since, _process(run))


def _ended(instance: dg.DagsterInstance, record: dg.RunRecord, data_dir: Path) -> Ended:
    run = record.dagster_run
    at = record.end_time if record.end_time is not None else record.update_timestamp.timestamp()
    started = record.start_time if record.start_time is not None else at
    failed = run.status is Status.FAILURE and not run_failures.planned(instance, record, data_dir)
    return Ended(run.run_id, failed, at - started, at, _process(run))


def _process(run: dg.DagsterRun) -> Process | None:
    tag = run.tags.get(PROCESS_TAG)
    if tag is None:
        return None
    identity = Identity.parse(tag)
    return Process(identity, identity.alive)

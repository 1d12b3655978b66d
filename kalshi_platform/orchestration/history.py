"""Deletion of old Dagster history: runs, their events, check results and files.

Dagster itself purges only ticks (`retention` in dagster.yaml) and, after 30 days, the evaluations of automation
conditions (80 kB per asset and change). Deleting a run deletes all its events, so a run that holds the latest
materialisation of a partition or the latest result of a check is kept: without it the partition would be missing
again. In Dagster 1.13 a deleted run leaves its SQLite file (131 kB) and its check results, which are removed here.
When and for how long is decided in `retention.py`.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
from dagster import DagsterRunStatus as Status
from dagster._core.instance import RUNLESS_RUN_ID
from dagster._core.storage.event_log.schema import (
    AssetCheckExecutionsTable as Checks,
)
from dagster._core.storage.event_log.schema import (
    SqlEventLogStorageTable as Events,
)
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager
from sqlalchemy import delete, func, select
from sqlalchemy.sql import Select

ENDED = [Status.SUCCESS, Status.FAILURE, Status.CANCELED]
ORPHAN_S = 3600.0
"""Seconds that a file without a run is left alone: its run may be about to be recorded."""


@dataclass(frozen=True)
class Purged:
    """What was deleted, and what was kept although it is old."""

    runs: int
    kept: int
    """Old runs that hold the latest state of a partition or a check."""
    left: int
    """Old runs for which the time did not suffice; the next run deletes them."""
    check_results: int
    files_bytes: int


def purge(instance: dg.DagsterInstance, older_than: datetime, within_s: float) -> Purged:
    """Delete finished runs that ended before `older_than`, the oldest first, for at most `within_s`.

    Runs that have not finished are never deleted, however old.
    """
    deadline = time.monotonic() + within_s
    storage = instance.event_log_storage
    if not isinstance(storage, SqlEventLogStorage):
        raise TypeError(
            f"{type(storage).__name__} is not a SQL storage: which of its runs may be deleted is unknown"
        )
    holding = _holders(storage)
    old = instance.get_run_ids(dg.RunsFilter(statuses=ENDED, updated_before=older_than))
    surplus = [run_id for run_id in reversed(old) if run_id not in holding]  # newest come first
    deleted = freed = 0
    for run_id in surplus:
        if time.monotonic() > deadline:
            break
        instance.delete_run(run_id)
        instance.compute_log_manager.delete_logs(prefix=[run_id])
        freed += _remove_shard(storage, run_id)
        deleted += 1
    if (schedules := instance.schedule_storage) is not None:  # Dagster's own limit is 30 days
        schedules.purge_asset_evaluations(before=older_than.timestamp())
    _delete_observations(storage, older_than)
    return Purged(
        runs=deleted,
        kept=len(old) - len(surplus),
        left=len(surplus) - deleted,
        check_results=_delete_check_results(storage, older_than),
        files_bytes=freed + _sweep(instance, older_than),
    )


def _holders(storage: SqlEventLogStorage) -> set[str]:
    """Ids of runs that hold the latest materialisation of a partition or the latest result of a check."""
    latest_events = (
        select(func.max(Events.c.id))
        .where(Events.c.dagster_event_type == dg.DagsterEventType.ASSET_MATERIALIZATION.value)
        .where(Events.c.asset_key.is_not(None))
        .group_by(Events.c.asset_key, Events.c.partition)
    )
    with storage.index_connection() as index:
        materialised = index.execute(select(Events.c.run_id).where(Events.c.id.in_(latest_events)))
        checked = index.execute(select(Checks.c.run_id).where(Checks.c.id.in_(_latest_results())))
        return {str(run_id) for (run_id,) in [*materialised.fetchall(), *checked.fetchall()]}


def _latest_results() -> Select[tuple[int]]:
    return select(func.max(Checks.c.id)).group_by(
        Checks.c.asset_key, Checks.c.check_name, Checks.c.partition
    )


def _delete_check_results(storage: SqlEventLogStorage, older_than: datetime) -> int:
    """Delete old check results except the latest of each check; returns how many."""
    naive_utc = older_than.astimezone(UTC).replace(tzinfo=None)
    with storage.index_connection() as index:
        result = index.execute(
            delete(Checks)
            .where(Checks.c.create_timestamp < naive_utc)
            .where(Checks.c.id.not_in(_latest_results()))
        )
        return int(result.rowcount)


def _delete_observations(storage: SqlEventLogStorage, older_than: datetime) -> None:
    """Delete old observations that belong to no run, except the latest of each asset.

    SQLite has them twice: in the index, and in a file of the placeholder run.
    """
    ours = (Events.c.run_id == RUNLESS_RUN_ID) & (
        Events.c.dagster_event_type == dg.DagsterEventType.ASSET_OBSERVATION.value
    )
    latest = select(func.max(Events.c.id)).where(ours).group_by(Events.c.asset_key)
    naive_utc = older_than.astimezone(UTC).replace(tzinfo=None)
    old = delete(Events).where(ours, Events.c.timestamp < naive_utc, Events.c.id.not_in(latest))
    with storage.index_connection() as index:
        index.execute(old)
    if isinstance(storage, SqliteEventLogStorage):
        with storage.run_connection(RUNLESS_RUN_ID) as shard:
            shard.execute(old)


# -- files -----------------------------------------------------------------------------------------


def _sweep(instance: dg.DagsterInstance, older_than: datetime) -> int:
    """Remove the files of deleted runs, and old output; returns the freed bytes."""
    known = set(instance.get_run_ids())
    newest = min(older_than.timestamp(), time.time() - ORPHAN_S)
    freed = 0
    storage = instance.event_log_storage
    if isinstance(storage, SqliteEventLogStorage):
        for run_id in set(storage.get_all_run_ids()) - known:
            if _modified(Path(storage.path_for_shard(run_id))) < time.time() - ORPHAN_S:
                freed += _remove_shard(storage, run_id)
    finished = set(instance.get_run_ids(dg.RunsFilter(statuses=ENDED)))
    for folder in _run_folders(instance):
        if (folder.name in finished or folder.name not in known) and _modified(folder) < newest:
            freed += _remove(folder)
    return freed


def _remove_shard(storage: SqlEventLogStorage, run_id: str) -> int:
    """Remove a run's SQLite file, if it has one; returns the freed bytes."""
    if not isinstance(storage, SqliteEventLogStorage):
        return 0
    shard = Path(storage.path_for_shard(run_id))
    return sum(_remove(shard.with_name(shard.name + end)) for end in ("", "-wal", "-shm"))


def _run_folders(instance: dg.DagsterInstance) -> Iterator[Path]:
    """The runs' folders: the output of their steps, and values passed between steps."""
    roots = [Path(instance.storage_directory())]
    manager = instance.compute_log_manager
    if isinstance(manager, LocalComputeLogManager):
        roots.append(Path(manager._base_dir))
    for root in roots:
        if root.is_dir():
            yield from (path for path in root.iterdir() if path.is_dir() and _is_run(path.name))


def _is_run(name: str) -> bool:
    return len(name) == 36 and name.count("-") == 4


def _modified(path: Path) -> float:
    """The modification time of a file, or of the newest file below a folder; now if it is gone."""
    try:
        below = [path, *path.rglob("*")] if path.is_dir() else [path]
        return max(file.stat().st_mtime for file in below)
    except FileNotFoundError:
        return time.time()


def _remove(path: Path) -> int:
    """Remove a file or folder; returns the freed bytes."""
    try:
        if path.is_dir():
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            shutil.rmtree(path)
        else:
            size = path.stat().st_size
            path.unlink()
    except FileNotFoundError:
        return 0
    return size

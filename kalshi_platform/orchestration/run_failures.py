"""Why a run failed, as a sentence, and whether a planned restart is the only cause."""

from __future__ import annotations

import signal
from pathlib import Path

import dagster as dg
from dagster._core.remote_origin import GrpcServerCodeLocationOrigin

from kalshi_platform.health import planned_stop

NO_REASON = "marked as failed from outside"
"""Part of Dagster's sentence about a killed worker, which says less than the engine event before it."""
INTERRUPTED = "It was interrupted: its worker was asked to end while it ran. Run it again if nothing else has."
UNPLANNED = (
    "No planned stop is on record: an out-of-memory daemon (earlyoom, systemd-oomd) or a kill by hand may have ended it."
    " To end a run, use Terminate in Dagster."
)
MOST_CHARACTERS = 1000
"""Longest reason of a run: it is stored in cursors and sent to phones."""


UNREACHED = (
    "It could not be started: its code server was away, as it is while it starts again. Run it again if nothing"
    " else has."
)
_OF_A_RESTART = {
    "DagsterExecutionInterruptedError": INTERRUPTED,
    "KeyboardInterrupt": INTERRUPTED,
    "terminated by interrupt": INTERRUPTED,
}
"""Dagster's errors after a planned restart, with the sentence for each. A crash and `kill -9` leave others."""
_NOTICED_OF_A_RESTART = {
    **_OF_A_RESTART,
    f"exit code -{int(signal.SIGTERM)}": INTERRUPTED,  # before Dagster listened for it
    f"was terminated by signal {int(signal.SIGTERM)} ": INTERRUPTED,
    "DagsterUserCodeUnreachableError": UNREACHED,
}
"""The same for engine events, by which Dagster reports the end of a worker."""
_WORKER_ENDED = ("was terminated by signal", "exit code")
"""Parts of engine events about a worker that ended by itself."""
MOST_EVENTS = 100


def why(instance: dg.DagsterInstance, run_id: str) -> str:
    """The first failed step's reason, else the run's, else Dagster's last engine event."""
    kinds = dg.DagsterEventType
    records = instance.get_records_for_run(
        run_id,
        of_type={kinds.STEP_FAILURE, kinds.RUN_FAILURE, kinds.ENGINE_EVENT},
        limit=MOST_EVENTS,
        ascending=False,
    ).records
    events = [
        event for record in records if (event := record.event_log_entry.dagster_event) is not None
    ]
    noticed = [_reason(event) for event in events if event.event_type is kinds.ENGINE_EVENT]
    noticed.sort(key=lambda reason: not _names_the_end(reason))
    for kind in (kinds.STEP_FAILURE, kinds.RUN_FAILURE):
        for event in reversed(events):
            reason = _reason(event) if event.event_type is kind else ""
            if reason and NO_REASON not in reason:
                return reason[:MOST_CHARACTERS]
    return next(
        (reason[:MOST_CHARACTERS] for reason in noticed if reason),
        "Its page in the UI has the log.",
    )


def planned(instance: dg.DagsterInstance, record: dg.RunRecord, data_dir: Path) -> bool:
    """Whether a run failed only because of a planned restart, which stopped it or its code server."""
    reason = why(instance, record.dagster_run.run_id)
    if reason != INTERRUPTED:
        return reason == UNREACHED
    return may_be_planned(record, data_dir, record.end_time or record.update_timestamp.timestamp())


def may_be_planned(record: dg.RunRecord, data_dir: Path, ended: float) -> bool:
    """Whether the platform may have stopped a run that was interrupted at `ended`.

    If the run's code server notes its stops, a note is required; otherwise it cannot be known, and counts as yes.
    """
    created = record.create_timestamp.timestamp()
    noted = planned_stop.planned(data_dir, created, ended)
    return noted or not _stops_are_noted(record.dagster_run)


def _stops_are_noted(run: dg.DagsterRun) -> bool:
    """Whether the run's code server is the platform's: that of `up`, or one with a port, as in containers.

    `dagster dev` starts Dagster's own, on a socket with a random name, which notes no stop; `dagster job` has none.
    """
    job = run.remote_job_origin
    server = job.repository_origin.code_location_origin if job is not None else None
    if not isinstance(server, GrpcServerCodeLocationOrigin):
        return False
    return server.port is not None or Path(server.socket or "").name == planned_stop.SOCKET


def _names_the_end(reason: str) -> bool:
    return reason in {INTERRUPTED, UNREACHED} or any(words in reason for words in _WORKER_ENDED)


def _reason(event: dg.DagsterEvent) -> str:
    """The reason in an event, with the sentences of this module for restarts."""
    data = event.event_specific_data
    user = getattr(data, "user_failure_data", None)
    if user is not None and user.description:
        return str(user.description)
    error = getattr(data, "error", None)
    reason = (
        str((error.cause or error).message).strip() if error is not None else event.message or ""
    )
    whole = f"{error.message} {reason}" if error is not None else reason
    noticed = event.event_type is dg.DagsterEventType.ENGINE_EVENT
    restarts = _NOTICED_OF_A_RESTART if noticed else _OF_A_RESTART
    return next((sentence for words, sentence in restarts.items() if words in whole), reason)

"""Why a run failed, in the words that a person needs."""

from __future__ import annotations

import signal
from pathlib import Path

import dagster as dg
from dagster._core.remote_origin import GrpcServerCodeLocationOrigin

from kalshi_platform.health import planned_stop

NO_REASON = "marked as failed from outside"
"""Of the sentence that Dagster writes when a worker was killed: what it noticed is written before."""
INTERRUPTED = "It was interrupted: its worker was asked to end while it ran. Run it again if nothing else has."
UNASKED = (
    "No planned stop is on record: an out-of-memory daemon (earlyoom, systemd-oomd) or a kill by hand may have ended it."
    " To end a run, use Terminate in Dagster."
)
MOST_CHARACTERS = 1000
"""Of a run's reason: it goes into cursors, and into people's pockets."""


UNREACHED = (
    "It could not be started: its code server was away, as it is while it starts again. Run it again if nothing"
    " else has."
)
_OF_A_RESTART = {
    "DagsterExecutionInterruptedError": INTERRUPTED,
    "KeyboardInterrupt": INTERRUPTED,
    "terminated by interrupt": INTERRUPTED,
}
"""Dagster's words for what a planned restart does to runs. A crash and `kill -9` have others."""
_NOTICED_OF_A_RESTART = {
    **_OF_A_RESTART,
    f"exit code -{int(signal.SIGTERM)}": INTERRUPTED,  # before Dagster listened for it
    f"was terminated by signal {int(signal.SIGTERM)} ": INTERRUPTED,
    "DagsterUserCodeUnreachableError": UNREACHED,
}
"""The same, of what Dagster notices from outside."""
_DEATHS = ("was terminated by signal", "exit code")
"""In what Dagster notices of a worker that went by itself."""
MOST_EVENTS = 100


def why(instance: dg.DagsterInstance, run_id: str) -> str:
    """The first step's reason, else the run's, else what Dagster noticed last."""
    kinds = dg.DagsterEventType
    records = instance.get_records_for_run(
        run_id,
        of_type={kinds.STEP_FAILURE, kinds.RUN_FAILURE, kinds.ENGINE_EVENT},
        limit=MOST_EVENTS,
        ascending=False,
    ).records
    events = [it for record in records if (it := record.event_log_entry.dagster_event) is not None]
    noticed = [_reason(it) for it in events if it.event_type is kinds.ENGINE_EVENT]
    noticed.sort(key=lambda said: not _tells_the_end(said))
    for kind in (kinds.STEP_FAILURE, kinds.RUN_FAILURE):
        for event in reversed(events):
            said = _reason(event) if event.event_type is kind else ""
            if said and NO_REASON not in said:
                return said[:MOST_CHARACTERS]
    return next((it[:MOST_CHARACTERS] for it in noticed if it), "Its page in the UI has the log.")


def planned(instance: dg.DagsterInstance, record: dg.RunRecord, data_dir: Path) -> bool:
    """Whether a restart is all that a failed run met: it may have been asked to end, or its code server was away."""
    met = why(instance, record.dagster_run.run_id)
    if met != INTERRUPTED:
        return met == UNREACHED
    return may_be_asked(record, data_dir, record.end_time or record.update_timestamp.timestamp())


def may_be_asked(record: dg.RunRecord, data_dir: Path, ended: float) -> bool:
    """Whether the platform may have asked for the end of a run that was interrupted then.

    Where the run's code server notes its stops, a note must say so; of others it cannot be known.
    """
    created = record.create_timestamp.timestamp()
    noted = planned_stop.planned(data_dir, created, ended)
    return noted or not _stops_are_noted(record.dagster_run)


def _stops_are_noted(run: dg.DagsterRun) -> bool:
    """Whether the run's code server is the platform's own: `up`'s, or one with a port, as containers have.

    `dagster dev` starts Dagster's, on a socket with a name by chance, which notes no stop; `dagster job` has none.
    """
    job = run.remote_job_origin
    server = job.repository_origin.code_location_origin if job is not None else None
    if not isinstance(server, GrpcServerCodeLocationOrigin):
        return False
    return server.port is not None or Path(server.socket or "").name == planned_stop.SOCKET


def _tells_the_end(said: str) -> bool:
    return said in {INTERRUPTED, UNREACHED} or any(words in said for words in _DEATHS)


def _reason(event: dg.DagsterEvent) -> str:
    data = event.event_specific_data
    user = getattr(data, "user_failure_data", None)
    if user is not None and user.description:
        return str(user.description)
    error = getattr(data, "error", None)
    said = str((error.cause or error).message).strip() if error is not None else event.message or ""
    whole = f"{error.message} {said}" if error is not None else said
    noticed = event.event_type is dg.DagsterEventType.ENGINE_EVENT
    restarts = _NOTICED_OF_A_RESTART if noticed else _OF_A_RESTART
    return next((it for words, it in restarts.items() if words in whole), said)

"""Why a run failed, in the words that a person needs."""

from __future__ import annotations

import signal

import dagster as dg

NO_REASON = "marked as failed from outside"
"""Of the sentence that Dagster writes when a worker was killed: what it noticed is written before."""
INTERRUPTED = (
    "It was interrupted: its worker was told to end while it ran. Run it again if nothing else has."
)
MOST_CHARACTERS = 1000
"""Of a run's reason: it goes into cursors, and into people's pockets."""


_INTERRUPTS = (
    "DagsterExecutionInterruptedError",
    "KeyboardInterrupt",
    "terminated by interrupt",
    f"exit code -{int(signal.SIGTERM)}",  # before Dagster listened for it
)
"""In Dagster's words, that a worker was told to end. A crash and `kill -9` have others."""
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
    if INTERRUPTED in noticed:
        noticed = [INTERRUPTED]
    for kind in (kinds.STEP_FAILURE, kinds.RUN_FAILURE):
        for event in reversed(events):
            said = _reason(event) if event.event_type is kind else ""
            if said and NO_REASON not in said:
                return said[:MOST_CHARACTERS]
    return next((it[:MOST_CHARACTERS] for it in noticed if it), "Its page in the UI has the log.")


def interrupted(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Whether a failed run was told to end, as by a restart: nothing failed but Dagster's name for it."""
    return why(instance, run_id) == INTERRUPTED


def _reason(event: dg.DagsterEvent) -> str:
    data = event.event_specific_data
    user = getattr(data, "user_failure_data", None)
    if user is not None and user.description:
        return str(user.description)
    error = getattr(data, "error", None)
    said = str((error.cause or error).message).strip() if error is not None else event.message or ""
    return INTERRUPTED if any(words in said for words in _INTERRUPTS) else said

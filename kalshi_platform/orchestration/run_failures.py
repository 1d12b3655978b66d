"""Why a run failed, in the words that a person needs."""

from __future__ import annotations

import dagster as dg

NO_REASON = "marked as failed from outside"
"""Of the sentence that Dagster writes when a worker was killed: what it noticed is written before."""
INTERRUPTED = (
    "It was interrupted: its worker was told to end while it ran. Run it again if nothing else has."
)
MOST_CHARACTERS = 1000
"""Of a run's reason: it goes into cursors, and into people's pockets."""


def why(instance: dg.DagsterInstance, run_id: str) -> str:
    """The first step's reason, else the run's, else what Dagster noticed last."""
    of = dg.DagsterEventType
    for of_type, oldest_first in (
        (of.STEP_FAILURE, True),
        (of.RUN_FAILURE, True),
        (of.ENGINE_EVENT, False),
    ):
        records = instance.get_records_for_run(
            run_id, of_type=of_type, limit=1, ascending=oldest_first
        ).records
        event = records[0].event_log_entry.dagster_event if records else None
        said = _reason(event) if event is not None else ""
        if said and NO_REASON not in said:
            return said[:MOST_CHARACTERS]
    return "Its page in the UI has the log."


def _reason(event: dg.DagsterEvent) -> str:
    data = event.event_specific_data
    user = getattr(data, "user_failure_data", None)
    if user is not None and user.description:
        return str(user.description)
    error = getattr(data, "error", None)
    if error is not None:
        said = str((error.cause or error).message).strip()
        return INTERRUPTED if "DagsterExecutionInterruptedError" in said else said
    return event.message or ""

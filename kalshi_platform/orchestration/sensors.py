"""`streamer_supervisor`: exactly one streamer run per shard, alive.

A thin shell: it looks (`observation.py`), asks what to do (`supervisor.py`), does it. It never
waits: a process that needs time gets it until the next tick.
"""

import json
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import dagster as dg
from dagster import DagsterRunStatus as Status

from kalshi_platform.monitoring import supervision
from kalshi_platform.monitoring.supervision import Supervised, Supervision
from kalshi_platform.orchestration import run_failures
from kalshi_platform.orchestration.observation import (
    SHARD_TAG,
    SOURCE_TAG,
    active_shards,
    observe,
    others_in_the_way,
)
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.orchestration.streamer import stream_orderbook
from kalshi_platform.orchestration.supervisor import (
    Cancel,
    Decision,
    Fail,
    Kill,
    Launch,
    Phase,
    State,
    Wait,
    decide,
)
from kalshi_platform.settings import Settings

TICK_S = 4
"""Less than the daemon's own round of 5 s, so that it looks in each: a killed streamer is seen so soon."""
_STEPS = 4
"""Decisions in one tick: a run marked as failed may be replaced in the same tick."""


@dg.sensor(
    name="streamer_supervisor",
    job=stream_orderbook,
    minimum_interval_seconds=TICK_S,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description=(
        "Keeps exactly one streamer run per shard (STREAM_SHARDS) alive: launches it, fails it when"
        " its process is gone, replaces it when it is stale, and backs off when it keeps failing."
        " Drains the journals of shards that are no longer configured."
        " To stop the recording, stop this sensor first, then terminate the run."
    ),
)
def streamer_supervisor(
    context: dg.SensorEvaluationContext, platform: KalshiResource
) -> dg.SensorResult:
    """One tick: every shard gets what it needs."""
    states = read_cursor(context.cursor)
    shards = _shards(context.instance, platform.settings())
    decisions = {
        shard: _supervise(context, platform, shard, shards, states.get(shard, State()))
        for shard in shards
    }
    launches = [
        _request(shard, platform.source)
        for shard, decision in decisions.items()
        if isinstance(decision.action, Launch)
    ]
    _note(context, platform.settings(), decisions)
    reasons = [
        decision.reason if len(shards) == 1 else f"{shard}: {decision.reason}"
        for shard, decision in decisions.items()
    ]
    return dg.SensorResult(
        run_requests=launches,
        skip_reason=None if launches else dg.SkipReason(" ".join(reasons)),
        cursor=write_cursor({shard: decision.state for shard, decision in decisions.items()}),
    )


def _note(
    context: dg.SensorEvaluationContext, settings: Settings, decisions: Mapping[int, Decision]
) -> None:
    """Leave word for those who cannot see into Dagster. What cannot be written is no reason to stop."""
    shards = {
        shard: Supervised(
            decision.reason,
            decision.state.failures,
            _why_failed(context.instance, shard) if decision.state.failures else "",
        )
        for shard, decision in decisions.items()
    }
    try:
        supervision.note(settings.data_dir, Supervision(time.time(), shards))
    except OSError as error:
        context.log.error(f"`up` and `doctor` will not know of this look: {error}.")


def _why_failed(instance: dg.DagsterInstance, shard: int) -> str:
    """Why the shard's last failed run failed."""
    failed = dg.RunsFilter(tags={SHARD_TAG: str(shard)}, statuses=[Status.FAILURE])
    records = instance.get_run_records(failed, limit=1)
    return run_failures.why(instance, records[0].dagster_run.run_id) if records else ""


def _shards(instance: dg.DagsterInstance, settings: Settings) -> list[int]:
    """Those of the settings, and those of former settings that are not over or not drained yet."""
    from kalshi_platform.loading import passage

    configured = settings.stream_shards
    known = passage.supervised(settings.journals_dir, configured, settings.stores)
    return sorted({*known, *active_shards(instance)})


def _supervise(
    context: dg.SensorEvaluationContext,
    platform: KalshiResource,
    shard: int,
    shards: Sequence[int],
    state: State,
) -> Decision:
    settings = platform.settings()
    folders = {each: settings.journal_dir(each) for each in shards}
    configured = settings.stream_shards
    for _ in range(_STEPS):
        records = shard < configured
        blocker = others_in_the_way(folders, shard, configured, time.time()) if records else None
        seen = observe(context.instance, shard, folders[shard], configured, blocker)
        decision = decide(seen, state, time.time())
        state = decision.state
        if isinstance(decision.action, Wait | Launch):
            break
        context.log.warning(decision.reason)
        carry_out(context.instance, decision)
        if isinstance(decision.action, Kill):
            break  # its end shows at the next tick
    return decision


def carry_out(instance: dg.DagsterInstance, decision: Decision) -> None:
    """Do what was decided. Runs are read anew: one that has ended meanwhile is left alone."""
    action = decision.action
    if isinstance(action, Kill):
        action.process.send(signal.SIGKILL)
        return
    if not isinstance(action, Cancel | Fail):
        return
    run = instance.get_run_by_id(action.run.run_id)
    if run is None or run.is_finished:
        return
    if isinstance(action, Cancel):
        if run.status is not Status.CANCELING:
            instance.report_run_canceling(run, decision.reason)
        if action.run.phase is Phase.WAITING:
            instance.report_run_canceled(run, decision.reason)
        elif action.run.process is not None:
            # The worker's op gets an interrupt, flushes and ends. By its pid and not through
            # its code server, which may be gone and would be waited for.
            action.run.process.identity.send(signal.SIGTERM)
    elif action.canceled or run.status is Status.CANCELING:
        instance.report_run_canceled(run, decision.reason)
    else:
        instance.report_run_failed(run, decision.reason)


def _request(shard: int, source: str) -> dg.RunRequest:
    # A key that was used before is skipped without a word: each attempt has its own.
    return dg.RunRequest(
        run_key=f"shard-{shard}-{time.time_ns()}",
        tags={SHARD_TAG: str(shard), SOURCE_TAG: source},
    )


def read_cursor(cursor: str | None) -> dict[int, State]:
    """What the last tick remembered, by shard."""
    raw: Mapping[str, Any] = json.loads(cursor) if cursor else {}
    return {int(shard): State(**state) for shard, state in raw.items()}


def write_cursor(states: Mapping[int, State]) -> str:
    """The states as the cursor's text."""
    return json.dumps({str(shard): asdict(state) for shard, state in states.items()})

"""The sensor `streamer_supervisor`: keeps exactly one streamer run per shard running.

A thin shell: it observes (`observation.py`), decides (`supervisor.py`) and acts. While streamers record, a tick lasts
until the next one is near: it watches the processes, so that a killed one is replaced at once, and observes again
every few seconds. That costs a fraction of another tick, for which Dagster creates an instance, opens its databases
some twenty times and writes to them. A process that needs time has it until the next tick, except if others wait for
its end: when STREAM_SHARDS has changed, and when a run has ended before its process.
"""

import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import dagster as dg
from dagster import DagsterRunStatus as Status
from dagster._core.definitions.selector import InstigatorSelector
from dagster._core.scheduler.instigation import InstigatorStatus

from kalshi_platform.health import planned_stop, supervision
from kalshi_platform.health.supervision import Supervised, Supervision
from kalshi_platform.orchestration import observation, run_failures
from kalshi_platform.orchestration.observation import (
    SHARD_TAG,
    SOURCE_TAG,
    active_shards,
    observe,
    others_in_the_way,
    processes,
)
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.orchestration.streamer import stream_orderbook
from kalshi_platform.orchestration.supervisor import (
    Cancel,
    Decision,
    End,
    Fail,
    Kill,
    Launch,
    Phase,
    Run,
    State,
    Wait,
    decide,
)
from kalshi_platform.processes import Identity
from kalshi_platform.settings import Settings

TICK_S = 4
"""Less than the daemon's interval of 5 s, so that the sensor may run in each."""
WATCH_S = 13.5
"""Seconds for which a tick watches the running processes; with its other work it ends before the daemon's third
interval."""
AGAIN_S = 4.5
"""Seconds between two observations of a tick: a stale run or a changed STREAM_SHARDS ends no process."""
POLL_S = 0.1
NOTED_S = 0.6
"""Seconds within which the code server notes how a run's process ended, which is more precise than that it is gone."""
ROOM_S = 15.0
"""Seconds after its beginning for which a tick waits for the end of runs that others wait for; the rest is left to the
next tick."""
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
    """Supervise every shard until the next tick is near."""
    began = time.monotonic()
    states, again = read_cursor(context.cursor), True
    while again:
        observed_at, requested = time.monotonic(), platform.settings()
        fitting_shards = observation.shards(context.instance, requested)
        settings = requested.model_copy(update={"stream_shards": fitting_shards})
        shards = _shards(context.instance, settings)
        decisions, ending = _supervise(context, settings, shards, states)
        states = {shard: decision.state for shard, decision in decisions.items()}
        _note(context, settings, decisions)
        if ending:
            # their successors must start in this tick: nothing is recorded until then
            again = _end_in_time(context.instance, ending, began + ROOM_S)
        elif any(isinstance(decision.action, Launch) for decision in decisions.values()):
            again = False
        else:
            again = _watch(processes(context.instance), observed_at + AGAIN_S, began + WATCH_S)
        if again and _is_switched_off(context):
            return dg.SensorResult(skip_reason=dg.SkipReason("The sensor was switched off."))
    if planned_stop.asked_here.is_set():  # a run launched now would end with this code server
        return dg.SensorResult(
            skip_reason=dg.SkipReason("This code server ends; the next one supervises.")
        )
    launches = [
        _request(shard, platform.source)
        for shard, decision in decisions.items()
        if isinstance(decision.action, Launch)
    ]
    reasons = [
        *_without_room(context.instance, requested.stream_shards, fitting_shards),
        *(
            decision.reason if len(shards) == 1 else f"{shard}: {decision.reason}"
            for shard, decision in decisions.items()
        ),
    ]
    return dg.SensorResult(
        run_requests=launches,
        skip_reason=None if launches else dg.SkipReason(" ".join(reasons)),
        cursor=write_cursor({shard: decision.state for shard, decision in decisions.items()}),
    )


def _is_switched_off(context: dg.SensorEvaluationContext) -> bool:
    """Whether the sensor was stopped since the tick began: then a run that is ended must not be replaced."""
    origin, repository = context.code_location_origin, context.repository_name
    if origin is None or repository is None:
        return False
    selector = InstigatorSelector(
        location_name=origin.location_name, repository_name=repository, name=context.sensor_name
    )
    state = context.instance.get_instigator_state("", selector.get_id())
    return state is not None and state.status is InstigatorStatus.STOPPED


def _without_room(instance: dg.DagsterInstance, requested: int, fitting_shards: int) -> list[str]:
    """Why fewer streamers run than STREAM_SHARDS says, if that is so."""
    if fitting_shards == requested:
        return []
    return [
        f"STREAM_SHARDS={requested} needs a restart of `up` (elsewhere a greater max_concurrent_runs in dagster.yaml):"
        f" Dagster runs {observation.slots(instance)} at once, {observation.OTHER_RUNS} of them for other jobs, and"
        f" until then {fitting_shards} share all markets."
    ]


def _note(
    context: dg.SensorEvaluationContext, settings: Settings, decisions: Mapping[int, Decision]
) -> None:
    """Write the decisions for programs outside of Dagster; a failure to write must not stop the supervision."""
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
        context.log.error(f"`up` and `doctor` will not show this tick: {error}.")


def _why_failed(instance: dg.DagsterInstance, shard: int) -> str:
    """Why the shard's last failed run failed."""
    failed = dg.RunsFilter(tags={SHARD_TAG: str(shard)}, statuses=[Status.FAILURE])
    records = instance.get_run_records(failed, limit=1)
    return run_failures.why(instance, records[0].dagster_run.run_id) if records else ""


def _shards(instance: dg.DagsterInstance, settings: Settings) -> list[int]:
    """The configured shards, and former ones that still run or are not drained."""
    from kalshi_platform.health import monitored_shards

    configured = settings.stream_shards
    known = monitored_shards.supervised(settings.journals_dir, configured, settings.stores)
    return sorted({*known, *active_shards(instance)})


def _supervise(
    context: dg.SensorEvaluationContext,
    settings: Settings,
    shards: Sequence[int],
    states: Mapping[int, State],
) -> tuple[dict[int, Decision], list[Run]]:
    """Decide and act for each shard; returns the decisions, and the stopped runs for whose end others wait."""
    found = {
        shard: _supervise_shard(context, settings, shard, shards, states.get(shard, State()))
        for shard in shards
    }
    return (
        {shard: decision for shard, (decision, _) in found.items()},
        [run for _, ending in found.values() for run in ending],
    )


def _supervise_shard(
    context: dg.SensorEvaluationContext,
    settings: Settings,
    shard: int,
    shards: Sequence[int],
    state: State,
) -> tuple[Decision, list[Run]]:
    folders = {number: settings.journal_dir(number) for number in shards}
    configured, ending = settings.stream_shards, list[Run]()
    for _ in range(_STEPS):
        records = shard < configured
        blocker = others_in_the_way(folders, shard, configured, time.time()) if records else None
        decision = decide(observe(context.instance, shard, settings, blocker), state, time.time())
        state = decision.state
        if isinstance(decision.action, Wait | Launch):
            break
        context.log.warning(decision.reason)
        carry_out(context.instance, decision)
        if isinstance(decision.action, End) or (
            isinstance(decision.action, Cancel) and decision.action.replaced
        ):
            ending.append(decision.action.run)
        if isinstance(decision.action, Kill):
            break  # the next tick sees its end
    return decision, ending


def _end_in_time(instance: dg.DagsterInstance, runs: Sequence[Run], until: float) -> bool:
    """Wait for the end of stopped runs; False if that takes too long and is left to the next tick."""
    return _wait_while(lambda: any(_goes_on(instance, run) for run in runs), until)


def _watch(watched: Sequence[Identity], next_observation: float, until: float) -> bool:
    """Whether to observe again: a process has ended, or `next_observation` has come before `until`."""
    if not watched:
        return False
    if _wait_while(lambda: all(one.alive for one in watched), min(next_observation, until)):
        time.sleep(NOTED_S)
        return True
    return next_observation < until and not planned_stop.asked_here.is_set()


def _wait_while(condition: Callable[[], bool], until: float) -> bool:
    """Whether the condition became false before `until` (monotonic) and before this code server was stopped."""
    while time.monotonic() < until and not planned_stop.asked_here.is_set():
        if not condition():
            return True
        time.sleep(POLL_S)
    return False


def _goes_on(instance: dg.DagsterInstance, run: Run) -> bool:
    """Whether a run is unfinished for Dagster, or its process alive."""
    found = instance.get_run_by_id(run.run_id)
    alive = run.process is not None and run.process.identity.alive
    return alive or (found is not None and not found.is_finished)


def carry_out(instance: dg.DagsterInstance, decision: Decision) -> None:
    """Carry out a decision. Runs are read again first: one that has ended meanwhile is left alone."""
    action = decision.action
    if isinstance(action, Kill):
        action.process.send(signal.SIGKILL)
        return
    if isinstance(action, End) and action.run.process is not None:
        action.run.process.identity.send(signal.SIGTERM)
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
            # The worker's op is interrupted, flushes and ends. The signal goes to its pid, not through its code
            # server, which may be gone and would delay the tick.
            action.run.process.identity.send(signal.SIGTERM)
    elif action.canceled or run.status is Status.CANCELING:
        instance.report_run_canceled(run, decision.reason)
    else:
        instance.report_run_failed(run, decision.reason)


def _request(shard: int, source: str) -> dg.RunRequest:
    # Dagster silently skips a key that was used before, so each attempt has its own.
    return dg.RunRequest(
        run_key=f"shard-{shard}-{time.time_ns()}",
        tags={SHARD_TAG: str(shard), SOURCE_TAG: source},
    )


def read_cursor(cursor: str | None) -> dict[int, State]:
    """The state of the last tick, by shard."""
    raw: Mapping[str, Any] = json.loads(cursor) if cursor else {}
    return {int(shard): State(**state) for shard, state in raw.items()}


def write_cursor(states: Mapping[int, State]) -> str:
    """The states as the cursor's text."""
    # without defaults, so that an earlier version can read the cursor if no newer field is used
    return json.dumps(
        {
            str(shard): {k: v for k, v in asdict(state).items() if v}
            for shard, state in states.items()
        }
    )

"""The decision what to do about a shard's streamer, without I/O.

`observation.py` collects the observed state, `sensors.py` carries out the decisions made here. The status of a run
alone proves nothing: a run whose worker and code server were both killed stays STARTED for ever. So a run is checked
by its process (pid and start time), by the age of the last received frame and by the age of the last durable write.
Times are seconds since the epoch.

    no run          → launch one: at once after a run that recorded well until it was killed, else after
                      the back-off of its predecessors' failures
    waiting         → wait; withdraw it after QUEUE_S
    starting        → wait; fail it if its worker never starts
    started         → process gone: fail it. Stale: cancel it. A day old: queue a successor, for which
                      it ends by itself
    canceling       → wait while it flushes; kill it if it does not end
    ended, but its process runs → stop the process as if it were canceled; then launch a new run

A running process whose disk is blocked and that holds records in memory is neither canceled, replaced nor killed,
however old its report is: only it can still write them. This is checked first.

When STREAM_SHARDS changes, every run with another number of shards is canceled, and none is launched before all of
those have ended: a market leaves its old shard before it joins the new one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import StrEnum

from kalshi_platform import backoff
from kalshi_platform.processes import Identity

START_S = 60.0
"""Seconds from the launch to the process, and from the process to its first health report."""
ORPHAN_S = 20.0
"""The same for a run whose code server has been replaced since: it may have been killed before it started the worker,
and no other process will start it."""
QUEUE_S = 600.0
"""Seconds that a run may wait in the queue before it is withdrawn."""
HEALTH_S = 20.0
"""Largest age of a running streamer's health report; it writes one each second."""
DURABLE_S = 25.0
"""Seconds by which the last durable write may be behind the last received frame."""
FRAME_S = 120.0
"""Largest age of the last frame of a streamer in a receiving state."""
HEARD_S = 300.0
"""Longest silence, pings included, of a streamer that reports a quiet exchange: the exchange pings every 10 s, and
capture reconnects after half a minute without a ping."""
CONNECT_S = 900.0
"""Longest silence while capture connects: it has its own back-off, and a new run would not connect sooner."""
GRACE_S = 10.0
"""Seconds from a cancellation to the kill."""
FLUSH_S = 120.0
"""The same for a streamer that still makes durable writes."""
HEALTHY_S = 300.0
"""A run that lasted this long resets the back-off."""
RECYCLE_S = 24 * 3600.0
"""Age at which a run is replaced by a new one, so that its log does not grow for ever."""
BACKOFF_S, BACKOFF_LIMIT_S = 5.0, 300.0
"""Wait after the first failure, doubled by each further one up to the limit."""
KILLED_S, KILLED_FAILURES = 60.0, 2
"""A run that received frames this recently was healthy until it was killed: it counts as at most KILLED_FAILURES
failures, so that its successor starts within a minute, however often that happens. One that also lasted this long is
replaced at once."""

DIALLING = frozenset({"starting", "connecting"})
QUIET = frozenset({"quiet", "maintenance"})
DRAINING = "draining"
"""The state in which the rest of a former shard's journal is loaded and nothing is received."""
BLOCKED = "blocked"
"""The state in which the disk refuses writes or is too slow, and received records wait in memory."""


class Phase(StrEnum):
    """The phase of a run, for its supervision."""

    WAITING = "waiting"  # created or queued
    STARTING = "starting"
    STARTED = "started"
    CANCELING = "canceling"


@dataclass(frozen=True)
class Process:
    """A process as it was observed."""

    identity: Identity
    alive: bool


@dataclass(frozen=True)
class Run:
    """An active run. `since`: time of creation (waiting), launch (starting), else start."""

    run_id: str
    phase: Phase
    since: float
    process: Process | None = None
    """The worker; None until it has tagged the run."""

    @property
    def name(self) -> str:
        """The run id as the UI abbreviates it."""
        return self.run_id[:8]


@dataclass(frozen=True)
class Ended:
    """The shard's last ended run."""

    run_id: str
    failed: bool
    lasted_s: float
    at: float
    process: Process | None = None

    @property
    def still_running(self) -> bool:
        """Whether its process still runs although the run has ended."""
        return self.process is not None and self.process.alive


@dataclass(frozen=True)
class Health:
    """The streamer's last health report, as far as supervision needs it."""

    process: Process
    updated: float
    last_frame: float | None
    last_durable: float | None
    state: str
    last_heard: float | None = None
    """Time of the last bytes from the exchange, pings included."""
    trouble: str | None = None
    """The streamer's own sentence about what is wrong."""
    shards: int = 1
    """The number of shards with which it runs."""
    unflushed: int = 0
    """Received bytes that are not on disk and would be lost with the process."""

    @property
    def holds(self) -> bool:
        """Whether it waits for its disk and holds records that exist only in its memory."""
        return self.process.alive and self.state == BLOCKED and self.unflushed > 0


@dataclass(frozen=True)
class Observation:
    """The observed state of a shard. `runs`: the active ones, oldest first."""

    runs: tuple[Run, ...] = ()
    ended: Ended | None = None
    health: Health | None = None
    jitter: float = 0.0
    """A random number in [0, 1), so that shards do not restart in step."""
    server_since: float = 0.0
    """Start time of the current code server."""
    shards: int = 1
    """The configured number of shards."""
    blocker: str | None = None
    """A sentence about a streamer that still records with another number of shards, perhaps this shard's markets."""


@dataclass(frozen=True)
class State:
    """The state that is kept between ticks, in the sensor's cursor."""

    failures: int = 0
    """Consecutive failures."""
    not_before: float = 0.0
    """No launch before this."""
    counted: str = ""
    """The last run whose end has been counted."""
    lost: int = 0
    """Consecutive runs that never began, for instance because their code server ended."""
    blamed: str = ""
    """The run that was counted as a failure before its end, for being stale."""
    canceling: dict[str, float] = field(default_factory=dict)
    """By run, when it was first seen canceling, or, if it has ended, when its process was stopped."""


@dataclass(frozen=True)
class Wait:
    """Nothing to do."""


@dataclass(frozen=True)
class Launch:
    """Start a new run."""


@dataclass(frozen=True)
class Cancel:
    """Withdraw a waiting run, or stop a running one."""

    run: Run
    replaced: bool = False
    """Whether its successors wait only for its end, which takes seconds."""


@dataclass(frozen=True)
class End:
    """Stop the process of a run that has already ended."""

    run: Run


@dataclass(frozen=True)
class Fail:
    """Mark a run as ended: its process is gone, or never started."""

    run: Run
    canceled: bool = False
    """Whether it was lost with its code server before it began, which is no failure."""


@dataclass(frozen=True)
class Kill:
    """Kill a process that does not end."""

    process: Identity


@dataclass(frozen=True)
class Decision:
    """The action, its reason (a sentence for the UI), and the new state."""

    action: Wait | Launch | Cancel | End | Fail | Kill
    reason: str
    state: State


def decide(seen: Observation, state: State, now: float) -> Decision:
    """Decide the next action for a shard."""
    state = _count(seen, state)
    state = replace(state, canceling=_canceling_since(seen, state, now))
    if not seen.runs:
        return _holding(seen, state) or _without_run(seen, state, now)
    run = _incumbent(seen)
    for other in seen.runs:
        if other is not run and not _may_stay(seen, run, other, now):
            return Decision(
                Cancel(other), f"Run {other.name} is one too many: {run.name} has the shard.", state
            )
    holding = _holding(seen, state) if _is_reporting(seen, run) else None
    return holding or _PHASES[run.phase](seen, run, state, now)


def _canceling_since(seen: Observation, state: State, now: float) -> dict[str, float]:
    since = {
        run.run_id: state.canceling.get(run.run_id, now)
        for run in seen.runs
        if run.phase is Phase.CANCELING
    }
    ended = seen.ended
    if ended is not None and ended.still_running and ended.run_id in state.canceling:
        since[ended.run_id] = state.canceling[ended.run_id]
    return since


def _holding(seen: Observation, state: State) -> Decision | None:
    """Wait if a process holds records that only it can still write."""
    health = seen.health
    if health is None or not health.holds:
        return None
    return _wait(
        f"Process {health.process.identity.pid} is blocked by its disk and holds {health.unflushed:,} bytes"
        f" that are nowhere else; it is left alone. {health.trouble or 'Give it a faster disk.'}",
        state,
    )


def _count(seen: Observation, state: State) -> State:
    ended = seen.ended
    if ended is None or ended.run_id == state.counted:
        return state
    if ended.run_id == state.blamed:
        return replace(state, counted=ended.run_id)
    if not ended.failed and ended.process is None:
        # it never began, which does not reset the back-off
        return _lost(seen, ended, state)
    state = replace(state, lost=0)
    if not ended.failed:
        return replace(state, counted=ended.run_id, failures=0, not_before=0.0)
    failures = 1 if ended.lasted_s >= HEALTHY_S else state.failures + 1
    wait_s = _backoff(failures, seen.jitter)
    if _had_recorded(seen, ended):
        failures = min(failures, KILLED_FAILURES)
        wait_s = 0.0 if ended.lasted_s >= KILLED_S else _backoff(failures, seen.jitter)
    return replace(state, counted=ended.run_id, failures=failures, not_before=ended.at + wait_s)


def _lost(seen: Observation, ended: Ended, state: State) -> State:
    """Count a run that never began. The first one costs no wait; a code server that crashes repeatedly is backed off."""
    lost = state.lost + 1
    wait_s = _backoff(lost - 1, seen.jitter) if lost > 1 else 0.0
    return replace(
        state, counted=ended.run_id, lost=lost, not_before=max(state.not_before, ended.at + wait_s)
    )


def _had_recorded(seen: Observation, ended: Ended) -> bool:
    """Whether frames arrived until shortly before the run ended, so that it was healthy when it was killed."""
    health = seen.health
    return (
        health is not None
        and ended.process is not None
        and health.process.identity == ended.process.identity
        and health.last_frame is not None
        and ended.at - health.last_frame < KILLED_S
    )


def _backoff(failures: int, jitter: float) -> float:
    """The wait in seconds: between half of the step and the whole step."""
    return backoff.wait_s(failures, BACKOFF_S, BACKOFF_LIMIT_S) * (0.5 + jitter / 2)


def _incumbent(seen: Observation) -> Run:
    """The run that holds the shard: the one that writes the journal, else the one in the latest phase."""
    rank = {Phase.STARTED: 0, Phase.CANCELING: 1, Phase.STARTING: 2, Phase.WAITING: 3}

    def order(run: Run) -> tuple[bool, int]:
        return (not _is_reporting(seen, run), rank[run.phase])

    return min(seen.runs, key=order)


def _may_stay(seen: Observation, incumbent: Run, other: Run, now: float) -> bool:
    """Whether a second run is legitimate: it is ending, or is the successor of a run that ends."""
    if other.phase is Phase.CANCELING:
        return True
    ends = incumbent.phase is Phase.CANCELING or (
        incumbent.phase is Phase.STARTED and now - incumbent.since >= RECYCLE_S
    )
    return ends and other is _next_in_line(seen)


def _next_in_line(seen: Observation) -> Run | None:
    return next((run for run in seen.runs if run.phase is Phase.WAITING), None)


def _is_reporting(seen: Observation, run: Run) -> bool:
    """Whether the health report belongs to this run and its process is alive."""
    return (
        seen.health is not None
        and run.process is not None
        and seen.health.process.alive
        and seen.health.process.identity == run.process.identity
    )


def _without_run(seen: Observation, state: State, now: float) -> Decision:
    ended, health = seen.ended, seen.health
    if ended is not None and ended.process is not None and ended.process.alive:
        return _outlived(seen, ended, ended.process, state, now)
    if health is not None and health.process.alive and now - health.updated < HEALTH_S:
        return _wait(
            f"Process {health.process.identity.pid} writes this journal outside Dagster"
            " (`kalshi-platform stream`?). End it, and a run takes over.",
            state,
        )
    if seen.blocker is not None:
        return _wait(f"{seen.blocker} Then this shard starts.", state)
    if now < state.not_before:
        return _wait(
            f"{_setbacks(state)}; the next start is in"
            f" {state.not_before - now:.0f} s. The last run's log says why.",
            state,
        )
    return Decision(Launch(), "No streamer runs; one is launched.", state)


def _outlived(
    seen: Observation, ended: Ended, process: Process, state: State, now: float
) -> Decision:
    """Stop, then kill, a process whose run was marked as ended by a person or by Dagster."""
    worker, stopped_at = process.identity, state.canceling.get(ended.run_id)
    if stopped_at is None:
        return Decision(
            End(Run(ended.run_id, Phase.CANCELING, ended.at, process)),
            f"Process {worker.pid} goes on though its run has ended; it is asked to end.",
            replace(state, canceling={**state.canceling, ended.run_id: now}),
        )
    if _may_continue(seen, process, now - stopped_at, now):
        return _wait(f"Process {worker.pid} of the run that ended is still flushing.", state)
    return Decision(
        Kill(worker), f"Process {worker.pid} goes on though its run has ended; it is killed.", state
    )


def _waiting(seen: Observation, run: Run, state: State, now: float) -> Decision:
    age = now - run.since
    if age > QUEUE_S:
        return Decision(
            Cancel(run), f"Run {run.name} has waited for {age:.0f} s; it is withdrawn.", state
        )
    return _wait(f"Run {run.name} has waited in the queue for {age:.0f} s.", state)


def _starting(seen: Observation, run: Run, state: State, now: float) -> Decision:
    age = now - run.since
    if age > _start_patience_s(seen, run):
        return Decision(
            Fail(run, canceled=run.since < seen.server_since),
            f"The worker of run {run.name} did not come up within {age:.0f} s.",
            state,
        )
    return _wait(f"Run {run.name} is starting.", state)


def _started(seen: Observation, run: Run, state: State, now: float) -> Decision:
    age = now - run.since
    if run.process is None:
        return _without_process(seen, run, state, age)
    if not run.process.alive:
        return _gone(run, run.process.identity, state)
    health = seen.health if _is_reporting(seen, run) else None
    if health is None and age <= START_S:
        return _wait(f"Run {run.name} is starting.", state)
    if health is not None and health.shards != seen.shards:
        return Decision(Cancel(run, replaced=True), _outdated(run, health, seen), state)
    complaint = _complaint(health, age, now)
    if complaint is not None:
        return Decision(
            Cancel(run),
            f"Run {run.name} is stale: {complaint}",
            _count_stale(seen, run, state, now),
        )
    state = replace(state, lost=0)
    return _recycle(seen, run, state) if age >= RECYCLE_S else _healthy(run, health, state)


def _outdated(run: Run, health: Health, seen: Observation) -> str:
    return (
        f"Run {run.name} shares the markets among {health.shards}, and STREAM_SHARDS is"
        f" {seen.shards}: it ends, and the next one takes its new share."
    )


def _healthy(run: Run, health: Health | None, state: State) -> Decision:
    pid = run.process.identity.pid if run.process is not None else 0
    reported = health.state if health is not None else "starting"
    trouble = f" {health.trouble}" if health is not None and health.trouble else ""
    does = "drains" if reported == DRAINING else "records"
    return _wait(f"Run {run.name} {does} (process {pid}, {reported}).{trouble}", state)


def _start_patience_s(seen: Observation, run: Run) -> float:
    return ORPHAN_S if run.since < seen.server_since else START_S


def _without_process(seen: Observation, run: Run, state: State, age: float) -> Decision:
    if age > _start_patience_s(seen, run):
        return Decision(
            Fail(run, canceled=run.since < seen.server_since),
            f"Run {run.name} has named no process in {age:.0f} s.",
            state,
        )
    return _wait(f"Run {run.name} is starting.", state)


def _gone(run: Run, process: Identity, state: State) -> Decision:
    return Decision(Fail(run), f"Process {process.pid} of run {run.name} is gone.", state)


def _count_stale(seen: Observation, run: Run, state: State, now: float) -> State:
    """Count a stale run as a failure now, since it will end as canceled."""
    failures = 1 if now - run.since >= HEALTHY_S else state.failures + 1
    return replace(
        state,
        failures=failures,
        not_before=now + _backoff(failures, seen.jitter),
        blamed=run.run_id,
    )


def _recycle(seen: Observation, run: Run, state: State) -> Decision:
    successor = _next_in_line(seen)
    if successor is None:
        return Decision(Launch(), f"Run {run.name} is a day old; its successor is queued.", state)
    return _wait(f"Run {run.name} makes room for {successor.name}.", state)


def _canceling(seen: Observation, run: Run, state: State, now: float) -> Decision:
    age = now - state.canceling[run.run_id]
    if run.process is None:
        if age > GRACE_S:
            return Decision(
                Fail(run), f"Run {run.name} was canceled before its process was known.", state
            )
        return _wait(f"Run {run.name} is ending.", state)
    if not run.process.alive:
        return _gone(run, run.process.identity, state)
    if _may_continue(seen, run.process, age, now):
        return _wait(f"Run {run.name} is flushing ({age:.0f} s).", state)
    return Decision(
        Kill(run.process.identity),
        f"Run {run.name} did not end within {age:.0f} s; process"
        f" {run.process.identity.pid} is killed. The journal keeps what it received.",
        state,
    )


_PHASES = {
    Phase.WAITING: _waiting,
    Phase.STARTING: _starting,
    Phase.STARTED: _started,
    Phase.CANCELING: _canceling,
}


def _complaint(health: Health | None, age: float, now: float) -> str | None:
    """The fault of a started run's health, or None."""
    if health is None:
        return f"it has reported no health in {age:.0f} s."
    if now - health.updated > HEALTH_S:
        return f"its last health report is {now - health.updated:.0f} s old."
    if health.state in {BLOCKED, DRAINING}:
        return None  # blocked with nothing in memory: it still reports, and a new run has the same disk
    started = now - age
    frame = started if health.last_frame is None else health.last_frame
    durable = started if health.last_durable is None else health.last_durable
    if frame - durable > DURABLE_S:
        return f"frames come, but nothing has been made durable for {now - durable:.0f} s."
    return _silence(health, frame, now)


def _silence(health: Health, frame: float, now: float) -> str | None:
    """A sentence if the connection is silent for too long in the streamer's reported state."""
    last_heard = max(frame, health.last_heard or frame)
    if health.state in DIALLING:
        silent, bound = now - last_heard, CONNECT_S
    elif health.state in QUIET:
        silent, bound = now - last_heard, HEARD_S
    else:
        silent, bound = now - frame, FRAME_S
    if silent <= bound:
        return None
    return f"nothing was received for {silent:.0f} s in the state {health.state!r}."


def _may_continue(seen: Observation, process: Process, age: float, now: float) -> bool:
    """Whether a stopped process may have more time: its grace period is not over, or it is still writing."""
    if age < GRACE_S:
        return True
    health = seen.health
    writes = (
        health is not None
        and health.process.identity == process.identity
        and now - health.updated < HEALTH_S
        and health.last_durable is not None
        and now - health.last_durable < GRACE_S
    )
    return writes and age < FLUSH_S


def _wait(reason: str, state: State) -> Decision:
    return Decision(Wait(), reason, state)


def _setbacks(state: State) -> str:
    if not state.failures:
        return f"{state.lost} runs in a row were lost before they began, as with a code server that ends"
    return ("1 failure" if state.failures == 1 else f"{state.failures} failures") + " in a row"

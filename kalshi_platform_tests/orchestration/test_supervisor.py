"""The supervisor's decisions, case by case, and that they recover from any state of a model world."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalshi_platform.orchestration.supervisor import (
    BACKOFF_LIMIT_S,
    BACKOFF_S,
    CONNECT_S,
    DRAINING,
    DURABLE_S,
    FLUSH_S,
    FRAME_S,
    GRACE_S,
    HEALTH_S,
    HEALTHY_S,
    HEARD_S,
    KILLED_S,
    ORPHAN_S,
    QUEUE_S,
    RECYCLE_S,
    START_S,
    Cancel,
    Decision,
    End,
    Ended,
    Fail,
    Health,
    Kill,
    Launch,
    Observation,
    Phase,
    Process,
    Run,
    State,
    Wait,
    decide,
)
from kalshi_platform.processes import Identity

NOW = 1_000_000_000.0
WORKER = Process(Identity(100, 5.0), alive=True)
DEAD = replace(WORKER, alive=False)
STRANGER = Process(Identity(200, 6.0), alive=True)


def run(phase: Phase, age: float, process: Process | None = None, run_id: str = "run-1") -> Run:
    return Run(run_id, phase, NOW - age, process)


def health(
    process: Process = WORKER,
    *,
    age: float = 0.5,
    frame_age: float | None = 0.5,
    durable_age: float | None = 0.5,
    state: str = "streaming",
    heard_age: float | None = None,
    unflushed: int = 0,
    shards: int = 1,
) -> Health:
    def ago(seconds: float | None) -> float | None:
        return None if seconds is None else NOW - seconds

    return Health(
        process,
        NOW - age,
        ago(frame_age),
        ago(durable_age),
        state,
        last_heard=ago(heard_age),
        unflushed=unflushed,
        shards=shards,
    )


STARTED = run(Phase.STARTED, 1000, WORKER)


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.STARTED])
@pytest.mark.parametrize(("server_age_s", "canceled"), [(5, True), (900, False)])
def test_a_run_lost_with_its_code_server_is_no_failure(
    phase: Phase, server_age_s: float, canceled: bool
) -> None:
    lost = run(phase, START_S + 1)
    decision = decide(Observation((lost,), server_since=NOW - server_age_s), State(), NOW)
    assert decision.action == Fail(lost, canceled=canceled)


CASES: dict[str, tuple[Observation, type[object]]] = {
    "nothing runs": (Observation(), Launch),
    "a young run waits in the queue": (Observation((run(Phase.WAITING, 5),)), Wait),
    "a run waits for ever": (Observation((run(Phase.WAITING, QUEUE_S + 1),)), Cancel),
    "a worker comes up": (Observation((run(Phase.STARTING, 5),)), Wait),
    "a worker never comes up": (Observation((run(Phase.STARTING, START_S + 1),)), Fail),
    "a worker's launcher was killed before it came up": (
        Observation((run(Phase.STARTING, ORPHAN_S + 1),), server_since=NOW - 5),
        Fail,
    ),
    "a worker comes up though its launcher was replaced": (
        Observation((run(Phase.STARTING, ORPHAN_S - 1),), server_since=NOW - 5),
        Wait,
    ),
    "a worker and its launcher were killed before it named itself": (
        Observation((run(Phase.STARTED, ORPHAN_S + 1),), server_since=NOW - 5),
        Fail,
    ),
    "a worker is slow to come up, its launcher is there": (
        Observation((run(Phase.STARTING, ORPHAN_S + 1),), server_since=NOW - 900),
        Wait,
    ),
    "a started run has not named its process yet": (Observation((run(Phase.STARTED, 5),)), Wait),
    "a started run never names its process": (
        Observation((run(Phase.STARTED, START_S + 1),)),
        Fail,
    ),
    "all is well": (Observation((STARTED,), health=health()), Wait),
    "worker and code server were killed": (
        Observation((replace(STARTED, process=DEAD),), health=health(DEAD)),
        Fail,
    ),
    "no health report yet": (Observation((run(Phase.STARTED, 10, WORKER),)), Wait),
    "only the predecessor's health report yet": (
        Observation((run(Phase.STARTED, 10, WORKER),), health=health(DEAD, age=900)),
        Wait,
    ),
    "never a health report": (Observation((run(Phase.STARTED, START_S + 1, WORKER),)), Cancel),
    "the process hangs": (Observation((STARTED,), health=health(age=HEALTH_S + 1)), Cancel),
    "frames come, the writer is dead": (
        Observation((STARTED,), health=health(durable_age=DURABLE_S + 2)),
        Cancel,
    ),
    "frames come, nothing was ever durable": (
        Observation((STARTED,), health=health(durable_age=None)),
        Cancel,
    ),
    "no frame though it claims to be live": (
        Observation((STARTED,), health=health(frame_age=FRAME_S + 1, durable_age=FRAME_S)),
        Cancel,
    ),
    "never a frame though it claims to be live": (
        Observation((STARTED,), health=health(frame_age=None, durable_age=None)),
        Cancel,
    ),
    "it took its share of another number of shards": (
        Observation((STARTED,), health=health(), shards=2),
        Cancel,
    ),
    "it drains a shard that is no longer configured, and hears nothing": (
        Observation((STARTED,), health=health(frame_age=None, state=DRAINING)),
        Wait,
    ),
    "a draining process hangs": (
        Observation((STARTED,), health=health(age=HEALTH_S + 1, state=DRAINING)),
        Cancel,
    ),
    "nothing runs, and others still record by the former number": (
        Observation(blocker="Process 7 records shard 1 of 2."),
        Wait,
    ),
    "the exchange is quiet": (
        Observation(
            (STARTED,),
            health=health(frame_age=9000, durable_age=9, state="quiet", heard_age=9),
        ),
        Wait,
    ),
    "called quiet, but not even pings come": (
        Observation(
            (STARTED,),
            health=health(frame_age=900, durable_age=9, state="quiet", heard_age=HEARD_S + 1),
        ),
        Cancel,
    ),
    "the exchange is in maintenance": (
        Observation(
            (STARTED,),
            health=health(frame_age=900, durable_age=9, state="maintenance", heard_age=9),
        ),
        Wait,
    ),
    "the exchange is away, and capture dials": (
        Observation((STARTED,), health=health(frame_age=FRAME_S + 60, state="connecting")),
        Wait,
    ),
    "capture has dialled for very long": (
        Observation(
            (run(Phase.STARTED, 5000, WORKER),),
            health=health(frame_age=CONNECT_S + 1, durable_age=1, state="connecting"),
        ),
        Cancel,
    ),
    "the disk is full, and a new run would lose what waits in memory": (
        Observation((STARTED,), health=health(frame_age=3000, durable_age=4000, state="blocked")),
        Wait,
    ),
    "the disk is full, and the process hangs": (
        Observation((STARTED,), health=health(age=HEALTH_S + 1, state="blocked")),
        Cancel,
    ),
    "quiet, but the process hangs": (
        Observation((STARTED,), health=health(age=HEALTH_S + 1, frame_age=900, state="quiet")),
        Cancel,
    ),
    "a day old": (
        Observation((run(Phase.STARTED, RECYCLE_S + 1, WORKER),), health=health()),
        Launch,
    ),
    "a day old, the successor waits": (
        Observation(
            (
                run(Phase.STARTED, RECYCLE_S + 1, WORKER),
                run(Phase.WAITING, 5, run_id="run-2"),
            ),
            health=health(),
        ),
        Wait,
    ),
    "a second run waits for no reason": (
        Observation((STARTED, run(Phase.WAITING, 5, run_id="run-2")), health=health()),
        Cancel,
    ),
    "canceled a moment ago": (
        Observation((run(Phase.CANCELING, 1000, WORKER),), health=health()),
        Wait,
    ),
    "canceled, and its process ended without a word": (
        Observation((run(Phase.CANCELING, 1000, DEAD),)),
        Fail,
    ),
    "the journal is written outside Dagster": (Observation(health=health(STRANGER)), Wait),
    "a former streamer's health file lies about": (
        Observation(health=health(replace(STRANGER, alive=False))),
        Launch,
    ),
    "a stranger's health file is stale": (
        Observation(health=health(STRANGER, age=HEALTH_S + 1)),
        Launch,
    ),
    "marked as ended long ago, the process lives on": (
        Observation(ended=Ended("run-0", False, 1000, NOW - FLUSH_S - 1, WORKER), health=health()),
        End,
    ),
    "marked as failed, the process records on": (
        Observation(ended=Ended("run-0", True, 1000, NOW - 2, WORKER), health=health()),
        End,
    ),
    "marked as ended, the process hung before its first report": (
        Observation(ended=Ended("run-0", False, 1000, NOW - GRACE_S - 1, WORKER)),
        End,
    ),
}


@pytest.mark.parametrize(("seen", "action"), CASES.values(), ids=CASES.keys())
def test_each_situation_has_its_action_and_a_reason(
    seen: Observation, action: type[object]
) -> None:
    decision = decide(seen, State(), NOW)
    assert type(decision.action) is action, decision.reason
    assert decision.reason.endswith((".", "?"))


BLOCKED = {
    "and does not report": {"age": 10_000.0},
    "and never got a frame": {"frame_age": None, "durable_age": None},
    "and has its share of another number of shards": {"shards": 2},
    "and nothing has been durable for long": {"durable_age": 10_000.0},
}


@pytest.mark.parametrize("values", BLOCKED.values(), ids=BLOCKED.keys())
@pytest.mark.parametrize("age", [1.0, START_S + 1, RECYCLE_S + 1])
@pytest.mark.parametrize("phase", [Phase.STARTED, Phase.CANCELING, None])
def test_a_process_that_holds_records_for_its_disk_is_left_alone(
    phase: Phase | None, age: float, values: dict[str, Any]
) -> None:
    holding = health(state="blocked", unflushed=3_400_000, **values)
    runs: tuple[Run, ...] = (run(phase, age, WORKER),) if phase is not None else ()
    ended = None if runs else Ended("run-0", True, 1000, NOW - age, WORKER)
    canceled = State(canceling={"run-1": NOW - age})
    decision = decide(Observation(runs, ended, holding), canceled, NOW)
    assert isinstance(decision.action, Wait), decision.reason
    assert "holds 3,400,000 bytes" in decision.reason
    dead = replace(holding, process=DEAD)
    runs = tuple(replace(run, process=DEAD) for run in runs)
    gone = decide(
        Observation(runs, replace(ended, process=DEAD) if ended else None, dead), State(), NOW
    )
    assert isinstance(gone.action, Fail | Launch | Wait)
    assert "holds" not in gone.reason


def test_of_two_running_the_one_that_writes_the_journal_stays() -> None:
    writer = run(Phase.STARTED, 100, WORKER, run_id="writer")
    other = run(Phase.STARTED, 1000, STRANGER, run_id="other")
    decision = decide(Observation((other, writer), health=health()), State(), NOW)
    assert decision.action == Cancel(other)


def test_a_canceled_run_is_killed_after_its_grace_unless_it_writes() -> None:
    canceling = run(Phase.CANCELING, 1000, WORKER)

    def later(seconds: float, state: State, report: Health) -> Decision:
        return decide(Observation((canceling,), health=report), state, NOW + seconds)

    def writing(seconds: float) -> Health:
        at = NOW + seconds
        return Health(WORKER, at, at, at, "draining")

    first = later(0, State(), health())
    assert first.state.canceling == {"run-1": NOW}
    assert isinstance(later(GRACE_S + 1, first.state, health(age=0)).action, Kill)
    assert isinstance(later(GRACE_S + 1, first.state, writing(GRACE_S + 1)).action, Wait)
    assert later(FLUSH_S + 1, first.state, writing(FLUSH_S + 1)).action == Kill(WORKER.identity)


def test_a_process_that_outlives_its_run_is_stopped_then_killed() -> None:
    ended = Ended("run-0", True, 1000, NOW - 10 * FLUSH_S, WORKER)

    def at(seconds: float, state: State, durable_age: float = 0.5) -> Decision:
        seen = replace(health(durable_age=durable_age), updated=NOW + seconds)
        return decide(Observation(ended=ended, health=seen), state, NOW + seconds)

    first = at(0, State())
    assert first.action == End(Run("run-0", Phase.CANCELING, ended.at, WORKER))
    soon = at(GRACE_S - 1, first.state)
    assert isinstance(soon.action, Wait)
    assert soon.state.canceling == {"run-0": NOW}
    flushing = at(GRACE_S + 1, soon.state, durable_age=-GRACE_S)
    assert isinstance(flushing.action, Wait)
    assert at(GRACE_S + 1, soon.state).action == Kill(WORKER.identity)
    long = at(FLUSH_S + 1, soon.state, durable_age=-FLUSH_S)
    assert long.action == Kill(WORKER.identity)
    gone = decide(Observation(ended=replace(ended, process=DEAD)), soon.state, NOW + 2)
    assert isinstance(gone.action, Launch)
    assert gone.state.canceling == {}


def test_a_canceled_process_is_not_stopped_twice() -> None:
    canceling = Observation((run(Phase.CANCELING, 1000, WORKER),), health=health())
    state = decide(canceling, State(), NOW).state
    ended = Ended("run-1", False, 1000, NOW + 1, WORKER)
    after = decide(Observation(ended=ended, health=health()), state, NOW + 2)
    assert isinstance(after.action, Wait)
    assert "still flushing" in after.reason


def failed(run_id: str, lasted: float = 1.0, at: float = NOW) -> Observation:
    return Observation(ended=Ended(run_id, True, lasted, at), jitter=1.0)


def test_the_wait_doubles_with_each_failure_up_to_the_limit() -> None:
    state, waits = State(), []
    for number in range(12):
        state = decide(failed(f"run-{number}"), state, NOW).state
        waits.append(state.not_before - NOW)
    assert waits[:4] == [BACKOFF_S, BACKOFF_S * 2, BACKOFF_S * 4, BACKOFF_S * 8]
    assert waits[-1] == BACKOFF_LIMIT_S
    assert isinstance(decide(failed("run-11"), state, NOW).action, Wait)
    assert isinstance(decide(failed("run-11"), state, NOW + BACKOFF_LIMIT_S).action, Launch)


def test_killed_runs_that_recorded_are_replaced_within_a_minute() -> None:
    state = State()
    for number in range(12):
        killed = Observation(
            ended=Ended(f"run-{number}", True, 20.0, NOW, WORKER), health=health(), jitter=1.0
        )
        state = decide(killed, state, NOW).state
        assert state.not_before - NOW <= 20
    for number in range(8):  # these never got a frame: something is wrong with them
        ended = Ended(f"silent-{number}", True, 20.0, NOW, WORKER)
        silent = Observation(ended=ended, health=health(frame_age=None), jitter=1.0)
        state = decide(silent, state, NOW).state
    assert state.not_before - NOW == BACKOFF_LIMIT_S


def test_a_killed_run_that_recorded_a_minute_is_replaced_at_once() -> None:
    state = State()
    for number in range(12):
        ended = Ended(f"run-{number}", True, KILLED_S, NOW, WORKER)
        killed = Observation(ended=replace(ended, process=DEAD), health=health(DEAD), jitter=1.0)
        decision = decide(killed, state, NOW)
        assert isinstance(decision.action, Launch)
        state = decision.state


def test_runs_lost_with_their_code_server_are_backed_off() -> None:
    state, waits = State(), []
    for number in range(12):
        lost = Observation(ended=Ended(f"run-{number}", False, 0.0, NOW), jitter=1.0)
        decision = decide(lost, state, NOW)
        state = decision.state
        waits.append(max(state.not_before - NOW, 0.0))
        assert isinstance(decision.action, Launch) == (number == 0)
    assert waits[:4] == [0.0, BACKOFF_S, BACKOFF_S * 2, BACKOFF_S * 4]
    assert waits[-1] == BACKOFF_LIMIT_S
    assert "12 runs in a row were lost before they began" in decision.reason
    well = decide(Observation((STARTED,), health=health()), state, NOW).state
    assert well.lost == 0
    again = Observation(ended=Ended("run-12", False, 0.0, NOW + 600), jitter=1.0)
    assert isinstance(decide(again, well, NOW + 600).action, Launch)


def test_one_failure_is_counted_once_however_often_it_is_seen() -> None:
    once = decide(failed("run-1"), State(), NOW).state
    assert decide(failed("run-1"), once, NOW + 1).state == once


def test_a_healthy_run_or_a_planned_end_resets_the_back_off() -> None:
    bad = State(failures=6)
    assert decide(failed("run-1", lasted=HEALTHY_S), bad, NOW).state.failures == 1
    wanted = Observation(ended=Ended("run-1", False, 3.0, NOW, DEAD))
    assert decide(wanted, bad, NOW).state.failures == 0
    assert isinstance(decide(wanted, bad, NOW).action, Launch)
    never_began = Observation(ended=Ended("run-1", False, 0.0, NOW))  # its code server was replaced
    assert decide(never_began, bad, NOW).state.failures == 6


@pytest.mark.parametrize("ends_as_failure", [True, False])
def test_a_stale_run_is_one_failure_however_it_ends(ends_as_failure: bool) -> None:
    former = Ended("run-0", True, 1.0, NOW - 500)
    state = decide(Observation(ended=former), State(), NOW - 500).state
    assert state.failures == 1
    stale = Observation(
        (run(Phase.STARTED, 100, WORKER),), ended=former, health=health(age=HEALTH_S + 1)
    )
    state = decide(stale, state, NOW).state
    assert state.failures == 2
    canceling = Observation((run(Phase.CANCELING, 100, WORKER),), ended=former)
    state = decide(canceling, state, NOW).state
    ended = Observation(ended=Ended("run-1", ends_as_failure, 100, NOW + 1))
    decision = decide(ended, state, NOW + 1)
    assert decision.state.failures == 2
    assert isinstance(decision.action, Wait)


def test_a_run_that_ends_for_a_new_number_of_shards_is_no_failure() -> None:
    two = replace(health(), shards=2)
    state = decide(Observation((STARTED,), health=two), State(), NOW).state
    ended = Observation(ended=Ended("run-1", False, 20.0, NOW + 5))
    after = decide(ended, state, NOW + 10)
    assert isinstance(after.action, Launch)
    assert after.state.failures == 0


# -- any world comes to rights ---------------------------------------------------------------


@dataclass
class Actor:
    """A run of the model world, with its process."""

    run_id: str
    pid: int
    born: float
    phase: Phase = Phase.WAITING
    alive: bool = False
    hung: bool = False
    stubborn: bool = False
    reported: float | None = None

    def identity(self) -> Identity:
        return Identity(self.pid, self.born)


@dataclass
class World:
    """A model of Dagster with a queue of one run per shard, and of processes that misbehave."""

    now: float = NOW
    state: State = field(default_factory=State)
    actors: list[Actor] = field(default_factory=list)
    ended: Ended | None = None
    dagster_notices: bool = True
    made: int = 0

    @property
    def active(self) -> list[Actor]:
        return self.actors

    def step(self) -> Decision:
        """Advance ten seconds: processes run, then the supervisor observes and acts."""
        self.now += 10
        self._live()
        decision = decide(self._seen(), self.state, self.now)
        self.state = decision.state
        self._carry_out(decision)
        return decision

    def _live(self) -> None:
        running = [a for a in self.actors if a.phase is not Phase.WAITING]
        for actor in list(self.actors):
            if actor.phase is Phase.WAITING and not running:
                actor.phase, actor.alive, actor.born = Phase.STARTED, True, self.now
                running.append(actor)
            elif actor.phase is Phase.CANCELING and actor.alive and not actor.stubborn:
                actor.alive = False
                self._end(actor, failed=False)
            elif not actor.alive and actor.phase is Phase.STARTED and self.dagster_notices:
                self._end(actor, failed=True)
            if actor.alive and not actor.hung:
                actor.reported = self.now

    def _seen(self) -> Observation:
        runs = tuple(
            Run(
                a.run_id,
                a.phase,
                a.born,
                None if a.phase is Phase.WAITING else Process(a.identity(), a.alive),
            )
            for a in self.actors
        )
        reports = [a for a in self.actors if a.reported is not None]
        last = max(reports, key=lambda a: a.reported or 0.0, default=None)
        report = (
            Health(
                Process(last.identity(), last.alive),
                last.reported or 0.0,
                last.reported,
                last.reported,
                "streaming",
            )
            if last
            else None
        )
        return Observation(runs, self.ended, report)

    def _carry_out(self, decision: Decision) -> None:
        action = decision.action
        if isinstance(action, Launch):
            self.made += 1
            self.actors.append(Actor(f"run-{self.made}", self.made, self.now))
        elif isinstance(action, Kill):
            for actor in self.actors:
                if actor.identity() == action.process:
                    actor.alive = False
        elif isinstance(action, Cancel | Fail):
            actor = next(a for a in self.actors if a.run_id == action.run.run_id)
            if isinstance(action, Fail) or actor.phase is Phase.WAITING:
                self._end(actor, failed=actor.phase is not Phase.CANCELING)
            else:
                actor.phase = Phase.CANCELING

    def _end(self, actor: Actor, *, failed: bool) -> None:
        self.actors.remove(actor)
        self.ended = Ended(
            actor.run_id,
            failed,
            self.now - actor.born,
            self.now,
            Process(actor.identity(), actor.alive),
        )


FAULTS = st.sampled_from(
    ["none", "kill", "kill with its code server", "hang", "hang for good", "cancel", "surplus"]
)


@settings(max_examples=150, deadline=None)
@given(faults=st.lists(st.tuples(FAULTS, st.integers(1, 30)), max_size=8))
def test_one_streamer_always_runs_again_and_no_healthy_one_is_hurt(
    faults: list[tuple[str, int]],
) -> None:
    world = World()
    for fault, ticks in faults:
        _strike(world, fault)
        for _ in range(ticks):
            _step_justly(world)
    world.dagster_notices = True
    for _ in range(200):
        _step_justly(world)
    streaming = [a for a in world.actors if a.phase is Phase.STARTED and a.alive and not a.hung]
    assert len(streaming) == 1
    assert len(world.actors) == 1


def _strike(world: World, fault: str) -> None:
    started = [a for a in world.actors if a.phase is Phase.STARTED]
    if fault == "surplus":
        world.made += 1
        world.actors.append(Actor(f"run-{world.made}", world.made, world.now))
    for actor in started:
        if fault.startswith("kill"):
            actor.alive = False
            world.dagster_notices = fault == "kill"
        elif fault.startswith("hang"):
            actor.hung, actor.stubborn = True, fault == "hang for good"
        elif fault == "cancel":
            actor.phase = Phase.CANCELING


def _step_justly(world: World) -> None:
    healthy = {
        a.run_id for a in world.actors if a.phase is Phase.STARTED and a.alive and not a.hung
    }
    decision = world.step()
    if isinstance(decision.action, Cancel | Fail):
        assert decision.action.run.run_id not in healthy, decision.reason
    if isinstance(decision.action, Kill):
        assert decision.action.process not in {
            a.identity() for a in world.actors if a.run_id in healthy
        }
    assert sum(a.alive and a.phase is Phase.STARTED for a in world.actors) <= 1

"""`streamer_supervisor` on a real instance, with real processes to find, interrupt and kill."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster import DagsterRunStatus as Status
from dagster._core.events import EngineEventData
from dagster._core.remote_origin import GrpcServerCodeLocationOrigin, RemoteRepositoryOrigin
from dagster._core.scheduler.instigation import InstigatorState, InstigatorStatus, InstigatorType
from dagster_shared.error import SerializableErrorInfo

from kalshi_platform.errors import PlatformError
from kalshi_platform.health import planned_stop, supervision
from kalshi_platform.orchestration import sensors
from kalshi_platform.orchestration.host.home import prepare
from kalshi_platform.orchestration.observation import PROCESS_TAG, SHARD_TAG, SOURCE_TAG, observe
from kalshi_platform.orchestration.sensors import carry_out, read_cursor, streamer_supervisor
from kalshi_platform.orchestration.streamer import stream_orderbook
from kalshi_platform.orchestration.supervisor import (
    GRACE_S,
    HEALTH_S,
    Decision,
    Fail,
    Phase,
    Run,
    State,
)
from kalshi_platform.processes import Identity
from kalshi_platform_tests.orchestration.stand_in import (
    StandInPlatform,
    StandInStreamer,
    hour_report,
)

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
MEEK = "import time; print(1, flush=True); time.sleep(60)"


class Worker:
    """A process that stands in for a run's worker."""

    def __init__(self, script: str) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        self.process.stdout.readline()
        self.identity = Identity.of(self.process.pid)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ticks return without waiting, except in tests of the waiting."""
    monkeypatch.setattr(sensors, "WATCH_S", 0.0)
    monkeypatch.setattr(sensors, "ROOM_S", 0.0)
    monkeypatch.setattr(planned_stop, "asked_here", threading.Event())


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    started: list[Worker] = []
    yield started
    for worker in started:
        worker.end()


@pytest.fixture
def worker(workers: list[Worker]) -> Worker:
    workers.append(Worker(MEEK))
    return workers[-1]


def tick(
    instance: dg.DagsterInstance, platform: StandInPlatform, cursor: str | None = None
) -> dg.SensorResult:
    with dg.build_sensor_context(
        instance=instance, cursor=cursor, resources={"platform": platform}
    ) as context:
        result = streamer_supervisor(context)
    assert isinstance(result, dg.SensorResult)
    return result


def reason(result: dg.SensorResult) -> str:
    assert result.skip_reason is not None
    return result.skip_reason.skip_message or ""


def started_run(instance: dg.DagsterInstance, process: Identity | None, shard: int = 0) -> str:
    """Create a run with status STARTED."""
    tags = {SHARD_TAG: str(shard)} | ({PROCESS_TAG: str(process)} if process else {})
    run = instance.create_run_for_job(stream_orderbook, tags=tags, status=Status.STARTING)
    instance.report_dagster_event(
        dg.DagsterEvent(event_type_value="PIPELINE_START", job_name=run.job_name),
        run.run_id,
    )
    return run.run_id


def write_health(
    platform: StandInPlatform,
    process: Identity,
    *,
    age_s: float = 0.0,
    shard: int = 0,
    **others: Any,
) -> None:
    folder = platform.settings().journal_dir(shard)
    folder.mkdir(parents=True, exist_ok=True)
    at = time.time_ns() - int(age_s * 1e9)
    (folder / "health.json").write_text(
        json.dumps(
            {
                "pid": process.pid,
                "pid_started": process.started,
                "updated_ns": at,
                "updated_monotonic_ns": time.monotonic_ns() - int(age_s * 1e9),
                "last_frame_ns": at,
                "last_durable_ns": at,
                "last_heard_ns": at,
                "trouble": None,
                "frames": 10,
                "lag_frames": 0,
                "state": "streaming",
            }
            | others
        )
    )


def launch_failed(instance: dg.DagsterInstance, run: dg.DagsterRun, number: signal.Signals) -> None:
    """Report a run as Dagster does if a signal ended its worker before it began."""
    not_launched(
        instance,
        run,
        "dagster._core.errors.DagsterLaunchFailedError: GRPC server: Subprocess for"
        f" {run.run_id} terminated unexpectedly with exit code -{int(number)}",
    )


def not_launched(instance: dg.DagsterInstance, run: dg.DagsterRun, why: str) -> None:
    """Report a run as Dagster does if it could not launch it."""
    error = SerializableErrorInfo(why, [], None)
    instance.report_engine_event(
        "Caught an unrecoverable error while dequeuing the run.",
        run,
        EngineEventData.engine_error(error),
    )
    instance.report_run_failed(run)


def status(instance: dg.DagsterInstance, run_id: str) -> Status:
    run = instance.get_run_by_id(run_id)
    assert run is not None
    return run.status


def test_the_first_tick_launches_a_run_with_shard_and_source(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    requests = tick(instance, platform).run_requests or []
    assert [request.tags for request in requests] == [{SHARD_TAG: "0", SOURCE_TAG: "simulator"}]


def test_each_attempt_has_a_key_of_its_own(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    keys = {(tick(instance, platform).run_requests or [])[0].run_key for _ in range(3)}
    assert len(keys) == 3


def test_a_living_streamer_is_left_alone(
    instance: dg.DagsterInstance, platform: StandInPlatform, worker: Worker
) -> None:
    run_id = started_run(instance, worker.identity)
    write_health(platform, worker.identity)
    result = tick(instance, platform)
    assert not result.run_requests
    assert "records" in reason(result)
    assert status(instance, run_id) is Status.STARTED


def test_a_run_without_worker_and_code_server_is_replaced(
    instance: dg.DagsterInstance, platform: StandInPlatform, worker: Worker
) -> None:
    run_id = started_run(instance, worker.identity)
    write_health(platform, worker.identity)
    worker.end()
    before = time.time()
    result = tick(instance, platform)
    assert status(instance, run_id) is Status.FAILURE
    assert "1 failure in a row" in reason(result)
    backed_off = read_cursor(result.cursor)[0]
    assert before < backed_off.not_before < time.time() + 10
    soon = json.dumps({"0": {"failures": 1, "counted": run_id}})
    assert tick(instance, platform, soon).run_requests


def test_a_streamer_killed_during_a_tick_is_failed_in_that_tick(
    instance: dg.DagsterInstance,
    platform: StandInPlatform,
    worker: Worker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sensors, "WATCH_S", 60.0)
    run_id = started_run(instance, worker.identity)
    write_health(platform, worker.identity)
    looks = 0
    really_alive = vars(Identity)["alive"].fget

    def alive(process: Identity) -> bool:
        nonlocal looks
        looks += 1
        if looks == 5:
            worker.end()
        return bool(really_alive(process))

    monkeypatch.setattr(Identity, "alive", property(alive))
    began = time.monotonic()
    result = tick(instance, platform)
    assert time.monotonic() - began < 30
    assert status(instance, run_id) is Status.FAILURE
    assert "1 failure in a row" in reason(result)


def test_a_watching_tick_also_sees_stale_and_removed_runs(
    instance: dg.DagsterInstance,
    platform: StandInPlatform,
    worker: Worker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sensors, "WATCH_S", 60.0)
    monkeypatch.setattr(sensors, "AGAIN_S", 0.1)
    run_id = started_run(instance, worker.identity)
    write_health(platform, worker.identity)
    reasons: list[str] = []

    def note(_: Path, found: supervision.Supervision) -> None:
        reasons.append(found.shards[0].reason)
        if len(reasons) == 3:
            write_health(platform, worker.identity, age_s=HEALTH_S + 1)

    monkeypatch.setattr(supervision, "note", note)
    began = time.monotonic()
    tick(instance, platform)
    assert time.monotonic() - began < 30  # it ends with the last process that it watches
    assert all("records (process" in text for text in reasons[:3])
    assert "1 failure in a row" in reasons[-1]
    assert worker.process.wait(30) == -signal.SIGTERM
    assert status(instance, run_id) is Status.CANCELED


def test_a_watching_tick_launches_nothing_if_switched_off(
    platform: StandInPlatform, worker: Worker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    instance = dg.DagsterInstance.local_temp(str(tmp_path))
    monkeypatch.setattr(sensors, "WATCH_S", 60.0)
    started_run(instance, worker.identity)
    write_health(platform, worker.identity)
    server = GrpcServerCodeLocationOrigin("localhost", socket="code.sock", location_name="here")
    origin = RemoteRepositoryOrigin(server, "all").get_instigator_origin("streamer_supervisor")
    context = dg.SensorEvaluationContext(
        instance_ref=None,
        last_tick_completion_time=None,
        last_run_key=None,
        cursor=None,
        repository_name="all",
        sensor_name="streamer_supervisor",
        instance=instance,
        resources={"platform": dg.ResourceDefinition.hardcoded_resource(platform)},
        code_location_origin=server,
    )

    def note(*_: object) -> None:  # as an operator does who stops the recording
        kind, off = InstigatorType.SENSOR, InstigatorStatus.STOPPED
        instance.add_instigator_state(InstigatorState(origin, kind, off))
        worker.end()

    monkeypatch.setattr(supervision, "note", note)
    with instance, context:
        result = streamer_supervisor(context)
    assert isinstance(result, dg.SensorResult)
    assert not result.run_requests
    assert "switched off" in reason(result)


def test_a_watching_tick_ends_in_time(
    instance: dg.DagsterInstance,
    platform: StandInPlatform,
    worker: Worker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sensors, "WATCH_S", 1.0)
    monkeypatch.setattr(sensors, "AGAIN_S", 0.3)
    started_run(instance, worker.identity)
    write_health(platform, worker.identity)
    began = time.monotonic()
    assert "records (process" in reason(tick(instance, platform))
    assert 1.0 <= time.monotonic() - began < 30


def test_a_code_server_that_ends_launches_nothing(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    planned_stop.asked_here.set()
    result = tick(instance, platform, cursor='{"0": {"failures": 1}}')
    assert not result.run_requests
    assert result.cursor is None  # what was remembered stays
    assert "This code server ends" in reason(result)


def test_a_run_stopped_before_it_began_is_replaced_at_once(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    for number, failures in ((signal.SIGTERM, 0), (signal.SIGKILL, 1)):
        run = instance.create_run_for_job(stream_orderbook, tags={SHARD_TAG: "0"})
        launch_failed(instance, run, number)
        result = tick(instance, platform)
        assert read_cursor(result.cursor)[0].failures == failures
        assert len(result.run_requests or []) == (failures == 0)


def test_a_run_not_begun_when_its_code_server_ended_is_canceled(
    instance: dg.DagsterInstance,
) -> None:
    run_id = started_run(instance, None)
    lost = Run(run_id, Phase.STARTED, 0.0)
    carry_out(instance, Decision(Fail(lost, canceled=True), "It has named no process.", State()))
    assert status(instance, run_id) is Status.CANCELED


def test_the_result_is_written_for_programs_outside_dagster(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    cursor = None
    for _ in range(2):
        run = instance.create_run_for_job(stream_orderbook, tags={SHARD_TAG: "0"})
        instance.report_run_failed(run, "The archive has a bad folder.")
        cursor = tick(instance, platform, cursor).cursor
    noted = supervision.read(platform.settings().data_dir)
    assert noted is not None
    assert noted.ticking
    found = noted.shards[0]
    assert found.failures == 2
    assert "The archive has a bad folder." in found.why
    assert found.reason.startswith("2 failures in a row; the next start is in ")
    folder = platform.settings().data_dir / "checks"
    shutil.rmtree(folder)
    folder.write_text("in the way")
    assert reason(tick(instance, platform, cursor))


def test_a_hung_streamer_is_interrupted_then_killed_then_failed(
    instance: dg.DagsterInstance, platform: StandInPlatform, workers: list[Worker]
) -> None:
    workers.append(Worker(STUBBORN))
    worker = workers[-1]
    run_id = started_run(instance, worker.identity)
    write_health(platform, worker.identity, age_s=300)

    first = tick(instance, platform)
    assert status(instance, run_id) is Status.CANCELING
    assert worker.identity.alive  # it ignored the interrupt

    later = {run_id: time.time() - GRACE_S - 1}
    state = read_cursor(first.cursor)[0]
    cursor = json.dumps({"0": {"failures": state.failures, "canceling": later}})
    second = tick(instance, platform, cursor)
    worker.process.wait()
    assert worker.process.returncode == -signal.SIGKILL

    third = tick(instance, platform, second.cursor)
    assert status(instance, run_id) is Status.CANCELED
    assert not third.run_requests or third.skip_reason is None


@pytest.mark.parametrize("set_by_s", [3600, -3600], ids=["ahead", "back"])
@pytest.mark.parametrize("age_s", [1, 300], ids=["well", "hung"])
def test_setting_the_clock_neither_ends_nor_hides_a_streamer(
    instance: dg.DagsterInstance,
    platform: StandInPlatform,
    worker: Worker,
    set_by_s: int,
    age_s: int,
) -> None:
    run_id = started_run(instance, worker.identity)
    at = time.time_ns() - (age_s + set_by_s) * 10**9  # by the clock as it was before it was set
    times = ("updated_ns", "last_frame_ns", "last_durable_ns", "last_heard_ns")
    write_health(platform, worker.identity, age_s=age_s, **dict.fromkeys(times, at))
    tick(instance, platform)
    assert (status(instance, run_id) is Status.STARTED) == (age_s == 1)


def test_an_interrupt_reaches_the_worker_without_its_code_server(
    instance: dg.DagsterInstance, platform: StandInPlatform, worker: Worker
) -> None:
    started_run(instance, worker.identity)
    write_health(platform, worker.identity, age_s=300)
    tick(instance, platform)
    assert worker.process.wait(30) == -signal.SIGTERM


def test_a_process_that_only_shares_the_pid_is_never_touched(
    instance: dg.DagsterInstance, platform: StandInPlatform, worker: Worker
) -> None:
    former = Identity(worker.identity.pid, worker.identity.started - 1000)
    run_id = started_run(instance, former)
    write_health(platform, former, age_s=300)
    tick(instance, platform)
    assert status(instance, run_id) is Status.FAILURE
    assert worker.process.poll() is None


def test_a_worker_whose_run_was_force_terminated_is_not_doubled(
    instance: dg.DagsterInstance, platform: StandInPlatform, workers: list[Worker]
) -> None:
    workers.append(Worker(STUBBORN))
    worker = workers[-1]
    run_id = started_run(instance, worker.identity)
    write_health(platform, worker.identity)
    run = instance.get_run_by_id(run_id)
    assert run is not None
    instance.report_run_canceled(run)
    result = tick(instance, platform)
    assert not result.run_requests
    assert "still flushing" in reason(result)


def test_a_worker_of_a_failed_run_ends_and_is_replaced_in_a_tick(
    instance: dg.DagsterInstance,
    platform: StandInPlatform,
    worker: Worker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sensors, "ROOM_S", 60.0)
    run_id = started_run(instance, worker.identity)
    write_health(platform, worker.identity)
    run = instance.get_run_by_id(run_id)
    assert run is not None
    instance.report_run_failed(run)
    result = tick(instance, platform, json.dumps({"0": {"counted": run_id}}))
    assert worker.process.wait(30) == -signal.SIGTERM
    assert launched(result) == ["0"]


def test_a_tick_that_waits_for_ends_is_bounded(
    instance: dg.DagsterInstance,
    platform: StandInPlatform,
    workers: list[Worker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers.append(Worker(STUBBORN))
    started_run(instance, workers[0].identity)
    write_health(platform, workers[0].identity)
    monkeypatch.setattr(sensors, "ROOM_S", 0.5)
    assert launched(tick(instance, with_shards(platform, 2))) == []

    workers.append(Worker(STUBBORN))
    started_run(instance, workers[1].identity, 1)
    write_health(platform, workers[1].identity, shard=1)
    monkeypatch.setattr(sensors, "ROOM_S", 600.0)
    threading.Timer(0.5, planned_stop.asked_here.set).start()
    began = time.monotonic()
    assert "This code server ends" in reason(tick(instance, with_shards(platform, 2)))
    assert time.monotonic() - began < 60


def test_no_run_is_launched_while_another_process_records(
    instance: dg.DagsterInstance, platform: StandInPlatform, worker: Worker
) -> None:
    write_health(platform, worker.identity)
    result = tick(instance, platform)
    assert not result.run_requests
    assert f"Process {worker.identity.pid} writes this journal outside Dagster" in reason(result)


def test_runs_of_other_jobs_and_shards_are_not_looked_at(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    instance.create_run_for_job(stream_orderbook, tags={SHARD_TAG: "7"})
    assert observe(instance, 0, platform.settings()).runs == ()


@pytest.mark.parametrize("damaged", ["", '{"pid": 1', "[]", '{"pid": 1}'])
def test_a_damaged_health_file_does_not_prevent_the_next_run(
    instance: dg.DagsterInstance, platform: StandInPlatform, damaged: str
) -> None:
    folder = platform.settings().journal_dir(0)
    folder.mkdir(parents=True)
    (folder / "health.json").write_text(damaged)
    assert tick(instance, platform).run_requests


def test_the_state_survives_the_tick(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    state = State(failures=3, not_before=time.time() + 60, canceling={})
    cursor = json.dumps({"0": {"failures": 3, "not_before": state.not_before}})
    result = tick(instance, platform, cursor)
    assert not result.run_requests
    assert "3 failures in a row" in reason(result)
    assert read_cursor(result.cursor)[0] == state


# -- several shards ----------------------------------------------------------------------------


def with_shards(platform: StandInPlatform, shards: int) -> StandInPlatform:
    """The platform after a change of STREAM_SHARDS."""
    return StandInPlatform(overrides=platform.overrides | {"stream_shards": str(shards)})


def launched(result: dg.SensorResult) -> list[str]:
    return sorted(request.tags[SHARD_TAG] for request in result.run_requests or [])


def journal(platform: StandInPlatform, shard: int) -> None:
    """Create a journal with a record."""
    folder = platform.settings().journal_dir(shard)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{0:020d}.arrows").touch()


def end(instance: dg.DagsterInstance, run_id: str) -> None:
    """Create a run that was canceled and has ended."""
    run = instance.get_run_by_id(run_id)
    assert run is not None
    if not run.is_finished:
        instance.report_run_canceled(run)


def test_each_shard_has_a_run_that_is_replaced_alone(
    instance: dg.DagsterInstance, platform: StandInPlatform, workers: list[Worker]
) -> None:
    two = with_shards(platform, 2)
    assert launched(tick(instance, two)) == ["0", "1"]
    workers += [Worker(MEEK), Worker(MEEK)]
    runs = [started_run(instance, workers[shard].identity, shard) for shard in (0, 1)]
    for shard in (0, 1):
        write_health(two, workers[shard].identity, shard=shard, shards=2)
    quiet = tick(instance, two)
    assert not quiet.run_requests
    assert reason(quiet).count("records") == 2
    for killed, lives in ((1, 0), (0, 1)):
        workers[killed].end()
        tick(instance, two, quiet.cursor)
        assert status(instance, runs[killed]) is Status.FAILURE
        assert status(instance, runs[lives]) is Status.STARTED
        assert workers[lives].identity.alive
        soon = json.dumps({str(killed): {"failures": 1, "counted": runs[killed]}})
        assert launched(tick(instance, two, soon)) == [str(killed)]
        workers.append(Worker(MEEK))
        workers[killed] = workers[-1]
        runs[killed] = started_run(instance, workers[killed].identity, killed)
        write_health(two, workers[killed].identity, shard=killed, shards=2)


def test_with_more_shards_all_runs_end_before_new_ones_start(
    instance: dg.DagsterInstance, platform: StandInPlatform, workers: list[Worker]
) -> None:
    workers.append(Worker(STUBBORN))  # it takes its time to flush
    former = started_run(instance, workers[0].identity)
    write_health(platform, workers[0].identity)
    two = with_shards(platform, 2)
    first = tick(instance, two)
    assert status(instance, former) is Status.CANCELING
    assert launched(first) == []
    assert f"Process {workers[0].identity.pid} records shard 0 of 1" in reason(first)
    workers[0].end()
    end(instance, former)
    assert launched(tick(instance, two, first.cursor)) == ["0", "1"]


def test_new_runs_start_in_the_tick_in_which_the_old_ones_end(
    instance: dg.DagsterInstance,
    platform: StandInPlatform,
    workers: list[Worker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sensors, "ROOM_S", 60.0)
    workers.append(Worker(MEEK))
    former = started_run(instance, workers[0].identity)
    write_health(platform, workers[0].identity)

    def ends_as_asked(process: Identity, number: signal.Signals) -> bool:
        assert (process, number) == (workers[0].identity, signal.SIGTERM)
        workers[0].end()
        end(instance, former)
        return True

    monkeypatch.setattr(Identity, "send", ends_as_asked)
    assert launched(tick(instance, with_shards(platform, 2))) == ["0", "1"]
    assert status(instance, former) is Status.CANCELED


def test_more_shards_than_slots_wait_for_a_restart_of_up(
    platform: StandInPlatform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[tuple[int, int]] = []

    def streamer(_: StandInPlatform, shard: int, shards: int) -> None:
        shares.append((shard, shards))
        raise PlatformError("enough")

    monkeypatch.setattr(StandInPlatform, "streamer", streamer)
    twelve = with_shards(platform, 12)

    def look(began_with: int) -> tuple[int, str]:
        home = prepare(tmp_path / str(began_with), tmp_path / "code.sock", 7, began_with)
        with dg.DagsterInstance.from_config(str(home.folder)) as instance:
            first = tick(instance, twelve)
            later = json.dumps({str(shard): {"not_before": 1e12} for shard in range(12)})
            text = reason(tick(instance, twelve, later))
            stream_orderbook.execute_in_process(
                instance=instance, resources={"platform": twelve}, raise_on_error=False
            )
        return len(launched(first)), text

    launches, text = look(began_with=1)
    assert launches == 6
    assert "STREAM_SHARDS=12 needs a restart of `up`" in text
    assert "Dagster runs 8 at once, 2 of them for other jobs, and until then 6 share" in text
    launches, text = look(began_with=12)  # restarted, as it says
    assert launches == 12
    assert "STREAM_SHARDS" not in text
    assert shares == [(0, 6), (0, 12)]


def test_a_removed_shard_is_drained_by_one_last_run(
    instance: dg.DagsterInstance, platform: StandInPlatform, workers: list[Worker]
) -> None:
    two = with_shards(platform, 2)
    workers += [Worker(STUBBORN), Worker(STUBBORN)]  # they take their time to flush
    runs = [started_run(instance, workers[shard].identity, shard) for shard in (0, 1)]
    for shard in (0, 1):
        journal(two, shard)
        write_health(two, workers[shard].identity, shard=shard, shards=2)
    first = tick(instance, platform)  # STREAM_SHARDS is 1 again
    assert {status(instance, run) for run in runs} <= {Status.CANCELING, Status.CANCELED}
    assert "0" not in launched(
        first
    )  # shard 1 still had its markets; the drain waits for itself alone
    for shard in (0, 1):
        workers[shard].end()
        end(instance, runs[shard])
    lag = {"parquet": {"lag": 3}}
    write_health(platform, workers[1].identity, shard=1, state="stopped", shards=2, stores=lag)
    second = tick(instance, platform, first.cursor)
    assert launched(second) == ["0", "1"]
    workers.append(Worker(MEEK))
    drain = started_run(instance, workers[2].identity, 1)
    write_health(platform, workers[2].identity, shard=1, state="draining", last_frame_ns=0)
    later = json.dumps({"0": {"not_before": 1e12, "counted": runs[0]}})
    assert "drains" in reason(tick(instance, platform, later))
    workers[2].end()
    end(instance, drain)
    done = {"parquet": {"lag": 0}}
    write_health(platform, workers[2].identity, shard=1, state="stopped", stores=done)
    third = tick(instance, platform, second.cursor)
    assert launched(third) == ["0"]
    assert set(read_cursor(third.cursor)) == {0}


def test_a_run_that_has_drained_its_shard_succeeds(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    streamer = StandInStreamer(hour_report())
    streamer.when_dry = lambda which: setattr(which, "drained", True)
    platform.streamers.append(streamer)
    result = stream_orderbook.execute_in_process(
        instance=instance, resources={"platform": platform}, tags={SHARD_TAG: "3"}
    )
    assert result.success
    assert streamer.stopped.is_set()
    reported = instance.fetch_materializations(dg.AssetKey("orderbook_events"), limit=5).records
    assert [record.partition_key for record in reported] == ["2026-11-20-14:00"]

"""The sensor `alerts` on a real Dagster instance, with a real web server as channel."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import dagster as dg
import pytest
from dagster import DagsterRunStatus as Status
from dagster._core.errors import DagsterExecutionInterruptedError
from dagster._utils import get_run_crash_explanation

from kalshi_platform.commands import doctor
from kalshi_platform.health import incidents, metrics, planned_stop
from kalshi_platform.health.incidents import CALM_S, Severity
from kalshi_platform.health.outbox import Outbox, deliver_in_time
from kalshi_platform.orchestration import alerts as module
from kalshi_platform.orchestration.alerts import (
    FEED_ERROR_S,
    FEED_WARN_S,
    INTERRUPTED_S,
    WELL_S,
    alerts,
)
from kalshi_platform.orchestration.observation import SHARD_TAG
from kalshi_platform.orchestration.streamer import stream_orderbook
from kalshi_platform.processes import Identity
from kalshi_platform_tests.health.servers import Web, socket_server, web_server
from kalshi_platform_tests.orchestration.stand_in import StandInPlatform
from kalshi_platform_tests.orchestration.test_sensors import launch_failed, not_launched

SECRET = "s3cr3t"


class Outcome(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Whether the planted job and checks succeed."""

    good: bool = True


@dg.op
def work(outcome: Outcome) -> None:
    if not outcome.good:
        raise dg.Failure(description="The planted reason. Repair it.", allow_retries=False)


@dg.job
def planted() -> None:
    work()


def stop_worker() -> None:
    """Interrupt this process as Dagster does on SIGTERM to a worker."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)


@dg.op
def interrupted() -> None:
    stop_worker()


@dg.job
def interrupted_in_its_op() -> None:
    interrupted()


@dg.resource
def stopped_before(_: dg.InitResourceContext) -> None:
    stop_worker()


@dg.op(required_resource_keys={"stopped_before"})
def never() -> None:
    raise AssertionError


@dg.job(resource_defs={"stopped_before": stopped_before})
def interrupted_before_its_op() -> None:
    never()


@dg.asset
def orderbook_events() -> None:
    """A stand-in for the recorded asset."""


@dg.multi_asset_check(
    specs=[
        dg.AssetCheckSpec(name, asset="orderbook_events") for name in ("severe", "mild", "fresh")
    ]
)
def checks(outcome: Outcome) -> Iterator[dg.AssetCheckResult]:
    for name in ("severe", "mild", "fresh"):
        yield dg.AssetCheckResult(
            passed=outcome.good,
            asset_key="orderbook_events",
            check_name=name,
            severity=dg.AssetCheckSeverity.WARN if name == "mild" else dg.AssetCheckSeverity.ERROR,
            description=f"{name}: two numbers are missing.",
        )


checks_job = dg.define_asset_job("checks_job", dg.AssetSelection.checks(checks))


@functools.cache
def definitions(*, good: bool) -> dg.Definitions:
    return dg.Definitions(
        assets=[orderbook_events],
        asset_checks=[checks],
        jobs=[planted, checks_job],
        resources={"outcome": Outcome(good=good)},
    )


class Watch:
    """Ticks of the sensor, with a clock that the test moves."""

    def __init__(
        self, instance: dg.DagsterInstance, web: Web, folder: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.instance = instance
        self.web = web
        self.platform = StandInPlatform(
            overrides={
                "kalshi_data_dir": folder,
                "use_clickhouse": "0",
                "alert_webhook_url": web.url,
            }
        )
        self.cursor: str | None = None
        self.outbox = Outbox(lambda channel, message: channel.send(message))
        monkeypatch.setattr(module, "_outbox", lambda: self.outbox)
        self.ahead_s = 0.0
        true_time = time.time
        monkeypatch.setattr(time, "time", lambda: true_time() + self.ahead_s)

    def run(self, job: str, *, good: bool) -> str:
        """Run a planted job in this process."""
        found = definitions(good=good).resolve_job_def(job)
        return found.execute_in_process(instance=self.instance, raise_on_error=False).run_id

    def tick(self, after_s: float = 0.0) -> list[dict[str, Any]]:
        """Run a tick `after_s` later; returns the notices that it sent."""
        self.ahead_s += after_s
        before = len(self.web.bodies)
        with dg.build_sensor_context(
            instance=self.instance,
            cursor=self.cursor,
            resources={"platform": self.platform},
            definitions=definitions(good=True),
        ) as context:
            result = alerts(context)
        assert isinstance(result, dg.SensorResult)
        assert result.skip_reason is not None
        self.skip_message = result.skip_reason.skip_message or ""
        self.cursor = result.cursor
        assert self.outbox.wait(60)
        return [notice for body in self.web.bodies[before:] for notice in body["notices"]]

    def report(self, **values: Any) -> None:
        """Write the report of a healthy streamer, with `values` replaced."""
        own, now = Identity.own(), int(time.time() * 1e9)
        times = ("updated_ns", "started_ns", "last_frame_ns", "last_heard_ns", "last_durable_ns")
        folder = self.platform.settings().journal_dir(0)
        folder.mkdir(parents=True, exist_ok=True)
        healthy = {
            "pid": own.pid,
            "pid_started": own.started,
            "state": "streaming",
            "trouble": None,
        }
        content = {**healthy, **dict.fromkeys(times, now), "stores": {}, **values}
        (folder / "health.json").write_text(json.dumps(content))


@pytest.fixture
def watch(
    instance: dg.DagsterInstance,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Watch]:
    with web_server() as web:
        yield Watch(instance, web, str(tmp_path_factory.mktemp("data")), monkeypatch)


def test_a_healthy_platform_sends_nothing(watch: Watch) -> None:
    assert watch.tick() == []
    assert watch.skip_message == "Nothing is wrong."


def test_a_failed_run_is_reported_once_and_its_end(watch: Watch) -> None:
    run_id = watch.run("planted", good=False)
    (notice,) = watch.tick()
    assert (notice["event"], notice["title"]) == ("opened", "Run of planted failed")
    assert notice["sentence"] == "The planted reason. Repair it."
    assert notice["link"] == f"http://127.0.0.1:3000/runs/{run_id}"
    assert notice["runbook"] == "docs/operations.md: A run failed"
    watch.run("planted", good=False)
    assert watch.tick(30) == []
    watch.run("planted", good=True)
    assert watch.tick(30) == []
    (over,) = watch.tick(CALM_S)
    assert (over["event"], over["key"]) == ("resolved", "run:planted")


def test_hours_that_fail_together_are_one_incident(watch: Watch) -> None:
    for hour in range(20):
        run = watch.instance.create_run_for_job(
            planted, tags={"dagster/partition": f"2026-11-20-{hour:02d}:00"}
        )
        watch.instance.report_run_failed(run, "The worker is gone.")
    (notice,) = watch.tick()
    assert notice["title"].startswith("Run of planted failed (2026-11-20-19:00, ")
    assert notice["title"].endswith(" and 17 more)")
    assert notice["sentence"].endswith("The worker is gone.")


def test_a_replaced_streamer_run_is_over_when_the_next_has_lasted(
    watch: Watch,
) -> None:
    tags = {SHARD_TAG: "0"}
    failed = watch.instance.create_run_for_job(stream_orderbook, tags=tags)
    watch.instance.report_engine_event("The worker was killed by SIGKILL.", failed)
    watch.instance.report_run_failed(failed)  # as the code server does
    run = watch.instance.create_run_for_job(stream_orderbook, tags=tags, status=Status.STARTING)
    watch.instance.report_dagster_event(
        dg.DagsterEvent(event_type_value="PIPELINE_START", job_name=run.job_name), run.run_id
    )
    (notice,) = watch.tick()
    assert notice["title"] == "Run of stream_orderbook failed (shard 0)"
    assert notice["sentence"] == "The worker was killed by SIGKILL."
    assert watch.tick(WELL_S / 2) == []
    (over,) = watch.tick(WELL_S + CALM_S)
    assert over["event"] == "resolved"


UNREACHABLE = (
    "dagster._core.errors.DagsterUserCodeUnreachableError: Could not reach user code server."
    " gRPC Error code: UNAVAILABLE"
)


def test_a_later_interruption_does_not_end_a_failure(watch: Watch) -> None:
    fault: list[BaseException] = [ValueError("the disk is wet"), DagsterExecutionInterruptedError()]

    @dg.op
    def now_and_then() -> None:
        raise fault.pop(0)

    @dg.job
    def nightly() -> None:
        now_and_then()

    nightly.execute_in_process(instance=watch.instance, raise_on_error=False)
    (notice,) = watch.tick()
    assert "the disk is wet" in notice["sentence"]
    nightly.execute_in_process(instance=watch.instance, raise_on_error=False)
    assert watch.tick() == []
    assert watch.tick(CALM_S * 2) == []  # not resolved


@pytest.mark.parametrize("job", [interrupted_in_its_op, interrupted_before_its_op])
def test_a_run_that_was_ended_by_none_of_ours_alerts_at_once(
    watch: Watch, job: dg.JobDefinition, launched_by: Callable[[str], None]
) -> None:
    launched_by("up")
    data = watch.platform.settings().data_dir
    planned_stop.begin(data)
    job.execute_in_process(instance=watch.instance, raise_on_error=False)
    (notice,) = watch.tick()
    assert "No planned stop is on record: an out-of-memory daemon" in notice["sentence"]
    watch.ahead_s += 2 * planned_stop.TOGETHER_S  # another stop
    planned_stop.note(data)
    job.execute_in_process(instance=watch.instance, raise_on_error=False)  # after that stop
    assert watch.tick() == []
    assert watch.tick(CALM_S * 2) == []  # not resolved


@pytest.mark.parametrize("program", ["up", "dagster dev"])
def test_an_interrupted_run_under_dagster_dev_needs_no_note(
    watch: Watch, launched_by: Callable[[str], None], program: str
) -> None:
    """The code server of `dagster dev` notes no stop, whether or not `up` ran on the data folder before."""
    launched_by(program)
    planned_stop.begin(watch.platform.settings().data_dir)
    interrupted_in_its_op.execute_in_process(instance=watch.instance, raise_on_error=False)
    alerts = watch.tick()
    assert len(alerts) == (1 if program == "up" else 0)
    if not alerts:  # and not excused for good either
        (notice,) = watch.tick(INTERRUPTED_S)
        assert notice["sentence"].endswith("Run it again if nothing else has.")


@pytest.mark.parametrize("when", ["in its op", "before its op", "before it was launched"])
def test_an_interrupted_run_is_reported_only_if_not_repeated(watch: Watch, when: str) -> None:
    job = interrupted_in_its_op if when == "in its op" else interrupted_before_its_op

    def restart() -> None:
        known = watch.instance.get_runs_count()
        if when == "before it was launched":
            not_launched(watch.instance, watch.instance.create_run_for_job(job), UNREACHABLE)
        else:
            job.execute_in_process(instance=watch.instance, raise_on_error=False)
        assert watch.instance.get_runs_count() == known + 1
        assert watch.instance.get_runs(limit=1)[0].status is Status.FAILURE

    restart()
    assert watch.tick() == []
    assert watch.tick(INTERRUPTED_S / 2) == []
    done = watch.instance.create_run_for_job(job)
    watch.instance.report_dagster_event(
        dg.DagsterEvent(event_type_value="PIPELINE_SUCCESS", job_name=done.job_name), done.run_id
    )
    assert watch.tick(INTERRUPTED_S) == []
    restart()
    assert watch.tick(CALM_S) == []
    (notice,) = watch.tick(INTERRUPTED_S)
    assert notice["sentence"].endswith("Run it again if nothing else has.")
    done = watch.instance.create_run_for_job(job)  # what it says
    watch.instance.report_dagster_event(
        dg.DagsterEvent(event_type_value="PIPELINE_SUCCESS", job_name=done.job_name), done.run_id
    )
    watch.tick()
    (over,) = watch.tick(CALM_S)
    assert over["event"] == "resolved"


@pytest.mark.parametrize("launched", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_streamer_run_is_no_failure_a_killed_one_is(
    watch: Watch, number: signal.Signals, launched: bool
) -> None:
    run = watch.instance.create_run_for_job(stream_orderbook, tags={SHARD_TAG: "0"})
    if launched:
        explanation = get_run_crash_explanation(
            f"Run execution process for {run.run_id}", -int(number)
        )
        watch.instance.report_engine_event(explanation, run)
        watch.instance.report_run_failed(run)
    else:
        launch_failed(watch.instance, run, number)
    sent = [*watch.tick(), *watch.tick(INTERRUPTED_S)]
    assert [notice["title"] for notice in sent] == (
        [] if number is signal.SIGTERM else ["Run of stream_orderbook failed (shard 0)"]
    )


def test_a_canceled_run_is_not_reported(watch: Watch) -> None:
    watch.instance.report_run_canceled(watch.instance.create_run_for_job(planted))
    assert watch.tick() == []


def test_a_failed_run_is_forgotten_after_a_day(watch: Watch) -> None:
    watch.run("planted", good=False)
    assert len(watch.tick()) == 1
    (over,) = watch.tick(25 * 3600)
    assert over["event"] == "resolved"


def test_a_failed_check_and_its_recovery_are_reported(watch: Watch) -> None:
    watch.run("checks_job", good=False)
    (notice,) = watch.tick()
    assert notice["title"] == "Check severe of orderbook_events failed"
    assert notice["severity"] == "critical"
    assert notice["sentence"] == "severe: two numbers are missing."
    assert "checkDetail=severe" in notice["link"]
    watch.run("checks_job", good=True)
    watch.tick(30)
    (over,) = watch.tick(CALM_S)
    assert (over["event"], over["key"]) == ("resolved", "check:orderbook_events:severe")


def test_a_check_that_runs_just_now_keeps_its_last_result(watch: Watch) -> None:
    watch.run("checks_job", good=False)
    watch.tick()
    job = definitions(good=True).resolve_job_def("checks_job")
    watch.instance.create_run_for_job(job)  # plans its checks
    assert watch.tick(30) == []
    assert watch.tick(CALM_S) == []


def test_a_dead_streamer_is_reported_if_it_is_not_replaced(watch: Watch) -> None:
    watch.report()
    assert watch.tick() == []
    watch.report(pid_started=1.0)
    assert watch.tick(30) == []
    (notice,) = watch.tick(FEED_ERROR_S)
    assert notice["title"] == "Feed of shard 0: streamer down"
    assert notice["severity"] == "critical"
    watch.report()
    watch.tick(30)
    watch.report()
    watch.ahead_s += CALM_S
    watch.report()
    (over,) = watch.tick()
    assert over["event"] == "resolved"


def test_a_restart_within_a_minute_sends_nothing(watch: Watch) -> None:
    watch.report()
    assert watch.tick() == []
    watch.report(pid_started=1.0)  # its process is gone
    assert watch.tick(30) == []
    for after in (20.0, CALM_S, FEED_WARN_S):
        watch.ahead_s += after
        watch.report()
        assert watch.tick() == []


def test_a_stopped_streamer_is_reported_after_twelve_minutes(watch: Watch) -> None:
    watch.report(state="stopped")
    assert watch.tick() == []
    assert watch.tick(121.0) == []  # a restart could have been due until now
    assert watch.tick(FEED_WARN_S - 1.0) == []
    (notice,) = watch.tick(1.0)
    assert (notice["severity"], notice["title"]) == ("warning", "Feed of shard 0: stopped")
    for after in (30.0, CALM_S):
        watch.ahead_s += after
        watch.report()
        over = watch.tick()
    assert [notice["event"] for notice in over] == ["resolved"]


def test_an_unreachable_store_is_reported_later_as_a_warning(watch: Watch) -> None:
    store = {"lag": 9, "committed_ns": 1, "trouble": "ClickHouse is away.", "refused": False}
    watch.report(stores={"clickhouse": store})
    assert watch.tick() == []
    watch.ahead_s += FEED_WARN_S
    watch.report(stores={"clickhouse": store})
    (notice,) = watch.tick()
    assert (notice["severity"], notice["title"]) == (
        "warning",
        "Feed of shard 0: clickhouse behind",
    )


def test_two_faults_at_once_are_reported_and_closed_separately(watch: Watch) -> None:
    """The milder fault began first, and must not hide the other while it lasts."""
    store = {"lag": 9, "committed_ns": 1, "trouble": "ClickHouse is away.", "refused": False}
    behind: dict[str, Any] = {"stores": {"clickhouse": store}}
    watch.report(**behind)
    assert watch.tick() == []
    watch.ahead_s += FEED_WARN_S
    watch.report(**behind)
    assert [notice["title"] for notice in watch.tick()] == ["Feed of shard 0: clickhouse behind"]
    both = behind | {"state": "connecting", "last_heard_ns": 1}
    watch.report(**both)
    assert watch.tick() == []
    watch.ahead_s += FEED_ERROR_S
    watch.report(**both)
    (worse,) = watch.tick()
    assert (worse["title"], worse["severity"]) == ("Feed of shard 0: disconnected", "critical")
    for after in (30.0, CALM_S):
        watch.ahead_s += after
        watch.report(**behind)
        over = watch.tick()
    assert [(notice["event"], notice["title"]) for notice in over] == [("resolved", worse["title"])]
    for after in (30.0, CALM_S):
        watch.ahead_s += after
        watch.report()
        over = watch.tick()
    assert [(notice["event"], notice["title"]) for notice in over] == [
        ("resolved", "Feed of shard 0: clickhouse behind")
    ]


def test_a_quiet_exchange_and_maintenance_send_nothing(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    hour_ns = 3600 * 10**9
    for _ in range(3):
        watch.ahead_s += FEED_WARN_S
        watch.report(state="quiet", last_frame_ns=int(time.time() * 1e9) - hour_ns)
        assert watch.tick() == []
    local = datetime.fromtimestamp(time.time(), ZoneInfo("America/New_York")) + timedelta(days=1)
    thursday = local + timedelta(days=(3 - local.weekday()) % 7)
    begun = thursday.replace(hour=3, minute=30, second=0).timestamp()
    watch.ahead_s += begun - time.time()
    monkeypatch.setattr(module, "FEED_ERROR_S", 0.0)
    an_hour_ago = int((begun - 3600) * 1e9)
    watch.report(state="connecting", last_frame_ns=an_hour_ago, last_heard_ns=an_hour_ago)
    assert watch.tick() == []
    watch.ahead_s += 3 * 3600
    watch.report(state="connecting", last_frame_ns=an_hour_ago, last_heard_ns=an_hour_ago)
    (notice,) = watch.tick()
    assert notice["title"] == "Feed of shard 0: disconnected"


def test_a_damaged_report_is_reported_and_does_not_end_the_tick(watch: Watch) -> None:
    watch.report()
    path = watch.platform.settings().journal_dir(0) / "health.json"
    path.write_text('{"pid": 1')
    watch.tick()
    watch.ahead_s += FEED_WARN_S
    (notice,) = watch.tick()
    assert notice["title"] == "Feed of shard 0: no report"


def test_a_failing_channel_is_in_the_tick_without_its_secret(watch: Watch) -> None:
    watch.web.statuses = [500]
    watch.run("planted", good=False)
    assert watch.tick() == []
    assert watch.tick(1) == []
    assert "webhook: The host of ALERT_WEBHOOK_URL" in watch.skip_message
    assert "1 notices wait for it" in watch.skip_message
    assert SECRET not in watch.skip_message + (watch.cursor or "")
    settings = watch.platform.settings()
    assert metrics.channel_troubles(settings.data_dir)[0] in watch.skip_message
    check, _ = doctor.CHECKS["alerts"]
    assert check(settings).mark is doctor.Mark.ODD
    watch.web.statuses = [200]
    (notice,) = watch.tick(incidents.BACKOFF_S)
    assert notice["event"] == "opened"


def test_without_a_channel_the_tick_says_what_is_wrong(watch: Watch) -> None:
    watch.platform = StandInPlatform(overrides=watch.platform.overrides | {"alert_webhook_url": ""})
    watch.run("planted", good=False)
    assert watch.tick() == []
    assert "1 open: Run of planted failed" in watch.skip_message
    assert "No channel is set" in watch.skip_message
    assert incidents.counts(incidents.read(watch.cursor))[Severity.WARNING] == 1


def test_a_cursor_that_is_not_a_ledger_is_replaced(watch: Watch) -> None:
    watch.cursor = "{"
    watch.run("planted", good=False)
    (notice,) = watch.tick()
    assert notice["event"] == "opened"


def test_a_slow_channel_delays_no_tick_and_is_named_later(
    watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drip(caller: socket.socket) -> None:
        caller.recv(1 << 16)
        while True:
            caller.sendall(b"H")
            time.sleep(0.1)

    with socket_server(drip) as port:
        url = f"http://127.0.0.1:{port}/{SECRET}"
        watch.platform = StandInPlatform(
            overrides=watch.platform.overrides | {"alert_webhook_url": url}
        )
        watch.outbox = Outbox(lambda channel, message: deliver_in_time(channel, message, 4.0))
        watch.run("planted", good=False)
        waited = Outbox.wait
        monkeypatch.setattr(Outbox, "wait", lambda *_: True)  # the tick itself is measured
        began = time.monotonic()
        for _ in range(3):
            watch.tick()
        assert time.monotonic() - began < 3.0
        assert waited(watch.outbox, 60)
        watch.tick(1)
    assert (
        "did not accept the message within 4 s; it is sent again later. 1 notices wait for it"
        in watch.skip_message
    )
    assert SECRET not in watch.skip_message


def test_a_lost_cursor_repeats_nothing_an_emptied_one_does(
    watch: Watch,
) -> None:
    watch.tick()
    before = watch.cursor
    watch.run("planted", good=False)
    assert len(watch.tick()) == 1
    watch.cursor = before  # Dagster gave the tick up
    assert watch.tick(30) == []
    assert "1 open" in watch.skip_message
    watch.cursor = None  # a person has emptied it
    (notice,) = watch.tick(30)
    assert notice["event"] == "opened"

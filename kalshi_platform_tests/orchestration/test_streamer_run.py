"""A run of `stream_orderbook`: what it reports to Dagster, and how it ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import dagster as dg
import pytest
from dagster import DagsterRunStatus as Status

from kalshi_platform.errors import PlatformError
from kalshi_platform.health import planned_stop
from kalshi_platform.orchestration.metadata import materializations, partition_key
from kalshi_platform.orchestration.observation import PROCESS_TAG, SHARD_TAG, SOURCE_TAG
from kalshi_platform.orchestration.streamer import stream_orderbook, unreported
from kalshi_platform.processes import Identity
from kalshi_platform_tests.orchestration.stand_in import (
    DATASETS,
    HOUR,
    StandInPlatform,
    StandInStreamer,
    hour_report,
    interrupt,
)


def fail_with(error: BaseException) -> StandInStreamer:
    streamer = StandInStreamer()

    def fail(which: StandInStreamer) -> None:
        which.fault = error

    streamer.when_dry = fail
    return streamer


def execute(
    instance: dg.DagsterInstance,
    platform: StandInPlatform,
    streamer: StandInStreamer,
    *,
    recycle_after_s: float = 86_400,
) -> dg.DagsterRun:
    """Execute a run in this process; the stand-in streamer decides how it ends."""
    platform.streamers.append(streamer)
    known = {run.run_id for run in instance.get_runs()}
    stream_orderbook.execute_in_process(
        instance=instance,
        resources={"platform": platform},
        run_config={"ops": {"record_shard": {"config": {"recycle_after_s": recycle_after_s}}}},
        raise_on_error=False,
    )
    return next(run for run in instance.get_runs() if run.run_id not in known)


def reported(instance: dg.DagsterInstance, dataset: str) -> list[tuple[str | None, object]]:
    """Partition and `complete` of each materialisation, oldest first."""
    records = instance.fetch_materializations(dg.AssetKey(dataset), limit=100, ascending=True)
    found: list[tuple[str | None, object]] = []
    for record in records.records:
        event = record.asset_materialization
        assert event is not None
        found.append((record.partition_key, event.metadata["complete"].value))
    return found


def errors(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    return "\n".join(str(entry.dagster_event) for entry in instance.all_logs(run.run_id))


def test_each_hour_is_reported_to_its_partition_of_each_dataset(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    streamer = StandInStreamer(hour_report(complete=False), hour_report())
    streamer.when_dry = interrupt
    execute(instance, platform, streamer)
    for dataset in DATASETS:
        assert reported(instance, dataset) == [
            ("2026-11-20-14:00", False),
            ("2026-11-20-14:00", True),
        ]


def test_a_report_carries_what_a_person_wants_to_see() -> None:
    event = next(iter(materializations(hour_report(), "simulator")))
    shown = {key: value.value for key, value in event.metadata.items()}
    assert shown["rows"] == shown["dagster/row_count"] == 1000
    assert shown["coverage (%)"] == 99.972
    assert shown["markets"] == 12
    assert shown["gaps"] == 1
    assert shown["bytes"] == 4096
    assert shown["source"] == "simulator"
    assert shown["first"] == HOUR.timestamp()
    assert isinstance(event.metadata["path"], dg.PathMetadataValue)


def test_an_interrupt_flushes_the_streamer_and_cancels_the_run(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    streamer = StandInStreamer()
    streamer.when_dry = interrupt
    run = execute(instance, platform, streamer)
    assert streamer.stopped.is_set()
    assert run.status is Status.CANCELED


@pytest.mark.parametrize("when", ["it names its process", "its modules are loaded"])
def test_an_interrupt_before_the_recording_began_cancels_the_run(
    instance: dg.DagsterInstance,
    platform: StandInPlatform,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    streamer = StandInStreamer()

    def interrupted(*_: object) -> None:
        interrupt(streamer)

    if when == "it names its process":
        monkeypatch.setattr("kalshi_platform.orchestration.streamer.register_process", interrupted)
    else:
        monkeypatch.setattr(StandInPlatform, "streamer", interrupted)
    assert execute(instance, platform, streamer).status is Status.CANCELED


def test_a_run_killed_while_it_flushes_counts_as_stopped(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    streamer = StandInStreamer()
    streamer.when_dry = interrupt
    seen: list[Status] = []
    streamer.when_stopping = lambda _: seen.extend(run.status for run in instance.get_runs())
    assert execute(instance, platform, streamer).status is Status.CANCELED
    assert seen == [Status.CANCELING]  # the supervisor calls canceled what ends so


@pytest.mark.parametrize("who", ["none of them", "up", "a person, in the UI"])
@pytest.mark.parametrize("when", ["it records", "before"])
def test_an_unplanned_sigterm_is_a_failure_that_says_so(
    instance: dg.DagsterInstance,
    platform: StandInPlatform,
    launched_by: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    *,
    who: str,
    when: str,
) -> None:
    monkeypatch.setattr("kalshi_platform.orchestration.streamer.NOTED_S", 0.2)
    launched_by("up")
    data = platform.settings().data_dir
    planned_stop.begin(data)
    streamer = StandInStreamer()

    def end(*_: object) -> None:
        if who == "up":
            planned_stop.note(data)
        elif who != "none of them":  # the remedy: Terminate
            [run] = instance.get_runs()
            instance.report_run_canceling(run)
        interrupt(streamer)

    streamer.when_dry = end
    if when == "before":
        monkeypatch.setattr(StandInPlatform, "streamer", end)
    run = execute(instance, platform, streamer)
    assert streamer.stopped.is_set() == (when == "it records")
    assert run.status is (Status.FAILURE if who == "none of them" else Status.CANCELED)
    accused = "No planned stop is on record: an out-of-memory daemon"
    assert (accused in errors(instance, run)) == (who == "none of them")


@pytest.mark.parametrize("notes", ["deleted", "never made", "damaged", "of hours ago"])
@pytest.mark.parametrize("program", ["up", "a container", "dagster dev"])
def test_an_unnoted_stop_fails_only_runs_of_a_noting_server(
    instance: dg.DagsterInstance,
    platform: StandInPlatform,
    launched_by: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    *,
    notes: str,
    program: str,
) -> None:
    """The code server of `dagster dev` is Dagster's own, which notes no stop."""
    monkeypatch.setattr("kalshi_platform.orchestration.streamer.NOTED_S", 0.2)
    launched_by(program)
    data = platform.settings().data_dir
    file = data / "checks" / "planned_stops.json"
    if notes == "of hours ago":
        with monkeypatch.context() as patched:
            hours_ago = time.time() - 7200.0
            patched.setattr(time, "time", lambda: hours_ago)
            planned_stop.note(data)
        read = instance.get_run_record_by_id

        def read_older(run_id: str) -> dg.RunRecord | None:
            record = read(run_id)
            assert record is not None
            return record._replace(create_timestamp=datetime.now(UTC) - timedelta(hours=3))

        monkeypatch.setattr(instance, "get_run_record_by_id", read_older)
    elif notes != "never made":  # `up` ran here
        planned_stop.note(data)
        file.write_bytes(b"x")
        if notes == "deleted":
            file.unlink()
    streamer = StandInStreamer()
    streamer.when_dry = interrupt
    run = execute(instance, platform, streamer)
    assert streamer.stopped.is_set()
    judged = program != "dagster dev"
    assert run.status is (Status.FAILURE if judged else Status.CANCELED)
    assert ("No planned stop is on record" in errors(instance, run)) == judged


def test_a_stop_noted_after_the_signal_is_planned(
    instance: dg.DagsterInstance,
    platform: StandInPlatform,
    launched_by: Callable[[str], None],
) -> None:
    """Stopping a container sends SIGTERM to all its processes at once."""
    launched_by("up")
    data = platform.settings().data_dir
    planned_stop.begin(data)
    streamer = StandInStreamer()
    streamer.when_dry = interrupt
    streamer.when_stopping = lambda _: planned_stop.note(data)
    assert execute(instance, platform, streamer).status is Status.CANCELED


@pytest.mark.parametrize("asked_in_the_ui", [False, True])
def test_a_stop_that_loses_frames_fails_the_run_with_the_count(
    instance: dg.DagsterInstance, platform: StandInPlatform, asked_in_the_ui: bool
) -> None:
    streamer = StandInStreamer()
    streamer.loss = PlatformError("1,234 frames (567 bytes) could not be written.")
    streamer.on_stop = [hour_report()]

    def end(which: StandInStreamer) -> None:
        if asked_in_the_ui:
            [run] = instance.get_runs()
            instance.report_run_canceling(run)
        interrupt(which)

    streamer.when_dry = end
    run = execute(instance, platform, streamer)
    assert run.status is Status.FAILURE
    assert "1,234 frames (567 bytes)" in errors(instance, run)
    assert reported(instance, "orderbook_events") == [("2026-11-20-14:00", True)]


def test_a_second_interrupt_does_not_break_the_flush_off(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    streamer = StandInStreamer()
    streamer.when_dry = streamer.when_stopping = interrupt
    streamer.on_stop = [hour_report()]
    run = execute(instance, platform, streamer)
    assert streamer.stopped.is_set()
    assert reported(instance, "orderbook_events") == [("2026-11-20-14:00", True)]
    assert run.status is Status.CANCELED


def test_hours_sealed_by_the_flush_are_reported_too(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    streamer = StandInStreamer()
    streamer.when_dry = interrupt
    streamer.on_stop = [hour_report(), hour_report(HOUR + timedelta(hours=1), complete=False)]
    execute(instance, platform, streamer)
    assert reported(instance, "orderbook_events") == [
        ("2026-11-20-14:00", True),
        ("2026-11-20-15:00", False),
    ]


def test_a_streamer_that_fails_fails_the_run_with_its_sentence(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    streamer = fail_with(PlatformError("The disk is full. Make room."))
    run = execute(instance, platform, streamer)
    assert run.status is Status.FAILURE
    assert streamer.stopped.is_set()
    assert "The disk is full. Make room." in errors(instance, run)


def test_a_streamer_that_cannot_start_fails_its_run(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    streamer = StandInStreamer()
    streamer.refuses = PlatformError("Process 7 writes this journal. End it.")
    run = execute(instance, platform, streamer)
    assert run.status is Status.FAILURE
    assert "Process 7 writes this journal. End it." in errors(instance, run)


def test_a_run_says_which_process_shard_and_source_it_has(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    run = execute(instance, platform, fail_with(PlatformError("enough")))
    assert Identity.parse(run.tags[PROCESS_TAG]) == Identity.own()
    assert run.tags[SHARD_TAG] == "0"
    assert run.tags[SOURCE_TAG] == "simulator"


def test_a_run_given_up_before_it_came_up_records_nothing(
    instance: dg.DagsterInstance, platform: StandInPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = instance.get_run_by_id

    def given_up(run_id: str) -> dg.DagsterRun | None:
        run = fetch(run_id)
        if run is not None and run.status is Status.STARTED:
            instance.report_run_failed(run, "its worker did not come up")
        return fetch(run_id)

    streamer = StandInStreamer(hour_report())
    monkeypatch.setattr(instance, "get_run_by_id", given_up)
    run = execute(instance, platform, streamer)
    assert PROCESS_TAG not in run.tags
    assert reported(instance, "orderbook_events") == []


def test_an_old_run_ends_when_a_successor_is_queued(
    instance: dg.DagsterInstance,
    platform: StandInPlatform,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kalshi_platform.orchestration.streamer.SUCCESSOR_S", 0.05)
    looks = []

    def queue_after_three_looks(streamer: StandInStreamer) -> None:
        looks.append(streamer.stopped.is_set())
        if len(looks) == 3:
            instance.create_run_for_job(
                stream_orderbook, tags={SHARD_TAG: "0"}, status=Status.NOT_STARTED
            )

    streamer = StandInStreamer()
    streamer.when_dry = queue_after_three_looks
    platform.streamers.append(streamer)
    result = stream_orderbook.execute_in_process(
        instance=instance,
        resources={"platform": platform},
        run_config={"ops": {"record_shard": {"config": {"recycle_after_s": 0.0}}}},
    )
    assert result.success
    assert len(looks) >= 3
    assert streamer.stopped.is_set()


def test_heartbeats_stay_out_of_the_event_log(
    instance: dg.DagsterInstance,
    platform: StandInPlatform,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("kalshi_platform.orchestration.streamer.HEARTBEAT_S", 0.0)
    beats = []

    def stop_after_twenty(streamer: StandInStreamer) -> None:
        beats.append(1)
        if len(beats) == 20:
            interrupt(streamer)

    streamer = StandInStreamer()
    streamer.when_dry = stop_after_twenty
    with caplog.at_level(logging.INFO, "kalshi_platform"):
        run = execute(instance, platform, streamer)
    assert sum("last frame" in message for message in caplog.messages) >= 15
    assert not [log for log in instance.all_logs(run.run_id) if "last frame" in log.user_message]


NOW = datetime(2026, 11, 20, 17, 30, tzinfo=UTC)


def lay_down(platform: StandInPlatform, hour: datetime, *, complete: bool = True) -> None:
    platform.hours[hour] = hour_report(hour, complete=complete)


def hours_left(instance: dg.DagsterInstance, platform: StandInPlatform) -> list[str]:
    return [partition_key(report.hour) for report in unreported(instance, platform, NOW)]


def test_hours_sealed_without_a_run_are_reported_later(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    lay_down(platform, HOUR)
    lay_down(platform, HOUR + timedelta(hours=1))
    lay_down(platform, HOUR + timedelta(hours=2), complete=False)
    assert hours_left(instance, platform) == ["2026-11-20-14:00", "2026-11-20-15:00"]
    for event in materializations(hour_report(), "exchange"):
        instance.report_runless_asset_event(event)
    assert hours_left(instance, platform) == ["2026-11-20-15:00"]


def test_an_hour_reported_as_open_is_reported_again_when_sealed(
    instance: dg.DagsterInstance, platform: StandInPlatform
) -> None:
    lay_down(platform, HOUR)
    for event in materializations(hour_report(complete=False), "exchange"):
        instance.report_runless_asset_event(event)
    assert hours_left(instance, platform) == ["2026-11-20-14:00"]


def test_an_unreadable_hour_delays_neither_others_nor_recording(
    instance: dg.DagsterInstance, platform: StandInPlatform, caplog: pytest.LogCaptureFixture
) -> None:
    platform.hours[HOUR] = PlatformError("A file of the hour is torn")
    lay_down(platform, HOUR + timedelta(hours=1))
    assert hours_left(instance, platform) == ["2026-11-20-15:00"]
    assert "Hour 2026-11-20-14:00 cannot be read: A file of the hour is torn" in caplog.text

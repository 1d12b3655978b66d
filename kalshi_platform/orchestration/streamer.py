"""`stream_orderbook`: the long run that records a shard, and reports its hours to Dagster.

The op is a thin host: capture and load happen in the streamer's own threads. It goes on until it
is interrupted, until the streamer fails, or until a successor waits for a run that is a day old.
Its heartbeat goes to the run's output (stderr), not to the event log, which nothing purges.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import dagster as dg
from dagster._core.errors import DagsterExecutionInterruptedError
from dagster._utils.interrupts import capture_interrupts
from pydantic import Field

from kalshi_platform.errors import PlatformError, SettingsError, StoreUnavailable
from kalshi_platform.orchestration import observation, run_failures
from kalshi_platform.orchestration.console import output_log
from kalshi_platform.orchestration.metadata import materializations, partition_key
from kalshi_platform.orchestration.observation import (
    PROCESS_TAG,
    SHARD_TAG,
    SOURCE_TAG,
    waiting_runs,
)
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.orchestration.supervisor import BLOCKED, RECYCLE_S
from kalshi_platform.processes import Identity
from kalshi_platform.schema import STREAM_EVENTS

if TYPE_CHECKING:
    from kalshi_platform.archive.hours import HourReport
    from kalshi_platform.recorder.streamer import Health, Streamer

HEARTBEAT_S = 60.0
"""Between two lines in the run's output."""
SUCCESSOR_S = 5.0
"""Between two looks for a successor, once the run is old enough to be relieved."""
DRAIN_S = 8.0
"""For the streamer to flush; whoever ends the process waits a little longer than this."""
HEAD_START_S = 10.0
"""For the streamer to record, before unreported hours are looked for."""
HURRY_S = 3.0
"""The same where another STREAM_SHARDS is taken up: nothing is recorded until all have ended, and the journal has what
is not loaded."""
NOTED_S = 2.0
"""For the note of a planned stop: who ends a whole container reaches the run as soon as the one who notes."""
UNASKED = f"SIGTERM ended it; what it had received is kept. {run_failures.UNASKED}"
_CATCH_UP_HOURS = 48
"""How far back hours are looked for that were sealed while nobody could report them."""

log = logging.getLogger(__name__)


class StreamConfig(dg.Config):
    """How one streamer run behaves."""

    recycle_after_s: float = Field(
        RECYCLE_S, description="Age at which the run makes room for a successor that waits."
    )


class _Relieved(Exception):
    """A successor waits, and this run is old enough to make room."""


@dg.op(
    name="record_shard",
    description="Records the order book: capture, journal, load. Reports each hour to its assets.",
)
def record_shard(
    context: dg.OpExecutionContext, config: StreamConfig, platform: KalshiResource
) -> None:
    """Record one shard until told to end."""
    try:
        introduce(context)
        _record(context, config, platform)
    except DagsterExecutionInterruptedError:
        if not asked_to_end(context, platform, patience_s=NOTED_S):
            raise dg.Failure(description=UNASKED, allow_retries=False) from None
        call_it_canceled(context)
        raise


def _record(context: dg.OpExecutionContext, config: StreamConfig, platform: KalshiResource) -> None:
    shard = int(context.run.tags.get(SHARD_TAG, "0"))
    with as_failure(), output_log(platform.settings(), shard=shard, run_id=context.run_id):
        shards = observation.shards(context.instance, platform.settings())
        source = platform.source
        context.instance.add_run_tags(context.run_id, {SHARD_TAG: str(shard), SOURCE_TAG: source})
        streamer = platform.streamer(shard, shards)
        host = _Host(context, streamer, source)
        try:
            streamer.start()
            context.log.info(f"Recording shard {shard} from the {source}.")
            host.await_frames()
            if shard == 0:  # one of them tells it, and this one there always is
                for report in unreported(context.instance, platform, datetime.now(UTC)):
                    host.report(report)
            host.record(shard, config.recycle_after_s)
            host.stop()
            context.log.info(
                f"Drained: shard {shard} is no longer configured, and all it had is stored."
            )
        except DagsterExecutionInterruptedError:
            try:  # first: a run that is killed while it flushes was asked to end, too
                if asked_to_end(context, platform):
                    call_it_canceled(context)
            finally:  # whatever became of Dagster's database meanwhile
                stored = host.stop(_drain_s(context, platform, shards))
            context.log.info(
                "Ended; every store has everything that was received."
                if stored
                else "Ended; what is not loaded yet is in the journal, for the next run."
            )
            raise
        except _Relieved:
            host.stop()
            context.log.info("A day old: the next run goes on.")
        except BaseException:
            host.stop()
            raise


@dg.job(
    name="stream_orderbook",
    executor_def=dg.in_process_executor,
    tags={SHARD_TAG: "0", "dagster/priority": "100"},
    description=(
        "The recording itself: one long run per shard (STREAM_SHARDS), kept alive by"
        " streamer_supervisor. A run of a shard that is no longer configured loads what its journal"
        " still has, and ends."
        " Terminate it and the supervisor starts it again; stop the sensor first to stop it."
    ),
)
def stream_orderbook() -> None:
    """One op."""
    record_shard()


class _Host:
    """Carries what the streamer has to say to Dagster; nothing it was handed gets lost."""

    def __init__(self, context: dg.OpExecutionContext, streamer: "Streamer", source: str) -> None:
        self._context = context
        self._streamer = streamer
        self._source = source
        self._unsaid: HourReport | None = None

    def await_frames(self) -> None:
        """Leave the interpreter to the streamer until it records, or for a while."""
        ends = time.monotonic() + HEAD_START_S
        while not self._streamer.health().last_frame_ns and time.monotonic() < ends:
            if self._streamer.failure() is not None or self._streamer.drained:
                return
            time.sleep(0.1)

    def record(self, shard: int, recycle_after_s: float) -> None:
        """Until the streamer fails (`dg.Failure`), a successor may take over (`_Relieved`), or, where
        a shard is only drained, nothing is left."""
        began = time.monotonic()
        beat = looked = 0.0
        while not self._streamer.drained:
            report = self._streamer.next_report(timeout_s=1.0)
            if report is not None:
                self.report(report)
            failure = self._streamer.failure()
            if failure is not None:
                raise failure
            now = time.monotonic()
            if now - beat >= HEARTBEAT_S:
                beat = now
                log.info("%s", heartbeat(self._streamer.health()))
            if now - began >= recycle_after_s and now - looked >= SUCCESSOR_S:
                looked = now
                if waiting_runs(self._context.instance, shard) and self._may_end:
                    raise _Relieved

    @property
    def _may_end(self) -> bool:
        """Whether an end would lose nothing: a disk that is blocked would not take the rest."""
        return self._streamer.health().state != BLOCKED

    def report(self, report: "HourReport") -> None:
        """One event per dataset of the hour. An interrupt in between leaves it to `stop`."""
        self._unsaid = report
        for event in materializations(report, self._source):
            self._context.log_event(event)
        state = "sealed" if report.complete else "open"
        log.info("Reported hour %s (%s).", partition_key(report.hour), state)
        self._unsaid = None

    def stop(self, timeout_s: float = DRAIN_S) -> bool:
        """Drain and flush; then say what is still unsaid. True where every store has everything.

        Raises `JournalError` where something that was received is lost: such a run has failed. Who asks again for the end, as a supervisor and a person may do at once, does not break it off.
        """
        with capture_interrupts():
            flushed = self._streamer.stop(timeout_s=timeout_s)
            if self._unsaid is not None:
                self.report(self._unsaid)
            while (report := self._streamer.next_report(timeout_s=0.0)) is not None:
                self.report(report)
        if self._streamer.loss is not None:
            self._fail_although_canceled(self._streamer.loss)
            raise self._streamer.loss
        return flushed

    def _fail_although_canceled(self, loss: PlatformError) -> None:
        """Dagster calls a run canceled that was to be terminated, whatever its op raises."""
        instance = self._context.instance
        run = instance.get_run_by_id(self._context.run_id)
        if run is not None and run.status == dg.DagsterRunStatus.CANCELING:
            instance.report_run_failed(run, str(loss))


def introduce(context: dg.OpExecutionContext) -> None:
    """The first act: say which process this run is, or end if it was given up meanwhile.

    Raises `dg.Failure` when the run has been marked as ended: another one has its place.
    """
    run = context.instance.get_run_by_id(context.run_id)
    if run is not None and run.is_finished:
        raise dg.Failure(
            description="This run was given up before it came up; another has its place.",
            allow_retries=False,
        )
    context.instance.add_run_tags(context.run_id, {PROCESS_TAG: str(Identity.own())})


def asked_to_end(
    context: dg.OpExecutionContext, platform: KalshiResource, patience_s: float = 0.0
) -> bool:
    """Whether the platform, or a person in Dagster, asked for the end or may have, as far as that shows in time."""
    ends = time.monotonic() + patience_s
    with capture_interrupts():
        while not _asked(context, platform):
            if time.monotonic() >= ends:
                return False
            time.sleep(0.05)
    return True


def _asked(context: dg.OpExecutionContext, platform: KalshiResource) -> bool:
    record = context.instance.get_run_record_by_id(context.run_id)
    if record is None or record.dagster_run.is_finished:
        return True
    if record.dagster_run.status == dg.DagsterRunStatus.CANCELING:
        return True
    try:
        return run_failures.may_be_asked(record, platform.settings().data_dir, time.time())
    except SettingsError:  # `.env` is being changed
        return True


def _drain_s(context: dg.OpExecutionContext, platform: KalshiResource, shards: int) -> float:
    """How long a streamer that shares the markets among so many may flush."""
    try:
        wanted = observation.shards(context.instance, platform.settings())
    except SettingsError:
        return DRAIN_S
    return DRAIN_S if wanted == shards else HURRY_S


def call_it_canceled(context: dg.OpExecutionContext) -> None:
    """Who asked for the end by a signal meant what Terminate in the UI does: canceled, not failed."""
    with capture_interrupts():
        run = context.instance.get_run_by_id(context.run_id)
        if run is not None and not run.is_finished and run.status != dg.DagsterRunStatus.CANCELING:
            context.instance.report_run_canceling(run, "Interrupted by a signal.")


def unreported(
    instance: dg.DagsterInstance, platform: KalshiResource, now: datetime
) -> "Iterator[HourReport]":
    """Hours that were sealed while nobody could report them (a crash, `stream` without Dagster).

    An hour that cannot be read is named in the log and left out: recording does not wait for it.
    """
    this_hour = now.replace(minute=0, second=0, microsecond=0)
    past = [this_hour - timedelta(hours=back) for back in range(_CATCH_UP_HOURS, 0, -1)]
    # stream_events has rows in every hour that was recorded at all.
    said = _said_complete(instance, STREAM_EVENTS.name, [partition_key(hour) for hour in past])
    tries = 3
    for hour in past:
        key = partition_key(hour)
        if key in said:
            continue
        try:
            if platform.is_sealed(hour):
                yield platform.describe(hour)
        except StoreUnavailable as error:
            log.warning(
                "Hour %s cannot be had now, and is reported after the next start: %s", key, error
            )
            tries -= 1
            if not tries:  # the archive is away, and each hour would be waited for
                return
        except (PlatformError, OSError, ValueError) as error:  # a damaged file, whichever
            log.error("Hour %s cannot be read: %s. Materialise it to build it again.", key, error)


def _said_complete(instance: dg.DagsterInstance, asset: str, keys: list[str]) -> set[str]:
    """Partitions whose latest materialisation says that the hour is complete."""
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=keys), limit=500
    ).records
    latest: dict[str, bool] = {}
    for record in records:  # newest first
        event = record.asset_materialization
        if record.partition_key is not None and event is not None:
            complete = event.metadata.get("complete")
            latest.setdefault(record.partition_key, complete is not None and complete.value is True)
    return {key for key, complete in latest.items() if complete}


def heartbeat(health: "Health") -> str:
    """One calm line."""
    trouble = f"; {health.trouble}" if health.trouble else ""
    return (
        f"{health.state}: {health.frames:,} frames, {health.lag_frames:,} not loaded yet;"
        f" last frame {_ago(health.last_frame_ns)}, last durable write {_ago(health.last_durable_ns)}"
        f"{trouble}"
    )


def _ago(ns: int) -> str:
    return f"{time.time() - ns / 1e9:.1f} s ago" if ns else "not yet"


@contextmanager
def as_failure() -> Iterator[None]:
    """What a person can mend fails the run with its sentence; the traceback stays beneath."""
    try:
        yield
    except PlatformError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error

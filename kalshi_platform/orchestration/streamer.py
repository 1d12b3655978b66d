"""The job `stream_orderbook`: a long run that records a shard and reports its hours to Dagster.

The op only hosts the streamer, whose own threads capture and load. It runs until it is interrupted, until the
streamer fails, or, once it is a day old, until a successor is queued. Its heartbeat is written to the run's
output (stderr), not to the event log, which would grow with it.
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
"""Seconds between two heartbeats in the run's output."""
SUCCESSOR_S = 5.0
"""Seconds between two checks for a successor, once the run is a day old."""
DRAIN_S = 8.0
"""Seconds for the streamer to flush; less than the grace period of whatever stops the process."""
HEAD_START_S = 10.0
"""Seconds for the streamer to start recording before unreported hours are searched."""
HURRY_S = 3.0
"""Seconds to flush when STREAM_SHARDS has changed: nothing is recorded until all shards have ended, and the journal
keeps what is not loaded."""
NOTED_S = 2.0
"""Seconds to wait for the note of a planned stop: a signal to a whole container reaches the run and the process that
writes the note at the same time."""
UNPLANNED = f"SIGTERM ended it; what it had received is kept. {run_failures.UNPLANNED}"
_CATCH_UP_HOURS = 48
"""Hours back that are searched for hours that were sealed while no run could report them."""

log = logging.getLogger(__name__)


class StreamConfig(dg.Config):
    """Configuration of a streamer run."""

    recycle_after_s: float = Field(
        RECYCLE_S, description="Age in seconds from which the run ends when a successor is queued."
    )


class _Relieved(Exception):
    """A successor is queued, and this run is old enough to end."""


@dg.op(
    name="record_shard",
    description="Records the order book: capture, journal, load. Reports each hour to its assets.",
)
def record_shard(
    context: dg.OpExecutionContext, config: StreamConfig, platform: KalshiResource
) -> None:
    """Record one shard until the run is stopped."""
    try:
        register_process(context)
        _record(context, config, platform)
    except DagsterExecutionInterruptedError:
        if not is_planned_end(context, platform, patience_s=NOTED_S):
            raise dg.Failure(description=UNPLANNED, allow_retries=False) from None
        report_canceling(context)
        raise


def _record(context: dg.OpExecutionContext, config: StreamConfig, platform: KalshiResource) -> None:
    """Host the shard's streamer until it ends, and stop it gracefully in every case."""
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
            if shard == 0:  # a single shard reports them, and shard 0 always exists
                for report in unreported(context.instance, platform, datetime.now(UTC)):
                    host.report(report)
            host.record(shard, config.recycle_after_s)
            host.stop()
            context.log.info(
                f"Drained: shard {shard} is no longer configured, and all it had is stored."
            )
        except DagsterExecutionInterruptedError:
            try:  # before the flush, so that a run that is killed while it flushes counts as canceled
                if is_planned_end(context, platform):
                    report_canceling(context)
            finally:  # flush even if Dagster's database fails
                stored = host.stop(_drain_s(context, platform, shards))
            context.log.info(
                "Ended; every store has everything that was received."
                if stored
                else "Ended; what is not loaded yet is in the journal, for the next run."
            )
            raise
        except _Relieved:
            host.stop()
            context.log.info("This run is a day old; its successor continues.")
        except BaseException:
            host.stop()
            raise


@dg.job(
    name="stream_orderbook",
    executor_def=dg.in_process_executor,
    tags={SHARD_TAG: "0", "dagster/priority": "100"},
    description=(
        "The recording itself: one long run per shard (STREAM_SHARDS), kept alive by"
        " streamer_supervisor. A run of a shard that is no longer configured loads the rest of its"
        " journal and ends."
        " If you terminate it, the supervisor starts it again; stop the sensor first to stop it."
    ),
)
def stream_orderbook() -> None:
    """One op: `record_shard`."""
    record_shard()


class _Host:
    """Passes the streamer's hour reports to Dagster without losing one."""

    def __init__(self, context: dg.OpExecutionContext, streamer: "Streamer", source: str) -> None:
        self._context = context
        self._streamer = streamer
        self._source = source
        self._unreported: HourReport | None = None

    def await_frames(self) -> None:
        """Leave the interpreter to the streamer until it records, for at most HEAD_START_S."""
        ends = time.monotonic() + HEAD_START_S
        while not self._streamer.health().last_frame_ns and time.monotonic() < ends:
            if self._streamer.failure() is not None or self._streamer.drained:
                return
            time.sleep(0.1)

    def record(self, shard: int, recycle_after_s: float) -> None:
        """Report hours and heartbeats until a former shard is drained.

        Raises the streamer's failure, and `_Relieved` when a successor may take over.
        """
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
        """Whether ending the run loses nothing: a blocked disk would not accept the rest."""
        return self._streamer.health().state != BLOCKED

    def report(self, report: "HourReport") -> None:
        """Log one event per dataset of the hour. After an interrupt in between, `stop` repeats it."""
        self._unreported = report
        for event in materializations(report, self._source):
            self._context.log_event(event)
        state = "sealed" if report.complete else "open"
        log.info("Reported hour %s (%s).", partition_key(report.hour), state)
        self._unreported = None

    def stop(self, timeout_s: float = DRAIN_S) -> bool:
        """Drain and flush, then report the remaining hours. Returns whether every store has everything.

        Raises `JournalError` if received records are lost: such a run has failed. A second stop signal, as when
        the supervisor and a person stop the run together, does not interrupt it.
        """
        with capture_interrupts():
            flushed = self._streamer.stop(timeout_s=timeout_s)
            if self._unreported is not None:
                self.report(self._unreported)
            while (report := self._streamer.next_report(timeout_s=0.0)) is not None:
                self.report(report)
        if self._streamer.loss is not None:
            self._fail_although_canceled(self._streamer.loss)
            raise self._streamer.loss
        return flushed

    def _fail_although_canceled(self, loss: PlatformError) -> None:
        """Mark the run as failed: Dagster would mark a terminated run as canceled, whatever its op raises."""
        instance = self._context.instance
        run = instance.get_run_by_id(self._context.run_id)
        if run is not None and run.status == dg.DagsterRunStatus.CANCELING:
            instance.report_run_failed(run, str(loss))


def register_process(context: dg.OpExecutionContext) -> None:
    """Tag the run with its process, before anything else.

    Raises `dg.Failure` if the run has already been marked as ended: another run has replaced it.
    """
    run = context.instance.get_run_by_id(context.run_id)
    if run is not None and run.is_finished:
        raise dg.Failure(
            description="This run was marked as ended before it started; another one has replaced it.",
            allow_retries=False,
        )
    context.instance.add_run_tags(context.run_id, {PROCESS_TAG: str(Identity.own())})


def is_planned_end(
    context: dg.OpExecutionContext, platform: KalshiResource, patience_s: float = 0.0
) -> bool:
    """Whether the platform or a person in Dagster stopped this run, or may have; waits `patience_s` for the note."""
    ends = time.monotonic() + patience_s
    with capture_interrupts():
        while not _is_stopped(context, platform):
            if time.monotonic() >= ends:
                return False
            time.sleep(0.05)
    return True


def _is_stopped(context: dg.OpExecutionContext, platform: KalshiResource) -> bool:
    """Whether the run is marked as ended or canceling, or a planned stop is on record."""
    record = context.instance.get_run_record_by_id(context.run_id)
    if record is None or record.dagster_run.is_finished:
        return True
    if record.dagster_run.status == dg.DagsterRunStatus.CANCELING:
        return True
    try:
        return run_failures.may_be_planned(record, platform.settings().data_dir, time.time())
    except SettingsError:  # `.env` is being changed
        return True


def _drain_s(context: dg.OpExecutionContext, platform: KalshiResource, shards: int) -> float:
    """Seconds for the streamer to flush; fewer if the number of shards has changed."""
    try:
        wanted = observation.shards(context.instance, platform.settings())
    except SettingsError:
        return DRAIN_S
    return DRAIN_S if wanted == shards else HURRY_S


def report_canceling(context: dg.OpExecutionContext) -> None:
    """Report a planned stop by a signal as Terminate in the UI does: the run is canceled, not failed."""
    with capture_interrupts():
        run = context.instance.get_run_by_id(context.run_id)
        if run is not None and not run.is_finished and run.status != dg.DagsterRunStatus.CANCELING:
            context.instance.report_run_canceling(run, "Interrupted by a signal.")


def unreported(
    instance: dg.DagsterInstance, platform: KalshiResource, now: datetime
) -> "Iterator[HourReport]":
    """The hours that were sealed while no run could report them (after a crash, or `stream` without Dagster).

    An hour that cannot be read is logged and left out, so that recording does not wait for it.
    """
    this_hour = now.replace(minute=0, second=0, microsecond=0)
    past = [this_hour - timedelta(hours=back) for back in range(_CATCH_UP_HOURS, 0, -1)]
    # stream_events has rows in every recorded hour
    reported = _reported_complete(
        instance, STREAM_EVENTS.name, [partition_key(hour) for hour in past]
    )
    tries = 3
    for hour in past:
        key = partition_key(hour)
        if key in reported:
            continue
        try:
            if platform.is_sealed(hour):
                yield platform.describe(hour)
        except StoreUnavailable as error:
            log.warning(
                "Hour %s cannot be read now, and is reported after the next start: %s", key, error
            )
            tries -= 1
            if not tries:
                # the archive is unreachable, and each further hour would wait for a timeout
                return
        except (PlatformError, OSError, ValueError) as error:  # a damaged file
            log.error("Hour %s cannot be read: %s. Materialise it to rebuild it.", key, error)


def _reported_complete(instance: dg.DagsterInstance, asset: str, keys: list[str]) -> set[str]:
    """The partitions whose latest materialisation marks the hour as complete."""
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
    """The streamer's state on one line."""
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
    """Context manager: turn a `PlatformError` into a failure of the run with the same sentence."""
    try:
        yield
    except PlatformError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error

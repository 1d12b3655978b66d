"""The sensor `alerts`: finds failed runs, failed checks and a stalled feed, and hands notices to the channels.

It evaluates the current state at each tick instead of reacting to single events as Dagster's run-failure sensor
does. So twenty failed hours of a backfill are one incident, a later success ends it, and a channel that is down
receives the message later. The ledger of incidents is the sensor's cursor. What an incident is belongs to
health/incidents.py, where it is sent to health/channels.py.

A tick sends nothing itself, since a channel may block for any time: the outbox of this process
(health/outbox.py) sends in the background, and the next tick records the outcome.
"""

import functools
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import takewhile
from typing import TYPE_CHECKING

import dagster as dg
from dagster import DagsterRunStatus as Status
from dagster._core.storage.asset_check_execution_record import (
    AssetCheckExecutionRecordStatus as CheckStatus,
)

from kalshi_platform.health import health_report, incidents, monitored_shards, verdict
from kalshi_platform.health.incidents import Condition, Ledger, Severity
from kalshi_platform.orchestration import run_failures
from kalshi_platform.orchestration.observation import SHARD_TAG
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.printable import from_markdown
from kalshi_platform.settings import Settings

if TYPE_CHECKING:
    from kalshi_platform.health.outbox import Outbox

TICK_S = 30
LOOK_BACK_S = 24 * 3600.0
"""Seconds after which a failed run that was not repeated is no longer reported."""
MOST_FAILURES = 200
WELL_S = 120.0
"""A run that has been running this long counts as successful."""
FEED_ERROR_S, FEED_WARN_S = 60.0, 600.0
"""Seconds that the feed must be in trouble before it is reported: a restart takes less."""
INTERRUPTED_S = 2 * 3600.0
"""Seconds after which a run that a restart interrupted is reported if it was not repeated: schedules run once an
hour.
"""
COVERED_BY_FEED = dg.AssetCheckKey(dg.AssetKey("orderbook_events"), "fresh")
"""A check with the same verdict as the feed's condition, but only every five minutes."""
_ENDED = [Status.SUCCESS, Status.FAILURE, Status.CANCELED]
_PARTITION = "dagster/partition"


@dg.sensor(
    name="alerts",
    minimum_interval_seconds=TICK_S,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description=(
        "Reports failed runs, failed checks and a stalled feed to Slack, a webhook or a mailbox:"
        " once when it begins, at an interval while it goes on, and when it is over."
    ),
)
def alerts(context: dg.SensorEvaluationContext, platform: KalshiResource) -> dg.SensorResult:
    """Evaluate the conditions, update the ledger, and hand new notices to the outbox."""
    from kalshi_platform.health import channels, metrics  # load HTTP and mail

    if not context.cursor:
        _outbox().forget()

    now = time.time()
    settings = platform.settings()
    targets = channels.configured(settings)
    ledger = incidents.observe(
        _read_ledger(context),
        conditions(context.instance, _check_keys(context), settings, now),
        [channel.name for channel in targets],
        now,
        settings.alert_reminder_hours * 3600,
    )
    ledger = _outbox().step(ledger, targets, now)
    troubles = _troubles(ledger)
    for trouble in troubles:
        context.log.error(trouble)
    try:
        metrics.note_incidents(settings.data_dir, incidents.counts(ledger), now, troubles)
    except OSError as error:
        context.log.error(f"The metrics will not show this tick: {error}.")
    return dg.SensorResult(
        skip_reason=dg.SkipReason(
            _sentence(ledger, [channel.name for channel in targets], troubles)
        ),
        cursor=incidents.write(ledger),
    )


@functools.cache
def _outbox() -> "Outbox":
    """The outbox of this process."""
    from kalshi_platform.health.outbox import Outbox

    return Outbox()


def _troubles(ledger: Ledger) -> list[str]:
    """The failing channels: the last error of each, and how many notices wait."""
    return [
        f"{name}: {box.trouble} {box.undelivered} notices wait for it."
        for name, box in ledger.mailboxes.items()
        if box.trouble
    ]


def conditions(
    instance: dg.DagsterInstance,
    checks: list[dg.AssetCheckKey],
    settings: Settings,
    now: float,
) -> list[Condition]:
    """Every condition that holds now."""
    return [
        *feed(settings, now),
        *failed_checks(instance, checks, settings.dagster_ui_url),
        *failed_runs(instance, settings, now),
    ]


# -- the feed ------------------------------------------------------------------------------------


def feed(settings: Settings, now: float) -> Iterator[Condition]:
    """The faults of each shard: frames are not received, not durable, or do not reach a store."""
    for shard in monitored_shards.supervised(
        settings.journals_dir, settings.stream_shards, settings.stores
    ):
        judgements, last_frame = _judge(settings, shard, now)
        for judged in judgements:
            if judged.verdict is verdict.Verdict.GOOD:
                continue
            critical = judged.verdict is verdict.Verdict.ERROR
            yield Condition(
                key=f"feed:{shard}:{judged.cause}",
                title=f"Feed of shard {shard}: {judged.cause}",
                sentence=judged.sentence,
                severity=Severity.CRITICAL if critical else Severity.WARNING,
                since=last_frame if judged.cause in verdict.NO_FRAMES else now,
                after_s=FEED_ERROR_S if critical else FEED_WARN_S,
                link=f"{settings.dagster_ui_url}/runs?q[0]=tag:{SHARD_TAG}={shard}",
                section="The feed stands still",
            )


def _judge(settings: Settings, shard: int, now: float) -> tuple[Sequence[verdict.Judgement], float]:
    """A shard's judgements, and the time of its last frame (now if unknown)."""
    folder = settings.journal_dir(shard)
    try:
        report = health_report.read(folder)
        at = datetime.fromtimestamp(now, UTC)
        judged = verdict.judge_shard(report, shard, settings.stream_shards, None, at)
        last_frame = int((report or {}).get("last_frame_ns") or 0) / 1e9
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        sentence = (
            f"{folder / health_report.FILE} is not a streamer's report ({error}). A running streamer writes it each"
            " second."
        )
        return [verdict.no_report(sentence)], now
    return judged, last_frame or now


# -- checks --------------------------------------------------------------------------------------


def failed_checks(
    instance: dg.DagsterInstance, keys: list[dg.AssetCheckKey], ui: str
) -> Iterator[Condition]:
    """The checks whose last result is a failure of severity ERROR."""
    decided = {CheckStatus.SUCCEEDED, CheckStatus.FAILED}
    for key in keys:
        if key == COVERED_BY_FEED:
            continue
        last = instance.event_log_storage.get_asset_check_execution_history(
            key, limit=1, status=decided
        )
        found = last[0].evaluation if last else None
        if found is None or found.passed or found.severity is not dg.AssetCheckSeverity.ERROR:
            continue
        asset = key.asset_key.to_user_string()
        yield Condition(
            key=f"check:{asset}:{key.name}",
            title=f"Check {key.name} of {asset} failed",
            sentence=from_markdown(found.description or "")
            or "The check's page in the UI has its findings.",
            severity=Severity.CRITICAL,
            since=last[0].create_timestamp,
            link=f"{ui}/assets/{asset}?view=checks&checkDetail={key.name}",
            section="Checks",
        )


def _check_keys(context: dg.SensorEvaluationContext) -> list[dg.AssetCheckKey]:
    repository = context.repository_def
    if repository is None:
        return []
    return sorted(repository.asset_graph.asset_check_keys, key=str)


# -- runs ----------------------------------------------------------------------------------------


def failed_runs(
    instance: dg.DagsterInstance, settings: Settings, now: float
) -> Iterator[Condition]:
    """The jobs with a failed run within a day that no later run of the same kind has made good."""
    failures = instance.get_run_records(
        dg.RunsFilter(
            statuses=[Status.FAILURE],
            updated_after=datetime.fromtimestamp(now - LOOK_BACK_S, UTC),
        ),
        limit=MOST_FAILURES,
    )
    by_unit: defaultdict[tuple[str, str], list[dg.RunRecord]] = defaultdict(list)
    for record in failures:  # the newest first
        by_unit[_unit(record.dagster_run)].append(record)
    still: defaultdict[tuple[str, bool], list[dg.RunRecord]] = defaultdict(list)
    for (name, _), failed_records in by_unit.items():
        since = list(
            takewhile(lambda record: not _succeeded_since(instance, record, now), failed_records)
        )
        if not since:
            continue
        # a later interruption does not excuse an earlier failure
        crashes = (
            record
            for record in since
            if not run_failures.planned(instance, record, settings.data_dir)
        )
        crash = next(crashes, None)
        record, interrupted = crash or since[0], crash is None
        if not (interrupted and SHARD_TAG in record.dagster_run.tags):  # the feed reports its end
            still[name, interrupted].append(record)
    for (name, interrupted), records in still.items():
        newest = records[0].dagster_run
        units = [unit for record in records if (unit := _unit(record.dagster_run)[1])]
        parts = (
            f" ({', '.join(units[:3])}{f' and {len(units) - 3} more' if len(units) > 3 else ''})"
        )
        yield Condition(
            key=f"run:{name}:interrupted" if interrupted else f"run:{name}",
            title=f"Run of {name} failed{parts if units else ''}",
            sentence=_why_failed(instance, newest.run_id, planned=interrupted),
            severity=Severity.WARNING,
            since=min(_ended_at(record) for record in records),
            after_s=INTERRUPTED_S if interrupted else 0.0,
            link=f"{settings.dagster_ui_url}/runs/{newest.run_id}",
            section="A run failed",
        )


def _why_failed(instance: dg.DagsterInstance, run_id: str, *, planned: bool) -> str:
    reason = run_failures.why(instance, run_id)
    if planned or reason != run_failures.INTERRUPTED:
        return reason
    return f"{reason} {run_failures.UNPLANNED}"


def _unit(run: dg.DagsterRun) -> tuple[str, str]:
    """The job (or assets) and the partition or shard of a run; runs of equal units repeat one another."""
    name = run.job_name
    if name.startswith("__"):
        # an implicit job, for assets selected in the UI or by their conditions
        keys = [key.to_user_string() for key in run.asset_selection or ()]
        keys += [key.to_user_string() for key in run.asset_check_selection or ()]
        name = ", ".join(sorted(keys)) or name
    shard = run.tags.get(SHARD_TAG)
    return name, run.tags.get(_PARTITION, "" if shard is None else f"shard {shard}")


def _succeeded_since(instance: dg.DagsterInstance, failed: dg.RunRecord, now: float) -> bool:
    """Whether a later run of the same unit has succeeded, or has lasted."""
    run = failed.dagster_run
    tags = {name: run.tags[name] for name in (_PARTITION, SHARD_TAG) if name in run.tags}
    later = instance.get_run_records(
        dg.RunsFilter(
            job_name=run.job_name,
            tags=tags,
            statuses=[Status.SUCCESS, Status.STARTED],
            created_after=failed.create_timestamp,
        ),
        limit=20,
    )
    return any(
        record.dagster_run.status is Status.SUCCESS
        or (record.start_time is not None and now - record.start_time >= WELL_S)
        for record in later
        if _unit(record.dagster_run) == _unit(run)
    )


def _ended_at(record: dg.RunRecord) -> float:
    return record.end_time or record.update_timestamp.timestamp()


# -- the tick's result ---------------------------------------------------------------------------


def _read_ledger(context: dg.SensorEvaluationContext) -> Ledger:
    try:
        return incidents.read(context.cursor)
    except ValueError as error:  # of another version, or edited in the UI
        context.log.error(
            f"The cursor is not a ledger ({error}); open incidents are reported again."
        )
        return Ledger()


def _sentence(ledger: Ledger, names: list[str], troubles: list[str]) -> str:
    titles = [incident.condition.title for incident in ledger.open]
    sentence = f"{len(titles)} open: {'; '.join(titles)}." if titles else "Nothing is wrong."
    if not names:
        sentence += " No channel is set (ALERT_…), so nothing is sent."
    return " ".join([sentence, *troubles])

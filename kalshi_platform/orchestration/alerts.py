"""`alerts`: people are told of failed runs, failed checks and a feed that stands still.

One sensor, and not Dagster's run-failure sensor beside others: what is wrong is looked up anew at each
tick, so that twenty failed hours of a backfill are one incident, a run that succeeds ends it, and a
channel that is down gets the message later. What must be remembered is in the sensor's cursor.
What an incident is: health/incidents.py. Where it is told: health/channels.py.

A tick decides and writes down; it sends nothing itself, since whoever is told may take any time. The outbox of
this process (health/outbox.py) does, and the next tick notes what came of it.
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
"""A failed run that nobody has repeated after a day is no news any more."""
MOST_FAILURES = 200
WELL_S = 120.0
"""A run that has gone on for so long is one that works."""
FEED_ERROR_S, FEED_WARN_S = 60.0, 600.0
"""How long the feed must be in trouble before it is told: a restart takes less."""
INTERRUPTED_S = 2 * 3600.0
"""A run that a restart interrupted is alerted when nothing has repeated it for so long: what is scheduled runs
once an hour.
"""
TOLD_BY_FEED = dg.AssetCheckKey(dg.AssetKey("orderbook_events"), "fresh")
"""Judges the same as the feed's own condition, every five minutes instead of every tick."""
_ENDED = [Status.SUCCESS, Status.FAILURE, Status.CANCELED]
_PARTITION = "dagster/partition"


@dg.sensor(
    name="alerts",
    minimum_interval_seconds=TICK_S,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description=(
        "Tells Slack, a webhook or a mailbox of failed runs, failed checks and a feed that stands still:"
        " once when it begins, at an interval while it goes on, and when it is over."
    ),
)
def alerts(context: dg.SensorEvaluationContext, platform: KalshiResource) -> dg.SensorResult:
    """One tick: look, remember, tell."""
    from kalshi_platform.health import channels, metrics  # load HTTP and mail

    if not context.cursor:
        _outbox().forget()

    now = time.time()
    settings = platform.settings()
    targets = channels.configured(settings)
    ledger = incidents.observe(
        _remembered(context),
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
        context.log.error(f"The metrics will not know of this look: {error}.")
    return dg.SensorResult(
        skip_reason=dg.SkipReason(_sentence(ledger, [each.name for each in targets], troubles)),
        cursor=incidents.write(ledger),
    )


@functools.cache
def _outbox() -> "Outbox":
    """This process's own."""
    from kalshi_platform.health.outbox import Outbox

    return Outbox()


def _troubles(ledger: Ledger) -> list[str]:
    """What each channel that does not take its messages says, and how many wait for it."""
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
    """Everything that is wrong now."""
    return [
        *feed(settings, now),
        *failed_checks(instance, checks, settings.dagster_ui_url),
        *failed_runs(instance, settings, now),
    ]


# -- the feed ------------------------------------------------------------------------------------


def feed(settings: Settings, now: float) -> Iterator[Condition]:
    """Everything that is wrong with a shard whose frames do not come, are not kept or do not reach a store."""
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
    """What there is to say of a shard, and when its last frame came (else now)."""
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
    """Checks whose last result is a failure of severity ERROR."""
    decided = {CheckStatus.SUCCEEDED, CheckStatus.FAILED}
    for key in keys:
        if key == TOLD_BY_FEED:
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
    """Jobs of which a run failed within a day, and no later run of the same has gone well since."""
    failures = instance.get_run_records(
        dg.RunsFilter(
            statuses=[Status.FAILURE],
            updated_after=datetime.fromtimestamp(now - LOOK_BACK_S, UTC),
        ),
        limit=MOST_FAILURES,
    )
    of_unit: defaultdict[tuple[str, str], list[dg.RunRecord]] = defaultdict(list)
    for record in failures:  # the newest first
        of_unit[_unit(record.dagster_run)].append(record)
    still: defaultdict[tuple[str, bool], list[dg.RunRecord]] = defaultdict(list)
    for (what, _), of_it in of_unit.items():
        since = list(takewhile(lambda it: not _gone_well_since(instance, it, now), of_it))
        if not since:
            continue
        # an interruption later on takes nothing back of a failure
        crashes = (it for it in since if not run_failures.planned(instance, it, settings.data_dir))
        crash = next(crashes, None)
        record, interrupted = crash or since[0], crash is None
        if not (interrupted and SHARD_TAG in record.dagster_run.tags):  # the feed tells its end
            still[what, interrupted].append(record)
    for (what, interrupted), records in still.items():
        newest = records[0].dagster_run
        units = [unit for record in records if (unit := _unit(record.dagster_run)[1])]
        of = f" ({', '.join(units[:3])}{f' and {len(units) - 3} more' if len(units) > 3 else ''})"
        yield Condition(
            key=f"run:{what}:interrupted" if interrupted else f"run:{what}",
            title=f"Run of {what} failed{of if units else ''}",
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
    return f"{reason} {run_failures.UNASKED}"


def _unit(run: dg.DagsterRun) -> tuple[str, str]:
    """What a run does, and of which part: later runs of the same are held against it."""
    what = run.job_name
    if what.startswith("__"):  # of no job, but of assets picked in the UI or by their conditions
        keys = [key.to_user_string() for key in run.asset_selection or ()]
        keys += [key.to_user_string() for key in run.asset_check_selection or ()]
        what = ", ".join(sorted(keys)) or what
    shard = run.tags.get(SHARD_TAG)
    return what, run.tags.get(_PARTITION, "" if shard is None else f"shard {shard}")


def _gone_well_since(instance: dg.DagsterInstance, failed: dg.RunRecord, now: float) -> bool:
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


# -- what the tick says --------------------------------------------------------------------------


def _remembered(context: dg.SensorEvaluationContext) -> Ledger:
    try:
        return incidents.read(context.cursor)
    except ValueError as error:  # of another version, or edited in the UI
        context.log.error(f"The cursor is no ledger ({error}); what is open is told anew.")
        return Ledger()


def _sentence(ledger: Ledger, names: list[str], troubles: list[str]) -> str:
    still = [each.condition.title for each in ledger.open]
    said = f"{len(still)} open: {'; '.join(still)}." if still else "Nothing is wrong."
    if not names:
        said += " No channel is set (ALERT_…), so nobody is told."
    return " ".join([said, *troubles])

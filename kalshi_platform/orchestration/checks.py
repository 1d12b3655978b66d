"""The checks on `orderbook_events`: is the recording whole, equal in both stores, sane and fresh?

What each asks is in `kalshi_platform.loading` (continuity, parity, crossed_books, freshness); here the
findings get a colour, a sentence and their tables. Where ClickHouse cannot be asked, the checks that
need it are left as they were, and `fresh` says so.

No `from __future__ import annotations` in modules that define ops: Dagster reads the types.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import dagster as dg
from dagster import MetadataValue

from kalshi_platform.archive import open_archive
from kalshi_platform.errors import PlatformError
from kalshi_platform.health import health_report, monitored_shards
from kalshi_platform.orchestration.resources import KalshiResource
from kalshi_platform.printable import markdown
from kalshi_platform.schema import ORDERBOOK_EVENTS

if TYPE_CHECKING:
    from kalshi_platform.clickhouse.client import Client
    from kalshi_platform.quality.continuity import Extent
    from kalshi_platform.settings import Settings

Reports = Mapping[int, Mapping[str, Any] | None]
"""What each shard's streamer says of itself."""
ASSET = ORDERBOOK_EVENTS.name
SHOWN = 100
"""Offenders in the UI."""
NOT_RESYNCED_S = 60.0
"""For how long a gap may keep its books in doubt."""
DOCS = "docs/operations.md"
ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN

_CHECKED: Mapping[str, str] = {
    "no_unexplained_gaps": (
        "Every number of every subscription is there, or a gap row names it, and no row is there twice"
        " (infra/queries/lossless_proof.sql); gaps of the last hour were mended within a minute, and"
        " no audited level differed from the exchange's."
    ),
    "hot_cold_parity": (
        "Every sealed hour that is still hot has the same rows in Parquet and in ClickHouse: same"
        " number, same content, no tolerance. Three hours a run."
    ),
    "books_uncrossed": (
        "No verified book has its best yes bid at or above its best yes ask for more than 5 s."
    ),
    "fresh": "Frames come, become durable and reach ClickHouse; a quiet exchange is told apart.",
}


@dataclass(frozen=True)
class _Asked:
    """What the checks that need ClickHouse are given."""

    settings: "Settings"
    client: "Client"
    hot: "Extent"
    whole: "Extent"
    """`hot`, up to where ClickHouse has what every shard has received."""
    health: "Reports"
    now: datetime
    proved: datetime | None
    """Up to where the last run of `no_unexplained_gaps` left no doubt."""


@dg.multi_asset_check(
    name="judge_order_book",
    specs=[
        dg.AssetCheckSpec(
            name, asset=ASSET, description=description, metadata={"docs": MetadataValue.path(DOCS)}
        )
        for name, description in _CHECKED.items()
    ],
    can_subset=True,
)
def order_book_checks(
    context: dg.AssetCheckExecutionContext, platform: KalshiResource
) -> Iterator[dg.AssetCheckResult]:
    """Run the checks that were asked for, with one connection."""
    from kalshi_platform.clickhouse.client import connect
    from kalshi_platform.health import verdict
    from kalshi_platform.quality import continuity

    wanted = {key.name for key in context.selected_asset_check_keys}
    now = datetime.now(UTC)
    settings = platform.settings()
    health, damaged = _reports(settings)
    hot: continuity.Extent | None = None
    away = ""
    if settings.use_clickhouse:
        try:
            with closing(connect(settings, log_comment="checks")) as client:
                hot = continuity.extent(client)
                proved = _proved(context.instance) if "no_unexplained_gaps" in wanted else None
                limit = (
                    verdict.loaded_to(health.values(), "clickhouse") if len(health) > 1 else None
                )
                asked = _Asked(settings, client, hot, _limited(hot, limit), health, now, proved)
                for name in [each for each in _IN_CLICKHOUSE if each in wanted]:
                    yield _nothing(name) if hot.empty else _IN_CLICKHOUSE[name](asked)
        except PlatformError as error:
            away = str(error)
            context.log.warning(f"The checks that need ClickHouse are left as they were. {away}")
    else:
        for name in [each for each in _IN_CLICKHOUSE if each in wanted]:
            yield _passed(name, "Nothing to check: ClickHouse is not used (USE_CLICKHOUSE=0).")
    if "fresh" in wanted:
        newest = hot.newest if hot is not None and not hot.empty else None
        yield _fresh(health, newest, now, away, damaged, configured=settings.stream_shards)


def _reports(settings: "Settings") -> tuple[Reports, dict[int, str]]:
    """What each shard says, and of those whose report cannot be read a sentence."""

    shards = monitored_shards.supervised(
        settings.journals_dir, settings.stream_shards, settings.stores
    )
    reports: dict[int, Mapping[str, Any] | None] = {}
    damaged: dict[int, str] = {}
    for shard in shards:
        folder = settings.journal_dir(shard)
        try:
            reports[shard] = health_report.read(folder)
        except (OSError, ValueError) as error:
            damaged[shard] = (
                f"{folder / health_report.FILE} cannot be read ({error})."
                " A running streamer writes it each second."
            )
    return reports, damaged


def _limited(hot: "Extent", limit: datetime | None) -> "Extent":
    """With several shards, the newest row says only how far the first of them is."""
    if limit is None:
        return hot
    limit = max(limit, hot.first)
    return replace(hot, newest=min(hot.newest, limit), whole_until=min(hot.whole_until, limit))


# -- the checks --------------------------------------------------------------------------------


def _no_unexplained_gaps(asked: _Asked) -> dg.AssetCheckResult:
    from kalshi_platform.quality import continuity

    proof = continuity.prove(asked.client, asked.whole, asked.proved)
    noticed = continuity.gaps(asked.client, proof.until)
    lasting = [gap for gap in noticed.named if gap["open_s"] > NOT_RESYNCED_S]
    metadata: dict[str, Any] = {
        "proved from": MetadataValue.timestamp(proof.since),
        "proved to": MetadataValue.timestamp(proof.until),
        "subscriptions": MetadataValue.int(proof.subscriptions),
        "frames": MetadataValue.int(proof.frames),
        "numbers named by gaps": MetadataValue.int(proof.named_holes),
        "gaps in the last hour": MetadataValue.int(len(noticed.named)),
        "longer than 60 s": MetadataValue.int(len(lasting)),
        "mismatches in the last hour": MetadataValue.int(len(noticed.mismatches)),
        **_tables(
            {"offenders": proof.offenders, "gaps": lasting, "mismatches": noticed.mismatches}
        ),
    }
    if proof.offenders:
        holes = sum(row["unexplained_holes"] for row in proof.offenders)
        levels = sum(row["missing_levels"] for row in proof.offenders)
        doubled = sum(row["doubled"] for row in proof.offenders)
        said = (
            f"{holes:,} numbers are missing that no gap row names, {levels:,} levels of snapshots are"
            f" missing, {doubled:,} rows are stored more than once, in {len(proof.offenders)} subscriptions. Run kalshi-platform restore: it inserts what"
            " ClickHouse lacks of the archive, and names the hours that need --replace. What the archive lacks"
            " too is in the journal while that is kept: materialise those hours first."
        )
        return _failed("no_unexplained_gaps", ERROR, said, metadata)
    if lasting or noticed.mismatches:
        said = (
            f"{len(lasting)} gaps of the last hour kept books in doubt for more than"
            f" {NOT_RESYNCED_S:.0f} s, and {len(noticed.mismatches)} audited levels differed from the"
            " exchange's. The books are asked for anew by themselves; if it goes on, see the run's log."
        )
        return _failed("no_unexplained_gaps", WARN, said, metadata)
    lately = len(noticed.named)
    said = (
        f"{proof.frames:,} numbered frames of {proof.subscriptions} subscriptions are all accounted for;"
        f" {f'{lately} gaps in the last hour, named and mended' if lately else 'no gap in the last hour'}."
    )
    return _passed("no_unexplained_gaps", said, metadata)


def _hot_cold_parity(asked: _Asked) -> dg.AssetCheckResult:
    import msgspec

    from kalshi_platform.health.verdict import behind
    from kalshi_platform.quality.parity import compare_hours

    lags = any(behind(report, "clickhouse", asked.now) for report in asked.health.values())
    found = compare_hours(asked.settings, asked.client, asked.whole, asked.now, behind=lags)
    offenders = [msgspec.to_builtins(each) for each in found.differences]
    metadata: dict[str, Any] = {
        "hours compared now": MetadataValue.text(
            ", ".join(f"{hour:%Y-%m-%d %H:00}" for hour in found.compared) or "none"
        ),
        "rows compared now": MetadataValue.int(found.rows),
        "hours equal": MetadataValue.int(found.equal),
        "hours waiting": MetadataValue.int(found.waiting),
        "hours that ClickHouse lacks yet": MetadataValue.int(len(found.behind)),
        "hours older than ClickHouse": MetadataValue.int(found.cold_only),
        **_tables({"offenders": offenders}),
    }
    if offenders:
        hours = len({each["hour"] for each in offenders})
        said = (
            f"{len(offenders)} datasets of {hours} hours differ: {offenders[0]['dataset']} of"
            f" {offenders[0]['hour']}: {offenders[0]['what']} {offenders[0]['remedy']}"
        )
        return _failed("hot_cold_parity", ERROR, said, metadata)
    if not (found.equal or found.behind or found.waiting):
        return _passed("hot_cold_parity", "Nothing to check: no hour is sealed and hot yet.")
    said = f"{found.equal} sealed hours are the same in both stores."
    if found.waiting:
        said += f" {found.waiting} wait for their turn."
    if found.behind:
        said += f" ClickHouse lags: {len(found.behind)} sealed hours are not whole there yet."
    return _passed("hot_cold_parity", said, metadata)


def _books_uncrossed(asked: _Asked) -> dg.AssetCheckResult:
    from kalshi_platform.quality.crossed_books import LONGER_THAN_S, crossed_books

    found = crossed_books(asked.client, asked.hot)
    metadata: dict[str, Any] = {
        "crossed": MetadataValue.int(len(found)),
        "crossed now": MetadataValue.int(sum(bool(each["lasts"]) for each in found)),
        "up to": MetadataValue.timestamp(asked.hot.newest),
        **_tables({"offenders": found}),
    }
    if found:
        markets = len({each["market_ticker"] for each in found})
        said = (
            f"{len(found)} times a verified book of {markets} markets was crossed for more than"
            f" {LONGER_THAN_S:.0f} s. Compare with the exchange's page: if it shows another book, ours is"
            " wrong; the audit asks for it again."
        )
        return _failed("books_uncrossed", WARN, said, metadata)
    return _passed("books_uncrossed", "No verified book is or stayed crossed.", metadata)


_IN_CLICKHOUSE: Mapping[str, Callable[[_Asked], dg.AssetCheckResult]] = {
    "no_unexplained_gaps": _no_unexplained_gaps,
    "hot_cold_parity": _hot_cold_parity,
    "books_uncrossed": _books_uncrossed,
}


def _fresh(
    reports: Reports,
    newest: datetime | None,
    now: datetime,
    away: str,
    damaged: Mapping[int, str],
    *,
    configured: int,
) -> dg.AssetCheckResult:
    from kalshi_platform.health import verdict

    found = [(shard, verdict.no_report(sentence)) for shard, sentence in damaged.items()]
    sound: dict[int, Mapping[str, Any]] = {}
    for shard, report in reports.items():
        if report is None and any(reports.values()) and shard < configured:
            found.append((shard, verdict.never_run(shard)))
            continue
        try:
            judgements = verdict.judge_shard(report, shard, configured, newest, now)
            _row(shard, report, now)  # its other values, too
            sound[shard] = report or {}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            sentence = f"health.json is not a streamer's report ({error!r}). A running streamer writes it each second."
            judgements = [verdict.no_report(sentence)]
        found += [(shard, judged) for judged in judgements]
    shard, judged = verdict.worst_of(found)
    wrong = [it for it in found if it[1].verdict is not verdict.Verdict.GOOD]
    worst_first = [(shard, judged), *(it for it in wrong if it != (shard, judged))]
    sentence = " ".join(
        it.sentence if len(reports) + len(damaged) == 1 else f"Shard {of}: {it.sentence}"
        for of, it in worst_first
    )
    metadata: dict[str, Any] = {"cause": MetadataValue.text(judged.cause)}
    metadata |= _ages(sound.get(shard, {}), now)
    if newest is not None:
        metadata["newest row in ClickHouse (s ago)"] = MetadataValue.float(
            round((now - newest).total_seconds(), 1)
        )
    if len(reports) > 1:
        metadata |= _tables({"shards": [_row(k, sound.get(k), now) for k in reports]})
    if judged.verdict is verdict.Verdict.ERROR:
        return _failed("fresh", ERROR, sentence, metadata)
    if away:
        return _failed(
            "fresh", WARN, f"{away} What is recorded stays in the journal. {sentence}", metadata
        )
    if judged.verdict is verdict.Verdict.WARN:
        return _failed("fresh", WARN, sentence, metadata)
    return _passed("fresh", sentence, metadata)


def _ages(report: Mapping[str, Any], now: datetime) -> dict[str, MetadataValue]:
    """How old the newest of everything is; what has not happened yet is left out."""
    ages = {key: int(report.get(key) or 0) / 1e9 for key in _AGES}
    return {
        f"{_AGES[key]} (s ago)": MetadataValue.float(round(now.timestamp() - at, 1))
        for key, at in ages.items()
        if at
    }


def _row(shard: int, report: Mapping[str, Any] | None, now: datetime) -> dict[str, Any]:
    """A shard's line in the table of all shards."""
    it = report or {}
    ages = {key: value.value for key, value in _ages(it, now).items()}
    return {
        "shard": shard,
        "state": it.get("state", "none has run"),
        "markets": it.get("markets", 0),
        "synced": it.get("synced", 0),
        "frames": it.get("frames", 0),
        "gaps": it.get("gaps", 0),
        "not durable for (ms)": it.get("oldest_undurable_ms", 0),
        "not loaded yet": it.get("lag_frames", 0),
        **{f"{name} (s ago)": ages.get(f"{name} (s ago)") for name in _AGES.values()},
        "trouble": it.get("trouble"),
    }


_AGES = {
    "last_frame_ns": "last frame",
    "last_heard_ns": "last heard",
    "last_durable_ns": "last durable write",
    "updated_ns": "last report",
}


def _proved(instance: dg.DagsterInstance) -> datetime | None:
    """From where on nothing has been proved, or what was found is still to be told.

    After a clean run that is where it ended; after one with offenders it is where that began, so that
    the check stays red until they are mended or retention has taken them.
    """
    key = dg.AssetCheckKey(dg.AssetKey(ASSET), "no_unexplained_gaps")
    storage = instance.event_log_storage
    for record in storage.get_asset_check_execution_history(key, limit=5):
        event = record.event.dagster_event if record.event else None
        evaluation = event.event_specific_data if event else None  # of a planned run, another kind
        if not isinstance(evaluation, dg.AssetCheckEvaluation) or (
            "proved to" not in evaluation.metadata
        ):
            continue
        which = "proved from" if "offenders" in evaluation.metadata else "proved to"
        at = evaluation.metadata[which].value
        return datetime.fromtimestamp(at, UTC) if isinstance(at, float | int) else None
    return None


# -- results -----------------------------------------------------------------------------------


def _nothing(name: str) -> dg.AssetCheckResult:
    return _passed(name, "Nothing to check: ClickHouse has no rows yet.")


def _passed(
    name: str, sentence: str, metadata: Mapping[str, Any] | None = None
) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=True,
        asset_key=ASSET,
        check_name=name,
        description=markdown(sentence),
        metadata=metadata or {},
    )


def _failed(
    name: str, severity: dg.AssetCheckSeverity, sentence: str, metadata: Mapping[str, Any]
) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=False,
        asset_key=ASSET,
        check_name=name,
        severity=severity,
        description=markdown(sentence),
        metadata=metadata,
    )


def _tables(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, MetadataValue]:
    """Each non-empty list of findings as a table, the first `SHOWN` of them."""
    return {
        name: MetadataValue.table(
            records=[
                dg.TableRecord({key: _cell(value) for key, value in row.items()})
                for row in rows[:SHOWN]
            ],
            schema=dg.TableSchema([dg.TableColumn(key) for key in rows[0]]),
        )
        for name, rows in found.items()
        if rows
    }


def _cell(value: Any) -> str | int | float | bool:
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds")
    return (
        value
        if isinstance(value, str | int | float | bool)
        else ""
        if value is None
        else str(value)
    )


# -- when they run -----------------------------------------------------------------------------

order_book_checks_job = dg.define_asset_job(
    "order_book_checks",
    selection=dg.AssetSelection.checks(order_book_checks),
    description="Every check on the recording: whole, equal in both stores, sane, fresh.",
)


@dg.schedule(
    name="order_book_checks_schedule",
    job=order_book_checks_job,
    cron_schedule="4-59/5 * * * *",  # between the looks of the inventory's schedules
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
)
def order_book_checks_schedule(platform: KalshiResource) -> dg.RunRequest | dg.SkipReason:
    """Every five minutes, once anything has been recorded."""
    settings = platform.settings()
    recorded = any(settings.journals_dir.glob(f"shard-*/{health_report.FILE}"))
    if not recorded and open_archive(settings).first_day() is None:
        return dg.SkipReason("Nothing has been recorded yet.")
    return dg.RunRequest()


CHECKS = (order_book_checks,)
JOBS = (order_book_checks_job,)
SCHEDULES = (order_book_checks_schedule,)

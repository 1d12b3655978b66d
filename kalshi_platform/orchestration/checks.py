"""The asset checks on `orderbook_events`: is the recording complete, equal in both stores, sane and fresh?

The queries and comparisons are in `kalshi_platform.quality` (continuity, parity, crossed_books) and
`health/verdict.py`; here the findings get a severity, a sentence and tables. If ClickHouse is unreachable, the
checks that need it keep their last result, and `fresh` says so.

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
"""The health report of each shard's streamer."""
ASSET = ORDERBOOK_EVENTS.name
SHOWN = 100
"""Most rows of a table in the UI."""
NOT_RESYNCED_S = 60.0
"""Seconds that a gap may leave its books stale."""
DOCS = "docs/operations.md"
ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN

_CHECKED: Mapping[str, str] = {
    "no_unexplained_gaps": (
        "Every sequence number of every subscription is stored, or a gap row names it, and no row is stored"
        " twice (infra/queries/lossless_proof.sql); the books of the last hour's gaps were synced again within"
        " a minute, and no compared level differed from the exchange's."
    ),
    "hot_cold_parity": (
        "Every sealed hour that is still hot has exactly the same rows in Parquet and in ClickHouse."
        " Compares three hours a run."
    ),
    "books_uncrossed": (
        "No synced book has its best YES bid at or above its best YES ask for more than 5 s."
    ),
    "clocks_monotonic": (
        "The exchange's clock of no market fell in the last hour, except across maintenance: a delta is above its"
        " snapshot and not below the delta before it."
    ),
    "wire_drift": (
        "In the last day the exchange sent no field and no type of message that this version does not know, no"
        " field of another type, and none was missing that it used to send."
    ),
    "fresh": "Frames arrive, become durable and reach ClickHouse; a quiet exchange is no fault.",
}


@dataclass(frozen=True)
class _Inputs:
    """The inputs of the checks that need ClickHouse."""

    settings: "Settings"
    client: "Client"
    hot: "Extent"
    whole: "Extent"
    """`hot`, limited to the time up to which ClickHouse has the rows of every shard."""
    health: "Reports"
    now: datetime
    proved: datetime | None
    """Up to when the last run of `no_unexplained_gaps` found nothing missing."""


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
    """Run the selected checks over one connection."""
    from kalshi_platform.clickhouse.client import connect
    from kalshi_platform.health import verdict
    from kalshi_platform.quality import continuity

    wanted = {key.name for key in context.selected_asset_check_keys}
    now = datetime.now(UTC)
    settings = platform.settings()
    health, damaged = _reports(settings)
    hot: continuity.Extent | None = None
    unreachable = ""
    if settings.use_clickhouse:
        try:
            with closing(connect(settings, log_comment="checks")) as client:
                hot = continuity.extent(client)
                proved = (
                    _proved_until(context.instance) if "no_unexplained_gaps" in wanted else None
                )
                limit = (
                    verdict.loaded_to(health.values(), "clickhouse") if len(health) > 1 else None
                )
                inputs = _Inputs(settings, client, hot, _limited(hot, limit), health, now, proved)
                for name in [check for check in _IN_CLICKHOUSE if check in wanted]:
                    yield _nothing(name) if hot.empty else _IN_CLICKHOUSE[name](inputs)
        except PlatformError as error:
            unreachable = str(error)
            context.log.warning(
                f"The checks that need ClickHouse keep their last result. {unreachable}"
            )
    else:
        for name in [check for check in _IN_CLICKHOUSE if check in wanted]:
            yield _passed(name, "Nothing to check: ClickHouse is not used (USE_CLICKHOUSE=0).")
    if "fresh" in wanted:
        newest = hot.newest if hot is not None and not hot.empty else None
        yield _fresh(health, newest, now, unreachable, damaged, configured=settings.stream_shards)


def _reports(settings: "Settings") -> tuple[Reports, dict[int, str]]:
    """Each shard's report, and a sentence for each report that cannot be read."""

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
    """Limit an extent: with several shards, the newest row shows only how far the fastest of them is."""
    if limit is None:
        return hot
    limit = max(limit, hot.first)
    return replace(hot, newest=min(hot.newest, limit), whole_until=min(hot.whole_until, limit))


# -- the checks --------------------------------------------------------------------------------


def _no_unexplained_gaps(inputs: _Inputs) -> dg.AssetCheckResult:
    """Run the lossless proof, and check the last hour's gaps and book comparisons."""
    from kalshi_platform.quality import continuity

    proof = continuity.prove(inputs.client, inputs.whole, inputs.proved)
    noticed = continuity.gaps(inputs.client, proof.until)
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
        sentence = (
            f"{holes:,} numbers are missing that no gap row names, {levels:,} levels of snapshots are"
            f" missing, {doubled:,} rows are stored more than once, in {len(proof.offenders)} subscriptions. Run kalshi-platform restore: it inserts what"
            " ClickHouse lacks of the archive, and names the hours that need --replace. What the archive lacks"
            " too is in the journal while that is kept: materialise those hours first."
        )
        return _failed("no_unexplained_gaps", ERROR, sentence, metadata)
    if lasting or noticed.mismatches:
        sentence = (
            f"{len(lasting)} gaps of the last hour left books stale for more than"
            f" {NOT_RESYNCED_S:.0f} s, and {len(noticed.mismatches)} compared levels differed from the"
            " exchange's. The streamer requests new snapshots itself; if it goes on, see the run's log."
        )
        return _failed("no_unexplained_gaps", WARN, sentence, metadata)
    lately = len(noticed.named)
    sentence = (
        f"{proof.frames:,} numbered frames of {proof.subscriptions} subscriptions are all accounted for;"
        f" {f'{lately} gaps in the last hour, named and resynced' if lately else 'no gap in the last hour'}."
    )
    return _passed("no_unexplained_gaps", sentence, metadata)


def _hot_cold_parity(inputs: _Inputs) -> dg.AssetCheckResult:
    """Compare sealed hours of the archive with ClickHouse."""
    import msgspec

    from kalshi_platform.health.verdict import behind
    from kalshi_platform.quality.parity import compare_hours

    lags = any(behind(report, "clickhouse", inputs.now) for report in inputs.health.values())
    found = compare_hours(inputs.settings, inputs.client, inputs.whole, inputs.now, behind=lags)
    offenders = [msgspec.to_builtins(difference) for difference in found.differences]
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
        hours = len({difference["hour"] for difference in offenders})
        sentence = (
            f"{len(offenders)} datasets of {hours} hours differ: {offenders[0]['dataset']} of"
            f" {offenders[0]['hour']}: {offenders[0]['what']} {offenders[0]['remedy']}"
        )
        return _failed("hot_cold_parity", ERROR, sentence, metadata)
    if not (found.equal or found.behind or found.waiting):
        return _passed("hot_cold_parity", "Nothing to check: no hour is sealed and hot yet.")
    sentence = f"{found.equal} sealed hours are the same in both stores."
    if found.waiting:
        sentence += f" {found.waiting} wait for their turn."
    if found.behind:
        sentence += f" ClickHouse lags: {len(found.behind)} sealed hours are not whole there yet."
    return _passed("hot_cold_parity", sentence, metadata)


def _books_uncrossed(inputs: _Inputs) -> dg.AssetCheckResult:
    """Find synced books that are, or stayed, crossed."""
    from kalshi_platform.quality.crossed_books import LONGER_THAN_S, crossed_books

    found = crossed_books(inputs.client, inputs.hot)
    metadata: dict[str, Any] = {
        "crossed": MetadataValue.int(len(found)),
        "crossed now": MetadataValue.int(sum(bool(row["lasts"]) for row in found)),
        "up to": MetadataValue.timestamp(inputs.hot.newest),
        **_tables({"offenders": found}),
    }
    if found:
        markets = len({row["market_ticker"] for row in found})
        sentence = (
            f"{len(found)} times a synced book of {markets} markets was crossed for more than"
            f" {LONGER_THAN_S:.0f} s. Compare with the exchange's page: if it shows another book, the recorded"
            " one is wrong; the streamer requests its snapshot again."
        )
        return _failed("books_uncrossed", WARN, sentence, metadata)
    return _passed("books_uncrossed", "No synced book is crossed or stayed crossed.", metadata)


def _clocks_monotonic(inputs: _Inputs) -> dg.AssetCheckResult:
    """Find clocks that fell, and count what the clocks proved after gaps and reconnects."""
    from kalshi_platform.quality import continuity

    found = continuity.clocks(inputs.client, inputs.hot.newest)
    metadata: dict[str, Any] = {
        "clocks that fell in the last hour": MetadataValue.int(len(found.fell)),
        "markets resynced": MetadataValue.int(found.markets),
        "of these unchanged": MetadataValue.int(found.unchanged),
        "of these changed": MetadataValue.int(found.changed),
        **_tables({"offenders": found.fell}),
    }
    if found.fell:
        markets = len({row["market_ticker"] for row in found.fell})
        sentence = (
            f"{len(found.fell)} times in the last hour the exchange's clock of a market fell outside of maintenance,"
            f" in {markets} markets. The streamer marked their books stale and requested new snapshots itself. If it"
            " goes on, ask the exchange whether it had maintenance that its schedule does not name."
        )
        return _failed("clocks_monotonic", WARN, sentence, metadata)
    sentence = "No clock fell in the last hour."
    if found.markets:
        sentence += (
            f" {found.markets:,} markets had a new snapshot after a gap or a reconnect: {found.unchanged:,} had"
            f" missed nothing, {found.changed:,} had changed."
        )
    return _passed("clocks_monotonic", sentence, metadata)


def _wire_drift(inputs: _Inputs) -> dg.AssetCheckResult:
    """Find what the exchange sends that is not known, or does not send any more."""
    from kalshi_platform.quality import continuity

    counts: dict[str, int] = {}
    for report in inputs.health.values():
        for finding, frames in ((report or {}).get("drift") or {}).items():
            counts[finding] = counts.get(finding, 0) + int(frames)
    found = [
        {**row, "frames": counts.get(f"{row['what']}|{row['type']}|{row['path']}")}
        for row in continuity.drift(inputs.client, inputs.hot.newest)
    ]
    metadata: dict[str, Any] = {
        "findings": MetadataValue.int(len(found)),
        **_tables({"offenders": found}),
    }
    if found:
        first = found[0]
        place = f"{first['type']} {first['path']}".strip()
        sentence = (
            f"The wire has changed in {len(found)} places in the last day: {first['what']} {place}, first seen at"
            f" {first['first_seen']:%Y-%m-%d %H:%M} UTC. Every known value is recorded as before, and the journal has the"
            " frames whole. Read the exchange's changelog; a later version can read what is new. `frames` counts those"
            " since the streamers' start."
        )
        return _failed("wire_drift", WARN, sentence, metadata)
    return _passed("wire_drift", "The wire is as this version knows it.", metadata)


_IN_CLICKHOUSE: Mapping[str, Callable[[_Inputs], dg.AssetCheckResult]] = {
    "no_unexplained_gaps": _no_unexplained_gaps,
    "hot_cold_parity": _hot_cold_parity,
    "books_uncrossed": _books_uncrossed,
    "clocks_monotonic": _clocks_monotonic,
    "wire_drift": _wire_drift,
}


def _fresh(
    reports: Reports,
    newest: datetime | None,
    now: datetime,
    unreachable: str,
    damaged: Mapping[int, str],
    *,
    configured: int,
) -> dg.AssetCheckResult:
    """Judge every shard's health report; the worst judgement decides."""
    from kalshi_platform.health import verdict

    found = [(shard, verdict.no_report(sentence)) for shard, sentence in damaged.items()]
    readable: dict[int, Mapping[str, Any]] = {}
    for shard, report in reports.items():
        if report is None and any(reports.values()) and shard < configured:
            found.append((shard, verdict.never_run(shard)))
            continue
        try:
            judgements = verdict.judge_shard(report, shard, configured, newest, now)
            _row(shard, report, now)  # raises, too, if other values are damaged
            readable[shard] = report or {}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            sentence = f"health.json is not a streamer's report ({error!r}). A running streamer writes it each second."
            judgements = [verdict.no_report(sentence)]
        found += [(shard, judged) for judged in judgements]
    shard, judged = verdict.worst_of(found)
    wrong = [entry for entry in found if entry[1].verdict is not verdict.Verdict.GOOD]
    worst_first = [(shard, judged), *(entry for entry in wrong if entry != (shard, judged))]
    sentence = " ".join(
        entry.sentence if len(reports) + len(damaged) == 1 else f"Shard {number}: {entry.sentence}"
        for number, entry in worst_first
    )
    metadata: dict[str, Any] = {"cause": MetadataValue.text(judged.cause)}
    metadata |= _ages(readable.get(shard, {}), now)
    if newest is not None:
        metadata["newest row in ClickHouse (s ago)"] = MetadataValue.float(
            round((now - newest).total_seconds(), 1)
        )
    if len(reports) > 1:
        metadata |= _tables({"shards": [_row(k, readable.get(k), now) for k in reports]})
    if judged.verdict is verdict.Verdict.ERROR:
        return _failed("fresh", ERROR, sentence, metadata)
    if unreachable:
        return _failed(
            "fresh",
            WARN,
            f"{unreachable} What is recorded stays in the journal. {sentence}",
            metadata,
        )
    if judged.verdict is verdict.Verdict.WARN:
        return _failed("fresh", WARN, sentence, metadata)
    return _passed("fresh", sentence, metadata)


def _ages(report: Mapping[str, Any], now: datetime) -> dict[str, MetadataValue]:
    """The ages in a report, in seconds; times that are not set are left out."""
    ages = {key: int(report.get(key) or 0) / 1e9 for key in _AGES}
    return {
        f"{_AGES[key]} (s ago)": MetadataValue.float(round(now.timestamp() - at, 1))
        for key, at in ages.items()
        if at
    }


def _row(shard: int, report: Mapping[str, Any] | None, now: datetime) -> dict[str, Any]:
    """A shard's row in the table of all shards."""
    values = report or {}
    ages = {key: value.value for key, value in _ages(values, now).items()}
    return {
        "shard": shard,
        "state": values.get("state", "none has run"),
        "markets": values.get("markets", 0),
        "synced": values.get("synced", 0),
        "frames": values.get("frames", 0),
        "gaps": values.get("gaps", 0),
        "not durable for (ms)": values.get("oldest_undurable_ms", 0),
        "not loaded yet": values.get("lag_frames", 0),
        **{f"{name} (s ago)": ages.get(f"{name} (s ago)") for name in _AGES.values()},
        "trouble": values.get("trouble"),
    }


_AGES = {
    "last_frame_ns": "last frame",
    "last_heard_ns": "last heard",
    "last_durable_ns": "last durable write",
    "updated_ns": "last report",
}


def _proved_until(instance: dg.DagsterInstance) -> datetime | None:
    """The time from which `no_unexplained_gaps` must look; None: from the beginning.

    After a clean run that is its end; after one with offenders its beginning, so that the check stays red until
    they are repaired or retention has deleted them.
    """
    key = dg.AssetCheckKey(dg.AssetKey(ASSET), "no_unexplained_gaps")
    storage = instance.event_log_storage
    for record in storage.get_asset_check_execution_history(key, limit=5):
        event = record.event.dagster_event if record.event else None
        evaluation = event.event_specific_data if event else None  # a planned run has another type
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
    description="Every check on the recording: complete, equal in both stores, sane, fresh.",
)


@dg.schedule(
    name="order_book_checks_schedule",
    job=order_book_checks_job,
    cron_schedule="4-59/5 * * * *",  # between the runs of the inventory's schedules
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

"""The verdict on a shard: whether it records, and if not, why and what to do.

Pure functions of the streamer's health report (`health/health_report.py`) and ClickHouse's newest row. They
distinguish a quiet exchange, its maintenance, a streamer that is down or hangs, a journal that does not become
durable, and a store that is behind. Callers differ only in their thresholds (`Profile`); no I/O happens here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from enum import StrEnum
from typing import Any
from zoneinfo import ZoneInfo

from kalshi_platform.processes import Identity

EXCHANGE_ZONE = ZoneInfo("America/New_York")
MAINTENANCE_DAY, MAINTENANCE_BEGINS, MAINTENANCE_ENDS = 3, time(3), time(5)
"""The exchange's own schedule: Thursday 03:00 to 05:00, New York time."""
SLOW_S = 5.0
"""Age of the oldest record that is not durable, from which a person should look."""
HEARD_S = 60.0
"""Longest silence of an open connection: the exchange pings every 10 s."""
BEHIND_S: Mapping[str, float] = {"clickhouse": 60.0, "parquet": 120.0}
"""Largest age of the oldest journal record that a store lacks. Parquet files are written once a minute."""


class Verdict(StrEnum):
    """The severity of a judgement."""

    GOOD = "good"
    WARN = "warn"
    ERROR = "error"


@dataclass(frozen=True)
class Judgement:
    """A state or fault of a shard, as a sentence with its remedy if it needs one."""

    verdict: Verdict
    cause: str
    """recording, nothing recorded, quiet, maintenance, starting, stopped, streamer down, streamer hangs, disk,
    disk slow, writer stuck, disconnected, silent, no books, `<task> failing`, or `<store> behind`."""
    sentence: str


@dataclass(frozen=True)
class Profile:
    """Thresholds in seconds from which a fault counts; one profile per kind of caller."""

    report_s: float
    """Largest age of a running streamer's report; it writes one each second."""
    stopped_s: float
    """How long a streamer may be stopped."""
    stopped: Verdict
    """The verdict on a streamer that is stopped for longer."""
    durable_s: float
    """Age of the oldest record that is not durable, from which a person must act."""
    connect_s: float
    """How long the exchange may be unreachable."""
    task_s: float
    """How long a background task may fail."""
    books_s: float
    """How long after the start every book may be stale."""


ALERTS = Profile(30.0, 120.0, Verdict.WARN, 60.0, 120.0, 120.0, 120.0)
"""Alerts wake people: the daily restart, the supervisor's restarts and reconnects must not."""
DOCTOR = Profile(15.0, 0.0, Verdict.ERROR, 15.0, 15.0, 0.0, 0.0)
"""`doctor` answers whether the platform records at this moment."""


CONSOLE = Profile(15.0, 0.0, Verdict.ERROR, 15.0, 30.0, 30.0, 60.0)
"""`up` reports to a person at the terminal: soon, but not a reconnect that succeeds at once."""

DIALLING = frozenset({"starting", "connecting"})
EXCHANGE_TASKS = frozenset({"market look-up", "trade backfill", "book comparison"})
"""Background tasks that ask the exchange."""
"""States of a streamer without a connection."""
NO_FRAMES = frozenset(
    {"stopped", "streamer down", "streamer hangs", "disk", "disconnected", "silent"}
)
"""The causes that keep frames from being received or stored."""


def maintenance(now: datetime) -> bool:
    """Whether the exchange's weekly maintenance is on."""
    local = now.astimezone(EXCHANGE_ZONE)
    return (
        local.weekday() == MAINTENANCE_DAY and MAINTENANCE_BEGINS <= local.time() < MAINTENANCE_ENDS
    )


def behind(report: Mapping[str, Any] | None, store: str, now: datetime) -> bool:
    """Whether the loader reports that this store has lacked rows for more than 10 s."""
    state = _store(report, store)
    if report is None or state is None:
        return False
    return bool(state["trouble"]) or _late(state, report, now) > 10


def _store(report: Mapping[str, Any] | None, store: str) -> Mapping[str, Any] | None:
    """A store's part of the report; None for a damaged report, which `judge` reports."""
    stores = report.get("stores") if report is not None else None
    return stores.get(store) if isinstance(stores, Mapping) else None


def _late(store: Mapping[str, Any], report: Mapping[str, Any], now: datetime) -> float:
    """Age in seconds of the oldest record that a store lacks; 0 if it lacks none.

    If that is unknown, the age of the store's last write, or before the first one, of the streamer's start.
    """
    if not store["lag"]:
        return 0.0
    return _age(store.get("oldest_ns") or store["committed_ns"] or report["started_ns"], now)


def loaded_to(reports: Iterable[Mapping[str, Any] | None], store: str) -> datetime | None:
    """The receive time up to which a store has the records of all shards; None if no shard limits it.

    A shard that stopped with everything loaded sets no limit. One that was killed does, until its remaining
    records are loaded after its next start.
    """
    limits = [
        state["loaded_ns"]
        for report in reports
        if report is not None
        and (state := _store(report, store)) is not None
        and "loaded_ns" in state  # a report of an earlier version has none
        and (report["state"] != "stopped" or state["lag"])
    ]
    return datetime.fromtimestamp(min(limits) / 1e9, UTC) if limits else None


def judge(
    report: Mapping[str, Any] | None,
    newest: datetime | None,
    now: datetime,
    profile: Profile = ALERTS,
) -> Judgement:
    """The worst judgement of a report: the first of `judgements`."""
    return judgements(report, newest, now, profile)[0]


def judgements(
    report: Mapping[str, Any] | None,
    newest: datetime | None,
    now: datetime,
    profile: Profile = ALERTS,
) -> list[Judgement]:
    """Every fault that a report shows, the worst first; if there is none, what the streamer does.

    `newest`: the time of ClickHouse's newest row; None if unknown. Raises KeyError, TypeError or ValueError for
    a report without the fields that a streamer writes.
    """
    if report is None:
        return [_good("nothing recorded", "Nothing to check: no streamer has run here yet.")]
    ended = _process(report, now, profile)
    if ended is not None:
        return [ended]
    if (hangs := _hang(report, now, profile)) is not None:
        return [hangs]  # the rest of an old report is outdated
    blocked = _blocked(
        report
    )  # a blocked streamer reads nothing, so missing frames are no second fault
    about_frames = (
        [blocked] if blocked else [_journal(report, now, profile), _books(report, now, profile)]
    )
    found = [
        *filter(None, about_frames),
        *_stores(report, newest, now),
        *_tasks(report, now, profile),
    ]
    doing = _exchange(report, now, profile)
    if not blocked and (doing.verdict is not Verdict.GOOD or not found):
        found.append(doing)
    return sorted(found, key=lambda judgement: _BADNESS[judgement.verdict], reverse=True)


def worst_of(judged: Iterable[tuple[int, Judgement]]) -> tuple[int, Judgement]:
    """The first of the worst judgements of several shards."""
    return max(judged, key=lambda pair: _BADNESS[pair[1].verdict])


_BADNESS = {Verdict.GOOD: 0, Verdict.WARN: 1, Verdict.ERROR: 2}


def judge_shard(
    report: Mapping[str, Any] | None,
    shard: int,
    configured: int,
    newest: datetime | None,
    now: datetime,
    *,
    profile: Profile = ALERTS,
) -> list[Judgement]:
    """`judgements` for a configured shard, `left_over` for one that is no longer configured."""
    if shard < configured:
        return judgements(report, newest, now, profile)
    return [left_over(report, shard, now)]


def no_report(sentence: str) -> Judgement:
    """The judgement of a shard whose report cannot be read."""
    return _warn("no report", sentence)


def never_run(shard: int) -> Judgement:
    """The judgement of a configured shard without a report, while others record."""
    return _warn(
        "not started",
        "No streamer has run here yet, so its share of the markets is not recorded. The sensor"
        f" streamer_supervisor starts it, or `kalshi-platform stream --shard {shard}` does.",
    )


def left_over(report: Mapping[str, Any] | None, shard: int, now: datetime) -> Judgement:
    """The judgement of a shard that is no longer configured: a store may lack records of its journal."""
    command = f"`kalshi-platform stream --shard {shard}`"
    lives = report is not None and not (_process(report, now, ALERTS) or _hang(report, now, ALERTS))
    if report is not None and lives and report["state"] == "draining":
        behind = _stores(report, None, now)
        return (
            behind[0]
            if behind
            else _good(
                "draining",
                f"Shard {shard} is no longer configured; {int(report['lag_frames']):,} records are being loaded.",
            )
        )
    if report is not None and lives:
        return _warn(
            "not configured",
            f"Shard {shard} is no longer configured, yet process {report['pid']} records it. The sensor"
            " streamer_supervisor restarts it, so that every market has one shard.",
        )
    return _warn(
        "not drained",
        f"Shard {shard} is no longer configured, and its journal may have records that no store has;"
        f" its hours stay open. The sensor streamer_supervisor drains it, or {command} does.",
    )


def _process(report: Mapping[str, Any], now: datetime, profile: Profile) -> Judgement | None:
    """A judgement if the streamer's process has stopped or died, else None."""
    updated = _age(report["updated_ns"], now)
    streamer = Identity(int(report["pid"]), float(report["pid_started"]))
    if report["state"] == "stopped":
        if updated <= profile.stopped_s:
            return _good("stopped", f"The streamer stopped {updated:.0f} s ago; a restart is due.")
        return Judgement(
            profile.stopped,
            "stopped",
            f"The streamer was stopped {_duration(updated)} ago. To record, switch the sensor"
            " streamer_supervisor on, or run `kalshi-platform stream`.",
        )
    if not streamer.alive:
        return _error(
            "streamer down",
            f"The streamer is down: process {streamer.pid} is gone, its last report is {_duration(updated)} old."
            " See that the daemon and the sensor streamer_supervisor run; they start a new one.",
        )
    return None


def _blocked(report: Mapping[str, Any]) -> Judgement | None:
    """A judgement if the disk does not accept writes: the streamer must not be killed, it holds records."""
    if report["state"] != "blocked":
        return None
    return _error(
        "disk",
        f"The disk does not accept writes: {report['journal_backlog_bytes']:,} bytes wait in memory, and an"
        " end of the process would lose them; from 64 MiB on the exchange is not read."
        f" {report['trouble'] or 'Make room, or give it a faster disk; it goes on by itself.'}",
    )


def _hang(report: Mapping[str, Any], now: datetime, profile: Profile) -> Judgement | None:
    """A judgement if the process lives but does not report, unless it is blocked: then it must not be killed."""
    updated = _age(report["updated_ns"], now)
    if updated <= profile.report_s or report["state"] == "blocked":
        return None
    return _error(
        "streamer hangs",
        f"The streamer hangs: process {report['pid']} lives, its last report is {_duration(updated)} old."
        f" End it (`kill -9 {report['pid']}`); the journal is kept and a new one goes on.",
    )


def _journal(report: Mapping[str, Any], now: datetime, profile: Profile) -> Judgement | None:
    """A judgement if received records do not become durable."""
    waiting_ms = report.get("oldest_undurable_ms", 0)  # a streamer of an earlier version has none
    age = waiting_ms / 1e3 + _age(report["updated_ns"], now) if waiting_ms else 0.0
    if age <= SLOW_S:
        return None
    fault = (
        f"Records received {_duration(age)} ago are not durable yet, and a kill would lose them."
    )
    if age > profile.durable_s:
        remedy = (
            report["trouble"]
            or "Give it a faster disk, or find what else writes there; it goes on by itself."
        )
        return _error("writer stuck", f"{fault} {remedy}")
    return _warn(
        "disk slow", f"{fault} {report['trouble'] or 'Look at what else writes to the disk.'}"
    )


def _stores(report: Mapping[str, Any], newest: datetime | None, now: datetime) -> list[Judgement]:
    """A judgement for each store that is behind the journal."""
    found = [
        judged
        for name, state in sorted(report["stores"].items())
        if (judged := _one_store(name, state, report, now)) is not None
    ]
    causes = {judgement.cause for judgement in found}
    if newest is not None and report["last_durable_ns"] and "clickhouse" in report["stores"]:
        late = report["last_durable_ns"] / 1e9 - newest.timestamp()
        if late > BEHIND_S["clickhouse"] and "clickhouse behind" not in causes:
            found.append(
                _warn(
                    "clickhouse behind",
                    f"ClickHouse's newest row is {_duration(late)} older than the journal's last write; nothing is"
                    " lost. It catches up by itself; see the streamer run's log if the age grows.",
                )
            )
    return found


def _one_store(
    name: str, state: Mapping[str, Any], report: Mapping[str, Any], now: datetime
) -> Judgement | None:
    """The judgement of a store that refuses rows or is behind, else None."""
    if state["refused"]:
        return _error(
            f"{name} behind",
            f"{name} refuses what is recorded; nothing is lost, it stays in the journal"
            f" ({state['lag']:,} records). {state['trouble']}",
        )
    late = _late(state, report, now)
    if late <= BEHIND_S[name]:
        return None
    return _warn(
        f"{name} behind",
        f"{name} lacks {state['lag']:,} records, the oldest of {_duration(late)} ago; nothing is lost."
        f" {state['trouble'] or 'It catches up by itself; see the streamer run log if not.'}",
    )


def _tasks(report: Mapping[str, Any], now: datetime, profile: Profile) -> list[Judgement]:
    """A judgement for each background task that has failed for longer than the profile allows.

    None for one that asks the exchange while the streamer connects again: `disconnected` explains it.
    """
    explained = EXCHANGE_TASKS if report["state"] == "connecting" else frozenset()
    return [
        _warn(
            f"{name} failing",
            f"Recording goes on, but its {name} has failed for {_duration(_age(task['failing_since_ns'], now))}:"
            f" {task['reason']} It is retried; the streamer's log has more.",
        )
        for name, task in report.get("tasks", {}).items()  # a report of an earlier version has none
        if name not in explained
        and task["failing_since_ns"]
        and _age(task["failing_since_ns"], now) > profile.task_s
    ]


def _books(report: Mapping[str, Any], now: datetime, profile: Profile) -> Judgement | None:
    """A judgement if the connection is open but no book is synced."""
    if str(report["state"]) in DIALLING:
        return None
    markets, synced = int(report.get("markets", 0)), int(report.get("synced", 0))
    if synced or not markets or _age(report["started_ns"], now) <= profile.books_s:
        return None
    return _error(
        "no books",
        f"0 of {markets:,} books are synced: no order book is complete. The streamer requests snapshots"
        " itself; if none comes within a minute, its log has the exchange's answers.",
    )


def _exchange(report: Mapping[str, Any], now: datetime, profile: Profile) -> Judgement:
    """What the connection to the exchange does."""
    state = str(report["state"])
    silence_s = _age(report["last_heard_ns"] or report["started_ns"], now)
    frame = _duration(_age(report["last_frame_ns"] or report["started_ns"], now))
    if maintenance(now) and state != "streaming":
        return _good("maintenance", "The exchange's weekly maintenance is on; nothing to do.")
    if state in DIALLING:
        return _dialling(silence_s, profile)
    if silence_s > HEARD_S:
        return _warn(
            "silent",
            f"The connection is open, but nothing was heard for {_duration(silence_s)}, not even a ping."
            " The streamer reconnects by itself; if this stays, look at the network.",
        )
    if state == "quiet":
        return _good(
            "quiet", f"The exchange is quiet: heartbeats come, the last frame is {frame} old."
        )
    return _good("recording", f"Recording: the last frame is {frame} old.")


def _dialling(silence_s: float, profile: Profile) -> Judgement:
    if silence_s <= profile.connect_s:
        return _good("starting", "The streamer is connecting.")
    return _error(
        "disconnected",
        f"The exchange has not been reached for {_duration(silence_s)}."
        " `kalshi-platform doctor` says why; the streamer keeps trying to connect.",
    )


def _age(ns: int, now: datetime) -> float:
    """Age in seconds; both times are from this machine's clock."""
    return (now - datetime.fromtimestamp(0, now.tzinfo)) / timedelta(seconds=1) - ns / 1e9


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _good(cause: str, sentence: str) -> Judgement:
    return Judgement(Verdict.GOOD, cause, sentence)


def _warn(cause: str, sentence: str) -> Judgement:
    return Judgement(Verdict.WARN, cause, sentence)


def _error(cause: str, sentence: str) -> Judgement:
    return Judgement(Verdict.ERROR, cause, sentence)

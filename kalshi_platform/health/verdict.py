"""How old is the newest of everything, and which of the many reasons for age is it?

A pure judgement over what the streamer reports of itself (`health/health_report.py`) and how far ClickHouse is. It
tells apart: a quiet exchange, its maintenance, a streamer that is down or hangs, a journal that does
not become durable, and a store that is behind. Every judgement says what to do.
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
"""Age of the oldest record that is not durable: from here on a person should look."""
HEARD_S = 60.0
"""Oldest sign of life of an open connection: the exchange pings each 10 s."""
BEHIND_S: Mapping[str, float] = {"clickhouse": 60.0, "parquet": 120.0}
"""How old the oldest record may be that is in the journal and not in a store. Parquet files are written
once a minute."""


class Verdict(StrEnum):
    """How bad it is."""

    GOOD = "good"
    WARN = "warn"
    ERROR = "error"


@dataclass(frozen=True)
class Judgement:
    """One sentence of what is, and one of what to do where something is to be done."""

    verdict: Verdict
    cause: str
    """recording, nothing recorded, quiet, maintenance, starting, stopped, streamer down, streamer hangs, disk,
    disk slow, writer stuck, disconnected, silent, no books, `<task> failing`, or `<store> behind`."""
    sentence: str


@dataclass(frozen=True)
class Profile:
    """How long what may be wrong before it counts, in seconds; by who asks."""

    report_s: float
    """Oldest report of a living streamer, which writes one each second."""
    stopped_s: float
    """How long a streamer may be stopped."""
    stopped: Verdict
    """What it is after that."""
    durable_s: float
    """Age of the oldest record that is not durable: from here on a person must look."""
    connect_s: float
    """How long a connection may be away."""
    task_s: float
    """How long a task beside the recording may fail."""
    books_s: float
    """From the start, how long no book at all may be synced."""


ALERTS = Profile(30.0, 120.0, Verdict.WARN, 60.0, 120.0, 120.0, 120.0)
"""Who is woken by it: a daily relief, the supervisor's restart and a redial are no news."""
DOCTOR = Profile(15.0, 0.0, Verdict.ERROR, 15.0, 15.0, 0.0, 0.0)
"""Who asks now: whether it records at this moment."""


CONSOLE = Profile(15.0, 0.0, Verdict.ERROR, 15.0, 30.0, 30.0, 60.0)
"""Who sits before `up`: soon, but no redial that works at once."""

DIALLING = frozenset({"starting", "connecting"})
"""States of a streamer without a connection."""
NO_FRAMES = frozenset(
    {"stopped", "streamer down", "streamer hangs", "disk", "disconnected", "silent"}
)
"""The causes that keep frames from coming, or from being kept."""


def maintenance(now: datetime) -> bool:
    """Whether the exchange's weekly maintenance is on."""
    there = now.astimezone(EXCHANGE_ZONE)
    return (
        there.weekday() == MAINTENANCE_DAY and MAINTENANCE_BEGINS <= there.time() < MAINTENANCE_ENDS
    )


def behind(report: Mapping[str, Any] | None, store: str, now: datetime) -> bool:
    """Whether the load says that this store lacks rows, and has been for some seconds."""
    it = _store(report, store)
    if report is None or it is None:
        return False
    return bool(it["trouble"]) or _late(it, report, now) > 10


def _store(report: Mapping[str, Any] | None, store: str) -> Mapping[str, Any] | None:
    """What a report says of a store; None for a damaged report, which `judge` names."""
    stores = report.get("stores") if report is not None else None
    return stores.get(store) if isinstance(stores, Mapping) else None


def _late(store: Mapping[str, Any], report: Mapping[str, Any], now: datetime) -> float:
    """Age in seconds of the oldest record that a store lacks; 0 where it lacks none.

    Where that is not known, the age of the store's last write, or of the streamer before the first one.
    """
    if not store["lag"]:
        return 0.0
    return _age(store.get("oldest_ns") or store["committed_ns"] or report["started_ns"], now)


def loaded_to(reports: Iterable[Mapping[str, Any] | None], store: str) -> datetime | None:
    """Up to when the store has what all shards have received; None where nothing limits that.

    A shard that stopped with everything loaded sets no limit. One that was killed does, and has its rest
    loaded when it is started again.
    """
    limits = [
        it["loaded_ns"]
        for report in reports
        if report is not None
        and (it := _store(report, store)) is not None
        and "loaded_ns" in it  # a report of an earlier version has none
        and (report["state"] != "stopped" or it["lag"])
    ]
    return datetime.fromtimestamp(min(limits) / 1e9, UTC) if limits else None


def judge(
    report: Mapping[str, Any] | None,
    newest: datetime | None,
    now: datetime,
    profile: Profile = ALERTS,
) -> Judgement:
    """The worst of what the report amounts to: the first of `judgements`."""
    return judgements(report, newest, now, profile)[0]


def judgements(
    report: Mapping[str, Any] | None,
    newest: datetime | None,
    now: datetime,
    profile: Profile = ALERTS,
) -> list[Judgement]:
    """Everything that is wrong by the report, the worst first; where nothing is, what it does.

    `newest`: ClickHouse's newest row; None where it is not known. Raises KeyError, TypeError or ValueError
    where the report lacks what a streamer writes.
    """
    if report is None:
        return [_good("nothing recorded", "Nothing to judge: no streamer has run here yet.")]
    ended = _process(report, now, profile)
    if ended is not None:
        return [ended]
    if (hangs := _hang(report, now, profile)) is not None:
        return [hangs]  # what it said last is no longer so
    blocked = _blocked(report)  # then nothing is read, and what does not come is no other fault
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
    return sorted(found, key=lambda it: _BADNESS[it.verdict], reverse=True)


def worst_of(judged: Iterable[tuple[int, Judgement]]) -> tuple[int, Judgement]:
    """Of several shards' judgements the first of the worst."""
    return max(judged, key=lambda it: _BADNESS[it[1].verdict])


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
    """`judgements`, or for a shard beyond those that are configured, `left_over`."""
    if shard < configured:
        return judgements(report, newest, now, profile)
    return [left_over(report, shard, now)]


def no_report(sentence: str) -> Judgement:
    """Of a shard whose report cannot be read."""
    return _warn("no report", sentence)


def never_run(shard: int) -> Judgement:
    """Of a configured shard of which there is no report, while others record."""
    return _warn(
        "not started",
        "No streamer has run here yet, so its share of the markets is not recorded. The sensor"
        f" streamer_supervisor starts it, or `kalshi-platform stream --shard {shard}` does.",
    )


def left_over(report: Mapping[str, Any] | None, shard: int, now: datetime) -> Judgement:
    """The same for a shard that is no longer configured: a store may lack what its journal has."""
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
    """Whether there is a streamer at all."""
    updated = _age(report["updated_ns"], now)
    who = Identity(int(report["pid"]), float(report["pid_started"]))
    if report["state"] == "stopped":
        if updated <= profile.stopped_s:
            return _good("stopped", f"The streamer stopped {updated:.0f} s ago; a restart is due.")
        return Judgement(
            profile.stopped,
            "stopped",
            f"The streamer was stopped {_told(updated)} ago. To record, switch the sensor"
            " streamer_supervisor on, or run `kalshi-platform stream`.",
        )
    if not who.alive:
        return _error(
            "streamer down",
            f"The streamer is down: process {who.pid} is gone, its last report is {_told(updated)} old."
            " See that the daemon and the sensor streamer_supervisor run; they start a new one.",
        )
    return None


def _blocked(report: Mapping[str, Any]) -> Judgement | None:
    """Whether the disk keeps it from writing. Before the age of its report: ending it would lose what it holds."""
    if report["state"] != "blocked":
        return None
    return _error(
        "disk",
        f"The disk does not take what comes: {report['journal_backlog_bytes']:,} bytes wait in memory, and an"
        " end of the process would lose them; from 64 MiB on the exchange is not read."
        f" {report['trouble'] or 'Make room, or give it a faster disk; it goes on by itself.'}",
    )


def _hang(report: Mapping[str, Any], now: datetime, profile: Profile) -> Judgement | None:
    """Whether the process lives and does not report; not while it is blocked, when it must not be ended."""
    updated = _age(report["updated_ns"], now)
    if updated <= profile.report_s or report["state"] == "blocked":
        return None
    return _error(
        "streamer hangs",
        f"The streamer hangs: process {report['pid']} lives, its last report is {_told(updated)} old."
        f" End it (`kill -9 {report['pid']}`); the journal is kept and a new one goes on.",
    )


def _journal(report: Mapping[str, Any], now: datetime, profile: Profile) -> Judgement | None:
    """Whether what comes is kept."""
    waiting_ms = report.get("oldest_undurable_ms", 0)  # a streamer of an earlier version has none
    age = waiting_ms / 1e3 + _age(report["updated_ns"], now) if waiting_ms else 0.0
    if age <= SLOW_S:
        return None
    what = f"What came {_told(age)} ago is not durable yet, and a kill would lose it."
    if age > profile.durable_s:
        remedy = (
            report["trouble"]
            or "Give it a faster disk, or find what else writes there; it goes on by itself."
        )
        return _error("writer stuck", f"{what} {remedy}")
    return _warn(
        "disk slow", f"{what} {report['trouble'] or 'Look at what else writes to the disk.'}"
    )


def _stores(report: Mapping[str, Any], newest: datetime | None, now: datetime) -> list[Judgement]:
    """Whether what is kept reaches each of the stores."""
    found = [
        judged
        for name, it in sorted(report["stores"].items())
        if (judged := _one_store(name, it, report, now)) is not None
    ]
    causes = {it.cause for it in found}
    if newest is not None and report["last_durable_ns"] and "clickhouse" in report["stores"]:
        late = report["last_durable_ns"] / 1e9 - newest.timestamp()
        if late > BEHIND_S["clickhouse"] and "clickhouse behind" not in causes:
            found.append(
                _warn(
                    "clickhouse behind",
                    f"ClickHouse's newest row is {_told(late)} older than the journal's last write; nothing is"
                    " lost. It catches up by itself; see the streamer run's log if the age grows.",
                )
            )
    return found


def _one_store(
    name: str, it: Mapping[str, Any], report: Mapping[str, Any], now: datetime
) -> Judgement | None:
    if it["refused"]:
        return _error(
            f"{name} behind",
            f"{name} refuses what is recorded; nothing is lost, it stays in the journal"
            f" ({it['lag']:,} records). {it['trouble']}",
        )
    late = _late(it, report, now)
    if late <= BEHIND_S[name]:
        return None
    return _warn(
        f"{name} behind",
        f"{name} lacks {it['lag']:,} records, the oldest of {_told(late)} ago; nothing is lost."
        f" {it['trouble'] or 'It catches up by itself; see the streamer run log if not.'}",
    )


def _tasks(report: Mapping[str, Any], now: datetime, profile: Profile) -> list[Judgement]:
    """What beside the recording has failed for a while."""
    return [
        _warn(
            f"{name} failing",
            f"Recording goes on, but its {name} has failed for {_told(_age(it['failing_since_ns'], now))}:"
            f" {it['reason']} It is retried; the streamer's log has more.",
        )
        for name, it in report.get("tasks", {}).items()  # a report of an earlier version has none
        if it["failing_since_ns"] and _age(it["failing_since_ns"], now) > profile.task_s
    ]


def _books(report: Mapping[str, Any], now: datetime, profile: Profile) -> Judgement | None:
    """Whether the books of its markets have come, over a connection that there is."""
    if str(report["state"]) in DIALLING:
        return None
    markets, synced = int(report.get("markets", 0)), int(report.get("synced", 0))
    if synced or not markets or _age(report["started_ns"], now) <= profile.books_s:
        return None
    return _error(
        "no books",
        f"0 of {markets:,} books are synced: no order book is recorded whole. Snapshots are asked for by"
        " themselves; if none comes within a minute, the streamer's log has what the exchange answers.",
    )


def _exchange(report: Mapping[str, Any], now: datetime, profile: Profile) -> Judgement:
    """Whether anything comes."""
    state = str(report["state"])
    heard = _age(report["last_heard_ns"] or report["started_ns"], now)
    frame = _told(_age(report["last_frame_ns"] or report["started_ns"], now))
    if maintenance(now) and state != "streaming":
        return _good("maintenance", "The exchange's weekly maintenance is on; nothing to do.")
    if state in DIALLING:
        return _dialling(heard, profile)
    if heard > HEARD_S:
        return _warn(
            "silent",
            f"The connection is open, but nothing was heard for {_told(heard)}, not even a ping."
            " The streamer dials again by itself; if this stays, look at the network.",
        )
    if state == "quiet":
        return _good(
            "quiet", f"The exchange is quiet: heartbeats come, the last frame is {frame} old."
        )
    return _good("recording", f"Recording: the last frame is {frame} old.")


def _dialling(heard: float, profile: Profile) -> Judgement:
    if heard <= profile.connect_s:
        return _good("starting", "The streamer is connecting.")
    return _error(
        "disconnected",
        f"The exchange has not been reached for {_told(heard)}."
        " `kalshi-platform doctor` says why; the streamer keeps dialling.",
    )


def _age(ns: int, now: datetime) -> float:
    """Seconds, counted by this machine's clock on both ends."""
    return (now - datetime.fromtimestamp(0, now.tzinfo)) / timedelta(seconds=1) - ns / 1e9


def _told(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _good(cause: str, sentence: str) -> Judgement:
    return Judgement(Verdict.GOOD, cause, sentence)


def _warn(cause: str, sentence: str) -> Judgement:
    return Judgement(Verdict.WARN, cause, sentence)


def _error(cause: str, sentence: str) -> Judgement:
    return Judgement(Verdict.ERROR, cause, sentence)

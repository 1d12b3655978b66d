"""How old is the newest of everything, and which of the many reasons for age is it?

A pure judgement over what the streamer reports of itself (`health_report.py`) and how far ClickHouse is. It
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
REPORT_S = 30.0
"""Oldest report of a living streamer, which writes one each second."""
RESTART_S = 120.0
"""How long a streamer may be stopped: it is relieved every day, and the supervisor takes its time."""
SLOW_S = 5.0
DURABLE_S = 60.0
"""Age of the oldest record that is not durable: from here on a person should look, and must."""
HEARD_S = 60.0
"""Oldest sign of life of an open connection: the exchange pings each 10 s."""
CONNECT_S = 120.0
"""How long a connection may be away before somebody should look."""
BEHIND_S: Mapping[str, float] = {"clickhouse": 60.0, "parquet": 120.0}
"""How old the oldest record may be that is in the journal and not in a store. Parquet files are written
once a minute."""
TASK_S = 120.0
"""How long a task beside the recording may fail before somebody should look."""


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
    """recording, nothing recorded, quiet, maintenance, starting, stopped, streamer down, streamer
    hangs, disk, disk slow, writer stuck, disconnected, silent, task failing, or `<store> behind`."""
    sentence: str


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


def judge(report: Mapping[str, Any] | None, newest: datetime | None, now: datetime) -> Judgement:
    """What the report amounts to. `newest`: ClickHouse's newest row; None where it is not known.

    Raises KeyError, TypeError or ValueError where the report lacks what a streamer writes.
    """
    if report is None:
        return _good("nothing recorded", "Nothing to judge: no streamer has run here yet.")
    return (
        _process(report, now)
        or _blocked(report)
        or _hang(report, now)
        or _journal(report, now)
        or _stores(report, newest, now)
        or _tasks(report, now)
        or _exchange(report, now)
    )


def judge_shard(
    report: Mapping[str, Any] | None,
    shard: int,
    configured: int,
    newest: datetime | None,
    now: datetime,
) -> Judgement:
    """`judge`, or for a shard beyond those that are configured, `left_over`."""
    if shard < configured:
        return judge(report, newest, now)
    return left_over(report, shard, now)


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
    if (
        report is not None
        and report["state"] == "draining"
        and not (_process(report, now) or _hang(report, now))
    ):
        return _stores(report, None, now) or _good(
            "draining", f"Shard {shard} is no longer configured, and is being drained."
        )
    return _warn(
        "not drained",
        f"Shard {shard} is no longer configured, and its journal may have records that no store has;"
        f" its hours stay open. The sensor streamer_supervisor drains it, or {command} does.",
    )


def _process(report: Mapping[str, Any], now: datetime) -> Judgement | None:
    """Whether there is a streamer at all."""
    updated = _age(report["updated_ns"], now)
    who = Identity(int(report["pid"]), float(report["pid_started"]))
    if report["state"] == "stopped":
        if updated <= RESTART_S:
            return _good("stopped", f"The streamer stopped {updated:.0f} s ago; a restart is due.")
        return _warn(
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


def _hang(report: Mapping[str, Any], now: datetime) -> Judgement | None:
    """Whether the process lives and does not report."""
    updated = _age(report["updated_ns"], now)
    if updated <= REPORT_S:
        return None
    return _error(
        "streamer hangs",
        f"The streamer hangs: process {report['pid']} lives, its last report is {_told(updated)} old."
        f" End it (`kill -9 {report['pid']}`); the journal is kept and a new one goes on.",
    )


def _journal(report: Mapping[str, Any], now: datetime) -> Judgement | None:
    """Whether what comes is kept."""
    waiting_ms = report.get("oldest_undurable_ms", 0)  # a streamer of an earlier version has none
    age = waiting_ms / 1e3 + _age(report["updated_ns"], now) if waiting_ms else 0.0
    if age <= SLOW_S:
        return None
    what = f"What came {_told(age)} ago is not durable yet, and a kill would lose it."
    if age > DURABLE_S:
        remedy = report["trouble"] or "Look at the disk; end the run if it does not go on."
        return _error("writer stuck", f"{what} {remedy}")
    return _warn(
        "disk slow", f"{what} {report['trouble'] or 'Look at what else writes to the disk.'}"
    )


def _stores(report: Mapping[str, Any], newest: datetime | None, now: datetime) -> Judgement | None:
    """Whether what is kept reaches the stores."""
    for name, it in sorted(report["stores"].items(), key=lambda item: not item[1]["refused"]):
        if it["refused"]:
            return _error(
                f"{name} behind",
                f"{name} refuses what is recorded; nothing is lost, it stays in the journal"
                f" ({it['lag']:,} records). {it['trouble']}",
            )
        late = _late(it, report, now)
        if late > BEHIND_S[name]:
            return _warn(
                f"{name} behind",
                f"{name} lacks {it['lag']:,} records, the oldest of {_told(late)} ago; nothing is lost."
                f" {it['trouble'] or 'It catches up by itself; see the streamer run log if not.'}",
            )
    if newest is not None and report["last_durable_ns"] and "clickhouse" in report["stores"]:
        late = report["last_durable_ns"] / 1e9 - newest.timestamp()
        if late > BEHIND_S["clickhouse"]:
            return _warn(
                "clickhouse behind",
                f"ClickHouse's newest row is {_told(late)} older than the journal's last write; nothing is"
                " lost. It catches up by itself; see the streamer run's log if the age grows.",
            )
    return None


def _tasks(report: Mapping[str, Any], now: datetime) -> Judgement | None:
    """Whether something beside the recording has failed for a while."""
    for name, it in report.get("tasks", {}).items():  # a report of an earlier version has none
        if it["failing_since_ns"] and _age(it["failing_since_ns"], now) > TASK_S:
            return _warn(
                "task failing",
                f"Recording goes on, but its {name} has failed for {_told(_age(it['failing_since_ns'], now))}:"
                f" {it['reason']} It is retried; the streamer's log has more.",
            )
    return None


def _exchange(report: Mapping[str, Any], now: datetime) -> Judgement:
    """Whether anything comes."""
    state = str(report["state"])
    heard = _age(report["last_heard_ns"] or report["started_ns"], now)
    frame = _told(_age(report["last_frame_ns"] or report["started_ns"], now))
    if maintenance(now) and state != "streaming":
        return _good("maintenance", "The exchange's weekly maintenance is on; nothing to do.")
    if state in {"starting", "connecting"}:
        return _dialling(heard)
    if heard > HEARD_S:
        return _warn(
            "silent",
            f"The connection is open, but nothing was heard for {_told(heard)}, not even a ping."
            " The streamer dials anew by itself; if this stays, look at the network.",
        )
    if state == "quiet":
        return _good(
            "quiet", f"The exchange is quiet: heartbeats come, the last frame is {frame} old."
        )
    return _good("recording", f"Recording: the last frame is {frame} old.")


def _dialling(heard: float) -> Judgement:
    if heard <= CONNECT_S:
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

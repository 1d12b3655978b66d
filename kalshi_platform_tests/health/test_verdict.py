"""Every cause of a stalled recording is recognised, with its remedy."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from kalshi_platform.health import health_report
from kalshi_platform.health.verdict import (
    ALERTS,
    DOCTOR,
    Profile,
    Verdict,
    behind,
    judge,
    judgements,
    maintenance,
)
from kalshi_platform.processes import Identity
from kalshi_platform.recorder.streamer import AUDIT, PRUNING
from kalshi_platform.recorder.upkeep import BACKFILL, LOOK_UP

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
MAINTENANCE = datetime(2026, 11, 26, 9, tzinfo=UTC)  # a Thursday, 04:00 in New York
GOOD, WARN, ERROR = Verdict.GOOD, Verdict.WARN, Verdict.ERROR


def ago(seconds: float, now: datetime = NOW) -> int:
    return int((now.timestamp() - seconds) * 1e9)


def report(now: datetime = NOW, **others: Any) -> dict[str, Any]:
    """The report of a healthy streamer, with the identity of this process."""
    store = {"lag": 0, "committed_ns": ago(1, now), "trouble": None, "refused": False}
    return {
        "pid": os.getpid(),
        "pid_started": Identity.own().started,
        "state": "streaming",
        "started_ns": ago(600, now),
        "updated_ns": ago(0.5, now),
        "last_frame_ns": ago(1, now),
        "last_heard_ns": ago(1, now),
        "last_durable_ns": ago(1, now),
        "journal_backlog_bytes": 3_400_000,
        "stores": {"parquet": dict(store), "clickhouse": dict(store)},
        "trouble": None,
    } | others


def lagging(name: str, **others: Any) -> dict[str, Any]:
    made = report()
    made["stores"][name] |= others
    return made


@pytest.mark.parametrize(
    ("state", "verdict", "cause", "words"),
    [
        (report(), GOOD, "recording", "1 s old"),
        (report(state="quiet", last_frame_ns=ago(7200)), GOOD, "quiet", "heartbeats come"),
        (report(pid_started=1.0), ERROR, "streamer down", "is gone"),
        (report(updated_ns=ago(90)), ERROR, "streamer hangs", "kill -9"),
        (report(state="stopped", updated_ns=ago(20)), GOOD, "stopped", "restart is due"),
        (report(state="stopped", updated_ns=ago(600)), WARN, "stopped", "streamer_supervisor"),
        (report(state="blocked"), ERROR, "disk", "Make room"),
        (report(state="blocked", updated_ns=ago(600)), ERROR, "disk", "3,400,000 bytes wait"),
        (report(state="blocked", pid_started=1.0), ERROR, "streamer down", "is gone"),
        (report(oldest_undurable_ms=300_000), ERROR, "writer stuck", "5 min ago are not durable"),
        (report(oldest_undurable_ms=24_000), WARN, "disk slow", "24 s ago are not durable"),
        (report(oldest_undurable_ms=3_000, updated_ns=ago(25)), WARN, "disk slow", "28 s ago"),
        (report(oldest_undurable_ms=3_000), GOOD, "recording", "1 s old"),
        (report(state="connecting", last_heard_ns=ago(30)), GOOD, "starting", "connecting"),
        (report(state="connecting", last_heard_ns=ago(600)), ERROR, "disconnected", "doctor"),
        (report(last_heard_ns=ago(90)), WARN, "silent", "not even a ping"),
        (
            lagging("clickhouse", lag=9_000, committed_ns=ago(600), trouble="It is away."),
            WARN,
            "clickhouse behind",
            "It is away.",
        ),
        (
            lagging("clickhouse", lag=9, refused=True, trouble="Wrong password."),
            ERROR,
            "clickhouse behind",
            "Wrong password.",
        ),
        (lagging("parquet", lag=9, committed_ns=ago(600)), WARN, "parquet behind", "10 min ago"),
        (
            lagging("clickhouse", lag=9, committed_ns=ago(1), oldest_ns=ago(61)),
            WARN,
            "clickhouse behind",
            "the oldest of 61 s ago",
        ),
        (
            lagging("parquet", lag=9, committed_ns=ago(600), oldest_ns=ago(100)),
            GOOD,
            "recording",
            "1 s old",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_cause_has_its_judgement(
    state: dict[str, Any], verdict: Verdict, cause: str, words: str
) -> None:
    judged = judge(state, NOW - timedelta(seconds=3), NOW)
    assert (judged.verdict, judged.cause) == (verdict, cause)
    assert words in judged.sentence


def test_of_two_faults_the_worse_comes_first() -> None:
    away = lagging("clickhouse", lag=9_000, committed_ns=ago(600), trouble="It is away.")
    both = away | {"state": "connecting", "last_heard_ns": ago(216)}
    assert causes(both) == ["disconnected", "clickhouse behind"]
    refused = lagging("parquet", lag=9, refused=True, trouble="No bucket.")
    refused["stores"]["clickhouse"] |= {"lag": 5, "committed_ns": ago(600)}
    refused |= {"tasks": {"pruning": {"failing_since_ns": ago(600), "reason": "No."}}}
    assert causes(refused) == ["parquet behind", "clickhouse behind", "pruning failing"]
    assert causes(refused | {"state": "connecting", "last_heard_ns": ago(300)})[:2] == [
        "parquet behind",
        "disconnected",
    ]


def test_a_cause_hides_only_its_consequences() -> None:
    blocked = lagging("clickhouse", lag=9, committed_ns=ago(600))
    blocked |= {"state": "blocked", "last_heard_ns": ago(300), "markets": 3, "synced": 0}
    assert causes(blocked) == ["disk", "clickhouse behind"]
    assert causes(blocked | {"pid_started": 1.0}) == ["streamer down"]
    assert causes(report(updated_ns=ago(90), markets=3, synced=0)) == ["streamer hangs"]


def test_a_task_that_asks_the_exchange_is_no_incident_of_its_own_while_that_is_away() -> None:
    failing = {"failing_since_ns": ago(600), "reason": "Unreachable."}
    tasks = dict.fromkeys((LOOK_UP, BACKFILL, AUDIT, PRUNING), failing)
    away = report(state="connecting", last_heard_ns=ago(900), tasks=tasks)
    assert causes(away) == ["disconnected", "pruning failing"]
    assert set(causes(away | {"state": "streaming"})) >= {f"{name} failing" for name in tasks}


def test_books_that_never_sync_are_an_error_after_a_while() -> None:
    assert causes(report(markets=3, synced=0)) == ["no books"]
    assert causes(report(markets=3, synced=0, started_ns=ago(30))) == ["recording"]
    assert causes(report(markets=3, synced=0, started_ns=ago(30)), DOCTOR) == ["no books"]
    away = report(markets=3, synced=0, state="connecting", last_heard_ns=ago(200))
    assert causes(away) == ["disconnected"]  # which explains the missing frames
    assert causes(report(markets=3, synced=1)) == ["recording"]


def test_doctor_calls_what_does_not_record_now_an_error() -> None:
    for off in (
        report(state="stopped", updated_ns=ago(1)),
        report(state="connecting", last_heard_ns=ago(20)),
    ):
        assert judge(off, None, NOW).verdict is GOOD
        assert judge(off, None, NOW, DOCTOR).verdict is ERROR


def causes(report: dict[str, Any], profile: Profile = ALERTS) -> list[str]:
    return [judged.cause for judged in judgements(report, None, NOW, profile)]


def test_clickhouse_without_the_newest_rows_is_behind() -> None:
    judged = judge(report(), NOW - timedelta(minutes=10), NOW)
    assert (judged.verdict, judged.cause) == (WARN, "clickhouse behind")


def test_no_streamer_yet_is_nothing_to_check(tmp_path: Path) -> None:
    assert judge(health_report.read(tmp_path), None, NOW).cause == "nothing recorded"


def test_maintenance_is_thursday_03_to_05_new_york_all_year() -> None:
    assert maintenance(MAINTENANCE)
    assert not maintenance(MAINTENANCE - timedelta(days=1))
    assert not maintenance(MAINTENANCE + timedelta(hours=1))
    assert maintenance(datetime(2026, 7, 2, 7, tzinfo=UTC))
    assert not maintenance(datetime(2026, 7, 2, 9, tzinfo=UTC))


def test_maintenance_excuses_the_exchange_but_no_dead_streamer() -> None:
    away = report(MAINTENANCE, state="connecting", last_heard_ns=ago(3000, MAINTENANCE))
    assert judge(away, None, MAINTENANCE).cause == "maintenance"
    assert judge(away | {"pid_started": 1.0}, None, MAINTENANCE).verdict is ERROR


def test_behind_follows_the_loader_not_a_moments_lag() -> None:
    assert not behind(lagging("clickhouse", lag=100), "clickhouse", NOW)
    assert behind(lagging("clickhouse", lag=100, committed_ns=ago(60)), "clickhouse", NOW)
    assert behind(lagging("clickhouse", lag=100, oldest_ns=ago(60)), "clickhouse", NOW)
    assert not behind(
        lagging("clickhouse", lag=9, committed_ns=ago(60), oldest_ns=ago(1)), "clickhouse", NOW
    )
    assert behind(lagging("clickhouse", trouble="away"), "clickhouse", NOW)
    assert not behind(None, "clickhouse", NOW)

"""The audit reports what it examined, and what is stale, missing or unreadable."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.clickhouse import migrations
from kalshi_platform.clickhouse.client import connect
from kalshi_platform.inventory import audit, judged
from kalshi_platform.inventory.audit import Parameters, Status
from kalshi_platform.inventory.judged import Concern, Engine, Judged
from kalshi_platform.inventory.tables import Standing
from kalshi_platform.settings import Settings
from kalshi_platform_tests.inventory.conftest import Run
from kalshi_platform_tests.inventory.planted import TICKER, Planted, ago

BEGIN = datetime(2026, 11, 22, tzinfo=UTC)


def look(planted: Planted, *, max_age_s: float | None = None, paper: bool = True) -> Judged:
    start = audit.since(planted.client, Parameters())
    return judged.look(planted.client, Parameters(), start, max_age_s=max_age_s, paper=paper)


def concerns(planted: Planted, max_age_s: float | None = None) -> list[Concern]:
    return [caution.concern for caution in look(planted, max_age_s=max_age_s).cautions()]


# -- what was judged -----------------------------------------------------------------------------


def test_engines_markets_decisions_and_the_newest_age_are_said(planted: Planted, run: Run) -> None:
    planted.snapshot(ago(100), 0)
    for second, engine, ticker in ((90, "a", TICKER), (80, "b", TICKER), (75, "b", "ANOTHER")):
        planted.decision(ago(second), engine_instance_id=engine, market_ticker=ticker)
    result = run("qa")
    assert "Judged: 3 decisions of 2 markets by 2 engines, the newest at " in result.stdout
    assert re.search(r"the newest at [-0-9 :.]+ UTC, \d+ s old; snapshots of 1 of", result.stdout)
    figures = json.loads(run("qa", "--format", "json").stdout)["judged"]
    assert figures.pop("newest_decision_age_s") in range(70, 110)
    assert figures.pop("newest_decision_at").endswith("Z")
    assert figures == {
        "engines": 2,
        "markets": 2,
        "decisions": 3,
        "decisions_without_position": 0,
        "markets_with_snapshot": 1,
    }


def test_nothing_found_over_nothing_is_not_called_no_anomalies(planted: Planted, run: Run) -> None:
    result = run("qa", "--all")
    assert result.exit_code == 0
    assert "Judged: no decisions." in result.stdout
    assert result.stdout.endswith("Nothing was judged.\n")


# -- stale, missing, not judgeable -----------------------------------------------------------------


def test_fresh_data_raises_no_concern_and_exits_0(planted: Planted, run: Run) -> None:
    planted.snapshot(ago(20), 0)
    planted.decision(ago(10))
    result = run("qa", "--max-age", "300")
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stdout


def test_stale_decisions_are_a_warning_and_with_max_age_exit_2(planted: Planted, run: Run) -> None:
    planted.snapshot(ago(3700), 0)
    planted.decision(ago(3600))
    result = run("qa")
    assert result.exit_code == 0, result.output
    assert "warning: engine engine-1 has not decided for 60 min, its newest" in result.stdout
    assert run("qa", "--max-age", "60").exit_code == 2
    assert run("qa", "--max-age", "86400").exit_code == 0


def test_decisions_from_before_the_window_are_stale_not_absent(planted: Planted, run: Run) -> None:
    planted.decision(ago(5 * 86400))
    result = run("qa", "--max-age", "60")
    assert result.exit_code == 2
    assert "has not decided for 5 d 0 h" in result.stdout


@pytest.mark.parametrize("table", ["mm_decisions", "mm_position_snapshots"])
def test_with_max_age_a_missing_table_exits_2(planted: Planted, run: Run, table: str) -> None:
    planted.snapshot(ago(20), 0)
    planted.decision(ago(10))
    planted.client.command(f"DROP TABLE {table}")
    assert run("qa").exit_code == 0
    result = run("qa", "--max-age", "600", "--format", "json")
    assert result.exit_code == 2
    (warning,) = json.loads(result.stdout)["warnings"]
    assert warning["concern"] == "missing"
    assert f"there is no table {table}" in warning["text"]


def test_no_decision_at_all_is_missing(planted: Planted, run: Run) -> None:
    assert concerns(planted) == [Concern.MISSING]
    assert run("qa").exit_code == 0
    assert run("qa", "--max-age", "60").exit_code == 2
    assert run("qa", "--max-age", "60", "--market-ticker", "ANOTHER").exit_code == 2


def test_stale_and_missing_snapshots_name_their_markets(planted: Planted) -> None:
    planted.snapshot(ago(2000), 0)
    planted.snapshot(ago(30), 0, market_ticker="FRESH")
    for ticker in (TICKER, "FRESH", "NEVER"):
        planted.decision(ago(1900), market_ticker=ticker)
        planted.decision(ago(5), market_ticker=ticker)
    stale, missing = look(planted).cautions()
    assert (stale.concern, missing.concern) == (Concern.STALE, Concern.MISSING)
    assert (
        f"snapshots of 1 market are older than the decisions by more than 11 min: {TICKER} (33 min)"
        in stale.text
    )
    assert "1 market with decisions and without a snapshot: NEVER." in missing.text


def test_a_snapshot_that_is_no_number_is_none(planted: Planted) -> None:
    planted.snapshot(ago(900), float("nan"))
    planted.decision(ago(800))
    planted.decision(ago(5))
    assert concerns(planted) == [Concern.MISSING]


def test_a_market_that_has_just_begun_needs_no_snapshot_yet(planted: Planted) -> None:
    planted.decision(ago(30))
    assert concerns(planted) == []
    assert concerns(planted, max_age_s=20) == [Concern.STALE, Concern.MISSING]


def test_decisions_without_a_position_are_not_judgeable(planted: Planted, run: Run) -> None:
    planted.client.command(
        "INSERT INTO mm_decisions (ts, decision_id, market_ticker, engine_instance_id)"
        f" SELECT now64(3), generateUUIDv4(), '{TICKER}', 'older' FROM numbers(3)"
    )
    planted.snapshot(ago(5), 0)
    result = run("qa", "--all")
    assert result.exit_code == 0
    assert "3 of 3 decisions have no position" in result.stdout
    assert result.stdout.count("skipped, none of 3 decisions has a position") == 5
    assert run("qa", "--max-age", "600").exit_code == 2


def test_a_clock_that_is_ahead_hides_no_stop(planted: Planted, run: Run) -> None:
    planted.snapshot(ago(0), 0)
    planted.decision(ago(-3600))
    result = run("qa", "--max-age", "60")
    assert result.exit_code == 2
    assert re.search(
        r"the newest decision of engine engine-1 lies (59|60) min in the future", result.stdout
    )


# -- which engines have stopped ------------------------------------------------------------------


def engine(name: str, first: float, last: float, now: float = 10_000) -> Engine:
    begun, ended = (BEGIN + timedelta(seconds=second) for second in (first, last))
    return Engine(name, begun, ended, now - last, markets=1, decisions=1)


def stopped(*engines: Engine) -> list[str]:
    tables = Standing("", {})
    one = Judged(Parameters(), BEGIN, tables, (), engines, 300, 660)
    return [each.name for each in one.stopped]


def test_an_engine_that_another_one_follows_has_not_stopped() -> None:
    assert stopped(engine("old", 0, 100), engine("new", 110, 9_990)) == []
    assert stopped(engine("old", 0, 100), engine("beside", 90, 9_990)) == ["old"]
    assert stopped(engine("old", 0, 100), engine("new", 110, 200)) == ["new"]


def test_one_engine_follows_one() -> None:
    """Of two that stopped, one restart leaves the other one missing."""
    a, b = engine("a", 0, 100), engine("b", 0, 200)
    assert stopped(a, b, engine("c", 210, 9_990)) == ["a"]
    assert stopped(a, b, engine("c", 210, 9_990), engine("d", 300, 9_995)) == []


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30), st.booleans()), max_size=8))
def test_as_many_have_stopped_as_there_were_more_at_once(
    spans: list[tuple[int, int, bool]],
) -> None:
    """Engines that restart under other names: the most that ever decided at once, less those that do now."""
    engines = [
        engine(str(number), first, 9_990 if runs else first + length)
        for number, (first, length, runs) in enumerate(spans)
    ]
    at_once = max(
        (sum(e.first <= begun.first <= e.last for e in engines) for begun in engines), default=0
    )
    running = sum(runs for _, _, runs in spans)
    assert len(stopped(*engines)) == at_once - running


def test_engines_on_paper_are_one_and_none_beside_a_real_one(planted: Planted) -> None:
    planted.decision(ago(4000), engine_instance_id="paper-1")
    planted.decision(ago(3900), engine_instance_id="paper-2")
    assert [each.name for each in look(planted).stopped] == ["paper"]
    assert look(planted, paper=False).stopped == []
    planted.decision(ago(3), engine_instance_id="paper-3")
    assert look(planted).stopped == []


def test_an_engine_that_was_retired_yesterday_is_missed_no_more(planted: Planted) -> None:
    planted.decision(ago(30 * 3600), engine_instance_id="retired")
    assert [each.name for each in look(planted).stopped] == ["retired"]
    planted.decision(ago(30 * 3600 + 10), engine_instance_id="at work")
    planted.decision(ago(3), engine_instance_id="at work")
    assert look(planted).stopped == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7199, "119 min"),
        (7500, "2 h 5 min"),
        (2e5, "2 d 7 h"),
    ],
)
def test_a_span_is_said_as_people_say_it(seconds: float, words: str) -> None:
    assert judged.duration(seconds) == words


# -- a table that is missing, empty, or another owner's ----------------------------------------------


@pytest.fixture
def foreign(planted: Planted) -> Iterator[Planted]:
    """`mm_position_snapshots` of another owner."""
    planted.client.command("RENAME TABLE mm_position_snapshots TO mm_position_snapshots_ours")
    planted.client.command(
        "CREATE TABLE mm_position_snapshots (ts DateTime, account String, held Float64)"
        " ENGINE = MergeTree ORDER BY ts"
    )
    yield planted
    for name in ("mm_position_snapshots", "mm_position_snapshots_former"):
        planted.client.command(f"DROP TABLE IF EXISTS {name} SYNC")
    planted.client.command("RENAME TABLE mm_position_snapshots_ours TO mm_position_snapshots")


def test_the_notice_names_missing_empty_and_foreign_tables(
    foreign: Planted, run: Run, migrated_once: Settings
) -> None:
    foreign.decision(ago(30))
    said = run("qa").stdout
    assert "skipped, mm_position_snapshots is another owner's, it lacks engine_instance_id," in said
    assert "pos_filled" in said
    assert "(it has ts, account, held)" in said
    # the remedy, as the sentence gives it
    (rename,) = re.findall(r"RENAME TABLE \S+ TO \w+\.\w+", said)[:1]
    foreign.client.command(rename)
    said = run("qa").stdout
    assert "skipped, there is no table mm_position_snapshots: no market maker has written" in said
    result = run("migrate")
    assert result.exit_code == 0, result.output
    assert "mm_position_snapshots was missing" in result.output
    said = run("qa").stdout
    assert "skipped, mm_position_snapshots is empty" in said


def test_a_foreign_table_of_decisions_skips_every_check(planted: Planted) -> None:
    planted.client.command("RENAME TABLE mm_decisions TO mm_decisions_ours")
    try:
        planted.client.command("CREATE TABLE mm_decisions (id UInt8) ENGINE = Memory")
        for outcome in audit.sweep(planted.client, audit.CHECKS, Parameters()):
            assert outcome.status is Status.SKIPPED
            assert "it lacks ts, decision_id," in outcome.notice
        assert concerns(planted) == [Concern.MISSING]
    finally:
        planted.client.command("DROP TABLE mm_decisions SYNC")
        planted.client.command("RENAME TABLE mm_decisions_ours TO mm_decisions")


# -- migrate makes a dropped table again -------------------------------------------------------------

DESK = sorted(
    {
        *audit.CHECKS[0].needs,
        "mm_order_responses",
        "mm_fills",
        "mm_position_snapshots",
        "mm_inventory_breaks",
    }
)


@pytest.mark.parametrize("table", DESK)
def test_migrate_recreates_a_dropped_table_and_says_so(
    planted: Planted, run: Run, table: str
) -> None:
    shape = f"SELECT name, type, default_expression FROM system.columns WHERE database = currentDatabase() AND table = '{table}' ORDER BY position"
    was = planted.client.query(shape).result_rows
    planted.client.command(f"DROP TABLE {table} SYNC")
    status = run("migrate", "--status")
    assert f"{table}  missing: kalshi-platform migrate creates it again, empty" in status.output
    result = run("migrate")
    assert result.exit_code == 0, result.output
    assert result.output.count(f"{table} was missing") == 1
    assert planted.client.query(shape).result_rows == was
    again = run("migrate")
    assert "was missing" not in again.output
    assert planted.client.query(shape).result_rows == was


def test_a_table_that_no_migration_made_here_is_not_made_again(
    planted: Planted, migrated_once: Settings
) -> None:
    """One that a later migration drops, and one of other data: cursors say that its rows are there."""
    few = [
        migrations.Migration(
            1, "one", "CREATE TABLE IF NOT EXISTS mm_once (x Int8) ENGINE = Memory;"
        ),
        migrations.Migration(2, "two", "DROP TABLE IF EXISTS mm_once;"),
        migrations.Migration(
            3, "three", "CREATE TABLE IF NOT EXISTS other (x Int8) ENGINE = Memory;"
        ),
    ]
    own = migrated_once.model_copy(
        update={"clickhouse_database": f"{migrated_once.clickhouse_database}_few"}
    )
    migrations.migrate(own, few)
    with closing(connect(own)) as client:
        client.command("DROP TABLE other SYNC")
        assert migrations.missing_tables(client, few) == []
        migrations.migrate(own, few)
        assert client.query("SHOW TABLES").result_rows == [("schema_migrations",)]
        client.command(f"DROP DATABASE {own.clickhouse_database} SYNC")

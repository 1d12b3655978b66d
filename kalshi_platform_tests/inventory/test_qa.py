"""`qa`: exit codes that a cron job can rely on, and output that is the same for the same rows."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.errors import PlatformError
from kalshi_platform.qa import mm_inventory_qa
from kalshi_platform.settings import Settings
from kalshi_platform_tests.inventory.conftest import Run
from kalshi_platform_tests.inventory.planted import TICKER, Planted, ago


def plant_all(planted: Planted) -> None:
    """One anomaly for each of A, B and C."""
    planted.snapshot(ago(600), 0)
    planted.decision(ago(100))
    planted.decision(ago(90), exposure=5)
    planted.decision(ago(80), exposure=5, open_orders_count=0)
    planted.decision(ago(70), filled=5)


def test_nothing_found_exits_0(planted: Planted, run: Run) -> None:
    planted.snapshot(ago(100), 2)
    planted.decision(ago(90), filled=2)
    result = run("qa")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("nothing found") == 3
    assert result.stdout.endswith("No anomalies.\n")


def test_anomalies_exit_2_and_are_shown_the_same_each_time(planted: Planted, run: Run) -> None:
    plant_all(planted)
    first, second = run("qa", "--explain"), run("qa", "--explain")
    assert first.exit_code == second.exit_code == 2
    assert first.stdout == second.stdout
    for letter in "ABC":
        assert f"Check {letter}" in first.stdout
    assert first.stdout.count(": 1 row\n") == 2
    assert "Check A: Drift Without Actions: 3 rows" in first.stdout  # for as long as it lasts
    assert TICKER in first.stdout
    assert "Anomalies: 5" in first.stdout
    assert "Breaks: 3" in first.stdout


def test_explain_prints_breaks_first_and_raw_json_with_verbose(planted: Planted, run: Run) -> None:
    planted.action(ago(81), request_json='{"client_order_id":"x-7"}')
    plant_all(planted)
    plain, verbose = run("qa", "--explain"), run("qa", "--explain", "--verbose")
    assert plain.exit_code == verbose.exit_code == 2
    assert plain.stdout.index("Breaks: ") < plain.stdout.index("Check A")
    assert '{"client_order_id":"x-7"}' in verbose.stdout
    assert "{" not in plain.stdout
    assert "the last action was place bid of 10 yes at 0.45" in plain.stdout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('at 0.4 {"a":{"b":"} ; {"}}; no', "at 0.4; no"),
        ('at 0.4 {"a":"cut off…; no', "at 0.4; no"),
        ('one {"a":1} two {"b":2}.', "one two."),
        ("a brace { alone", "a brace { alone"),
    ],
)
def test_an_explanation_in_words_has_no_json(text: str, words: str) -> None:
    assert mm_inventory_qa.in_words(text) == words


def test_json_says_the_same(planted: Planted, run: Run) -> None:
    plant_all(planted)
    result = run("qa", "--format", "json", "--explain")
    assert result.exit_code == 2
    answer = json.loads(result.stdout)
    assert answer["anomalies"] == 5
    assert [(each["check"], each["status"], each["total"]) for each in answer["checks"]] == [
        ("drift_without_actions", "anomalies", 3),
        ("open_exposure_mismatch", "anomalies", 1),
        ("decision_snapshot_divergence", "anomalies", 1),
    ]
    (row,) = answer["checks"][2]["rows"]
    assert (row["market_ticker"], row["difference"]) == (TICKER, 5.0)
    assert len(answer["breaks"]) == 3


def test_the_row_cap_holds_for_each_check_and_says_what_it_hides(
    planted: Planted, run: Run
) -> None:
    for second in range(5):
        planted.decision(ago(100 - second), exposure=3, open_orders_count=0)
    result = run("qa", "--limit", "2")
    assert "Check B: Open Exposure Mismatch: 5 rows, the first 2 shown" in result.stdout
    assert result.stdout.count(TICKER) == 2
    assert result.exit_code == 2


def test_one_market_only(planted: Planted, run: Run) -> None:
    plant_all(planted)
    assert run("qa", "--market-ticker", "ANOTHER").exit_code == 0
    assert run("qa", "--market-ticker", "x' OR 1=1 --").exit_code == 0
    assert run("qa", "--market-ticker", TICKER).exit_code == 2


def test_the_thresholds_are_flags(planted: Planted, run: Run) -> None:
    plant_all(planted)
    calm = ("--drift-threshold", "6", "--open-epsilon", "5", "--filled-threshold", "5.01")
    assert run("qa", *calm).exit_code == 0
    assert run("qa", "--lookback-minutes", "1").exit_code == 0


def test_no_snapshot_table_is_a_notice(planted: Planted, run: Run) -> None:
    planted.decision(ago(90), filled=2)
    planted.client.command("DROP TABLE mm_position_snapshots")
    result = run("qa")
    assert result.exit_code == 0, result.output
    assert "skipped, there is no table mm_position_snapshots" in result.stdout


def test_no_market_maker_is_a_notice(planted: Planted, run: Run) -> None:
    result = run("qa", "--all", "--explain")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("skipped, no decisions") == 6


def test_all_adds_the_checks_of_the_ui(planted: Planted, run: Run) -> None:
    planted.decision(ago(90), pos_total_est=4)
    assert run("qa").exit_code == 0
    result = run("qa", "--all")
    assert result.exit_code == 2
    assert "Position Identity: 1 row" in result.stdout


def test_a_table_that_the_migration_has_not_reached_is_named(planted: Planted, run: Run) -> None:
    planted.client.command("ALTER TABLE mm_decisions DROP COLUMN pos_total_est")
    try:
        result = run("qa")
        assert result.exit_code == 1
        assert isinstance(result.exception, PlatformError)
        assert "kalshi-platform migrate" in str(result.exception)
    finally:
        planted.client.command("DROP TABLE mm_decisions")  # the fixture makes it again


@pytest.mark.parametrize(
    "wrong", [("--lookback-minutes", "0"), ("--limit", "x"), ("--bogus",), ("--format", "csv")]
)
def test_a_wrong_flag_exits_1_for_2_means_anomalies(run: Run, wrong: tuple[str, ...]) -> None:
    result = run("qa", *wrong)
    assert result.exit_code == 1
    assert wrong[0] in result.output


def test_the_native_port_means_the_http_port_of_the_same_host(planted: Planted, run: Run) -> None:
    planted.decision(ago(90))
    host = ("--host", "127.0.0.1")
    result = run("qa", *host, "--port", "9000")
    assert result.exit_code == 0, result.output
    assert "note: 9000 is ClickHouse's native port" in result.stderr


def test_the_flags_have_their_defaults_in_the_environment(
    planted: Planted, run: Run, migrated_once: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant_all(planted)
    url = urlsplit(migrated_once.clickhouse_url)
    monkeypatch.setenv("CLICKHOUSE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("CLICKHOUSE_DATABASE", "nothing_here")
    monkeypatch.setenv("CH_HOST", str(url.hostname))
    monkeypatch.setenv("CH_PORT", str(url.port))
    monkeypatch.setenv("CH_USER", "default")
    monkeypatch.setenv("CH_DATABASE", migrated_once.clickhouse_database)
    assert run("qa").exit_code == 2
    monkeypatch.setenv("CH_PASSWORD", "wr0ng-secret")
    platform_settings.current.cache_clear()
    refused = run("qa")
    assert refused.exit_code == 1
    assert "wr0ng-secret" not in f"{refused.output}{refused.exception}"


def test_python_m_qa_without_clickhouse_exits_1_in_one_line(
    tmp_path: Path, planted: Planted, migrated_once: Settings
) -> None:
    plant_all(planted)
    url = urlsplit(migrated_once.clickhouse_url)
    argv = [sys.executable, "-m", "kalshi_platform.qa.mm_inventory_qa"]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    there = ["--host", str(url.hostname), "--port", str(url.port)]
    found = subprocess.run(
        [*argv, *there, "--database", migrated_once.clickhouse_database],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2, found.stderr
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: refused, and no other process's
        away = subprocess.run(
            [*argv, "--host", "127.0.0.1", "--port", str(unused.getsockname()[1])],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
    assert away.returncode == 1
    assert away.stderr.count("\n") == 1
    assert "cannot be reached" in away.stderr

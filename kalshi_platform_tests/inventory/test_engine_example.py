"""examples/engine.py quotes the simulator, is filled, and leaves rows in which no check finds anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from kalshi_platform.inventory import audit
from kalshi_platform.inventory.audit import Parameters, Status
from kalshi_platform.settings import Settings
from kalshi_platform_tests.inventory.planted import Planted
from kalshi_platform_tests.inventory.test_recorder import count
from kalshi_platform_tests.simulator_fixtures import StartSimulator

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "engine.py"


def test_the_example_trades_and_its_rows_are_in_order(
    planted: Planted, migrated_once: Settings, start_simulator: StartSimulator, tmp_path: Path
) -> None:
    key_file = tmp_path / "simulator" / "key.pem"
    key_file.parent.mkdir()
    simulator = start_simulator(markets=4, rate=300.0, rolling_markets=0, key_file=key_file)
    env = {name: value for name, value in os.environ.items() if not name.startswith("CH_")} | {
        "CLICKHOUSE_URL": migrated_once.clickhouse_url,
        "CLICKHOUSE_DATABASE": migrated_once.clickhouse_database,
        "SIMULATOR_PORT": str(simulator.port),
        "KALSHI_DATA_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--seconds", "8"],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "0 files wait for ClickHouse." in done.stdout
    assert count(planted, "mm_decisions") > 10
    assert count(planted, "mm_fills") > 0, done.stdout
    assert count(planted, "mm_position_snapshots") > 1
    statuses = {
        str(status)
        for (status,) in planted.client.query(
            "SELECT DISTINCT status FROM mm_order_responses"
        ).result_rows
    }
    assert {"resting", "canceled"} <= statuses
    assert statuses & {"executed", "partially_filled"}
    for outcome in audit.sweep(planted.client, audit.CHECKS, Parameters()):
        assert outcome.status is not Status.ANOMALIES, (outcome.check.name, outcome.rows[:3])

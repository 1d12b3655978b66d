"""docs/inventory.md: every command on it is run, in order, as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from kalshi_platform import settings as platform_settings
from kalshi_platform.commands.main import main
from kalshi_platform.settings import Settings
from kalshi_platform_tests.inventory.planted import Planted
from kalshi_platform_tests.simulator_fixtures import StartSimulator

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "inventory.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^( *)```(bash|python)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
EXPECTED = re.compile(r"# exits (\d)$")


def blocks(language: str) -> list[str]:
    """The page's blocks of a language, indentation taken out."""
    return [textwrap.dedent(m[3]) for m in BLOCK.finditer(PAGE) if m[2] == language]


def _run(command: str, folder: Path, env: Mapping[str, str]) -> tuple[int, str]:
    """A command's exit code and output. Ours run in this process: starting Python takes a while."""
    words = shlex.split(command, comments=True)
    if words[0] == "kalshi-platform":
        platform_settings.current.cache_clear()
        result = CliRunner(env=env).invoke(main, words[1:])
        platform_settings.current.cache_clear()
        return result.exit_code, f"{result.output}{result.exception or ''}"
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
    return done.returncode, f"{done.stdout}{done.stderr}"


def test_every_command_does_what_the_page_says(
    planted: Planted,
    migrated_once: Settings,
    start_simulator: StartSimulator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    simulator = start_simulator(markets=8, rate=400.0, rolling_markets=0)
    (tmp_path / "infra").symlink_to(ROOT / "infra")
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("CH_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CLICKHOUSE_URL": migrated_once.clickhouse_url,
        "CLICKHOUSE_DATABASE": migrated_once.clickhouse_database,
        "SIMULATOR_PORT": str(simulator.port),
        "KALSHI_DATA_DIR": str(tmp_path / "data"),
    }
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(commands) > 10
    for command in commands:
        said = EXPECTED.search(command)
        status, output = _run(command, tmp_path, env)
        assert status == (int(said[1]) if said else 0), f"{command}\n{output[-2000:]}"
    (snippet,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = planted.client.query(
        "SELECT pos_total_est, inv_after_est FROM mm_decisions WHERE market_ticker = 'KXRAIN-26NOV22'"
    ).result_rows
    assert rows == [(12.0, 17.0)]
    assert planted.client.query(
        "SELECT size, client_order_id FROM mm_fills WHERE market_ticker = 'KXRAIN-26NOV22'"
    ).result_rows == [(2.0, "order-1")]
    assert planted.client.query(
        "SELECT groupArray(status) FROM (SELECT status FROM mm_order_responses"
        " WHERE market_ticker = 'KXRAIN-26NOV22' ORDER BY status)"
    ).result_rows == [(["canceled", "partially_filled", "resting"],)]
    assert planted.client.query(
        "SELECT pos_filled, source FROM mm_position_snapshots"
        " WHERE market_ticker = 'KXRAIN-26NOV22' ORDER BY pos_filled"
    ).result_rows == [(0.0, "settlements"), (12.0, "positions")]

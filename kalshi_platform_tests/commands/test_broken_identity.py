"""An unreadable journal.json makes every command fail with a sentence, never with a traceback."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from kalshi_platform import settings as platform_settings
from kalshi_platform.commands import main
from kalshi_platform.errors import PlatformError
from kalshi_platform_tests.journal.test_reader import write

BROKEN = {
    "empty": b"",
    "no JSON": b"{journal",
    "of another type": b"[1, 2]",
    "with odd values": b'{"format": "x", "id": 5, "epoch": [], "checksum": {}}',
    "binary": bytes(range(256)),
}
COMMANDS = (
    ["stream"],
    ["adopt"],
    ["proof"],
    ["doctor"],
    ["restore"],
    ["compact"],
    ["migrate"],
    ["export", "--public", "--to", "published"],
    ["sql", "SELECT 1"],
    ["qa"],
)
SERVING = {"up", "watch", "clickhouse", "simulate", "metrics", "paper-mm"}
"""Those that do not end by themselves."""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_no_command_ends_in_a_traceback(
    content: bytes, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KALSHI_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("CLICKHOUSE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("KALSHI_REST_URL", "http://127.0.0.1:1/trade-api/v2")
    monkeypatch.setenv("KALSHI_WS_URL", "ws://127.0.0.1:1/trade-api/ws/v2")
    folder = platform_settings.load().journal_dir()
    folder.mkdir(parents=True)
    write(folder, 20)
    (folder / "journal.json").write_bytes(content)
    done = CliRunner().invoke(main.main, command)
    assert done.exception is None or isinstance(done.exception, PlatformError | SystemExit), done
    assert "Traceback" not in done.output
    assert "Usage:" not in done.output, "the command was not run"


def test_no_command_is_left_out() -> None:
    assert {name for name, *_ in COMMANDS} == set(
        main.main.list_commands(click.Context(main.main))
    ) - SERVING

"""docs/from-kalshimonorepo.md: its commands are run or parsed, its settings, tables and links are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from kalshi_platform.commands.main import main
from kalshi_platform.inventory.rows import TABLES
from kalshi_platform_tests.inventory.conftest import Run
from kalshi_platform_tests.inventory.planted import Planted, ago

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "from-kalshimonorepo.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(bash|powershell)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
RUN = [line.removeprefix("wsl ") for _, block in BLOCKS for line in block.splitlines()]
INLINE = sorted(set(re.findall(r"`(kalshi-platform [^`]+)`", PAGE)))


@pytest.mark.parametrize("command", RUN)
def test_every_command_of_a_block_runs(planted: Planted, run: Run, command: str) -> None:
    planted.snapshot(ago(60), 0)
    planted.decision(ago(30))
    words = shlex.split(command)
    assert words[0] == "kalshi-platform"
    result = run(*words[1:])
    assert result.exit_code == 0, f"{result.output}{result.exception or ''}"


@pytest.mark.parametrize("command", INLINE)
def test_every_other_command_is_one(command: str) -> None:
    _, name, *arguments = shlex.split(command)
    one = main.get_command(click.Context(main), name)
    assert one is not None, command
    one.make_context(name, arguments)


def test_every_setting_on_the_right_is_a_setting() -> None:
    (table,) = re.findall(r"^## Settings\n\n(.*?)\n\n", PAGE, re.MULTILINE | re.DOTALL)
    known = (ROOT / ".env.example").read_text(encoding="utf-8")
    for line in table.splitlines()[2:]:
        _, older, here, _ = line.split("|")
        names = re.findall(r"`([A-Z][A-Z_]+)`", older if " the same" in here else here)
        for name in names:
            assert re.search(rf"^#?{name}=", known, re.MULTILINE), name


def test_every_table_of_the_market_maker_is_on_it() -> None:
    for table in TABLES:
        assert f"`{table}`" in PAGE


def test_every_link_leads_to_a_page_and_its_heading() -> None:
    for page, heading in re.findall(r"\]\(([\w.-]+\.md)#?([\w-]*)\)", PAGE):
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        headings = {
            re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in text.splitlines()
            if line.startswith("#")
        }
        assert not heading or heading in headings, (page, heading)

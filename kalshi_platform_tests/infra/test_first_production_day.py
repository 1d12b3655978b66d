"""docs/first-production-day.md: its commands exist, its rehearsals use existing faults, its links work."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from kalshi_platform_tests.chaos.faults import faults
from kalshi_platform_tests.infra.test_operations import parsed

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "first-production-day.md").read_text(encoding="utf-8")
REHEARSALS = re.findall(r'^make chaos CHAOS_ARGS="(.*)"$', PAGE, re.MULTILINE)


@pytest.mark.parametrize("arguments", REHEARSALS)
def test_each_rehearsal_uses_existing_faults(arguments: str) -> None:
    words = shlex.split(arguments)
    only = words[words.index("--only") + 1]
    found = [
        f.name for f in faults(mounts=True, slow_fsync=True) if only in {f.group} or only in f.name
    ]
    assert found
    assert words[words.index("--report") + 1].startswith("/tmp/")


def test_every_group_of_faults_is_rehearsed() -> None:
    only = [shlex.split(line)[shlex.split(line).index("--only") + 1] for line in REHEARSALS]
    left = [
        fault.name
        for fault in faults(mounts=True, slow_fsync=True)
        if not any(line == fault.group or line in fault.name for line in only)
    ]
    assert left == [
        "code server",
        "daemon",
    ]  # parts that record nothing: docs/soak.md has their restarts


def test_every_documented_command_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for text in re.findall(r"`([^`\n]+)`", PAGE):
        words = shlex.split(text)
        if words[0] == "kalshi-platform":
            parsed(words[1:])
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), text
        elif words[:2] == ["python", "-m"]:
            assert importlib.util.find_spec(words[2]) is not None, text


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        name, _, anchor = target.partition("#")
        path = ROOT / "docs" / name
        assert path.is_file(), target
        headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}
        assert not anchor or anchor in anchors, target

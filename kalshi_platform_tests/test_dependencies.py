"""Installed packages are the reviewed ones: locked, hashed, bounded, declared."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCKS = sorted(ROOT.glob("requirements*.lock"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
DECLARED = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
EXTRAS = [
    Requirement(text)
    for extra in PROJECT["project"]["optional-dependencies"].values()
    for text in extra
]
GROUPS = {
    name: [Requirement(text) for text in group]
    for name, group in PROJECT["dependency-groups"].items()
}


def locked(lock: Path) -> dict[str, str]:
    """Name to the rest of its entry: version and hashes."""
    entries = re.split(r"\n(?=\S)", lock.read_text().strip())
    return {canonicalize_name(Requirement(one.split(" \\")[0]).name): one for one in entries}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_locked_package_has_one_version_and_its_hashes(lock: Path) -> None:
    for name, entry in locked(lock).items():
        first, *rest = entry.splitlines()
        assert re.match(r"[\w.-]+(\[[\w, -]+\])?==[^\s*]+ ", first), name
        assert rest, name
        for line in rest:
            assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line), name
    text = lock.read_text()
    assert "://" not in text  # no package from outside the index
    assert "--index" not in text


def test_installs_ask_for_the_hashes() -> None:
    installs = re.findall(r"install .*-r \S+", (ROOT / "Makefile").read_text())
    assert len(installs) == len(LOCKS)
    assert all("--require-hashes" in line and "--no-deps" in line for line in installs)


def test_every_dependency_is_bounded_on_both_sides_and_locked() -> None:
    everything = [*DECLARED, *EXTRAS, *(one for group in GROUPS.values() for one in group)]
    for one in everything:
        operators = {specifier.operator for specifier in one.specifier}
        assert operators == {">=", "<"}, one
    known = {name for lock in LOCKS for name in locked(lock)}
    assert {canonicalize_name(one.name) for one in everything} <= known


def test_every_import_of_the_package_is_declared() -> None:
    imported = {
        name.split(".")[0]
        for path in (ROOT / "kalshi_platform").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _names(node)
    } - set(sys.stdlib_module_names)
    ours = {"kalshi_platform"}
    distributions = packages_distributions()
    missing = {
        name
        for name in imported - ours
        if not {canonicalize_name(one) for one in distributions.get(name, [name])}
        & {canonicalize_name(one.name) for one in [*DECLARED, *EXTRAS]}
    }
    assert missing == set()


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and node.module else []

"""docs/reference.md names every public module, and each public name says what it takes, gives and raises."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import kalshi_platform

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "reference.md").read_text()
MODULES = {
    name: [member.strip() for member in members.split(",")] if members else None
    for name, members in re.findall(
        r"^::: (\S+)$(?:\n    options:\n      members: \[(.*)\]$)?", PAGE, re.MULTILINE
    )
}
"""The modules of the page, and of those that are described in part the names."""
PROMISED = {
    "kalshi_platform.engine",
    "kalshi_platform.archive",
    "kalshi_platform.analytics",
    "kalshi_platform.analytics.replay",
    "kalshi_platform.reading",
    *(f"kalshi_platform.exchange.{name}" for name in ("book", "frames", "signing", "connection")),
    "kalshi_platform.settings",
    "kalshi_platform.qa.mm_inventory_qa",
    "kalshi_platform.simulator.server",
    "kalshi_platform.simulator.config",
}
SECTION = re.compile(r"^(Args|Returns|Yields|Raises):$", re.MULTILINE)


def names_of(module: Any, members: list[str] | None) -> list[str]:
    """The public names: those of the page, else of `__all__`, else what the module itself defines."""
    if members is not None:
        return members
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def documented() -> Iterator[tuple[str, Any]]:
    """Every public function, class and method of ours, by its name."""
    for name, members in MODULES.items():
        module = importlib.import_module(name)
        for public in names_of(module, members):
            value = getattr(module, public)
            if not str(getattr(value, "__module__", "")).startswith("kalshi_platform"):
                continue  # a constant, or another library's
            yield f"{name}.{public}", value
            if inspect.isclass(value):
                yield from methods(f"{name}.{public}", value)


def methods(prefix: str, kind: type) -> Iterator[tuple[str, Any]]:
    for name, value in vars(kind).items():
        if name.startswith("_") and name != "__init__":
            continue
        function = getattr(value, "__func__", value)
        if inspect.isfunction(function) and is_written(function):
            yield f"{prefix}.{name}", function
        elif isinstance(value, property):
            yield f"{prefix}.{name}", value


def is_written(function: FunctionType) -> bool:
    """Whether it is in our source: not another library's, nor what a dataclass makes of its fields."""
    return Path(function.__code__.co_filename).is_relative_to(ROOT / "kalshi_platform")


DOCUMENTED = dict(documented())


def sections(docstring: str) -> dict[str, str]:
    _, *parts = SECTION.split(inspect.cleandoc(docstring))
    return dict(zip(parts[::2], parts[1::2], strict=True))


def lacking(value: Any) -> list[str]:
    """What a docstring leaves out."""
    docstring = value.__doc__ or ""
    found = sections(docstring)
    missing = [] if docstring.strip() else ["a docstring"]
    if re.search(r"\bRaises (`|[A-Z]\w+Error)", docstring):
        missing.append("Raises as a section")
    if not inspect.isfunction(value):
        return missing
    signature = inspect.signature(value)
    if value.__name__ == "__init__" and len(signature.parameters) == 1:
        return []
    described = set(re.findall(r"^    \**(\w+): ", found.get("Args", ""), re.MULTILINE))
    taken = [name for name in signature.parameters if name not in {"self", "cls"}]
    missing += [f"the argument {name}" for name in taken if name not in described]
    missing += [f"{name}, which it does not take" for name in described - {*taken}]
    gives = signature.return_annotation not in {None, "None", "NoReturn", inspect.Signature.empty}
    if gives and not found.keys() & {"Returns", "Yields"}:
        missing.append("what it returns")
    return missing


def test_the_page_describes_every_public_module() -> None:
    assert set(MODULES) == PROMISED
    top = {name.split(".")[1] for name in MODULES}
    assert top == set(kalshi_platform.__all__) - {"__version__"}
    for name in MODULES:
        assert f"| `{name}` |" in PAGE


def test_there_is_something_to_check() -> None:
    assert len(DOCUMENTED) > 150
    assert {"kalshi_platform.engine.Recorder.fill", "kalshi_platform.archive.Archive.read"} <= {
        *DOCUMENTED
    }


@pytest.mark.parametrize(
    "name",
    [name for name, value in DOCUMENTED.items() if not isinstance(value, Enum)],
)
def test_a_public_name_says_what_it_takes_gives_and_raises(name: str) -> None:
    assert lacking(DOCUMENTED[name]) == []


def test_a_docstring_that_leaves_something_out_is_found() -> None:
    def bare(price: int, size: int) -> int:
        """Multiply. Raises ValueError for less than none.

        Args:
            price: Dollars.
            amount: Contracts.
        """
        return price * size

    assert lacking(bare) == [
        "Raises as a section",
        "the argument size",
        "amount, which it does not take",
        "what it returns",
    ]

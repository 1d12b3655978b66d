"""The project's SQL files: `infra/queries` in the repository, `_infra/queries` in a wheel."""

from __future__ import annotations

from pathlib import Path


def folder() -> Path:
    """The folder of the queries."""
    package = Path(__file__).resolve().parents[1]
    bundled = package / "_infra" / "queries"
    return bundled if bundled.is_dir() else package.parent / "infra" / "queries"


def text(name: str) -> str:
    """The text of `<name>.sql`, without the semicolon that may end it."""
    return (folder() / f"{name}.sql").read_text().rstrip().removesuffix(";")

"""Removal of table definitions that a full disk left empty, with which the engine cannot open its folder.

The engine writes each table's definition to a file. A process that is killed while the disk is full can leave that
file empty. If the table was just being created, nothing is lost and the file is removed. If there are rows that no
definition names, they may belong to that table, and an operator must decide.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path

from kalshi_platform import durable
from kalshi_platform.errors import StoreError

log = logging.getLogger(__name__)

_UUID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def remove(path: Path) -> None:
    """Remove the empty definitions of the data folder `path`, before the engine opens it.

    Raises `StoreError` if there are rows that belong to no definition.
    """
    engine = path / "engine"
    empty = [file for file in sorted(engine.glob("metadata/*/*.sql")) if not file.stat().st_size]
    if not empty:
        return
    names = ", ".join(f"{file.parent.name}.{file.stem}" for file in empty)
    if rows := next(_rows_without_definition(path), None):
        raise StoreError(
            f"The embedded ClickHouse's definition of {names} is empty, as a full disk leaves it, and {rows} has"
            f" rows that no definition names. Restore {path} from a backup. Without one, move it away: a new one"
            " is created at the next start, and the loader's error says how to fill it."
        )
    for file in empty:
        file.unlink()
        durable.sync(file.parent)
    log.warning(
        "The definition of %s was empty, as a full disk leaves it, and was removed. It had no rows.",
        names,
    )


def _rows_without_definition(path: Path) -> Iterator[Path]:
    """The folders of tables with rows that no definition names."""
    named = set[bytes]()
    for definitions in ("engine/metadata*/*.sql*", "engine/metadata/*/*.sql*", "refused/**/*.sql"):
        for file in path.glob(definitions):
            named.update(_UUID.findall(file.read_bytes()))
    for table in path.glob("engine/store/*/*"):
        if table.name.encode() not in named and any(table.glob("*/columns.txt")):
            yield table

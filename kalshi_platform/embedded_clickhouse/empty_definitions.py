"""Definitions of tables that a full disk left empty: the engine opens no folder that has one.

The engine writes a table's definition to a file of its own. A process that is killed while the disk is full can
leave that file without a byte. Where the table was just being made nothing is lost with it, and it is removed.
Where rows are there that no definition names, the table may be theirs: then a person decides.
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

    Raises `StoreError` where rows are there that belong to no definition.
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
            " is made at the next start, and the load into ClickHouse says how to fill it."
        )
    for file in empty:
        file.unlink()
        durable.sync(file.parent)
    log.warning(
        "The definition of %s was empty, as a disk that is full leaves it, and is removed. It had no rows.",
        names,
    )


def _rows_without_definition(path: Path) -> Iterator[Path]:
    """The folders of tables that hold rows and that no definition names."""
    named = set[bytes]()
    for definitions in ("engine/metadata*/*.sql*", "engine/metadata/*/*.sql*", "refused/**/*.sql"):
        for file in path.glob(definitions):
            named.update(_UUID.findall(file.read_bytes()))
    for table in path.glob("engine/store/*/*"):
        if table.name.encode() not in named and any(table.glob("*/columns.txt")):
            yield table

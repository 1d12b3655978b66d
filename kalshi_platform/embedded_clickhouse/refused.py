"""Removal of definitions that an older version accepted and the allow-list now refuses, at the start.

Such a dictionary, table, view or database (for example with a program or a file as its source) would act whenever a
query names it, since the allow-list checks statements, not the objects that they name. So each object's definition
is checked as the statement that would create it now. A refused object is detached, and its definition is moved from
the engine's metadata to `refused/` in the data folder, where no statement reaches it. Rows stay where they are. A
warning repeats this at every start until the file is removed.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kalshi_platform import durable
from kalshi_platform.embedded_clickhouse import allowed, rights
from kalshi_platform.embedded_clickhouse.answers import ClickHouseError

log = logging.getLogger(__name__)

FOLDER = "refused"
_DATABASES = "SELECT name, engine FROM system.databases"
_TABLES = (
    "SELECT database, name, engine, create_table_query, metadata_path FROM system.tables"
    " WHERE NOT is_temporary ORDER BY database, name"
)
_KINDS = {"Dictionary": "DICTIONARY", "View": "VIEW", "MaterializedView": "VIEW"}


def set_aside(
    connection: Any, verdict: Callable[[str], ClickHouseError | None], path: Path
) -> None:
    """Take the objects that `verdict` refuses out of the data folder `path`, and log all that were taken out.

    Raises the engine's error if an object cannot be detached; then the folder must not be served.
    """
    engine, aside = path / "engine", path / FOLDER
    connection.query("SET check_table_dependencies = 0, check_referential_table_dependencies = 0")
    for name, kind in _rows(connection, _DATABASES):
        if kind not in allowed.DATABASE_ENGINES and name not in rights.OWN_DATABASES:
            connection.query(f"DETACH DATABASE {_quoted(name)}")
            why = f"the database engine {kind} is not on the list"
            file = f"{_as_file(name)}.sql"
            _move(engine / "metadata" / file, aside / file, f"database {name}", why)
    for database, name, kind, definition, metadata in _rows(connection, _TABLES):
        if database in rights.OWN_DATABASES:
            continue
        if (error := verdict(definition)) is not None:
            noun = _KINDS.get(kind, "TABLE")
            connection.query(f"DETACH {noun} {_quoted(database)}.{_quoted(name)} SYNC")
            if metadata:
                target = aside / _as_file(database) / f"{_as_file(name)}.sql"
                label = f"{noun.lower()} {database}.{name}"
                _move(engine / metadata, target, label, error.sentence)
    for left in sorted(aside.rglob("*.sql")):
        log.warning("%s", _sentence(left))


def _move(source: Path, target: Path, label: str, why: str) -> None:
    """Move a definition durably, with a first line that says what it is and why; older files of that name stay."""
    target.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    number = 0
    while target.exists():
        number += 1
        target = target.with_name(f"{target.stem.partition(' ')[0]} {number}.sql")
    head = f"-- {' '.join(label.split())}: {' '.join(why.split())}\n"
    durable.replace(target, head.encode() + source.read_bytes())
    durable.sync(target.parent.parent)
    source.unlink()
    durable.sync(source.parent)


def _sentence(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace") as lines:
        label = next(lines, "").removeprefix("-- ").strip()
    return (
        f"Taken out of the database, since only an older version allowed it: {label}. Its definition is in {file}:"
        " create it on a ClickHouse server if it is needed, and remove the file."
    )


def _rows(connection: Any, question: str) -> Iterator[list[str]]:
    answer = connection.query(question, "JSONCompactEachRow").bytes()
    return map(json.loads, answer.splitlines())


def _quoted(name: str) -> str:
    return "`" + name.replace("\\", "\\\\").replace("`", "\\`") + "`"


def _as_file(name: str) -> str:
    """A name as in the engine's files: characters other than letters, digits and _ as %XX."""
    return re.sub(rb"[^0-9A-Za-z_]", lambda found: b"%%%02X" % found[0][0], name.encode()).decode()

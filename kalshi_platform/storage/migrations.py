"""Bringing ClickHouse's schema up to date: numbered SQL files, applied in order, once each.

What the tables are is written in the files, `infra/clickhouse_migrations/NNN_name.sql`. Every
statement in them may run again (IF NOT EXISTS), so a kill in the middle costs a second run and
nothing else. A file that has been applied never changes; a change is a new file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from pathlib import Path

from kalshi_platform.settings import Settings
from kalshi_platform.storage.clickhouse import Client, connect, translated
from kalshi_platform.storage.errors import StoreRefused
from kalshi_platform.storage.schema import DATASETS
from kalshi_platform.storage.statements import statements

_FILE_NAME = re.compile(r"(?P<version>\d{3,})_(?P<name>\w+)\.sql")
_TTL = re.compile(r"\bTTL toDateTime\(\w+\) \+ toIntervalDay\((\d+)\)")

RETAINED: Mapping[str, str] = {
    "orderbook_events": "ingest_ts",
    "stream_events": "ingest_ts",
    "book_checkpoints": "ts",
    "trades": "ingest_ts",
    "spreads": "ingest_ts",
    "depth": "second",
    "imbalance": "second",
}
"""Tables that keep HOT_RETENTION_DAYS, with the column that the age is taken from."""

FOR_EVER_DAYS = 20_000
"""From here on (54 years) no TTL is set: ClickHouse's DateTime ends in 2106 and would wrap round."""

_RECORD = """
CREATE TABLE IF NOT EXISTS schema_migrations
(
    version    UInt32,
    name       String,
    checksum   String COMMENT 'SHA-256 of the file',
    applied_at DateTime64(3, 'UTC')
)
ENGINE = ReplacingMergeTree(applied_at)
ORDER BY version
COMMENT 'Which of infra/clickhouse_migrations have been applied.'
"""


@dataclass(frozen=True)
class Migration:
    """One numbered SQL file."""

    version: int
    name: str
    sql: str = field(repr=False)

    @property
    def checksum(self) -> str:
        """SHA-256 of the text, the same whatever line ends git gave it."""
        return hashlib.sha256(self.sql.replace("\r\n", "\n").encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.version:03d}_{self.name}"


class State(Enum):
    """How a migration stands in a database."""

    APPLIED = "applied"
    PENDING = "pending"
    CHANGED = "changed since it was applied"
    UNKNOWN = "applied by a newer version"


@dataclass(frozen=True)
class Standing:
    """One migration and how it stands."""

    version: int
    name: str
    state: State
    applied_at: datetime | None

    def __str__(self) -> str:
        return f"{self.version:03d}_{self.name}"


def folder() -> Path:
    """Where the migrations are: inside an installed wheel, else in the repository."""
    package = Path(__file__).resolve().parents[1]
    bundled = package / "_infra" / "clickhouse_migrations"
    return bundled if bundled.is_dir() else package.parent / "infra" / "clickhouse_migrations"


def available(directory: Path | None = None) -> tuple[Migration, ...]:
    """The migrations in `directory` (default: the platform's own), by number."""
    directory = directory or folder()
    found: dict[int, Migration] = {}
    for path in sorted(directory.glob("*.sql")):
        match = _FILE_NAME.fullmatch(path.name)
        if match is None:
            raise StoreRefused(f"Migration {path} is not named like 001_order_book.sql. Rename it.")
        version = int(match["version"])
        if version in found:
            raise StoreRefused(
                f"Migrations {found[version]} and {path.stem} share a number. Renumber one."
            )
        found[version] = Migration(version, match["name"], path.read_text(encoding="utf-8"))
    if not found:
        raise StoreRefused(f"There are no migrations in {directory}. Install the platform again.")
    return tuple(found[version] for version in sorted(found))


def standing(client: Client, migrations: Sequence[Migration] | None = None) -> list[Standing]:
    """How each migration stands in the client's database, by number."""
    known = {m.version: m for m in (available() if migrations is None else migrations)}
    applied = _applied(client)
    return [_stand(v, known.get(v), applied.get(v)) for v in sorted(known.keys() | applied.keys())]


def migrate(settings: Settings, migrations: Sequence[Migration] | None = None) -> list[Migration]:
    """Create the database where it is missing and apply what is pending; returns what was applied.

    Raises `StoreRefused` before anything is changed if an applied file has changed since.
    """
    migrations = available() if migrations is None else migrations
    _create_database(settings)
    client = connect(settings, log_comment="migrate")
    try:
        now = {s.version: s.state for s in standing(client, migrations)}
        if changed := [str(m) for m in migrations if now[m.version] is State.CHANGED]:
            raise StoreRefused(
                f"{', '.join(changed)} changed since it was applied to database"
                f" {settings.clickhouse_database}. Restore the file, and put the change in a new one."
            )
        pending = [m for m in migrations if now[m.version] is State.PENDING]
        for migration in pending:
            _apply(client, migration)
        keep(client, settings.hot_retention_days)
        return pending
    finally:
        client.close()


def differences(client: Client) -> list[str]:
    """How the tables differ from storage/schema.py, a sentence for each column; empty: not at all."""
    found = []
    for dataset in DATASETS.values():
        with translated():
            described = client.query(
                f"DESCRIBE TABLE {dataset.name}", settings={"print_pretty_type_names": 0}
            ).result_rows
        there = {str(row[0]): str(row[1]) for row in described}
        wanted = {column.name: column.clickhouse for column in dataset.columns}
        found += [
            f"{dataset.name}.{name} is {there.get(name, 'missing')}, not {kind}"
            for name, kind in wanted.items()
            if there.get(name) != kind
        ]
    return found


def keep(client: Client, days: int) -> list[str]:
    """Give the tables a retention of `days`, where it differs; returns the tables altered."""
    wanted = days if days < FOR_EVER_DAYS else None
    altered = []
    with translated():
        for table, column in RETAINED.items():
            created = client.query(
                "SELECT create_table_query FROM system.tables"
                " WHERE database = currentDatabase() AND name = {table:String}",
                parameters={"table": table},
            ).first_row
            if not created:
                continue  # not one of this set of migrations
            found = _TTL.search(str(created[0]))
            if (int(found[1]) if found else None) == wanted:
                continue
            change = (
                "REMOVE TTL"
                if wanted is None
                else f"MODIFY TTL toDateTime({column}) + toIntervalDay({wanted:d})"
            )
            client.command(f"ALTER TABLE {table} {change}")
            altered.append(table)
    return altered


def _create_database(settings: Settings) -> None:
    client = connect(settings, database=False, log_comment="migrate")
    name = {"name": settings.clickhouse_database}
    try:
        with translated(settings):
            # looked up first, for a user who may use the database but not create one
            if not client.query(
                "SELECT 1 FROM system.databases WHERE name = {name:String}", parameters=name
            ).row_count:
                client.command("CREATE DATABASE IF NOT EXISTS {name:Identifier}", parameters=name)
    finally:
        client.close()


def _applied(client: Client) -> dict[int, tuple[str, str, datetime]]:
    with translated():
        recorded = client.query(
            "SELECT 1 FROM system.tables"
            " WHERE database = currentDatabase() AND name = 'schema_migrations'"
        )
        if not recorded.row_count:
            return {}
        rows = client.query(
            "SELECT version, name, checksum, applied_at FROM schema_migrations FINAL"
        ).result_rows
    return {version: (name, checksum, at) for version, name, checksum, at in rows}


def _stand(
    version: int, migration: Migration | None, applied: tuple[str, str, datetime] | None
) -> Standing:
    if migration is None:
        assert applied is not None  # noqa: S101 - one of the two is there
        return Standing(version, applied[0], State.UNKNOWN, applied[2])
    if applied is None:
        return Standing(version, migration.name, State.PENDING, None)
    state = State.APPLIED if applied[1] == migration.checksum else State.CHANGED
    return Standing(version, migration.name, state, applied[2])


def _apply(client: Client, migration: Migration) -> None:
    with translated():
        for statement in statements(migration.sql):
            client.command(statement)
        client.command(_RECORD)
        client.command(
            "INSERT INTO schema_migrations (version, name, checksum, applied_at)"
            " SELECT {version:UInt32}, {name:String}, {checksum:String}, now64(3)",
            parameters={
                "version": migration.version,
                "name": migration.name,
                "checksum": migration.checksum,
            },
        )

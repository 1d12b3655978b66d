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
from kalshi_platform.storage.cluster import Cluster, place
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

_CLUSTERS = "SELECT cluster, uniqExact(shard_num), count() FROM system.clusters GROUP BY cluster"
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

    On a cluster (CLICKHOUSE_CLUSTER) the same files make replicated tables on every host and
    Distributed ones over them: see cluster.py.

    Raises `StoreRefused` before anything is changed if an applied file has changed since, or if the
    database was made for a single server and a cluster is asked for, or the other way round.
    """
    migrations = available() if migrations is None else migrations
    cluster = _cluster(settings)
    _create_database(settings, cluster)
    client = connect(settings, log_comment="migrate")
    try:
        _refuse_another_kind(client, settings)
        now = {s.version: s.state for s in standing(client, migrations)}
        if changed := [str(m) for m in migrations if now[m.version] is State.CHANGED]:
            raise StoreRefused(
                f"{', '.join(changed)} changed since it was applied to database"
                f" {settings.clickhouse_database}. Restore the file, and put the change in a new one."
            )
        pending = [m for m in migrations if now[m.version] is State.PENDING]
        for migration in migrations:
            # of the applied ones too: later ones stand on them
            means = _meaning(migration, cluster)
            if migration in pending:
                _apply(client, migration, means, cluster)
        keep(client, settings.hot_retention_days)
        _leave_statistics_out(client, cluster)
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
            where = place(client, table)
            if where is None:
                continue  # not one of this set of migrations
            created = client.query(
                "SELECT create_table_query FROM system.tables"
                " WHERE database = currentDatabase() AND name = {table:String}",
                parameters={"table": where.table},
            ).result_rows[0]
            found = _TTL.search(str(created[0]))
            if (int(found[1]) if found else None) == wanted:
                continue
            change = (
                "REMOVE TTL"
                if wanted is None
                else f"MODIFY TTL toDateTime({column}) + toIntervalDay({wanted:d})"
            )
            client.command(f"ALTER TABLE {where.target} {change}")
            altered.append(table)
    return altered


def _leave_statistics_out(client: Client, cluster: Cluster | None) -> None:
    """No column statistics, which newer servers add to every part by themselves.

    No query here is planned by them, and in a part of some thousand rows they weigh a third of the
    rows. A server that does not know the setting has no such statistics; one whose tables are without
    them anyway, as the embedded one's are, needs no word for each.
    """
    with translated():
        default = client.query(
            "SELECT value FROM system.merge_tree_settings WHERE name = 'auto_statistics_types'"
        ).result_rows
        if not default or (default[0][0] == "" and cluster is None):
            return
        tables = client.query(
            "SELECT name FROM system.tables WHERE database = currentDatabase()"
            " AND engine LIKE '%MergeTree' AND create_table_query NOT LIKE '%auto_statistics_types%'"
        )
        for (table,) in tables.result_rows:
            on = "" if cluster is None else f" {cluster.clause}"
            client.command(
                "ALTER TABLE {database:Identifier}.{table:Identifier}"
                f"{on} MODIFY SETTING auto_statistics_types = ''",
                parameters={"database": client.database, "table": table},
            )


def size_of(client: Client, cluster: str) -> tuple[int, int]:
    """How many shards and hosts a cluster has. Raises `StoreRefused` where the server knows none such."""
    with translated():
        known = {
            str(name): (int(shards), int(hosts))
            for name, shards, hosts in client.query(_CLUSTERS).result_rows
        }
    if cluster not in known:
        raise StoreRefused(
            f"CLICKHOUSE_CLUSTER is {cluster!r}, but the server knows"
            f" {', '.join(sorted(known)) or 'no cluster'}. Give one of these (they are in"
            " system.clusters), or unset it for a single server."
        )
    return known[cluster]


def _cluster(settings: Settings) -> Cluster | None:
    """The cluster to spread over. Raises `StoreRefused` where the server knows none of that name."""
    name = settings.clickhouse_cluster
    if name is None:
        return None
    client = connect(settings, database=False, log_comment="migrate")
    try:
        size_of(client, name)
    finally:
        client.close()
    return Cluster(name, settings.clickhouse_database)


def _refuse_another_kind(client: Client, settings: Settings) -> None:
    """Tables that hold rows do not turn into Distributed ones, nor back."""
    with translated():
        (applied, distributed), *_ = client.query(
            "SELECT countIf(name = 'schema_migrations'), countIf(engine = 'Distributed')"
            " FROM system.tables WHERE database = currentDatabase()"
        ).result_rows
    database = settings.clickhouse_database
    if settings.clickhouse_cluster is not None and applied and not distributed:
        raise StoreRefused(
            f"CLICKHOUSE_CLUSTER is set, but database {database} was made for a single server. Give"
            " another CLICKHOUSE_DATABASE and fill it: kalshi-platform restore --from PARQUET_DIR."
        )
    if settings.clickhouse_cluster is None and distributed:
        raise StoreRefused(
            f"Database {database} is spread over a cluster, and CLICKHOUSE_CLUSTER is not set. Set it."
        )


def _meaning(migration: Migration, cluster: Cluster | None) -> list[str]:
    """The statements to run for a migration."""
    found = list(statements(migration.sql))
    return found if cluster is None else [each for one in found for each in cluster.spread(one)]


def _create_database(settings: Settings, cluster: Cluster | None) -> None:
    client = connect(settings, database=False, log_comment="migrate")
    name = {"name": settings.clickhouse_database}
    try:
        with translated(settings):
            # looked up first, for a user who may use the database but not create one
            if cluster is not None:
                client.command(
                    f"CREATE DATABASE IF NOT EXISTS {{name:Identifier}} {cluster.clause}",
                    parameters=name,
                )
            elif not client.query(
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


def _apply(
    client: Client, migration: Migration, means: Sequence[str], cluster: Cluster | None
) -> None:
    record = [_RECORD] if cluster is None else cluster.spread(_RECORD)
    with translated():
        for statement in [*means, *record]:
            client.command(statement)
        client.command(
            "INSERT INTO schema_migrations (version, name, checksum, applied_at)"
            " SELECT {version:UInt32}, {name:String}, {checksum:String}, now64(3)",
            parameters={
                "version": migration.version,
                "name": migration.name,
                "checksum": migration.checksum,
            },
        )

"""Migrations of ClickHouse's schema: numbered SQL files, applied in order, once each.

The tables are defined in `infra/clickhouse_migrations/NNN_name.sql`; which tables are the platform's own is decided
in `ownership`, how long rows are kept in `hot_retention`.

Every statement may run again (IF NOT EXISTS), so a migration that was killed is simply repeated. A file that has been
applied never changes; a change is a new file. If a file did change all the same (an earlier version shipped another
one), its views are created again, and its tables are compared with the schema before the new file counts as applied
(`accept_changed`).

A missing view is created again, and so is, empty and with a notice, a missing table of the market maker (`mm_`). Other
missing tables are not, because the loader's cursors say that their rows are stored; `kalshi-platform restore` brings
them back.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from pathlib import Path

from kalshi_platform.clickhouse import hot_retention, ownership
from kalshi_platform.clickhouse.client import Client, connect, translated
from kalshi_platform.clickhouse.cluster import LOCAL, Cluster
from kalshi_platform.clickhouse.ddl import altered, definition, dropped
from kalshi_platform.clickhouse.hot_retention import RETAINED, Change
from kalshi_platform.clickhouse.statements import statements
from kalshi_platform.errors import StoreError, StoreRefused
from kalshi_platform.schema import DATASETS
from kalshi_platform.settings import Settings

log = logging.getLogger(__name__)

_FILE_NAME = re.compile(r"(?P<version>\d{3,})_(?P<name>\w+)\.sql")
_CLUSTERS = "SELECT cluster, uniqExact(shard_num), count() FROM system.clusters GROUP BY cluster"
_DESK = "mm_"
"""Prefix of the market maker's tables, whose content no cursor relies on."""
_BOOKKEEPING = """
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
        """SHA-256 of the text, independent of the line ends of the checkout."""
        return hashlib.sha256(self.sql.replace("\r\n", "\n").encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.version:03d}_{self.name}"


class State(Enum):
    """The state of a migration in a database."""

    APPLIED = "applied"
    PENDING = "pending"
    BEGUN = "begun, not ended: run kalshi-platform migrate again"
    CHANGED = "changed since it was applied"
    UNKNOWN = "applied by a newer version"


@dataclass(frozen=True)
class Standing:
    """A migration and its state in a database."""

    version: int
    name: str
    state: State
    applied_at: datetime | None

    def __str__(self) -> str:
        return f"{self.version:03d}_{self.name}"


def folder() -> Path:
    """The folder of the migrations: in the installed wheel, else in the repository."""
    package = Path(__file__).resolve().parents[1]
    bundled = package / "_infra" / "clickhouse_migrations"
    return bundled if bundled.is_dir() else package.parent / "infra" / "clickhouse_migrations"


def available(directory: Path | None = None) -> tuple[Migration, ...]:
    """The migrations in `directory` (default: the platform's own), by number. Raises `StoreRefused`."""
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
    """The state of each migration in the client's database, by number."""
    known = {m.version: m for m in (available() if migrations is None else migrations)}
    bookkept = _bookkept(client)
    return [
        _standing_of(v, known.get(v), bookkept.get(v))
        for v in sorted(known.keys() | bookkept.keys())
    ]


def migrate(
    settings: Settings,
    migrations: Sequence[Migration] | None = None,
    *,
    apply_retention: bool = False,
    accept_changed: bool = False,
    notify: Callable[[str], None] = log.warning,
) -> list[Migration]:
    """Create the database if it is missing and apply the pending migrations; returns those.

    On a cluster (CLICKHOUSE_CLUSTER) the same files create replicated tables on every host and Distributed
    tables over them: see cluster.py. `apply_retention` applies HOT_RETENTION_DAYS even if it has its default;
    `notify` receives a sentence for each change of retention and each table that is created again.
    `accept_changed` accepts an applied file that has changed since, if the tables are as the platform expects.

    Raises `StoreRefused` before anything is changed if a table or view of the platform's names belongs to another
    owner, if an applied file that creates tables has changed and is not accepted, if a later version's migrations
    changed the tables, or if the database is for a single server and a cluster is configured, or vice versa. The
    error of a failing migration names it and its statement.
    """
    migrations = available() if migrations is None else migrations
    cluster = _cluster(settings)
    _create_database(settings, cluster)
    client = connect(settings, log_comment="migrate")
    try:
        _refuse_foreign(client, migrations, cluster)
        _refuse_another_kind(client, settings)
        standings = standing(client, migrations)
        now = {s.version: s.state for s in standings}
        changed = [m for m in migrations if now[m.version] is State.CHANGED]
        changed_tables = [m for m in changed if not _only_views(m)]
        if not accept_changed:
            _refuse_changed(client, changed_tables)
        pending = [m for m in migrations if now[m.version] in {State.PENDING, State.BEGUN}]
        # also of applied ones, since the translation of later ones depends on them
        to_run = {m.version: _statements_of(m, cluster) for m in migrations}
        explicit = apply_retention or settings.hot_retention_given
        missing = _missing_tables(client, migrations, now, cluster)
        if pending:
            _make_bookkeeping(client, cluster)
        for migration in pending:
            _apply(client, migration, to_run[migration.version])
            _begin_retention(client, migration, settings.hot_retention_days, explicit=explicit)
            _record(client, migration, migration.checksum)
        _refuse_later(client, [s for s in standings if s.state is State.UNKNOWN])
        _require_expected(client, changed_tables)
        _recreate_tables(client, missing, migrations, cluster, notify)
        _recreate_views(client, migrations, to_run, changed)
        for migration in changed:
            _record(client, migration, migration.checksum)
            notify(
                f"{migration} was another file when it was applied; its tables and views match the file as it is now."
            )
        update_retention(client, settings, apply_retention=apply_retention, notify=notify)
        _disable_statistics(client, cluster)
        return pending
    finally:
        client.close()


def require_ours(client: Client, *tables: str) -> None:
    """Raise `StoreRefused` if one of these tables exists and belongs to another owner."""
    ownership.refuse_foreign(client, available(), _bookkept(client), names=tables)


def differences(client: Client) -> list[str]:
    """The differences between the tables and schema.py, a sentence for each column."""
    found = []
    for dataset in (dataset for dataset in DATASETS.values() if dataset.hot):
        with translated():
            described = client.query(
                f"DESCRIBE TABLE {dataset.name}", settings={"print_pretty_type_names": 0}
            ).result_rows
        actual = {str(row[0]): str(row[1]) for row in described}
        wanted = {column.name: column.clickhouse for column in dataset.columns}
        found += [
            f"{dataset.name}.{name} is {actual.get(name, 'missing')}, not {kind}"
            for name, kind in wanted.items()
            if actual.get(name) != kind
        ]
    return found


def update_retention(
    client: Client,
    settings: Settings,
    *,
    apply_retention: bool = False,
    notify: Callable[[str], None] = log.warning,
) -> list[Change]:
    """Apply HOT_RETENTION_DAYS to the tables if the setting is given; returns the changes.

    If it has its default, each table keeps its retention, and `notify` receives what the default would delete.
    Raises `StoreRefused` if a table of that name belongs to another owner.
    """
    require_ours(client, *RETAINED)
    found = hot_retention.changes(client, settings.hot_retention_days)
    if apply_retention or settings.hot_retention_given:
        hot_retention.apply(client, found, notify)
        return list(found)
    for change in found:
        if change.shortens:
            notify(
                f"Not changed, for HOT_RETENTION_DAYS is not set here: {change}."
                " If that is wanted, set it or run kalshi-platform migrate --apply-retention."
            )
    return []


def _begin_retention(client: Client, migration: Migration, days: int, *, explicit: bool) -> None:
    """Set the retention of the tables that a migration has just created.

    A table that existed before and has older rows keeps them, unless HOT_RETENTION_DAYS is set.
    """
    made = {m.name for m in map(definition, statements(migration.sql)) if m is not None}
    retained = [table for table in RETAINED if table in made]
    if not retained:
        return
    found = hot_retention.changes(client, days, retained)
    first = [c for c in found if c.now is None and (explicit or not c.rows)]
    hot_retention.set_days(client, *first)


def missing_tables(
    client: Client, migrations: Sequence[Migration] | None = None, cluster: Cluster | None = None
) -> list[str]:
    """The market maker's tables that a migration created here and that are missing now."""
    migrations = available() if migrations is None else migrations
    now = {s.version: s.state for s in standing(client, migrations)}
    return _missing_tables(client, migrations, now, cluster)


def _missing_tables(
    client: Client,
    migrations: Iterable[Migration],
    states: Mapping[int, State],
    cluster: Cluster | None,
) -> list[str]:
    """The market maker's tables that applied migrations created and the database lacks."""
    made: dict[str, None] = {}
    for migration in migrations:
        if states[migration.version] is not State.APPLIED:
            continue
        for statement in statements(migration.sql):
            if (gone := dropped(statement)) is not None:
                made.pop(gone, None)
            elif (one := definition(statement)) is not None and not one.is_view:
                made[one.name] = None
    present = _present(client)
    return [
        name
        for name in made
        if name.startswith(_DESK)
        and not {name, name + LOCAL if cluster is not None else name} <= present
    ]


def _recreate_tables(
    client: Client,
    missing: Collection[str],
    migrations: Iterable[Migration],
    cluster: Cluster | None,
    notify: Callable[[str], None],
) -> None:
    """Run the migrations' statements about these tables again, in order, and report that the tables are empty."""
    for migration in migrations:
        for statement in statements(migration.sql):
            made = definition(statement)
            if (made.name if made is not None else altered(statement)) not in missing:
                continue
            for command in [statement] if cluster is None else cluster.spread(statement):
                with translated():
                    client.command(command)
    for name in missing:
        notify(
            f"{name} was missing, though a migration had created it or found an engine's: it is created again,"
            " empty. If it was renamed, its rows are under the other name; if it was dropped, they are gone."
        )


def _present(client: Client) -> frozenset[str]:
    with translated():
        rows = client.query(
            "SELECT name FROM system.tables WHERE database = currentDatabase()"
        ).result_rows
    return frozenset(str(name) for (name,) in rows)


def _refuse_changed(client: Client, changed: Sequence[Migration]) -> None:
    """Raise `StoreRefused` for applied files that create tables and have changed."""
    if changed:
        raise StoreRefused(
            f"{', '.join(map(str, changed))} changed since it was applied to database {client.database}. If the"
            " change is yours, restore the file, and put the change in a new one. If the platform's files are as"
            " they were released, run kalshi-platform migrate --accept-changed: it compares the tables first."
        )


def _refuse_later(client: Client, applied: Sequence[Standing]) -> None:
    """Raise `StoreRefused` if a later version's migrations have changed the tables."""
    different = differences(client) if applied else []
    if different:
        raise StoreRefused(
            f"{', '.join(map(str, applied))} of database {client.database} is a later version's, and the tables are"
            f" not what this one expects: {'; '.join(different)}. Install that version. To stay with this one, set"
            " CLICKHOUSE_DATABASE to another name, and fill that one: kalshi-platform migrate, then"
            " kalshi-platform restore."
        )


def _require_expected(client: Client, changed: Sequence[Migration]) -> None:
    """Raise `StoreRefused` if the tables are not as the changed files would have created them."""
    different = differences(client) if changed else []
    if different:
        raise StoreRefused(
            f"{', '.join(map(str, changed))} changed since it was applied to database {client.database}, and the"
            f" tables are not what the platform expects: {'; '.join(different)}. Set CLICKHOUSE_DATABASE to another"
            " name, and fill that one: kalshi-platform migrate, then kalshi-platform restore."
        )


def _only_views(migration: Migration) -> bool:
    """Whether a migration creates nothing that stores rows."""
    return all(
        (made := definition(statement)) is not None and made.is_view
        for statement in statements(migration.sql)
    )


def _recreate_views(
    client: Client,
    migrations: Iterable[Migration],
    to_run: Mapping[int, Sequence[str]],
    changed: Collection[Migration],
) -> None:
    """Create missing views, and those of changed files, as their newest migration defines them."""
    newest: dict[str, list[str]] = {}
    others: set[str] = set()
    for migration in migrations:
        for statement in statements(migration.sql):
            if (gone := dropped(statement)) is not None:
                newest.pop(gone, None)
            elif (made := definition(statement)) is not None and made.is_view:
                if migration in changed:
                    others.add(made.name)
                newest[made.name] = [
                    command
                    for command in to_run[migration.version]
                    if (view := definition(command)) is not None and view.name == made.name
                ]
    present = _present(client)
    with translated():
        for name, commands in newest.items():
            if name in present and name not in others:
                continue
            for command in commands:
                client.command(_replacing(command))


def _replacing(statement: str) -> str:
    """Turn CREATE VIEW into CREATE OR REPLACE VIEW."""
    return re.sub(
        r"CREATE\s+VIEW(\s+IF\s+NOT\s+EXISTS)?", "CREATE OR REPLACE VIEW", statement, count=1
    )


def _disable_statistics(client: Client, cluster: Cluster | None) -> None:
    """Disable column statistics, which newer servers add to every part.

    No query here is planned with them, and in a part of some thousand rows they take a third of the bytes. A
    server without the setting has no statistics; one that has them off by default, as the embedded one, needs
    no ALTER.
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
    """The number of shards and hosts of a cluster. Raises `StoreRefused` if the server does not know it."""
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
    """The configured cluster. Raises `StoreRefused` if the server does not know it."""
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
    """Raise `StoreRefused` if the database is for a single server and a cluster is configured, or vice versa."""
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


def _statements_of(migration: Migration, cluster: Cluster | None) -> list[str]:
    """The statements to run for a migration, translated for the cluster if there is one."""
    found = list(statements(migration.sql))
    if cluster is None:
        return found
    return [command for statement in found for command in cluster.spread(statement)]


def _create_database(settings: Settings, cluster: Cluster | None) -> None:
    """Create the configured database on the server, or on every host of the cluster."""
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


def _refuse_foreign(
    client: Client, migrations: Sequence[Migration], cluster: Cluster | None
) -> None:
    """Raise `StoreRefused` if a table or view of the platform's names belongs to another owner."""
    bookkeeping = Migration(0, "bookkeeping", _BOOKKEEPING)
    ownership.refuse_foreign(client, [bookkeeping], {0}, cluster)
    ownership.refuse_foreign(client, migrations, _bookkept(client), cluster)


def _bookkept(client: Client) -> Mapping[int, tuple[str, str, datetime]]:
    """Name, checksum and time of the migrations that were begun in the database, by number.

    The checksum is empty for a migration that was begun and has not ended.
    """
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


def _standing_of(
    version: int, migration: Migration | None, recorded: tuple[str, str, datetime] | None
) -> Standing:
    """The state of one migration from its file and its bookkeeping."""
    if migration is None:
        assert recorded is not None  # noqa: S101 - one of the two is there
        return Standing(version, recorded[0], State.UNKNOWN, recorded[2])
    if recorded is None:
        return Standing(version, migration.name, State.PENDING, None)
    if not recorded[1]:
        return Standing(version, migration.name, State.BEGUN, recorded[2])
    state = State.APPLIED if recorded[1] == migration.checksum else State.CHANGED
    return Standing(version, migration.name, state, recorded[2])


def _make_bookkeeping(client: Client, cluster: Cluster | None) -> None:
    """Create the bookkeeping table if it is missing."""
    with translated():
        for statement in [_BOOKKEEPING] if cluster is None else cluster.spread(_BOOKKEEPING):
            client.command(statement)


def _apply(client: Client, migration: Migration, commands: Sequence[str]) -> None:
    """Record that a migration was begun, and run its statements.

    An error keeps its type; its sentence names the migration, the statement and its table.
    """
    _record(client, migration, "")
    for number, statement in enumerate(commands, 1):
        try:
            with translated():
                client.command(statement)
        except StoreError as error:
            raise type(error)(
                f"Migration {migration} failed at statement {number} of {len(commands)}"
                f" ({_head(statement)}): {error} The statements before it stay in effect; when the cause is repaired, run"
                " kalshi-platform migrate again.",
                code=error.code,
                name=error.name,
            ) from error


def _record(client: Client, migration: Migration, checksum: str) -> None:
    """Record that a migration was begun (empty checksum) or applied."""
    with translated():
        client.command(
            "INSERT INTO schema_migrations (version, name, checksum, applied_at)"
            " SELECT {version:UInt32}, {name:String}, {checksum:String}, now64(3)",
            parameters={
                "version": migration.version,
                "name": migration.name,
                "checksum": checksum,
            },
        )


def _head(statement: str) -> str:
    """A statement's first words, up to the name of its table: `CREATE TABLE IF NOT EXISTS trades`."""
    return re.split(r"\s*[(\n]| AS ", statement, maxsplit=1)[0][:100]

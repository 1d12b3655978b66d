"""Recognition of the platform's own tables and views, before anything is done to them.

The migrations use CREATE … IF NOT EXISTS, so a table of another owner with one of the platform's names would be
taken over without an error, and the platform's TTL would empty it. A table is the platform's if

- it has the comment of its CREATE TABLE in the migrations, or
- it is a Distributed table over the platform's `_local` table in the same database, or
- `schema_migrations` says that the migration that creates it was begun here, which requires that this check has
  passed. Views have no comment and need this; a table that has lost its comment must also have the columns.

The market maker's tables belong to the desk: engines may create them, and those with the documented columns are
used as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kalshi_platform.clickhouse.client import Client, translated
from kalshi_platform.clickhouse.cluster import LOCAL, Cluster
from kalshi_platform.clickhouse.ddl import Definition, definition
from kalshi_platform.clickhouse.statements import statements
from kalshi_platform.errors import StoreRefused
from kalshi_platform.printable import printable

if TYPE_CHECKING:
    from kalshi_platform.clickhouse.migrations import Migration

__all__ = ["refuse_foreign"]

MADE_BY_ENGINES = frozenset(
    {
        "mm_decisions",
        "mm_fills",
        "mm_order_actions",
        "mm_order_responses",
        "mm_position_snapshots",
    }
)
"""Tables that a desk's own engines may have created, with the columns of 004_market_maker.sql."""
_SHOWN = 6
"""Columns of a foreign table that its error names."""


@dataclass
class _Expected:
    """A name that the migrations create."""

    definitions: list[Definition] = field(default_factory=list)
    versions: set[int] = field(default_factory=set)
    """The migrations that create it."""


@dataclass(frozen=True)
class _Found:
    """A table or view of the database, on one host."""

    name: str
    engine: str
    engine_full: str
    comment: str
    columns: tuple[str, ...]

    @property
    def is_view(self) -> bool:
        return self.engine.endswith("View")


def refuse_foreign(
    client: Client,
    migrations: Iterable[Migration],
    begun: Collection[int],
    cluster: Cluster | None = None,
    names: Collection[str] | None = None,
) -> None:
    """Raise `StoreRefused` if tables or views with the platform's names belong to another owner.

    `begun`: the migrations in the database's own bookkeeping. `names`: check only these (default: all
    that the migrations create). On a cluster every host is queried.
    """
    expected = _expected(migrations)
    wanted = sorted(expected if names is None else expected.keys() & set(names))
    foreign: dict[str, str] = {}
    for found in _found(client, [*wanted, *(name + LOCAL for name in wanted)], cluster):
        name = found.name if found.name in expected else found.name.removesuffix(LOCAL)
        if name not in expected or (found.name != name and cluster is None):
            continue
        why = _why_foreign(found, name, expected[name], begun, str(client.database))
        if why:
            foreign[found.name] = why
    if not foreign:
        return
    which = "; ".join(f"{name} ({why})" for name, why in foreign.items())
    first = next(iter(foreign))
    on = "" if cluster is None else f" {cluster.clause}"
    raise StoreRefused(
        f"Database {client.database} has {_counted(len(foreign))} of this platform's name that"
        f" {'is' if len(foreign) == 1 else 'are'} not this platform's: {which}. Nothing was changed. Give the"
        " platform a database of its own (CLICKHOUSE_DATABASE), or rename what is there: RENAME TABLE"
        f" {client.database}.{first} TO {client.database}.{first}_former{on}."
    )


def _expected(migrations: Iterable[Migration]) -> Mapping[str, _Expected]:
    """The tables and views that the migrations create, by name."""
    names: dict[str, _Expected] = {}
    for migration in migrations:
        for statement in statements(migration.sql):
            if (made := definition(statement)) is not None:
                entry = names.setdefault(made.name, _Expected())
                entry.definitions.append(made)
                entry.versions.add(migration.version)
    return names


def _found(client: Client, names: Sequence[str], cluster: Cluster | None) -> list[_Found]:
    """The existing tables and views with these names, on every host of a cluster."""
    parameters: dict[str, Any] = {"database": client.database, "names": list(names)}

    def ask(columns: str, table: str, name: str) -> list[Sequence[Any]]:
        source = f"system.{table}"
        if cluster is not None:
            source = f"clusterAllReplicas({{cluster:String}}, system, {table})"
        with translated():
            return list(
                client.query(
                    f"SELECT DISTINCT {columns} FROM {source}"  # noqa: S608 - constants, no user text
                    f" WHERE database = {{database:String}} AND {name} IN {{names:Array(String)}}"
                    " ORDER BY ALL",
                    parameters=parameters
                    | ({"cluster": cluster.name} if cluster is not None else {}),
                ).result_rows
            )

    columns: dict[str, list[str]] = {}
    for table, _, column in ask("table, position, name", "columns", "table"):
        columns.setdefault(str(table), []).append(str(column))
    return [
        _Found(str(name), str(engine), str(full), str(comment), tuple(columns.get(str(name), ())))
        for name, engine, full, comment in ask(
            "name, engine, engine_full, comment", "tables", "name"
        )
    ]


def _why_foreign(
    found: _Found, name: str, expected: _Expected, begun: Collection[int], database: str
) -> str:
    """How a table or view differs from the platform's own; empty if it is the platform's."""
    views = any(made.is_view for made in expected.definitions)
    if found.is_view != views and name not in MADE_BY_ENGINES:
        return f"a {found.engine}"
    known = bool(expected.versions & set(begun))
    if views:
        return "" if known else "a view that no migration has made here"
    if _is_marked(found, name, expected, database):
        return ""
    lacking = [[c for c in made.columns if c not in found.columns] for made in expected.definitions]
    if not all(lacking) and (known or name in MADE_BY_ENGINES):
        return ""
    if name in MADE_BY_ENGINES:
        return f"a {found.engine} without {', '.join(lacking[-1])}"
    has = ", ".join(printable(column) for column in found.columns[:_SHOWN])
    return f"a {found.engine} with {has}{', …' if len(found.columns) > _SHOWN else ''}"


def _is_marked(found: _Found, name: str, expected: _Expected, database: str) -> bool:
    if found.engine == "Distributed" and f"'{database}', '{name}{LOCAL}'" in found.engine_full:
        return True
    return bool(found.comment) and found.comment in {m.comment for m in expected.definitions}


def _counted(number: int) -> str:
    return "a table or view" if number == 1 else f"{number} tables or views"

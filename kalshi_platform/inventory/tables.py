"""Inspect the market maker's tables of a database: present, missing, another owner's, or from before migration 010.

Engines may have created these tables themselves, so the columns decide, not the name. The columns are defined
in rows.py; who may create a table is decided in clickhouse/ownership.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from kalshi_platform.clickhouse.client import Client, translated
from kalshi_platform.errors import StoreRefused
from kalshi_platform.inventory.rows import DECISIONS, INVENTORY_COLUMNS, TABLES
from kalshi_platform.printable import printable

_SHOWN = 6
"""How many columns a message names."""
_PRECISE = "DateTime64"
TAPE = "trades"
"""The recorded public trades: evidence of which fills happened."""
STREAM_EVENTS = "stream_events"
"""The recorder's own events: whether the public trades are complete."""
_COLUMNS_READ = {
    TAPE: ("market_ticker", "trade_id", "ts", "ingest_ts"),
    STREAM_EVENTS: ("kind", "detail", "ingest_ts"),
}
POSITION_COLUMNS = ("pos_filled", "pos_open_exposure", "pos_total_est")


@dataclass(frozen=True)
class Standing:
    """The tables of a database whose names begin with `mm_`, and those of the recording, with their columns."""

    database: str
    columns: Mapping[str, Mapping[str, str]]
    """By table: its columns, in order, and their types."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Of the columns of `mm_decisions`, as SQL."""

    @cached_property
    def usable(self) -> frozenset[str]:
        """The tables that have all columns that are read."""
        return frozenset(table for table in self.columns if not self._lacking(table))

    def why_not(self, table: str) -> str:
        """Return why `table` cannot be read, with the remedy; empty if it can.

        Raises `StoreRefused` for one that a migration repairs.
        """
        if table not in self.columns:
            return (
                f"there is no table {table}: no market maker has written here. kalshi-platform migrate"
                " makes it."
            )
        lacking = self._lacking(table)
        if not lacking:
            return ""
        if table == DECISIONS.name and set(lacking) <= set(INVENTORY_COLUMNS):
            raise StoreRefused(
                f"{table} is older than the checks, it lacks {_named(lacking)}. Add them, its rows stay as"
                " they are: kalshi-platform migrate."
            )
        return (
            f"{table} is another owner's, it lacks {_named(lacking)} (it has"
            f" {_named(tuple(self.columns[table]))}). Rename it, {self._renamed(table)}, and make ours:"
            " kalshi-platform migrate."
        )

    def coarse(self) -> list[str]:
        """Return a sentence for each table whose times have no milliseconds."""
        return [
            f"{table}.ts is {self.columns[table]['ts']}, whole seconds: what came first within a second is not"
            " known, and a check may take the one for the other. To change it:"
            f" {self._renamed(table)}, then kalshi-platform migrate, then {self._copied(table)}."
            for table in sorted(TABLES.keys() & self.usable)
            if not self.columns[table]["ts"].startswith(_PRECISE)
        ]

    def takes_flat(self) -> bool:
        """Whether a decision without a position is stored with position 0: an older migration 010 has DEFAULT 0."""
        return any("nan" not in self.defaults.get(name, "nan") for name in POSITION_COLUMNS)

    def unknown_by_default(self) -> str:
        """Return the statement after which a decision without a position is stored as unknown (nan)."""
        changes = ", ".join(
            f"MODIFY COLUMN {name} Float64 DEFAULT nan" for name in POSITION_COLUMNS
        )
        return f"ALTER TABLE {self.database}.{DECISIONS.name} {changes}"

    def _copied(self, table: str) -> str:
        place, columns = f"{self.database}.{table}", ", ".join(TABLES[table].columns)
        return f"INSERT INTO {place} ({columns}) SELECT {columns} FROM {place}_former"  # noqa: S608 - shown

    def _renamed(self, table: str) -> str:
        return f"RENAME TABLE {self.database}.{table} TO {self.database}.{table}_former"

    def _lacking(self, table: str) -> tuple[str, ...]:
        if table not in TABLES and table not in _COLUMNS_READ:
            return ()
        needed = TABLES[table].columns if table in TABLES else _COLUMNS_READ[table]
        return tuple(name for name in needed if name not in self.columns[table])


def standing(client: Client) -> Standing:
    """Inspect the tables. Raises `StoreError` as the store does."""
    with translated():
        rows = client.query(
            "SELECT table, name, type, default_expression FROM system.columns WHERE database = currentDatabase()"
            " AND (startsWith(table, 'mm_') OR table IN {read:Array(String)}) ORDER BY table, position",
            parameters={"read": list(_COLUMNS_READ)},
        ).result_rows
    columns: dict[str, dict[str, str]] = {}
    defaults: dict[str, str] = {}
    for table, name, kind, default in rows:
        columns.setdefault(str(table), {})[str(name)] = str(kind)
        if table == DECISIONS.name:
            defaults[str(name)] = str(default)
    return Standing(str(client.database), columns, defaults)


def usable(client: Client) -> frozenset[str]:
    """Return the tables that can be read: see `Standing.usable`."""
    return standing(client).usable


def _named(columns: tuple[str, ...]) -> str:
    shown = ", ".join(printable(column) for column in columns[:_SHOWN])
    more = len(columns) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown

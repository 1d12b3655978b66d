"""The ledger in ClickHouse's table `recorders`: which recorders load into it, and how far (`journal/ledger.py`)."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.errors import StoreRefused
from kalshi_platform.journal.ledger import Entry, verify_entry
from kalshi_platform.settings import Settings

_THROWN = 395  # FUNCTION_THROW_IF_VALUE_IS_NON_ZERO
_ENGINE = (
    "SELECT engine FROM system.tables WHERE database = currentDatabase() AND name = 'recorders'"
)
_STATE = "epoch, token, max(began), max(loaded_to), max(planned_to), anyLast(host), anyLast(folder)"
_ENTRIES = f"""
    SELECT {_STATE} FROM recorders
    WHERE journal_id = {{journal:UUID}} AND shard = {{shard:UInt32}}
    GROUP BY epoch, token ORDER BY epoch, token
"""  # noqa: S608 - columns of our own
_JOURNALS = f"""
    SELECT journal_id, {_STATE} FROM recorders WHERE shard = {{shard:UInt32}}
    GROUP BY journal_id, epoch, token ORDER BY epoch DESC, token DESC LIMIT 1 BY journal_id
"""  # noqa: S608 - columns of our own
_INSERT = """
    INSERT INTO recorders
        (journal_id, shard, epoch, token, began, loaded_to, planned_to, host, folder, updated_at, revision)
    SELECT
        {journal:UUID}, {shard:UInt32}, {epoch:UInt64}, {token:String}, {began:UInt64},
        {loaded_to:UInt64}, {planned_to:UInt64}, {host:String}, {folder:String}, now64(3),
        {loaded_to:UInt64} + {planned_to:UInt64}
"""
_IF_KNOWN = """
    + toUInt64((
        SELECT throwIf(
            maxIf((loaded_to, planned_to), (epoch, token) = ({epoch:UInt64}, {token:String}))
                < ({known_loaded_to:UInt64}, {known_planned_to:UInt64})
            OR countIf((epoch, token) = ({epoch:UInt64}, {token:String})) = 0
            OR ({latest:Bool} AND max((epoch, token)) != ({epoch:UInt64}, {token:String})),
            'not the latest start, or not known'
        )
        FROM recorders
        WHERE journal_id = {journal:UUID} AND shard = {shard:UInt32}
    ))
"""
"""Added to the revision: 0, or the statement fails. In a column of its own it would not be computed."""


class TableLedger:
    """The ledger of the table `recorders`. For one thread."""

    def __init__(self, shard: int, connected: Callable[[], clickhouse.Client], place: str) -> None:
        """`place`: the server and database as named in sentences."""
        self._shard = shard
        self._place = place
        self._connected = connected
        self._replicated: bool | None = None

    def entries(self, journal: uuid.UUID) -> Sequence[Entry]:
        """See `Ledger`."""
        self._sync()
        with clickhouse.translated():
            rows = (
                self._connected()
                .query(_ENTRIES, parameters={"journal": str(journal), "shard": self._shard})
                .result_rows
            )
        return [Entry(*row) for row in rows]

    def journals(self) -> Sequence[tuple[uuid.UUID, Entry]]:
        """See `Ledger`."""
        self._sync()
        with clickhouse.translated():
            rows = self._connected().query(_JOURNALS, parameters={"shard": self._shard}).result_rows
        return [(uuid.UUID(str(journal)), Entry(*row)) for journal, *row in rows]

    def claim(self, journal: uuid.UUID, entry: Entry) -> None:
        """See `Ledger`."""
        self._command(_INSERT, self._values(journal, entry))

    def plan(self, journal: uuid.UUID, before: Entry, after: Entry) -> None:
        """See `Ledger`."""
        self._replace(journal, before, after, latest=True)

    def commit(self, journal: uuid.UUID, before: Entry, after: Entry) -> None:
        """See `Ledger`."""
        self._replace(journal, before, after, latest=False)

    def _replace(self, journal: uuid.UUID, before: Entry, after: Entry, *, latest: bool) -> None:
        """Replace an entry; the server compares and inserts in one statement."""
        known = {
            "known_loaded_to": before.loaded_to,
            "known_planned_to": before.planned_to,
            "latest": latest,
        }
        try:
            self._sync()
            self._command(_INSERT + _IF_KNOWN, self._values(journal, after) | known)
        except StoreRefused as error:
            if error.code == _THROWN:
                verify_entry(journal, self.entries(journal), before, self._place, latest=latest)
            raise

    def _values(self, journal: uuid.UUID, entry: Entry) -> dict[str, Any]:
        return {"journal": str(journal), "shard": self._shard, **msgspec.structs.asdict(entry)}

    def _command(self, statement: str, values: dict[str, Any]) -> None:
        with clickhouse.translated():
            self._connected().command(statement, parameters=values)

    def _sync(self) -> None:
        """Wait until this host has every row that any replica has acknowledged."""
        with clickhouse.translated():
            if self._replicated is None:
                engines = self._connected().query(_ENGINE).result_rows
                self._replicated = any(str(name).startswith("Replicated") for (name,) in engines)
            if self._replicated:
                self._connected().command("SYSTEM SYNC REPLICA recorders")


def open_table_ledger(settings: Settings, shard: int) -> TableLedger:
    """Open the ledger of the configured ClickHouse. Raises `StoreError` if it cannot be reached."""
    client = clickhouse.connect(settings, log_comment="recorders")
    return TableLedger(shard, lambda: client, place(settings))


def place(settings: Settings) -> str:
    """The configured server and database, as named in sentences."""
    return f"ClickHouse at {settings.clickhouse_url}, database {settings.clickhouse_database}"

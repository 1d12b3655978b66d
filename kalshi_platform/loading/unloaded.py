"""The records in a data folder's journals that their loaders have not brought to ClickHouse yet.

A loader will insert the rows of these records. Any other writer to ClickHouse, such as `restore`, leaves these
rows to it, so that no row is stored twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np

from kalshi_platform.archive import watermarks
from kalshi_platform.clickhouse import clickhouse_ledger
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.clickhouse.clickhouse_ledger import TableLedger
from kalshi_platform.journal import journal_identity, reader
from kalshi_platform.journal.reader import LostRange
from kalshi_platform.loading import cursor
from kalshi_platform.loading.cursor import Cursor
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import hour_of_ns

_HOUR_NS = 3_600_000_000_000


@dataclass
class _Shard:
    number: int
    folder: Path
    scanned_to: int = 0
    newest: dict[datetime, int] = field(default_factory=dict)
    """By hour, the last scanned record."""


class Unloaded:
    """The records of a data folder's journals that are not in ClickHouse yet, by hour."""

    def __init__(self, settings: Settings, client: clickhouse.Client) -> None:
        self._settings = settings
        self._client = client
        self._shards: dict[int, _Shard] = {}

    def of(self, hour: datetime) -> Mapping[int, int]:
        """The shards with records of `hour` that are not loaded yet, each with its first unloaded record.

        That record may belong to another hour: all records before it are loaded. Reads journals and ledgers
        at each call.

        Raises: `JournalError` where a journal cannot be read, `StoreError` where ClickHouse cannot be queried.
        """
        unloaded = {}
        for number in watermarks.shards(self._settings.journals_dir):
            folder = self._settings.journal_dir(number)
            shard = self._shards.setdefault(number, _Shard(number, folder))
            loaded_to = _loaded_to(self._settings, self._client, shard)
            _scan(shard, loaded_to)
            if shard.newest.get(hour, -1) >= loaded_to:
                unloaded[number] = loaded_to
        return unloaded


def _loaded_to(settings: Settings, client: clickhouse.Client, shard: _Shard) -> int:
    """The record at which the shard's loader resumes in this ClickHouse; all records before it are stored.

    Decided as in `resume`: by ClickHouse's ledger, else by the cursor. With a cursor that is missing, damaged or
    of another location the loader begins at the journal's beginning or stops.
    """
    beginning = reader.oldest_offset(shard.folder).n
    identity = journal_identity.read(shard.folder)
    if identity is None:
        return beginning
    ledger = TableLedger(shard.number, lambda: client, clickhouse_ledger.place(settings))
    if entries := ledger.entries(identity.id):
        return max(max(entries, key=lambda entry: entry.start).loaded_to, beginning)
    saved = cursor.read(shard.folder, "clickhouse", identity.id)
    if isinstance(saved, Cursor) and saved.place in {"", clickhouse_ledger.place(settings)}:
        return max(saved.committed[2], beginning)
    return beginning


def _scan(shard: _Shard, loaded_to: int) -> None:
    """Scan the records from `loaded_to` on that were not scanned yet, and keep their hours."""
    begin = max(shard.scanned_to, loaded_to)
    for part in reader.read(shard.folder, reader.offset_of(shard.folder, begin)):
        shard.scanned_to = part.first_n + part.rows
        if isinstance(part, LostRange):
            continue
        hours = part.batch.column("recv_ns").to_numpy() // _HOUR_NS
        values, last_from_end = np.unique(hours[::-1], return_index=True)
        for value, back in zip(values, last_from_end, strict=True):
            hour = hour_of_ns(int(value) * _HOUR_NS)
            n = part.first_n + part.rows - 1 - int(back)
            shard.newest[hour] = max(shard.newest.get(hour, -1), n)
    shard.newest = {hour: n for hour, n in shard.newest.items() if n >= loaded_to}

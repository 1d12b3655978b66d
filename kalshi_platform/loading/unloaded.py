"""What the journals of a data folder have and their loaders have not brought to ClickHouse yet.

A loader inserts the rows of these records itself, sooner or later. Whoever else inserts into ClickHouse
while recorders run, or wait to go on, leaves these rows to it: then no row comes twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np

from kalshi_platform import typed_json
from kalshi_platform.loading import passage
from kalshi_platform.recording import journal
from kalshi_platform.recording.journal import Hole, JournalError
from kalshi_platform.storage.archive import hour_of_ns

_HOUR_NS = 3_600_000_000_000


class _Cursor(msgspec.Struct):
    """What is looked at of a loader's cursor."""

    committed: tuple[int, int, int]


@dataclass
class _Shard:
    folder: Path
    scanned_to: int = 0
    newest: dict[datetime, int] = field(default_factory=dict)
    """By hour, its last record among those that were scanned."""


class Unloaded:
    """The records of a data folder's journals that are not in ClickHouse yet, by hour."""

    def __init__(self, journals: Path) -> None:
        self._journals = journals
        self._shards: dict[int, _Shard] = {}

    def of(self, hour: datetime) -> Mapping[int, int]:
        """The shards with records of `hour` that are not loaded yet, each with its first such record.

        That may be a record of another hour: all before it are loaded. Looks anew each time. Raises
        `JournalError` where a journal cannot be read.
        """
        found = {}
        for number in passage.shards(self._journals):
            shard = self._shards.setdefault(number, _Shard(self._journals / f"shard-{number}"))
            committed = _committed(shard.folder)
            _scan(shard, committed)
            if shard.newest.get(hour, -1) >= committed:
                found[number] = committed
        return found


def _committed(folder: Path) -> int:
    """The record up to which ClickHouse has the journal: all before it are there."""
    beginning = journal.beginning(folder).n
    path = folder / "load" / "clickhouse.json"
    try:
        return max(typed_json.decode(path.read_bytes(), _Cursor).committed[2], beginning)
    except FileNotFoundError:
        return beginning  # nothing was loaded: the loader begins there
    except msgspec.DecodeError as error:
        raise JournalError(
            f"{path} is damaged ({error}): how far ClickHouse is loaded is not known. Start the recorder,"
            " which says what to do."
        ) from None


def _scan(shard: _Shard, committed: int) -> None:
    """Note the hours of the records from `committed` on that were not scanned yet."""
    begin = max(shard.scanned_to, committed)
    for stretch in journal.read(shard.folder, journal.find(shard.folder, begin)):
        shard.scanned_to = stretch.first_n + stretch.rows
        if isinstance(stretch, Hole):
            continue
        hours = stretch.batch.column("recv_ns").to_numpy() // _HOUR_NS
        values, last_from_end = np.unique(hours[::-1], return_index=True)
        for value, back in zip(values, last_from_end, strict=True):
            hour = hour_of_ns(int(value) * _HOUR_NS)
            n = stretch.first_n + stretch.rows - 1 - int(back)
            shard.newest[hour] = max(shard.newest.get(hour, -1), n)
    shard.newest = {hour: n for hour, n in shard.newest.items() if n >= committed}

"""The ledger of an archive: `recorders/<journal id>.json`, one file per journal.

The files are apart from the datasets, so that neither readers nor compaction see them. What an entry means
belongs in `journal.ledger`.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence

import msgspec

from kalshi_platform import checked_json
from kalshi_platform.archive.interface import Archive
from kalshi_platform.checked_json import CorruptFile, LaterFormat
from kalshi_platform.errors import StoreRefused
from kalshi_platform.journal.ledger import Entry, verify_entry

log = logging.getLogger(__name__)

FOLDER = "recorders"
FORMAT = 1
ENTRIES_KEPT = 256


class _File(msgspec.Struct, frozen=True):
    format: int
    journal: uuid.UUID
    shard: int
    archive: str
    entries: tuple[Entry, ...]


class ArchiveLedger:
    """See `journal.ledger.Ledger`. The first claim gives the archive its identity."""

    def __init__(self, archive: Archive, shard: int) -> None:
        self._archive = archive
        self._shard = shard
        self._identity: str | None = None
        """The archive's identity, once an entry was claimed."""

    def entries(self, journal: uuid.UUID) -> Sequence[Entry]:
        """See `Ledger`. A damaged file counts as empty; a later version's is refused."""
        file = self._read(_path(journal))
        if file is None or file.journal != journal:
            if file is not None:
                log.error("%s of %s belongs to another journal.", _path(journal), self._archive)
            return ()
        return file.entries

    def journals(self) -> Sequence[tuple[uuid.UUID, Entry]]:
        """See `Ledger`."""
        files = [self._read(name) for name in self._archive.metadata_files(FOLDER)]
        return [
            (file.journal, file.entries[-1])
            for file in files
            if file is not None and file.shard == self._shard and file.entries
        ]

    def claim(self, journal: uuid.UUID, entry: Entry) -> None:
        """See `Ledger`. Later writes require the archive to keep this identity."""
        known = self._read(_path(journal))
        self._identity = self._archive.identify(known.archive if known else None)
        self._archive.expect(self._identity)
        with self._archive.metadata_lock():
            self._put(journal, self.entries(journal), entry)

    def plan(self, journal: uuid.UUID, before: Entry, after: Entry) -> None:
        """See `Ledger`."""
        self._replace(journal, before, after, latest=True)

    def commit(self, journal: uuid.UUID, before: Entry, after: Entry) -> None:
        """See `Ledger`. Rows written to a folder that replaced the archive do not count."""
        self._replace(journal, before, after, latest=False)

    def _replace(self, journal: uuid.UUID, before: Entry, after: Entry, *, latest: bool) -> None:
        if self._identity is None:
            raise ValueError("nothing was claimed")
        self._archive.require_identity(self._identity)
        with self._archive.metadata_lock():
            entries = self.entries(journal)
            verify_entry(journal, entries, before, f"The archive in {self._archive}", latest=latest)
            self._put(journal, entries, after)

    def _put(self, journal: uuid.UUID, entries: Sequence[Entry], entry: Entry) -> None:
        others = [other for other in entries if other.start != entry.start]
        kept = tuple(sorted([*others, entry], key=lambda kept: kept.start)[-ENTRIES_KEPT:])
        file = _File(FORMAT, journal, self._shard, str(self._identity), kept)
        self._archive.write_metadata(_path(journal), checked_json.encode(file))

    def _read(self, name: str) -> _File | None:
        text = self._archive.read_metadata(name)
        if text is None:
            return None
        try:
            return checked_json.decode(text, _File, f"{name} of {self._archive}", FORMAT)
        except LaterFormat as error:
            raise StoreRefused(str(error)) from None
        except CorruptFile as error:
            log.error("%s of %s is damaged (%s).", name, self._archive, error)
            return None


def _path(journal: uuid.UUID) -> str:
    return f"{FOLDER}/{journal}.json"

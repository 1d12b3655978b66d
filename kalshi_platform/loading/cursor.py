"""How far a load is, kept beside the journal: `load/<store>.json`.

The store's own record (`storage.recorders`) decides where loading goes on; the cursor is the second
witness, and says which saved books go with it. A cursor proves its content with a checksum, and names
its journal and its store, so that one that was damaged, altered or swapped is not taken for a place.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kalshi_platform import checked_json, durable
from kalshi_platform.checked_json import CorruptFile, LaterFormat
from kalshi_platform.journal.journal_identity import Claim, LaterVersion, Start
from kalshi_platform.journal.reader import LogOffset

FORMAT = 2
UNSEALED_FORMAT = 1
"""Written by versions whose stores kept no record: no journal, no store, no checksum."""

Place = tuple[int, int, int]
"""A `LogOffset` as it is kept."""


class Cursor(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept. `committed`: the store has every record before it."""

    format: int = UNSEALED_FORMAT
    journal: uuid.UUID | None = None
    store: str = ""
    place: str = ""
    """Where the store is, as people call it."""
    start: Start | None = None
    """Which start of the recorder wrote it."""
    committed: Place
    planned: Place | None = None
    """Rows up to here may be in the store too: a write was begun."""
    state_at: Place | None = None
    state_file: str = ""

    @property
    def sealed(self) -> bool:
        """Whether it names its journal and its store."""
        return self.format != UNSEALED_FORMAT

    @property
    def planned_n(self) -> int:
        """Up to which record rows may be in the store."""
        return max(self.committed[2], self.planned[2] if self.planned else 0)


@dataclass(frozen=True)
class Unusable:
    """There is no cursor that can be used; `why` is a clause about its file."""

    why: str
    is_there: bool = True
    """Whether there is a file all the same: then something was loaded once."""


def path(folder: Path, store: str) -> Path:
    """Where a store's cursor is, below a journal's folder."""
    return folder / "load" / f"{store}.json"


def read(folder: Path, store: str, journal: uuid.UUID) -> Cursor | Unusable:
    """A store's cursor.

    Raises `OSError` where the disk does not give it, `LaterVersion` where a later version wrote it.
    """
    where = path(folder, store)
    try:
        cursor = checked_json.decode(
            where.read_bytes(), Cursor, where, FORMAT, checksum_optional=True
        )
    except FileNotFoundError:
        return Unusable(f"{where} is missing", is_there=False)
    except CorruptFile as error:
        return Unusable(f"{where} is damaged ({error})")
    except LaterFormat as error:
        raise LaterVersion(
            f"{error} To stay with this one, remove the file: the store itself says how far it holds the journal."
        ) from None
    if not cursor.sealed:
        return cursor
    for differs, what in (
        (cursor.journal != journal, f"another journal, {cursor.journal}"),
        (cursor.store != store, f"another store, {cursor.store}"),
    ):
        if differs:
            return Unusable(f"{where} is of {what}")
    return cursor


def write(folder: Path, cursor: Cursor) -> None:
    """Replace a store's cursor, durably. Raises `OSError`."""
    where = path(folder, cursor.store)
    where.parent.mkdir(exist_ok=True)
    durable.replace(where, checked_json.encode(cursor))


def claims(folder: Path) -> list[Claim]:
    """What a journal's cursors say of its identity. One that proves nothing says nothing."""
    found = []
    for where in sorted((folder / "load").glob("*.json")):
        try:
            cursor = checked_json.decode(where.read_bytes(), Cursor, where, FORMAT)
        except (OSError, CorruptFile, LaterFormat):
            continue
        if cursor.journal is not None and cursor.start is not None:
            found.append(Claim(cursor.journal, cursor.start))
    return found


def reached(folder: Path, journal: uuid.UUID) -> int:
    """The record that a journal's loads have come to, or were about to: none before it is to be written.

    A cursor that cannot be used says nothing here; its load does.
    """
    ends = [0]
    for where in (folder / "load").glob("*.json"):
        try:
            cursor = read(folder, where.stem, journal)
        except LaterVersion:
            continue
        if isinstance(cursor, Cursor):
            ends.append(cursor.planned_n)
    return max(ends)


def has_loaded(folder: Path, store: str, place: str) -> bool:
    """Whether a journal's cursor says that something was loaded into the store at that place."""
    where = path(folder, store)
    try:
        cursor = checked_json.decode(where.read_bytes(), Cursor, where, FORMAT)
    except (FileNotFoundError, CorruptFile, LaterFormat):
        return False  # its load says what is wrong with it
    return cursor.place == place and cursor.committed[2] > 0


def plain(position: LogOffset) -> Place:
    """A position as it is kept."""
    return (position.segment, position.offset, position.n)

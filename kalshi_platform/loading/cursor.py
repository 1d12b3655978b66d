"""The cursor: how far a loader has come, kept beside the journal in `load/<store>.json`.

The store's ledger (`journal.ledger`) decides where loading resumes; the cursor is the second source and
names the saved books. It has a checksum and names its journal and store, so that a damaged, altered or
swapped file is detected. Deciding where to resume belongs in `resume`.
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
"""Written by versions without ledgers: no journal, no store, no checksum."""

Place = tuple[int, int, int]
"""A `LogOffset` as it is stored."""


class Cursor(msgspec.Struct, frozen=True, kw_only=True):
    """The content of the file. `committed`: the store has every record before it."""

    format: int = UNSEALED_FORMAT
    journal: uuid.UUID | None = None
    store: str = ""
    place: str = ""
    """The store's location, for messages."""
    start: Start | None = None
    """The recorder start that wrote it."""
    committed: Place
    planned: Place | None = None
    """Rows up to here may be in the store, too: a write was begun."""
    state_at: Place | None = None
    state_file: str = ""

    @property
    def sealed(self) -> bool:
        """Whether the cursor names its journal and store and has a checksum."""
        return self.format != UNSEALED_FORMAT

    @property
    def planned_n(self) -> int:
        """The record up to which rows may be in the store."""
        return max(self.committed[2], self.planned[2] if self.planned else 0)


@dataclass(frozen=True)
class Unusable:
    """No usable cursor; `why` is a clause about its file."""

    why: str
    exists: bool = True
    """Whether the file exists: then something was loaded once."""


def path(folder: Path, store: str) -> Path:
    """The path of a store's cursor in a journal's folder."""
    return folder / "load" / f"{store}.json"


def read(folder: Path, store: str, journal: uuid.UUID) -> Cursor | Unusable:
    """Read a store's cursor.

    Raises: `OSError` where the file cannot be read, `LaterVersion` where a later version wrote it.
    """
    where = path(folder, store)
    try:
        cursor = checked_json.decode(
            where.read_bytes(), Cursor, where, FORMAT, checksum_optional=True
        )
    except FileNotFoundError:
        return Unusable(f"{where} is missing", exists=False)
    except CorruptFile as error:
        return Unusable(f"{where} is damaged ({error})")
    except LaterFormat as error:
        raise LaterVersion(
            f"{error} To stay with this version, remove the file: the store itself records how far it holds the"
            " journal."
        ) from None
    if not cursor.sealed:
        return cursor
    for differs, owner in (
        (cursor.journal != journal, f"another journal, {cursor.journal}"),
        (cursor.store != store, f"another store, {cursor.store}"),
    ):
        if differs:
            return Unusable(f"{where} belongs to {owner}")
    return cursor


def write(folder: Path, cursor: Cursor) -> None:
    """Replace a store's cursor, durably. Raises: `OSError`."""
    where = path(folder, cursor.store)
    where.parent.mkdir(exist_ok=True)
    durable.replace(where, checked_json.encode(cursor))


def claims(folder: Path) -> list[Claim]:
    """The evidence of a journal's identity in its cursors; unusable cursors are skipped."""
    evidence = []
    for where in sorted((folder / "load").glob("*.json")):
        try:
            cursor = checked_json.decode(where.read_bytes(), Cursor, where, FORMAT)
        except (OSError, CorruptFile, LaterFormat):
            continue
        if cursor.journal is not None and cursor.start is not None:
            evidence.append(Claim(cursor.journal, cursor.start))
    return evidence


def reached(folder: Path, journal: uuid.UUID) -> int:
    """The record that the journal's loaders have reached or planned: no record number below it may be used again.

    Unusable cursors are skipped; their loaders report them.
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
    """Whether a journal's cursor records that rows were loaded into the store at that location."""
    where = path(folder, store)
    try:
        cursor = checked_json.decode(where.read_bytes(), Cursor, where, FORMAT)
    except (FileNotFoundError, CorruptFile, LaterFormat):
        return False  # its loader reports the problem
    return cursor.place == place and cursor.committed[2] > 0


def to_place(position: LogOffset) -> Place:
    """Convert a log offset to its stored form."""
    return (position.segment, position.offset, position.n)

"""What a store knows of the recorders that load into it: who, and how far.

Each store keeps a record for each journal, apart from the rows: one entry for each start of its recorder.

    epoch, token            which start it is; later starts have higher epochs
    began                   the first journal record of that start
    loaded_to               the store holds the rows of every record before this
    planned_to              rows up to here may be in the store too: a write was begun

So a store says by itself where loading goes on, whatever became of the cursors; and a copy of a data
folder that starts elsewhere is noticed, since its start is one that the other folder does not know.
A load writes its plan here before the rows, and `loaded_to` when they are durable.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Protocol

import msgspec

from kalshi_platform.errors import PlatformError


class Entry(msgspec.Struct, frozen=True, order=True):
    """One start of a recorder, as a store knows it."""

    epoch: int
    token: str
    began: int
    loaded_to: int
    planned_to: int
    host: str = ""
    folder: str = ""

    @property
    def start(self) -> tuple[int, str]:
        """Which start it is; they are ordered by it."""
        return self.epoch, self.token


class Superseded(PlatformError):
    """Another recorder has started with this journal's identity, and the store is its."""


class RecordGone(PlatformError):
    """The store no longer has the entry that this recorder made there: it is another store now."""


class Ledger(Protocol):
    """A store's record of one shard's journals. Methods raise `StoreError` where the store does not answer."""

    def entries(self, journal: uuid.UUID) -> Sequence[Entry]:
        """The entries of a journal, ascending by start; none where the store does not know it."""

    def journals(self) -> Sequence[tuple[uuid.UUID, Entry]]:
        """The latest entry of every journal of this shard."""

    def claim(self, journal: uuid.UUID, entry: Entry) -> None:
        """Make the first entry of a start."""

    def plan(self, journal: uuid.UUID, before: Entry, after: Entry) -> None:
        """Replace the entry of the latest start, before rows are written.

        Raises `Superseded` where another start is the latest, `RecordGone` where the store has no longer
        what it had: `before` or more.
        """

    def settle(self, journal: uuid.UUID, before: Entry, after: Entry) -> None:
        """Replace an entry, after its rows are durable; also where another start is the latest now.

        Raises `RecordGone` as `plan` does.
        """


def insist_on(
    journal: uuid.UUID, entries: Sequence[Entry], before: Entry, store: str, *, latest: bool
) -> None:
    """Raise `RecordGone` where a store has less than `before`, `Superseded` where it is not the latest."""
    known = next((it for it in entries if it.start == before.start), None)
    if known is None or (known.loaded_to, known.planned_to) < (before.loaded_to, before.planned_to):
        raise RecordGone(
            f"{store} no longer says that it holds journal {journal} up to record {before.loaded_to}: it"
            " was emptied, replaced, or restored from a backup."
        )
    newest = max(entries, key=lambda it: it.start)
    if latest and newest.start != before.start:
        raise superseded(journal, newest, store)


def superseded(journal: uuid.UUID, by: Entry, store: str) -> Superseded:
    """That another recorder has a journal's place in a store, and what to do."""
    where = f"in {by.folder} on {by.host}" if by.folder else "elsewhere"
    return Superseded(
        f"{store} is being loaded by another recorder of journal {journal}, which started {where} (epoch"
        f" {by.epoch}): one of the two data folders is a copy. Nothing of this one is loaded there; its"
        " journal keeps everything. Stop one of them for good. To keep both, stop this one and run"
        " kalshi-platform adopt: it goes on as a recorder of its own."
    )

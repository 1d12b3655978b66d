"""The ledger: how much of each journal a store holds, kept in the store itself beside the rows.

A store has one entry for each start of each journal's recorder:

    epoch, token            identify the start; later starts have higher epochs
    began                   the first journal record of that start
    loaded_to               the store holds the rows of every record before this one
    planned_to              rows up to here may be in the store too: a write was begun

So the store itself says where loading continues, even if the cursors are lost. A copy of a data folder
that is started elsewhere is detected, because the original does not know that start. The loader plans
here before it writes rows, and commits `loaded_to` when they are durable. The implementations are in
`clickhouse` and `archive`.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Protocol

import msgspec

from kalshi_platform.errors import PlatformError


class Entry(msgspec.Struct, frozen=True, order=True):
    """A store's entry for one recorder start."""

    epoch: int
    token: str
    began: int
    loaded_to: int
    planned_to: int
    host: str = ""
    folder: str = ""

    @property
    def start(self) -> tuple[int, str]:
        """Identifies the start; starts are ordered by it."""
        return self.epoch, self.token


class Superseded(PlatformError):
    """Another recorder has started with this journal's identity and owns its place in the store."""


class EntryMissing(PlatformError):
    """The entry that this recorder made is missing: the store was emptied, replaced or restored."""


class Ledger(Protocol):
    """A store's entries for one shard's journals. Methods raise `StoreError` where the store does not answer."""

    def entries(self, journal: uuid.UUID) -> Sequence[Entry]:
        """The entries of a journal, ascending by start; empty where the store has none."""

    def journals(self) -> Sequence[tuple[uuid.UUID, Entry]]:
        """The latest entry of every journal of this shard."""

    def claim(self, journal: uuid.UUID, entry: Entry) -> None:
        """Insert the first entry of a start."""

    def plan(self, journal: uuid.UUID, before: Entry, after: Entry) -> None:
        """Replace the entry of the latest start before rows are written.

        Raises: `Superseded` where another start is the latest; `EntryMissing` where the stored entry is
        missing or behind `before`.
        """

    def commit(self, journal: uuid.UUID, before: Entry, after: Entry) -> None:
        """Replace an entry after its rows are durable, even if another start is the latest by now.

        Raises: `EntryMissing` as `plan` does.
        """


def verify_entry(
    journal: uuid.UUID, entries: Sequence[Entry], before: Entry, store: str, *, latest: bool
) -> None:
    """Raise `EntryMissing` where the store has less than `before`, `Superseded` where `before` is not the latest."""
    known = next((entry for entry in entries if entry.start == before.start), None)
    if known is None or (known.loaded_to, known.planned_to) < (before.loaded_to, before.planned_to):
        raise EntryMissing(
            f"{store} no longer records that it holds journal {journal} up to record {before.loaded_to}: it"
            " was emptied, replaced, or restored from a backup."
        )
    newest = max(entries, key=lambda entry: entry.start)
    if latest and newest.start != before.start:
        raise superseded(journal, newest, store)


def superseded(journal: uuid.UUID, by: Entry, store: str) -> Superseded:
    """The error for a journal that another recorder loads into the same store, with the remedy."""
    where = f"in {by.folder} on {by.host}" if by.folder else "elsewhere"
    return Superseded(
        f"{store} is being loaded by another recorder of journal {journal}, which started {where} (epoch"
        f" {by.epoch}): one of the two data folders is a copy. Nothing from this one is loaded there; its"
        " journal keeps everything. Stop one of them for good. To keep both, stop this one and run"
        " kalshi-platform adopt: it continues as an independent recorder."
    )

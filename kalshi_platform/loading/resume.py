"""Decides where loading a journal into a store resumes, from the store's ledger, the cursor and the journal.

The ledger comes first: it was written to the store in order with the rows. It is compared with the starts of
this recorder, so that the rows of a copy that recorded elsewhere are not taken for this journal's. Where the
cursor disagrees, or the store has no ledger, traces decide (see `traces`): whether the rows of a few records
before and after a log offset are in the store. No I/O here; the loader does it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kalshi_platform.errors import PlatformError
from kalshi_platform.journal.ledger import Entry, Superseded, superseded
from kalshi_platform.loading.cursor import Cursor


class Unresolved(PlatformError):
    """It is not known where loading resumes; resuming anywhere could duplicate rows or leave some out."""


@dataclass(frozen=True)
class Recorder:
    """A journal and the current start of its recorder."""

    journal: uuid.UUID
    starts: frozenset[tuple[int, str]]
    """The starts that this folder knows, including the current one."""
    current: tuple[int, str]
    began: int
    """The first record of the current start."""
    ended: int
    """The number after the last record before the current start."""


@dataclass(frozen=True)
class Point:
    """Where loading resumes."""

    loaded_to: int
    """The store holds every record before this."""
    planned_to: int
    """The store may hold rows of records before this, written as one range."""
    why: str = ""
    """What did not agree, as a clause; empty where everything did."""
    certain: bool = True
    """False where traces have to confirm it."""


def from_ledger(entries: Sequence[Entry], recorder: Recorder, store: str) -> Point | None:
    """Where loading resumes according to the store's ledger; None where it has no entry of the journal.

    Raises: `Superseded` where another recorder of this journal loads into the store, or where rows of another
    recorder have record numbers of this folder.
    """
    if not entries:
        return None
    latest = max(entries, key=lambda entry: entry.start)
    own = [entry for entry in entries if entry.start in recorder.starts]
    if not own:
        raise superseded(recorder.journal, latest, store)
    known = max(own, key=lambda entry: entry.start)
    foreign = latest.start != known.start
    if known.start == recorder.current:
        if foreign:
            raise superseded(recorder.journal, latest, store)
        return Point(known.loaded_to, known.planned_to)
    if recorder.ended <= known.loaded_to:  # the store has every record before this start
        reached = max(entry.planned_to for entry in entries)
        if recorder.began < reached or recorder.current < latest.start:
            raise _numbers_taken(recorder, latest, reached, store)
        if recorder.ended == known.loaded_to and recorder.began == recorder.ended:
            return Point(recorder.began, recorder.began)
        why = f"the journal ends at record {recorder.ended}, and {store} holds it up to {reached}"
        return Point(recorder.began, recorder.began, why)
    if foreign or known.planned_to > recorder.ended:
        raise superseded(recorder.journal, latest, store)
    return Point(known.loaded_to, known.planned_to)


def compare_with_cursor(point: Point, cursor: Cursor | None, why_none: str = "") -> Point:
    """Compare the ledger's point with the cursor; the result is uncertain where they disagree."""
    if cursor is None:
        return replace(point, why=point.why or why_none, certain=False)
    committed = cursor.committed[2]
    planned = cursor.planned[2] if cursor.planned else committed
    expected = {point.loaded_to, point.planned_to}
    if point.why or committed in expected or (planned in expected and committed < point.loaded_to):
        return point
    where = "behind" if committed < point.loaded_to else "ahead of"
    why = f"the cursor, at record {committed}, is {where} the store's ledger"
    return replace(point, why=why, certain=False)


def _numbers_taken(recorder: Recorder, latest: Entry, reached: int, store: str) -> Superseded:
    where = f" by the recorder in {latest.folder} on {latest.host}" if latest.folder else ""
    return Superseded(
        f"{store} holds records of journal {recorder.journal} up to {reached}, loaded{where}, and the"
        f" journal here ended at {recorder.ended} before this start: it is a copy, or was restored from a"
        f" backup, while {store} could not be reached. Records from {recorder.began} on are in the journal"
        " and not loaded. Stop this recorder and run kalshi-platform adopt: it continues as an independent"
        " recorder."
    )

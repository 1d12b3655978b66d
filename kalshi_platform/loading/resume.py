"""Where the loading of a journal into a store goes on, by what the store, the cursor and the journal say.

The store's own record comes first: it was written there, in order, with the rows. It is held against the
starts of this recorder, so that rows of a copy that recorded elsewhere are not taken for this journal's.
A cursor that disagrees, or a store that keeps no record, is settled by traces (`traces.py`): whether the
rows of a few records before and after a place are in the store. No I/O here.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kalshi_platform.errors import PlatformError
from kalshi_platform.journal.ledger import Entry, Superseded, superseded
from kalshi_platform.loading.cursor import Cursor


class Unresolved(PlatformError):
    """Where loading goes on is not known, and going on anywhere could double rows or leave some out."""


@dataclass(frozen=True)
class Recorder:
    """A journal, and this start of its recorder."""

    journal: uuid.UUID
    starts: frozenset[tuple[int, str]]
    """Those that this folder knows, the present one included."""
    current: tuple[int, str]
    began: int
    """The first record of the present start."""
    ended: int
    """The number after the last record before it."""


@dataclass(frozen=True)
class Point:
    """Where loading goes on."""

    loaded_to: int
    """The store holds every record before this."""
    planned_to: int
    """And perhaps rows of records before this, written as one range."""
    why: str = ""
    """What did not agree, as a clause; empty where everything did."""
    certain: bool = True
    """Whether no trace has to be looked for."""


def by_store(entries: Sequence[Entry], recorder: Recorder, store: str) -> Point | None:
    """Where the store says that loading goes on; None where it does not know the journal.

    Raises `Superseded` where another recorder of this journal has the store, or rows of another one have
    the numbers of records that are here.
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
    if recorder.ended <= known.loaded_to:  # all that was here before this start is there
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


def held_against(point: Point, cursor: Cursor | None, why_none: str = "") -> Point:
    """The store's point, with what the cursor says to it."""
    if cursor is None:
        return replace(point, why=point.why or why_none, certain=False)
    committed = cursor.committed[2]
    planned = cursor.planned[2] if cursor.planned else committed
    expected = {point.loaded_to, point.planned_to}
    if point.why or committed in expected or (planned in expected and committed < point.loaded_to):
        return point
    where = "behind" if committed < point.loaded_to else "ahead of"
    why = f"the cursor, at record {committed}, is {where} the store's own record"
    return replace(point, why=why, certain=False)


def _numbers_taken(recorder: Recorder, latest: Entry, reached: int, store: str) -> Superseded:
    where = f" by the recorder in {latest.folder} on {latest.host}" if latest.folder else ""
    return Superseded(
        f"{store} holds records of journal {recorder.journal} up to {reached}, loaded{where}, and the"
        f" journal here ended at {recorder.ended} before this start: it is a copy, or was restored from a"
        f" backup, while {store} could not be asked. Records from {recorder.began} on are in the journal"
        " and not loaded. Stop this recorder and run kalshi-platform adopt: it goes on as a recorder of"
        " its own."
    )

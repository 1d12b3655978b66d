"""Adoption: give a journal a new identity, so that its recorder is independent of the original's.

For each store `adopt` determines how far it holds this folder's journal. Then it writes the new identity to
the stores, to the cursors and finally to `journal.json`. Only the last step takes effect: if it is interrupted
before, nothing has changed for the recorder and `adopt` can be run again. No row is stored twice or left out.
"""

from __future__ import annotations

import secrets
import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kalshi_platform.journal import journal_identity, reader, writer
from kalshi_platform.journal.journal_identity import (
    Claim,
    JournalIdentity,
    LaterVersion,
    Start,
)
from kalshi_platform.journal.ledger import Entry
from kalshi_platform.journal.reader import JournalError
from kalshi_platform.loading import cursor as cursor_file
from kalshi_platform.loading import traces
from kalshi_platform.loading.cursor import Cursor, to_place
from kalshi_platform.loading.presence import known_archive
from kalshi_platform.loading.resume import Unresolved
from kalshi_platform.loading.sinks import ClickHouseSink, ParquetSink, Sink
from kalshi_platform.loading.traces import Trace
from kalshi_platform.settings import Settings


@dataclass(frozen=True)
class Adopted:
    """The result for one journal."""

    before: uuid.UUID | None
    after: uuid.UUID
    points: dict[str, int]
    """By store, the record at which loading continues."""


def adopt(settings: Settings, shard: int) -> Adopted:
    """Give a shard's journal a new identity.

    Raises: `JournalError` while its recorder runs, `StoreError` where a store does not answer or the archive is
    gone, `Unresolved` where it cannot be determined up to which record a store holds the journal's rows.
    """
    folder = settings.journal_dir(shard)
    folder.mkdir(mode=0o750, parents=True, exist_ok=True)
    with writer.hold_lock(folder) as end_n:
        before = _previous_identity(folder)
        after = uuid.uuid4()
        start = Start((before.epoch if before else 0) + 1, secrets.token_hex(8))
        stores: list[Sink] = [ParquetSink(known_archive(settings), shard, lambda _: None)]
        if settings.use_clickhouse:
            stores.append(ClickHouseSink(settings, str(after), "adopt", shard=shard))
        points = {}
        if reader.segments(folder):
            points = {store.name: _point(folder, store, before, end_n) for store in stores}
            cursors = {
                store.name: _cursor(folder, store, before, Claim(after, start), points[store.name])
                for store in stores
            }
            for store in stores:
                n = points[store.name]
                entry = Entry(
                    *(start.epoch, start.token, end_n, n, n),
                    *(socket.gethostname(), str(folder)),
                )
                store.ledger.claim(after, entry)
                cursor_file.write(folder, cursors[store.name])
        journal_identity.write(
            folder,
            JournalIdentity(
                id=after,
                epoch=start.epoch,
                first=before.first if before else 0,
                starts=(start,),
                adopted_from=before.id if before else None,
            ),
        )
    return Adopted(before.id if before else None, after, points)


def _previous_identity(folder: Path) -> JournalIdentity | None:
    """The journal's identity so far; None where nothing proves one."""
    try:
        return journal_identity.establish(folder, cursor_file.claims(folder))
    except LaterVersion:
        raise
    except JournalError:
        return None


def _point(folder: Path, store: Sink, before: JournalIdentity | None, end_n: int) -> int:
    """The record up to which a store holds this folder's journal."""
    entries = store.ledger.entries(before.id) if before else ()
    own = {(start.epoch, start.token) for start in before.starts} if before else set()
    known = [entry for entry in entries if entry.start in own]
    if known:
        newest = max(known, key=lambda entry: entry.start)
        return _resolve_planned(folder, store, newest.loaded_to, newest.planned_to, end_n)
    cursor = cursor_file.read(folder, store.name, before.id if before else uuid.UUID(int=0))
    if isinstance(cursor, Cursor) and _holds(
        store, traces.last_before(folder, cursor.committed[2])
    ):
        return _resolve_planned(folder, store, cursor.committed[2], cursor.planned_n, end_n)
    beginning = reader.oldest_offset(folder).n
    if not _holds(store, traces.first_from(folder, beginning)):
        return beginning
    if _holds(store, traces.last_before(folder, end_n)):
        return end_n
    raise _unresolved(store, beginning, end_n)


def _resolve_planned(folder: Path, store: Sink, loaded_to: int, planned_to: int, end_n: int) -> int:
    """The end of the planned range if the store has all of it, its beginning if the store has none of it."""
    if min(planned_to, end_n) <= loaded_to:
        return min(loaded_to, end_n)
    until = min(planned_to, end_n)
    inside = [
        trace
        for trace in (*traces.first_from(folder, loaded_to), *traces.last_before(folder, until))
        if loaded_to <= trace.record < until
    ]
    answers = {store.holds(trace) for trace in inside}
    if answers == {True}:
        return until
    if True not in answers:
        return loaded_to
    raise _unresolved(store, loaded_to, until)


def _holds(store: Sink, candidates: Sequence[Trace]) -> bool:
    return any(store.holds(trace) for trace in candidates)


def _unresolved(store: Sink, first: int, until: int) -> Unresolved:
    return Unresolved(
        f"{store.place} holds some of the records {first} to {until - 1} of this journal, and it is not known"
        f" which. Nothing was changed. To continue, {store.remedy}; then run this again."
    )


def _cursor(
    folder: Path, store: Sink, before: JournalIdentity | None, after: Claim, n: int
) -> Cursor:
    """The store's cursor under the new identity; it keeps the old one's saved books if these precede `n`."""
    old = cursor_file.read(folder, store.name, before.id if before else after.id)
    cursor = Cursor(
        format=cursor_file.FORMAT,
        journal=after.id,
        store=store.name,
        place=store.place,
        start=after.start,
        committed=to_place(reader.offset_of(folder, n)),
    )
    if isinstance(old, Cursor) and old.state_at is not None and old.state_at[2] <= n:
        return msgspec.structs.replace(cursor, state_at=old.state_at, state_file=old.state_file)
    return cursor

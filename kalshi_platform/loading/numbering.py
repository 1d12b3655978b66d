"""Chooses the first record number of a recorder start, so that no record number is ever used twice.

Normally it is the first free number in the journal. Where a store has more of this journal than the folder (it
was restored from a backup, or is a copy of one that continued elsewhere), numbering continues after what the
store has. So the stores are queried before the first record. A store that does not answer in time is not waited
for; `resume` compares its ledger later.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from kalshi_platform.errors import PlatformError
from kalshi_platform.journal import reader
from kalshi_platform.journal.journal_identity import ADOPT, JournalIdentity
from kalshi_platform.journal.ledger import Entry, Ledger
from kalshi_platform.journal.reader import JournalError
from kalshi_platform.journal.writer import StartPoint
from kalshi_platform.loading import cursor
from kalshi_platform.loading.sinks import ParquetSink

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 3.0
"""How long the start waits for the stores' answers; nothing is recorded meanwhile."""
FORK_NS = 10_000
"""A fork starts at the number of 10 µs intervals since 1970: no recorder receives that many records, so the
numbers are free."""

OpenLedger = Callable[[], Ledger]


@dataclass(frozen=True)
class StoreAnswer:
    """A store's ledger entries."""

    entries: Sequence[Entry]
    """The entries of this journal."""
    of_shard: Sequence[tuple[uuid.UUID, Entry]]
    """The latest entry of each journal of this shard."""


def choose_start(
    folder: Path, stores: Mapping[str, OpenLedger], known: JournalIdentity, free: int
) -> StartPoint:
    """Choose the first record number and the epoch of a start; `free` is the folder's first free number.

    Raises: `JournalError` where the folder is empty although a store has rows of a journal in it.
    """
    answers = _ask_stores(stores, known.id)
    if not reader.segments(folder):
        for store, answer in answers.items() if not known.starts else ():
            _refuse_lost_journal(folder, store, answer)
        others = any(answer.of_shard for answer in answers.values())
        free = max(free, cursor.reached(folder, known.id))
        return StartPoint(_fork_number(free) if others else free)
    free = max(free, cursor.reached(folder, known.id))
    entries = [entry for answer in answers.values() for entry in answer.entries]
    own = {(start.epoch, start.token) for start in known.starts}
    epoch = max((entry.epoch for entry in entries), default=0) + 1
    reached = max((entry.planned_to for entry in entries), default=0)
    if any(entry.start not in own for entry in entries):
        return StartPoint(_fork_number(max(free, reached)), epoch)
    return StartPoint(max(free, reached), epoch)


def _fork_number(reached: int) -> int:
    """A record number that no other recorder reaches."""
    return max(reached, time.time_ns() // FORK_NS)


def _refuse_lost_journal(folder: Path, store: str, answer: StoreAnswer) -> None:
    """Refuse an empty folder that had a journal: it may not be mounted, so it must not be taken for a new one."""
    for former, entry in answer.of_shard:
        # Recorders in containers may use the same folder name, but no two of them share an archive.
        same = entry.host == socket.gethostname() or store == ParquetSink.name
        if same and entry.folder == str(folder):
            raise JournalError(
                f"The journal in {folder} is gone: {store} holds what journal {former} recorded there up to"
                f" record {entry.loaded_to}, and the folder is empty. Mount or restore it. If it is lost for"
                f" good: {ADOPT}, which begins a new journal there."
            )


def _ask_stores(stores: Mapping[str, OpenLedger], journal_id: uuid.UUID) -> dict[str, StoreAnswer]:
    """Query the stores in parallel; return the answers received within `ANSWER_TIMEOUT_S`."""
    answers: SimpleQueue[tuple[str, StoreAnswer | PlatformError | OSError]] = SimpleQueue()

    def ask(store: str, open_ledger: OpenLedger) -> None:
        try:
            ledger = open_ledger()
            answers.put((store, StoreAnswer(ledger.entries(journal_id), ledger.journals())))
        except (PlatformError, OSError) as error:
            answers.put((store, error))

    for store, open_ledger in stores.items():
        threading.Thread(
            target=ask, args=(store, open_ledger), name=f"ask-{store}", daemon=True
        ).start()
    received: dict[str, StoreAnswer] = {}
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    for _ in stores:
        try:
            store, answer = answers.get(timeout=max(deadline - time.monotonic(), 0.0))
        except Empty:
            break
        if isinstance(answer, StoreAnswer):
            received[store] = answer
        else:
            log.info("Recording begins without knowing what %s holds: %s", store, answer)
    return received

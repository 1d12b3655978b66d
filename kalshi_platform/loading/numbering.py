"""With which record a start of a recorder begins: numbers never come twice, whatever became of the folder.

Normally it is the first number that is free in the journal. Where a store knows more of this journal than
its folder has (it was restored from a backup, or is a copy of one that went on), the numbers go on behind
what the store knows. So the stores are asked before the first record; one that does not answer soon is
not waited for, and what it knows is compared when it does (`resume`).
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

PATIENCE_S = 3.0
"""For the stores' answers; meanwhile nothing is recorded."""
FORK_NS = 10_000
"""Where another recorder goes on with numbers of its own, one for each of these since 1970 is free: no
recorder receives so many."""

Open = Callable[[], Ledger]


@dataclass(frozen=True)
class Known:
    """What a store answered."""

    entries: Sequence[Entry]
    """Of this journal."""
    of_shard: Sequence[tuple[uuid.UUID, Entry]]


def begin(
    folder: Path, stores: Mapping[str, Open], known: JournalIdentity, free: int
) -> StartPoint:
    """Where to begin in a folder whose first free number is `free`.

    Raises `JournalError` where the folder is empty and a store says that a journal was in it.
    """
    answers = _ask(stores, known.id)
    if not reader.segments(folder):
        for store, answer in answers.items() if not known.starts else ():
            _insist_on_no_former_journal(folder, store, answer)
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
    """A number that no other recorder comes to."""
    return max(reached, time.time_ns() // FORK_NS)


def _insist_on_no_former_journal(folder: Path, store: str, answer: Known) -> None:
    """A folder that is not mounted is no new one."""
    for former, entry in answer.of_shard:
        # Recorders in containers may all call their folder the same; no two share an archive.
        same = entry.host == socket.gethostname() or store == ParquetSink.name
        if same and entry.folder == str(folder):
            raise JournalError(
                f"The journal in {folder} is gone: {store} holds what journal {former} recorded there up to"
                f" record {entry.loaded_to}, and the folder is empty. Mount or restore it. If it is lost for"
                f" good: {ADOPT}, which begins a new one there."
            )


def _ask(stores: Mapping[str, Open], journal_id: uuid.UUID) -> dict[str, Known]:
    """What those stores know that answer in time."""
    answers: SimpleQueue[tuple[str, Known | PlatformError | OSError]] = SimpleQueue()

    def ask(store: str, open_ledger: Open) -> None:
        try:
            ledger = open_ledger()
            answers.put((store, Known(ledger.entries(journal_id), ledger.journals())))
        except (PlatformError, OSError) as error:
            answers.put((store, error))

    for store, open_ledger in stores.items():
        threading.Thread(
            target=ask, args=(store, open_ledger), name=f"ask-{store}", daemon=True
        ).start()
    found: dict[str, Known] = {}
    deadline = time.monotonic() + PATIENCE_S
    for _ in stores:
        try:
            store, answer = answers.get(timeout=max(deadline - time.monotonic(), 0.0))
        except Empty:
            break
        if isinstance(answer, Known):
            found[store] = answer
        else:
            log.info("Recording begins without knowing what %s holds: %s", store, answer)
    return found

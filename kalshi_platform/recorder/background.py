"""Tasks beside capture: whatever they raise, recording goes on, and the failure is named and retried.

Market look-up, market selection, trade backfill, book comparison, health report and housekeeping run
here. Nothing that capture itself needs for receiving and keeping frames does.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

from kalshi_platform.errors import PlatformError
from kalshi_platform.exchange.items import Unreadable
from kalshi_platform.printable import printable

log = logging.getLogger(__name__)

RETRY_MIN_S, RETRY_MAX_S = 1.0, 60.0
"""Between two attempts of a task that fails; each wait is twice the one before."""
LONGEST_REASON = 500
"""Characters of a reason that are kept: an answer of the exchange may be in it."""

FAILED, RECOVERED, UNREADABLE = "task_failed", "task_recovered", "unreadable"
"""Kinds of the notes that say so in the journal, and in `stream_events`."""
NAMED = 1_000
"""Parts of the exchange's answers that are named once each; with more, they are named again."""
Note = Callable[[str, Mapping[str, object]], None]


@dataclass(frozen=True)
class TaskHealth:
    """How one task does, as far as it has ever failed."""

    failures: int
    """Since the start."""
    failing_since_ns: int
    """The first failure after the last success; 0 where it succeeds now."""
    reason: str
    """Of the last failure, as a sentence."""


class Tasks:
    """What the tasks of one streamer have come to. Threads may share it."""

    def __init__(self, note: Note) -> None:
        """`note` puts a note into the journal, from any thread."""
        self._note = note
        self._lock = threading.Lock()
        self._states: dict[str, TaskHealth] = {}
        self._named: set[Unreadable] = set()

    @property
    def states(self) -> dict[str, TaskHealth]:
        """The tasks that have failed since the start, by name."""
        with self._lock:
            return dict(self._states)

    async def keep(self, name: str, turn: Callable[[], Awaitable[None]]) -> None:
        """Take turns until cancelled; after a failure with a pause, which grows while failures go on."""
        pause_s = RETRY_MIN_S
        while True:
            try:
                await turn()
            except BaseException as error:
                task = asyncio.current_task()
                if isinstance(error, asyncio.CancelledError) and task and task.cancelling():
                    raise
                self.failed(name, error, pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)
            else:
                self.succeeded(name)
                pause_s = RETRY_MIN_S

    @contextmanager
    def surviving(self, name: str) -> Iterator[None]:
        """Name what a block raises, and go on behind it."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - as above
            self.failed(name, error)
        else:
            self.succeeded(name)

    def failed(self, name: str, error: BaseException, retry_s: float | None = None) -> None:
        """Note that a task has failed."""
        known = isinstance(error, PlatformError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        reason = printable(reason)[:LONGEST_REASON]
        with self._lock:
            before = self._states.get(name, TaskHealth(0, 0, ""))
            since_ns = before.failing_since_ns or time.time_ns()
            self._states[name] = TaskHealth(before.failures + 1, since_ns, reason)
        if before.failing_since_ns and before.reason == reason:
            return
        log.warning(
            "%s failed, and recording goes on: %s", name.capitalize(), reason, exc_info=not known
        )
        detail: dict[str, object] = {"task": name, "reason": reason}
        self._note(FAILED, detail if retry_s is None else detail | {"retry_s": retry_s})

    def tell(self, found: Unreadable) -> None:
        """Name a part of the exchange's answers that cannot be read; once, for it is asked for again and again."""
        with self._lock:
            if found in self._named:
                return
            if len(self._named) >= NAMED:
                self._named.clear()
            self._named.add(found)
        log.warning("%s", found)
        self._note(UNREADABLE, asdict(found))

    def succeeded(self, name: str) -> None:
        """Note that a task works, where it did not before."""
        with self._lock:
            before = self._states.get(name)
            if before is None or not before.failing_since_ns:
                return
            self._states[name] = replace(before, failing_since_ns=0)
        log.warning("%s works again.", name.capitalize())
        self._note(RECOVERED, {"task": name, "failures": before.failures})

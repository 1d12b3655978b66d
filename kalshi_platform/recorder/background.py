"""Background tasks beside capture: a failure of any kind is reported and retried, and recording goes on.

Market look-up, market selection, trade backfill, book comparison, health report and housekeeping run as
such tasks. Receiving and journalling frames never does: that belongs in `capture`.
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
"""Wait between attempts of a failing task; it doubles with each failure up to the maximum."""
MAX_REASON = 500
"""Characters of a reason that are kept: it may contain a response of the exchange."""

FAILED, RECOVERED, UNREADABLE = "task_failed", "task_recovered", "unreadable"
"""Kinds of the notes in the journal and in `stream_events`."""
REPORTED_MAX = 1_000
"""Unreadable items that are each reported once; beyond this many, reporting starts over."""
Note = Callable[[str, Mapping[str, object]], None]


@dataclass(frozen=True)
class TaskHealth:
    """The state of a task that has failed at least once."""

    failures: int
    """Number of failures since the start."""
    failing_since_ns: int
    """Time of the first failure after the last success; 0 while it succeeds."""
    reason: str
    """Reason of the last failure, as a sentence."""


class Tasks:
    """The background tasks of one streamer and their failures. Thread-safe."""

    def __init__(self, note: Note) -> None:
        """`note` appends a note to the journal; it must be callable from any thread."""
        self._note = note
        self._lock = threading.Lock()
        self._states: dict[str, TaskHealth] = {}
        self._reported: set[Unreadable] = set()

    @property
    def states(self) -> dict[str, TaskHealth]:
        """The tasks that have failed since the start, by name."""
        with self._lock:
            return dict(self._states)

    async def run_forever(self, name: str, turn: Callable[[], Awaitable[None]]) -> None:
        """Call `turn` repeatedly until cancelled; back off after failures."""
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
    def guarded(self, name: str) -> Iterator[None]:
        """Suppress and report whatever the block raises."""
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - no failure of a task may stop recording
            self.failed(name, error)
        else:
            self.succeeded(name)

    def failed(self, name: str, error: BaseException, retry_s: float | None = None) -> None:
        """Record a failure of a task; log and note it where it is new or its reason has changed."""
        known = isinstance(error, PlatformError)
        reason = str(error) if known else f"{type(error).__name__}: {error}"
        reason = printable(reason)[:MAX_REASON]
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

    def report_unreadable(self, unreadable: Unreadable) -> None:
        """Report an unreadable item once: the exchange returns it with every list."""
        with self._lock:
            if unreadable in self._reported:
                return
            if len(self._reported) >= REPORTED_MAX:
                self._reported.clear()
            self._reported.add(unreadable)
        log.warning("%s", unreadable)
        self._note(UNREADABLE, asdict(unreadable))

    def succeeded(self, name: str) -> None:
        """Record a success; log and note it where the task was failing."""
        with self._lock:
            before = self._states.get(name)
            if before is None or not before.failing_since_ns:
                return
            self._states[name] = replace(before, failing_since_ns=0)
        log.warning("%s works again.", name.capitalize())
        self._note(RECOVERED, {"task": name, "failures": before.failures})

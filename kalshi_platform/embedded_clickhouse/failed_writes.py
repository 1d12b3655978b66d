"""A watch on the engine's failed writes: ends the process once one has spoiled a part (see parts.py)."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kalshi_platform.embedded_clickhouse import parts

log = logging.getLogger(__name__)

EVERY_S = 1.0
"""Far less than the engine keeps what a merge has read (`parts.SOURCES_KEPT_S`)."""


class FailedWrites:
    """Looks each second, and behind each statement that writes. Thread-safe."""

    def __init__(
        self,
        path: Path,
        count: Callable[[], int],
        merging_since: Callable[[float], int],
        end: Callable[[parts.Spoiled], None] | None = None,
    ) -> None:
        """`path` is the data folder; `count` asks for the failed writes since the start, and
        `merging_since` for the merges that run for so many seconds already. `end` ends the process.
        """
        self._path = path
        self._count = count
        self._merging_since = merging_since
        self._end = end or _end_process
        self._known = 0
        """Failed writes when they were last asked for."""
        self._clear = 0
        """Failed writes that have spoiled nothing."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failed-writes", daemon=True)

    def start(self) -> None:
        """Begin to look each second."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A statement that writes: where it ends well and a write failed meanwhile, the parts are looked at."""
        before = self._known
        yield
        if self._now() != before:
            self._look()

    def _watch(self) -> None:
        risen_to, risen_at = 0, 0.0
        while not self._stop.wait(EVERY_S):
            try:
                failed = self._now()
                if failed == self._clear:
                    continue
                if failed != risen_to:
                    risen_to, risen_at = failed, time.monotonic()
                merging = self._merging_since(time.monotonic() - risen_at)
                self._look()
                if not merging:  # a merge that runs may have missed a write that it ends without
                    self._clear = failed
            except Exception:
                log.exception("Failed writes could not be looked at; it is tried again.")

    def _now(self) -> int:
        self._known = failed = self._count()
        return failed

    def _look(self) -> None:
        for found in parts.spoiled(self._path):
            self._end(found)
            return


def _end_process(found: parts.Spoiled) -> None:
    log.critical(
        "A write failed (is the disk full?) and the engine goes on with a part that cannot be read: %s, %s."
        " The embedded ClickHouse ends; at its next start it takes what the part was made from.",
        found.path,
        found.why,
    )
    os._exit(1)

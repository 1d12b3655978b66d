"""A monitor of the engine's failed writes, which ends the process if one has spoiled a part (see parts.py)."""

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
"""Seconds between two checks: far less than the engine keeps the sources of a merge (`parts.SOURCES_KEPT_S`)."""


class FailedWrites:
    """Checks the parts each second, and after each statement that writes, if a write has failed. Thread-safe."""

    def __init__(
        self,
        path: Path,
        count: Callable[[], int],
        merging_since: Callable[[float], int],
        end: Callable[[parts.Spoiled], None] | None = None,
    ) -> None:
        """`path`: the data folder. `count`: the number of failed writes since the start. `merging_since`: the
        number of merges that have run for that many seconds. `end`: ends the process.
        """
        self._path = path
        self._count = count
        self._merging_since = merging_since
        self._end = end or _end_process
        self._known = 0
        """The last count of failed writes."""
        self._clear = 0
        """The count of failed writes that are known to have spoiled nothing."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="failed-writes", daemon=True)

    def start(self) -> None:
        """Start the monitor's thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the monitor's thread."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Context manager of a statement that writes: if it succeeds although a write failed, check the parts."""
        before = self._known
        yield
        if self._now() != before:
            self._look()

    def _watch(self) -> None:
        """Check the parts until the count of failed writes is known to have spoiled nothing."""
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
                if not merging:  # a running merge may still activate a part with a failed write
                    self._clear = failed
            except Exception:
                log.exception("Failed writes could not be checked; the check is repeated.")

    def _now(self) -> int:
        self._known = failed = self._count()
        return failed

    def _look(self) -> None:
        for found in parts.spoiled(self._path):
            self._end(found)
            return


def _end_process(found: parts.Spoiled) -> None:
    log.critical(
        "A write failed (is the disk full?) and the engine uses a part that cannot be read: %s, %s."
        " The embedded ClickHouse ends; at its next start it uses the parts from which this one was merged.",
        found.path,
        found.why,
    )
    os._exit(1)

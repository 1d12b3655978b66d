"""Checks once a second, in a thread of its own, whether a store can be reached.

The archive is written once a minute, so an unmounted disk, a removed bucket, a revoked key or a silent network
would be reported only at the next write; a ClickHouse that accepts connections and never answers, only at its
time-out. This thread reports them within seconds. It writes nothing and decides nothing: retrying belongs in
`loader`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from kalshi_platform.archive import Archive, archive_identity, open_archive, watermarks
from kalshi_platform.errors import PlatformError, StoreError, needs_person
from kalshi_platform.loading import cursor
from kalshi_platform.settings import Settings

log = logging.getLogger(__name__)

CHECK_S = 1.0
TIMEOUT_S = 3.0
"""A check that takes longer counts as a failure."""
_STORE = "parquet"
"""`ParquetSink.name`; importing that would load Polars into `up`."""


class Presence:
    """Checks one store until `end` and reports the result of the last check."""

    def __init__(self, look: Callable[[], None], place: str) -> None:
        """`look` raises `StoreError` where the store cannot be reached; `place` is its name in messages."""
        self._look = look
        self._place = place
        self._began: float | None = None
        """Monotonic start time of the running check; None while none runs."""
        self._slow = False
        """Whether the last check took too long; a check in time clears it."""
        self._error: PlatformError | None = None
        self._ending = threading.Event()

    def start(self) -> None:
        """Start checking."""
        threading.Thread(target=self._run, name=f"look-{self._place}", daemon=True).start()

    def end(self) -> None:
        """Stop checking, without waiting for a running check."""
        self._ending.set()

    @property
    def trouble(self) -> str | None:
        """Why the store cannot be reached at the moment, as a sentence; None while it can."""
        error, began = self._error, self._began
        if error is not None:
            return str(error)
        if self._slow or (began is not None and time.monotonic() - began > TIMEOUT_S):
            return (
                f"{self._place} has not answered for more than {TIMEOUT_S:.0f} s. Check that it runs and that its"
                " disk or network does; its rows are kept in the journal, and loading resumes by itself."
            )
        return None

    @property
    def refused(self) -> bool:
        """Whether the problem needs a person: no retry resolves it."""
        return needs_person(self._error)

    def _run(self) -> None:
        while not self._ending.is_set():
            began = self._began = time.monotonic()
            problem = self._check()
            self._slow = time.monotonic() - began > TIMEOUT_S
            if problem is not None and str(problem) != str(self._error):
                log.error("%s", problem)
            elif problem is None and self._error is not None:
                log.warning("%s can be reached again.", self._place)
            self._error = problem  # after logging: the line exists when the problem is seen
            self._began = None
            self._ending.wait(CHECK_S)

    def _check(self) -> PlatformError | None:
        try:
            self._look()
        except PlatformError as error:
            return error
        except OSError as error:
            return StoreError(
                f"{self._place} cannot be checked ({error.strerror or error}). Repair that."
            )
        except Exception as error:  # noqa: BLE001 - reported, and checked again
            return StoreError(f"{self._place} cannot be checked ({type(error).__name__}: {error}).")
        return None


def known_archive(settings: Settings) -> Archive:
    """Open the archive for a writer other than the loader; the archive requires its identity from now on.

    Raises: `StoreError` where it cannot be reached or is not the one that a shard has loaded into: a write
    would create a second archive in place of the missing one.
    """
    archive = open_archive(settings)
    identity = archive.identity()
    if identity is not None:
        archive.expect(identity)
        return archive
    archive.look()
    for shard in watermarks.shards(settings.journals_dir):
        if cursor.has_loaded(settings.journal_dir(shard), _STORE, str(archive)):
            raise archive_identity.archive_gone(str(archive), None)
    return archive  # nothing was loaded yet

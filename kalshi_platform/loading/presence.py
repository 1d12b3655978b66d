"""Whether a store is there, asked once a second beside its load.

The archive is written once a minute. What happens to it meanwhile (its disk is unmounted, its bucket removed,
its key withdrawn, its network silent) would be named with the next write; a ClickHouse that takes connections and
never answers, when its time-out is over. Here it is named within seconds, by a thread of its own, which writes
nothing and decides nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from kalshi_platform.archive import Archive, archive_identity, open_archive, watermarks
from kalshi_platform.errors import PlatformError, StoreError, StoreRefused
from kalshi_platform.loading import cursor
from kalshi_platform.settings import Settings

log = logging.getLogger(__name__)

LOOK_S = 1.0
SILENT_S = 3.0
"""A look that takes longer is itself what is wrong."""
_STORE = "parquet"
"""`ParquetSink.name`; importing that would load Polars into `up`."""


class Presence:
    """Looks at one store until `end`; says what the last look found."""

    def __init__(self, look: Callable[[], None], place: str) -> None:
        """`look` raises `StoreError` where the store is not there; `place`: what people call it."""
        self._look = look
        self._place = place
        self._began: float | None = None
        """Of the look that is under way, by the monotonic clock."""
        self._slow = False
        """Whether the look before took too long: one that does not is what closes it."""
        self._error: PlatformError | None = None
        self._ending = threading.Event()

    def start(self) -> None:
        """Begin to look."""
        threading.Thread(target=self._run, name=f"look-{self._place}", daemon=True).start()

    def end(self) -> None:
        """Look no more; a look under way is not waited for."""
        self._ending.set()

    @property
    def trouble(self) -> str | None:
        """Why the store cannot be had at the moment, as a sentence."""
        error, began = self._error, self._began
        if error is not None:
            return str(error)
        if self._slow or (began is not None and time.monotonic() - began > SILENT_S):
            return (
                f"{self._place} has not answered for more than {SILENT_S:.0f} s. See that it runs and that the"
                " disk or network that it is on does; what goes there is kept, and taken up again by itself."
            )
        return None

    @property
    def refused(self) -> bool:
        """Whether that is of the kind that no retry ends."""
        return isinstance(self._error, StoreRefused)

    def _run(self) -> None:
        while not self._ending.is_set():
            began = self._began = time.monotonic()
            found = self._found()
            self._slow = time.monotonic() - began > SILENT_S
            if found is not None and str(found) != str(self._error):
                log.error("%s", found)
            elif found is None and self._error is not None:
                log.warning("%s is there again.", self._place)
            self._error = found  # after the line in the log: what is named can be read there
            self._began = None
            self._ending.wait(LOOK_S)

    def _found(self) -> PlatformError | None:
        try:
            self._look()
        except PlatformError as error:
            return error
        except OSError as error:
            return StoreError(
                f"{self._place} cannot be looked at ({error.strerror or error}). Repair that."
            )
        except Exception as error:  # noqa: BLE001 - named, and looked at again
            return StoreError(
                f"{self._place} cannot be looked at ({type(error).__name__}: {error})."
            )
        return None


def known_archive(settings: Settings) -> Archive:
    """The archive, for a writer beside the load; it insists on its identity from now on.

    Raises `StoreError` where it cannot be had, or is not the one that a shard has loaded into: a write would
    make a second archive in the place of one that has gone.
    """
    archive = open_archive(settings)
    found = archive.identity()
    if found is not None:
        archive.expect(found)
        return archive
    archive.look()
    for shard in watermarks.shards(settings.journals_dir):
        if cursor.has_loaded(settings.journal_dir(shard), _STORE, str(archive)):
            raise archive_identity.archive_gone(str(archive), None)
    return archive  # nothing was loaded yet

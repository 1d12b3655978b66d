"""Sealing an hour: what waits of it is sent, then it is written down that the hour is complete.

On a local disk parts are where readers look from the first moment, and nothing waits. On object
storage the hour becomes one sorted file here, before anybody sees it (`storage.archive.objects`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from kalshi_platform.archive import Archive, File, Sort, compaction, hours
from kalshi_platform.archive.hours import HourReport
from kalshi_platform.schema import DATASETS


def seal(
    archive: Archive, hour: datetime, proceed: Callable[[], None] = lambda: None
) -> HourReport:
    """Send what waits of an hour and seal it. Idempotent, also after a kill at any step.

    `proceed` is called again and again; what it raises leaves the hour to the next time. Raises `StoreUnavailable` where the archive is away, and `StoreRefused` where it takes nothing, or
    has something else than what was sent.
    """
    with ExitStack() as sending:
        taken = {
            name: sending.enter_context(archive.sending(name, hour, _sort(name, proceed)))
            for name in hours.RECORDED
        }
        return hours.seal(archive, hour, taken, proceed)


def _sort(name: str, proceed: Callable[[], None]) -> Sort:
    def sort(parts: Sequence[File], folder: Path) -> Path:
        proceed()
        _, part = compaction.build(parts, DATASETS[name], folder)
        return folder / part.file

    return sort

"""Sealing an hour: its waiting parts are sent, then manifests record that it is complete.

On a local disk readers see parts at once, and nothing waits. On object storage the hour's parts become one
sorted object first (see `object_storage`). When an hour may be sealed is decided by `watermarks`.
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
    """Send an hour's waiting parts and seal it. Idempotent, even after a kill at any step.

    `proceed` is called repeatedly; an error that it raises leaves the hour for the next attempt.

    Raises: `StoreUnavailable` where the archive cannot be reached, `StoreRefused` where it accepts nothing or
    does not return what was sent.
    """
    with ExitStack() as sending:
        merged = {
            name: sending.enter_context(archive.sending(name, hour, _sort(name, proceed)))
            for name in hours.RECORDED
        }
        return hours.seal(archive, hour, merged, proceed)


def _sort(name: str, proceed: Callable[[], None]) -> Sort:
    def sort(parts: Sequence[File], folder: Path) -> Path:
        proceed()
        _, part = compaction.build(parts, DATASETS[name], folder)
        return folder / part.file

    return sort

"""List files and folders in the platform's folders that are not its own, for `doctor`.

No other code reads, moves or refuses them. Which names are the platform's is known by the rooms that write them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from kalshi_platform.archive import open_archive, watermarks
from kalshi_platform.inventory import spool
from kalshi_platform.journal import reader
from kalshi_platform.loading import state_files
from kalshi_platform.settings import Settings

_BESIDE_SEGMENTS = re.compile(r"lock|load|.*\.(?:json|tmp|twin)|[0-9]{20}\.arrows\.torn-[0-9]+")


def in_archive(settings: Settings) -> Iterator[str]:
    """Yield foreign names below the archive's root. Raises `StoreError` if it cannot be listed."""
    archive = open_archive(settings)
    return (f"{settings.archive_url}/{name}" for name in archive.foreign())


def in_data_folder(settings: Settings) -> Iterator[str]:
    """Yield foreign names in the journals' folders and in the market maker's spool. Raises `JournalError` for a folder that
    cannot be read."""
    yield from _others(settings.journals_dir, lambda name: watermarks.shard_of(name) is not None)
    for shard in watermarks.shards(settings.journals_dir):
        folder = settings.journal_dir(shard)
        yield from _others(folder, _is_of_a_journal)
        yield from _others(state_files.hour_folder(folder), state_files.is_hour_state)
    yield from _others(spool.folder_of(settings), spool.is_of_a_spool)


def _is_of_a_journal(name: str) -> bool:
    return reader.segment_of(name) is not None or bool(_BESIDE_SEGMENTS.fullmatch(name))


def _others(folder: Path, ours: Callable[[str], bool]) -> Iterator[str]:
    return (str(folder / name) for name in sorted(reader.names(folder)) if not ours(name))

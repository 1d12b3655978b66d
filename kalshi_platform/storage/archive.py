"""Former import path of the archive's reader: use `kalshi_platform.archive`."""

from kalshi_platform.archive import Archive, LocalArchive, ObjectArchive, archive_at, open_archive

__all__ = ["Archive", "LocalArchive", "ObjectArchive", "archive_at", "open_archive"]

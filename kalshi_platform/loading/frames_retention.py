"""Deletes the archive's frames of expired hours; the hours' other datasets stay. See FRAMES_RETENTION_DAYS."""

from __future__ import annotations

from datetime import datetime

from kalshi_platform.archive import HOUR_STATES, Archive
from kalshi_platform.loading.state_files import hour_of_archived_state
from kalshi_platform.schema import FRAMES
from kalshi_platform.utc_hours import HOUR


def delete_expired(archive: Archive, before: datetime) -> list[datetime]:
    """Delete the frames of sealed hours that ended by `before`, and the books saved for rebuilding from them.

    A killed deletion is finished by the next one. Returns the hours whose frames were deleted.

    Raises: `StoreUnavailable` where another process changes sealed hours.
    """
    last = before - HOUR
    expired = [
        hour
        for hour, listed in archive.listing(FRAMES.name, None, last).items()
        if listed.manifest is not None
    ]
    for hour in expired:
        with archive.changing():
            archive.remove_hour(FRAMES.name, hour)
    for name in archive.metadata_files(HOUR_STATES, ".state"):
        saved = hour_of_archived_state(name)
        if saved is not None and saved <= last:
            archive.remove_metadata(name)
    return expired

"""Which archive a folder or a bucket is: `archive.json` at its root.

It is made when a recorder first writes there, and after that a folder without it is not the archive: the
disk is not mounted, or the folder was removed or replaced.
"""

from __future__ import annotations

import secrets

import msgspec

from kalshi_platform import checked_json
from kalshi_platform.checked_json import CorruptFile, LaterFormat
from kalshi_platform.errors import StoreRefused, StoreUnavailable

FILE = "archive.json"
FORMAT = 1


class ArchiveIdentity(msgspec.Struct, frozen=True):
    """What the file says."""

    format: int
    id: str


def fresh() -> str:
    """An identity that no archive has."""
    return secrets.token_hex(16)


def encode(identity: str) -> bytes:
    """The file's text."""
    return checked_json.encode(ArchiveIdentity(FORMAT, identity))


def decode(text: bytes, path: str) -> str:
    """The identity in a file's text. Raises `StoreRefused` for a damaged one, or a later version's."""
    try:
        return checked_json.decode(text, ArchiveIdentity, path, FORMAT).id
    except LaterFormat as error:
        raise StoreRefused(str(error)) from None
    except CorruptFile as error:
        raise StoreRefused(
            f"{path} is damaged ({error}): which archive this is, is not known. Restore it from a backup, or"
            " remove it: the recorder that loads there writes it again, if the archive is the one it knows."
        ) from None


def gone(where: str, found: str | None) -> StoreUnavailable:
    """That an archive is not where it was."""
    what = f"another archive ({found}) is there" if found else f"there is no {FILE} in it"
    return StoreUnavailable(
        f"The archive in {where} is gone: {what}. It is not mounted, or was removed or replaced. Nothing is"
        " written there. Mount it or bring it back; loading goes on by itself."
    )

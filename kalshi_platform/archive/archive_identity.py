"""The identity of an archive: `archive.json` at the root of its folder or bucket.

It is written when a recorder first writes there. After that, a folder without it is not the archive: the
disk is not mounted, or the folder was removed or replaced. Reading and writing the file belongs in `local`
and `object_storage`.
"""

from __future__ import annotations

import secrets

import msgspec

from kalshi_platform import checked_json
from kalshi_platform.checked_json import CorruptFile, LaterFormat
from kalshi_platform.errors import StoreGone, StoreRefused

FILE = "archive.json"
FORMAT = 1


class ArchiveIdentity(msgspec.Struct, frozen=True):
    """The content of `archive.json`."""

    format: int
    id: str


def new_identity() -> str:
    """Generate a random identity."""
    return secrets.token_hex(16)


def encode(identity: str) -> bytes:
    """Encode an identity as the file's content."""
    return checked_json.encode(ArchiveIdentity(FORMAT, identity))


def decode(text: bytes, path: str) -> str:
    """Decode the file's content. Raises: `StoreRefused` for a damaged file or a later version's."""
    try:
        return checked_json.decode(text, ArchiveIdentity, path, FORMAT).id
    except LaterFormat as error:
        raise StoreRefused(str(error)) from None
    except CorruptFile as error:
        raise StoreRefused(
            f"{path} is damaged ({error}), so the archive's identity is not known. Restore it from a backup, or"
            " remove it: the recorder that loads there writes it again, if the archive is the one it knows."
        ) from None


def archive_gone(where: str, found: str | None) -> StoreGone:
    """The error for an archive that is not where it was; `found` is the identity of another one there."""
    what = f"another archive ({found}) is there" if found else f"there is no {FILE} in it"
    return StoreGone(
        f"The archive in {where} is gone: {what}. It is not mounted, or was removed or replaced. Nothing is"
        " written there. Mount or restore it; loading resumes by itself."
    )

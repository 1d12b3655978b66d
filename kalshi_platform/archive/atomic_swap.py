"""Swaps two folders atomically, so that a reader lists either the old or the new content, never a mix.

Two plain renames would leave a moment in which the name does not exist. So where the system offers no atomic
swap, nothing is swapped and the error says so.
"""

from __future__ import annotations

import errno
from pathlib import Path

from kalshi_platform import durable
from kalshi_platform.errors import StoreRefused


def swap(one: Path, other: Path) -> None:
    """Swap the names of two existing folders of one file system.

    Raises: `StoreRefused` where the system does not support it, `OSError` as `rename` does.
    """
    try:
        durable.swap(one, other)
    except OSError as error:
        if error.errno not in durable.SWAP_UNSUPPORTED:
            raise
        raise StoreRefused(
            f"{other} stays as it is: this system or file system cannot swap two folders in one step"
            f" ({error.strerror}), and without that a reader could miss rows. Readers lose nothing;"
            " put PARQUET_DIR on a local Linux file system to have it replaced.",
            name=errno.errorcode.get(error.errno or 0, ""),
        ) from None

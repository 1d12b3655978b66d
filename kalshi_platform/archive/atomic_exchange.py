"""Two folders change places in one step: what a reader lists is the one or the other, whole.

Two plain renames would leave an instant in which the name is nowhere, so where the system cannot exchange
nothing is exchanged, and it is said.
"""

from __future__ import annotations

import errno
from pathlib import Path

from kalshi_platform import durable
from kalshi_platform.errors import StoreRefused


def exchange(one: Path, other: Path) -> None:
    """Give each of two existing folders of one file system the other's name, atomically.

    Raises `StoreRefused` where the system does not offer that, and `OSError` as `rename` does.
    """
    try:
        durable.swap(one, other)
    except OSError as error:
        if error.errno not in durable.SWAP_UNSUPPORTED:
            raise
        raise StoreRefused(
            f"{other} stays as it is: this system or file system cannot exchange two folders in one step"
            f" ({error.strerror}), and without that a reader could miss rows. Readers lose nothing;"
            " put PARQUET_DIR on a local Linux file system to have it replaced.",
            name=errno.errorcode.get(error.errno or 0, ""),
        ) from None

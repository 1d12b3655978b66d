"""Two folders change places in one step: what a reader lists is the one or the other, whole.

Linux has `renameat2(RENAME_EXCHANGE)`, macOS `renamex_np(RENAME_SWAP)`. Two plain renames would leave
an instant in which the name is nowhere, so where neither exists nothing is exchanged, and it is said.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

from kalshi_platform.storage.errors import StoreRefused

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h; RENAME_SWAP of macOS has the same value
_NOT_OFFERED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV}


def exchange(one: Path, other: Path) -> None:
    """Give each of two existing folders of one file system the other's name, atomically.

    Raises `StoreRefused` where the system does not offer that, and `OSError` as `rename` does.
    """
    code = _call(os.fsencode(one), os.fsencode(other))
    if code in _NOT_OFFERED:
        raise StoreRefused(
            f"{other} stays as it is: this system or file system cannot exchange two folders in one step"
            f" ({os.strerror(code)}), and without that a reader could miss rows. Readers lose nothing;"
            " put PARQUET_DIR on a local Linux file system to have it replaced.",
            name=errno.errorcode.get(code, ""),
        )
    if code:
        raise OSError(code, os.strerror(code), str(one), None, str(other))


def _call(one: bytes, other: bytes) -> int:
    """The system's error number, 0 for none."""
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        failed = library.renamex_np(one, other, ctypes.c_uint(_RENAME_EXCHANGE))
    elif hasattr(library, "renameat2"):
        flags = ctypes.c_uint(_RENAME_EXCHANGE)
        failed = library.renameat2(_AT_FDCWD, one, _AT_FDCWD, other, flags)
    else:
        return errno.ENOSYS
    return ctypes.get_errno() if failed else 0

"""File-system steps that survive a power failure: write, sync, and atomic replacement or swap.

What the files contain belongs to their owners.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

SWAP_UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV})
"""Error numbers of `swap` if the system or the file system does not support it."""
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h; RENAME_SWAP of macOS has the same value


def replace(path: Path, data: bytes) -> None:
    """Write a file atomically and durably, its directory entry included. Its folder must exist.

    The bytes are written to `<stem>.tmp` in the same folder first. Raises `OSError`.
    """
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    publish(temporary, path)


def replace_unsynced(path: Path, data: bytes) -> None:
    """Write a file atomically, its folders included, without waiting for the disk.

    After a power failure it may be missing or old: for what can be written again. Raises `OSError`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(data)
    temporary.replace(path)


def publish(temporary: Path, path: Path) -> None:
    """Make a finished file of the same folder durable, then give it its name. Raises `OSError`."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Fsync a file, or a folder's entries. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def swap(one: Path, other: Path) -> None:
    """Swap the names of two existing files or folders of one file system, atomically.

    By `renameat2(RENAME_EXCHANGE)` on Linux and `renamex_np(RENAME_SWAP)` on macOS. Raises `OSError`, with a
    number of `SWAP_UNSUPPORTED` if neither is available.
    """
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    flags = ctypes.c_uint(_RENAME_EXCHANGE)
    if sys.platform == "darwin":
        failed = library.renamex_np(*names, flags)
    elif hasattr(library, "renameat2"):
        failed = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], flags)
    else:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(one), None, str(other))
    if failed:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(one), None, str(other))

"""What must survive a power failure: files, their names, and files or folders replaced in one step."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

NOT_OFFERED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV})
"""What `exchange` raises where the system or the file system has no such step."""
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h; RENAME_SWAP of macOS has the same value


def replace(path: Path, data: bytes) -> None:
    """Make a file have these bytes, durably, its name included. Its folder must be there.

    The bytes go to `<stem>.tmp` beside it first. Raises `OSError` where the disk does not take them.
    """
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file, or what a folder names, durable. Raises `OSError` where the disk refuses."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def exchange(one: Path, other: Path) -> None:
    """Give each of two existing files or folders of one file system the other's name, atomically.

    Linux has `renameat2(RENAME_EXCHANGE)`, macOS `renamex_np(RENAME_SWAP)`. Raises `OSError`; its number is
    one of `NOT_OFFERED` where neither exists.
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

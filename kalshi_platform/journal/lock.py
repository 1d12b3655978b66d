"""One writer per journal: flock on the folder, on its file `lock`, and on the segment that is written.

The kernel releases a lock when its process ends. On a local disk the folder's own lock is the one that
no removal of a file opens. NFS has no exclusive lock for a descriptor that only reads, so there the
file `lock` and the newest segment carry it; mounted with `nolock` or `local_lock` they hold within one
machine only. `FolderLock.lost` says when the lock no longer guards the path by which others come.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

NAME = "lock"
HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})
"""What flock says where another process holds the lock."""
UNSUPPORTED = frozenset({errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""What it says where the file system has no such lock."""


class Held(Exception):
    """Another process holds the lock."""


class FolderLock:
    """Holds a folder from its creation to `release`, or to the end of the process."""

    def __init__(self, folder: Path) -> None:
        """Raises `Held` where another process has it, `OSError` where it cannot be locked."""
        self._path = folder / NAME
        self.folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        """The folder itself, wherever its path leads meanwhile."""
        self._fd = -1
        try:
            lock_if_supported(self.folder_fd)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            self._fd = os.open(NAME, flags, 0o640, dir_fd=self.folder_fd)
            lock(self._fd)
            if self.lost:  # removed between opening and locking
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._path))
        except BaseException:
            self.release()
            raise

    @property
    def lost(self) -> bool:
        """Whether the lock's path leads to another file, or to none."""
        try:
            found = self._path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # the disk does not answer: writing to it says so
            return False
        held = os.fstat(self._fd)
        return (found.st_dev, found.st_ino) != (held.st_dev, held.st_ino)

    def release(self) -> None:
        """Let others have the folder."""
        for fd in (self._fd, self.folder_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self.folder_fd = -1


def lock(fd: int, how: int = fcntl.LOCK_EX) -> None:
    """Lock an open file, without waiting. Raises `Held`, or `OSError` where it cannot be locked."""
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise Held from None
        raise


def lock_if_supported(fd: int, how: int = fcntl.LOCK_EX) -> None:
    """The same; does nothing where the file system has no such lock."""
    try:
        lock(fd, how)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def insist_on_no_writer(path: Path) -> None:
    """Raise `Held` where a process has this file open and locked for writing."""
    try:
        fd = os.open(path, os.O_RDWR)  # NFS locks only what may be written
    except PermissionError:
        fd = os.open(path, os.O_RDONLY)
    try:
        lock_if_supported(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)

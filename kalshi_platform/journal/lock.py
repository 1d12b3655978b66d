"""One writer per journal: flock on the folder, on its file `lock`, and on the segment being written.

flock guarantees a single writer; the kernel releases it when the process dies. On a local disk the lock
on the folder itself survives the removal of any file. NFS has no exclusive lock for a read-only
descriptor, so there the lock is held on the file `lock` and on the newest segment; on NFS mounted with
`nolock` or `local_lock` these hold within one machine only. `FolderLock.lost` reports that the lock file
was removed or replaced, so that another process could lock the same path.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

NAME = "lock"
HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})
"""flock's errors where another process holds the lock."""
UNSUPPORTED = frozenset({errno.EBADF, errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
"""flock's errors where the file system does not support such a lock."""


class LockHeld(Exception):
    """Another process holds the lock."""


class FolderLock:
    """The lock on a folder, held from construction to `release` or to the end of the process."""

    def __init__(self, folder: Path) -> None:
        """Lock the folder. Raises: `LockHeld` where another process holds it, `OSError` where locking fails."""
        self._path = folder / NAME
        self.folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        """The locked folder, even if its path leads elsewhere meanwhile."""
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
        """Whether the lock file was removed or replaced."""
        try:
            current = self._path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:  # the disk does not answer: the next write to it reports that
            return False
        held = os.fstat(self._fd)
        return (current.st_dev, current.st_ino) != (held.st_dev, held.st_ino)

    def release(self) -> None:
        """Release the lock."""
        for fd in (self._fd, self.folder_fd):
            if fd >= 0:
                os.close(fd)
        self._fd = self.folder_fd = -1


def lock(fd: int, how: int = fcntl.LOCK_EX) -> None:
    """Lock an open file without waiting. Raises: `LockHeld`, or `OSError` where locking fails."""
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            raise LockHeld from None
        raise


def lock_if_supported(fd: int, how: int = fcntl.LOCK_EX) -> None:
    """Lock an open file as `lock` does; do nothing where the file system does not support it."""
    try:
        lock(fd, how)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def verify_no_writer(path: Path) -> None:
    """Raise `LockHeld` where a process has this file open and locked for writing."""
    try:
        fd = os.open(path, os.O_RDWR)  # NFS locks only what may be written
    except PermissionError:
        fd = os.open(path, os.O_RDONLY)
    try:
        lock_if_supported(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)

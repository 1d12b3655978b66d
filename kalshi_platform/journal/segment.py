"""The segment that is being written: one file, and the one owner of its descriptor.

It knows bytes only. A descriptor is closed once, whatever fails around it: the number of one that is
closed may belong to another file a moment later. After an `fdatasync` that failed the kernel may have
dropped the pages and report success from then on, so what was written since the last one that succeeded
is not trusted any more (`trusted`), and is written again to another segment.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kalshi_platform.journal.lock import Held, lock_if_supported
from kalshi_platform.journal.reader import END_MARK, HEADER, SUFFIX

log = logging.getLogger(__name__)


_FDATASYNC: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)  # macOS has none


@dataclass(frozen=True)
class Disk:
    """The system calls that write a journal; a test gives some that fail or are slow."""

    open: Callable[..., int] = os.open
    pwrite: Callable[[int, Any, int], int] = os.pwrite
    fdatasync: Callable[[int], None] = _FDATASYNC
    fsync: Callable[[int], None] = os.fsync
    """Of the folder: it makes the segment's name durable."""
    ftruncate: Callable[[int, int], None] = os.ftruncate
    close: Callable[[int], None] = os.close
    rename: Callable[..., None] = os.rename
    unlink: Callable[..., None] = os.unlink


REAL_DISK = Disk()


class Segment:
    """A segment that this process has begun."""

    def __init__(self, disk: Disk, folder_fd: int, first_n: int) -> None:
        """Make the file, its header and its name durable.

        Raises `OSError` where the disk refuses; nothing is left open then. `FileExistsError`: a file of
        that name is there already.
        """
        self._disk = disk
        self._folder_fd = folder_fd
        self.first_n = first_n
        self.name = f"{first_n:020d}{SUFFIX}"
        self.size = len(HEADER)
        """Bytes that are durable."""
        self.trusted = True
        """Whether what is written from `size` on can become durable here."""
        self._fd = disk.open(
            self.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640, dir_fd=folder_fd
        )
        try:
            lock_if_supported(self._fd)
            self._put(HEADER, 0)
            disk.fdatasync(self._fd)
            disk.fsync(folder_fd)
        except BaseException as error:
            self._close()
            self._unlink()
            if isinstance(error, Held):  # who starts just now looks whether it is locked
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), self.name) from None
            raise

    def append(self, data: bytes) -> None:
        """Write the next bytes and make them durable. After `OSError` they are not, and may be tried again."""
        self._put(data, self.size)
        try:
            self._disk.fdatasync(self._fd)
            if self.removed:
                raise FileNotFoundError(errno.ENOENT, "it was removed", self.name)
        except OSError:
            self.trusted = False
            raise
        self.size += len(data)

    @property
    def removed(self) -> bool:
        """Whether the file has no name any more: what is written to it goes with this process."""
        return self._fd >= 0 and os.fstat(self._fd).st_nlink == 0

    def end(self) -> None:
        """Write the end mark, which no reader needs, and close the file."""
        try:
            self.append(END_MARK)
        except OSError as error:
            log.warning("Segment %s has no end mark: %s", self.name, error.strerror)
        self._close()

    def abandon(self) -> None:
        """Close the file without what is not trusted; it goes where that is all of it."""
        if self._fd < 0:
            return
        empty = self.size == len(HEADER) and not self.removed
        try:
            if self.size > len(HEADER):
                self._disk.ftruncate(self._fd, self.size)
        except OSError as error:  # readers find the same batch in the segment that follows
            log.warning("Segment %s keeps a batch twice: %s", self.name, error.strerror)
        self._close()
        if empty:
            self._unlink()

    def _put(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while view:
            written = self._disk.pwrite(self._fd, view, offset)
            if not written:
                raise OSError(errno.EIO, "the disk takes no byte", self.name)
            view = view[written:]
            offset += written

    def _close(self) -> None:
        """Give the descriptor back, once: the kernel has taken it also where close fails."""
        fd, self._fd = self._fd, -1
        try:
            if fd >= 0:
                self._disk.close(fd)
        except OSError as error:  # all that counts was synced before
            log.warning("Closing segment %s: %s", self.name, error.strerror)

    def _unlink(self) -> None:
        """Remove a segment without a record. One that stays is put aside when its name is needed."""
        try:
            self._disk.unlink(self.name, dir_fd=self._folder_fd)
        except OSError as error:
            log.warning("Segment %s holds nothing and stays: %s", self.name, error.strerror)

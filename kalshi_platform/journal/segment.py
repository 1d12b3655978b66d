"""The segment file being written, as the sole owner of its descriptor. Encoding and queueing belong in `writer`.

A descriptor is closed exactly once, whatever fails around it: once closed, its number may belong to
another file at any moment. After a failed `fdatasync` the kernel may have dropped the dirty pages and
report success from then on. So bytes written since the last successful sync are no longer trusted
(`trusted`), and the writer writes them again to another segment.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kalshi_platform.journal.lock import LockHeld, lock_if_supported
from kalshi_platform.journal.reader import END_MARK, HEADER, SUFFIX

log = logging.getLogger(__name__)


_FDATASYNC: Callable[[int], None] = getattr(os, "fdatasync", os.fsync)  # macOS has none


@dataclass(frozen=True)
class Disk:
    """The system calls that write a journal; tests replace them with failing or slow ones."""

    open: Callable[..., int] = os.open
    pwrite: Callable[[int, Any, int], int] = os.pwrite
    fdatasync: Callable[[int], None] = _FDATASYNC
    fsync: Callable[[int], None] = os.fsync
    """Called on the folder, to make a segment's name durable."""
    ftruncate: Callable[[int, int], None] = os.ftruncate
    close: Callable[[int], None] = os.close
    rename: Callable[..., None] = os.rename
    unlink: Callable[..., None] = os.unlink


REAL_DISK = Disk()


class Segment:
    """A segment that this process created and writes."""

    def __init__(self, disk: Disk, folder_fd: int, first_n: int) -> None:
        """Create the file and make its header and name durable.

        Raises: `FileExistsError` where a file of that name exists, `OSError` where the disk refuses. No
        descriptor is left open then.
        """
        self._disk = disk
        self._folder_fd = folder_fd
        self.first_n = first_n
        self.name = f"{first_n:020d}{SUFFIX}"
        self.size = len(HEADER)
        """Number of durable bytes."""
        self.trusted = True
        """False after a failed sync: bytes written beyond `size` may never become durable here."""
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
            if isinstance(error, LockHeld):  # a starting process tests the lock of every segment
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), self.name) from None
            raise

    def append(self, data: bytes) -> None:
        """Write the next bytes and make them durable. Raises: `OSError` where they are not; append them again."""
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
        """Whether the file was unlinked: bytes written to it vanish with this process."""
        return self._fd >= 0 and os.fstat(self._fd).st_nlink == 0

    def end(self) -> None:
        """Write the end mark (optional for readers) and close the file."""
        try:
            self.append(END_MARK)
        except OSError as error:
            log.warning("Segment %s has no end mark: %s", self.name, error.strerror)
        self._close()

    def abandon(self) -> None:
        """Truncate the file to its durable bytes and close it; remove it where it holds no record."""
        if self._fd < 0:
            return
        empty = self.size == len(HEADER) and not self.removed
        try:
            if self.size > len(HEADER):
                self._disk.ftruncate(self._fd, self.size)
        except OSError as error:  # harmless: readers accept an equal batch in the following segment
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
        """Close the descriptor, once: Linux releases it even where close fails."""
        fd, self._fd = self._fd, -1
        try:
            if fd >= 0:
                self._disk.close(fd)
        except OSError as error:  # every durable byte was synced before
            log.warning("Closing segment %s: %s", self.name, error.strerror)

    def _unlink(self) -> None:
        """Remove a segment without records. If that fails, the writer renames it when it needs the name."""
        try:
            self._disk.unlink(self.name, dir_fd=self._folder_fd)
        except OSError as error:
            log.warning(
                "Segment %s holds no record and cannot be removed: %s", self.name, error.strerror
            )

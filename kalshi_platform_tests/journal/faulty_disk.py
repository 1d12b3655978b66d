"""A disk whose system calls fail on request, and what would be left of it after a power cut.

It works on real files, and keeps beside them what an unkind disk has of them. Written bytes reach it
with the `fdatasync` that follows; one that fails leaves the pages clean, as Linux does, so that no later
one writes them again. A name reaches it with the folder's `fsync`.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kalshi_platform.journal.segment import Disk

CALLS = ("open", "pwrite", "fdatasync", "fsync", "ftruncate", "close", "rename", "unlink")
ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EIO, errno.EINTR)
SHORT = -1
"""A fault that is a short write instead of an error."""


@dataclass
class _File:
    """One file: its bytes on the disk and its bytes not synced yet."""

    content: bytearray = field(default_factory=bytearray)
    dirty: list[tuple[int, bytes]] = field(default_factory=list)

    def sync(self) -> None:
        for offset, data in self.dirty:
            self.content.extend(bytes(max(offset + len(data) - len(self.content), 0)))
            self.content[offset : offset + len(data)] = data
        self.dirty.clear()


@dataclass
class FaultyDisk:
    """A disk with injected faults: `faults` maps a call and its index (from 0) to an errno or SHORT."""

    faults: Mapping[tuple[str, int], int]
    writes_despite_error: bool = False
    """Whether the bytes of a failing `fdatasync` reach the disk nevertheless."""
    met: set[tuple[str, int]] = field(default_factory=set)
    delay: Callable[[], object] = lambda: None
    """Called within each `fdatasync`."""

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._counts: Counter[str] = Counter()
        self._files: dict[int, _File] = {}
        """By descriptor."""
        self._new_names: dict[str, _File | None] = {}
        self._names: dict[str, _File | None] = {}

    @property
    def disk(self) -> Disk:
        """The system calls to give to the writer."""
        return Disk(**{name: getattr(self, f"_{name}") for name in CALLS})

    @property
    def spent(self) -> bool:
        """Whether every fault has occurred."""
        return self.met >= set(self.faults)

    def after_power_cut(self, source: Path, folder: Path, durable: Callable[[], int]) -> int:
        """Copy the synced bytes of `source` into `folder`; return what was durable just before."""
        n = durable()
        shutil.copy(source / "journal.json", folder)  # written before the first segment
        with self._lock:
            for name, file in self._names.items():
                if file is not None:
                    (folder / name).write_bytes(file.content)
        return n

    def _fault(self, call: str) -> int:
        with self._lock:
            at = (call, self._counts[call])
            self._counts[call] += 1
            found = self.faults.get(at, 0)
            if found:
                self.met.add(at)
            return found

    def _fail(self, call: str) -> None:
        if (found := self._fault(call)) and found != SHORT:
            raise OSError(found, os.strerror(found))

    def _open(self, name: str, flags: int, mode: int, *, dir_fd: int) -> int:
        self._fail("open")
        fd = os.open(name, flags, mode, dir_fd=dir_fd)
        with self._lock:
            self._files[fd] = self._new_names[name] = _File()
        return fd

    def _pwrite(self, fd: int, data: Any, offset: int) -> int:
        found = self._fault("pwrite")
        part = bytes(data)
        if found:
            part = part[: len(part) // 2]
        taken = os.pwrite(fd, part, offset) if part else 0
        with self._lock:
            self._files[fd].dirty.append((offset, part))
        if found and (found != SHORT or not taken):
            code = errno.ENOSPC if found == SHORT else found
            raise OSError(code, os.strerror(code))
        return taken

    def _fdatasync(self, fd: int) -> None:
        self.delay()
        try:
            self._fail("fdatasync")
        except OSError:
            with self._lock:
                if self.writes_despite_error:
                    self._files[fd].sync()
                self._files[fd].dirty.clear()
            raise
        with self._lock:
            self._files[fd].sync()

    def _fsync(self, fd: int) -> None:
        try:
            self._fail("fsync")
        except OSError:
            with self._lock:
                self._new_names.clear()
            raise
        with self._lock:
            self._names.update(self._new_names)
            self._new_names.clear()

    def _ftruncate(self, fd: int, size: int) -> None:
        self._fail("ftruncate")  # truncation is not synced: after a power cut it may be undone
        os.ftruncate(fd, size)

    def _close(self, fd: int) -> None:
        os.close(fd)  # as on Linux: the descriptor is closed even where close fails
        with self._lock:
            del self._files[fd]
        self._fail("close")

    def _rename(self, old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        self._fail("rename")
        os.rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        with self._lock:
            file = self._new_names.get(old, self._names.get(old))
            self._new_names |= {new: file, old: None}

    def _unlink(self, name: str, *, dir_fd: int) -> None:
        self._fail("unlink")
        os.unlink(name, dir_fd=dir_fd)
        with self._lock:
            self._new_names[name] = None

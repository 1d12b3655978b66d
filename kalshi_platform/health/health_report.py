"""Publication of a streamer's health report: one writer, any number of readers.

How it is stored belongs here; its fields are in `recorder/streamer.py`, its interpretation in `verdict.py`.

There are two copies, which `read` consults in this order:

- **in memory**, a file in /dev/shm (Linux). The streamer's health thread writes it each second without touching
  a disk, so a full, read-only or unresponsive disk does not stop it. Readers need nothing from the streamer:
  while its interpreter is busy, its last report can still be read, and its age be measured.
- **`health.json`** beside the journal, for people, for containers that share the volume but not the memory, and
  for reports of processes that have ended.

Each copy is a *pair*: two files of a fixed size that are written in turn and swap their names. Once both exist,
a write allocates no block, so it succeeds on a full disk, and a reader always finds a complete report. (A
copy-on-write file system, such as btrfs or APFS, needs free space even so; there only the memory copy is safe.)

The memory copy is used while the process that it names is alive, else the file.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

from kalshi_platform import durable, typed_json
from kalshi_platform.processes import Identity

FILE = "health.json"
MEMORY = Path("/dev/shm")  # noqa: S108 - owner and name are checked, and links are not followed
BLOCK = 4096
TRIES = 100
"""Attempts to read a file that is being rewritten; a read takes microseconds, and writes come once a second."""


class Publisher:
    """The streamer's side. Only the process that holds a journal's lock publishes for it."""

    def __init__(self, folder: Path) -> None:
        self._memory = _Pair(memory_path(folder))
        self._file = _Pair(folder / FILE)

    def publish(self, report: bytes) -> None:
        """Write the copy in memory. Raises `OSError` if the system has no such memory."""
        self._memory.write(report)

    def save(self, report: bytes) -> None:
        """Write the copy beside the journal. May wait for the disk; raises `OSError`."""
        self._file.write(report)

    def withdraw(self) -> None:
        """Remove the copy in memory; the file keeps the last report."""
        self._memory.remove()


def read(folder: Path) -> dict[str, Any] | None:
    """The newest report of a journal's streamer; None if no streamer has run.

    Raises `ValueError` for a file that is not a JSON object, `OSError` for one that cannot be read.
    """
    return _memory_report(folder) or _decoded(folder / FILE)


def memory_path(folder: Path) -> Path:
    """The path of the copy in memory; its name is derived from the journal's path."""
    digest = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:32]
    return MEMORY / f"kalshi-{digest}.json"


def _memory_report(folder: Path) -> dict[str, Any] | None:
    """The report in memory if its owner is trusted and its process alive, else None."""
    path = memory_path(folder)
    try:
        if _foreign(path, folder):
            return None
        report = _decoded(path)
        if report is None or not Identity(int(report["pid"]), float(report["pid_started"])).alive:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing, or not a report of the platform: the file decides
    return report


def _foreign(path: Path, folder: Path) -> bool:
    """Whether a file in shared memory, where any user may create one, belongs to an untrusted user."""
    owner = path.lstat().st_uid
    return owner not in {0, os.geteuid()} and owner != folder.stat().st_uid


def _decoded(path: Path) -> dict[str, Any] | None:
    try:
        return typed_json.decode(_read_consistent(path), dict[str, Any])
    except FileNotFoundError:
        return None


def _read_consistent(path: Path) -> bytes:
    """A consistent content of a file: read twice with equal results, and not swapped with its twin meanwhile."""
    for _ in range(TRIES):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb", buffering=0) as file:
            data = file.readall()
            file.seek(0)
            if file.readall() == data and path.lstat().st_ino == os.fstat(fd).st_ino:
                break
    return data


class _Pair:
    """A small file that is replaced atomically by its twin, without allocating disk space."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._twin = path.with_name(f".{path.name}.twin")

    def write(self, data: bytes) -> None:
        """Replace the content. The first call creates both files; later ones allocate nothing."""
        if not self._path.exists():
            self._fill(data)
            self._twin.replace(self._path)
        self._fill(data)
        try:
            durable.swap(self._twin, self._path)
        except OSError as error:
            if error.errno not in durable.SWAP_UNSUPPORTED:
                raise
            self._twin.replace(self._path)

    def _fill(self, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self._twin, flags, 0o640)
        with os.fdopen(fd, "wb") as file:
            found = os.fstat(fd)
            if self._path.parent == MEMORY and found.st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "is another user's", str(self._twin))
            file.write(data.ljust(max(found.st_size, -(-len(data) // BLOCK) * BLOCK)))

    def remove(self) -> None:
        """Remove both files."""
        self._path.unlink(missing_ok=True)
        self._twin.unlink(missing_ok=True)

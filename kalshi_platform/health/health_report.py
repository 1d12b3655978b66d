"""How a streamer's health report reaches whoever supervises it: one writer, any number of readers.

There are two copies, and a reader asks for both through `read`:

- **in memory**, a file of /dev/shm (Linux). The streamer's health thread writes it each second and touches no
  disk for that, so a disk that is full, read-only or does not answer takes it from nobody. A reader needs no
  help of the streamer: while the streamer's interpreter is busy, the last report is there, with its age.
- **`health.json`** beside the journal, for people, for containers that share the volume and no memory, and for
  reports of processes that have ended.

Both are *pairs*: two files of a fixed size that are written in turn and exchange their names. Once both are
there a write takes no new block, so it succeeds on a full disk, and a reader finds a whole report. (A file
system that copies on write, such as btrfs or APFS, needs room all the same: there only memory is certain.)

The memory copy counts while the process that it names is alive; else the file does.
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
"""Readings of a file that is written again meanwhile; each takes microseconds, and it is written once a second."""


class Publisher:
    """The streamer's side. One process at a time publishes for a journal: the holder of its lock."""

    def __init__(self, folder: Path) -> None:
        self._memory = _Pair(memory_path(folder))
        self._file = _Pair(folder / FILE)

    def publish(self, report: bytes) -> None:
        """Put the report where it needs no disk. Raises `OSError` where there is no such memory."""
        self._memory.write(report)

    def save(self, report: bytes) -> None:
        """Put the report beside the journal. Raises `OSError` where the disk refuses; may wait for it."""
        self._file.write(report)

    def withdraw(self) -> None:
        """Remove the copy in memory: the file has the last report."""
        self._memory.remove()


def read(folder: Path) -> dict[str, Any] | None:
    """The newest report of a journal's streamer; None where none has run.

    Raises `ValueError` for a file that is no JSON object, `OSError` where it cannot be read.
    """
    return _of_living(folder) or _decoded(folder / FILE)


def memory_path(folder: Path) -> Path:
    """Where the copy in memory is: the name follows from the journal's path alone."""
    digest = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:32]
    return MEMORY / f"kalshi-{digest}.json"


def _of_living(folder: Path) -> dict[str, Any] | None:
    """The report in memory, where it is ours and its process is alive."""
    path = memory_path(folder)
    try:
        if _foreign(path, folder):
            return None
        report = _decoded(path)
        if report is None or not Identity(int(report["pid"]), float(report["pid_started"])).alive:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none, or none of ours: the file says what there is to say
    return report


def _foreign(path: Path, folder: Path) -> bool:
    """Whether a file of shared memory, where any user may make one, is of neither us nor the journal's owner."""
    owner = path.lstat().st_uid
    return owner not in {0, os.geteuid()} and owner != folder.stat().st_uid


def _decoded(path: Path) -> dict[str, Any] | None:
    try:
        return typed_json.decode(_whole(path), dict[str, Any])
    except FileNotFoundError:
        return None


def _whole(path: Path) -> bytes:
    """What a file of this name held at one moment: the same twice, and not under its twin's name at the end."""
    for _ in range(TRIES):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb", buffering=0) as file:
            data = file.readall()
            file.seek(0)
            if file.readall() == data and path.lstat().st_ino == os.fstat(fd).st_ino:
                break
    return data


class _Pair:
    """A small file that is replaced in one step, by its twin and without taking room."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._twin = path.with_name(f".{path.name}.twin")

    def write(self, data: bytes) -> None:
        """Replace the file. The first time both files are made; later nothing is allocated."""
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

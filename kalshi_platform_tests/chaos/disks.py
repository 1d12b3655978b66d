"""The campaign's disks: each store on a small file system that can be filled and removed.

Needs the right to mount; `available` says whether this process has it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 1 << 20
FILLER = ".filler"


def available() -> bool:
    """Whether file systems can be mounted here."""
    with tempfile.TemporaryDirectory() as name:
        if not _mount(Path(name), MIB):
            return False
        _unmount(Path(name))
    return True


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """Put an empty file system of `size` bytes at `folder` until the end."""
    folder.mkdir(parents=True, exist_ok=True)
    if not _mount(folder, size):
        raise OSError(errno.EPERM, "No file system can be mounted", str(folder))
    try:
        yield
    finally:
        _unmount(folder)


def fill(folder: Path) -> None:
    """Leave no room on the file system of `folder`."""
    fd = os.open(folder / FILLER, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        for piece in (MIB, 4096, 1):
            with contextlib.suppress(OSError):  # no room for more of that size
                while True:
                    os.write(fd, bytes(piece))
    finally:
        os.close(fd)


def make_room(folder: Path) -> None:
    """Undo `fill`."""
    (folder / FILLER).unlink(missing_ok=True)


def hide(folder: Path) -> None:
    """Put an empty file system over `folder`, as if its own were not mounted."""
    _mount(folder, MIB)


def show(folder: Path) -> None:
    """Undo `hide`."""
    _unmount(folder)


def _mount(folder: Path, size: int) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "chaos", str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def _unmount(folder: Path) -> None:
    # lazily: a process of the campaign may still have a file open there
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)

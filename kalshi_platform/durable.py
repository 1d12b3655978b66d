"""What must survive a power failure: files, their names, and small files replaced in one step."""

from __future__ import annotations

import os
from pathlib import Path


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

"""Small files that say how far something is: replaced in one step, which a power failure leaves done or not."""

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
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

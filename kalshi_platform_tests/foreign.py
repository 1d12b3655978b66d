"""Foreign files and folders, as people and programs leave them, to be put among the platform's."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNPRIVILEGED_UID = 65_534
NAMES = (
    "date=2026-11-28.bak",
    "date=2026-13-45",
    "date=2026-02-30",
    "date=20261128",
    "date=\uff12\uff10\uff12\uff16-11-28",
    "date=",
    "olddate=2026-11-28",
    "Copy of date=2026-11-28",
    "hour=24",
    "hour=7",
    "hour=07.bak",
    "notes.txt",
    os.fsdecode(b"not utf-8 \xff\xfe"),
    "line\nend",
    "\x1b[31mred",
    "%41",
    "shard-0.bak",
    "shard-x",
    "shard-01",
    "shard-\u0663",
    "x.arrows",
    "00000000000000000000.arrows.bak",
    "1.arrows",
    "x.state",
    "2026-11-28T07-x.state",
    "x.arrow",
    ".DS_Store",
)


def put(folder: Path) -> list[str]:
    """Create files, folders with files, dangling and looping links; return their names."""
    for n, name in enumerate(NAMES):
        if n % 2:
            (folder / name / "hour=07").mkdir(parents=True)
            (folder / name / "hour=07" / "part-0-0-1.parquet").write_bytes(b"no Parquet")
        else:
            (folder / name).write_bytes(b"not ours")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder / "loop")
    return [*NAMES, "dangling", "loop"]


@contextmanager
def closed_to_us(folder: Path) -> Iterator[None]:
    """Make a folder unreadable for this process, also if it runs as root."""
    mode, privileged = folder.stat().st_mode, os.geteuid() == 0
    folder.chmod(0)
    if privileged:
        os.seteuid(UNPRIVILEGED_UID)
    try:
        yield
    finally:
        if privileged:
            os.seteuid(0)
        folder.chmod(mode)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A new folder that every user may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)

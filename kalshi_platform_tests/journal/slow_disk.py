"""Run a program on a disk whose every sync takes 40 ms longer."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SHIM = Path(__file__).with_name("slow_fdatasync.c")
SYNC_MS = 40


def environment(folder: Path) -> dict[str, str] | None:
    """What the program's environment needs; None without a C compiler. The shim is built in `folder`."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    shim = folder / "slow.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", shim, SHIM, "-ldl"], check=True)
    return {"LD_PRELOAD": str(shim), "SLOW_FDATASYNC_US": str(1000 * SYNC_MS)}

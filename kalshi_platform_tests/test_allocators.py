"""The streamer's allocators, looked at in processes of their own: what is freed leaves the process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

linux = pytest.mark.skipif(sys.platform != "linux", reason="glibc and its settings")

FREED = """
import json, os, time
from kalshi_platform import allocators
allocators.return_freed_memory()
import numpy as np, polars as pl, psutil, pyarrow as pa

def resident():
    return psutil.Process().memory_info().rss >> 20

def work(n):
    held = pl.DataFrame({"a": pl.int_range(n, eager=True)}).with_columns(b=pl.col("a") * 2).sort("b", descending=True)
    arrow = [pa.array(range(1000)) for _ in range(1000)] + [pa.allocate_buffer(n) for _ in range(8)]
    return held, arrow, np.ones(n)

work(10_000)
before = resident()
held = work(4_000_000)
at_most = resident()
del held
deadline = time.monotonic() + 60
while resident() > before + 8 and time.monotonic() < deadline:
    time.sleep(0.1)
print(json.dumps([before, at_most, resident(), pa.default_memory_pool().backend_name]))
"""

ORDER = """
import json, os, sys
from kalshi_platform import allocators
from kalshi_platform.commands import main
loaded = []
def note():
    loaded.append([name in sys.modules for name in ("polars", "pyarrow")])
allocators.return_freed_memory = note
sys.argv = ["kalshi-platform", "stream", "--help"]
main.processes.exit_now = lambda status: print(json.dumps(loaded))
try:
    main.run()
except SystemExit:
    pass
"""


def ran(code: str, **environment: str) -> Any:
    """What the code's last line of output says."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=120,
    )
    return json.loads(done.stdout.splitlines()[-1])


@linux
def test_freed_memory_of_each_allocator_leaves_the_process() -> None:
    before, at_most, after, pool = ran(FREED)
    assert at_most > before + 64
    assert after <= before + 8
    assert pool == "jemalloc"


@linux
def test_what_the_environment_says_of_a_pool_stays() -> None:
    assert ran(FREED, ARROW_DEFAULT_MEMORY_POOL="system")[3] == "system"


def test_the_streamer_sets_its_allocators_before_they_are_loaded() -> None:
    assert ran(ORDER) == [[False, False]]

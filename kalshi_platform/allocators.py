"""How soon a process returns memory that it has freed to the system.

Three allocators are in the streamer: Polars' jemalloc, Arrow's pool, and the C library's for Python and NumPy.
Each keeps what was freed for the next allocation, in pages that count as resident: after millions of levels at
an hour's end more than what is in use. What is set here returns it within a second or so. A range of rows that
follows at once still gets the memory that the one before it has freed.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["return_freed_memory"]

_POLARS = "narenas:4,dirty_decay_ms:500,muzzy_decay_ms:0,background_thread:true"
"""Pages are returned by a thread of the allocator. Muzzy ones, which Polars keeps, would be resident until another
process wants them. Four arenas in place of four for each core: each keeps free pages of its own. See jemalloc's
manual, TUNING."""
_ARROW = "jemalloc"
"""It returns pages after a second; Arrow's other pool keeps them for each of its threads."""
_OF_GLIBC = {-3: 4 << 20, -1: 16 << 20, -8: 2}
"""By the numbers of malloc.h. M_MMAP_THRESHOLD: larger blocks are mapped by themselves, and returned when they are
freed; by default the limit rises to the largest block that was freed, up to 32 MiB, and such blocks lie among others
that stay. M_TRIM_THRESHOLD: more than this is not kept at the end of an arena. M_ARENA_MAX: each arena keeps free
blocks of its own."""


def return_freed_memory() -> None:
    """Set the allocators of this process and of its children. Call it before Polars or Arrow is imported.

    What the environment says already stays. Only Linux with glibc has all three.
    """
    os.environ.setdefault("_RJEM_MALLOC_CONF", _POLARS)
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", _ARROW)
        for option, value in _OF_GLIBC.items():
            set_option(option, value)

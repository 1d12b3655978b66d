"""What a run's process needs, imported ahead of it: the code server forks its runs from a process that has done so.

That process imports this module and does nothing else. Importing opens no connection and no file that stays open, and
starts no thread but those of memory allocators, which wait idle and hold no lock.
"""

from __future__ import annotations

import gc
import os
import signal

import dagster._cli
import dagster._grpc.impl
import dagster._grpc.server  # noqa: F401 - these and the others are for the processes that are forked

import kalshi_platform.definitions
import kalshi_platform.recorder.streamer  # noqa: F401


def _as_any_process() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# A whole session is asked to end with SIGTERM. Here it must not: the exit status of the runs, which take their
# time, reaches the code server through this process. It ends with the last of them.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.register_at_fork(after_in_child=_as_any_process)
gc.freeze()  # collecting garbage would copy the pages that the processes share

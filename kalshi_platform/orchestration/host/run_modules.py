"""The modules that a run needs, imported once in the process from which the code server forks its runs.

That process imports this module and does nothing else. A fork is safe: the imports leave no connection and no file
open, and start no thread but those of memory allocators, which are idle and hold no lock.
"""

from __future__ import annotations

import gc
import os
import signal

import dagster._cli
import dagster._core.storage.local_compute_log_manager
import dagster._core.storage.root
import dagster._grpc.impl
import dagster._grpc.server  # noqa: F401 - these and the others are preloaded for the forked processes
from dagster._core.definitions.reconstruct import ReconstructableRepository

import kalshi_platform.inventory.audit
import kalshi_platform.inventory.live_orders
import kalshi_platform.inventory.positions
import kalshi_platform.quality.proof
import kalshi_platform.recorder.streamer  # noqa: F401
from kalshi_platform import definitions
from kalshi_platform.orchestration.host import migration_scripts


def _restore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# As a run does first; that imports Dagster's storage, 340 modules.
ReconstructableRepository.for_module(definitions.__name__, "defs").get_definition()
migration_scripts.keep()

# SIGTERM goes to the whole session. This process must ignore it: the code server learns the exit status of the
# runs, which take time to flush, through it. It ends after the last of them.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.register_at_fork(after_in_child=_restore_sigterm)
gc.freeze()  # a garbage collection in a child would copy the shared pages

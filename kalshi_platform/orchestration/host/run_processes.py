"""How the code server starts the process of a run: forked from one that has imported what runs need.

In a new interpreter, as Dagster's own code server starts runs, importing takes seconds, and a streamer that is
replaced records nothing meanwhile. The process that forks (`multiprocessing.forkserver`, with `run_modules.py`
loaded) also tells how each run ended. No run depends on it: where it is gone, a run that lives counts as alive, and
the next run's start begins another; where it cannot be reached, a run starts in a new interpreter.
"""

from __future__ import annotations

import logging
import math
import os
import time
from multiprocessing import context, forkserver, popen_fork, popen_forkserver, popen_spawn_posix
from multiprocessing.process import BaseProcess, current_process
from pathlib import Path

import psutil

from kalshi_platform.processes import Identity

RUN_MODULES = "kalshi_platform.orchestration.host.run_modules"
UNTOLD = 255
"""What `multiprocessing` takes for the exit status of a process where the one that forked it is gone."""
LOOK_S = 0.1

log = logging.getLogger(__name__)


class ForkedProcess(popen_forkserver.Popen):
    """A process that was forked, whose end is seen without the one that forked it, too."""

    def __init__(self, process_obj: BaseProcess) -> None:
        super().__init__(process_obj)
        try:
            self._identity: Identity | None = Identity.of(self.pid)
        except psutil.NoSuchProcess:
            self._identity = None  # it has ended already

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        """Its exit status, or None while it lives."""
        status = super().poll(flag)
        if status == UNTOLD and self._identity is not None and self._identity.alive:
            self.returncode = None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """The same, once it has ended or the time is over."""
        ends = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            left = None if timeout is None else max(0.0, ends - time.monotonic())
            status = super().wait(left)
            if status is not None or left == 0.0:
                return status
            time.sleep(LOOK_S)


class RunProcess(context.ForkServerProcess):
    """Forked where that is possible, else started in a new interpreter."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> popen_fork.Popen:  # type: ignore[override]  # noqa: N802
        try:
            return ForkedProcess(process_obj)
        except OSError as error:  # which comes before the process has got what it is to do
            log.warning("This run starts in a new interpreter, some seconds later: %s.", error)
            return popen_spawn_posix.Popen(process_obj)


class RunContext(context.ForkServerContext):
    """What the code server makes processes of runs with, and what it shares with them."""

    Process = RunProcess


def prepare() -> RunContext:
    """Start the process that runs are forked from. Where that fails, the next run's start tries again."""
    forkserver.set_forkserver_preload([RUN_MODULES])
    try:
        forkserver.ensure_running()
    except OSError as error:
        log.warning("Runs start in new interpreters, some seconds later: %s.", error)
    return RunContext()


def keep_socket_in(folder: Path) -> None:
    """Where the socket of the process that forks is to be, rather than in a folder of its own in TMPDIR."""
    current_process()._config["tempdir"] = str(folder)  # type: ignore[attr-defined]  # no other way is there

"""How the code server starts the process of a run: forked from one that has imported what runs need.

In a new interpreter, as Dagster's own code server starts runs, importing takes seconds, and a streamer that is
replaced records nothing meanwhile. The process that forks (`multiprocessing.forkserver`, with `run_modules.py`
loaded) also reports how each run ended. No run depends on it: where it is gone, a run that lives counts as alive, and
the next run's start begins another; where it cannot be reached, ends meanwhile or does not answer in time, a run
starts in a new interpreter.

A run never starts twice. A forked process has nothing to do until it is handed the run, as one pickle, and that is
handed over only once its pid is known. Without the last byte no pickle can be read, so a process that was not handed
all of it ends; with the last byte the run counts as started, whatever becomes of it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import select
import signal
import time
from multiprocessing import (
    context,
    forkserver,
    popen_fork,
    popen_forkserver,
    popen_spawn_posix,
    reduction,
)
from multiprocessing.connection import wait
from multiprocessing.context import set_spawning_popen
from multiprocessing.process import BaseProcess, current_process
from multiprocessing.spawn import get_preparation_data
from multiprocessing.util import Finalize
from pathlib import Path

import psutil

from kalshi_platform.processes import Identity

RUN_MODULES = "kalshi_platform.orchestration.host.run_modules"
UNTOLD = 255
"""What `multiprocessing` takes for the exit status of a process where the one that forked it is gone."""
LOOK_S = 0.1
LAUNCH_S = 5.0
"""So long the process that forks, and then the forked one, may take. It is moments, unless one is stopped or hangs."""
WARM_S = 30.0
"""The same before it has forked for the first time: it may be importing. Dagster waits for a start for 60 s."""

log = logging.getLogger(__name__)


class ForkedProcess(popen_forkserver.Popen):
    """A process that was forked, whose end is seen without the one that forked it, too.

    Making one raises `OSError` or `EOFError` where the process could not be handed what it is to do.
    """

    _answered: int | None = None
    """The process that forks, once it has forked."""

    def __init__(self, process_obj: BaseProcess) -> None:
        super().__init__(process_obj)
        try:
            self._identity: Identity | None = Identity.of(self.pid)
        except psutil.NoSuchProcess:
            self._identity = None  # it has ended already

    def _launch(self, process_obj: BaseProcess) -> None:
        handed = self._pickled(process_obj)
        self.sentinel, writing = forkserver.connect_to_new_process(self._fds)  # type: ignore[attr-defined]
        try:
            self.pid = self._pid()
            _write(writing, handed, time.monotonic() + LAUNCH_S)
        except BaseException:
            _close(writing, self.sentinel)  # at the end of what it reads, a forked process ends
            raise
        # The forked process takes the end of its pipe for the end of this one.
        self.finalizer = Finalize(self, _close, (writing, self.sentinel))

    def _pickled(self, process_obj: BaseProcess) -> memoryview:
        buffer = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(get_preparation_data(process_obj.name), buffer)
            reduction.dump(process_obj, buffer)
        finally:
            set_spawning_popen(None)
        return buffer.getbuffer()

    def _pid(self) -> int:
        """The pid of the forked process, as the one that forks reports it. That one is killed where it does not in time:
        the next start begins another.
        """
        forking = _forking()
        limit_s = LAUNCH_S if forking == ForkedProcess._answered else WARM_S
        if not wait([self.sentinel], limit_s):
            if forking is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(forking, signal.SIGKILL)
            raise TimeoutError(
                f"process {forking}, which forks runs, did not answer in {limit_s:.0f} s"
            )
        pid = int(forkserver.read_signed(self.sentinel))
        ForkedProcess._answered = forking
        return pid

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


def _write(descriptor: int, what: memoryview, until: float) -> None:
    """Write all to a pipe. Raises `OSError` where that is not done in time, or the other end is closed."""
    os.set_blocking(descriptor, False)
    writable = select.poll()
    writable.register(descriptor, select.POLLOUT)
    while what:
        if not writable.poll(max(0.0, until - time.monotonic()) * 1000):
            raise TimeoutError(f"the forked process left {len(what)} bytes unread")
        what = what[os.write(descriptor, what) :]


def _close(*descriptors: int) -> None:
    for each in descriptors:
        os.close(each)


def _forking() -> int | None:
    """The pid of the process that forks."""
    pid: int | None = vars(forkserver)["_forkserver"]._forkserver_pid  # no other way is there
    return pid


class RunProcess(context.ForkServerProcess):
    """Forked where that is possible, else started in a new interpreter."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> popen_fork.Popen:  # type: ignore[override]  # noqa: N802
        try:
            return ForkedProcess(process_obj)
        except (
            OSError,
            EOFError,
        ) as error:  # each comes before a process has got all that it is to do
            log.warning(
                "This run starts in a new interpreter, some seconds later: %s.",
                str(error) or "the process that forks ended",
            )
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

"""Start of a run's process by the code server: a fork of a process that has imported the runs' modules.

Dagster's own code server starts each run in a new interpreter, whose imports take seconds, in which a streamer that
is replaced records nothing. Here runs are forked from a fork server (`multiprocessing.forkserver`, with
`run_modules.py` loaded), which also reports how each run ended. No run depends on it: if it is gone, a running run
counts as alive, and the next start creates another fork server; if it cannot be reached, ends meanwhile or does not
answer in time, the run starts in a new interpreter.

A run never starts twice. A forked process does nothing until it receives the run, as one pickle, which is sent only
when its pid is known. A pickle without its last byte cannot be read, so a process that did not receive all of it
ends; once the last byte is written, the run counts as started.
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
UNKNOWN_STATUS = 255
"""The exit status that `multiprocessing` assumes for a process whose fork server is gone."""
POLL_S = 0.1
LAUNCH_S = 5.0
"""Seconds that the fork server, and then the forked process, may take; normally milliseconds."""
WARM_S = 30.0
"""The same for the fork server's first fork, before which it imports. Dagster waits 60 s for a start."""

log = logging.getLogger(__name__)


class ForkedProcess(popen_forkserver.Popen):
    """A forked process, whose end is also noticed without the fork server.

    Raises `OSError` or `EOFError` if the run could not be sent to the process.
    """

    _answered: int | None = None
    """The pid of the fork server that has forked before."""

    def __init__(self, process_obj: BaseProcess) -> None:
        super().__init__(process_obj)
        try:
            self._identity: Identity | None = Identity.of(self.pid)
        except psutil.NoSuchProcess:
            self._identity = None  # it has exited already

    def _launch(self, process_obj: BaseProcess) -> None:
        handed = self._pickled(process_obj)
        self.sentinel, writing = forkserver.connect_to_new_process(self._fds)  # type: ignore[attr-defined]
        try:
            self.pid = self._pid()
            _write(writing, handed, time.monotonic() + LAUNCH_S)
        except BaseException:
            _close(writing, self.sentinel)  # a forked process ends at the end of its input
            raise
        # The forked process regards the end of its pipe as the end of this process.
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
        """The pid of the forked process, as the fork server reports it.

        A fork server that does not answer in time is killed; the next start creates another.
        """
        forking = _fork_server_pid()
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
        """The exit status, or None while the process runs."""
        status = super().poll(flag)
        if status == UNKNOWN_STATUS and self._identity is not None and self._identity.alive:
            self.returncode = None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the exit status; None if `timeout` seconds pass."""
        ends = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            left = None if timeout is None else max(0.0, ends - time.monotonic())
            status = super().wait(left)
            if status is not None or left == 0.0:
                return status
            time.sleep(POLL_S)


def _write(descriptor: int, data: memoryview, until: float) -> None:
    """Write all data to a pipe. Raises `OSError` if it takes too long, or the other end is closed."""
    os.set_blocking(descriptor, False)
    writable = select.poll()
    writable.register(descriptor, select.POLLOUT)
    while data:
        if not writable.poll(max(0.0, until - time.monotonic()) * 1000):
            raise TimeoutError(f"the forked process left {len(data)} bytes unread")
        data = data[os.write(descriptor, data) :]


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _fork_server_pid() -> int | None:
    """The pid of the fork server, or None."""
    pid: int | None = vars(forkserver)["_forkserver"]._forkserver_pid  # there is no public access
    return pid


class RunProcess(context.ForkServerProcess):
    """A run's process: forked if possible, else started in a new interpreter."""

    @staticmethod
    def _Popen(process_obj: BaseProcess) -> popen_fork.Popen:  # type: ignore[override]  # noqa: N802
        try:
            return ForkedProcess(process_obj)
        except (
            OSError,
            EOFError,
        ) as error:  # each is raised before the process has received the whole run
            log.warning(
                "This run starts in a new interpreter, some seconds later: %s.",
                str(error) or "the process that forks ended",
            )
            return popen_spawn_posix.Popen(process_obj)


class RunContext(context.ForkServerContext):
    """The multiprocessing context with which the code server creates the processes of runs."""

    Process = RunProcess


def prepare() -> RunContext:
    """Start the fork server. If that fails, the next run's start tries again."""
    forkserver.set_forkserver_preload([RUN_MODULES])
    try:
        forkserver.ensure_running()
    except OSError as error:
        log.warning("Runs start in new interpreters, some seconds later: %s.", error)
    return RunContext()


def keep_socket_in(folder: Path) -> None:
    """Put the fork server's socket into `folder` instead of a new folder in TMPDIR."""
    current_process()._config["tempdir"] = str(folder)  # type: ignore[attr-defined]  # there is no public access

"""Operating-system processes: identity, supervision with restarts, and shutdown that leaves no orphan.

Which programs run is decided by `commands/up.py`; `orchestration` asks here whether a process is alive.
What a program does belongs elsewhere.

A pid is reused by the kernel, so a process is identified by its pid and its start time. The start time does
not depend on the wall clock: setting the clock must not make a running process look like another one.

Each program leads a session of its own. So Ctrl-C in the terminal reaches only the supervisor, which stops
the programs in order, and grandchildren are found by their session even when their parent has exited. If the
supervisor is killed (`kill -9`), its *orphan reaper* takes over: `python -m kalshi_platform.processes` reads
the session ids from a pipe and, when the pipe breaks, ends those sessions in the same order.
(PR_SET_PDEATHSIG would reach direct children only, on Linux only, and in no order.)
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import psutil

from kalshi_platform import backoff
from kalshi_platform.errors import PlatformError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_START_TIME = 19
"""Index of the start time (ticks since boot) among the fields after the name in /proc/<pid>/stat; proc(5)."""

BACKOFF_S, BACKOFF_LIMIT_S = 1.0, 30.0
"""Waits in seconds before the first, second, … restart in a row; the last one repeats."""
STEADY_S = 60.0
"""A program that ran this long resets the back-off: its next restart takes the shortest wait."""
LOG_LIMIT = 20 * 1024 * 1024
"""Bytes of a log file at which it is rotated; one rotated file is kept."""


DONE = "done"
"""The supervisor's last line to the orphan reaper: every session has been ended."""


class PortTaken(PlatformError):
    """Another program listens on a port that the platform needs."""


@dataclass(frozen=True)
class Identity:
    """A process, identified by pid and start time, so that a reused pid is not mistaken for it."""

    pid: int
    started: float
    """As `start_time` returns it."""

    def __str__(self) -> str:
        return f"{self.pid}@{self.started!r}"

    @classmethod
    def parse(cls, text: str) -> Identity:
        """Read what `str()` wrote. Raises `ValueError` for anything else."""
        pid, _, started = text.partition("@")
        return cls(int(pid), float(started))

    @classmethod
    def own(cls) -> Identity:
        """The current process."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Identity:
        """The process that has this pid now. Raises `psutil.NoSuchProcess` if there is none."""
        return cls(pid, start_time(pid))

    def find(self) -> psutil.Process | None:
        """The running process; None if it has exited, is a zombie, or its pid was reused."""
        try:
            process = psutil.Process(self.pid)
        except psutil.NoSuchProcess:
            return None
        return process if self.alive else None

    @property
    def alive(self) -> bool:
        """Whether this process is running. Asked often: on Linux it reads one file."""
        try:
            zombie, started = _zombie_and_start(self.pid)
        except psutil.NoSuchProcess:
            return False
        return not zombie and started == self.started

    def send(self, number: signal.Signals) -> bool:
        """Send a signal to this process, never to one that reuses its pid; False if it has exited."""
        process = self.find()
        if process is None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            return True
        return False


def start_time(pid: int) -> float:
    """When a process started, in seconds on a scale that setting the wall clock does not change.

    On Linux: seconds since boot plus an offset derived from the boot id, so that a process of an earlier boot
    never compares equal. Elsewhere: the kernel's start time, in seconds since the epoch.
    Raises `psutil.NoSuchProcess`.
    """
    return _zombie_and_start(pid)[1]


def _zombie_and_start(pid: int) -> tuple[bool, float]:
    if sys.platform != "linux":
        process = psutil.Process(pid)
        return process.status() == psutil.STATUS_ZOMBIE, process.create_time()
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    words = stat.rpartition(b")")[2].split()
    return words[0] == b"Z", _boot_offset() + int(words[_START_TIME]) / os.sysconf("SC_CLK_TCK")


@functools.cache
def _boot_offset() -> float:
    try:
        return float(int(_BOOT_ID.read_text()[:8], 16))
    except FileNotFoundError:
        return 0.0  # some sandboxes have no boot id; there only the ticks differ between boots


def require_free_port(port: int, purpose: str, remedy: str) -> None:
    """Raise `PortTaken` if a program listens on 127.0.0.1:`port`; `remedy` ends the sentence."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise PortTaken(
                f"Port {port}, needed for {purpose}, is taken{_listener(port)}"
                f" ({error.strerror}). {remedy}"
            ) from None


def _listener(port: int) -> str:
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status != psutil.CONN_LISTEN or not connection.laddr:
                continue
            if connection.laddr.port == port and connection.pid is not None:
                return f" by {psutil.Process(connection.pid).name()!r}, process {connection.pid}"
    except (psutil.AccessDenied, psutil.NoSuchProcess):
        pass  # the sockets of other users may be hidden; the port is taken all the same
    return ""


@dataclass(frozen=True)
class Program:
    """A program that `ProgramSupervisor` keeps running."""

    name: str
    argv: tuple[str, ...]
    ready: Callable[[], bool]
    """Whether it answers requests; called often, so it must be fast."""
    stage: int
    """Programs are stopped stage by stage, lowest first; those of one stage together."""
    grace_s: float
    """Seconds from SIGTERM to SIGKILL."""


@dataclass(frozen=True)
class Session:
    """The process session of a program: itself and every descendant that has not left the session."""

    leader: Identity
    stage: int
    grace_s: float

    def __str__(self) -> str:
        return f"{self.leader} {self.stage} {self.grace_s}"

    @classmethod
    def parse(cls, text: str) -> Session:
        """Read what `str()` wrote. Raises `ValueError` for anything else."""
        leader, stage, grace_s = text.split()
        return cls(Identity.parse(leader), int(stage), float(grace_s))

    def members(self) -> list[psutil.Process]:
        """The session's running processes; the leader itself may have exited."""
        # The kernel does not reuse the leader's pid while any member runs, for it is the session's id.
        # Another process with that pid therefore means that the whole session has ended.
        with contextlib.suppress(psutil.NoSuchProcess):
            if start_time(self.leader.pid) != self.leader.started:
                return []
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
                if os.getsid(process.pid) == self.leader.pid:
                    if process.status() == psutil.STATUS_ZOMBIE:
                        continue
                    found.append(process)
        return found


@dataclass
class _Child:
    program: Program
    process: subprocess.Popen[bytes]
    started: float
    failures: int = 0
    restart_at: float | None = None


@dataclass
class ProgramSupervisor:
    """Starts programs, restarts those that exit, and stops all of them, stage by stage.

    For one thread. `say` receives a sentence for the operator when a program exits.
    """

    log_dir: Path
    env: Mapping[str, str]
    say: Callable[[str], None]
    _children: dict[str, _Child] = field(default_factory=dict)
    _sessions: list[Session] = field(default_factory=list)
    _reaper: subprocess.Popen[bytes] | None = None

    def start(self, program: Program) -> None:
        """Start a program. Raises `PlatformError` if it cannot be executed."""
        if self._reaper is None:
            self._reaper = self._start_reaper()
        self.log_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
        log = self.log_path(program.name)
        self._rotate_log(log)
        try:
            with log.open("ab") as out:
                process = subprocess.Popen(  # noqa: S603
                    program.argv,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=dict(self.env),
                    start_new_session=True,
                )
        except OSError as error:
            raise PlatformError(
                f"{program.name} could not be started: {program.argv[0]}: {error.strerror}."
                " Run `make install` again."
            ) from None
        self._register(program, process.pid)
        previous = self._children.get(program.name)
        failures = previous.failures if previous else 0
        self._children[program.name] = _Child(program, process, time.monotonic(), failures)

    def log_path(self, name: str) -> Path:
        """The file that a program's output is appended to."""
        return self.log_dir / f"{name}.log"

    def ready(self, name: str) -> bool:
        """Whether the program runs and answers requests."""
        child = self._children[name]
        return child.process.poll() is None and child.program.ready()

    def ended(self, name: str) -> int | None:
        """The exit status of a program that is not running at the moment, else None."""
        return self._children[name].process.poll()

    def watch(self) -> None:
        """Restart exited programs whose back-off is over, and rotate long logs. Call it about once a second."""
        now = time.monotonic()
        for child in list(self._children.values()):
            name = child.program.name
            self._rotate_log(self.log_path(name))
            status = child.process.poll()
            if status is None:
                continue
            if child.restart_at is None:
                steady = now - child.started >= STEADY_S
                child.failures = 1 if steady else child.failures + 1
                wait = backoff.wait_s(child.failures, BACKOFF_S, BACKOFF_LIMIT_S)
                child.restart_at = now + wait
                self.say(
                    f"{name} ended ({describe_exit(status)}); it starts again in {wait:g} s."
                    f" Its log: {self.log_path(name)}"
                )
            elif now >= child.restart_at:
                self.start(child.program)

    def end(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """Stop every program, stage by stage, as `end_stages` does, and the orphan reaper last."""
        end_stages(self._sessions, hurry)
        for child in self._children.values():
            child.process.wait()
        self._dismiss_reaper()

    def _register(self, program: Program, pid: int) -> None:
        try:
            leader = Identity.of(pid)
        except psutil.NoSuchProcess:
            return  # it has exited already, too early to have started a process that outlives it
        session = Session(leader, program.stage, program.grace_s)
        self._sessions.append(session)
        self._send_to_reaper(str(session))

    def _start_reaper(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "kalshi_platform.processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _send_to_reaper(self, line: str) -> None:
        if self._reaper is not None and self._reaper.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # a killed reaper must not stop the programs
                self._reaper.stdin.write(f"{line}\n".encode())
                self._reaper.stdin.flush()

    def _dismiss_reaper(self) -> None:
        if self._reaper is not None and self._reaper.stdin is not None:
            self._send_to_reaper(DONE)
            with contextlib.suppress(BrokenPipeError):
                self._reaper.stdin.close()
            self._reaper.wait()
            self._reaper = None

    @staticmethod
    def _rotate_log(log: Path) -> None:
        """Copy and truncate a long log; a rename would not do, for the program keeps the file open."""
        with contextlib.suppress(FileNotFoundError):
            if log.stat().st_size > LOG_LIMIT:
                rotated = log.with_suffix(".log.1")
                rotated.write_bytes(log.read_bytes())
                os.truncate(log, 0)


def describe_exit(status: int) -> str:
    """An exit status for people: `exit 1`, `killed by SIGKILL`."""
    if status >= 0:
        return f"exit {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def exit_now(status: int | str | None) -> NoReturn:
    """End this process at once, with the status that `sys.exit` would give it.

    Flushes logs and standard streams, but joins no thread and runs no exit handler: tearing down a native
    library while one of its threads still works aborts the process and loses the exit status.
    """
    if isinstance(status, str):
        sys.stderr.write(f"{status}\n")
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or without a reader
            stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def end_stages(sessions: Iterable[Session], hurry: Callable[[], bool] = lambda: False) -> None:
    """End every process of these sessions, stage by stage.

    The processes of a stage receive SIGTERM together; those still running after the stage's longest grace
    period, or as soon as `hurry()` is true, receive SIGKILL.
    """
    remaining = list(sessions)
    for stage in sorted({session.stage for session in remaining}):
        _end([session for session in remaining if session.stage == stage], hurry)


def _end(sessions: Sequence[Session], hurry: Callable[[], bool]) -> None:
    _signal(_running(sessions), signal.SIGTERM)
    deadline = time.monotonic() + max(session.grace_s for session in sessions)
    while _running(sessions) and time.monotonic() < deadline and not hurry():
        time.sleep(0.05)
    while left := _running(sessions):
        _signal(left, signal.SIGKILL)
        time.sleep(0.02)


def _running(sessions: Sequence[Session]) -> list[psutil.Process]:
    return [process for session in sessions for process in session.members()]


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def reap(lines: Iterable[str]) -> None:
    """Orphan reaper: read sessions, one a line; at the end of input, end them.

    The line `done` means that the supervisor has ended them itself.
    """
    sessions = []
    for line in lines:
        if line.strip() == DONE:
            return
        sessions.append(Session.parse(line))
    end_stages(sessions)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # it must outlive the supervisor
    reap(sys.stdin)

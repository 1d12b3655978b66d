"""Processes: who they are, programs kept running, and an end that leaves none behind.

A process is its pid and its birth together; a pid alone may already be somebody else's. Births are told
apart without the wall clock: setting it must make no living process look like a stranger.
Knows nothing of what the programs do: `commands/up.py` says which, `orchestration` asks who lives.

Each program leads a session of its own, so that Ctrl-C in the terminal reaches only its keeper,
who ends them in order, and so that grandchildren are found by their session even when their
parent is gone. A keeper that dies without a word (`kill -9`) is followed by its *undertaker*:
`python -m kalshi_platform.processes`, which reads from the keeper's pipe which sessions there are
and, when the pipe breaks, ends them in the same order. (PR_SET_PDEATHSIG would reach direct
children only, on Linux only, and in no order.)
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

from kalshi_platform.errors import PlatformError

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_START_TIME = 19
"""Which of the words behind the name in /proc/<pid>/stat is the start, in ticks since boot; proc(5)."""

BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Waits before the first, second, … restart in a row; the last one repeats."""
STEADY_S = 60.0
"""A program that ran this long and then ended starts again at the shortest wait."""
LOG_LIMIT = 20 * 1024 * 1024
"""Bytes of one log file before it is moved aside; one former file is kept."""


DONE = "done"
"""The keeper's last word to the undertaker: everything has been ended in order."""


class PortTaken(PlatformError):
    """Another program listens where one of ours must."""


@dataclass(frozen=True)
class Identity:
    """One process, for good."""

    pid: int
    started: float
    """Its `birth`."""

    def __str__(self) -> str:
        return f"{self.pid}@{self.started!r}"

    @classmethod
    def parse(cls, text: str) -> Identity:
        """Read what `str()` wrote. Raises `ValueError` for anything else."""
        pid, _, started = text.partition("@")
        return cls(int(pid), float(started))

    @classmethod
    def own(cls) -> Identity:
        """This very process."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Identity:
        """Whoever has this pid now. Raises `psutil.NoSuchProcess` where nobody has."""
        return cls(pid, birth(pid))

    def find(self) -> psutil.Process | None:
        """The living process, or None: gone, a zombie, or its pid is somebody else's now."""
        try:
            process = psutil.Process(self.pid)
            if birth(self.pid) != self.started:
                return None
            return None if process.status() == psutil.STATUS_ZOMBIE else process
        except psutil.NoSuchProcess:
            return None

    @property
    def alive(self) -> bool:
        """Whether this process still runs."""
        return self.find() is not None

    def send(self, number: signal.Signals) -> bool:
        """Send a signal to this process and to no other; False when it is gone."""
        process = self.find()
        if process is None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
            return True
        return False


def birth(pid: int) -> float:
    """When the process with this pid began, in seconds that no setting of the clock changes.

    On Linux since its boot, from an origin that is each boot's own (its id), so that nobody is taken for
    one of the boot before; elsewhere the kernel's own time of the start, since the epoch. Raises
    `psutil.NoSuchProcess` where there is none.
    """
    if sys.platform != "linux":
        return psutil.Process(pid).create_time()
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        raise psutil.NoSuchProcess(pid) from None
    ticks = int(stat.rpartition(b")")[2].split()[_START_TIME])
    return _origin() + ticks / os.sysconf("SC_CLK_TCK")


@functools.cache
def _origin() -> float:
    try:
        return float(int(_BOOT_ID.read_text()[:8], 16))
    except FileNotFoundError:
        return 0.0  # some sandboxes have none: there the ticks alone tell boots apart


def require_free_port(port: int, purpose: str, remedy: str) -> None:
    """Raise `PortTaken` when something listens on 127.0.0.1:`port`."""
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
        pass  # other people's sockets may be nobody's business; the port is taken all the same
    return ""


@dataclass(frozen=True)
class Program:
    """A program to keep running."""

    name: str
    argv: tuple[str, ...]
    ready: Callable[[], bool]
    """Whether it answers; asked often, so it must be quick."""
    stage: int
    """Programs end stage by stage, lowest first; within a stage all at once."""
    grace_s: float
    """How long it may take to end when asked to, before it is killed."""


@dataclass(frozen=True)
class Session:
    """The processes that a program's start brought to life, found by their session's leader."""

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
        """Its living processes; the leader itself may be gone."""
        # While any member lives the leader's pid stays taken as the session's id. A stranger
        # with that pid means that all of them have ended and the number was handed on.
        with contextlib.suppress(psutil.NoSuchProcess):
            if birth(self.leader.pid) != self.leader.started:
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
    """Starts programs, starts them again when they end, and ends them all, stage by stage.

    For one thread. `say` gets a sentence for each thing that a person should know.
    """

    log_dir: Path
    env: Mapping[str, str]
    say: Callable[[str], None]
    _children: dict[str, _Child] = field(default_factory=dict)
    _sessions: list[Session] = field(default_factory=list)
    _undertaker: subprocess.Popen[bytes] | None = None

    def start(self, program: Program) -> None:
        """Start a program. Raises `PlatformError` when it cannot even be executed."""
        if self._undertaker is None:
            self._undertaker = self._start_undertaker()
        self.log_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
        log = self.log_path(program.name)
        self._turn_log(log)
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
        known = self._children.get(program.name)
        failures = known.failures if known else 0
        self._children[program.name] = _Child(program, process, time.monotonic(), failures)

    def log_path(self, name: str) -> Path:
        """Where a program's output goes."""
        return self.log_dir / f"{name}.log"

    def ready(self, name: str) -> bool:
        """Whether the program runs and answers."""
        child = self._children[name]
        return child.process.poll() is None and child.program.ready()

    def ended(self, name: str) -> int | None:
        """The exit status of a program that is not running at the moment, else None."""
        return self._children[name].process.poll()

    def watch(self) -> None:
        """One round: start again what has ended and waited long enough; turn long logs."""
        now = time.monotonic()
        for child in list(self._children.values()):
            name = child.program.name
            self._turn_log(self.log_path(name))
            status = child.process.poll()
            if status is None:
                continue
            if child.restart_at is None:
                steady = now - child.started >= STEADY_S
                child.failures = 1 if steady else child.failures + 1
                wait = BACKOFF_S[min(child.failures, len(BACKOFF_S)) - 1]
                child.restart_at = now + wait
                self.say(
                    f"{name} ended ({exit_words(status)}); it starts again in {wait:.0f} s."
                    f" Its log: {self.log_path(name)}"
                )
            elif now >= child.restart_at:
                self.start(child.program)

    def end(self, hurry: Callable[[], bool] = lambda: False) -> None:
        """End everything, stage by stage: politely, then by force; as `end_stages`."""
        end_stages(self._sessions, hurry)
        for child in self._children.values():
            child.process.wait()
        self._dismiss_undertaker()

    def _register(self, program: Program, pid: int) -> None:
        try:
            leader = Identity.of(pid)
        except psutil.NoSuchProcess:
            return  # it has ended already, and a process of its that stayed would be its first
        session = Session(leader, program.stage, program.grace_s)
        self._sessions.append(session)
        self._tell_undertaker(str(session))

    def _start_undertaker(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "kalshi_platform.processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _tell_undertaker(self, line: str) -> None:
        if self._undertaker is not None and self._undertaker.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # somebody killed it; the work goes on
                self._undertaker.stdin.write(f"{line}\n".encode())
                self._undertaker.stdin.flush()

    def _dismiss_undertaker(self) -> None:
        if self._undertaker is not None and self._undertaker.stdin is not None:
            self._tell_undertaker(DONE)
            with contextlib.suppress(BrokenPipeError):
                self._undertaker.stdin.close()
            self._undertaker.wait()
            self._undertaker = None

    @staticmethod
    def _turn_log(log: Path) -> None:
        """Move a long log aside. Its writer keeps the file open for appending, hence the copy."""
        with contextlib.suppress(FileNotFoundError):
            if log.stat().st_size > LOG_LIMIT:
                former = log.with_suffix(".log.1")
                former.write_bytes(log.read_bytes())
                os.truncate(log, 0)


def exit_words(status: int) -> str:
    """An exit status in words: `exit 1`, `killed by SIGKILL`."""
    if status >= 0:
        return f"exit {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def leave(status: int | str | None) -> NoReturn:
    """End this process at once, with the status that `sys.exit` would give it.

    What was logged and printed is written first. No thread is waited for and nothing of a library is
    taken down: where one of its threads is still at work, that ends in an abort, whatever was achieved.
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

    All of a stage get SIGTERM; who is left after the stage's longest grace, or as soon as
    `hurry` says so, gets SIGKILL.
    """
    every = list(sessions)
    for stage in sorted({session.stage for session in every}):
        _end([session for session in every if session.stage == stage], hurry)


def _end(sessions: Sequence[Session], hurry: Callable[[], bool]) -> None:
    _signal(_living(sessions), signal.SIGTERM)
    deadline = time.monotonic() + max(session.grace_s for session in sessions)
    while _living(sessions) and time.monotonic() < deadline and not hurry():
        time.sleep(0.05)
    while left := _living(sessions):
        _signal(left, signal.SIGKILL)
        time.sleep(0.02)


def _living(sessions: Sequence[Session]) -> list[psutil.Process]:
    return [process for session in sessions for process in session.members()]


def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def reap(lines: Iterable[str]) -> None:
    """The undertaker's whole life: note sessions until the keeper is gone, then end them.

    Each line is a `Session`; `done` means that the keeper has ended them himself.
    """
    sessions = []
    for line in lines:
        if line.strip() == DONE:
            return
        sessions.append(Session.parse(line))
    end_stages(sessions)


if __name__ == "__main__":
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)  # it ends when its keeper does, not before
    reap(sys.stdin)

"""Programs are restarted, stopped in order, and never outlive their supervisor."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from kalshi_platform.errors import PlatformError
from kalshi_platform.processes import (
    LOG_LIMIT,
    Identity,
    PortTaken,
    Program,
    ProgramSupervisor,
    Session,
    describe_exit,
    require_free_port,
)

PARENT_OF_A_DAEMON = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print(child.pid, flush=True)
time.sleep(300)
"""
DEAF = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(300)
"""
LAST_WORDS = """
import signal, sys, time
def end(*_):
    with open(sys.argv[1], "a") as log:
        log.write(sys.argv[2] + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(300)
"""


def program(name: str, script: str, *args: str, stage: int = 0, grace_s: float = 60.0) -> Program:
    return Program(name, (sys.executable, "-c", script, *args), lambda: True, stage, grace_s)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def gone(process: psutil.Process) -> bool:
    """Whether a process has exited; its parent may not have collected the status yet."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def supervisor(tmp_path: Path, messages: list[str]) -> Iterator[ProgramSupervisor]:
    made = ProgramSupervisor(tmp_path / "logs", os.environ, messages.append)
    yield made
    made.end(lambda: True)


def output(supervisor: ProgramSupervisor, name: str) -> str:
    path = supervisor.log_path(name)
    return path.read_text() if path.exists() else ""


def test_a_program_that_exits_is_restarted_and_reported(
    supervisor: ProgramSupervisor, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kalshi_platform.processes.BACKOFF_S", 0.05)
    supervisor.start(program("short", "print('here', flush=True); raise SystemExit(3)"))

    def started_three_times() -> bool:
        supervisor.watch()
        return output(supervisor, "short").count("here") >= 3

    until(started_three_times)
    assert messages[0].startswith("short ended (exit 3); it starts again in")
    assert str(supervisor.log_path("short")) in messages[0]


def test_the_restart_delay_grows_with_each_exit(
    supervisor: ProgramSupervisor, messages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kalshi_platform.processes.BACKOFF_S", 0.5)
    supervisor.start(program("short", "raise SystemExit(1)"))

    def restarted_thrice() -> bool:
        supervisor.watch()
        return len(messages) == 3

    until(restarted_thrice)
    waits = [float(message.split("again in ")[1].split(" s")[0]) for message in messages]
    assert waits == [0.5, 1, 2]


def test_stopping_reaches_grandchildren_whose_parent_has_exited(
    supervisor: ProgramSupervisor,
) -> None:
    supervisor.start(program("parent", PARENT_OF_A_DAEMON))
    until(lambda: output(supervisor, "parent").strip().isdigit())
    grandchild = psutil.Process(int(output(supervisor, "parent")))
    parent = grandchild.parent()
    assert parent is not None
    parent.kill()
    until(lambda: supervisor.ended("parent") is not None)
    assert grandchild.is_running()
    supervisor.end()
    assert gone(grandchild)


def test_programs_are_stopped_stage_by_stage(supervisor: ProgramSupervisor, tmp_path: Path) -> None:
    log = tmp_path / "order"
    for name, stage in [("database", 2), ("exchange", 1), ("streamer", 0)]:
        supervisor.start(program(name, LAST_WORDS, str(log), name, stage=stage))
    for name in ("database", "exchange", "streamer"):
        until(lambda name=name: "ready" in output(supervisor, name))  # type: ignore[misc]
    supervisor.end()
    assert log.read_text().split() == ["streamer", "exchange", "database"]


def test_a_program_that_ignores_sigterm_is_killed_after_its_grace(
    supervisor: ProgramSupervisor,
) -> None:
    supervisor.start(program("deaf", DEAF, grace_s=0.2))
    until(lambda: "deaf" in output(supervisor, "deaf"))
    supervisor.end()
    assert supervisor.ended("deaf") == -signal.SIGKILL


def test_in_a_hurry_programs_are_killed_at_once(supervisor: ProgramSupervisor) -> None:
    supervisor.start(program("deaf", DEAF, grace_s=3600))
    until(lambda: "deaf" in output(supervisor, "deaf"))
    supervisor.end(lambda: True)
    assert supervisor.ended("deaf") == -signal.SIGKILL


SUPERVISOR = """
import os, sys, time
from pathlib import Path
from kalshi_platform.processes import Program, ProgramSupervisor
supervisor = ProgramSupervisor(Path(sys.argv[1]), os.environ, print)
for stage, name in enumerate(["first", "second"]):
    argv = (sys.executable, "-c", sys.argv[2], sys.argv[3], name)
    supervisor.start(Program(name, argv, lambda: True, stage, 60.0))
time.sleep(300)
"""


def test_the_reaper_ends_programs_of_a_killed_supervisor_in_order(
    tmp_path: Path,
) -> None:
    order = tmp_path / "order"
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(tmp_path), LAST_WORDS, str(order)]
    )
    family: list[psutil.Process] = []

    def all_ready() -> bool:
        logs = [tmp_path / "first.log", tmp_path / "second.log"]
        return all(log.exists() and "ready" in log.read_text() for log in logs)

    until(all_ready)
    family = psutil.Process(supervisor.pid).children(recursive=True)
    assert len(family) == 3  # two programs and the orphan reaper
    supervisor.kill()
    supervisor.wait()
    until(lambda: all(gone(process) for process in family))
    assert order.read_text().split() == ["first", "second"]


def test_a_reused_pid_is_neither_found_nor_signalled() -> None:
    stranger = Identity(os.getpid(), Identity.own().started - 100)
    assert not stranger.alive
    assert stranger.send(signal.SIGKILL) is False
    assert Session(stranger, 0, 1.0).members() == []


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the kernel keeps the time of a start"
)
def test_setting_the_clock_does_not_change_an_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True
    )
    identity = Identity.of(child.pid)
    # the kernel's boot time is the wall clock less the time since: setting the clock moves it
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 1_000_000.0)
    assert psutil.Process(child.pid).create_time() < 1_000_000_000
    assert identity.alive
    assert Identity.parse(str(identity)) == Identity.of(child.pid)
    assert [process.pid for process in Session(identity, 0, 1.0).members()] == [child.pid]
    assert identity.send(signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    identity = Identity.of(child.pid)
    until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    assert not identity.alive
    child.wait()


def test_identities_and_sessions_round_trip_as_text() -> None:
    own = Identity.own()
    again = Identity.parse(str(own))
    assert again == own
    assert again.alive
    session = Session(again, 2, 2.5)
    assert Session.parse(str(session)) == session
    with pytest.raises(ValueError, match="invalid literal"):
        Identity.parse("no pid")


def test_a_taken_port_is_named_with_its_remedy() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"Port {port}, needed for the test, .* Set X\."):
            require_free_port(port, "the test", "Set X.")
    require_free_port(port, "the test", "Set X.")


def test_a_program_that_cannot_be_executed_is_named(supervisor: ProgramSupervisor) -> None:
    absent = Program("absent", ("/nowhere/absent",), lambda: True, 0, 1.0)
    with pytest.raises(PlatformError, match="absent could not be started: /nowhere/absent"):
        supervisor.start(absent)


def test_a_long_log_is_moved_aside_and_its_writer_goes_on(supervisor: ProgramSupervisor) -> None:
    script = "import sys, time; print('old', flush=True); input; time.sleep(300)"
    supervisor.start(program("talker", script))
    until(lambda: "old" in output(supervisor, "talker"))
    log = supervisor.log_path("talker")
    with log.open("ab") as more:
        more.truncate(LOG_LIMIT + 1)
    supervisor.watch()
    assert log.stat().st_size == 0
    assert log.with_suffix(".log.1").stat().st_size == LOG_LIMIT + 1


def test_exit_statuses_are_described() -> None:
    assert describe_exit(1) == "exit 1"
    assert describe_exit(-9) == "killed by SIGKILL"

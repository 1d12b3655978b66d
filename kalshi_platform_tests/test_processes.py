"""Programs are kept running, ended in order, and never outlive their keeper."""

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
    exit_words,
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
    """Ended; whether somebody has collected its exit status is not its business."""
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def keeper(tmp_path: Path, said: list[str]) -> Iterator[ProgramSupervisor]:
    made = ProgramSupervisor(tmp_path / "logs", os.environ, said.append)
    yield made
    made.end(lambda: True)


def output(keeper: ProgramSupervisor, name: str) -> str:
    path = keeper.log_path(name)
    return path.read_text() if path.exists() else ""


def test_a_program_that_ends_is_started_again_and_that_is_said(
    keeper: ProgramSupervisor, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kalshi_platform.processes.BACKOFF_S", (0.05,))
    keeper.start(program("short", "print('here', flush=True); raise SystemExit(3)"))

    def started_three_times() -> bool:
        keeper.watch()
        return output(keeper, "short").count("here") >= 3

    until(started_three_times)
    assert said[0].startswith("short ended (exit 3); it starts again in")
    assert str(keeper.log_path("short")) in said[0]


def test_the_waits_grow_with_each_end_in_a_row(
    keeper: ProgramSupervisor, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kalshi_platform.processes.BACKOFF_S", (0.0, 2.0, 4.0))
    keeper.start(program("short", "raise SystemExit(1)"))

    def said_twice() -> bool:
        keeper.watch()
        return len(said) == 2

    until(said_twice)
    assert "again in 0 s" in said[0]
    assert "again in 2 s" in said[1]


def test_the_end_reaches_grandchildren_whose_parent_is_gone(keeper: ProgramSupervisor) -> None:
    keeper.start(program("parent", PARENT_OF_A_DAEMON))
    until(lambda: output(keeper, "parent").strip().isdigit())
    grandchild = psutil.Process(int(output(keeper, "parent")))
    parent = grandchild.parent()
    assert parent is not None
    parent.kill()
    until(lambda: keeper.ended("parent") is not None)
    assert grandchild.is_running()
    keeper.end()
    assert gone(grandchild)


def test_programs_end_stage_by_stage(keeper: ProgramSupervisor, tmp_path: Path) -> None:
    log = tmp_path / "order"
    for name, stage in [("database", 2), ("exchange", 1), ("streamer", 0)]:
        keeper.start(program(name, LAST_WORDS, str(log), name, stage=stage))
    for name in ("database", "exchange", "streamer"):
        until(lambda name=name: "ready" in output(keeper, name))  # type: ignore[misc]
    keeper.end()
    assert log.read_text().split() == ["streamer", "exchange", "database"]


def test_who_does_not_listen_is_killed_after_the_grace_or_in_a_hurry(
    keeper: ProgramSupervisor,
) -> None:
    keeper.start(program("deaf", DEAF, grace_s=0.2))
    until(lambda: "deaf" in output(keeper, "deaf"))
    keeper.end()
    assert keeper.ended("deaf") == -signal.SIGKILL


def test_in_a_hurry_nobody_is_waited_for(keeper: ProgramSupervisor) -> None:
    keeper.start(program("deaf", DEAF, grace_s=3600))
    until(lambda: "deaf" in output(keeper, "deaf"))
    keeper.end(lambda: True)
    assert keeper.ended("deaf") == -signal.SIGKILL


KEEPER = """
import os, sys, time
from pathlib import Path
from kalshi_platform.processes import Program, ProgramSupervisor
keeper = ProgramSupervisor(Path(sys.argv[1]), os.environ, print)
for stage, name in enumerate(["first", "second"]):
    argv = (sys.executable, "-c", sys.argv[2], sys.argv[3], name)
    keeper.start(Program(name, argv, lambda: True, stage, 60.0))
time.sleep(300)
"""


def test_a_keeper_killed_without_a_word_leaves_nobody_and_they_end_in_order(
    tmp_path: Path,
) -> None:
    order = tmp_path / "order"
    keeper = subprocess.Popen([sys.executable, "-c", KEEPER, str(tmp_path), LAST_WORDS, str(order)])
    family: list[psutil.Process] = []

    def all_there() -> bool:
        logs = [tmp_path / "first.log", tmp_path / "second.log"]
        return all(log.exists() and "ready" in log.read_text() for log in logs)

    until(all_there)
    family = psutil.Process(keeper.pid).children(recursive=True)
    assert len(family) == 3  # two programs and the undertaker
    keeper.kill()
    keeper.wait()
    until(lambda: all(gone(process) for process in family))
    assert order.read_text().split() == ["first", "second"]


def test_a_pid_that_is_somebody_elses_now_is_neither_found_nor_signalled() -> None:
    stranger = Identity(os.getpid(), Identity.own().started - 100)
    assert not stranger.alive
    assert stranger.send(signal.SIGKILL) is False
    assert Session(stranger, 0, 1.0).members() == []


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere the kernel keeps the time of a start"
)
def test_a_clock_that_is_set_makes_no_process_a_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True
    )
    identity = Identity.of(child.pid)
    # the kernel's boot time is the wall clock less the time since: setting the clock moves it
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: 1_000_000.0)
    assert psutil.Process(child.pid).create_time() < 1_000_000_000
    assert identity.alive
    assert Identity.parse(str(identity)) == Identity.of(child.pid)
    assert [each.pid for each in Session(identity, 0, 1.0).members()] == [child.pid]
    assert identity.send(signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM


def test_a_zombie_is_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    identity = Identity.of(child.pid)
    until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE)
    assert not identity.alive
    child.wait()


def test_identities_and_sessions_are_read_back_as_they_were_written() -> None:
    own = Identity.own()
    again = Identity.parse(str(own))
    assert again == own
    assert again.alive
    session = Session(again, 2, 2.5)
    assert Session.parse(str(session)) == session
    with pytest.raises(ValueError, match="invalid literal"):
        Identity.parse("nobody")


def test_a_taken_port_is_named_with_its_remedy() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"Port {port}, needed for the test, .* Set X\."):
            require_free_port(port, "the test", "Set X.")
    require_free_port(port, "the test", "Set X.")


def test_a_program_that_cannot_be_executed_is_named(keeper: ProgramSupervisor) -> None:
    absent = Program("absent", ("/nowhere/absent",), lambda: True, 0, 1.0)
    with pytest.raises(PlatformError, match="absent could not be started: /nowhere/absent"):
        keeper.start(absent)


def test_a_long_log_is_moved_aside_and_its_writer_goes_on(keeper: ProgramSupervisor) -> None:
    script = "import sys, time; print('old', flush=True); input; time.sleep(300)"
    keeper.start(program("talker", script))
    until(lambda: "old" in output(keeper, "talker"))
    log = keeper.log_path("talker")
    with log.open("ab") as more:
        more.truncate(LOG_LIMIT + 1)
    keeper.watch()
    assert log.stat().st_size == 0
    assert log.with_suffix(".log.1").stat().st_size == LOG_LIMIT + 1


def test_exit_statuses_are_said_in_words() -> None:
    assert exit_words(1) == "exit 1"
    assert exit_words(-9) == "killed by SIGKILL"

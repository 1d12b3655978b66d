"""The kernel keeps the engine's process from programs, other processes, files and hosts."""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.embedded_clickhouse import confinement, running, system_calls
from kalshi_platform.embedded_clickhouse.system_calls import AARCH64, X86_64, Architecture

ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="seccomp and Landlock are Linux's")
ALLOWED, REFUSED, MISSING = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
PROCESS = 4711


def run(code: bytes, audit: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """Interpret the filter's instructions as the kernel's BPF machine does."""
    data = struct.pack(
        "IIQ6Q", number, audit, 0, *(arguments + (0,) * 6)[:6]
    )  # struct seccomp_data
    steps = list(struct.iter_unpack("HBBI", code))
    position = accumulator = 0
    while True:
        operation, if_true, if_false, operand = steps[position]
        position += 1
        match operation:
            case 0x20:
                (accumulator,) = struct.unpack_from("I", data, operand)
            case 0x06:
                return int(operand)
            case _:
                true = {
                    0x15: accumulator == operand,
                    0x25: accumulator > operand,
                    0x45: bool(accumulator & operand),
                }[operation]
                position += if_true if true else if_false


BOTH = pytest.mark.parametrize("own", [X86_64, AARCH64], ids=["x86_64", "aarch64"])


@BOTH
@pytest.mark.parametrize("network", [True, False])
def test_the_filter_refuses_what_leaves_the_process(own: Architecture, network: bool) -> None:
    code = system_calls.program(own, process=PROCESS, network=network)

    def answer(name: str, *arguments: int) -> int:
        return run(code, own.audit, own.numbers[name], arguments)

    for name in own.numbers:
        if name not in {"clone", "clone3", "kill", "tgkill", "socket", "connect"}:
            assert answer(name) == REFUSED, name
    assert answer("clone3") == MISSING
    assert answer("clone", 0x00010000 | 0x100) == ALLOWED  # a thread
    assert answer("clone", 17) == REFUSED  # a process
    for name in ("kill", "tgkill"):
        assert answer(name, PROCESS) == ALLOWED
        for other in (PROCESS + 1, 1, 0, 0xFFFFFFFF):
            assert answer(name, other) == REFUSED
    internet = ALLOWED if network else REFUSED
    assert answer("connect") == internet
    for family in (int(socket.AF_INET), int(socket.AF_INET6)):
        assert answer("socket", family) == internet
    for family in (int(socket.AF_UNIX), 16, 17, 40):  # netlink, packet, vsock
        assert answer("socket", family) == REFUSED


@BOTH
@given(number=st.integers(0, 2**32 - 1), audit=st.integers(0, 2**32 - 1))
def test_calls_of_other_machines_and_unknown_ones_do_not_pass(
    own: Architecture, number: int, audit: int
) -> None:
    code = system_calls.program(own, process=PROCESS, network=True)
    if audit != own.audit:
        assert run(code, audit, number) == REFUSED
    if number > 462:  # among them x32's, which have bit 30 set
        assert run(code, own.audit, number) == MISSING


@BOTH
def test_every_call_that_is_named_has_a_number(own: Architecture) -> None:
    missing = {name for name in system_calls._REFUSED if name not in own.numbers}
    assert missing == ({"fork", "vfork"} if own is AARCH64 else set())
    assert len(set(own.numbers.values())) == len(own.numbers)
    assert all(0 < number <= 462 for number in own.numbers.values())


LEAVES = (
    *("execve", "subprocess", "posix_spawn", "fork", "signal another", "read a file"),
    *("read the environment", "write beside", "connect to another port", "a local socket"),
    *("listen", "SQL: read a file", "SQL: a table of the internet", "SQL: a program"),
)
STAYS = (
    *("a thread", "signal itself", "keep listening", "a pair of sockets"),
    *("write and rename", "SQL"),
)


@pytest.fixture(scope="module", params=["no object store", "an object store"])
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Mapping[str, str], bool]]:
    """The results of a confined process's attempts, and whether a port was open to it."""
    folder = tmp_path_factory.mktemp("confined") / "data"
    folder.mkdir()
    with (
        socket.create_server(("127.0.0.1", 0)) as store,
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        ports = [store.getsockname()[1], other.getsockname()[1]]
        opened = ports[:1] if request.param == "an object store" else []
        done = subprocess.run(
            [sys.executable, "-m", f"{__package__}.confined", str(folder)]
            + [str(port) for port in [*ports, *opened]],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        yield json.loads(done.stdout), bool(opened)


@ON_LINUX
@pytest.mark.parametrize("attempt", LEAVES)
def test_nothing_leaves_a_confined_process(
    outcomes: tuple[Mapping[str, str], bool], attempt: str
) -> None:
    assert outcomes[0][attempt] in {"PermissionError", "ChdbError"}


@ON_LINUX
@pytest.mark.parametrize("attempt", STAYS)
def test_a_confined_process_does_its_work(
    outcomes: tuple[Mapping[str, str], bool], attempt: str
) -> None:
    assert outcomes[0][attempt] == "done"


@ON_LINUX
def test_only_the_object_stores_port_is_reached(
    outcomes: tuple[Mapping[str, str], bool],
) -> None:
    results, open_to_it = outcomes
    assert results["connect"] == ("done" if open_to_it else "PermissionError")


def test_what_the_system_cannot_do_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    confinement.confine(tmp_path)
    monkeypatch.setattr(sys, "platform", "linux")

    def unsupported(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSYS, "this kernel has none")

    monkeypatch.setattr(confinement, "_restrict_files", unsupported)
    monkeypatch.setattr(system_calls, "restrict", unsupported)
    confinement.confine(tmp_path)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert "does not keep SQL from files, programs and connections" in caplog.text
    assert "does not keep SQL from the files of this user" in caplog.text
    assert "does not keep SQL from programs and connections" in caplog.text


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc")
def test_the_server_inherits_no_environment_and_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALERT_WEBHOOK_URL", "https://hooks.example/s3cret")
    monkeypatch.setenv("TZ", "Europe/Paris")
    (tmp_path / ".env").write_text(
        "ALERT_SLACK_WEBHOOK_URL=https://hooks.example/s3cret-of-a-file\n"
    )
    monkeypatch.chdir(tmp_path)
    left_open = os.open(tmp_path / ".env", os.O_RDONLY)
    os.set_inheritable(left_open, True)
    try:
        with running(tmp_path / "data", password="s3cret-password") as url:
            process = Path("/proc") / str(url.process.pid)
            environment = (process / "environ").read_bytes()
            assert {entry.partition(b"=")[0] for entry in environment.split(b"\0") if entry} <= {
                name.encode() for name in ("LANG", "LC_ALL", "LC_CTYPE", "TZ", "PYTHONPATH")
            }
            assert b"TZ=Europe/Paris" in environment
            assert b"s3cret" not in environment + (process / "cmdline").read_bytes()
            opened = {str(entry.readlink()) for entry in (process / "fd").iterdir()}
            assert str(tmp_path / ".env") not in opened
    finally:
        os.close(left_open)

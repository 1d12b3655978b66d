"""A health report is published whole and at once, whatever its disk does."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kalshi_platform import durable
from kalshi_platform.health import health_report
from kalshi_platform.health.health_report import BLOCK, FILE, Publisher, memory_path, read
from kalshi_platform.processes import Identity
from kalshi_platform_tests.small_disk import fill, small_disk

needs_memory = pytest.mark.skipif(
    not health_report.MEMORY.is_dir(), reason="this system has no /dev/shm: reports are files alone"
)


def report(process: Identity | None = None, **values: Any) -> bytes:
    process = process or Identity.own()
    return json.dumps({"pid": process.pid, "pid_started": process.started, **values}).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A journal's folder; its report in memory is removed after the test."""
    yield tmp_path
    Publisher(tmp_path).withdraw()


def test_there_is_no_report_before_the_first_run(folder: Path) -> None:
    assert read(folder) is None
    assert read(folder / "nowhere") is None


def test_the_file_alone_is_read_also_from_an_earlier_version(folder: Path) -> None:
    (folder / FILE).write_bytes(report(state="stopped"))
    assert (read(folder) or {})["state"] == "stopped"
    Publisher(folder).save(report(state="streaming"))
    assert (read(folder) or {})["state"] == "streaming"


@needs_memory
def test_a_live_memory_copy_has_precedence_over_the_file(folder: Path) -> None:
    publisher = Publisher(folder)
    publisher.save(report(state="streaming"))
    publisher.publish(report(state="blocked"))
    assert (read(folder) or {})["state"] == "blocked"
    publisher.withdraw()
    assert (read(folder) or {})["state"] == "streaming"


@needs_memory
@pytest.mark.parametrize(
    "left",
    [report(Identity(os.getpid(), 1.0), state="blocked"), b"", b"[]", b'{"pid": "x"}'],
    ids=["another process of that id", "empty", "a list", "no number"],
)
def test_a_stale_or_foreign_memory_copy_hides_no_file(folder: Path, left: bytes) -> None:
    Publisher(folder).save(report(state="stopped"))
    memory_path(folder).write_bytes(left)
    assert (read(folder) or {})["state"] == "stopped"


@needs_memory
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's file")
def test_another_users_memory_file_is_neither_read_nor_written(folder: Path) -> None:
    path = memory_path(folder)
    path.write_bytes(report(state="streaming"))
    os.chown(path, 4711, 4711)
    assert read(folder) is None
    twin = path.with_name(f".{path.name}.twin")
    twin.touch()
    os.chown(twin, 4711, 4711)
    with pytest.raises(PermissionError):
        Publisher(folder).publish(report(state="blocked"))
    path.unlink()
    path.symlink_to(folder / "elsewhere")
    assert read(folder) is None


def write_without_pause(folder: Path) -> None:
    publisher = Publisher(folder)
    for n in itertools.count(1):
        publisher.save(report(n=n, text=str(n % 10) * (n % 3000)))


def test_a_reader_finds_a_whole_report_whenever_it_looks(folder: Path) -> None:
    Publisher(folder).save(report(n=0, text=""))
    writer = multiprocessing.get_context("fork").Process(
        target=write_without_pause, args=(folder,), daemon=True
    )
    writer.start()
    try:
        seen = reports = 0
        while reports < 20_000:
            found = read(folder) or {}
            assert found["text"] == str(found["n"] % 10) * (found["n"] % 3000)
            assert found["n"] >= seen
            reports += found["n"] > seen
            seen = found["n"]
    finally:
        writer.kill()
        writer.join()


def test_a_report_that_got_longer_and_shorter_again_is_whole(folder: Path) -> None:
    publisher = Publisher(folder)
    for length in (10, BLOCK * 2, 10, BLOCK - 40, BLOCK + 1, 0):
        publisher.save(report(text="x" * length))
        assert (read(folder) or {})["text"] == "x" * length


def test_a_report_that_a_person_removed_is_written_again(folder: Path) -> None:
    publisher = Publisher(folder)
    for _ in range(2):
        publisher.save(report())
    (folder / FILE).unlink()
    publisher.save(report(n=1))
    assert (read(folder) or {})["n"] == 1


def test_files_are_replaced_if_a_swap_is_unsupported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_offered(one: Path, other: Path) -> None:
        raise OSError(errno.EINVAL, f"{one}, {other}")

    monkeypatch.setattr(durable, "swap", not_offered)
    publisher = Publisher(folder)
    for n in range(3):
        publisher.save(report(n=n))
        assert (read(folder) or {})["n"] == n


def test_a_full_disk_removes_neither_copy(tmp_path: Path) -> None:
    with small_disk(tmp_path, megabytes=4) as disk:
        publisher = Publisher(disk)
        publisher.save(report(n=0))
        fill(disk)
        with pytest.raises(OSError, match="No space"):
            (disk / "other").write_bytes(b"x" * BLOCK)
        for n in range(1, 20):
            publisher.save(report(n=n, state="blocked"))
            assert (read(disk) or {})["n"] == n
        publisher.publish(report(n=20))
        assert (read(disk) or {})["n"] == 20
        publisher.withdraw()


@needs_memory
def test_a_report_is_readable_while_its_process_is_busy(folder: Path) -> None:
    """One thread may hold the streamer's interpreter for seconds, or the process may be suspended."""
    script = """
import re, sys, threading, time
from pathlib import Path
from kalshi_platform.health.health_report import Publisher
from kalshi_platform.processes import Identity
folder, own = Path(sys.argv[1]), Identity.own()
def publish():
    n = 0
    while True:
        n += 1
        text = '{"pid": %d, "pid_started": %r, "n": %d}' % (own.pid, own.started, n)
        Publisher(folder).publish(text.encode())
        time.sleep(0.05)
threading.Thread(target=publish, daemon=True).start()
sys.stdin.readline()
print("held", flush=True)
re.match("(a+)+$", "a" * 40 + "b")  # holds the interpreter for ever
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 60
        while (read(folder) or {}).get("n", 0) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        last = -1
        while (n := (read(folder) or {})["n"]) != last:  # until it is held
            last = n
            time.sleep(0.5)
        began = time.monotonic()
        assert (read(folder) or {})["n"] == last
        assert time.monotonic() - began < 0.5
    finally:
        process.kill()
        process.communicate()
    assert read(folder) is None

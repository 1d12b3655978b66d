"""After any disk fault during writing, every submitted record is read back exactly once."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalshi_platform.journal import reader
from kalshi_platform.journal import writer as writer_module
from kalshi_platform.journal.reader import JournalError
from kalshi_platform.journal.writer import Writer
from kalshi_platform_tests.journal.faulty_disk import CALLS, ERRNOS, SHORT, FaultyDisk
from kalshi_platform_tests.journal.test_reader import CONN, frames

OPEN_FILES = Path("/proc/self/fd")
Faults = dict[tuple[str, int], int]


@pytest.fixture(autouse=True)
def _small_and_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "SEGMENT_BYTES", 2_500)
    monkeypatch.setattr(writer_module, "LARGEST_SEGMENT_BYTES", 6_000)
    monkeypatch.setattr(writer_module, "RETRY_S", 0.001)
    monkeypatch.setattr(writer_module, "CHECK_S", 0.01)


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s:.0f} s for {what}"
        time.sleep(0.002)


def expected(count: int) -> list[bytes]:
    return [b"frame %d" % n for n in range(count)]


faults = st.dictionaries(
    st.tuples(st.sampled_from(CALLS), st.integers(0, 25)),
    st.sampled_from([*ERRNOS, SHORT]),
    max_size=12,
)


@given(
    faults=faults,
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=25),
    cut_after=st.integers(0, 25),
    despite=st.booleans(),
)
@settings(max_examples=150)
def test_each_record_is_read_once_after_any_disk_faults(
    faults: Faults,
    sizes: list[int],
    cut_after: int,
    despite: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    after_cut = tmp_path_factory.mktemp("after")
    first_segment = {("open", 0), ("pwrite", 0), ("fdatasync", 0), ("fsync", 0), ("rename", 0)}
    faulty = FaultyDisk({k: v for k, v in faults.items() if k not in first_segment}, despite)
    writer = Writer(folder, disk=faulty.disk)
    count, durable = 0, 0
    for i, size in enumerate(sizes):
        for _ in range(size):
            writer.append(count, CONN, 1, b"frame %d" % count)
            count += 1
        writer.submit()
        if i % 3:
            assert writer.wait_durable(count, 60)
        if i == cut_after:
            durable = faulty.after_power_cut(folder, after_cut, lambda: writer.durable.n)
    assert writer.wait_durable(count, 60)
    assert writer.failure is None
    assert writer.blocked is None
    writer.close()
    assert frames(folder) == expected(count)
    numbers = [
        block.first_n for block in reader.record_ranges(folder, reader.oldest_offset(folder))
    ]
    assert numbers == sorted(set(numbers))

    if reader.segments(after_cut):
        again = Writer(after_cut)
        kept = again.next_n
        assert kept >= durable
        again.append(0, CONN, 1, b"after")
        again.close()
        assert frames(after_cut) == [*expected(kept), b"after"]


@pytest.mark.parametrize("call", ["open", "pwrite", "fdatasync", "fsync"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EMFILE])
def test_a_disk_that_refuses_the_first_segment_is_reported(
    call: str, code: int, tmp_path: Path
) -> None:
    before = len(list(OPEN_FILES.iterdir()))
    with pytest.raises(JournalError, match=r"No space is left|cannot be written"):
        Writer(tmp_path, disk=FaultyDisk({(call, 0): code}).disk)
    assert len(list(OPEN_FILES.iterdir())) == before
    Writer(tmp_path).close()  # the failed start left nothing that blocks the next


def test_after_a_failed_sync_the_batch_goes_to_another_segment(
    tmp_path: Path,
) -> None:
    faulty = FaultyDisk({("fdatasync", 2): errno.EIO})
    writer = Writer(tmp_path, disk=faulty.disk)
    for n in range(2):
        writer.append(n, CONN, 1, b"frame %d" % n)
        writer.submit()
        assert writer.wait_durable(n + 1, 60)
    assert faulty.spent
    assert reader.segments(tmp_path) == [0, 1]
    writer.close()
    assert frames(tmp_path) == expected(2)


@pytest.mark.parametrize("stuck", [False, True])
def test_a_batch_in_two_segments_is_read_once(stuck: bool, tmp_path: Path) -> None:
    """The failed sync reached the disk and truncation fails; `stuck`: the second segment fails, too."""
    folder, after = tmp_path / "journal", tmp_path / "after"
    after.mkdir()
    stuck_writes = {("pwrite", n): errno.ENOSPC for n in range(4, 10_000)} if stuck else {}
    faulty = FaultyDisk(
        {("fdatasync", 2): errno.EIO, ("ftruncate", 0): errno.EIO} | stuck_writes,
        writes_despite_error=True,
    )
    writer = Writer(folder, disk=faulty.disk)
    writer.append(0, CONN, 1, b"frame 0")
    writer.submit()
    assert writer.wait_durable(1, 60)
    writer.append(1, CONN, 1, b"frame 1")
    writer.submit()
    if stuck:
        wait_for(lambda: ("pwrite", 5) in faulty.met, "the second segment to be full")
    else:
        assert writer.wait_durable(2, 60)
    faulty.after_power_cut(folder, after, lambda: writer.durable.n)
    assert reader.segments(after) == [0, 1]
    assert len(list(reader.whole_batches(reader.segment_path(after, 0)))) == 2
    assert len(list(reader.whole_batches(reader.segment_path(after, 1)))) == (0 if stuck else 1)
    again = Writer(after)
    again.append(2, CONN, 1, b"frame 2")
    again.close()
    assert frames(after) == expected(3)
    faulty.faults = {}
    assert writer.wait_durable(2, 60)
    writer.close()
    assert frames(folder) == expected(2)


def test_without_a_new_file_the_old_segment_continues(tmp_path: Path) -> None:
    faulty = FaultyDisk({("open", n): errno.EMFILE for n in range(1, 10_000)})
    writer = Writer(tmp_path, disk=faulty.disk)
    count = 0
    while writer.durable.offset < writer_module.SEGMENT_BYTES + 500:
        writer.append(count, CONN, 1, b"frame %d" % count)
        writer.submit()
        count += 1
        assert writer.wait_durable(count, 60)
    assert "another file cannot be created" in (writer.trouble or "")
    while "cannot be written" not in (writer.trouble or ""):
        writer.append(count, CONN, 1, b"frame %d" % count)
        writer.submit()
        count += 1
        time.sleep(0.002)
    assert reader.segments(tmp_path) == [0]
    faulty.faults = {}
    assert writer.wait_durable(count, 60)
    assert writer.trouble is None
    writer.close()
    assert frames(tmp_path) == expected(count)
    assert len(reader.segments(tmp_path)) > 1


def test_a_leftover_empty_segment_does_not_end_the_old_one(
    tmp_path: Path,
) -> None:
    faulty = FaultyDisk(
        {("fsync", 1): errno.EIO, ("unlink", 0): errno.EINTR, ("rename", 0): errno.EIO}
        | {("open", n): errno.EMFILE for n in range(3, 20)}
    )
    writer = Writer(tmp_path, disk=faulty.disk)
    for n in range(60):
        writer.append(n, CONN, 1, b"frame %d" % n)
        writer.submit()
        assert writer.wait_durable(n + 1, 60)
    assert faulty.spent
    writer.close()
    assert frames(tmp_path) == expected(60)


def test_a_reused_descriptor_is_never_closed_or_written(tmp_path: Path) -> None:
    """With no free descriptor at the rotation, a closed descriptor's number is reused at once."""
    folder = tmp_path / "journal"
    writer = Writer(folder)
    _, hard = limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    others: list[int] = []
    count = 0

    def more(times: int) -> None:
        nonlocal count
        for _ in range(times):
            writer.append(count, CONN, 1, b"frame %d" % count)
            count += 1
            writer.submit()
            assert writer.wait_durable(count, 60)

    path = tmp_path / "other"
    path.touch()
    try:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (max(int(path.name) for path in OPEN_FILES.iterdir()) + 1, hard)
        )
        while True:
            try:
                others.append(os.open(path, os.O_RDWR | os.O_APPEND))
            except OSError:
                break
        grown = writer_module.SEGMENT_BYTES + 500
        while writer.durable.offset < grown:
            more(1)
        for fd in others:
            os.write(fd, b"x")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    more(20)
    for fd in others:
        os.write(fd, b"x")  # the descriptor is still open
        os.close(fd)
    assert path.stat().st_size == 2 * len(others)
    writer.close()
    assert frames(folder) == expected(count)


def test_writing_resumes_when_inodes_are_free_again(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m,nr_inodes=8", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk")
    try:
        writer = Writer(disk / "journal")
        fillers: list[Path] = []
        try:
            while True:
                fillers.append(disk / str(len(fillers)))
                fillers[-1].touch()
        except OSError as error:
            assert error.errno == errno.ENOSPC
        count = 0
        while writer.trouble is None:
            writer.append(count, CONN, 1, b"frame %d" % count)
            writer.submit()
            count += 1
            time.sleep(0.002)
        assert "inodes" in writer.trouble or "No space" in writer.trouble
        for path in fillers:
            path.unlink(missing_ok=True)
        assert writer.wait_durable(count, 60)
        writer.close()
        assert frames(disk / "journal")[:count] == expected(count)
    finally:
        subprocess.run(["umount", str(disk)], check=True)

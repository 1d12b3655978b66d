"""One writer per journal, even if the lock file, a segment or the folder is removed or replaced."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kalshi_platform.journal import reader
from kalshi_platform.journal.reader import JournalError
from kalshi_platform.journal.writer import Writer
from kalshi_platform_tests.journal.test_reader import CONN, frames, write

flock = fcntl.flock


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalshi_platform.journal.writer.CHECK_S", 0.01)
    monkeypatch.setattr("kalshi_platform.journal.writer.RETRY_S", 0.01)


@pytest.fixture
def on_nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS: only a descriptor open for writing can be locked."""

    def nfs_flock(fd: int, how: int) -> None:
        if how & fcntl.LOCK_EX and stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(fd, how)

    monkeypatch.setattr("kalshi_platform.journal.lock.fcntl.flock", nfs_flock)


def fails(writer: Writer) -> str:
    """Wait for the writer's failure; return its message."""
    deadline = time.monotonic() + 60
    while writer.failure is None:
        assert time.monotonic() < deadline, "the writer detects nothing"
        time.sleep(0.005)
    return str(writer.failure)


def removed(lock: Path) -> None:
    lock.unlink()


def replaced(lock: Path) -> None:
    lock.rename(lock.with_name("old"))
    lock.touch()


def folder_moved(lock: Path) -> None:
    lock.parent.rename(lock.parent.with_name("elsewhere"))


def folder_replaced(lock: Path) -> None:
    folder_moved(lock)
    shutil.copytree(lock.parent.with_name("elsewhere"), lock.parent)


@pytest.mark.parametrize("change", [removed, replaced, folder_moved, folder_replaced])
def test_a_writer_whose_lock_is_gone_fails_and_loses_nothing(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    folder = tmp_path / "journal"
    writer = Writer(folder)
    writer.append(0, CONN, 1, b"frame 0")
    writer.submit()
    assert writer.wait_durable(1, 60)
    change(folder / "lock")
    sentence = fails(writer)
    assert f"{folder}/lock, was removed or replaced" in sentence
    assert writer.trouble == sentence
    writer.append(1, CONN, 1, b"frame 1")
    writer.close()
    elsewhere = tmp_path / "elsewhere"
    assert frames(elsewhere if elsewhere.exists() else folder) == [b"frame 0", b"frame 1"]


@pytest.mark.parametrize("nfs", [False, True])
@pytest.mark.parametrize("change", [removed, replaced])
def test_no_second_writer_starts_without_the_lock_file(
    change: Callable[[Path], None], nfs: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if nfs:
        request.getfixturevalue("on_nfs")
    write(tmp_path, 20)
    writer = Writer(tmp_path)
    change(tmp_path / "lock")
    with pytest.raises(JournalError, match="Another streamer is writing to"):
        Writer(tmp_path)
    writer.append(0, CONN, 1, b"after")
    writer.close()
    assert frames(tmp_path)[-1] == b"after"
    again = Writer(tmp_path)
    assert again.next_n == 21
    again.close()


def test_no_segment_is_begun_without_the_lock(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("kalshi_platform.journal.writer.CHECK_S", 3_600)
    monkeypatch.setattr("kalshi_platform.journal.writer.SEGMENT_BYTES", 1_000)
    writer = Writer(tmp_path)
    count = 0
    while writer.durable.offset < 1_000:
        writer.append(count, CONN, 1, b"frame %d" % count)
        writer.submit()
        count += 1
        assert writer.wait_durable(count, 60)
    assert writer.failure is None
    removed(tmp_path / "lock")
    writer.append(count, CONN, 1, b"frame %d" % count)
    writer.close()
    assert "was removed or replaced" in fails(writer)
    assert reader.segments(tmp_path) == [0]
    assert len(frames(tmp_path)) == count + 1


def test_records_in_a_removed_segment_are_not_durable(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.append(0, CONN, 1, b"gone with the file")
    writer.submit()
    assert writer.wait_durable(1, 60)
    reader.segment_path(tmp_path, 0).unlink()
    writer.append(1, CONN, 1, b"kept")
    writer.submit()
    assert writer.wait_durable(2, 60)
    assert "its records 0 to 0 exist only in the stores" in fails(writer)
    writer.close()
    assert frames(tmp_path) == [b"kept"]


def test_a_removed_folder_is_reported_with_the_loss(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    writer = Writer(folder)
    shutil.rmtree(folder)
    writer.append(0, CONN, 1, b"12345")
    assert "was removed" in fails(writer)
    with pytest.raises(JournalError, match=r"^1 frames \(5 bytes\)"):
        writer.close(timeout_s=0.2)
    assert not folder.exists()


def test_the_segment_of_a_starting_writer_is_not_renamed(tmp_path: Path) -> None:
    """Two writers start at once without a folder lock: one locks the segment, the other is refused."""
    write(tmp_path, 10)
    path = tmp_path / f"{10:020d}.arrows"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    flock(fd, fcntl.LOCK_EX)
    with pytest.raises(JournalError, match="Another streamer is writing to"):
        Writer(tmp_path)
    os.close(fd)
    Writer(tmp_path).close()
    assert len(frames(tmp_path)) == 10


def test_a_segment_with_records_is_never_overwritten(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without any lock: a next segment that already has records stops the writer."""
    monkeypatch.setattr("kalshi_platform.journal.writer.SEGMENT_BYTES", 600)
    folder, other = tmp_path / "journal", tmp_path / "other"
    write(other, 3, batch=1)
    writer = Writer(folder)
    names = [path.name for path in other.glob("*.arrows") if path.name != f"{0:020d}.arrows"]
    for name in names:
        shutil.copy(other / name, folder)
    for n in range(3):
        writer.append(n, CONN, 1, b"frame %d" % n)
        writer.submit()
        assert writer.wait_durable(n + 1, 60)
    assert "has records already: another streamer" in fails(writer)
    writer.close()
    assert names
    assert all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)
    kept = reader.whole_batches(reader.segment_path(folder, 0))
    assert [(batch.n, batch.end_n) for batch in kept] == [(0, 1), (1, 2), (2, 3)]


def test_a_failed_lock_leaves_no_descriptor_open(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(JournalError):
            Writer(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == opened
    writer.close()

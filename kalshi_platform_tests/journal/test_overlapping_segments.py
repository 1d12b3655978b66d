"""Overlapping segments are an error; its remedy loads one segment and names the other's unread records."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalshi_platform.journal import reader
from kalshi_platform.journal.reader import JournalError, LogOffset, RecordRange, UnreadRange
from kalshi_platform.journal.writer import Writer
from kalshi_platform_tests.journal.test_reader import CONN, frames


def fill(writer: Writer, name: bytes, first: int, count: int, batch: int) -> None:
    for n in range(first, first + count):
        writer.append(n, CONN, 1, b"%s %d" % (name, n))
        if (n - first) % batch == batch - 1:
            writer.submit()
            assert writer.wait_durable(n + 1, 60)
    writer.submit()
    assert writer.wait_durable(first + count, 60)


def two_recorders(folder: Path, shared: int, ours: int, theirs: int, batch: int = 7) -> LogOffset:
    """A journal that two recorders wrote to at once, as no lock held; returns the first one's end offset."""
    writer = Writer(folder)
    fill(writer, b"shared", 0, shared, batch)
    other = folder.with_name(f"{folder.name}-other")
    shutil.copytree(folder, other)
    second = Writer(other)
    assert second.next_n == shared
    fill(second, b"theirs", shared, theirs, batch)
    second.close()
    fill(writer, b"ours", shared, ours, batch)
    end = writer.durable
    writer.close()
    shutil.copy(reader.segment_path(other, shared), folder)
    return end


def apply_remedy(folder: Path, error: JournalError) -> None:
    found = re.search(r"rename (\S+) to (\S+):", str(error))
    assert found is not None
    (folder / found[1]).rename(folder / found[2])


def read(folder: Path, start: LogOffset | None = None) -> tuple[list[bytes], list[UnreadRange]]:
    """Return (frames, unread ranges)."""
    found, unread, n = list[bytes](), list[UnreadRange](), -1
    for records in reader.read(folder, start or reader.oldest_offset(folder)):
        assert isinstance(records, RecordRange)
        assert n in (-1, records.first_n)
        n = records.end.n
        found += records.batch["frame"].to_pylist()
        unread += [records.unread] if records.unread else []
    return found, unread


def numbered(name: bytes, first: int, count: int) -> list[bytes]:
    return [b"%s %d" % (name, n) for n in range(first, first + count)]


sizes = st.integers(1, 30)


@given(shared=sizes, ours=sizes, theirs=sizes, batch=st.integers(1, 9))
@settings(max_examples=25)
def test_an_overlap_and_its_remedy_name_the_unread_records(
    shared: int,
    ours: int,
    theirs: int,
    batch: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("data") / "journal"
    two_recorders(folder, shared, ours, theirs, batch)
    first, second = (reader.segment_path(folder, n) for n in (0, shared))
    before = (first.read_bytes(), second.read_bytes())
    for start in (None, LogOffset(shared, 0, shared)):
        with pytest.raises(JournalError) as caught:
            read(folder, start)
        assert all(path.name in str(caught.value) for path in (first, second))
    apply_remedy(folder, caught.value)
    aside = reader.set_aside(first)
    assert (aside.read_bytes(), second.read_bytes()) == before
    named = [UnreadRange(aside.name, second.name, shared, shared + ours)]
    whole = numbered(b"shared", 0, shared) + numbered(b"theirs", shared, theirs)
    assert read(folder) == (whole, named)
    for n in range(shared + theirs):
        expected = named if n <= shared else []  # an earlier read has reported the range already
        assert read(folder, reader.offset_of(folder, n)) == (whole[n:], expected)
    with pytest.raises(JournalError, match=f"from number {shared} on are not read"):
        frames(folder)


@given(shared=sizes, ours=sizes, theirs=sizes)
@settings(max_examples=15)
def test_an_offset_beyond_an_overlap_reports_the_unread_range(
    shared: int, ours: int, theirs: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("data") / "journal"
    end = two_recorders(folder, shared, ours, theirs)
    with pytest.raises(JournalError) as caught:
        read(folder, end)
    apply_remedy(folder, caught.value)
    if ours < theirs:
        found, [unread] = read(folder, end)
        assert found == numbered(b"theirs", shared + ours, theirs - ours)
        assert (unread.first_n, unread.end_n) == (shared, shared + ours)


def test_a_third_recorder_starts_after_both_overlapping_segments(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    two_recorders(folder, shared=10, ours=30, theirs=5)
    writer = Writer(folder)
    fill(writer, b"after", writer.next_n, 5, 7)
    writer.close()
    with pytest.raises(JournalError) as caught:
        read(folder)
    apply_remedy(folder, caught.value)
    found, unread = read(folder)
    assert found == numbered(b"shared", 0, 10) + numbered(b"theirs", 10, 5) + numbered(
        b"after", 15, 5
    )
    assert [(unread_range.first_n, unread_range.end_n) for unread_range in unread] == [(10, 40)]

"""Numbers that two segments have are an error; the remedy that it names loads one and names the other's."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalshi_platform.journal import reader
from kalshi_platform.journal.reader import JournalError, LogOffset, RecordRange, Unread
from kalshi_platform.journal.writer import Writer
from kalshi_platform_tests.journal.test_reader import CONN, frames


def fill(writer: Writer, name: bytes, first: int, count: int, batch: int) -> None:
    for n in range(first, first + count):
        writer.append(n, CONN, 1, b"%s %d" % (name, n))
        if (n - first) % batch == batch - 1:
            writer.hand_over()
            assert writer.wait_durable(n + 1, 60)
    writer.hand_over()
    assert writer.wait_durable(first + count, 60)


def two_recorders(folder: Path, shared: int, ours: int, theirs: int, batch: int = 7) -> LogOffset:
    """A journal in which a second recorder began while the first one wrote on, as no lock held.

    Returns where the first one's load has come to at its end.
    """
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


def follow_the_remedy(folder: Path, error: JournalError) -> None:
    found = re.search(r"rename (\S+) to (\S+):", str(error))
    assert found is not None
    (folder / found[1]).rename(folder / found[2])


def read(folder: Path, start: LogOffset | None = None) -> tuple[list[bytes], list[Unread]]:
    """(frames, what is not read)"""
    found, unread, n = list[bytes](), list[Unread](), -1
    for stretch in reader.read(folder, start or reader.beginning(folder)):
        assert isinstance(stretch, RecordRange)
        assert n in (-1, stretch.first_n)
        n = stretch.end.n
        found += stretch.batch["frame"].to_pylist()
        unread += [stretch.unread] if stretch.unread else []
    return found, unread


def told(name: bytes, first: int, count: int) -> list[bytes]:
    return [b"%s %d" % (name, n) for n in range(first, first + count)]


sizes = st.integers(1, 30)


@given(shared=sizes, ours=sizes, theirs=sizes, batch=st.integers(1, 9))
@settings(max_examples=25)
def test_an_overlap_names_both_segments_and_its_remedy_names_what_is_not_loaded(
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
    follow_the_remedy(folder, caught.value)
    aside = reader.set_aside(first)
    assert (aside.read_bytes(), second.read_bytes()) == before
    named = [Unread(aside.name, second.name, shared, shared + ours)]
    whole = told(b"shared", 0, shared) + told(b"theirs", shared, theirs)
    assert read(folder) == (whole, named)
    for n in range(shared + theirs):
        expected = named if n <= shared else []  # else it was told to who has come so far
        assert read(folder, reader.find(folder, n)) == (whole[n:], expected)
    with pytest.raises(JournalError, match=f"from number {shared} on are not read"):
        frames(folder)


@given(shared=sizes, ours=sizes, theirs=sizes)
@settings(max_examples=15)
def test_a_load_that_has_come_by_the_records_not_read_is_told_both_ranges(
    shared: int, ours: int, theirs: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("data") / "journal"
    end = two_recorders(folder, shared, ours, theirs)
    with pytest.raises(JournalError) as caught:
        read(folder, end)
    follow_the_remedy(folder, caught.value)
    if ours < theirs:
        found, [unread] = read(folder, end)
        assert found == told(b"theirs", shared + ours, theirs - ours)
        assert (unread.first_n, unread.end_n) == (shared, shared + ours)


def test_a_third_recorder_begins_behind_both_and_both_overlaps_are_errors(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    two_recorders(folder, shared=10, ours=30, theirs=5)
    writer = Writer(folder)
    fill(writer, b"after", writer.next_n, 5, 7)
    writer.close()
    with pytest.raises(JournalError) as caught:
        read(folder)
    follow_the_remedy(folder, caught.value)
    found, unread = read(folder)
    assert found == told(b"shared", 0, 10) + told(b"theirs", 10, 5) + told(b"after", 15, 5)
    assert [(it.first_n, it.end_n) for it in unread] == [(10, 40)]

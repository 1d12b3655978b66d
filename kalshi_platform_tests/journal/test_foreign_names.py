"""Foreign files among journals, states and spools are ignored, reported by doctor, and left in place."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import watermarks
from kalshi_platform.commands import doctor
from kalshi_platform.health import growth
from kalshi_platform.inventory import spool
from kalshi_platform.journal import reader
from kalshi_platform.journal.reader import JournalError
from kalshi_platform.journal.writer import Writer
from kalshi_platform.loading import state_files
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.quality import foreign_files as found
from kalshi_platform_tests import foreign

HOUR = datetime(2026, 11, 28, 7, tzinfo=UTC)


def test_foreign_files_change_nothing_and_doctor_lists_them(
    tmp_path: Path,
) -> None:
    settings = platform_settings.load(
        _env_file=None, kalshi_data_dir=tmp_path, use_clickhouse=False
    )
    shard = settings.journal_dir(0)
    kept = state_files.hour_folder(shard)
    for folder in (kept, spool.folder_of(settings)):
        folder.mkdir(parents=True)
    put = {
        folder: foreign.put(folder)
        for folder in (settings.journals_dir, shard, kept, spool.folder_of(settings))
    }
    writer = Writer(shard)
    writer.note("started", {})
    writer.close()
    again = Writer(shard)
    again.close()
    assert watermarks.shards(settings.journals_dir) == [0]
    assert reader.segments(shard) == [0, 1]
    assert sum(b.rows for b in reader.record_ranges(shard, reader.oldest_offset(shard))) == 1
    state_files.save_hour_state(BookState(n=5), shard, HOUR)
    assert state_files.hour_state(shard, HOUR) is not None
    assert state_files.newest_saved(shard, (), 0, 9) is not None
    state_files.prune_hour_states(shard, 9)
    assert state_files.hour_state(shard, HOUR) is None
    growth.measure(settings)
    waiting = spool.Spool(spool.folder_of(settings), settings)
    assert waiting.files == []
    waiting.close(0.0)
    named = set(found.in_data_folder(settings))
    for folder, names in put.items():
        assert {str(folder / name) for name in names} <= named
        assert set(names) <= {path.name for path in folder.iterdir()}
    assert len(named) == sum(map(len, put.values())), "what is ours is not named"
    check, _ = doctor.CHECKS["foreign names"]
    line = check(settings).line("foreign names")
    assert line.startswith("! foreign names — not the platform's, and ignored: ")
    assert line.isprintable()


def test_an_unreadable_journal_keeps_its_hours_unsealed() -> None:
    with foreign.open_folder() as journals:
        shard = journals / "shard-0"
        Writer(shard).close()
        with foreign.closed_to_us(shard):
            assert watermarks.shards(journals) == [0]
            with pytest.raises(JournalError, match="cannot be read"):
                reader.segments(shard)

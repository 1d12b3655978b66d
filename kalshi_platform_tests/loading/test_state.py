"""The derivation's state on disk, written by two loads at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from kalshi_platform.loading import state
from kalshi_platform.loading.books import State


def test_two_loads_may_keep_the_same_hours_state_at_the_same_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "2026-11-23T02-000000000000007.state"
    both_have_written = Barrier(2, timeout=60)
    replace = Path.replace

    def replace_when_both_have_written(self: Path, target: Path) -> Path:
        both_have_written.wait()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", replace_when_both_have_written)
    with ThreadPoolExecutor(2) as loads:
        for saved in [loads.submit(state.save, State(), path) for _ in range(2)]:
            saved.result()
    assert state.load(path).n == State().n
    assert [each.name for each in tmp_path.iterdir()] == [path.name]

"""Loaders killed between any two steps of a commit, with one state file lost between the starts.

A commit is planned in the store's record, written, settled there, and noted in the cursor. Wherever the
kill falls, and whichever of cursor and record is missing, old or altered at the next start (not both),
each record is in the store once.
"""

from __future__ import annotations

import random
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.loading import cursor
from kalshi_platform_tests.clickhouse.tables import prepare
from kalshi_platform_tests.loading.recorder import (
    Recorder,
    Start,
    Store,
    assert_each_record_once,
)
from kalshi_platform_tests.loading.test_loader import Front

KILLS = 8


class Killed(BaseException):
    """The process is dead: nothing more is executed."""


class Fuse:
    """Allows this many calls, then kills before or after the next one, and all later calls."""

    def __init__(self, calls: int, *, after: bool) -> None:
        self._left = calls
        self._after = after

    def through(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self._left -= 1
            if self._left < 0 or (self._left == 0 and not self._after):
                raise Killed
            result = act(*args, **kwargs)
            if self._left == 0:
                raise Killed
            return result

        return guarded


class _Guarded:
    """An object whose named calls pass a fuse."""

    def __init__(self, inner: Any, fuse: Fuse, calls: tuple[str, ...]) -> None:
        self._inner = inner
        self._calls = {name: fuse.through(getattr(inner, name)) for name in calls}

    def __getattr__(self, name: str) -> Any:
        return self._calls.get(name) or getattr(self._inner, name)


class Mortal(Recorder):
    """A recorder whose loaders are killed by its fuse."""

    fuse = Fuse(1_000_000, after=False)
    id = uuid.UUID(int=0)

    def stores(self, writer: Any) -> dict[str, Store]:
        self.id = writer.id
        guarded: dict[str, Any] = {}
        for kind, store in super().stores(writer).items():
            front: Any = _Guarded(Front(store), self.fuse, ("write", "begin_hour"))
            front.ledger = _Guarded(store.ledger, self.fuse, ("claim", "plan", "commit"))
            guarded[kind] = front
        return guarded


def killed_once(recorder: Mortal, dice: random.Random, patch: pytest.MonkeyPatch) -> str:
    """Run one start that is killed somewhere or ends; return the problem that it reports."""
    recorder.fuse = Fuse(dice.randint(1, 14), after=dice.random() < 0.5)
    with patch.context() as patched:
        patched.setattr(cursor, "write", recorder.fuse.through(cursor.write))
        with recorder.started() as start:
            start.record(dice.randint(10, 60))
            start.load()
            trouble = start.trouble
    recorder.fuse = Mortal.fuse
    return str(trouble)


def lose_a_witness(path: Path, old: bytes | None, dice: random.Random) -> None:
    """Remove a progress file, alter a digit in it, or restore an old version."""
    text = path.read_bytes()
    match dice.randrange(4):
        case 0:
            path.unlink()
        case 1:
            digits = [at for at, byte in enumerate(text) if byte in b"0123456789"]
            at = dice.choice(digits)
            path.write_bytes(text[:at] + (b"7" if text[at] != ord("7") else b"2") + text[at + 1 :])
        case 2 if old is not None:
            path.write_bytes(old)
        case _:
            pass


def witness(recorder: Recorder, kind: str, dice: random.Random) -> Path | None:
    """The cursor, or the archive's ledger; ClickHouse's ledger is not a file."""
    found = [
        *recorder.folder.glob(f"load/{kind}.json"),
        *(recorder.settings.archive_dir.glob("recorders/*.json") if kind == "parquet" else ()),
    ]
    return dice.choice(found) if found else None


@pytest.mark.parametrize(
    ("kind", "seed"), [*(("parquet", n) for n in range(6)), *(("clickhouse", n) for n in range(2))]
)
def test_each_record_is_stored_once_after_kills_and_lost_files(
    kind: str, seed: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    patch = pytest.MonkeyPatch()
    options: dict[str, Any] = {"kalshi_data_dir": tmp_path / "data"}
    if kind == "clickhouse":
        options["clickhouse_url"] = request.getfixturevalue("clickhouse_url")
        options["clickhouse_database"] = request.getfixturevalue("clickhouse_database")
    settings = platform_settings.load(
        **options, hot_retention_days=36_500, use_clickhouse=kind == "clickhouse"
    )
    if kind == "clickhouse":
        prepare(settings)
    recorder = Mortal(settings, kinds=[kind])
    dice = random.Random(seed)
    place, good, before = cursor.path(recorder.folder, kind), b"", dict[Path, bytes]()
    for _ in range(KILLS):
        if "it is not known up to which" in killed_once(recorder, dice, patch):
            place.write_bytes(good)  # the remedy
            continue
        if place.exists() and isinstance(
            cursor.read(recorder.folder, kind, recorder.id), cursor.Cursor
        ):
            good = place.read_bytes()
        if (path := witness(recorder, kind, dice)) is not None:
            lose_a_witness(path, before.get(path), dice)
            if path.exists():
                before[path] = path.read_bytes()
    last: Start = recorder.run()
    if "it is not known up to which" in str(last.trouble):
        place.write_bytes(good)
        last = recorder.run()
    assert last.trouble is None
    assert_each_record_once(recorder)
    shutil.rmtree(settings.data_dir)

"""A full disk loses no acknowledged row of the tables."""

from __future__ import annotations

import random
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.embedded_clickhouse import Running, parts, running
from kalshi_platform.embedded_clickhouse.failed_writes import FailedWrites
from kalshi_platform_tests.small_disk import fill, make_room, small_disk

PATIENCE_S = 60
LIVES, FILLS = 2, 2
CREATE = "CREATE TABLE IF NOT EXISTS {} (a UInt64, b UInt64, s String) ENGINE = MergeTree ORDER BY (a, b)"
CHECK = "CHECK TABLE t SETTINGS check_query_single_value_result = 0"


def ask(server: str, sql: str, data: str = "") -> str:
    answer = httpx.post(server, params={"query": sql}, content=data, timeout=PATIENCE_S)
    answer.raise_for_status()
    return answer.text


class Writer(threading.Thread):
    """Sends inserts one after the other, and records which were acknowledged."""

    def __init__(self, numbers: range, seed: int) -> None:
        super().__init__()
        self._numbers = iter(numbers)
        self._random = random.Random(seed)
        self.server: str | None = None
        self.over = False
        self.acknowledged: dict[int, int] = {}

    def run(self) -> None:
        with httpx.Client(timeout=PATIENCE_S) as web:
            while not self.over:
                server = self.server
                if server is None:
                    time.sleep(0.01)
                    continue
                number, rows = next(self._numbers), self._random.choice([100, 1_000, 20_000])
                data = "".join(
                    f"{number},{row},text {row * 7919 % 100_003}\n" for row in range(rows)
                )
                try:
                    query = {"query": "INSERT INTO t FORMAT CSV"}
                    if web.post(server, params=query, content=data).is_success:
                        self.acknowledged[number] = rows
                except httpx.HTTPError:
                    time.sleep(0.01)


def test_a_full_disk_during_merges_loses_no_acknowledged_row(
    tmp_path: Path,
) -> None:
    chance = random.Random(7)
    writers = [Writer(range(n * 1_000_000, (n + 1) * 1_000_000), n) for n in range(2)]
    with small_disk(tmp_path, megabytes=700) as disk:
        folder = disk / "clickhouse"
        for writer in writers:
            writer.start()
        try:
            for _ in range(LIVES):
                _live_and_die(folder, disk, writers, chance)
        finally:
            for writer in writers:
                writer.over = True
            for writer in writers:
                writer.join()
        with running(folder) as server:
            rows = ask(server, "SELECT a, count(), uniqExact(b) FROM t GROUP BY a")
            stored = {
                number: (count, distinct)
                for number, count, distinct in (map(int, row.split()) for row in rows.splitlines())
            }
            checked = ask(server, CHECK)
    acknowledged = {n: rows for writer in writers for n, rows in writer.acknowledged.items()}
    assert len(acknowledged) > LIVES
    assert {n: stored.get(n) for n in acknowledged} == {n: (r, r) for n, r in acknowledged.items()}
    assert all("\t1\t" in line for line in checked.splitlines()), checked


def _live_and_die(folder: Path, disk: Path, writers: list[Writer], chance: random.Random) -> None:
    """Fill the disk several times under a writing server, which may end itself with a reason."""
    with running(folder) as server:
        ask(server, CREATE.format("t"))
        for writer in writers:
            writer.server = server
        for _ in range(FILLS):
            time.sleep(chance.uniform(0.3, 1.5))
            fill(disk)
            time.sleep(chance.uniform(0.1, 2.0))
            make_room(disk)
            if server.process.poll() is not None:
                break
        for writer in writers:
            writer.server = None
        if server.process.poll() is not None:
            assert server.process.returncode == 1
            assert "a part that cannot be read" in cast(IO[str], server.process.stderr).read()
        elif chance.random() < 0.5:
            server.process.kill()


def test_an_insert_is_durable_when_it_is_acknowledged(tmp_path: Path) -> None:
    counted = "SELECT sumIf(value, event = 'FileSync'), sumIf(value, event = 'DirectorySync') FROM system.events"
    with running(tmp_path / "clickhouse") as server:
        ask(server, CREATE.format("t"))
        before = [int(count) for count in ask(server, counted).split()]
        ask(server, "INSERT INTO t FORMAT CSV", "1,2,x\n")
        files, folders = (
            int(count) - then
            for count, then in zip(ask(server, counted).split(), before, strict=True)
        )
        part = Path(
            ask(server, "SELECT path FROM system.parts WHERE active AND table = 't'").strip()
        )
        assert files >= len(list(part.iterdir()))
        assert folders >= 1


# -- each file of a part ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A data folder with one table per file of a part, each with three inserts merged into one part."""
    folder = tmp_path_factory.mktemp("merged") / "clickhouse"
    with running(folder) as server:
        _three_inserts(server, "sample")
        (part,) = _table_folders(folder)["sample"].glob("all_1_3_*")
        files = sorted(file.name for file in part.iterdir())
        for number in range(2 * len(files)):
            _three_inserts(server, f"t{number}")
        server.process.kill()
    return folder, files


def _three_inserts(server: Running, table: str) -> None:
    ask(server, CREATE.format(table))
    for first in (0, 100, 200):
        ask(server, f"INSERT INTO {table} SELECT {first} + number, number, 'x' FROM numbers(100)")
    ask(server, f"OPTIMIZE TABLE {table} FINAL")


def _table_folders(folder: Path) -> dict[str, Path]:
    found = {}
    for definition in folder.glob("engine/metadata/default/*.sql"):
        uuid = re.search(r"UUID '([0-9a-f-]{36})'", definition.read_text())
        assert uuid is not None
        found[definition.stem] = folder / "engine" / "store" / uuid[1][:3] / uuid[1]
    return found


def test_a_short_part_is_set_aside_and_its_sources_return(
    merged: tuple[Path, list[str]], tmp_path: Path
) -> None:
    original, files = merged
    folder = tmp_path / "clickhouse"
    shutil.copytree(original, folder, symlinks=True)
    tables = _table_folders(folder)
    spoiled = set()
    for number, (name, keep) in enumerate((name, keep) for name in files for keep in (0, -1)):
        (part,) = tables[f"t{number}"].glob("all_1_3_*")
        data = (part / name).read_bytes()
        short = data[:keep]
        (part / name).write_bytes(short)
        if name in parts.UNLISTED and short:
            continue  # its size is written nowhere; a write of so few bytes fails whole
        spoiled.add(part.parent)
    assert {found.path.parent for found in parts.spoiled(folder)} == spoiled
    with running(folder) as server:
        for number in range(2 * len(files)):
            counted = ask(server, f"SELECT count(), sum(a), max(s) FROM t{number}")
            assert counted == "300\t44850\tx\n", files[number // 2]
    aside = [*folder.glob("engine/store/*/*/detached/broken-on-start_*")]
    assert {
        path.parents[1] for path in aside
    } >= spoiled  # the engine finds some of the others by itself
    assert not list(parts.spoiled(folder))
    for path in aside:  # what `doctor` says, once no row is missing
        shutil.rmtree(path)
    with running(folder) as server:
        for number in range(2 * len(files)):
            counted = ask(server, f"SELECT count(), sum(a), max(s) FROM t{number}")
            assert counted == "300\t44850\tx\n", files[number // 2]
    assert not [*folder.glob("engine/store/*/*/detached/broken-on-start_*")]


def test_a_spoiled_part_without_sources_is_named(
    merged: tuple[Path, list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original, _ = merged
    folder = tmp_path / "clickhouse"
    shutil.copytree(original, folder, symlinks=True)
    table = _table_folders(folder)["sample"]
    for source in table.glob("all_*_0"):
        shutil.rmtree(source)
    (part,) = table.glob("all_1_3_*")
    (part / "data.bin").write_bytes(b"")
    parts.set_aside(folder)
    assert f"broken-on-start_{part.name}" in caplog.text
    assert "`kalshi-platform proof` says whether rows are missing" in caplog.text


@given(st.binary(max_size=300), st.integers(0, 200))
def test_any_list_of_checksums_is_read_or_refused(data: bytes, keep: int) -> None:
    head = b"checksums format version: 4\n"
    for content in (data, head + data, (head + data)[:keep]):
        try:
            sizes = parts.sizes(content)
        except ValueError:
            continue
        assert all(size >= 0 for size in sizes.values())


def test_an_unknown_checksum_format_is_left_to_the_engine(
    merged: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "clickhouse"
    shutil.copytree(merged[0], folder, symlinks=True)
    for part in folder.glob("engine/store/*/*/all_*"):
        checksums = part / "checksums.txt"
        checksums.write_bytes(checksums.read_bytes().replace(b"version: 4", b"version: 6", 1))
    assert not list(parts.spoiled(folder))


# -- the watch ------------------------------------------------------------------------------------


def _spoil(merged: tuple[Path, list[str]], folder: Path) -> Callable[[], None]:
    shutil.copytree(merged[0], folder, symlinks=True)
    (part,) = _table_folders(folder)["t0"].glob("all_1_3_*")

    def spoil() -> None:
        (part / "data.cmrk4").write_bytes(b"")

    return spoil


def test_a_statement_that_spoiled_a_part_ends_the_process(
    merged: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "clickhouse"
    spoil = _spoil(merged, folder)
    failed, found = [0], list[parts.Spoiled]()
    watch = FailedWrites(folder, lambda: failed[0], lambda _: 0, found.append)
    with watch.watched():
        spoil()
    assert not found  # no write failed: nothing is looked at
    with watch.watched():
        failed[0] += 1
    assert "data.cmrk4 has 0 bytes of" in found[0].why


def test_a_long_merge_with_a_failed_write_is_checked_at_its_end(
    merged: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "clickhouse"
    spoil = _spoil(merged, folder)
    found, ended = list[parts.Spoiled](), threading.Event()

    def end(spoiled: parts.Spoiled) -> None:
        found.append(spoiled)
        ended.set()

    looks: list[float] = []

    def merging_since(seconds: float) -> int:
        looks.append(seconds)
        return 1

    watch = FailedWrites(folder, lambda: 3, merging_since, end)
    watch.start()
    try:
        deadline = time.monotonic() + PATIENCE_S
        while len(looks) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not found
        spoil()  # the merge ends, and no further write fails
        assert ended.wait(PATIENCE_S)
    finally:
        watch.stop()


def test_the_monitor_survives_errors_of_its_queries(
    merged: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "clickhouse"
    _spoil(merged, folder)()
    ended, asked = threading.Event(), list[int]()

    def count() -> int:
        asked.append(1)
        if len(asked) == 1:
            raise RuntimeError("no connection can be had")
        return 1

    watch = FailedWrites(folder, count, lambda _: 0, lambda _: ended.set())
    watch.start()
    try:
        assert ended.wait(PATIENCE_S)
    finally:
        watch.stop()

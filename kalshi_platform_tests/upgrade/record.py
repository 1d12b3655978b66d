"""Records the data folder of an older version, for the upgrade's tests: a commit of this repository in, an archive out.

    python -m kalshi_platform_tests.upgrade.record 1a2c9ed

The commit is checked out beside this folder, and its own commands record its own simulator over the end of
an hour, on the embedded ClickHouse. Recorder and simulator have a clock that is set to shortly before an
hour's end of a day that never changes. What `test_older_folders.py` expects of the recording is written beside it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click

from kalshi_platform_tests.ports import answers, free_ports

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = Path(__file__).with_name("folders")
BEGIN_NS = 1_795_863_540 * 10**9
"""2026-11-28 10:59:00 UTC: a minute of one hour, most of it recorded, and the seal of it in the next."""
RECORDED_S = 80.0
ANOTHER_TIME = """
import runpy, sys, time
back_ns, wall_ns = int(sys.argv.pop(1)), time.time_ns
time.time_ns = lambda: wall_ns() - back_ns
time.time = lambda: (wall_ns() - back_ns) / 1e9
runpy.run_module("kalshi_platform", run_name="__main__", alter_sys=True)
"""
ANALYTICS = """
from datetime import UTC, datetime
from kalshi_platform import settings
from kalshi_platform.analytics.hourly import compute_hour
compute_hour(settings.load(), datetime(2026, 11, 28, 10, tzinfo=UTC))
"""
KEPT = ("journal", "clickhouse", "parquet")


@click.command()
@click.argument("commit")
def main(commit: str) -> None:
    """Record with COMMIT, into folders/COMMIT.tar.xz and folders/COMMIT.json."""
    with (
        tempfile.TemporaryDirectory(prefix="kp-") as scratch,
        checked_out(commit, scratch) as source,
    ):
        data = Path(scratch) / "data"
        facts = record(source, data) | {"commit": commit}
        pack(data, FOLDERS / f"{commit}.tar.xz")
    (FOLDERS / f"{commit}.json").write_text(json.dumps(facts, indent=1) + "\n")


@contextmanager
def checked_out(commit: str, scratch: str) -> Iterator[Path]:
    """The repository as it was at a commit."""
    source = Path(scratch) / "source"
    worktree = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*worktree, "add", "-q", "--detach", str(source), commit], check=True)
    try:
        yield source
    finally:
        subprocess.run([*worktree, "remove", "--force", str(source)], check=True)


def record(source: Path, data: Path) -> dict[str, object]:
    """Record for a while, end in order; returns how many rows there are of what."""
    clickhouse, simulator = free_ports(2)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(data.parent),
        "PYTHONPATH": str(source),
        "KALSHI_HOME": str(data.parent),
        "KALSHI_DATA_DIR": str(data),
        "EMBEDDED_CLICKHOUSE_PORT": str(clickhouse),
        "HOT_RETENTION_DAYS": "36500",
        "JOURNAL_RETENTION_HOURS": "1000000",
        "SIMULATOR_PORT": str(simulator),
        "SIMULATOR_MARKETS": "4",
        "SIMULATOR_RATE": "6",
    }
    data.mkdir()
    back_ns = time.time_ns() - BEGIN_NS
    program = [sys.executable, "-m", "kalshi_platform"]
    then = [sys.executable, "-c", ANOTHER_TIME, str(back_ns)]
    with (
        running([*program, "clickhouse"], environment, source, clickhouse),
        running([*then, "simulate", "--fault", "gap:3@20"], environment, source, simulator),
    ):
        subprocess.run([*program, "migrate"], env=environment, check=True, cwd=source)
        with running([*then, "stream"], environment, source):
            time.sleep(RECORDED_S)
        analytics = [sys.executable, "-c", ANALYTICS]
        subprocess.run(analytics, env=environment, check=True, cwd=source)
        return counted(clickhouse)


@contextmanager
def running(
    argv: Sequence[str], environment: Mapping[str, str], source: Path, port: int | None = None
) -> Iterator[None]:
    """A program that is ended in order; with a port, from when it answers there."""
    process = subprocess.Popen(argv, env=environment, cwd=source)
    try:
        while port is not None and not answers(port):
            assert process.poll() is None, f"{argv[-1]} has ended"
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, f"{argv[-1]} did not end in order"


def counted(port: int) -> dict[str, object]:
    """Rows of each table that has any, as the version that wrote them counts them."""
    query = (
        "SELECT table, sum(rows) FROM system.parts WHERE active AND database = 'kalshi'"
        " GROUP BY table ORDER BY table FORMAT JSONCompactColumns"
    )
    url = f"http://127.0.0.1:{port}/?" + urllib.parse.urlencode({"query": query})
    with urllib.request.urlopen(url) as answer:
        tables, rows = json.load(answer)
    return {"rows": dict(zip(tables, map(int, rows), strict=True))}


def pack(data: Path, target: Path) -> None:
    """The data folder, without what a running program alone needs."""
    target.parent.mkdir(exist_ok=True)
    with tarfile.open(target, "w:xz", preset=9) as archive:
        for name in KEPT:
            archive.add(data / name, name)


if __name__ == "__main__":
    main()

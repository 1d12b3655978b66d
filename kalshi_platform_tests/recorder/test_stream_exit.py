"""Output and exit code of `stream` when the journal's disk or lock fails; real processes."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kalshi_platform.health import health_report
from kalshi_platform.simulator.server import Simulator
from kalshi_platform_tests.simulator_fixtures import StartSimulator

PATIENCE_S = 90.0
LIMIT_BYTES = 150_000


@contextmanager
def stream(data: Path, simulator: Simulator) -> Iterator[subprocess.Popen[str]]:
    """A `stream` process without ClickHouse, its output to be read from stderr."""
    (data / "simulator").mkdir(parents=True, exist_ok=True)
    shutil.copy(simulator.key_file, data / "simulator" / simulator.key_file.name)
    child = subprocess.Popen(
        [sys.executable, "-m", "kalshi_platform", "stream"],
        env={
            **os.environ,
            "KALSHI_DATA_DIR": str(data),
            "USE_CLICKHOUSE": "0",
            "KALSHI_WS_URL": simulator.ws_url,
            "KALSHI_REST_URL": simulator.rest_url,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:.0f} s for {what}"
        time.sleep(0.05)


def reported(folder: Path, key: str) -> int:
    report = health_report.read(folder)
    return int(report[key]) if report else 0


ABORTS_AT_ITS_END = """
import ctypes
libc = ctypes.CDLL(None)
libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)
"""


def test_a_library_aborting_at_exit_does_not_fail_the_stop(
    start_simulator: StartSimulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a library does whose threads still run when its destructors do."""
    simulator = start_simulator(markets=4, rate=300.0, rolling_markets=0)
    (tmp_path / "sitecustomize.py").write_text(ABORTS_AT_ITS_END)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert subprocess.run([sys.executable, "-c", "pass"], check=False).returncode == -signal.SIGABRT
    with stream(tmp_path, simulator) as child:
        wait_for(lambda: reported(tmp_path / "journal" / "shard-0", "frames") > 100, "frames")
        child.send_signal(signal.SIGTERM)
        output, _ = child.communicate(timeout=PATIENCE_S)
    assert child.returncode == 0, output
    assert output.rstrip().endswith("Stopped; all that was received is stored.")


def test_a_stop_that_loses_frames_exits_1_with_a_count(
    start_simulator: StartSimulator, tmp_path: Path
) -> None:
    simulator = start_simulator(markets=4, rate=300.0, rolling_markets=0)
    folder = tmp_path / "journal" / "shard-0"
    with stream(tmp_path, simulator) as child:
        wait_for(lambda: reported(folder, "frames") > 100, "frames")
        # A file-size limit makes write() fail part-way, as a full disk does.
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (LIMIT_BYTES, resource.RLIM_INFINITY))
        wait_for(lambda: reported(folder, "oldest_undurable_ms") > 3_000, "a disk that is full")
        report = health_report.read(folder)
        assert report is not None
        assert report["state"] == "blocked"
        began = time.monotonic()
        child.send_signal(signal.SIGTERM)
        output, _ = child.communicate(timeout=PATIENCE_S)
    assert child.returncode == 1, output
    assert time.monotonic() - began < 30
    lost = re.search(
        r"([\d,]+) frames \(([\d,]+) bytes\) and [\d,]+ notes could not be written", output
    )
    assert lost is not None, output
    assert all(int(number.replace(",", "")) > 0 for number in lost.groups())
    assert "Traceback" not in output


def test_a_streamer_without_its_lock_file_ends(
    start_simulator: StartSimulator, tmp_path: Path
) -> None:
    simulator = start_simulator(markets=4, rate=300.0, rolling_markets=0)
    folder = tmp_path / "journal" / "shard-0"
    with stream(tmp_path, simulator) as first:
        wait_for(lambda: reported(folder, "frames") > 100, "frames")
        first.send_signal(signal.SIGSTOP)  # it has not detected the removal yet
        (folder / "lock").unlink()
        with stream(tmp_path, simulator) as second:
            output, _ = second.communicate(timeout=PATIENCE_S)
        assert second.returncode == 1
        assert "Another streamer is writing to" in output
        first.send_signal(signal.SIGCONT)
        output, _ = first.communicate(timeout=PATIENCE_S)
    assert first.returncode == 1, output
    assert "/lock, was removed or replaced while it was held" in output
    assert "could not be written" not in output
    assert "Traceback" not in output

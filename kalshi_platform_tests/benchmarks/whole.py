"""The complete platform, `kalshi-platform up`: time to the first stored row, and CPU while idle."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.errors import StoreError
from kalshi_platform.simulator.keys import own_key
from kalshi_platform_tests.benchmarks.figures import Figure
from kalshi_platform_tests.benchmarks.pipeline import feeding, plain_environment

SETTLE_S = 60.0
PATIENCE_S = 120.0


@contextmanager
def up(folder: Path, **variables: str) -> Iterator[tuple[psutil.Process, str]]:
    """`kalshi-platform up` on free ports; yields its process and the URL of its ClickHouse."""
    with ExitStack() as stack:
        ports = []
        for _ in range(3):
            taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            ports.append(str(taken.getsockname()[1]))
    environment = {
        "KALSHI_DATA_DIR": str(folder),
        "EMBEDDED_CLICKHOUSE_PORT": ports[1],
        "SIMULATOR_PORT": ports[2],
        **variables,
    }
    child = subprocess.Popen(
        [sys.executable, "-m", "kalshi_platform", "up", "--port", ports[0]],
        env=plain_environment() | environment,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield psutil.Process(child.pid), f"http://127.0.0.1:{ports[1]}"
    finally:
        child.send_signal(signal.SIGINT)
        child.wait(60)


def first_row() -> Figure:
    """Seconds from the start, on an empty folder, to the first row that ClickHouse gives back."""
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        began = time.monotonic()
        with up(Path(folder)) as (_, url):
            settings = platform_settings.load(clickhouse_url=url)
            while not _rows(settings):
                if time.monotonic() - began > PATIENCE_S:
                    raise RuntimeError(f"no row within {PATIENCE_S:.0f} s")
                time.sleep(0.1)
            took = time.monotonic() - began
    return Figure("make run to the first row", took, "s", at_most=20.0)


def _rows(settings: platform_settings.Settings) -> int:
    try:
        client = clickhouse.connect(settings)
        try:
            with clickhouse.translated():
                found = client.query("SELECT count() FROM orderbook_events")
            return int(found.result_rows[0][0])
        finally:
            client.close()
    except StoreError:  # it is coming up
        return 0


PROGRAMS = {
    "dagster._daemon": "daemon",
    "host.code_server": "code server",
    "host.webserver": "webserver",
    "forkserver": "runs, the streamer's included",
    "embedded_clickhouse": "ClickHouse",
    " up ": "up",
}
"""The program of each process, by a part of its command line."""


def idle(path: Path, markets: int, seconds: float) -> Figure:
    """Share of one core that everything takes together while the exchange is quiet, and each program's beside it."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder,
        feeding(path, markets, frames=0) as feeder,
    ):
        own_key(Path(folder) / "simulator" / "key.pem")
        urls = {"KALSHI_WS_URL": feeder.ws_url, "KALSHI_REST_URL": feeder.rest_url}
        with up(Path(folder), **urls) as (root, _):
            feeder.hear()  # the books are there
            time.sleep(SETTLE_S)
            used: dict[tuple[int, float], tuple[str, float]] = {}
            before = _used(root, used)
            began = time.monotonic()
            while (took := time.monotonic() - began) < seconds:
                time.sleep(0.5)
                now = _used(root, used)
    shares = {name: 100 * (now[name] - before.get(name, 0.0)) / took for name in now}
    largest_first = sorted(shares.items(), key=lambda share: -share[1])
    return Figure(
        "idle `up`, quiet exchange",
        sum(shares.values()),
        "% of one core",
        at_most=15.0,
        beside=", ".join(f"{name} {share:.1f}" for name, share in largest_first),
    )


def _used(
    root: psutil.Process, used: dict[tuple[int, float], tuple[str, float]]
) -> dict[str, float]:
    """CPU seconds of the tree so far by program, those of processes that have ended since included."""
    for process in (root, *root.children(recursive=True)):
        try:
            times, command = process.cpu_times(), " ".join(process.cmdline())
            program = next((it for part, it in PROGRAMS.items() if part in command), "others")
            used[process.pid, process.create_time()] = (program, times.user + times.system)
        except psutil.NoSuchProcess:
            continue
    total = defaultdict[str, float](float)
    for program, seconds in used.values():
        total[program] += seconds
    return total

"""How fast frames go from the socket into the stores, compared with a bare socket loop.

One run, one machine, one feeder (`feed.py`): first a loop that only receives, then the recorder as it
is shipped, `kalshi-platform stream` with the embedded ClickHouse, on the same bytes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any, cast

import polars as pl
import psutil
from websockets.asyncio.client import connect

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import client as clickhouse
from kalshi_platform.clickhouse import migrations
from kalshi_platform.embedded_clickhouse import Running, running
from kalshi_platform.exchange.auxiliary_channel import BATCH
from kalshi_platform.exchange.connection import MAX_FRAME_BYTES, QUEUE_FRAMES
from kalshi_platform.exchange.session import CHANNEL
from kalshi_platform.health import health_report
from kalshi_platform.schema import ORDERBOOK_EVENTS
from kalshi_platform.settings import Settings
from kalshi_platform.simulator.keys import own_key
from kalshi_platform_tests.benchmarks import feed

PATIENCE_S = 120.0
NOTHING: Mapping[str, str] = {}
SMALL_LAG = {"parquet": 300_000, "clickhouse": 20_000}
"""Records that a store may still collect for its next write, without a fault."""


class Feeder:
    """A feeder in a process of its own."""

    def __init__(
        self, path: Path, markets: int, rate: float, frames: int, *, again: bool = False
    ) -> None:
        command = [sys.executable, "-m", "kalshi_platform_tests.benchmarks.feed", str(path)]
        options = ["--markets", str(markets), "--rate", str(rate), "--frames", str(frames)]
        options += ["--again"] if again else []
        self.process = subprocess.Popen(
            [*command, *options],
            stdout=subprocess.PIPE,
            text=True,
        )
        places = self.hear()
        self.ws_url, self.rest_url = str(places["ws_url"]), str(places["rest_url"])

    def hear(self) -> dict[str, Any]:
        """Wait for its next line of output."""
        line = cast(IO[str], self.process.stdout).readline()
        if not line:
            raise RuntimeError("the feeder has ended: see above")
        said: dict[str, Any] = json.loads(line)
        return said

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()


@contextmanager
def feeding(
    path: Path, markets: int, rate: float = 0.0, frames: int = -1, *, again: bool = False
) -> Iterator[Feeder]:
    """A feeder for one client; `frames`: how many of the file's, -1 for all; `again`: for two, in turn."""
    feeder = Feeder(path, markets, rate, frames, again=again)
    try:
        yield feeder
    finally:
        feeder.close()


# -- the bare loop -----------------------------------------------------------------------------


def bare_loop(path: Path, frames: int, markets: int) -> float:
    """Return the frames a second of a loop that only receives."""
    with (
        feeding(path, markets, frames=frames) as feeder,
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process,
    ):
        return process.submit(_receive_all, feeder.ws_url, frames, markets).result()


def _receive_all(ws_url: str, frames: int, markets: int) -> float:
    return asyncio.run(_receive(ws_url, frames, markets))


async def _receive(ws_url: str, frames: int, markets: int) -> float:
    tickers = [feed.ticker(m) for m in range(markets)]
    options: dict[str, Any] = {
        "max_size": MAX_FRAME_BYTES,
        "max_queue": QUEUE_FRAMES,
        "compression": None,
        "ping_interval": None,
        "proxy": None,
    }
    async with connect(ws_url, **options) as socket:
        for start in range(0, markets, BATCH):
            params: dict[str, Any] = {"market_tickers": tickers[start : start + BATCH]}
            if start == 0:
                command = {"cmd": "subscribe", "params": params | {"channels": [CHANNEL]}}
            else:
                command = {"cmd": "update_subscription", "params": params | {"sids": [1]}}
            await socket.send(json.dumps(command | {"id": 1 + start}))
        for _ in range(feed.first_seq(markets)):  # subscribed, snapshots, oks
            await socket.recv(decode=False)
        await socket.recv(decode=False)
        began = time.perf_counter()
        for _ in range(frames - 1):
            await socket.recv(decode=False)
        return (frames - 1) / (time.perf_counter() - began)


# -- the recorder ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """One recording, measured."""

    frames_per_second: float
    """From the first frame sent to the last row durable in both stores."""
    journal_per_second: float
    """The same to the last frame durable in the journal."""
    streamer_us: float
    """CPU of the streamer, in microseconds for each frame."""
    clickhouse_us: float
    feeder_us: float
    peak_mib: float
    """Resident memory of the streamer at its highest."""
    delays_ms: dict[str, dict[str, float]]
    """Receive to durable, by place (journal, clickhouse, parquet): p50, p99, max."""


class Recorder:
    """`kalshi-platform stream` in a process of its own, and the ClickHouse that it loads."""

    def __init__(
        self, folder: Path, feeder: Feeder, url: Running, environment: Mapping[str, str] = NOTHING
    ) -> None:
        """`environment`: what the streamer's has beside its settings."""
        self.settings = platform_settings.load(
            kalshi_data_dir=folder,
            kalshi_ws_url=feeder.ws_url,
            kalshi_rest_url=feeder.rest_url,
            clickhouse_url=str(url),
            audit_interval_seconds=3600,
            hot_retention_days=36_500,
            prod_keyid=None,
            prod_keyfile=None,
        )
        own_key(self.settings.exchange.key_file)
        migrations.migrate(self.settings)
        own = {
            "KALSHI_DATA_DIR": str(folder),
            "KALSHI_WS_URL": feeder.ws_url,
            "KALSHI_REST_URL": feeder.rest_url,
            "CLICKHOUSE_URL": str(url),
            "AUDIT_INTERVAL_SECONDS": "3600",
            "HOT_RETENTION_DAYS": "36500",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kalshi_platform", "stream"],
            env=plain_environment() | own | dict(environment),
            cwd=folder,
            stderr=subprocess.DEVNULL,
        )
        self.seen = psutil.Process(self.process.pid)
        self.clickhouse = psutil.Process(url.process.pid)
        self.peak_bytes = 0
        self.last: dict[str, Any] = {}
        """Its last line of output."""

    def health(self) -> dict[str, Any]:
        """Its health report."""
        if self.process.poll() is not None:
            raise RuntimeError(f"the streamer ended with code {self.process.returncode}")
        self.peak_bytes = max(self.peak_bytes, self.seen.memory_info().rss)
        return health_report.read(self.settings.journal_dir()) or {}

    def wait_for(self, frames: int) -> None:
        """Wait until so many frames are in the journal, and the stores lag by at most one write."""
        progress, patience = -1, time.monotonic() + PATIENCE_S
        while True:
            now = self.health()
            lags = {name: store["lag"] for name, store in now.get("stores", {}).items()}
            done = now.get("journal_records", 0)
            if done >= frames and all(lag <= SMALL_LAG[name] for name, lag in lags.items()):
                return
            if done - sum(lags.values()) != progress:
                progress = done - sum(lags.values())
                patience = time.monotonic() + PATIENCE_S
            if time.monotonic() > patience:
                raise RuntimeError(f"nothing moves any more: {now}")
            time.sleep(0.5)

    def stop(self) -> dict[str, Any]:
        """Send SIGTERM; return its last line of output."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)
        self.last = health_report.read(self.settings.journal_dir()) or {}
        return self.last

    def check(self, frames: int, last: dict[str, Any]) -> None:
        """Check the counts: every delta once, with no gap, in both stores."""
        if any(store["lag"] for store in last["stores"].values()):
            raise RuntimeError(f"not everything was stored: {last}")
        client = clickhouse.connect(self.settings)
        counts = client.query(
            "SELECT count(), uniqExact(seq) FROM orderbook_events WHERE type = 'delta'"
        ).result_rows[0]
        gaps = client.query("SELECT count() FROM stream_events WHERE kind = 'gap'").result_rows
        client.close()
        files = f"{self.settings.archive_dir}/{ORDERBOOK_EVENTS.name}/**/*.parquet"
        cold = pl.scan_parquet(files).filter(pl.col("type") == "delta")
        archived = cold.select(pl.len(), pl.col("seq").n_unique().alias("seqs")).collect().row(0)
        if not counts == archived == (frames, frames) or gaps[0][0]:
            raise RuntimeError(
                f"{frames} frames were sent; ClickHouse has {counts}, Parquet {archived} (rows,"
                f" numbers), with {gaps[0][0]} gaps"
            )

    def close(self) -> None:
        """End it, in whatever state."""
        self.process.kill()
        self.process.wait()


def record(
    path: Path,
    frames: int,
    markets: int,
    rate: float = 0.0,
    *,
    snapshots: int = 0,
    environment: Mapping[str, str] = NOTHING,
) -> Recorded:
    """Record all that the feeder sends: `frames` deltas, and so many snapshots among them."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        feeding(path, markets, rate, frames + snapshots) as feeder,
        running(Path(folder) / "clickhouse") as url,
        closing(Recorder(Path(folder), feeder, url, environment)) as it,
    ):
        began_ns = int(feeder.hear()["began_ns"])
        it.wait_for(frames + snapshots)
        used = [_cpu(it.seen), _cpu(it.clickhouse), _cpu(psutil.Process(feeder.process.pid))]
        last = it.stop()
        it.check(frames, last)
        ended_ns = max(store["committed_ns"] for store in last["stores"].values())
        return Recorded(
            frames / (ended_ns - began_ns) * 1e9,
            frames / (last["last_frame_ns"] - began_ns) * 1e9,
            1e6 * used[0] / frames,
            1e6 * used[1] / frames,
            1e6 * used[2] / frames,
            it.peak_bytes / 2**20,
            last["delays_ms"],
        )


def resync_s(path: Path, markets: int) -> float:
    """Seconds from a lost connection until the book of every market is synced again; no deltas are sent."""
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
        feeding(path, markets, frames=0, again=True) as feeder,
        running(Path(folder) / "clickhouse") as url,
        closing(Recorder(Path(folder), feeder, url)) as it,
    ):
        feeder.hear()
        lost_ns = int(feeder.hear()["sent_ns"])
        patience = time.monotonic() + PATIENCE_S
        while True:
            now = it.health()
            if now.get("connections", 0) > 1 and now.get("synced") == markets:
                return float((now["updated_ns"] - lost_ns) / 1e9)
            if time.monotonic() > patience:
                raise RuntimeError(f"the books are not synced again: {now}")
            time.sleep(0.1)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def plain_environment() -> dict[str, str]:
    """This environment without the platform's own settings."""
    known = {name.upper() for name in Settings.model_fields}
    return {name: value for name, value in os.environ.items() if name.upper() not in known}

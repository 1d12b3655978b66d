"""One `kalshi-platform up` on ports and a folder of its own, seen from outside.

For the campaigns: who its processes are, what its streamers say of themselves, and a wait that ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from kalshi_platform import settings as platform_settings
from kalshi_platform.errors import StoreError
from kalshi_platform.health import health_report
from kalshi_platform.simulator.server import Simulator
from kalshi_platform_tests.ports import free_ports

PATIENCE_S = 150.0
BEHIND = 20_000
"""Records that a store may lack and still keep up."""

CLICKHOUSE, CODE_SERVER, DAEMON, WEBSERVER = "ClickHouse", "code server", "daemon", "webserver"
_PROGRAMS: dict[str, Callable[[list[str]], bool]] = {
    CLICKHOUSE: lambda argv: argv[-1:] == ["clickhouse"],
    CODE_SERVER: lambda argv: "api" in argv and "grpc" in argv,
    DAEMON: lambda argv: "dagster._daemon" in argv,
    WEBSERVER: lambda argv: "kalshi_platform.orchestration.host.webserver" in argv,
}
"""How the programs of `up` are recognised, by their arguments."""


class OutOfPatience(AssertionError):
    """What was waited for did not come."""


class Platform:
    """One `kalshi-platform up`, and the processes of it that can be ended."""

    def __init__(
        self, folder: Path, simulator: Simulator, *, markets: int, shards: int = 1
    ) -> None:
        """`markets`: so many have a book at least, when all is well."""
        self.data = folder / "data"
        self.markets, self.shards = markets, shards
        self.ui_port, store = free_ports(2)
        self._log = folder / "up.log"
        self.settings = platform_settings.load(
            kalshi_data_dir=self.data,
            embedded_clickhouse_port=store,
            clickhouse_url=f"http://127.0.0.1:{store}",
            kalshi_ws_url=simulator.ws_url,
            kalshi_rest_url=simulator.rest_url,
            stream_shards=shards,
        )
        fields = platform_settings.Settings.model_fields
        self.environment = {
            **{k: v for k, v in os.environ.items() if k.lower() not in fields},
            "KALSHI_DATA_DIR": str(self.data),
            "EMBEDDED_CLICKHOUSE_PORT": str(store),
            "KALSHI_WS_URL": simulator.ws_url,
            "KALSHI_REST_URL": simulator.rest_url,
            "STREAM_SHARDS": str(shards),
            "NO_COLOR": "1",
            "TMPDIR": str(folder),  # what is killed cannot clean up after itself
        }
        key = self.settings.exchange.key_file
        key.parent.mkdir(parents=True)
        shutil.copy(simulator.key_file, key)
        self.process: subprocess.Popen[bytes] | None = None

    # -- life --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start `up`."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kalshi_platform", "up", "--port", str(self.ui_port)],
                cwd=self.data.parent,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self) -> None:
        """Ctrl-C."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(60)

    def kill(self) -> None:
        """Leave no process of it, whatever state it is in."""
        for _ in range(10):  # one that was just being started is seen the next time
            family = self.family()
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=1.0)
            if not family:
                return

    # -- who it is ---------------------------------------------------------------------------------

    def family(self) -> list[psutil.Process]:
        """Every living process of this data folder."""
        found = []
        for process in psutil.process_iter():
            try:
                ours = (  # the embedded ClickHouse has no environment
                    process.environ().get("KALSHI_DATA_DIR") == str(self.data)
                    or str(self.data / "clickhouse") in process.cmdline()
                )
                if ours and process.pid != os.getpid():
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def programs(self, *names: str) -> list[psutil.Process]:
        """The processes of these programs of `up`: one each, or none while it is down."""
        return [p for p in self.family() if program_of(p) in names]

    def streamers(self) -> dict[int, int]:
        """Shard to the process that records it, by its own report."""
        return {shard: int(health["pid"]) for shard, health in enumerate(self.healths()) if health}

    # -- how it is ---------------------------------------------------------------------------------

    def healths(self) -> list[dict[str, Any]]:
        """Each streamer's own report, by shard; empty before its first."""
        return [
            health_report.read(self.settings.journal_dir(shard)) or {}
            for shard in range(self.shards)
        ]

    def recovered(self, since: float) -> bool:
        """Whether every book is synced, frames come and both stores take them."""
        healths = self.healths()
        return (
            all(_is_well(health, since) for health in healths)
            and sum(health["synced"] for health in healths) >= self.markets
        )

    def lacking(self) -> int:
        """How many records a store lacked when the streamers ended: the journal has them for the next run."""
        return sum(report["lag_frames"] for report in self.healths())

    def idle(self, *, every: bool = False) -> bool:
        """Whether nothing comes any more, and what came is in ClickHouse. Takes two seconds.

        `every`: in the archive, too, which takes it once a minute and when the streamer ends. Two reports must
        say so, not one twice: a streamer that gets no time writes none.
        """
        stores = ("clickhouse", "parquet") if every else ("clickhouse",)
        before = self.healths()
        time.sleep(2.0)
        return all(
            was["updated_ns"] < now["updated_ns"]
            and was["frames"] == now["frames"]
            and all(now["stores"][store]["lag"] < 50 for store in stores)
            for was, now in zip(before, self.healths(), strict=True)
        )

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Until the condition holds. Raises `OutOfPatience`."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            if self.process is not None and self.process.poll() is not None:
                self.start()  # as a person does: after a kill a port may stay taken for a moment
            try:
                if condition():
                    return
            except (StoreError, KeyError):
                time.sleep(0.5)  # it is just coming up
            if time.monotonic() > deadline:
                raise OutOfPatience(
                    f"waited {PATIENCE_S:.0f} s for {what}; last health: {self.healths()}"
                )
            time.sleep(0.2)


def program_of(process: psutil.Process) -> str | None:
    """Which program of `up` it is; None for any other process."""
    try:
        argv = process.cmdline()
    except psutil.Error:
        return None
    return next((name for name, fits in _PROGRAMS.items() if fits(argv)), None)


def _is_well(health: dict[str, Any], since: float) -> bool:
    return bool(health) and (
        health["updated_ns"] / 1e9 > since
        and health["last_frame_ns"] / 1e9 > since
        and health["synced"] == health["markets"]
        and psutil.pid_exists(health["pid"])
        and health["trouble"] is None
        and health["stores"]["clickhouse"]["committed_ns"] / 1e9 > since
        and health["stores"]["clickhouse"]["lag"] < BEHIND
    )


@contextmanager
def folder(prefix: str) -> Iterator[Path]:
    """A folder that is gone at the end."""
    with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as name:
        yield Path(name)

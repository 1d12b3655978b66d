"""`up` starts everything, survives kills, and leaves no process behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import dagster as dg
import httpx
import psutil
import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.commands import announcements
from kalshi_platform.commands.up import _Ending, _Platform
from kalshi_platform.orchestration.host.home import Home
from kalshi_platform.processes import Identity
from kalshi_platform_tests.ports import free_ports


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def until(condition: Callable[[], bool], why: Callable[[], str]) -> None:
    deadline = time.monotonic() + 180  # Dagster's programs take long to come up on a busy machine
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)


class Up:
    """One `kalshi-platform up` on a data folder and ports of its own."""

    def __init__(self, data: Path, port: int, clickhouse_port: int, **env: str) -> None:
        self.data, self.port = data, port
        self._clickhouse = f"http://127.0.0.1:{clickhouse_port}"
        self._output = data.with_suffix(".out")
        self._env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PROD_", "KALSHI_"))},
            "KALSHI_HOME": str(data.parent),
            "KALSHI_DATA_DIR": str(data),
            "EMBEDDED_CLICKHOUSE_PORT": str(clickhouse_port),
            **env,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, **env: str) -> None:
        with self._output.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kalshi_platform", "up", "--port", str(self.port)],
                cwd=self.data.parent,
                env={**self._env, **env},
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def end(self, number: signal.Signals) -> None:
        """Send a signal: `up` ends with status 0 and leaves no process."""
        assert self.process is not None
        self.process.send_signal(number)
        assert self.process.wait(timeout=90) == 0, self.output
        assert self.family() == []

    @property
    def output(self) -> str:
        return self._output.read_text()

    def says(self, words: str) -> None:
        until(lambda: words in self.output or self.ended, lambda: self.output + self.logs())
        assert words in self.output, self.output

    @property
    def ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def logs(self) -> str:
        return "\n".join(
            f"--- {log}\n{log.read_text()[-3000:]}" for log in (self.data / "logs").glob("*.log")
        )

    def family(self) -> list[psutil.Process]:
        """Every running process that was started for this data folder."""
        found = []
        for process in psutil.process_iter():
            try:
                # the embedded ClickHouse has no environment
                ours = (
                    process.environ().get("KALSHI_DATA_DIR") == str(self.data)
                    or str(self.data / "clickhouse") in process.cmdline()
                )
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def one(self, fits: Callable[[list[str]], bool]) -> psutil.Process:
        """The process with these arguments; others of the family may be ending."""
        for process in self.family():
            with suppress(psutil.Error):
                if fits(process.cmdline()):
                    return process
        raise AssertionError("none is such a process")

    def kill(self) -> None:
        """Kill every process that is left."""
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def instance(self) -> dg.DagsterInstance:
        return dg.DagsterInstance.from_config(str(self.data / "dagster"))

    def reported(self) -> set[str]:
        with self.instance() as instance:
            return instance.get_materialized_partitions(dg.AssetKey("orderbook_events"))

    def count(self, table: str, condition: str = "1") -> int:
        """Rows in ClickHouse; 0 while it does not answer."""
        query = f"SELECT count() FROM kalshi.{table} WHERE {condition}"
        try:
            answer = httpx.get(
                self._clickhouse, params={"query": query}, trust_env=False, verify=False
            )
        except httpx.HTTPError:
            return 0
        return int(answer.text) if answer.status_code == httpx.codes.OK else 0

    def runs(self) -> list[dg.DagsterRun]:
        """The streamer's runs, without those of schedules and automation."""
        with self.instance() as instance:
            return list(instance.get_runs(dg.RunsFilter(job_name="stream_orderbook")))


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    ui, simulator, clickhouse = free_ports(3)
    made = Up(
        tmp_path / "data",
        ui,
        clickhouse,
        SIMULATOR_PORT=str(simulator),
        SIMULATOR_MARKETS="5",
        NO_COLOR="1",
    )
    yield made
    made.kill()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_up_records_survives_kills_and_leaves_no_process(up: Up) -> None:
    # From nothing: rows, a green partition, a UI, and the summary says that the data is simulated.
    up.start()
    up.says("SIMULATED")
    up.says("Recording: ")
    until(lambda: bool(up.reported()), up.logs)
    until(lambda: up.count("orderbook_events") > 0, up.logs)
    assert httpx.get(f"http://127.0.0.1:{up.port}/server_info", trust_env=False).is_success
    [run] = up.runs()
    assert run.tags["kalshi/source"] == "simulator"

    # A second `up` on the same folder is refused.
    assert re.fullmatch(
        r"Error: Another .* runs on the data folder .*\n", refused(up.data.parent, "--port", "1")
    )

    # What dies comes back, and the recording goes on in the same run.
    up.one(lambda argv: argv[-1:] == ["simulate"]).kill()
    up.says("simulator ended (killed by SIGKILL); it starts again in 1 s.")
    up.one(lambda argv: argv[-1:] == ["clickhouse"]).kill()
    up.says("clickhouse ended (killed by SIGKILL); it starts again in 1 s.")
    until(lambda: up.count("stream_events", "kind = 'connected'") == 2, up.logs)
    up.one(lambda argv: "grpc" in argv).kill()
    up.says("code-server ended (killed by SIGKILL); it starts again in 1 s.")
    assert [found.run_id for found in up.runs()] == [run.run_id]

    # Ctrl-C: the run is flushed and canceled, and no process is left.
    up.end(signal.SIGINT)
    [ended] = up.runs()
    assert ended.status is dg.DagsterRunStatus.CANCELED
    assert not Identity.parse(ended.tags["kalshi/process"]).alive

    # Again, with ClickHouse away: recording goes on all the same, and up reports it.
    up.start(CLICKHOUSE_URL=f"http://127.0.0.1:{free_ports(1)[0]}")
    up.says("Recording goes on without it")
    up.says("Recording: ")
    assert len(up.runs()) == 2
    assert "Traceback" not in up.output

    # Killed: no program goes on writing.
    assert up.process is not None
    up.process.kill()
    up.process.wait()
    until(lambda: up.family() == [], lambda: str(up.family()))

    # Again: it goes on from where it was, and ClickHouse gets what it missed.
    up.start()
    until(lambda: up.count("stream_events", "kind = 'started'") == 3, up.logs)
    secret = (up.data / "clickhouse" / "password").read_text().strip()
    for process in up.family():
        with suppress(psutil.Error):
            assert secret not in " ".join([*process.cmdline(), *process.environ().values()])
    up.end(signal.SIGTERM)

    # The password that all of them wrote with is in its file, and nowhere else.
    assert secret not in up.output
    files = [path for path in up.data.rglob("*") if path.is_file()]
    assert [path.name for path in files if secret.encode() in path.read_bytes()] == ["password"]


def refused(tmp_path: Path, *args: str, **env: str) -> str:
    """The one line that a failing `up` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "kalshi_platform", "up", *args],
        env={**os.environ, "KALSHI_DATA_DIR": str(tmp_path / "data"), **env},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_a_taken_ui_port_is_named_with_the_way_out(tmp_path: Path) -> None:
    with taken_port() as port:
        output = refused(tmp_path, "--port", str(port), USE_CLICKHOUSE="0")
    assert f"Port {port}, needed for the Dagster UI, is taken" in output
    assert "`up --port 3001`" in output


def test_a_taken_simulator_port_is_named_with_its_setting(tmp_path: Path) -> None:
    [ui] = free_ports(1)
    with taken_port() as port:
        output = refused(tmp_path, "--port", str(ui), USE_CLICKHOUSE="0", SIMULATOR_PORT=str(port))
    assert f"Port {port}, needed for the exchange simulator, is taken" in output
    assert "SIMULATOR_PORT" in output


def test_a_taken_clickhouse_port_is_named_with_its_setting(tmp_path: Path) -> None:
    [ui] = free_ports(1)
    with taken_port() as port:
        output = refused(tmp_path, "--port", str(ui), EMBEDDED_CLICKHOUSE_PORT=str(port))
    assert f"Port {port}, needed for the embedded ClickHouse, is taken" in output
    assert "EMBEDDED_CLICKHOUSE_PORT" in output


def test_a_data_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file in the way")
    output = refused(tmp_path, USE_CLICKHOUSE="0")
    assert "KALSHI_DATA_DIR is" in output


def test_half_a_key_is_refused_before_anything_starts(tmp_path: Path) -> None:
    output = refused(tmp_path, PROD_KEYID="some-id")
    assert "PROD_KEYFILE is not set" in output
    assert not (tmp_path / "data").exists()


def test_a_missing_key_file_is_named_before_anything_starts(tmp_path: Path) -> None:
    output = refused(tmp_path, PROD_KEYID="some-id", PROD_KEYFILE=str(tmp_path / "key.pem"))
    assert f"Key file {tmp_path / 'key.pem'} does not exist" in output
    assert not (tmp_path / "data").exists()


def test_up_reports_on_the_shards_that_env_names_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses real settings and reports of a running process, which `up` reads each second."""
    env_file, sentences = tmp_path / ".env", list[str]()
    for name in [item for item in os.environ if item.startswith(("PROD_", "KALSHI_", "STREAM_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("KALSHI_HOME", str(tmp_path))
    monkeypatch.setenv("KALSHI_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(announcements, "ABSENT_S", 2.0)
    monkeypatch.setattr("kalshi_platform.commands.up.SHARDS_S", 0.0)
    env_file.write_text("STREAM_SHARDS=2\n")
    settings = platform_settings.load()
    home = Home(tmp_path, tmp_path / "workspace.yaml", "module", "location")
    platform = _Platform(settings, 1, home, tmp_path / "code.sock", _Ending())
    monkeypatch.setattr(platform, "say", sentences.append)

    def report(shard: int, state: str, trouble: str | None = None) -> None:
        own, now = Identity.own(), time.time_ns()
        times = ("updated_ns", "started_ns", "last_frame_ns", "last_heard_ns", "last_durable_ns")
        folder = settings.journal_dir(shard)
        folder.mkdir(parents=True, exist_ok=True)
        values = {"pid": own.pid, "pid_started": own.started, "frames": 10, "stores": {}}
        output = {**values, **dict.fromkeys(times, now), "state": state, "trouble": trouble}
        (folder / "health.json").write_text(json.dumps(output))

    def says(words: str) -> None:
        until(lambda: any(words in item for item in sentences), lambda: str(sentences))

    for shard in (0, 1):
        report(shard, "streaming")
    looks = threading.Thread(target=platform._announce)
    looks.start()
    try:
        says("Recording: 20 frames")
        env_file.write_text("STREAM_SHARDS=1\n")
        report(1, "stopped")
        report(0, "streaming", "parquet is away.")
        says("parquet is away.")
        report(0, "stopped")
        says("No streamer has run for")
        report(0, "streaming")
        says("A streamer runs again.")
        assert not any("Shard 1" in item for item in sentences), sentences
        env_file.write_text("STREAM_SHARDS=many\n")  # being changed: what was known holds
        env_file.write_text("STREAM_SHARDS=2\n")
        report(1, "streaming", "No space is left.")
        says("Shard 1: No space is left.")
    finally:
        platform._over.set()
        looks.join()

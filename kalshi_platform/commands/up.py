"""`up`: run the whole platform on this machine in the foreground.

Here are the programs, the order of their start and stop, and the output for the operator. Restarts and shutdown of
processes are in `processes.py`, what a program does is its own.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
from filelock import FileLock, Timeout
from rich.console import Console

from kalshi_platform import settings as platform_settings
from kalshi_platform.commands.announcements import Announcements
from kalshi_platform.errors import PlatformError, SettingsError
from kalshi_platform.exchange.signing import load_signer
from kalshi_platform.health import health_report, planned_stop, supervision, verdict
from kalshi_platform.orchestration.host.home import Home, prepare
from kalshi_platform.printable import printable
from kalshi_platform.processes import Program, ProgramSupervisor, require_free_port
from kalshi_platform.settings import Settings

log = logging.getLogger(__name__)

POLL_S = 0.25
"""Seconds between two checks of the programs, and two attempts to migrate while the embedded ClickHouse starts."""
SHARDS_S = 5.0
"""Seconds between two reads of STREAM_SHARDS, as in the supervisor; reading the settings costs milliseconds."""
SIMULATOR_S, CODE_S, UI_S = 20.0, 60.0, 60.0
"""Seconds to wait for each before the next program is started anyway."""


# The streamer's run is in the code server's session, and is drained with it, before everything else.
# The sum of the grace periods stays below 15 s.
DAGSTER_STAGE, DAGSTER_GRACE_S = 0, 11.0
# The paper market maker cancels its orders in the simulator, which must still run.
PAPER_STAGE, PAPER_GRACE_S = 0, 4.0
METRICS_GRACE_S = 2.0
SIMULATOR_STAGE, SIMULATOR_GRACE_S = 1, 1.0
CLICKHOUSE_STAGE, CLICKHOUSE_GRACE_S = 2, 2.5


@click.command("up")
@click.option(
    "--port",
    default=3000,
    show_default=True,
    type=click.IntRange(1, 65_535),
    help="Port of the Dagster UI.",
)
def command(port: int) -> None:
    """Run everything: ClickHouse, migrations, the Dagster UI and the streamer. Ctrl-C ends it all.

    Without a key it records the bundled exchange simulator, and says so.
    """
    settings = platform_settings.current()
    if not settings.exchange.simulated:
        load_signer(settings.exchange.key_file)  # report an unusable key before anything starts
    with _sole_user(settings.data_dir), _signals() as ending, _socket_folder() as sockets:
        check_ports(settings, port)
        home = prepare(
            settings.data_dir,
            sockets / planned_stop.SOCKET,
            settings.dagster_tick_retention_days,
            settings.stream_shards,
        )
        _Platform(settings, port, home, sockets / planned_stop.SOCKET, ending).run()


def check_ports(settings: Settings, port: int) -> None:
    """Raise `PortTaken` for the first port that is not free."""
    require_free_port(port, "the Dagster UI", "Give another one: `up --port 3001`.")
    if settings.embedded_clickhouse:
        require_free_port(
            settings.embedded_clickhouse_port,
            "the embedded ClickHouse",
            "Set EMBEDDED_CLICKHOUSE_PORT to another one; or, if it is a ClickHouse that you want to"
            " use, set CLICKHOUSE_URL to it, spelt `http://localhost:…`.",
        )
    if settings.metrics_port is not None:
        require_free_port(settings.metrics_port, "the metrics", "Set METRICS_PORT to another one.")
    if _own_simulator(settings):
        require_free_port(
            settings.simulator_port,
            "the exchange simulator",
            "Set SIMULATOR_PORT to another one.",
        )


def _own_simulator(settings: Settings) -> bool:
    return settings.exchange.simulated and settings.kalshi_ws_url is None


class _Ending:
    """The stop signals received so far: the first stops gracefully, a second one hurries."""

    def __init__(self) -> None:
        self._first: float | None = None
        self.hurried = False

    def ask(self, *_: Any) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = now
        elif now - self._first >= 1.0:
            # signals within a second are one request that was sent twice
            self.hurried = True

    @property
    def requested(self) -> bool:
        return self._first is not None


class _Platform:
    """The programs of one data folder, from their start to their end."""

    def __init__(
        self, settings: Settings, port: int, home: Home, socket: Path, ending: _Ending
    ) -> None:
        self._settings = settings
        self._ui = f"http://127.0.0.1:{port}"
        self._port = port
        self._home = home
        self._socket = socket
        self._ending = ending
        self._console = Console(highlight=False, soft_wrap=True)
        self._supervisor = ProgramSupervisor(
            settings.data_dir / "logs", self._environment(), self.say
        )
        self._over = threading.Event()
        self._began_ns = time.time_ns()
        self._clickhouse_trouble = ""
        """The trouble with ClickHouse that was printed already; the streamer reports the same."""

    def say(self, sentence: str) -> None:
        """Print a line with the time on the console; with LOG_FORMAT=json, log it."""
        if self._settings.log_format == "json":
            log.info("%s", sentence)
            return
        line = f"{datetime.now().astimezone():%H:%M:%S}  {printable(sentence)}"
        self._console.print(line, markup=False)

    def run(self) -> None:
        """Start everything, watch it until a signal, then stop everything."""
        try:
            self._start()
            while self._watch():
                pass
        finally:
            self._over.set()
            self._note_stop()
            self.say("Ending: the streamer flushes its records, then the other programs end.")
            self._supervisor.end(lambda: self._ending.hurried)
            self.say("Ended. `make run` or `kalshi-platform up` continues from here.")

    def _note_stop(self) -> None:
        """Note the stop, so that runs that end now count as planned."""
        try:
            planned_stop.note(self._settings.data_dir)
        except OSError as error:
            self.say(f"Runs that end now will be alerted as failed: {error}.")

    def _start(self) -> None:
        settings, start = self._settings, self._supervisor.start
        self.say(f"Starting; the programs' logs are in {self._supervisor.log_dir}.")
        if settings.embedded_clickhouse:
            start(self._own("clickhouse", CLICKHOUSE_STAGE, CLICKHOUSE_GRACE_S, self._pings))
        if settings.use_clickhouse:
            threading.Thread(target=self._migrate, name="migrate", daemon=True).start()
        threading.Thread(target=self._check_archive, name="archive", daemon=True).start()
        start(self._code_server())
        if _own_simulator(settings):
            start(
                self._own("simulator", SIMULATOR_STAGE, SIMULATOR_GRACE_S, self._simulator_answers)
            )
            self._wait_for(
                "simulator", SIMULATOR_S
            )  # it creates the key with which the streamer signs
        self._wait_for("code-server", CODE_S)
        if not self._ending.requested:
            start(self._daemon())  # it starts the streamer, so it comes before the other programs
            start(self._webserver())
        if settings.metrics_port is not None:
            start(self._own("metrics", DAGSTER_STAGE, METRICS_GRACE_S, lambda: True))
        if self._wait_for("webserver", UI_S):
            self._summary()
        if _own_simulator(settings) and settings.use_clickhouse and not self._ending.requested:
            start(self._own("paper-mm", PAPER_STAGE, PAPER_GRACE_S, lambda: True))
        threading.Thread(target=self._announce, name="announce", daemon=True).start()

    def _watch(self) -> bool:
        """Check the programs once; False if a stop was requested."""
        self._supervisor.watch()
        time.sleep(POLL_S)
        return not self._ending.requested

    def _wait_for(self, name: str, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not self._ending.requested and time.monotonic() < deadline:
            if self._supervisor.ready(name):
                return True
            self._watch()
        if not self._ending.requested:
            self.say(
                f"{name} does not answer yet after {seconds:.0f} s; going on without it for now."
                f" Its log: {self._supervisor.log_path(name)}"
            )
        return False

    # -- the programs --------------------------------------------------------------------------

    def _own(self, name: str, stage: int, grace_s: float, ready: Callable[[], bool]) -> Program:
        verb = {"simulator": "simulate"}.get(name, name)
        argv = (sys.executable, "-m", "kalshi_platform", verb)
        return Program(name, argv, ready, stage, grace_s)

    def _code_server(self) -> Program:
        # Not `dagster code-server start`, a proxy that survives when the server behind it is killed, and then
        # answers with errors for ever.
        argv = (
            *(sys.executable, "-m", "kalshi_platform.orchestration.host.code_server"),
            *("api", "grpc", "--lazy-load-user-code"),
            *("--socket", str(self._socket)),
            *("--module-name", self._home.module),
            *("--location-name", self._home.location),
            *self._log_format(),
        )
        return Program("code-server", argv, self._socket.exists, DAGSTER_STAGE, DAGSTER_GRACE_S)

    def _webserver(self) -> Program:
        argv = (
            *(sys.executable, "-m", "kalshi_platform.orchestration.host.webserver"),
            *("--host", "127.0.0.1", "--port", str(self._port)),
            *("--workspace", str(self._home.workspace)),
            *self._log_format(),
        )
        ready = _answers(f"{self._ui}/server_info")
        return Program("webserver", argv, ready, DAGSTER_STAGE, DAGSTER_GRACE_S)

    def _daemon(self) -> Program:
        argv = (
            *(sys.executable, "-m", "dagster._daemon", "run"),
            *("--workspace", str(self._home.workspace)),
            *self._log_format(),
        )
        return Program("daemon", argv, lambda: True, DAGSTER_STAGE, DAGSTER_GRACE_S)

    def _log_format(self) -> tuple[str, ...]:
        """The option for Dagster's own JSON log format, which has `event` and `timestamp`."""
        return ("--log-format", "json") if self._settings.log_format == "json" else ()

    def _pings(self) -> bool:
        return _answers(f"{self._settings.clickhouse_url}/ping")()

    def _simulator_answers(self) -> bool:
        key_file = self._settings.exchange.key_file
        return (
            key_file.exists() and _answers(f"{self._settings.exchange.rest_url}/exchange/status")()
        )

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            platform_settings.HOME: str(platform_settings.project().folder),
            "KALSHI_DATA_DIR": str(self._settings.data_dir),
            "DAGSTER_HOME": str(self._home.folder),
            "PYTHONUNBUFFERED": "1",
            "DAGSTER_UI_URL": os.environ.get("DAGSTER_UI_URL", self._ui),
        }

    # -- output for the operator ---------------------------------------------------------------

    def _summary(self) -> None:
        settings = self._settings
        if settings.use_clickhouse:
            kind = "embedded" if settings.embedded_clickhouse else "yours"
            clickhouse = (
                f"{settings.clickhouse_url} ({kind}), database {settings.clickhouse_database}"
            )
        else:
            clickhouse = "not used (USE_CLICKHOUSE=0)"
        lines = {
            "Dagster UI": self._ui,
            "ClickHouse": clickhouse,
            "Parquet": settings.archive_url,
            "Recording": _recorded(settings),
            "Metrics": (
                f"http://{settings.metrics_host}:{settings.metrics_port}/metrics"
                if settings.metrics_port is not None
                else "not served (METRICS_PORT)"
            ),
            "Logs": str(self._supervisor.log_dir),
            "Stop": "Ctrl-C",
        }
        if settings.log_format == "json":
            log.info("%s", "; ".join(f"{name}: {value}" for name, value in lines.items()))
            return
        self._console.print()
        for name, value in lines.items():
            self._console.print(f"  {name:<12}{printable(value)}", markup=False)
        self._console.print()

    def _announce(self) -> None:
        """Report the first recorded frames, the streamers' troubles, and missing streamers."""
        settings = self._settings
        where = (
            f"The streamer run's output is in the UI ({self._ui}/runs), and in"
            f" {self._supervisor.log_path('code-server')}."
        )
        shards, read_at = settings.stream_shards, time.monotonic()
        announcements = Announcements(where, time.monotonic())
        while not self._over.wait(1.0):
            if time.monotonic() - read_at >= SHARDS_S:
                shards, read_at = _shards(shards), time.monotonic()
            noted = supervision.read(settings.data_dir)
            supervised = noted.shards if noted and noted.at * 1e9 >= self._began_ns else {}
            reports = {
                shard: report
                for shard in {*range(shards), *supervised}
                if (report := _report(settings, shard, since_ns=self._began_ns)) is not None
            }
            judged = {shard: _judged(report) for shard, report in reports.items()}
            for sentence in announcements.look(
                shards,
                reports,
                supervised,
                time.monotonic(),
                known_trouble=self._clickhouse_trouble,
                judged=judged,
            ):
                self.say(sentence)

    def _check_archive(self) -> None:
        """Report an unreachable archive at once; the streamer, which starts later, reports it from then on."""
        from kalshi_platform.errors import StoreError
        from kalshi_platform.loading import presence

        try:
            presence.known_archive(self._settings)
        except StoreError as error:
            self.say(f"{error} Recording goes on without it: the journal keeps the records.")

    def _migrate(self) -> None:
        """Apply the migrations as soon as ClickHouse accepts them. Recording does not wait."""
        from kalshi_platform.clickhouse import migrations
        from kalshi_platform.errors import StoreError, StoreUnavailable

        # an unreachable ClickHouse is reported below; the driver's traceback adds nothing
        logging.getLogger("clickhouse_connect").setLevel(logging.CRITICAL)
        patient_until = time.monotonic() + (UI_S if self._settings.embedded_clickhouse else 0.0)
        wait_s = 0.5
        while not self._over.is_set():
            try:
                applied = migrations.migrate(self._settings, notify=self.say)
            except StoreError as error:
                starting = isinstance(error, StoreUnavailable) and time.monotonic() < patient_until
                if str(error) != self._clickhouse_trouble and not starting:
                    self._clickhouse_trouble = str(error)
                    self.say(
                        f"{error} Recording goes on without it: the journal and Parquet are"
                        " written, and ClickHouse gets it all when it is back."
                    )
                self._over.wait(POLL_S if starting else wait_s)
                wait_s = wait_s if starting else min(wait_s * 2, 15.0)
            else:
                if self._clickhouse_trouble or applied:
                    names = ", ".join(str(migration) for migration in applied) or "nothing to do"
                    self.say(f"ClickHouse answers; migrations: {names}.")
                return


def _recorded(settings: Settings) -> str:
    if settings.exchange.simulated:
        if settings.kalshi_ws_url is not None:
            return f"the simulator at {settings.kalshi_ws_url}: SIMULATED data"
        return (
            f"{settings.simulator_markets} SIMULATED markets: no PROD_KEYID is set."
            " Set PROD_KEYID and PROD_KEYFILE to record the exchange."
        )
    wanted = [
        *(["every market"] if settings.market_all else []),
        *settings.market_tickers,
        *([f"the markets in {settings.market_file}"] if settings.market_file else []),
        *(f"series {name}" for name in settings.market_series),
        *(f"event {name}" for name in settings.market_events),
    ]
    shown = ", ".join(wanted[:5]) + (f" and {len(wanted) - 5} more" if len(wanted) > 5 else "")
    return (
        f"{shown or 'no market: set MARKET_SERIES or MARKET_TICKERS'} at {settings.exchange.ws_url}"
    )


def _answers(url: str) -> Callable[[], bool]:
    """A check whether a local server answers over plain HTTP; called often, so it loads no certificates."""
    address = urlsplit(url)

    def ask() -> bool:
        connection = HTTPConnection(address.hostname or "", address.port, timeout=1.0)
        try:
            connection.request("GET", address.path)
            return connection.getresponse().status == HTTPStatus.OK
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()

    return ask


def _shards(known: int) -> int:
    """The configured number of shards, as the supervisor reads it in each tick."""
    try:
        return platform_settings.load().stream_shards
    except SettingsError:  # `.env` is being changed
        return known


def _judged(report: dict[str, Any]) -> list[verdict.Judgement]:
    """The judgements of a report; none for a damaged report, which `doctor` names."""
    try:
        return verdict.judgements(report, None, datetime.now(UTC), verdict.CONSOLE)
    except (KeyError, TypeError, ValueError):
        return []


def _report(settings: Settings, shard: int, since_ns: int) -> dict[str, Any] | None:
    """The streamer's health report, unless it is older than `since_ns` or damaged."""
    try:
        report = health_report.read(settings.journal_dir(shard))
    except (OSError, ValueError):
        return None
    return report if report is not None and report.get("updated_ns", 0) >= since_ns else None


@contextmanager
def _sole_user(data_dir: Path) -> Iterator[None]:
    """Context manager: lock the data folder. Raises `PlatformError` if another `up` uses it."""
    lock = FileLock(data_dir / "up.lock")
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise PlatformError(
            f"Another `kalshi-platform up` runs on the data folder {data_dir}. Use that one, end it,"
            " or set KALSHI_DATA_DIR to a folder of its own."
        ) from None
    except OSError as error:
        raise SettingsError(
            f"KALSHI_DATA_DIR is {str(data_dir)!r}, which cannot be written"
            f" ({error.strerror}). Give a folder that can."
        ) from None
    with lock:
        lock.release()  # `with` acquires it a second time
        yield


@contextmanager
def _signals() -> Iterator[_Ending]:
    """Context manager: SIGINT, SIGTERM and SIGHUP request the stop, also if SIGINT was ignored (`up &`)."""
    ending = _Ending()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    former = {number: signal.signal(number, ending.ask) for number in numbers}
    try:
        yield ending
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def _socket_folder() -> Iterator[Path]:
    """Context manager: a folder with a short path, since a socket's path is limited to about a hundred bytes."""
    folder = Path(tempfile.mkdtemp(prefix="kalshi-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)

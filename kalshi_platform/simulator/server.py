"""The simulator as a server: one port for WebSocket and REST, in a thread or in the foreground.

with running(SimulatorConfig(markets=5, rate=500)) as simulator:
    ...  # simulator.ws_url, .rest_url, .key_id, .key_file
    simulator.pause()
    assert recorded == simulator.books()
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import uvicorn

from kalshi_platform.loopback import is_loopback
from kalshi_platform.simulator import keys, replay, rest
from kalshi_platform.simulator.book import BookView
from kalshi_platform.simulator.config import SimulatorConfig
from kalshi_platform.simulator.errors import SimulatorError
from kalshi_platform.simulator.exchange import Exchange
from kalshi_platform.simulator.faults import Fault
from kalshi_platform.simulator.keys import KEY_ID, KeyRing, PublicKey
from kalshi_platform.simulator.market import ACTIVE
from kalshi_platform.simulator.pages import BASE
from kalshi_platform.simulator.replay import Recording
from kalshi_platform.simulator.venue import Venue
from kalshi_platform.simulator.websocket import WS_PATH, ClientSocket

STOP_SECONDS = 2
T = TypeVar("T")


class Simulator:
    """A simulated exchange on one port. Its methods may be called from any thread.

    with running(SimulatorConfig(markets=5, rate=500)) as simulator:
        ...  # simulator.ws_url, .rest_url, .key_id, .key_file
    """

    key_id = KEY_ID

    def __init__(self, config: SimulatorConfig | None = None) -> None:
        """Make its key where there is none, and bind the port at once.

        Args:
            config: What the exchange is like; None: the defaults.

        Raises:
            SimulatorError: The port is taken.
        """
        self.config = config or SimulatorConfig()
        self._own_folder: tempfile.TemporaryDirectory[str] | None = None
        if self.config.key_file is None:
            self._own_folder = tempfile.TemporaryDirectory(prefix="simulator-")
            self.key_file = Path(self._own_folder.name) / "key.pem"
        else:
            self.key_file = self.config.key_file
        self._keys = KeyRing(self.config.max_clock_skew_seconds)
        self._keys.register(KEY_ID, keys.own_key(self.key_file))
        self._socket = _bind(self.config.host, self.config.port)
        self._port: int = self._socket.getsockname()[1]
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: _Server | None = None
        self._venue: Venue | None = None
        self._failure: BaseException | None = None

    @property
    def port(self) -> int:
        """The port that it listens on, WebSocket and REST alike."""
        return self._port

    @property
    def _authority(self) -> str:
        host = self.config.host
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def ws_url(self) -> str:
        """The URL of the WebSocket."""
        return f"ws://{self._authority}{WS_PATH}"

    @property
    def rest_url(self) -> str:
        """The base URL of the REST interface."""
        return f"http://{self._authority}{BASE}"

    @property
    def control_url(self) -> str:
        """The base URL of the simulator's own pages."""
        return f"http://{self._authority}/simulator"

    def register(self, key_id: str, key: PublicKey) -> None:
        """Accept another key.

        Args:
            key_id: The id that requests with it carry.
            key: The public key.
        """
        self._keys.register(key_id, key)

    # running

    def start(self) -> None:
        """Serve from a thread of its own; returns when the server answers.

        Raises:
            Exception: What ended the server before it answered.
        """
        ready = threading.Event()

        def serve() -> None:
            try:
                asyncio.run(self._serve(ready.set))
            except BaseException as error:  # noqa: BLE001 - `start` raises it
                self._failure = error
            finally:
                ready.set()

        self._thread = threading.Thread(target=serve, name="simulator", daemon=True)
        self._thread.start()
        ready.wait()
        if self._failure is not None:
            self.stop()

    def stop(self) -> None:
        """Close every connection and end the thread. Harmless when it is not running.

        Raises:
            Exception: What ended the simulator before its time.
        """
        if self._thread is not None:
            if self._server is not None:
                self._server.should_exit = True
            self._thread.join()
            self._thread = None
        self._socket.close()
        if self._own_folder is not None:
            self._own_folder.cleanup()
            self._own_folder = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def serve_forever(self, ready: Callable[[], None]) -> None:
        """Serve in the foreground until SIGINT or SIGTERM.

        Args:
            ready: Called when the server answers.
        """
        try:
            asyncio.run(self._serve(ready, signals=(signal.SIGINT, signal.SIGTERM)))
        finally:
            self.stop()

    async def _serve(
        self, ready: Callable[[], None], signals: tuple[signal.Signals, ...] = ()
    ) -> None:
        config = self.config
        venue = Venue(config, _exchange(config), self._keys)
        server = _Server(
            uvicorn.Config(
                rest.application(venue, loopback=is_loopback(config.host)),
                ws=ClientSocket,
                lifespan="on",
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=STOP_SECONDS,
            ),
            ready,
        )
        self._loop, self._venue, self._server = asyncio.get_running_loop(), venue, server
        for number in signals:
            self._loop.add_signal_handler(number, server.request_exit)
        for fault in config.faults:
            venue.inject(fault)
        flow = asyncio.create_task(venue.run())
        serving = asyncio.create_task(server.serve([self._socket]))
        try:
            await asyncio.wait({flow, serving}, return_when=asyncio.FIRST_COMPLETED)
            server.should_exit = True  # if the order flow has failed, `await flow` raises
            await serving
        finally:
            venue.stop()
            flow.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await flow

    # state and faults

    def books(self) -> dict[str, BookView]:
        """Read every market's book, past every cache: what a recording must equal.

        Returns:
            Ticker to book.

        Raises:
            SimulatorError: The simulator is not running.
        """
        return self._call(lambda venue: venue.exchange.books())

    def open_markets(self) -> frozenset[str]:
        """List the markets that are traded now.

        Returns:
            Their tickers.

        Raises:
            SimulatorError: The simulator is not running.
        """
        return self._call(
            lambda venue: frozenset(
                market.ticker for market in venue.exchange.markets() if market.status == ACTIVE
            )
        )

    def trades(self) -> dict[str, dict[str, Any]]:
        """Read the last trades, past every page.

        Returns:
            Trade id to the trade as REST has it.

        Raises:
            SimulatorError: The simulator is not running.
        """
        return self._call(
            lambda venue: {trade.trade_id: trade.rest() for trade in venue.exchange.trades}
        )

    def state(self) -> dict[str, Any]:
        """Read connections, subscriptions and counts.

        Returns:
            Name to value, as the simulator's own pages have them.

        Raises:
            SimulatorError: The simulator is not running.
        """
        return self._call(lambda venue: venue.state())

    def pause(self) -> None:
        """Freeze the books. What happened before has been handed to every client's socket.

        Raises:
            SimulatorError: The simulator is not running.
        """
        self._call(lambda venue: venue.pause())

    def resume(self) -> None:
        """Continue the order flow.

        Raises:
            SimulatorError: The simulator is not running.
        """
        self._call(lambda venue: venue.resume())

    def inject(self, fault: Fault | str) -> None:
        """Inject a fault, now or after the fault's own delay.

        Args:
            fault: The fault, or its text as `kalshi-platform simulate --fault` takes it.

        Raises:
            SimulatorError: The text is no fault, or the simulator is not running.
        """
        wanted = Fault.parse(fault) if isinstance(fault, str) else fault
        self._call(lambda venue: venue.inject(wanted))

    def _call(self, what: Callable[[Venue], T]) -> T:
        venue, loop = self._venue, self._loop
        if venue is None or loop is None or loop.is_closed():
            raise SimulatorError("The simulator is not running. Start it first.")

        async def on_the_loop() -> T:
            return what(venue)

        return asyncio.run_coroutine_threadsafe(on_the_loop(), loop).result(timeout=30)


@contextlib.contextmanager
def running(config: SimulatorConfig | None = None) -> Iterator[Simulator]:
    """Run a simulator in a thread of its own, for as long as the block lasts.

    Args:
        config: What the exchange is like; None: the defaults.

    Yields:
        The simulator, once it answers.

    Raises:
        SimulatorError: The port is taken.
    """
    simulator = Simulator(config)
    try:
        simulator.start()
        yield simulator
    finally:
        simulator.stop()


class _Server(uvicorn.Server):
    """uvicorn that reports when it answers, and does not handle signals."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # uvicorn would raise the signal again when it is done, and the exit code is lost

    def request_exit(self) -> None:
        self.should_exit = True


def _exchange(config: SimulatorConfig) -> Exchange | Recording:
    if config.replay is not None:
        return replay.read(config.replay, time.time_ns(), timed=config.replay_speed is not None)
    return Exchange(
        markets=config.markets,
        rate=config.rate,
        seed=config.seed,
        now_ns=time.time_ns(),
        rolling_markets=config.rolling,
        rolling_seconds=config.rolling_seconds,
    )


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise SimulatorError(
            f"The simulator cannot listen on {host}:{port} ({error.strerror})."
            " Is one running already? Choose another port: SIMULATOR_PORT, or --port."
        ) from None
    return listener

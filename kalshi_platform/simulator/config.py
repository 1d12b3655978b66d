"""The simulator's start options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kalshi_platform.simulator.errors import SimulatorError
from kalshi_platform.simulator.faults import Fault
from kalshi_platform.simulator.wire import CURRENT, Wire


@dataclass(frozen=True, kw_only=True)
class SimulatorConfig:
    """Options of a simulated exchange; the defaults suit a test.

    Raises:
        SimulatorError: A number makes no sense.
    """

    host: str = "127.0.0.1"
    port: int = 0
    """0: a free port."""
    markets: int = 40
    rate: float = 200.0
    """Order-book deltas a second over all markets; 0 keeps every book as it opened."""
    seed: int = 1
    rolling_markets: int | None = None
    """How many of the markets open and close repeatedly; None: one in eight."""
    rolling_seconds: float = 300.0
    """How long a rolling market is open."""
    key_file: Path | None = None
    """Private key of the client, created if it is missing; None: in a temporary folder."""
    faults: tuple[Fault, ...] = ()
    replay: Path | None = None
    """Recorded frames to send in place of the simulator's own."""
    replay_speed: float | None = None
    """1 = as recorded, 10 = ten times as fast, None = as fast as the client reads."""
    heartbeat_seconds: float = 10.0
    tick_seconds: float = 0.02
    """How often the order flow advances; the events in between keep their own times."""
    max_backlog_bytes: int = 64 * 1024 * 1024
    """A client with more unread bytes gets error 25."""
    max_markets_per_subscription: int = 500_000
    """More are refused with error 26."""
    yes_price: bool | None = None
    """Whether no bids are quoted on the YES scale; None: as `use_yes_price` requests."""
    wire: Wire = CURRENT
    """Form of the messages; a replay has the form of its frames."""
    max_clock_skew_seconds: float = 10.0
    rest_cache_seconds: float = 15.0
    """How long the REST order books are cached, as the real exchange's are."""

    def __post_init__(self) -> None:
        """Validate the numbers.

        Raises:
            SimulatorError: The sentence names the field, its value and what to give.
        """
        least = {"markets": 1, "rate": 0, "rolling_seconds": 1, "heartbeat_seconds": 0.01}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise SimulatorError(f"{name} is {getattr(self, name)}: give at least {low}.")
        if not 0 <= self.rolling <= self.markets:
            raise SimulatorError(
                f"rolling_markets is {self.rolling}: give 0 to {self.markets}, the number of markets."
            )
        if self.replay_speed is not None and self.replay_speed <= 0:
            raise SimulatorError(f"replay_speed is {self.replay_speed}: give more than 0.")
        if self.replay is not None and self.wire is not CURRENT:
            raise SimulatorError(
                f"A replay has the wire of its frames, not {self.wire}: leave --wire out."
            )

    @property
    def rolling(self) -> int:
        """How many of the markets roll."""
        return self.markets // 8 if self.rolling_markets is None else self.rolling_markets

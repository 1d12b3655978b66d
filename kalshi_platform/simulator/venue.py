"""Run one exchange, its clients and injected faults on one event loop.

Joins what knows nothing of each other: the exchange moves on, every session hears of it, faults
fall due. Everything here runs on the loop's own thread; server.py is the door from others.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from kalshi_platform.simulator import keys, orders, replay
from kalshi_platform.simulator.config import SimulatorConfig
from kalshi_platform.simulator.errors import SimulatorError
from kalshi_platform.simulator.exchange import Exchange
from kalshi_platform.simulator.faults import ON_CLOCKS, Fault, Target
from kalshi_platform.simulator.frames import Happening
from kalshi_platform.simulator.keys import KeyRing
from kalshi_platform.simulator.replay import Recording, ReplaySession
from kalshi_platform.simulator.session import Session
from kalshi_platform.simulator.websocket import ClientSocket
from kalshi_platform.simulator.wire import CURRENT, Wire

REPLY_SECONDS = 0.002
"""How long commands are gathered before they are answered, in any order."""
STEPS_AT_A_TIME = 4_000

AnySession = Session | ReplaySession

logger = logging.getLogger(__name__)


class Venue:
    """The state of a running simulator."""

    def __init__(
        self, config: SimulatorConfig, exchange: Exchange | Recording, key_ring: KeyRing
    ) -> None:
        self.config = config
        self.exchange = exchange
        self.keys = key_ring
        self.paused = False
        self.heartbeat_seconds = config.heartbeat_seconds
        self.stale_until = 0.0
        """Monotonic time until which the REST order books do not change."""
        self._random = random.Random(f"{config.seed}:venue")  # noqa: S311  a model, not a secret
        self._sessions: dict[ClientSocket, AnySession] = {}
        self._numbers: dict[ClientSocket, int] = {}
        self._dials = 0
        self._armed: dict[Target, Counter[str]] = {Target.DIAL: Counter(), Target.REST: Counter()}
        self._for_the_next: list[Fault] = []
        self._begun: Counter[str] = Counter()
        self._timers: set[asyncio.TimerHandle] = set()

    # the clock

    async def run(self) -> None:
        """Advance the exchange, tick by tick, until cancelled."""
        while True:
            began = time.monotonic()
            self.tick()
            spent = time.monotonic() - began
            await asyncio.sleep(max(self.config.tick_seconds - spent, 0))

    def tick(self) -> None:
        """Send the events since the last tick to every client."""
        if self.paused:
            self.exchange.now_ns = time.time_ns()
        else:
            self._publish(self.exchange.advance(time.time_ns(), STEPS_AT_A_TIME))
        for client, session in list(self._sessions.items()):
            if session.busy:
                session.work()
            client.flush()
            if client.backlog > 2 * self.config.max_backlog_bytes:
                client.reset()  # it sends commands and never reads
            elif client.backlog > self.config.max_backlog_bytes:
                session.overflow()

    def pause(self) -> None:
        """Freeze the order flow and the market states; commands are still answered.

        All that happened before has then been written to the clients' sockets.
        """
        self.paused = True
        for client in list(self._sessions):
            client.flush()

    def resume(self) -> None:
        """Continue."""
        if self.paused:
            self.paused = False
            self.exchange.resume(time.time_ns())

    @property
    def maintained(self) -> bool:
        """Whether the exchange is under maintenance."""
        window = None if isinstance(self.exchange, Recording) else self.exchange.maintenance
        return window is not None and self.exchange.now_ns < window[1]

    @property
    def trading(self) -> bool:
        """Whether orders are taken."""
        return not self.paused and not self.maintained

    def ordered(self, requests: Sequence[orders.Request]) -> list[orders.Answered]:
        """Execute own orders and send their effects to every client at once."""
        assert isinstance(self.exchange, Exchange)  # noqa: S101 - the page has looked
        answers = orders.execute(self.exchange, requests, self.exchange.now_ns)
        self._publish(self.exchange.happened())
        return answers

    def _publish(self, happenings: Iterable[Happening]) -> None:
        for session in self._sessions.values():
            session.publish(happenings)

    # clients

    def turn_away(self, headers: Mapping[str, str], path: str) -> tuple[int, object] | None:
        """Return status and body for a refused connect; None for an accepted one."""
        for name in self._armed[Target.DIAL]:
            if self._use_up(Target.DIAL, name):
                return {
                    "dial401": (401, keys.UNKNOWN_KEY),
                    "dial429": (429, {"error": "too many requests"}),
                    "dial502": (502, {"msg": "bad gateway"}),
                    "skew": (401, keys.EXPIRED),
                }[name]
        if self.maintained:
            return 502, {"msg": "bad gateway"}
        refusal = self.keys.refusal(headers, "GET", path, time.time_ns() // 1_000_000)
        return None if refusal is None else (401, refusal)

    def connected(self, client: ClientSocket) -> AnySession:
        """Create a session for an accepted client."""
        self._dials += 1
        session = self._session()
        self._sessions[client] = session
        self._numbers[client] = self._dials
        waiting, self._for_the_next = self._for_the_next, []
        for fault in waiting:  # once the handshake is through
            self._later(0, functools.partial(self._hit, client, session, fault))
        return session

    def _session(self) -> AnySession:
        if isinstance(self.exchange, Recording):
            speed = self.config.replay_speed
            return ReplaySession(self.exchange, self._random, speed, time.monotonic_ns)
        return Session(
            self.exchange,
            self._random,
            max_markets=self.config.max_markets_per_subscription,
            yes_price=self.config.yes_price,
            wire=self.config.wire,
            time_ns=time.time_ns,
        )

    def disconnected(self, client: ClientSocket) -> None:
        """Remove a disconnected client."""
        self._sessions.pop(client, None)
        self._numbers.pop(client, None)

    def soon(self, client: ClientSocket) -> None:
        """Answer the client's commands in a moment, together with those that follow at once."""
        self._later(REPLY_SECONDS, lambda: self._answer(client))

    def _answer(self, client: ClientSocket) -> None:
        session = self._sessions.get(client)
        if session is not None and session.busy:
            session.work()
            client.flush()

    # faults

    def inject(self, fault: Fault) -> None:
        """Apply a fault, after its delay.

        Raises SimulatorError for a fault that a replay or the wire cannot have, and for `crossed`,
        `close_early` and `halt` where there is no market for it now.
        """
        if isinstance(self.exchange, Recording):
            replay.check(fault)
        elif self.config.wire is Wire.AUGUST and fault.name in ON_CLOCKS:
            raise SimulatorError(
                f"Fault {fault.name} is about clocks, which the wire {self.config.wire} does not have."
                f" Start the simulator with --wire {CURRENT}."
            )
        if fault.at:
            self._later(fault.at, lambda: self._begin_late(fault))
        else:
            self._begin(fault)

    def rest_fault(self) -> tuple[int, object] | None:
        """Return status and body of a REST fault that is due for this request."""
        for name in self._armed[Target.REST]:
            if self._use_up(Target.REST, name):
                return {
                    "rest401": (401, keys.UNKNOWN_KEY),
                    "rest429": (429, {"error": "too many requests"}),
                    "rest500": (500, {"msg": "internal server error"}),
                }[name]
        return None

    def _begin_late(self, fault: Fault) -> None:
        try:
            self._begin(fault)
        except SimulatorError as error:
            logger.warning("Fault %s does not happen: %s", fault.name, error)

    def _begin(self, fault: Fault) -> None:
        logger.info("fault %s", fault)
        self._begun[fault.name] += 1
        if fault.name == "stale_rest":
            self.stale_until = time.monotonic() + (fault.argument or 0)
        elif fault.target is Target.EXCHANGE:
            self._happen(fault)
        elif fault.target in self._armed:
            self._armed[fault.target][fault.name] += fault.count
        elif self._sessions:
            for client, session in list(self._sessions.items()):
                self._hit(client, session, fault)
        else:
            self._for_the_next.append(fault)

    def _happen(self, fault: Fault) -> None:
        exchange = self.exchange
        assert isinstance(exchange, Exchange)  # noqa: S101 - `inject` has looked
        happen = {
            "crossed": exchange.cross,
            "close_early": exchange.close_early,
            "halt": exchange.halt,
            "maintenance": exchange.maintain,
            "clock_reset": exchange.reset_clocks,
        }[fault.name]
        self._publish(happen(fault.argument or 0))
        if fault.name == "maintenance":
            for client in list(self._sessions):
                client.reset()

    def _hit(self, client: ClientSocket, session: AnySession, fault: Fault) -> None:
        if client not in self._sessions:
            return
        if fault.name == "drop":
            client.reset()
        elif fault.name == "close":
            client.close(fault.count)
        elif fault.name == "hang":
            client.hang(fault.argument)
        elif fault.name == "slow":
            client.hold(fault.argument or 0)
        else:
            session.tamper(fault.name, fault.count)
            client.flush()

    def _use_up(self, target: Target, name: str) -> bool:
        left = self._armed[target]
        if left[name] <= 0:
            return False
        left[name] -= 1
        return True

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        def run() -> None:
            self._timers.discard(timer)
            act()

        timer = asyncio.get_running_loop().call_later(seconds, run)
        self._timers.add(timer)

    def stop(self) -> None:
        """Stop all pending actions."""
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()

    # state

    def books(self) -> dict[str, Any]:
        """Return every current book, as in GET /simulator/books: exact texts, prices ascending."""
        return {
            market.ticker: {
                "market_id": market.market_id,
                "clock": market.clock,
                "status": market.status,
                **market.view().texts(),
            }
            for market in self.exchange.markets()
        }

    def state(self) -> dict[str, Any]:
        """Return every connection and subscription, as in GET /simulator/state."""
        return {
            "paused": self.paused,
            "connected": self._dials,
            "faults": dict(self._begun),
            "deltas": self.exchange.deltas,
            "shed_seconds": round(self.exchange.shed_seconds, 3),
            "connections": [
                {
                    "number": self._numbers[client],
                    "backlog_bytes": client.backlog,
                    "sent": dict(session.sent),
                    "subscriptions": session.state(),
                }
                for client, session in self._sessions.items()
            ],
        }

"""The faults that can be injected, by name; docs/simulator.md has the table.

`NAME[:ARG][@SECONDS]`, for instance `gap`, `gap:3`, `hang:20@60`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

from kalshi_platform.simulator.errors import SimulatorError


class Target(Enum):
    """What a fault affects."""

    CONNECTION = "every connection that is open, or else the next one"
    DIAL = "the next dials"
    REST = "the next REST requests"
    EXCHANGE = "the exchange"


@dataclass(frozen=True)
class Kind:
    """One fault that the simulator knows."""

    target: Target
    argument: str
    """Meaning of the argument."""
    default: float | None
    does: str


KINDS: dict[str, Kind] = {
    "gap": Kind(
        Target.CONNECTION, "deltas", 1, "loses deltas that changed the book; their seq is used up"
    ),
    "duplicate": Kind(Target.CONNECTION, "deltas", 1, "sends a delta twice, the same seq on both"),
    "truncated": Kind(
        Target.CONNECTION, "deltas", 1, "sends only the first half of a delta; its seq is used up"
    ),
    "negative": Kind(
        Target.CONNECTION, "deltas", 1, "sends a delta that takes more out than the level holds"
    ),
    "malformed": Kind(
        Target.CONNECTION, "frames", 1, "sends an extra frame that is not JSON and uses no seq"
    ),
    "unknown_type": Kind(
        Target.CONNECTION,
        "frames",
        1,
        "sends a message of an unknown type on the order-book sid; it uses a seq",
    ),
    "huge": Kind(
        Target.CONNECTION, "MiB", 2, "repeats a snapshot, padded with spaces to that size"
    ),
    "error10": Kind(Target.CONNECTION, "-", None, "ends the order-book subscription with error 10"),
    "error25": Kind(Target.CONNECTION, "-", None, "ends every subscription with error 25"),
    "trade_gap": Kind(Target.CONNECTION, "trades", 1, "loses trades; their seq is used up"),
    "trade_error10": Kind(
        Target.CONNECTION, "-", None, "ends the trade subscription with error 10; the books go on"
    ),
    "trade_refused": Kind(
        Target.CONNECTION, "subscriptions", 1, "refuses subscriptions to trades with error 8"
    ),
    "lifecycle_gap": Kind(
        Target.CONNECTION,
        "messages",
        1,
        "loses messages about markets' lives; their seq is used up",
    ),
    "lifecycle_refused": Kind(
        Target.CONNECTION,
        "subscriptions",
        1,
        "refuses subscriptions to markets' lives with error 8",
    ),
    "drop": Kind(Target.CONNECTION, "-", None, "resets the TCP connection"),
    "close": Kind(Target.CONNECTION, "close code", 1001, "closes the WebSocket cleanly"),
    "hang": Kind(
        Target.CONNECTION,
        "seconds",
        None,
        "falls silent with the socket open: no frame, no ping; then a reset (never, without an argument)",
    ),
    "slow": Kind(Target.CONNECTION, "seconds", 5, "keeps all frames back, then sends them at once"),
    "dial401": Kind(Target.DIAL, "dials", 1, "401, unknown key"),
    "dial429": Kind(Target.DIAL, "dials", 1, "429"),
    "dial502": Kind(Target.DIAL, "dials", 1, "502"),
    "skew": Kind(Target.DIAL, "dials", 1, "401, as if the client's clock were off"),
    "rest401": Kind(Target.REST, "requests", 1, "401, unknown key"),
    "rest429": Kind(Target.REST, "requests", 1, "429 with a string for an error"),
    "rest500": Kind(Target.REST, "requests", 1, "500"),
    "stale_rest": Kind(Target.REST, "seconds", 60, "the REST order books stay as they are now"),
    "clock_fell": Kind(
        Target.CONNECTION, "deltas", 1, "sends a delta with half of its clock, below the one before"
    ),
    "maintenance": Kind(
        Target.EXCHANGE,
        "seconds",
        5,
        "stops trading, resets every connection and refuses new ones; the schedule names the window",
    ),
    "clock_reset": Kind(
        Target.EXCHANGE,
        "-",
        None,
        "lets every market's clock begin again at 1, as only maintenance may",
    ),
    "crossed": Kind(Target.EXCHANGE, "seconds", 2, "crosses the busiest market's book, for real"),
    "close_early": Kind(
        Target.EXCHANGE,
        "seconds",
        2,
        "moves the busiest rolling market's close, and sends a message",
    ),
    "halt": Kind(
        Target.EXCHANGE,
        "seconds",
        2,
        "deactivates the busiest market for a while, and sends a message",
    ),
}

ON_CLOCKS = {"clock_fell", "clock_reset"}
"""Faults that only a wire with clocks can have."""

_WRITTEN = re.compile(r"(?P<name>[a-z_0-9]+)(:(?P<arg>\d+(\.\d+)?))?(@(?P<at>\d+(\.\d+)?))?")


@dataclass(frozen=True)
class Fault:
    """A requested fault: `argument` as its kind defines it, due `at` seconds after the request."""

    name: str
    argument: float | None
    at: float = 0.0

    @property
    def target(self) -> Target:
        """What it affects."""
        return KINDS[self.name].target

    @property
    def count(self) -> int:
        """The argument as a count."""
        return int(self.argument or 0)

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Parse `NAME[:ARG][@SECONDS]`. Raises SimulatorError with the known names."""
        match = _WRITTEN.fullmatch(text.strip())
        if match is None:
            raise SimulatorError(
                f"Fault {text!r} is not NAME[:NUMBER][@SECONDS], such as gap, gap:3 or hang:20@60."
            )
        kind = KINDS.get(match["name"])
        if kind is None:
            raise SimulatorError(
                f"Fault {match['name']!r} is unknown. There are: {', '.join(KINDS)}."
            )
        if match["arg"] is not None and kind.argument == "-":
            raise SimulatorError(f"Fault {match['name']} takes no argument, not {match['arg']}.")
        argument = float(match["arg"]) if match["arg"] is not None else kind.default
        return cls(match["name"], argument, float(match["at"] or 0))

"""A sequenced channel beside the order books, on the same connection, without I/O: trades, life events.

Whatever becomes of it, the books go on: refused, it is asked for again later; ended by the exchange, it
is subscribed to anew. Where something was missed, it says between which instants (`MissedFrames`), so that
somebody can fetch it elsewhere. Times are seconds of a monotonic clock, passed in by the caller.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

TRADES = "trade"
LIFECYCLE = "market_lifecycle_v2"
FILTERED = frozenset({TRADES})
"""Channels that are asked for the followed markets alone. Unfiltered, trades would bring those of every
multivariate combination along, which are nearly all markets that there are. Life events have no filter."""
BATCH = 500
"""Tickers in one command: some 20 kB, far below any frame limit."""
AGAIN_S = 1.0
"""Before a command that met a busy exchange, or an ended subscription, is sent again."""
REFUSED_AGAIN_S = 300.0
"""Before something that was refused is asked for again: somebody may have mended it."""


@dataclass(frozen=True)
class MissedFrames:
    """Frames of a channel that did not come over the stream."""

    channel: str
    sid: int
    """The subscription that missed them."""
    since: float
    until: float
    cause: str
    """sequence, subscription or connection."""
    missing: int | None = None
    """How many numbers are missing, where that is known. Acknowledgements consume numbers, too."""


@dataclass(frozen=True)
class Ask:
    """A command to send. `action` is subscribe, add_markets or delete_markets."""

    channel: str
    action: str
    tickers: Sequence[str]


class AuxiliaryChannel:
    """One channel: which markets it carries, and since when it is deaf."""

    def __init__(self, channel: str, unheard_since: float | None = None) -> None:
        """`unheard_since`: when it was last heard on an earlier connection."""
        self.channel = channel
        self.filtered = channel in FILTERED
        self.sid: int | None = None
        self.heard_at = 0.0
        """When a frame of its last came."""
        self.unheard_since = unheard_since
        """Since when it has been deaf, None while it is not (or was never heard)."""
        self.lost: list[MissedFrames] = []
        """The caller takes them away."""
        self._cause = "connection"
        self._carried: dict[str, None] = {}
        """Tickers that the exchange has been asked to carry."""
        self._touched: set[str] = set()
        """Tickers that it may carry: asked for once, and not known to be dropped since."""
        self._to_add: dict[str, None] = {}
        self._to_drop: dict[str, None] = {}
        self._refused: dict[str, None] = {}
        self._unanswered = 0
        self._asked = False
        """A subscribe is on its way."""
        self._not_before = 0.0
        self._refused_until = 0.0

    # -- what is wanted ----------------------------------------------------------------------

    def want(self, ticker: str) -> None:
        """Carry this market."""
        if self.filtered:
            self._to_drop.pop(ticker, None)
            if ticker not in self._carried:
                self._to_add[ticker] = None

    def drop(self, ticker: str) -> None:
        """Carry this market no longer."""
        self._to_add.pop(ticker, None)
        self._refused.pop(ticker, None)
        if ticker in self._touched:
            self._to_drop[ticker] = None

    # -- commands out ------------------------------------------------------------------------

    def asks(self, now: float) -> Iterator[Ask]:
        """What is to be sent, for as long as the caller takes it."""
        if now < self._not_before:
            return
        if self._refused and now >= self._refused_until:
            self._to_add.update(self._refused)
            self._refused.clear()
        if self.sid is None:
            first = tuple(islice(self._to_add, BATCH))
            if not self._asked and (first or not self.filtered):
                self._asked = True
                yield self._ask("subscribe", first)
            return
        while self._to_drop:
            gone = tuple(islice(self._to_drop, BATCH))
            for ticker in gone:
                del self._to_drop[ticker]
                self._carried.pop(ticker, None)
            yield Ask(self.channel, "delete_markets", gone)
        while self._to_add:
            yield self._ask("add_markets", tuple(islice(self._to_add, BATCH)))

    def _ask(self, action: str, tickers: Sequence[str]) -> Ask:
        for ticker in tickers:
            del self._to_add[ticker]
            self._carried[ticker] = None
            self._touched.add(ticker)
        self._unanswered += 1
        return Ask(self.channel, action, tickers)

    # -- what became of them -----------------------------------------------------------------

    def begun(self, sid: int, now: float) -> None:
        """The exchange has given it a sid."""
        self.sid = sid
        self.heard_at = now
        self._asked = False

    def confirmed(self, ask: Ask, now: float) -> None:
        """The exchange has done what was asked."""
        self._answered(ask)
        if ask.action == "delete_markets":
            self._touched.difference_update(t for t in ask.tickers if t not in self._carried)
        whole = self.sid is not None and not self._unanswered and not self._to_add
        if whole and self.unheard_since is not None:
            self._lose(self.unheard_since, now, self._cause)
            self.unheard_since = None

    def failed(self, ask: Ask, now: float, *, refused: bool) -> None:
        """The exchange has not done it: `refused` for good, or it was busy, or did not answer."""
        self._answered(ask)
        if ask.action == "delete_markets":
            wanted = self._carried.keys() | self._to_add.keys()
            self._to_drop.update((t, None) for t in ask.tickers if t not in wanted)
        else:
            later = refused and ask.action == "add_markets"
            again = self._refused if later else self._to_add
            for ticker in ask.tickers:
                if self._carried.pop(ticker, 0) is None and ticker not in self._to_drop:
                    again[ticker] = None
        if ask.action == "subscribe":
            self._deaf(now, "subscription")
        if refused and ask.action == "add_markets":
            self._refused_until = now + REFUSED_AGAIN_S  # others may join meanwhile
        else:
            self._not_before = now + (REFUSED_AGAIN_S if refused else AGAIN_S)

    def _answered(self, ask: Ask) -> None:
        if ask.action == "subscribe":
            self._asked = False
        if ask.action != "delete_markets":
            self._unanswered = max(self._unanswered - 1, 0)

    def ended(self, now: float) -> None:
        """The exchange has ended the subscription: begin another."""
        self._deaf(self.heard_at, "subscription")
        self.sid = None
        self._asked = False
        self._unanswered = 0
        self._to_add = {t: None for t in self._carried if t not in self._to_drop} | self._to_add
        self._to_drop.clear()
        self._carried.clear()
        self._touched.clear()
        self._not_before = now + AGAIN_S

    def gap(self, missing: int, now: float) -> None:
        """Numbers are missing since it was last heard."""
        self._lose(self.heard_at, now, "sequence", missing)

    def _deaf(self, since: float, cause: str) -> None:
        if self.unheard_since is None:
            self.unheard_since, self._cause = since, cause

    def _lose(self, since: float, until: float, cause: str, missing: int | None = None) -> None:
        self.lost.append(MissedFrames(self.channel, self.sid or 0, since, until, cause, missing))


def auxiliary_channels(
    channels: Iterable[str], unheard_since: float | None = None
) -> dict[str, AuxiliaryChannel]:
    """By name, in the order in which they are subscribed to."""
    return {channel: AuxiliaryChannel(channel, unheard_since) for channel in channels}

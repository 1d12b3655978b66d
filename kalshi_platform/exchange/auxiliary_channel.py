"""An auxiliary channel: a sequenced channel besides the order books on the same connection. No I/O.

Auxiliary channels (trades, lifecycle events) never affect a book. A refused subscription is retried later;
one that the exchange ended is subscribed to again. Where frames were missed, `MissedFrames` reports the
time span, so that the recorder can backfill it over REST. Times are seconds of a monotonic clock, passed
in by the caller. Sending commands and matching replies belongs in `session`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

TRADES = "trade"
LIFECYCLE = "market_lifecycle_v2"
FILTERED = frozenset({TRADES})
"""Channels that are subscribed to for the followed markets only. Without a filter the trade channel would
include every multivariate combination, which is nearly all markets. Lifecycle events have no filter."""
BATCH = 500
"""Tickers in one command: about 20 kB, far below any frame limit."""
RETRY_S = 1.0
"""Delay before a retry after a busy exchange or an ended subscription."""
REFUSED_RETRY_S = 300.0
"""Delay before a retry after a refusal: the cause may have been fixed at the exchange."""


@dataclass(frozen=True)
class MissedFrames:
    """A span in which frames of a channel were not received over the stream."""

    channel: str
    sid: int
    """The subscription that missed them; 0 without one."""
    since: float
    until: float
    cause: str
    """sequence, subscription or connection."""
    missing: int | None = None
    """How many sequence numbers are missing; None if unknown. Acknowledgements consume numbers, too."""


@dataclass(frozen=True)
class ChannelCommand:
    """A command to send. `action` is subscribe, add_markets or delete_markets."""

    channel: str
    action: str
    tickers: Sequence[str]


class AuxiliaryChannel:
    """State of one channel: the markets it carries, and since when its frames are missed."""

    def __init__(self, channel: str, silent_since: float | None = None) -> None:
        """`silent_since`: when an earlier connection last received a frame of this channel."""
        self.channel = channel
        self.filtered = channel in FILTERED
        self.sid: int | None = None
        self.last_frame_at = 0.0
        """When the last frame of this channel was received."""
        self.silent_since = silent_since
        """Since when its frames are missed; None while subscribed, and before the first subscription."""
        self.missed: list[MissedFrames] = []
        """Reported spans; the caller removes them."""
        self._cause = "connection"
        self._subscribed: dict[str, None] = {}
        """Tickers that the subscription has been asked to carry."""
        self._possibly_subscribed: set[str] = set()
        """Tickers that the subscription may carry: requested once and not confirmed as removed since."""
        self._to_add: dict[str, None] = {}
        self._to_remove: dict[str, None] = {}
        self._refused: dict[str, None] = {}
        self._unanswered = 0
        self._subscribe_pending = False
        """Whether a subscribe command awaits its reply."""
        self._retry_at = 0.0
        self._refused_until = 0.0

    # -- market selection --------------------------------------------------------------------

    def add(self, ticker: str) -> None:
        """Carry this market."""
        if self.filtered:
            self._to_remove.pop(ticker, None)
            if ticker not in self._subscribed:
                self._to_add[ticker] = None

    def remove(self, ticker: str) -> None:
        """Stop carrying this market."""
        self._to_add.pop(ticker, None)
        self._refused.pop(ticker, None)
        if ticker in self._possibly_subscribed:
            self._to_remove[ticker] = None

    # -- commands out ------------------------------------------------------------------------

    def due_commands(self, now: float) -> Iterator[ChannelCommand]:
        """Yield the commands that are due; each counts as sent once the caller takes it."""
        if now < self._retry_at:
            return
        if self._refused and now >= self._refused_until:
            self._to_add.update(self._refused)
            self._refused.clear()
        if self.sid is None:
            first = tuple(islice(self._to_add, BATCH))
            if not self._subscribe_pending and (first or not self.filtered):
                self._subscribe_pending = True
                yield self._command("subscribe", first)
            return
        while self._to_remove:
            removed = tuple(islice(self._to_remove, BATCH))
            for ticker in removed:
                del self._to_remove[ticker]
                self._subscribed.pop(ticker, None)
            yield ChannelCommand(self.channel, "delete_markets", removed)
        while self._to_add:
            yield self._command("add_markets", tuple(islice(self._to_add, BATCH)))

    def _command(self, action: str, tickers: Sequence[str]) -> ChannelCommand:
        for ticker in tickers:
            del self._to_add[ticker]
            self._subscribed[ticker] = None
            self._possibly_subscribed.add(ticker)
        self._unanswered += 1
        return ChannelCommand(self.channel, action, tickers)

    # -- replies in --------------------------------------------------------------------------

    def subscribed(self, sid: int, now: float) -> None:
        """The exchange assigned the subscription id `sid`."""
        self.sid = sid
        self.last_frame_at = now
        self._subscribe_pending = False

    def confirmed(self, command: ChannelCommand, now: float) -> None:
        """The exchange acknowledged the command."""
        self._answered(command)
        if command.action == "delete_markets":
            self._possibly_subscribed.difference_update(
                t for t in command.tickers if t not in self._subscribed
            )
        complete = self.sid is not None and not self._unanswered and not self._to_add
        if complete and self.silent_since is not None:
            self._report_missed(self.silent_since, now, self._cause)
            self.silent_since = None

    def failed(self, command: ChannelCommand, now: float, *, refused: bool) -> None:
        """The command failed: `refused` by the exchange, else because it was busy or sent no reply."""
        self._answered(command)
        if command.action == "delete_markets":
            wanted = self._subscribed.keys() | self._to_add.keys()
            self._to_remove.update((t, None) for t in command.tickers if t not in wanted)
        else:
            later = refused and command.action == "add_markets"
            to_retry = self._refused if later else self._to_add
            for ticker in command.tickers:
                if self._subscribed.pop(ticker, 0) is None and ticker not in self._to_remove:
                    to_retry[ticker] = None
        if command.action == "subscribe":
            self._mark_silent(now, "subscription")
        if refused and command.action == "add_markets":
            self._refused_until = now + REFUSED_RETRY_S  # other markets are not held up by it
        else:
            self._retry_at = now + (REFUSED_RETRY_S if refused else RETRY_S)

    def _answered(self, command: ChannelCommand) -> None:
        if command.action == "subscribe":
            self._subscribe_pending = False
        if command.action != "delete_markets":
            self._unanswered = max(self._unanswered - 1, 0)

    def ended(self, now: float) -> None:
        """The exchange ended the subscription: subscribe again."""
        self._mark_silent(self.last_frame_at, "subscription")
        self.sid = None
        self._subscribe_pending = False
        self._unanswered = 0
        self._to_add = {
            t: None for t in self._subscribed if t not in self._to_remove
        } | self._to_add
        self._to_remove.clear()
        self._subscribed.clear()
        self._possibly_subscribed.clear()
        self._retry_at = now + RETRY_S

    def gap(self, missing: int, now: float) -> None:
        """`missing` sequence numbers were skipped since the last frame."""
        self._report_missed(self.last_frame_at, now, "sequence", missing)

    def _mark_silent(self, since: float, cause: str) -> None:
        if self.silent_since is None:
            self.silent_since, self._cause = since, cause

    def _report_missed(
        self, since: float, until: float, cause: str, missing: int | None = None
    ) -> None:
        self.missed.append(MissedFrames(self.channel, self.sid or 0, since, until, cause, missing))


def auxiliary_channels(
    channels: Iterable[str], silent_since: float | None = None
) -> dict[str, AuxiliaryChannel]:
    """Create channels, by name, in the order in which they are subscribed to."""
    return {channel: AuxiliaryChannel(channel, silent_since) for channel in channels}

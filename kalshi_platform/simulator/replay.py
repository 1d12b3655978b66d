"""Replay a file of recorded frames in place of the exchange, byte for byte.

Each client gets the whole file, from its first `orderbook_delta` subscription on; the replies in
the file count as the replies to its subscriptions. Other commands wait for the end of the file
and are then answered from the final books, with the sids and seqs going on where the file ended.
Both wire forms are read: the current one and the integer cents of before March 2026.
"""

from __future__ import annotations

import gzip
import random
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from kalshi_platform import typed_json
from kalshi_platform.exchange.numbers import price_units, qty_units
from kalshi_platform.simulator.book import SIDES, Book, BookView
from kalshi_platform.simulator.catalog import SECOND, Series
from kalshi_platform.simulator.errors import SimulatorError
from kalshi_platform.simulator.faults import KINDS, Fault
from kalshi_platform.simulator.frames import Happening, Trade
from kalshi_platform.simulator.grid import covering
from kalshi_platform.simulator.market import ACTIVE, Listing, Market
from kalshi_platform.simulator.session import ORDERBOOK, Session
from kalshi_platform.simulator.wire import Wire

BYTES_AT_A_TIME = 1024 * 1024
_A_DAY = 86_400 * SECOND
_CHANGES_NUMBERS = {
    "negative",
    "unknown_type",
    "huge",
    "error10",
    "error25",
    "crossed",
    "trade_gap",
    "trade_error10",
    "trade_refused",
    "lifecycle_gap",
    "lifecycle_refused",
    "close_early",
    "halt",
    "clock_fell",
    "clock_reset",
    "maintenance",
}


class _Frame(msgspec.Struct):
    type: str
    sid: int | None = None
    seq: int | None = None
    msg: Any = None


class _Asked(msgspec.Struct):
    cmd: str = ""
    params: dict[str, Any] | None = None


@dataclass
class _Ladders:
    market_id: str
    clock: int
    sides: dict[str, dict[int, int]]


@dataclass
class _Channel:
    sid: int
    seq: int = 0


@dataclass
class Recording:
    """A complete recorded connection, with the books as they are at its end.

    Stands where an `Exchange` does; nothing happens in it.
    """

    frames: tuple[bytes, ...]
    kinds: tuple[str, ...]
    offsets_ns: tuple[int, ...] | None
    """Receive time of each frame, from the first one's; None if no times were recorded."""
    channels: dict[str, tuple[int, int]]
    """Channel to sid and last seq."""
    now_ns: int
    wire: Wire
    """The form of the frames."""
    _markets: dict[str, Market]
    trades: deque[Trade] = field(default_factory=deque)
    deltas: int = 0
    shed_seconds: float = 0.0

    def market(self, ticker: str) -> Market | None:
        """The market of that ticker."""
        return self._markets.get(ticker)

    def markets(self) -> Iterable[Market]:
        """Every market of the recording."""
        return self._markets.values()

    @property
    def series(self) -> tuple[Series, ...]:
        """The series that the tickers belong to."""
        names = dict.fromkeys(market.listing.series_ticker for market in self._markets.values())
        return tuple(Series(name, name, "Recorded", "") for name in names)

    def books(self) -> dict[str, BookView]:
        """Every market's book at the end of the recording."""
        return {ticker: market.view() for ticker, market in self._markets.items()}

    def advance(self, now_ns: int, limit: int | None = None) -> list[Happening]:
        """Only advance the time: a recording has no events of its own."""
        self.now_ns = now_ns
        return []

    def resume(self, now_ns: int) -> None:
        """Do nothing: a recording is never paused."""


class ReplaySession:
    """One client of a recording: in place of `Session`, and with one behind it for the end."""

    patient = True

    def __init__(
        self,
        recording: Recording,
        shuffle: random.Random,
        speed: float | None,
        clock_ns: Callable[[], int],
    ) -> None:
        last_sid = max((sid for sid, _ in recording.channels.values()), default=0)
        self._recording = recording
        self._session = Session(recording, shuffle, last_sid=last_sid, wire=recording.wire)
        self._speed = speed
        self._clock_ns = clock_ns
        self._began_ns: int | None = None
        self._next = 0
        self._held: list[bytes | str] = []
        self._tampering: Counter[str] = Counter()
        self._ended = False
        self.sent: Counter[str] = self._session.sent

    @property
    def busy(self) -> bool:
        """Whether there are commands to answer."""
        return self._session.busy

    def receive(self, message: bytes | str) -> None:
        """Handle a command: it starts the replay, is answered now, or waits for the end."""
        try:
            asked = typed_json.decode(message, _Asked)
        except msgspec.DecodeError:
            asked = _Asked()
        params = asked.params or {}
        channels = params.get("channels")
        if self._ended or not isinstance(channels, list):
            (self._session.receive if self._ended else self._held.append)(message)
            return
        if ORDERBOOK in channels and self._began_ns is None:
            self._began_ns = self._clock_ns()
        others = [name for name in channels if name not in self._recording.channels]
        if others:
            command = {**msgspec.json.decode(message), "params": {**params, "channels": others}}
            self._session.receive(msgspec.json.encode(command))

    def work(self) -> None:
        """Answer commands that are not part of the recording."""
        self._session.work()

    def publish(self, happenings: Iterable[Happening]) -> None:
        """Do nothing: a recording has no events of its own."""

    def overflow(self) -> None:
        """A replay waits for its client."""

    def tamper(self, fault: str, count: int) -> None:
        """Spoil the next `count` recorded deltas."""
        self._tampering[fault] += count

    def state(self) -> list[dict[str, Any]]:
        """Return the subscriptions and the progress of the replay."""
        progress = {"replayed_frames": self._next, "of": len(self._recording.frames)}
        return [progress, *self._session.state()]

    def take(self) -> list[bytes]:
        """Return the frames to send now: those that are due, in batches."""
        out: list[bytes] = []
        size = 0
        due = self._due()
        while self._next < due and size < BYTES_AT_A_TIME:
            kind = self._recording.kinds[self._next]
            for frame in self._spoilt(kind, self._recording.frames[self._next]):
                out.append(frame)
                size += len(frame)
            self._next += 1
        if (
            self._began_ns is not None
            and not self._ended
            and self._next == len(self._recording.frames)
        ):
            self._end()
        return out + self._session.take()

    def _due(self) -> int:
        if self._began_ns is None:
            return 0
        offsets = self._recording.offsets_ns
        if self._speed is None or offsets is None:
            return len(self._recording.frames)
        return bisect_right(offsets, (self._clock_ns() - self._began_ns) * self._speed)

    def _spoilt(self, kind: str, frame: bytes) -> Sequence[bytes]:
        spoils = kind == "orderbook_delta" and self._tampering
        fault = (
            next((name for name, left in self._tampering.items() if left), None) if spoils else None
        )
        if fault is None:
            self.sent[kind] += 1
            return (frame,)
        self._tampering[fault] -= 1
        self.sent["lost" if fault == "gap" else fault] += 1
        return {
            "gap": (),
            "duplicate": (frame, frame),
            "truncated": (frame[: len(frame) // 2],),
            "malformed": (b'{"type":"orderbook_delta","seq":,\n', frame),
        }[fault]

    def _end(self) -> None:
        self._ended = True
        tickers = [market.ticker for market in self._recording.markets()]
        for channel, (sid, seq) in self._recording.channels.items():
            self._session.adopt(channel, sid, seq, tickers)
        for message in self._held:
            self._session.receive(message)
        self._held.clear()


def check(fault: Fault) -> None:
    """Raises SimulatorError for a fault that cannot happen in a replay."""
    if fault.name in _CHANGES_NUMBERS:
        there_are = ", ".join(sorted(KINDS.keys() - _CHANGES_NUMBERS))
        raise SimulatorError(
            f"Fault {fault.name} would change the recorded numbers or books."
            f" In a replay there are: {there_are}."
        )


def read(path: Path, now_ns: int, *, timed: bool) -> Recording:
    """Read a `.jsonl` or `.jsonl.gz` file of frames, and the times file beside it.

    Raises SimulatorError for a file that is not one, and, where it is to be `timed`, for one
    without a `.recv*` file beside it.
    """
    lines = [line for line in _bytes(path).split(b"\n") if line.strip()]
    if not lines:
        raise SimulatorError(f"{path} holds no frames. Give a recording: one JSON frame per line.")
    kinds: list[str] = []
    channels: dict[str, _Channel] = {}
    by_sid: dict[int, _Channel] = {}
    ladders: dict[str, _Ladders] = {}
    deltas = 0
    wire = Wire.AUGUST
    for number, line in enumerate(lines, 1):
        try:
            frame = typed_json.decode(line, _Frame)
            if frame.type == "subscribed":
                sid = frame.msg["sid"]
                channels[frame.msg["channel"]] = by_sid[sid] = _Channel(sid)
            if frame.type.startswith("orderbook_"):
                if frame.sid is not None and frame.sid not in by_sid:
                    channels[ORDERBOOK] = by_sid[frame.sid] = _Channel(frame.sid)
                _apply(ladders, frame)
                if "clock" in frame.msg:
                    wire = Wire.OCTOBER
                deltas += frame.type == "orderbook_delta"
        except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
            raise SimulatorError(
                f"{path}, line {number}, is not a frame that can be replayed: {error!r}."
                " To replay a loss, give the whole recording and --fault gap."
            ) from None
        if frame.sid in by_sid and frame.seq is not None:
            by_sid[frame.sid].seq = frame.seq
        kinds.append(frame.type)
    offsets = _offsets(path, len(lines))
    if timed and offsets is None:
        raise SimulatorError(
            f"{path} has no receive times beside it ({_stem(path)}.recv*), so it has no pace."
            " Leave --replay-speed out, and it is sent as fast as the client reads."
        )
    return Recording(
        frames=tuple(line + b"\n" for line in lines),
        kinds=tuple(kinds),
        offsets_ns=offsets,
        channels={name: (channel.sid, channel.seq) for name, channel in channels.items()},
        now_ns=now_ns,
        wire=wire,
        _markets={
            ticker: _market(ticker, ladder, now_ns)
            for ticker, ladder in ladders.items()
            if ladder.market_id  # without an id it is the answer for a ticker that does not exist
        },
        deltas=deltas,
    )


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.suffix == ".gz" else raw
    except gzip.BadGzipFile:
        raise SimulatorError(f"{path} is not a gzip file, though its name says so.") from None
    except OSError as error:
        raise SimulatorError(f"{path} cannot be read ({error.strerror}).") from None


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def _offsets(path: Path, count: int) -> tuple[int, ...] | None:
    beside = sorted(path.parent.glob(f"{_stem(path)}.recv*"))
    if not beside:
        return None
    texts = _bytes(beside[0]).decode().split()
    if len(texts) != count:
        raise SimulatorError(f"{beside[0]} has {len(texts)} times for {count} frames in {path}.")
    try:
        times = [_time_ns(text) for text in texts]
    except ValueError as error:
        raise SimulatorError(f"{beside[0]} holds something that is not a time: {error}.") from None
    return tuple(time - times[0] for time in times)


def _time_ns(text: str) -> int:
    """Unix milliseconds, or ISO 8601."""
    if text.isdecimal():
        return int(text) * 1_000_000
    moment = datetime.fromisoformat(text)
    return int(moment.timestamp()) * SECOND + moment.microsecond * 1000


def _apply(ladders: dict[str, _Ladders], frame: _Frame) -> None:
    msg = frame.msg
    ticker = msg["market_ticker"]
    if frame.type == "orderbook_snapshot":
        sides = {side: _levels(msg, side) for side in SIDES}
        ladders[ticker] = _Ladders(msg["market_id"], msg.get("clock", 0), sides)
        return
    ladders[ticker].clock = msg.get("clock", 0)
    ladder = ladders[ticker].sides[msg["side"]]
    price = price_units(msg["price_dollars"]) if "price_dollars" in msg else msg["price"] * 100
    change = qty_units(msg["delta_fp"]) if "delta_fp" in msg else msg["delta"] * 100
    size = ladder.get(price, 0) + change
    if size < 0:
        raise ValueError(f"{ticker} {msg['side']} {price} would hold less than nothing")
    if size:
        ladder[price] = size
    else:
        ladder.pop(price, None)


def _levels(msg: dict[str, Any], side: str) -> dict[int, int]:
    """One ladder of a snapshot, whichever form it has: the most exact one wins."""
    if f"{side}_dollars_fp" in msg:
        return {price_units(price): qty_units(qty) for price, qty in msg[f"{side}_dollars_fp"]}
    if f"{side}_dollars" in msg:
        return {price_units(price): qty * 100 for price, qty in msg[f"{side}_dollars"]}
    return {cents * 100: qty * 100 for cents, qty in msg.get(side) or ()}


def _market(ticker: str, ladders: _Ladders, now_ns: int) -> Market:
    prices = frozenset(price for ladder in ladders.sides.values() for price in ladder)
    grid = covering(prices)
    book = Book(grid)
    level_of = {price: level for level, price in enumerate(grid.prices)}
    for side, name in enumerate(SIDES):
        for price, size in ladders.sides[name].items():
            book.change(side, level_of[price], size)
    listing = Listing(
        ticker=ticker,
        event_ticker=ticker.rsplit("-", 1)[0],
        series_ticker=ticker.split("-", 1)[0],
        title=ticker,
        subtitle=ticker,
        grid=grid,
        created_ns=now_ns - _A_DAY,
        open_ns=now_ns - _A_DAY,
        close_ns=now_ns + 365 * _A_DAY,
        weight=1.0,
    )
    return Market(listing, ladders.market_id, book, status=ACTIVE, clock=ladders.clock)

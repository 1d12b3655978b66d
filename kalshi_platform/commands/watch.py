"""`watch`: show the live feed of a few markets. Nothing is written to a database.

On a terminal it draws a live ladder; piped, or with --compact or --raw, it prints one line per frame.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from dataclasses import dataclass, field
from typing import IO

import click
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from websockets.exceptions import ConnectionClosed

from kalshi_platform import settings as platform_settings
from kalshi_platform.exchange.book import SIDES, Book, BookError, SyncState, delta_change
from kalshi_platform.exchange.connection import LIVENESS_S, LiveConnection, dial
from kalshi_platform.exchange.errors import CredentialsError, ExchangeError
from kalshi_platform.exchange.frames import DecodeError, decode_delta, decode_head, decode_snapshot
from kalshi_platform.exchange.numbers import ONE_DOLLAR, contracts, dollars
from kalshi_platform.exchange.rest import RestClient
from kalshi_platform.exchange.session import Session
from kalshi_platform.exchange.signing import Credentials, load_signer
from kalshi_platform.journal.kind import Kind
from kalshi_platform.printable import printable
from kalshi_platform.settings import Exchange

LADDER_LEVELS = 12
LADDER_RATE = 10.0
RETRY_S = 2.0


@click.command()
@click.option(
    "--ticker", "tickers", multiple=True, required=True, help="Market ticker; may be repeated."
)
@click.option("--compact", is_flag=True, help="One short line per change: best bid and ask only.")
@click.option("--raw", is_flag=True, help="Print the frames verbatim.")
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    help="Most lines (or screens) a second.",
)
@click.option(
    "--ndjson",
    type=click.File("ab"),
    help="Append every frame, verbatim, to this file (`simulate --replay` reads it).",
)
def command(
    tickers: tuple[str, ...], compact: bool, raw: bool, rate: float | None, ndjson: IO[bytes] | None
) -> None:
    """Show the live feed of a market: [SUB], [SNAP], then deltas; on a terminal a live ladder.

    Nothing is written to a database. Ctrl-C ends it.
    """
    settings = platform_settings.load()
    exchange = settings.exchange
    if exchange.simulated and not exchange.key_file.exists():
        raise CredentialsError(
            "PROD_KEYID is not set, and the exchange simulator is not running either. Set PROD_KEYID and"
            " PROD_KEYFILE, or start it: kalshi-platform simulate."
        )
    with RestClient(exchange) as rest:
        unknown = rest.unknown_tickers(tickers)
    if unknown:
        raise ExchangeError(
            f"The exchange knows no market {', '.join(sorted(unknown))}. Tickers are as in the address of"
            " a market's page, in capitals."
        )
    ladder = sys.stdout.isatty() and not compact and not raw
    watcher = _Watcher(tickers, compact=compact, raw=raw, rate=rate, ndjson=ndjson)
    asyncio.run(_watch(exchange, watcher, ladder=ladder))


@dataclass
class _Watcher:
    """The watched books, and the output."""

    tickers: tuple[str, ...]
    compact: bool
    raw: bool
    rate: float | None
    ndjson: IO[bytes] | None
    books: dict[str, Book] = field(default_factory=dict)
    frames: int = 0
    status: str = "connecting"
    quiet: bool = False
    """True while a ladder is drawn instead of lines."""
    _held_back: int = 0
    _next_line_at: float = 0.0

    def __post_init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Start a new connection: every book waits for its snapshot."""
        self.books = {ticker: Book(ticker) for ticker in self.tickers}

    def take(self, kind: Kind, frame: bytes) -> None:
        """Apply a frame to the books, append it to the file and print its line."""
        self.frames += 1
        if self.ndjson is not None:
            self.ndjson.write(frame.rstrip(b"\n") + b"\n")
        line, important = self._apply(kind, frame)
        if self.raw:
            line = frame.decode(errors="backslashreplace").rstrip("\n")
        self.say(line, important=important)

    def say(self, line: str, *, important: bool = True) -> None:
        """Print a line, unless a ladder is shown or the rate is reached; the next line counts the skipped ones."""
        if self.quiet:
            return
        now = time.monotonic()
        if self.rate is not None and not important and now < self._next_line_at:
            self._held_back += 1
            return
        if self._held_back:
            line += f"  (+{self._held_back} not shown)"
            self._held_back = 0
        if self.rate is not None:
            self._next_line_at = now + 1 / self.rate
        click.echo(printable(line))

    def _apply(self, kind: Kind, frame: bytes) -> tuple[str, bool]:
        """Apply a frame to its book; returns its line, and whether the rate limit must not skip it."""
        text = frame.decode(errors="backslashreplace").strip()
        try:
            if kind is Kind.SNAPSHOT:
                return self._snapshot_line(frame), True
            if kind is Kind.DELTA:
                return self._delta_line(frame), False
            label = "MALFORMED" if kind is Kind.MALFORMED else decode_head(frame).type.upper()
        except BookError as error:
            return f"[STALE] {error}", True
        except DecodeError as error:
            return f"[MALFORMED] {error}: {text}", True
        return f"[{'SUB' if label == 'SUBSCRIBED' else label}] {text}", True

    def _snapshot_line(self, frame: bytes) -> str:
        snapshot = decode_snapshot(frame)
        book = self.books.setdefault(snapshot.market_ticker, Book(snapshot.market_ticker))
        book.apply_snapshot(snapshot)
        levels = " ".join(f"{side}={len(book.ladders[side])}" for side in SIDES)
        return (
            f"[SNAP] {book.market_ticker} seq={decode_head(frame).seq} levels {levels} {best(book)}"
        )

    def _delta_line(self, frame: bytes) -> str:
        delta = decode_delta(frame)
        book = self.books.setdefault(delta.market_ticker, Book(delta.market_ticker))
        change = delta_change(delta)
        size = book.apply_delta(change)
        if self.compact:
            return f"{book.market_ticker} {best(book)}"
        sign = "+" if change.qty > 0 else ""
        return (
            f"[DELTA] {book.market_ticker} seq={decode_head(frame).seq} {change.side}"
            f" {dollars(change.price)} {sign}{contracts(change.qty)} -> {contracts(size)} {best(book)}"
        )


def best(book: Book) -> str:
    """Best YES bid and ask with sizes; the ask is 1 minus the best NO bid."""
    bid, no_bid = book.best("yes"), book.best("no")
    left = f"{dollars(bid[0])} x {contracts(bid[1])}" if bid else "none"
    right = f"{dollars(ONE_DOLLAR - no_bid[0])} x {contracts(no_bid[1])}" if no_bid else "none"
    return f"bid {left} | ask {right}"


async def _watch(exchange: Exchange, watcher: _Watcher, *, ladder: bool) -> None:
    """Connect again and again until Ctrl-C, with the ladder or lines as output."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: task.cancel() if task else None)
    drawing = asyncio.create_task(_draw(watcher)) if ladder else None
    watcher.quiet = ladder
    try:
        while True:
            try:
                why = await _connection(exchange, watcher)
            except CredentialsError:
                raise
            except ExchangeError as error:
                why = str(error)
            watcher.status = why
            watcher.say(f"[DISCONNECTED] {why}")
            await asyncio.sleep(RETRY_S)
    except asyncio.CancelledError:
        return
    finally:
        if drawing is not None:
            drawing.cancel()
            await asyncio.gather(drawing, return_exceptions=True)


async def _connection(exchange: Exchange, watcher: _Watcher) -> str:
    """Feed the watcher from one connection; returns why it ended."""
    credentials = Credentials(exchange.key_id, load_signer(exchange.key_file))
    socket = await dial(exchange.ws_url, credentials, LiveConnection)
    session = Session(watcher.tickers)
    watcher.restart()
    watcher.status = "connected"
    try:
        while True:
            await _send_due(socket, session)
            try:
                async with asyncio.timeout(0.2):
                    frame = await socket.recv(decode=False)
            except TimeoutError:
                if socket.silent_s > LIVENESS_S:
                    return f"silent for {LIVENESS_S:.0f} s"
                continue
            kind = session.receive(frame, time.monotonic())
            for note in session.take_notes():
                if note.kind == "gap":
                    for book in watcher.books.values():
                        book.mark_stale()
                watcher.say(f"[{note.kind.upper()}] {note.detail}")
            watcher.take(kind, frame)
            if session.fatal is not None:
                raise session.fatal
            if session.ended:
                return session.ended
    except ConnectionClosed as closed:
        return f"the connection ended: {closed}"
    finally:
        socket.transport.abort()


async def _send_due(socket: LiveConnection, session: Session) -> None:
    for command_frame in session.commands(time.monotonic()):
        await socket.send(command_frame, text=True)


async def _draw(watcher: _Watcher) -> None:
    rate = watcher.rate or LADDER_RATE
    with Live(console=Console(), screen=True, auto_refresh=False) as live:
        while True:
            ladders = Columns([_ladder(book) for book in watcher.books.values()], padding=(0, 3))
            live.update(ladders, refresh=True)
            await asyncio.sleep(1 / rate)


def _ladder(book: Book) -> Table:
    """The ladder of a book in YES prices: asks above, bids below, sizes as bars."""
    asks = sorted((ONE_DOLLAR - price, size) for price, size in book.ladders["no"].items())
    bids = sorted(book.ladders["yes"].items(), reverse=True)
    shown = [*asks[:LADDER_LEVELS], *bids[:LADDER_LEVELS]]
    largest = max((size for _, size in shown), default=1)
    colour = {SyncState.SYNCED: "green", SyncState.WAITING: "yellow", SyncState.STALE: "red"}[
        book.state
    ]
    title = Text.assemble(printable(book.market_ticker), " ", (book.state.value, colour))
    table = Table(title=title, box=None, padding=(0, 1))
    table.add_column("yes", justify="right")
    table.add_column("contracts", justify="right")
    table.add_column("", width=24)
    for price, size in reversed(asks[:LADDER_LEVELS]):
        table.add_row(dollars(price), contracts(size), _bar(size, largest), style="red")
    spread = dollars(asks[0][0] - bids[0][0]) if asks and bids else "-"
    table.add_row(f"spread {spread}", "", "", style="dim")
    for price, size in bids[:LADDER_LEVELS]:
        table.add_row(dollars(price), contracts(size), _bar(size, largest), style="green")
    return table


def _bar(size: int, largest: int) -> str:
    return "█" * max(1, round(24 * size / largest))

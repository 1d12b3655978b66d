"""Read the simulator's feed without recording it: keep the books from the frames, then compare them with the simulator's.

    python examples/simulator_feed.py --seconds 5

Starts a simulator of its own; nothing else need run, and nothing is written. The real exchange's feed is the same
but for the address and the key.
"""

import argparse
import asyncio
import json
from contextlib import suppress

from kalshi_platform.exchange import frames
from kalshi_platform.exchange.book import SIDES, Book, delta_change
from kalshi_platform.exchange.connection import LiveConnection, dial
from kalshi_platform.exchange.frames import Kind
from kalshi_platform.exchange.signing import Credentials, load_signer
from kalshi_platform.simulator.config import SimulatorConfig
from kalshi_platform.simulator.server import Simulator, running

QUIET_S = 0.5
"""Silence of a paused simulator after which all its frames have been read."""


class Feed:
    """The books of one subscription. Sequence numbers count over all its markets, from 1."""

    def __init__(self) -> None:
        self.books: dict[str, Book] = {}
        self.seq = 0

    def take(self, frame: bytes) -> None:
        head = frames.decode_head(frame)
        if not head.seq:
            return
        if head.seq != self.seq + 1:
            raise SystemExit(f"Frame {head.seq} follows {self.seq}: ask for new snapshots here.")
        self.seq = head.seq
        kind = frames.kind_of(frame)
        if kind is Kind.SNAPSHOT:
            snapshot = frames.decode_snapshot(frame)
            self.books.setdefault(
                snapshot.market_ticker, Book(snapshot.market_ticker)
            ).apply_snapshot(snapshot)
        elif kind is Kind.DELTA:
            delta = frames.decode_delta(frame)
            self.books[delta.market_ticker].apply_delta(delta_change(delta))


async def follow(simulator: Simulator, seconds: float) -> Feed:
    credentials = Credentials(simulator.key_id, load_signer(simulator.key_file))
    socket = await dial(simulator.ws_url, credentials, LiveConnection)
    params = {"channels": ["orderbook_delta"], "market_tickers": sorted(simulator.open_markets())}
    await socket.send(json.dumps({"id": 1, "cmd": "subscribe", "params": params}))
    feed = Feed()
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while True:
                feed.take(await socket.recv(decode=False))
    simulator.pause()
    with suppress(TimeoutError):
        while True:
            feed.take(await asyncio.wait_for(socket.recv(decode=False), QUIET_S))
    await socket.close()
    return feed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    seconds = parser.parse_args().seconds
    with running(SimulatorConfig(markets=5, rate=300, rolling_markets=0)) as simulator:
        feed = asyncio.run(follow(simulator, seconds))
        truth = simulator.books()
    for ticker, book in sorted(feed.books.items()):
        equal = book.ladders == {"yes": truth[ticker].yes, "no": truth[ticker].no}
        prices = {side: best and best[0] / 10_000 for side in SIDES for best in [book.best(side)]}
        print(f"{ticker:<32} {prices} {'equal to' if equal else 'DIFFERENT from'} the simulator's")
    print(f"{feed.seq} numbered frames")


if __name__ == "__main__":
    main()

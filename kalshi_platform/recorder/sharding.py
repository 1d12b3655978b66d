"""Which shard records which market: the same answer everywhere, from the ticker and N alone.

Rendezvous hashing (Thaler and Ravishankar, 1998): every shard draws a number for every market, and
the highest draw has it. A shard more takes its share evenly from all the others, a shard less gives
its own away, and no other market moves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def shard_of(ticker: str, shards: int) -> int:
    """The shard, 0 to `shards` - 1, that records this market."""
    return max(range(shards), key=lambda shard: _draw(ticker, shard))


def share(tickers: Iterable[str], shard: int, shards: int) -> list[str]:
    """Those of the markets that this shard records, in their order."""
    return [ticker for ticker in tickers if shards == 1 or shard_of(ticker, shards) == shard]


def _draw(ticker: str, shard: int) -> bytes:
    return hashlib.blake2b(f"{shard}:{ticker}".encode(), digest_size=8).digest()

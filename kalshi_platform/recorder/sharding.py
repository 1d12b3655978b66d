"""Which shard records which market: a pure function of the ticker and the number of shards.

Rendezvous hashing (Thaler and Ravishankar, 1998): each shard's hash of the ticker is a score, and the
highest score records the market. Adding a shard takes an even share from all others, removing one
distributes its markets; no other market moves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def shard_of(ticker: str, shards: int) -> int:
    """The shard, 0 to `shards` - 1, that records this market."""
    return max(range(shards), key=lambda shard: _draw(ticker, shard))


def share(tickers: Iterable[str], shard: int, shards: int) -> list[str]:
    """The subset of `tickers` that this shard records, in the given order."""
    return [ticker for ticker in tickers if shards == 1 or shard_of(ticker, shards) == shard]


def _draw(ticker: str, shard: int) -> bytes:
    return hashlib.blake2b(f"{shard}:{ticker}".encode(), digest_size=8).digest()

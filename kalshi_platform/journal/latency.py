"""Latency from receipt to a later stage, counted in a histogram with fixed buckets: memory is constant."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

_EDGES_NS = (100_000 * 1.1 ** np.arange(180)).astype(np.int64)
"""Upper bucket edges, each 10 % above the preceding one: 0.1 ms to about 45 minutes."""


class LatencySummary(msgspec.Struct, frozen=True):
    """A latency distribution in milliseconds; quantiles are upper bucket edges, at most 10 % too high."""

    records: int
    p50: float
    p99: float
    max: float


class Latency:
    """A latency histogram. One thread may add; any thread may read the summary."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(_EDGES_NS) + 1, np.int64)
        self._longest_ns = 0

    def add(self, recv_ns: NDArray[np.int64], done_ns: int) -> None:
        """Count records received at `recv_ns` that were done at `done_ns`, both by this machine's clock.

        Where the clock was set back the difference is negative and counts in the lowest bucket.
        """
        if not len(recv_ns):
            return
        buckets = np.searchsorted(_EDGES_NS, done_ns - recv_ns)
        self._counts += np.bincount(buckets, minlength=len(self._counts))
        self._longest_ns = max(self._longest_ns, done_ns - int(recv_ns.min()))

    def summary(self) -> LatencySummary:
        """Summarise everything counted since the start."""
        total = int(self._counts.sum())
        if not total:
            return LatencySummary(0, 0.0, 0.0, 0.0)
        return LatencySummary(
            total, self._quantile(0.5), self._quantile(0.99), self._longest_ns / 1e6
        )

    def _quantile(self, q: float) -> float:
        reached = np.cumsum(self._counts) >= q * self._counts.sum()
        at = int(np.argmax(reached))
        edge_ns = int(_EDGES_NS[at]) if at < len(_EDGES_NS) else self._longest_ns
        return min(edge_ns, self._longest_ns) / 1e6

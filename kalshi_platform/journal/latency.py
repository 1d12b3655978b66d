"""How long after their receipt records reach a place: counted in fixed classes, so memory is constant."""

from __future__ import annotations

import msgspec
import numpy as np
from numpy.typing import NDArray

_EDGES_NS = (100_000 * 1.1 ** np.arange(180)).astype(np.int64)
"""Upper edges, each a tenth above the one before: 0.1 ms to some 45 minutes."""


class LatencySummary(msgspec.Struct, frozen=True):
    """A distribution, in milliseconds; a quantile is rounded up by a tenth at most."""

    records: int
    p50: float
    p99: float
    max: float


class Latency:
    """Counts delays. One thread adds, any thread asks."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(_EDGES_NS) + 1, np.int64)
        self._longest_ns = 0

    def add(self, recv_ns: NDArray[np.int64], done_ns: int) -> None:
        """Records received at `recv_ns` were done at `done_ns`, both of this machine's clock.

        A clock that was set back makes them negative; they count as the shortest.
        """
        if not len(recv_ns):
            return
        classes = np.searchsorted(_EDGES_NS, done_ns - recv_ns)
        self._counts += np.bincount(classes, minlength=len(self._counts))
        self._longest_ns = max(self._longest_ns, done_ns - int(recv_ns.min()))

    def so_far(self) -> LatencySummary:
        """All of them since the start."""
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

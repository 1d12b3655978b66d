"""The results of a soak, and the promises that it kept. No I/O."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from kalshi_platform_tests.benchmarks.memory import BOUND_MIB, FLAT
from kalshi_platform_tests.chaos.proof import Proof
from kalshi_platform_tests.soak.restarts import Restart
from kalshi_platform_tests.soak.samples import Sample

STREAMER = "streamer"
ENOUGH = 0.95
"""Minimum share of the configured rate; below it the load was not the configured one."""
JUDGED_S = 300.0
"""Minimum time without a restart over which growth is tested; a shorter one is still part of the start."""


@dataclass(frozen=True)
class Load:
    """The configured load."""

    minutes: float
    rate: float
    """Deltas a second."""
    markets: int
    rolling: int
    rolling_s: float
    shards: int
    seed: int


@dataclass(frozen=True)
class Markets:
    """Counts of markets that opened and closed."""

    opened: int
    """Markets open at a sample that were not open at the first."""
    recorded: int
    left: int
    missed: frozenset[str]
    """Markets open at two samples or more, and without a snapshot."""


@dataclass(frozen=True)
class Outcome:
    """The results of a soak."""

    load: Load
    samples: Sequence[Sample]
    restarts: Sequence[Restart]
    shed_s: float
    """Seconds of order flow that the simulator skipped, because the machine did not keep up."""
    proof: Proof
    markets: Markets
    trades_missing: int
    """Of the exchange's last trades, those that are not in the archive."""
    trades_looked_at: int
    hours_sealed: Sequence[str]
    doctor_exit: int
    doctor: Sequence[str] = field(default_factory=list)
    """Lines of `doctor` that report failures."""

    @property
    def seconds(self) -> float:
        """Seconds from the first sample to the last."""
        return self.samples[-1].at - self.samples[0].at

    @property
    def sent_a_second(self) -> float:
        """Deltas that the exchange sent."""
        return (self.samples[-1].sent - self.samples[0].sent) / self.seconds

    @property
    def calm(self) -> Sequence[Sample]:
        """The samples after the last restart was over."""
        over = max((restart.over for restart in self.restarts), default=0.0)
        return [sample for sample in self.samples if sample.at > over]

    @property
    def steady(self) -> Sequence[Sample]:
        """The longest part of `calm` within one hour, since sealing takes memory for some minutes."""
        hours = itertools.groupby(self.calm, lambda it: int(it.at // 3600))
        return max(([*looks] for _, looks in hours), key=len, default=[])

    @property
    def steady_s(self) -> float:
        """Its duration in seconds."""
        return self.steady[-1].at - self.steady[0].at if self.steady else 0.0

    @property
    def roles(self) -> list[str]:
        """All roles, by name."""
        return sorted({role for sample in self.samples for role in sample.mib})

    def mib(self, role: str, part: int) -> float | None:
        """Median memory over a fifth of the time, 0 to 4; None if the role did not run."""
        fifth = max(len(self.samples) // 5, 1)
        seen = [
            sample.mib[role]
            for sample in self.samples[part * fifth :][:fifth]
            if role in sample.mib
        ]
        return statistics.median(seen) if seen else None

    def most_mib(self, role: str) -> float:
        """The greatest memory of a role."""
        return max(sample.mib[role] for sample in self.samples if role in sample.mib)

    def growth(self, role: str) -> float | None:
        """Growth over the steady part: median of the last fifth divided by that of the second; None for too few samples."""
        seen = [it.mib[role] for it in self.steady if role in it.mib]
        fifth = len(seen) // 5
        if not fifth:
            return None
        return statistics.median(seen[-fifth:]) / statistics.median(seen[fifth : 2 * fifth])

    def cpu(self, role: str) -> float:
        """Share of a core that a role used."""
        first, last = (it.cpu_s.get(role, 0.0) for it in (self.samples[0], self.samples[-1]))
        return (last - first) / self.seconds

    def lag(self, store: str, *, calm: bool = False) -> tuple[float, float, float]:
        """Records that a store lacked: median, 99th percentile, maximum."""
        return _spread([it.lag[store] for it in self._looks(calm) if store in it.lag])

    def late(self, store: str, *, calm: bool = False) -> tuple[float, float, float]:
        """Seconds by which a store lagged: median, 99th percentile, maximum."""
        return _spread([it.late_s[store] for it in self._looks(calm) if store in it.late_s])

    def _looks(self, calm: bool) -> Sequence[Sample]:
        return self.calm if calm else self.samples

    @property
    def promises(self) -> dict[str, tuple[str, bool]]:
        """Each promise: the result, and whether it was kept."""
        proof = self.proof
        found: dict[str, tuple[str, bool]] = {
            f"at least {ENOUGH:.0%} of the rate is sent": (
                f"{self.sent_a_second:,.0f} deltas/s",
                self.sent_a_second >= ENOUGH * self.load.rate,
            ),
            "no journalled frame is lost": (f"{proof.lost}", not proof.lost),
            "no row is doubled": (f"{proof.doubled}", not proof.doubled),
            "no number is missing without a `gap` row": (
                f"{proof.unexplained}",
                not proof.unexplained,
            ),
            "`kalshi-platform proof` says the same": (proof.verdict, proof.verdict == "whole"),
            "books at the end are the exchange's (levels that differ)": (
                f"{proof.books_differ}",
                not proof.books_differ,
            ),
            "connections begun / ended by a row": (
                f"{proof.connections} / {proof.ends}",
                proof.connections == proof.ends,
            ),
            "every market that opened was recorded (missed)": (
                f"{len(self.markets.missed)} of {self.markets.recorded}",
                not self.markets.missed,
            ),
            "the exchange's last trades are all recorded (missing)": (
                f"{self.trades_missing} of {self.trades_looked_at:,}",
                not self.trades_missing,
            ),
            "every part came back": (
                f"{sum(restart.recovered for restart in self.restarts)} of {len(self.restarts)}",
                all(restart.recovered for restart in self.restarts),
            ),
            "`doctor` reports no failure at the end": (
                f"exit {self.doctor_exit}",
                self.doctor_exit == 0,
            ),
        }
        streamers = [role for role in self.roles if role.startswith(STREAMER)]
        most = max((self.most_mib(role) for role in streamers), default=0.0)
        found[f"a streamer stays below {BOUND_MIB:.0f} MiB"] = (
            f"{most:.0f} MiB",
            most <= BOUND_MIB,
        )
        grown = [g for role in streamers if (g := self.growth(role)) is not None]
        if grown and self.steady_s >= JUDGED_S:
            found[f"a streamer does not grow at rest from restarts (at most {FLAT})"] = (
                f"{max(grown):.2f} times",
                max(grown) <= FLAT,
            )
        return found

    @property
    def sound(self) -> bool:
        """Whether every promise was kept."""
        return all(kept for _, kept in self.promises.values())


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    if not values:
        return (0.0, 0.0, 0.0)
    median, high, most = np.percentile(values, [50, 99, 100])
    return (float(median), float(high), float(most))

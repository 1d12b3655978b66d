"""The sentences that `up` prints about the recording: that it begins, what is wrong, that no streamer runs.

Only the decision what to print is made here; `up.py` collects the reports and prints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from kalshi_platform.health.supervision import Supervised
from kalshi_platform.health.verdict import Judgement, Verdict
from kalshi_platform.processes import Identity

RECORDING_S = 90.0
"""Seconds by which the first frames should be in the journal; after that `up` says where to look."""
ABSENT_S = 60.0
"""Seconds that a shard may be without a streamer: a replacement starts sooner."""
STATUS_S = 60.0
"""Shortest interval between two lines about a shard's state, unless it gets worse, so that flapping is not repeated."""
_REPORTED_ELSEWHERE = frozenset({"stopped", "streamer down"})
"""Causes that the lines about a missing streamer report."""
IN_A_ROW = 2
"""Consecutive failed runs from which they are reported: a single one is just replaced."""


class Announcements:
    """Reports each condition once: when it begins, when it gets worse, and when it is over."""

    def __init__(self, where_to_look: str, now: float) -> None:
        """`now`, here and below: seconds of a monotonic clock."""
        self._where_to_look = where_to_look
        self._began = now
        self._late = False
        self._recording = False
        self._troubles: dict[int, str] = {}
        self._failures: dict[int, int] = {}
        self._seen: dict[int, float] = {}
        """When each shard's streamer was last seen alive, or was first due."""
        self._absent: set[int] = set()
        self._states: dict[int, tuple[frozenset[str], bool]] = {}
        """By shard, the causes in its last line, and whether any of them was an error."""
        self._stated: dict[int, float] = {}

    def look(
        self,
        shards: int,
        reports: Mapping[int, Mapping[str, Any]],
        supervised: Mapping[int, Supervised],
        now: float,
        *,
        known_trouble: str = "",
        judged: Mapping[int, Sequence[Judgement]] | None = None,
    ) -> list[str]:
        """The new sentences.

        `shards` is the number of recording shards; others in `supervised` are only drained. `reports` are the
        streamers' reports since `up` began and `judged` their judgements; `known_trouble` was printed already.
        """
        sentences = list(self._beginning(reports, now))
        shown = {*range(shards), *supervised}
        for shard in sorted(shown):
            whose = "" if shown == {0} else f"Shard {shard}: "
            report, noted = reports.get(shard), supervised.get(shard)
            of_shard = [
                *self._trouble(shard, report, known_trouble),
                *self._failed(shard, noted),
            ]
            if shard < shards:
                of_shard += self._missing(shard, report, noted, now)
                of_shard += self._state(shard, report, (judged or {}).get(shard, ()), now)
            sentences += (f"{whose}{sentence}" for sentence in of_shard)
        self._forget(shards, shown)
        return sentences

    def _forget(self, shards: int, shown: Set[int]) -> None:
        """Drop the state of shards that record no longer, and once they are drained also their troubles."""
        for shard in {*self._seen, *self._states} - {*range(shards)}:
            self._seen.pop(shard, None)
            self._states.pop(shard, None)
            self._stated.pop(shard, None)
            self._absent.discard(shard)
        for shard in {*self._troubles, *self._failures} - shown:
            self._troubles.pop(shard, None)
            self._failures.pop(shard, None)

    def _beginning(self, reports: Mapping[int, Mapping[str, Any]], now: float) -> Iterator[str]:
        """Whether the recording has begun, or is late."""
        frames = sum(
            report["frames"] for report in reports.values() if report["state"] != "stopped"
        )
        if not self._recording and frames:
            self._recording = True
            yield f"Recording: {frames:,} frames are in the journal, and more are coming."
        if not self._recording and not self._late and now - self._began >= RECORDING_S:
            self._late = True
            yield f"Nothing is recorded yet after {RECORDING_S:.0f} s. {self._where_to_look}"

    def _trouble(self, shard: int, report: Mapping[str, Any] | None, known: str) -> Iterator[str]:
        """The streamer's own trouble when it begins or changes, and when it is over."""
        if report is None:
            return
        now, before = report["trouble"] or "", self._troubles.get(shard, "")
        if now and now != known and _without_figures(now) != _without_figures(before):
            yield str(now)
        elif before and not now:
            yield "The streamer is healthy again."
        self._troubles[shard] = now

    def _state(
        self,
        shard: int,
        report: Mapping[str, Any] | None,
        judged: Sequence[Judgement],
        now: float,
    ) -> Iterator[str]:
        """The faults of a shard when they change, at most once per STATUS_S."""
        if not judged:
            return
        trouble = (report or {}).get("trouble") or ""
        wrong = [
            judgement
            for judgement in judged
            if judgement.verdict is not Verdict.GOOD
            and judgement.cause not in _REPORTED_ELSEWHERE
            and not (trouble and trouble in judgement.sentence)  # `_trouble` has reported it
        ]
        causes = frozenset(judgement.cause for judgement in wrong)
        bad = any(judgement.verdict is Verdict.ERROR for judgement in wrong)
        before, was_bad = self._states.get(shard, (frozenset(), False))
        worse = bad and not was_bad
        if causes == before or not (worse or now - self._stated.get(shard, -STATUS_S) >= STATUS_S):
            return
        self._states[shard], self._stated[shard] = (causes, bad), now
        yield (
            " ".join(judgement.sentence for judgement in wrong)
            or f"In order again. {judged[0].sentence}"
        )

    def _failed(self, shard: int, noted: Supervised | None) -> Iterator[str]:
        failures = noted.failures if noted is not None else 0
        if noted is not None and failures >= IN_A_ROW and failures > self._failures.get(shard, 0):
            yield f"{failures} runs in a row have failed, the last: {noted.why} {noted.reason}"
        self._failures[shard] = failures

    def _missing(
        self,
        shard: int,
        report: Mapping[str, Any] | None,
        noted: Supervised | None,
        now: float,
    ) -> Iterator[str]:
        """A shard without a streamer, and its streamer's return."""
        if report is not None and _alive(report):
            self._seen[shard] = now
            if shard in self._absent:
                self._absent.remove(shard)
                yield "A streamer runs again."
            return
        if self._recording:  # before the first frames no shard counts as missing
            self._seen.setdefault(shard, now)
        absent_s = now - self._seen.get(shard, now)
        if absent_s >= ABSENT_S and shard not in self._absent:
            self._absent.add(shard)
            reason = noted.reason if noted is not None else self._where_to_look
            yield f"No streamer has run for {absent_s:.0f} s: nothing is recorded. {reason}"


def _without_figures(sentence: str) -> str:
    """The sentence without ages and counts, which change every second while the fault stays."""
    return re.sub(r"\d[\d,.]*", "", sentence)


def _alive(report: Mapping[str, Any]) -> bool:
    streamer = Identity(int(report["pid"]), float(report["pid_started"]))
    return report["state"] != "stopped" and streamer.alive

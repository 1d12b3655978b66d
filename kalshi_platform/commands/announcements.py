"""What `up` tells a person of the recording: when it begins, what is wrong with it, when no streamer runs.

Sentences alone; `up.py` collects what is to be seen, and prints.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

from kalshi_platform.health.supervision import Supervised
from kalshi_platform.health.verdict import Judgement, Verdict
from kalshi_platform.processes import Identity

RECORDING_S = 90.0
"""By then the first frames should be in the journal; if not, a person is told where to look."""
ABSENT_S = 60.0
"""How long a shard may be without a streamer: one that is replaced is back sooner."""
STATUS_S = 60.0
"""At most one line of a shard's state in so long, unless it got worse: what comes and goes is not repeated each time."""
_SAID_OTHERWISE = frozenset({"stopped", "streamer down"})
"""Causes that the lines about a missing streamer are about."""
IN_A_ROW = 2
"""Runs that failed one after the other: a single one is replaced, and nobody needs to know."""


class Announcements:
    """Each thing once: when it begins, when it gets worse, and when it is over."""

    def __init__(self, where_to_look: str, now: float) -> None:
        """`now`, here and below: seconds of a clock that nobody sets."""
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
        """Of each shard the causes in its last line, and whether any of them was an error."""
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
        """What is new. `shards` are to record now, and others that are supervised are only drained. `reports`: of
        the streamers since `up` began, and `judged` what they amount to; `known_trouble` has been said already.
        """
        said = list(self._beginning(reports, now))
        shown = {*range(shards), *supervised}
        for shard in sorted(shown):
            whose = "" if shown == {0} else f"Shard {shard}: "
            report, noted = reports.get(shard), supervised.get(shard)
            sentences = [
                *self._trouble(shard, report, known_trouble),
                *self._failed(shard, noted),
            ]
            if shard < shards:
                sentences += self._missing(shard, report, noted, now)
                sentences += self._state(shard, report, (judged or {}).get(shard, ()), now)
            said += (f"{whose}{sentence}" for sentence in sentences)
        self._forget(shards, shown)
        return said

    def _forget(self, shards: int, shown: Set[int]) -> None:
        """What was seen of shards that record no longer, and, once they are drained, what they had said."""
        for shard in {*self._seen, *self._states} - {*range(shards)}:
            self._seen.pop(shard, None)
            self._states.pop(shard, None)
            self._stated.pop(shard, None)
            self._absent.discard(shard)
        for shard in {*self._troubles, *self._failures} - shown:
            self._troubles.pop(shard, None)
            self._failures.pop(shard, None)

    def _beginning(self, reports: Mapping[int, Mapping[str, Any]], now: float) -> Iterator[str]:
        frames = sum(it["frames"] for it in reports.values() if it["state"] != "stopped")
        if not self._recording and frames:
            self._recording = True
            yield f"Recording: {frames:,} frames are in the journal, and more are coming."
        if not self._recording and not self._late and now - self._began >= RECORDING_S:
            self._late = True
            yield f"Nothing is recorded yet after {RECORDING_S:.0f} s. {self._where_to_look}"

    def _trouble(self, shard: int, report: Mapping[str, Any] | None, known: str) -> Iterator[str]:
        if report is None:
            return
        now, before = report["trouble"] or "", self._troubles.get(shard, "")
        if now and now != known and _without_figures(now) != _without_figures(before):
            yield str(now)
        elif before and not now:
            yield "The streamer is well again."
        self._troubles[shard] = now

    def _state(
        self,
        shard: int,
        report: Mapping[str, Any] | None,
        judged: Sequence[Judgement],
        now: float,
    ) -> Iterator[str]:
        if not judged:
            return
        trouble = (report or {}).get("trouble") or ""
        wrong = [
            it
            for it in judged
            if it.verdict is not Verdict.GOOD
            and it.cause not in _SAID_OTHERWISE
            and not (trouble and trouble in it.sentence)  # said as it came
        ]
        causes = frozenset(it.cause for it in wrong)
        bad = any(it.verdict is Verdict.ERROR for it in wrong)
        before, was_bad = self._states.get(shard, (frozenset(), False))
        worse = bad and not was_bad
        if causes == before or not (worse or now - self._stated.get(shard, -STATUS_S) >= STATUS_S):
            return
        self._states[shard], self._stated[shard] = (causes, bad), now
        yield " ".join(it.sentence for it in wrong) or f"In order again. {judged[0].sentence}"

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
        if report is not None and _alive(report):
            self._seen[shard] = now
            if shard in self._absent:
                self._absent.remove(shard)
                yield "A streamer runs again."
            return
        if self._recording:  # before, no shard is missed
            self._seen.setdefault(shard, now)
        absent_s = now - self._seen.get(shard, now)
        if absent_s >= ABSENT_S and shard not in self._absent:
            self._absent.add(shard)
            reason = noted.reason if noted is not None else self._where_to_look
            yield f"No streamer has run for {absent_s:.0f} s: nothing is recorded. {reason}"


def _without_figures(sentence: str) -> str:
    """Ages and counts change every second; what is wrong does not."""
    return re.sub(r"\d[\d,.]*", "", sentence)


def _alive(report: Mapping[str, Any]) -> bool:
    who = Identity(int(report["pid"]), float(report["pid_started"]))
    return report["state"] != "stopped" and who.alive

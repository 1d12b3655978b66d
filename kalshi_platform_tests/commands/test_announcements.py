"""`up` reports each condition of the recording once, and its end."""

from __future__ import annotations

from typing import Any

from kalshi_platform.commands.announcements import ABSENT_S, RECORDING_S, Announcements
from kalshi_platform.health.supervision import Supervised
from kalshi_platform.health.verdict import Judgement, Verdict
from kalshi_platform.processes import Identity

WHERE = "The UI has the log."


def report(**values: Any) -> dict[str, Any]:
    own = Identity.own()
    well = {"pid": own.pid, "pid_started": own.started, "state": "streaming", "trouble": None}
    return {**well, "frames": 10, **values}


DEAD = report(pid_started=1.0)
STOPPED = report(state="stopped")


class Story:
    def __init__(self, shards: int = 1) -> None:
        self.announcements = Announcements(WHERE, 0.0)
        self.shards = shards
        self.now = 0.0

    def look(
        self,
        reports: dict[int, dict[str, Any]],
        supervised: dict[int, Supervised] | None = None,
        after_s: float = 1.0,
        judged: dict[int, list[Judgement]] | None = None,
    ) -> list[str]:
        self.now += after_s
        return self.announcements.look(
            self.shards,
            reports,
            supervised or {},
            self.now,
            known_trouble="ClickHouse is away.",
            judged=judged,
        )


def test_the_first_frames_are_reported_once() -> None:
    story = Story()
    assert story.look({}) == []
    (line,) = story.look({0: report()})
    assert line.startswith("Recording: 10 frames")
    assert story.look({0: report()}) == []


def test_a_recording_that_does_not_begin_is_reported_once() -> None:
    story = Story()
    assert story.look({}, after_s=RECORDING_S - 1) == []
    assert story.look({}, after_s=2) == [f"Nothing is recorded yet after 90 s. {WHERE}"]
    assert story.look({}, after_s=500) == []


def test_each_further_failed_run_is_reported_with_its_reason() -> None:
    story = Story()
    story.look({0: report()})

    def failed(times: int) -> list[str]:
        return story.look(
            {0: DEAD}, {0: Supervised("The next start is in 9 s.", times, "Bad name.")}
        )

    assert failed(0) == failed(1) == []
    assert failed(2) == [
        "2 runs in a row have failed, the last: Bad name. The next start is in 9 s."
    ]
    assert failed(2) == []
    assert len(failed(3)) == 1
    assert failed(0) == []
    assert len(failed(2)) == 1


def test_a_missing_streamer_and_its_return_are_reported() -> None:
    story = Story(shards=2)
    story.look({0: report(), 1: report()})
    for gone in ({0: report()}, {0: report(), 1: DEAD}, {0: report(), 1: STOPPED}):
        assert story.look(gone) == []
        (line,) = story.look(gone, {1: Supervised("It backs off.")}, after_s=ABSENT_S)
        assert line.startswith("Shard 1: No streamer has run for ")
        assert line.endswith("nothing is recorded. It backs off.")
        assert story.look(gone, after_s=ABSENT_S) == []
        assert story.look({0: report(), 1: report()}) == ["Shard 1: A streamer runs again."]


def test_trouble_and_its_end_are_reported_once() -> None:
    story = Story()
    story.look({0: report()})
    assert story.look({0: report(trouble="No space is left.")}) == ["No space is left."]
    assert story.look({0: report(trouble="No space is left.")}) == []
    assert story.look({0: report()}) == ["The streamer is healthy again."]
    assert story.look({0: report(trouble="ClickHouse is away.")}) == []


def test_trouble_with_changing_figures_is_reported_once() -> None:
    story = Story()
    story.look({0: report()})
    behind = "clickhouse is {} s behind: {:,} records wait in the journal."
    lines = [story.look({0: report(trouble=behind.format(61 + n, 9_990 + n))}) for n in range(120)]
    assert [line for sentences in lines for line in sentences] == [behind.format(61, 9_990)]
    assert story.look({0: report(trouble="parquet is away.")}) == ["parquet is away."]


GOOD = Judgement(Verdict.GOOD, "recording", "Recording: the last frame is 1 s old.")
AWAY = Judgement(Verdict.ERROR, "disconnected", "The exchange has not been reached for 130 s.")
BEHIND = Judgement(Verdict.WARN, "parquet behind", "parquet lacks 9 records.")


def test_the_last_line_never_claims_a_recording_that_stopped() -> None:
    story = Story()
    (line,) = story.look({0: report()}, judged={0: [GOOD]})
    assert line.startswith("Recording")
    assert story.look({0: report()}, judged={0: [AWAY]}) == [AWAY.sentence]
    assert story.look({0: report()}, judged={0: [AWAY]}, after_s=500) == []
    assert story.look({0: report()}, judged={0: [GOOD]}) == [f"In order again. {GOOD.sentence}"]


def test_flapping_is_reported_once_a_minute_worsening_at_once() -> None:
    story = Story()
    story.look({0: report()}, judged={0: [GOOD]})
    lines = [story.look({0: report()}, judged={0: [BEHIND if n % 2 else GOOD]}) for n in range(120)]
    assert sum(map(len, lines)) == 2
    assert story.look({0: report()}, judged={0: [AWAY, BEHIND]}) == [
        f"{AWAY.sentence} {BEHIND.sentence}"
    ]


def test_trouble_that_the_streamer_reports_is_not_repeated() -> None:
    story = Story()
    trouble = "No space is left."
    behind = Judgement(Verdict.ERROR, "disk", f"The disk does not take it. {trouble}")
    story.look({0: report()}, judged={0: [GOOD]})
    assert story.look({0: report(trouble=trouble)}, judged={0: [behind]}) == [trouble]
    assert story.look({0: report()}, judged={0: [GOOD]}) == ["The streamer is healthy again."]


def test_a_removed_shard_is_not_missed_but_its_drain_reports() -> None:
    story = Story(shards=2)
    story.look({0: report(), 1: report()})
    story.shards = 1
    drains = {0: Supervised("It records."), 1: Supervised("It is drained.")}
    assert story.look({0: report(), 1: report()}, drains) == []
    trouble = {0: report(), 1: report(trouble="parquet is away.")}
    assert story.look(trouble, drains) == ["Shard 1: parquet is away."]
    failed = {**drains, 1: Supervised("The next start is in 9 s.", 2, "Bad name.")}
    (line,) = story.look(trouble, failed)
    assert line.startswith("Shard 1: 2 runs in a row have failed")
    stopped = {0: report(), 1: STOPPED}
    assert story.look(stopped, drains) == ["Shard 1: The streamer is healthy again."]
    for _ in range(3):
        assert story.look(stopped, {0: drains[0]}, after_s=2 * ABSENT_S) == []
    assert story.look({0: DEAD}) == []
    assert story.look({0: DEAD}, after_s=ABSENT_S) == [
        f"No streamer has run for 61 s: nothing is recorded. {WHERE}"  # of the only one: no number
    ]


def test_an_added_shard_is_reported_like_the_others() -> None:
    story = Story()
    story.look({0: report()})
    story.shards = 2
    assert story.look({0: report(), 1: report(trouble="No space is left.")}) == [
        "Shard 1: No space is left."
    ]
    story.shards = 1
    assert story.look({0: report()}) == []
    story.shards = 2  # and never comes up
    assert story.look({0: report(), 1: STOPPED}) == []
    assert story.look({0: report(), 1: STOPPED}, after_s=ABSENT_S - 1) == []
    (line,) = story.look({0: report(), 1: STOPPED}, after_s=1)
    assert line == f"Shard 1: No streamer has run for 60 s: nothing is recorded. {WHERE}"

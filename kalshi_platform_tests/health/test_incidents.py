"""An incident sends one notice when it has lasted, reminders at an interval, and one when it is over."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.health.incidents import (
    CALM_S,
    MOST_IN_WINDOW,
    MOST_WAITING,
    Condition,
    Event,
    Ledger,
    Mailbox,
    Notice,
    Severity,
    counts,
    observe,
    read,
    write,
)

REMINDER_S = 3600.0
A = Condition("a", "A is broken", "Repair it.", Severity.WARNING, since=0.0)


class Story:
    """Evaluates conditions every 30 s, and keeps what each channel received."""

    def __init__(self, *channels: str) -> None:
        self.ledger = Ledger()
        self.channels = list(channels or ("one",))
        self.now = 0.0
        self.delivered: dict[str, list[tuple[float, Event, str]]] = {}
        self.down: set[str] = set()

    def evaluate(self, *conditions: Condition, rounds: int = 1) -> None:
        for _ in range(rounds):
            self.ledger = read(write(self.ledger))  # as Dagster's cursor keeps it
            self.ledger = observe(self.ledger, conditions, self.channels, self.now, REMINDER_S)
            boxes = dict(self.ledger.mailboxes)
            for name, box in self.ledger.mailboxes.items():
                if not box.may_send(self.now):
                    continue
                begun = box.begun()
                if name in self.down:
                    boxes[name] = begun.failed(self.now, "It is down.")
                    continue
                delivered = self.delivered.setdefault(name, [])
                delivered += [
                    (self.now, notice.event, notice.condition.key) for notice in begun.sending
                ]
                boxes[name] = begun.delivered(self.now)
            self.ledger = Ledger(self.ledger.incidents, boxes)
            self.now += 30.0

    def events(self, name: str = "one") -> list[Event]:
        return [event for _, event, _ in self.delivered.get(name, [])]


def test_an_incident_has_one_message_at_each_end() -> None:
    story = Story()
    story.evaluate(A, rounds=20)
    assert story.events() == [Event.OPENED]
    story.evaluate(rounds=20)
    assert story.events() == [Event.OPENED, Event.RESOLVED]
    assert story.ledger.incidents == {}


def test_an_open_incident_is_reminded_of_at_the_interval() -> None:
    story = Story()
    story.evaluate(A, rounds=int(2 * REMINDER_S / 30) + 1)
    assert story.events() == [Event.OPENED, Event.REMINDER, Event.REMINDER]


def test_a_condition_that_ends_in_time_sends_nothing() -> None:
    story = Story()
    patient = msgspec.structs.replace(A, after_s=60.0)
    story.evaluate(patient, rounds=2)
    story.evaluate(rounds=10)
    assert story.events() == []
    story.evaluate(patient, rounds=4)
    assert story.events() == [Event.OPENED]


def test_flapping_is_one_incident() -> None:
    story = Story()
    for _ in range(20):
        story.evaluate(A)
        story.evaluate(rounds=int(CALM_S / 30) - 1)
    assert story.events() == [Event.OPENED]


def test_a_worse_severity_is_reported_at_once() -> None:
    story = Story()
    story.evaluate(A)
    story.evaluate(msgspec.structs.replace(A, severity=Severity.CRITICAL), rounds=3)
    assert story.events() == [Event.OPENED, Event.REMINDER]
    assert counts(story.ledger) == {Severity.CRITICAL: 1, Severity.WARNING: 0}


def test_since_is_the_earliest_time_found() -> None:
    story = Story()
    for since in (100.0, 50.0, 900.0):
        story.evaluate(msgspec.structs.replace(A, since=since))
    assert story.ledger.incidents["a"].condition.since == 50.0


def test_a_channel_that_is_down_delays_no_other() -> None:
    story = Story("one", "two")
    story.down = {"two"}
    story.evaluate(A, rounds=3)
    story.evaluate(rounds=10)
    assert story.events("one") == [Event.OPENED, Event.RESOLVED]
    assert story.events("two") == []
    story.down = set()
    story.evaluate(rounds=40)
    assert story.events("two") == [Event.OPENED, Event.RESOLVED]


def test_a_new_channel_receives_the_open_incidents() -> None:
    story = Story("one")
    story.evaluate(A, rounds=3)
    story.channels = ["one", "two"]
    story.evaluate(A, rounds=3)
    assert story.events("two") == [Event.OPENED]
    assert story.events("one") == [Event.OPENED]


def test_a_removed_channel_loses_its_mailbox() -> None:
    story = Story("one", "two")
    story.evaluate(A)
    story.channels = ["one"]
    story.evaluate(A)
    assert set(story.ledger.mailboxes) == {"one"}


def test_many_incidents_at_once_are_one_message() -> None:
    story = Story()
    story.evaluate(*(msgspec.structs.replace(A, key=str(i)) for i in range(50)))
    assert len({at for at, _, _ in story.delivered["one"]}) == 1
    assert len(story.delivered["one"]) == 50


def test_the_rate_limit_of_a_channel_loses_no_notice() -> None:
    story = Story()
    for i in range(40):
        story.evaluate(*(msgspec.structs.replace(A, key=str(k)) for k in range(i + 1)))
    times = sorted({at for at, _, _ in story.delivered["one"]})
    for first in times:
        assert sum(first <= at < first + 600 for at in times) <= MOST_IN_WINDOW
    story.evaluate(*(msgspec.structs.replace(A, key=str(k)) for k in range(40)), rounds=40)
    opened = [key for _, event, key in story.delivered["one"] if event is Event.OPENED]
    assert sorted(opened, key=int) == [str(k) for k in range(40)]


def test_a_mailbox_is_bounded_and_counts_dropped_notices() -> None:
    notices = [
        Notice(Event.OPENED, msgspec.structs.replace(A, key=str(i)), float(i))
        for i in range(MOST_WAITING + 7)
    ]
    box = Mailbox().put(notices)
    assert (len(box.waiting), box.dropped) == (MOST_WAITING, 7)
    assert box.waiting[-1].condition.key == str(MOST_WAITING + 6)
    assert box.delivered(0.0).dropped == 0


@given(
    present=st.lists(st.booleans(), max_size=120),
    down=st.lists(st.booleans(), max_size=120),
)
def test_opened_and_resolved_alternate_on_every_channel(
    present: Sequence[bool], down: Sequence[bool]
) -> None:
    story = Story("one")
    for is_present, is_down in zip(present, [*down, *[False] * len(present)], strict=False):
        story.down = {"one"} if is_down else set()
        story.evaluate(*([A] if is_present else []))
    story.down = set()
    story.evaluate(rounds=60)
    firm = [event for event in story.events() if event is not Event.REMINDER]
    assert firm[::2] == [Event.OPENED] * len(firm[::2])
    assert firm[1::2] == [Event.RESOLVED] * len(firm[1::2])
    assert len(firm) % 2 == 0
    assert bool(firm) == any(present)

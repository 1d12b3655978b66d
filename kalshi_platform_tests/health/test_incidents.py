"""An incident is told once when it has lasted, again at an interval, and once when it is over."""

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
A = Condition("a", "A is broken", "Mend it.", Severity.WARNING, since=0.0)


class Story:
    """Looks at an interval of 30 s; keeps what each channel has been told."""

    def __init__(self, *channels: str) -> None:
        self.ledger = Ledger()
        self.channels = list(channels or ("one",))
        self.now = 0.0
        self.told: dict[str, list[tuple[float, Event, str]]] = {}
        self.down: set[str] = set()

    def look(self, *conditions: Condition, looks: int = 1) -> None:
        for _ in range(looks):
            self.ledger = read(write(self.ledger))  # as it survives in a cursor
            self.ledger = observe(self.ledger, conditions, self.channels, self.now, REMINDER_S)
            boxes = dict(self.ledger.mailboxes)
            for name, box in self.ledger.mailboxes.items():
                if not box.may_send(self.now):
                    continue
                begun = box.begun()
                if name in self.down:
                    boxes[name] = begun.failed(self.now, "It is down.")
                    continue
                told = self.told.setdefault(name, [])
                told += [(self.now, each.event, each.condition.key) for each in begun.sending]
                boxes[name] = begun.delivered(self.now)
            self.ledger = Ledger(self.ledger.incidents, boxes)
            self.now += 30.0

    def events(self, name: str = "one") -> list[Event]:
        return [event for _, event, _ in self.told.get(name, [])]


def test_one_message_when_it_begins_and_one_when_it_is_over() -> None:
    story = Story()
    story.look(A, looks=20)
    assert story.events() == [Event.OPENED]
    story.look(looks=20)
    assert story.events() == [Event.OPENED, Event.RESOLVED]
    assert story.ledger.incidents == {}


def test_what_goes_on_is_told_again_at_the_interval() -> None:
    story = Story()
    story.look(A, looks=int(2 * REMINDER_S / 30) + 1)
    assert story.events() == [Event.OPENED, Event.REMINDER, Event.REMINDER]


def test_what_mends_itself_in_time_is_never_told() -> None:
    story = Story()
    patient = msgspec.structs.replace(A, after_s=60.0)
    story.look(patient, looks=2)
    story.look(looks=10)
    assert story.events() == []
    story.look(patient, looks=4)
    assert story.events() == [Event.OPENED]


def test_flapping_is_one_incident() -> None:
    story = Story()
    for _ in range(20):
        story.look(A)
        story.look(looks=int(CALM_S / 30) - 1)
    assert story.events() == [Event.OPENED]


def test_what_gets_worse_is_told_at_once() -> None:
    story = Story()
    story.look(A)
    story.look(msgspec.structs.replace(A, severity=Severity.CRITICAL), looks=3)
    assert story.events() == [Event.OPENED, Event.REMINDER]
    assert counts(story.ledger) == {Severity.CRITICAL: 1, Severity.WARNING: 0}


def test_since_is_the_earliest_that_was_ever_found() -> None:
    story = Story()
    for since in (100.0, 50.0, 900.0):
        story.look(msgspec.structs.replace(A, since=since))
    assert story.ledger.incidents["a"].condition.since == 50.0


def test_a_channel_that_is_down_is_told_later_and_the_other_at_once() -> None:
    story = Story("one", "two")
    story.down = {"two"}
    story.look(A, looks=3)
    story.look(looks=10)
    assert story.events("one") == [Event.OPENED, Event.RESOLVED]
    assert story.events("two") == []
    story.down = set()
    story.look(looks=40)
    assert story.events("two") == [Event.OPENED, Event.RESOLVED]


def test_a_channel_that_is_new_is_told_what_is_open() -> None:
    story = Story("one")
    story.look(A, looks=3)
    story.channels = ["one", "two"]
    story.look(A, looks=3)
    assert story.events("two") == [Event.OPENED]
    assert story.events("one") == [Event.OPENED]


def test_a_channel_that_is_removed_is_forgotten() -> None:
    story = Story("one", "two")
    story.look(A)
    story.channels = ["one"]
    story.look(A)
    assert set(story.ledger.mailboxes) == {"one"}


def test_many_incidents_at_once_are_one_message() -> None:
    story = Story()
    story.look(*(msgspec.structs.replace(A, key=str(i)) for i in range(50)))
    assert len({at for at, _, _ in story.told["one"]}) == 1
    assert len(story.told["one"]) == 50


def test_a_channel_gets_no_more_than_its_share_of_messages_and_loses_none() -> None:
    story = Story()
    for i in range(40):
        story.look(*(msgspec.structs.replace(A, key=str(k)) for k in range(i + 1)))
    times = sorted({at for at, _, _ in story.told["one"]})
    for first in times:
        assert sum(first <= at < first + 600 for at in times) <= MOST_IN_WINDOW
    story.look(*(msgspec.structs.replace(A, key=str(k)) for k in range(40)), looks=40)
    opened = [key for _, event, key in story.told["one"] if event is Event.OPENED]
    assert sorted(opened, key=int) == [str(k) for k in range(40)]


def test_a_mailbox_is_bounded_and_counts_what_it_lost() -> None:
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
def test_whatever_happens_opened_and_resolved_alternate_on_every_channel(
    present: Sequence[bool], down: Sequence[bool]
) -> None:
    story = Story("one")
    for there, away in zip(present, [*down, *[False] * len(present)], strict=False):
        story.down = {"one"} if away else set()
        story.look(*([A] if there else []))
    story.down = set()
    story.look(looks=60)
    firm = [event for event in story.events() if event is not Event.REMINDER]
    assert firm[::2] == [Event.OPENED] * len(firm[::2])
    assert firm[1::2] == [Event.RESOLVED] * len(firm[1::2])
    assert len(firm) % 2 == 0
    assert bool(firm) == any(present)

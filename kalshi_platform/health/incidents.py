"""When to tell whom of what is wrong: a bookkeeping without I/O.

A *condition* is something that is wrong now, found anew at every look. An *incident* is a condition over
time: it is told once when it has lasted, again at an interval while it goes on, and once when it is over.
Each channel has a *mailbox*, so that one that is down is told later, and no other waits for it: what waits,
and what has been handed to the outbox (`outbox.py`), which sends it while nobody here waits.
All times are seconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

import msgspec

from kalshi_platform import typed_json

CALM_S = 120.0
"""An incident is over when its condition has been away this long: flapping is one incident."""
WINDOW_S, MOST_IN_WINDOW = 600.0, 6
"""A channel gets at most so many messages in so long; what waits meanwhile comes in one."""
BACKOFF_S, BACKOFF_LIMIT_S = 30.0, 900.0
"""Wait after a channel's first failure, doubled by each further one up to the limit."""
MOST_WAITING = 200
"""Notices kept for a channel that is down; the oldest go first, and the next message says how many."""


class Severity(StrEnum):
    """How soon somebody should look."""

    CRITICAL = "critical"
    """Data is being lost, or will be."""
    WARNING = "warning"
    """Nothing is lost; somebody should look today."""


class Event(StrEnum):
    """What is new about an incident."""

    OPENED = "opened"
    REMINDER = "reminder"
    RESOLVED = "resolved"


class Condition(msgspec.Struct, frozen=True):
    """Something that is wrong now."""

    key: str
    """What it is about; two looks that find the same key find the same incident."""
    title: str
    sentence: str
    """What is wrong and what to do."""
    severity: Severity
    since: float
    after_s: float = 0.0
    """How long it must last before it is told: what mends itself sooner is nobody's business."""
    link: str = ""
    """A page that shows it, else empty."""
    section: str = ""
    """The section of the runbook about it."""


class Incident(msgspec.Struct, frozen=True):
    """A condition over time."""

    condition: Condition
    first_seen: float
    last_seen: float
    told_at: float | None = None
    """When the channels were last given it; None: not yet."""


class Notice(msgspec.Struct, frozen=True):
    """One thing to tell."""

    event: Event
    condition: Condition
    at: float


class Mailbox(msgspec.Struct, frozen=True):
    """What a channel is still to be told, and how it has fared."""

    waiting: tuple[Notice, ...] = ()
    dropped: int = 0
    """Notices that it will never be told, because too many waited."""
    sending: tuple[Notice, ...] = ()
    """Of the message that is being sent."""
    sent: tuple[float, ...] = ()
    """When it took a message, within the window."""
    failures: int = 0
    not_before: float = 0.0
    trouble: str = ""
    """Why it did not take the last message, as a sentence."""

    @property
    def untold(self) -> int:
        """How many notices it has not taken."""
        return len(self.sending) + len(self.waiting)

    def may_send(self, now: float) -> bool:
        """Whether there is something to send, and it may be sent now."""
        recent = sum(at > now - WINDOW_S for at in self.sent)
        ready = bool(self.waiting) and not self.sending
        return ready and now >= self.not_before and recent < MOST_IN_WINDOW

    def begun(self) -> Mailbox:
        """After everything that waits was handed over to be sent."""
        return msgspec.structs.replace(self, sending=self.waiting, waiting=())

    def delivered(self, now: float) -> Mailbox:
        """After the message was taken."""
        recent = (*(at for at in self.sent if at > now - WINDOW_S), now)
        return Mailbox(self.waiting, sent=recent)

    def returned(self) -> Mailbox:
        """After it became unknown whether the message was taken: it is sent again."""
        return msgspec.structs.replace(self, waiting=(), sending=()).put(
            [*self.sending, *self.waiting]
        )

    def failed(self, now: float, trouble: str) -> Mailbox:
        """After the message was not taken: it waits again, and the channel is left alone for a while."""
        wait = min(BACKOFF_S * 2.0 ** min(self.failures, 32), BACKOFF_LIMIT_S)
        return msgspec.structs.replace(
            self.returned(), failures=self.failures + 1, not_before=now + wait, trouble=trouble
        )

    def put(self, notices: Iterable[Notice]) -> Mailbox:
        """With further notices; a reminder of what has not even been told yet is left out."""
        waiting = list(self.waiting)
        for notice in notices:
            untold = {each.condition.key for each in (*self.sending, *waiting)}
            if notice.event is not Event.REMINDER or notice.condition.key not in untold:
                waiting.append(notice)
        surplus = max(len(waiting) - MOST_WAITING, 0)
        return msgspec.structs.replace(
            self, waiting=tuple(waiting[surplus:]), dropped=self.dropped + surplus
        )


class Ledger(msgspec.Struct, frozen=True):
    """Everything that must outlive a look."""

    incidents: dict[str, Incident] = {}
    mailboxes: dict[str, Mailbox] = {}

    @property
    def open(self) -> list[Incident]:
        """The incidents that have been told and are not over, oldest first."""
        told = (each for each in self.incidents.values() if each.told_at is not None)
        return sorted(told, key=lambda each: each.condition.since)


def observe(
    ledger: Ledger,
    conditions: Iterable[Condition],
    channels: Iterable[str],
    now: float,
    reminder_s: float,
) -> Ledger:
    """The ledger after a look that found exactly these conditions.

    A channel that is new is told of every incident that is open already; one that is no longer
    configured is forgotten.
    """
    found = {each.key: each for each in conditions}
    incidents: dict[str, Incident] = {}
    notices: list[Notice] = []
    for key, condition in found.items():
        incident, notice = _seen(ledger.incidents.get(key), condition, now, reminder_s)
        incidents[key] = incident
        if notice is not None:
            notices.append(notice)
    for key, incident in ledger.incidents.items():
        if key in found:
            continue
        if now - incident.last_seen < CALM_S:
            incidents[key] = incident
        elif incident.told_at is not None:
            notices.append(Notice(Event.RESOLVED, incident.condition, incident.last_seen))
    still_open = [
        Notice(Event.OPENED, each.condition, now) for each in ledger.open
    ]  # as of before: what was told only now is in `notices`
    return Ledger(
        incidents,
        {
            name: ledger.mailboxes[name].put(notices)
            if name in ledger.mailboxes
            else Mailbox().put([*still_open, *notices])
            for name in channels
        },
    )


def _seen(
    before: Incident | None, condition: Condition, now: float, reminder_s: float
) -> tuple[Incident, Notice | None]:
    if before is None:
        before = Incident(condition, now, now)
    worse = before.condition.severity is Severity.WARNING and (
        condition.severity is Severity.CRITICAL
    )
    since = min(before.condition.since, condition.since)
    condition = msgspec.structs.replace(condition, since=since)
    incident = msgspec.structs.replace(before, condition=condition, last_seen=now)
    if incident.told_at is None:
        if now - incident.first_seen < condition.after_s:
            return incident, None
        event = Event.OPENED
    elif worse or now - incident.told_at >= reminder_s:
        event = Event.REMINDER
    else:
        return incident, None
    return msgspec.structs.replace(incident, told_at=now), Notice(event, condition, now)


def read(text: str | None) -> Ledger:
    """A ledger that `write` wrote; an empty one for None or an empty text."""
    return typed_json.decode(text, Ledger) if text else Ledger()


def write(ledger: Ledger) -> str:
    """The ledger as text."""
    return msgspec.json.encode(ledger).decode()


def counts(ledger: Ledger) -> Mapping[str, int]:
    """How many incidents are open, by severity; every severity is there."""
    return {
        severity.value: sum(each.condition.severity is severity for each in ledger.open)
        for severity in Severity
    }

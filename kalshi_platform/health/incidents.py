"""When to alert: incidents and the notices about them, as pure functions without I/O.

A *condition* is something that is wrong now; each evaluation finds the conditions again. An *incident* is a
condition over time: a notice is sent when it has lasted, a reminder at an interval while it goes on, and a last
notice when it is over. Each channel has a *mailbox* of notices that wait or are being sent, so that a channel
that is down receives its notices later and delays no other. `outbox.py` does the sending.
Times are seconds since the epoch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum

import msgspec

from kalshi_platform import backoff, typed_json

CALM_S = 120.0
"""An incident is over when its condition has been absent this long, so that flapping is one incident."""
WINDOW_S, MOST_IN_WINDOW = 600.0, 6
"""Rate limit of a channel: at most MOST_IN_WINDOW messages in WINDOW_S; waiting notices share a message."""
BACKOFF_S, BACKOFF_LIMIT_S = 30.0, 900.0
"""Wait after a channel's first failure, doubled by each further one up to the limit."""
MOST_WAITING = 200
"""Notices kept for a channel that is down; the oldest are dropped, and the next message says how many."""


class Severity(StrEnum):
    """How soon a person should look."""

    CRITICAL = "critical"
    """Data is being lost, or will be."""
    WARNING = "warning"
    """Nothing is lost; a person should look today."""


class Event(StrEnum):
    """What is new about an incident."""

    OPENED = "opened"
    REMINDER = "reminder"
    RESOLVED = "resolved"


class Condition(msgspec.Struct, frozen=True):
    """Something that is wrong now."""

    key: str
    """Identifies the incident: equal keys in two evaluations are the same incident."""
    title: str
    sentence: str
    """What is wrong and what to do."""
    severity: Severity
    since: float
    after_s: float = 0.0
    """How long it must last before a notice is sent: shorter faults repair themselves."""
    link: str = ""
    """A page that shows it, else empty."""
    section: str = ""
    """The section of the runbook about it."""


class Incident(msgspec.Struct, frozen=True, rename={"notified_at": "told_at"}):  # words: ok
    """A condition over time."""

    condition: Condition
    first_seen: float
    last_seen: float
    notified_at: float | None = None
    """When a notice was last put into the mailboxes; None: not yet."""


class Notice(msgspec.Struct, frozen=True):
    """What a channel is to report about an incident."""

    event: Event
    condition: Condition
    at: float


class Mailbox(msgspec.Struct, frozen=True):
    """A channel's undelivered notices, and its recent deliveries."""

    waiting: tuple[Notice, ...] = ()
    dropped: int = 0
    """Notices that were discarded because too many waited."""
    sending: tuple[Notice, ...] = ()
    """The notices of the message that is being sent."""
    sent: tuple[float, ...] = ()
    """Times of accepted messages within the window."""
    failures: int = 0
    not_before: float = 0.0
    trouble: str = ""
    """Why the last message was not accepted, as a sentence."""

    @property
    def undelivered(self) -> int:
        """The number of notices that the channel has not accepted yet."""
        return len(self.sending) + len(self.waiting)

    def may_send(self, now: float) -> bool:
        """Whether notices wait and neither back-off nor rate limit forbids sending them."""
        recent = sum(at > now - WINDOW_S for at in self.sent)
        ready = bool(self.waiting) and not self.sending
        return ready and now >= self.not_before and recent < MOST_IN_WINDOW

    def begun(self) -> Mailbox:
        """The mailbox after its waiting notices were handed to the outbox."""
        return msgspec.structs.replace(self, sending=self.waiting, waiting=())

    def delivered(self, now: float) -> Mailbox:
        """The mailbox after the message was accepted."""
        recent = (*(at for at in self.sent if at > now - WINDOW_S), now)
        return Mailbox(self.waiting, sent=recent)

    def returned(self) -> Mailbox:
        """The mailbox after the outcome of a delivery was lost: the message is sent again."""
        return msgspec.structs.replace(self, waiting=(), sending=()).put(
            [*self.sending, *self.waiting]
        )

    def failed(self, now: float, trouble: str) -> Mailbox:
        """The mailbox after the message was not accepted: its notices wait for the back-off to end."""
        wait = backoff.wait_s(self.failures + 1, BACKOFF_S, BACKOFF_LIMIT_S)
        return msgspec.structs.replace(
            self.returned(), failures=self.failures + 1, not_before=now + wait, trouble=trouble
        )

    def put(self, notices: Iterable[Notice]) -> Mailbox:
        """Add notices, but no reminder of an incident whose earlier notice is still undelivered."""
        waiting = list(self.waiting)
        for notice in notices:
            pending = {kept.condition.key for kept in (*self.sending, *waiting)}
            if notice.event is not Event.REMINDER or notice.condition.key not in pending:
                waiting.append(notice)
        surplus = max(len(waiting) - MOST_WAITING, 0)
        return msgspec.structs.replace(
            self, waiting=tuple(waiting[surplus:]), dropped=self.dropped + surplus
        )


class Ledger(msgspec.Struct, frozen=True):
    """The state that is kept between evaluations."""

    incidents: dict[str, Incident] = {}
    mailboxes: dict[str, Mailbox] = {}

    @property
    def open(self) -> list[Incident]:
        """The incidents that were reported and are not over, oldest first."""
        notified = (
            incident for incident in self.incidents.values() if incident.notified_at is not None
        )
        return sorted(notified, key=lambda incident: incident.condition.since)


def observe(
    ledger: Ledger,
    conditions: Iterable[Condition],
    channels: Iterable[str],
    now: float,
    reminder_s: float,
) -> Ledger:
    """The ledger after an evaluation that found exactly these conditions.

    A channel that is new receives every open incident; the mailbox of a removed channel is dropped.
    """
    found = {entry.key: entry for entry in conditions}
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
        elif incident.notified_at is not None:
            notices.append(Notice(Event.RESOLVED, incident.condition, incident.last_seen))
    still_open = [
        Notice(Event.OPENED, entry.condition, now) for entry in ledger.open
    ]  # of the ledger before this evaluation; `notices` has those that it opens
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
    """The incident of a condition that holds now, and the notice that is due, if any."""
    if before is None:
        before = Incident(condition, now, now)
    worse = before.condition.severity is Severity.WARNING and (
        condition.severity is Severity.CRITICAL
    )
    since = min(before.condition.since, condition.since)
    condition = msgspec.structs.replace(condition, since=since)
    incident = msgspec.structs.replace(before, condition=condition, last_seen=now)
    if incident.notified_at is None:
        if now - incident.first_seen < condition.after_s:
            return incident, None
        event = Event.OPENED
    elif worse or now - incident.notified_at >= reminder_s:
        event = Event.REMINDER
    else:
        return incident, None
    return msgspec.structs.replace(incident, notified_at=now), Notice(event, condition, now)


def read(text: str | None) -> Ledger:
    """Parse what `write` returned; an empty ledger for None or an empty text."""
    return typed_json.decode(text, Ledger) if text else Ledger()


def write(ledger: Ledger) -> str:
    """The ledger as JSON text, for Dagster's cursor."""
    return msgspec.json.encode(ledger).decode()


def counts(ledger: Ledger) -> Mapping[str, int]:
    """The number of open incidents by severity, zeros included."""
    return {
        severity.value: sum(incident.condition.severity is severity for incident in ledger.open)
        for severity in Severity
    }

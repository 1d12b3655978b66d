"""The outbox: hands messages to their channels while nobody waits, and remembers what came of them.

A look at the platform (`incidents.py`) decides and writes down; the sending happens here, each message in a
process of its own that is killed when its time is over. Nothing less bounds it: a name server, a TLS handshake
or a server that sends a byte now and then can each hold a thread for as long as they like.

Each notice is told once: what has been told is not sent again when the ledger of a look was lost. Only an end
of this process between a delivery and the next look repeats a message, under the same id.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from kalshi_platform.health.channels import Channel, ChannelError, Message, Task
from kalshi_platform.health.incidents import Event, Ledger, Mailbox, Notice

LIMIT_S = 20.0
"""For one message, its second try included."""
RECENT_S = 1800.0
"""What was told so lately is not told again; later it may have begun again."""
MOST_REMEMBERED = 1000
"""Incidents of which is known what each channel was told; the oldest are forgotten first."""


@dataclass
class _Delivery:
    message: Message
    over: bool = False
    error: str | None = None
    """Why it was not taken; None while it is under way, and when it was taken."""


class Outbox:
    """The deliveries of one process: at most one of each channel at a time."""

    def __init__(self, deliver: Callable[[Channel, Message], None] | None = None) -> None:
        """`deliver` raises `ChannelError`; the default is `deliver_in_time`."""
        self._deliver = deliver or deliver_in_time
        self._deliveries: dict[str, _Delivery] = {}
        self._told: dict[str, OrderedDict[str, Notice]] = {}
        """What each channel was told last of each incident, by its key."""
        self._changed = threading.Condition()

    def step(self, ledger: Ledger, channels: Sequence[Channel], now: float) -> Ledger:
        """Note in the ledger what came of the last messages, and begin with those that wait. Never waits."""
        with self._changed:
            for name in {*self._told, *self._deliveries} - {each.name for each in channels}:
                self._told.pop(name, None)
                self._deliveries.pop(name, None)
            return Ledger(
                ledger.incidents,
                {
                    channel.name: self._step(channel, ledger.mailboxes[channel.name], now)
                    for channel in channels
                },
            )

    def forget(self) -> None:
        """What is open is told again: somebody has emptied the ledger."""
        with self._changed:
            self._told.clear()

    def wait(self, timeout_s: float) -> bool:
        """Wait until nothing is under way; whether that came in time."""
        with self._changed:
            return self._changed.wait_for(
                lambda: all(each.over for each in self._deliveries.values()), timeout_s
            )

    def _step(self, channel: Channel, box: Mailbox, now: float) -> Mailbox:
        last = self._deliveries.get(channel.name)
        if last is not None and not last.over:
            return box  # also where the ledger knows nothing of it: one at a time
        if box.sending:
            if last is None or last.message.notices != box.sending:
                box = box.returned()
            elif last.error is not None:
                box = box.failed(now, last.error)
            else:
                box = box.delivered(now)
        box = self._without_told(channel.name, box)
        if not box.may_send(now):
            return box
        box = box.begun()
        self._begin(channel, message_of(channel.name, box))
        return box

    def _without_told(self, name: str, box: Mailbox) -> Mailbox:
        """A ledger that was lost finds its notices again: those that were told are left out."""
        told: Mapping[str, Notice] = self._told.get(name, {})
        waiting = tuple(
            notice
            for notice in box.waiting
            if (last := told.get(notice.condition.key)) is None or not _repeats(notice, last)
        )
        return msgspec.structs.replace(box, waiting=waiting)

    def _begin(self, channel: Channel, message: Message) -> None:
        delivery = self._deliveries[channel.name] = _Delivery(message)
        threading.Thread(
            target=self._run, args=(channel, delivery), name=f"alert-{channel.name}", daemon=True
        ).start()

    def _run(self, channel: Channel, delivery: _Delivery) -> None:
        error = None
        try:
            self._deliver(channel, delivery.message)
        except ChannelError as refusal:
            error = str(refusal)
        with self._changed:
            delivery.over, delivery.error = True, error
            if error is None:
                self._remember(channel.name, delivery.message)
            self._changed.notify_all()

    def _remember(self, name: str, message: Message) -> None:
        told = self._told.setdefault(name, OrderedDict())
        for notice in message.notices:
            told[notice.condition.key] = notice
            told.move_to_end(notice.condition.key)
        while len(told) > MOST_REMEMBERED:
            told.popitem(last=False)


def _repeats(notice: Notice, last: Notice) -> bool:
    """Whether a notice says nothing that a channel was not told by `last`, of the same key."""
    if notice.condition.since != last.condition.since:
        return False
    if last.event is Event.RESOLVED:
        return notice.at - last.at < RECENT_S
    if notice.event is Event.OPENED:
        return True
    same = notice.condition.severity is last.condition.severity
    return notice.event is Event.REMINDER and same and notice.at - last.at < RECENT_S


def message_of(channel: str, box: Mailbox) -> Message:
    """What is being sent to a channel; the same notices give the same id."""
    digest = hashlib.sha256(channel.encode() + msgspec.json.encode(box.sending))
    return Message(box.sending, box.dropped, id=digest.hexdigest()[:32])


def deliver_in_time(channel: Channel, message: Message, limit_s: float = LIMIT_S) -> None:
    """Send a message, in a process that has so long. Raises `ChannelError` where it was not taken."""
    argv = [sys.executable, "-m", "kalshi_platform.health.deliver"]
    task = msgspec.json.encode(
        Task(channel, message)
    )  # by a pipe: arguments are everybody's to read
    try:
        done = subprocess.run(  # noqa: S603
            argv,
            input=task,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ChannelError(
            f"{channel.where} did not take the message within {limit_s:.0f} s, and was left."
        ) from None
    except OSError as error:
        raise ChannelError(
            f"The program that sends messages cannot be started ({error.strerror})."
        ) from None
    if done.returncode:
        reason = done.stdout.decode(errors="replace").strip()
        raise ChannelError(
            reason or f"The program that sends messages failed (exit {done.returncode})."
        )

"""The outbox: delivers messages to their channels in the background, and keeps the outcomes.

`incidents.py` decides what to send and records it in the ledger; sending happens here. Each message is delivered
by a process of its own, which is killed at its deadline. No thread could be bounded so: name resolution, a TLS
handshake, or a server that sends a byte now and then can block it for any time.

Each notice is delivered once, even if a tick's ledger is lost. Only if this process ends between a delivery and
the next tick is a message repeated, with the same id.
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
"""Deadline of one delivery in seconds, retries included."""
RECENT_S = 1800.0
"""A notice that was delivered this recently is a repeat; after that the incident may have begun again."""
MOST_REMEMBERED = 1000
"""Incidents whose last notice is remembered per channel; the oldest are dropped first."""


@dataclass
class _Delivery:
    message: Message
    over: bool = False
    error: str | None = None
    """Why the message was not accepted; None while it is being sent, and if it was accepted."""


class Outbox:
    """The deliveries of one process, at most one per channel at a time."""

    def __init__(self, deliver: Callable[[Channel, Message], None] | None = None) -> None:
        """`deliver` raises `ChannelError`; the default is `deliver_in_time`."""
        self._deliver = deliver or deliver_in_time
        self._deliveries: dict[str, _Delivery] = {}
        self._delivered: dict[str, OrderedDict[str, Notice]] = {}
        """By channel and incident key, the last notice that was delivered."""
        self._changed = threading.Condition()

    def step(self, ledger: Ledger, channels: Sequence[Channel], now: float) -> Ledger:
        """Record the outcomes of finished deliveries and start those of waiting notices. Never blocks."""
        with self._changed:
            for name in {*self._delivered, *self._deliveries} - {
                channel.name for channel in channels
            }:
                self._delivered.pop(name, None)
                self._deliveries.pop(name, None)
            return Ledger(
                ledger.incidents,
                {
                    channel.name: self._step(channel, ledger.mailboxes[channel.name], now)
                    for channel in channels
                },
            )

    def forget(self) -> None:
        """Forget past deliveries, so that open incidents are reported again after a reset of the ledger."""
        with self._changed:
            self._delivered.clear()

    def wait(self, timeout_s: float) -> bool:
        """Wait until no delivery is running; False if that takes longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(
                lambda: all(delivery.over for delivery in self._deliveries.values()), timeout_s
            )

    def _step(self, channel: Channel, box: Mailbox, now: float) -> Mailbox:
        """Record a channel's last outcome, and start its next delivery if one is due."""
        last = self._deliveries.get(channel.name)
        if last is not None and not last.over:
            return box  # one at a time, also if the ledger does not know of the delivery
        if box.sending:
            if last is None or last.message.notices != box.sending:
                box = box.returned()
            elif last.error is not None:
                box = box.failed(now, last.error)
            else:
                box = box.delivered(now)
        box = self._without_delivered(channel.name, box)
        if not box.may_send(now):
            return box
        box = box.begun()
        self._begin(channel, message_of(channel.name, box))
        return box

    def _without_delivered(self, name: str, box: Mailbox) -> Mailbox:
        """Remove waiting notices that were delivered already: a ledger that was lost produces them again."""
        delivered: Mapping[str, Notice] = self._delivered.get(name, {})
        waiting = tuple(
            notice
            for notice in box.waiting
            if (last := delivered.get(notice.condition.key)) is None or not _repeats(notice, last)
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
        delivered = self._delivered.setdefault(name, OrderedDict())
        for notice in message.notices:
            delivered[notice.condition.key] = notice
            delivered.move_to_end(notice.condition.key)
        while len(delivered) > MOST_REMEMBERED:
            delivered.popitem(last=False)


def _repeats(notice: Notice, last: Notice) -> bool:
    """Whether a notice adds nothing to `last`, the delivered notice of the same incident."""
    if notice.condition.since != last.condition.since:
        return False
    if last.event is Event.RESOLVED:
        return notice.at - last.at < RECENT_S
    if notice.event is Event.OPENED:
        return True
    same = notice.condition.severity is last.condition.severity
    return notice.event is Event.REMINDER and same and notice.at - last.at < RECENT_S


def message_of(channel: str, box: Mailbox) -> Message:
    """The message of a mailbox's notices; equal notices give an equal id."""
    digest = hashlib.sha256(channel.encode() + msgspec.json.encode(box.sending))
    return Message(box.sending, box.dropped, id=digest.hexdigest()[:32])


def deliver_in_time(channel: Channel, message: Message, limit_s: float = LIMIT_S) -> None:
    """Send a message in a process with a deadline. Raises `ChannelError` if it was not accepted."""
    argv = [sys.executable, "-m", "kalshi_platform.health.deliver"]
    task = msgspec.json.encode(
        Task(channel, message)
    )  # by a pipe, since every user can read a process's arguments
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
            f"{channel.where} did not accept the message within {limit_s:.0f} s; it is sent again later."
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

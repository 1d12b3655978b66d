"""A channel that hangs is abandoned at its deadline, delays no other, and no notice is sent twice."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.health import outbox as module
from kalshi_platform.health.channels import (
    Channel,
    ChannelError,
    Email,
    Message,
    Slack,
    Webhook,
)
from kalshi_platform.health.incidents import (
    BACKOFF_S,
    CALM_S,
    Condition,
    Event,
    Ledger,
    Severity,
    observe,
    read,
    write,
)
from kalshi_platform.health.outbox import Outbox, deliver_in_time
from kalshi_platform_tests.health.servers import Web, socket_server, web_server

NOW = 1_800_000_000.0
CONDITION = Condition("a", "A is broken", "Repair it.", Severity.WARNING, since=NOW)
MESSAGE = module.message_of(
    "webhook", observe(Ledger(), [CONDITION], ["webhook"], NOW, 60.0).mailboxes["webhook"].begun()
)


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server() as server:
        yield server


# -- one message, in its own process ---------------------------------------------------------------


def drip(caller: socket.socket) -> None:
    """Send an answer that never completes: a byte every tenth of a second."""
    caller.recv(1 << 16)
    caller.sendall(b"HTTP/1.1 ")
    for _ in count():
        caller.sendall(b"2")
        time.sleep(0.1)


def drip_headers(caller: socket.socket) -> None:
    caller.recv(1 << 16)
    caller.sendall(b"HTTP/1.1 200 OK\r\n")
    for n in count():
        caller.sendall(b"X-%d: y\r\n" % n)
        time.sleep(0.1)


def say_nothing(caller: socket.socket) -> None:
    while caller.recv(1 << 16):
        pass


def drip_mail(caller: socket.socket) -> None:
    for _ in count():
        caller.sendall(b"2")
        time.sleep(0.1)


WAITING: dict[str, tuple[Callable[[socket.socket], None], Callable[[int], Channel]]] = {
    "a status line that drips": (drip, lambda port: Webhook(f"http://127.0.0.1:{port}/s3cr3t")),
    "headers that drip": (drip_headers, lambda port: Slack(f"http://127.0.0.1:{port}/s3cr3t")),
    "a TLS handshake that hangs": (
        say_nothing,
        lambda port: Webhook(f"https://127.0.0.1:{port}/s3cr3t"),
    ),
    "a greeting of a mail server that drips": (
        drip_mail,
        lambda port: Email("127.0.0.1", port, "none", "", "s3cr3t", "p@x.test", ("a@x.test",)),
    ),
    "a TLS handshake of a mail server that hangs": (
        say_nothing,
        lambda port: Email("127.0.0.1", port, "tls", "", "s3cr3t", "p@x.test", ("a@x.test",)),
    ),
}


def refused_in_time(
    talk: Callable[[socket.socket], None], channel: Callable[[int], Channel]
) -> str:
    """The sentence with which a channel fails at a deadline of three seconds."""
    with socket_server(talk) as port:
        began = time.monotonic()
        with pytest.raises(ChannelError) as refused:
            deliver_in_time(channel(port), MESSAGE, limit_s=3.0)
        assert time.monotonic() - began < 20.0
    return str(refused.value)


def test_slow_channels_are_abandoned_at_the_deadline() -> None:
    """The channels run in parallel, since they only wait."""
    with ThreadPoolExecutor(len(WAITING)) as pool:
        waits = {name: pool.submit(refused_in_time, *case) for name, case in WAITING.items()}
    for name, wait in waits.items():
        sentence = wait.result()
        assert sentence.startswith(("The host of ALERT_", "The mail server 127.0.0.1:")), name
        assert "s3cr3t" not in sentence, name


def test_a_silent_name_server_is_abandoned_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Name resolution cannot be interrupted from within a process."""
    (tmp_path / "sitecustomize.py").write_text(
        "import socket, time\nsocket.getaddrinfo = lambda *_, **__: time.sleep(3600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    began = time.monotonic()
    with pytest.raises(
        ChannelError, match=r"hooks\.x\.test, did not accept the message within 3 s"
    ):
        deliver_in_time(Webhook("https://hooks.x.test/s3cr3t"), MESSAGE, limit_s=3.0)
    assert time.monotonic() - began < 20.0


def test_an_answer_of_any_size_is_not_read() -> None:
    sent = 0

    def flood(caller: socket.socket) -> None:
        nonlocal sent
        caller.recv(1 << 16)
        caller.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            sent += caller.send(b"x" * (1 << 20))

    with socket_server(flood) as port:
        deliver_in_time(Webhook(f"http://127.0.0.1:{port}/"), MESSAGE)
    assert sent < 64 << 20


def test_a_message_is_delivered_with_its_id(web: Web) -> None:
    deliver_in_time(Webhook(web.url), MESSAGE)
    (body,) = web.bodies
    assert body["id"] == MESSAGE.id
    assert body["notices"][0]["title"] == "A is broken"


@pytest.mark.parametrize(
    ("status", "words"), [(500, "answered HTTP 500"), (403, "HTTP 403. Is"), (302, "not followed")]
)
def test_what_a_channel_answers_is_named_without_its_secret(
    web: Web, status: int, words: str
) -> None:
    web.statuses = [status]
    with pytest.raises(ChannelError, match=words) as refused:
        deliver_in_time(Webhook(web.url), MESSAGE)
    assert "s3cr3t" not in str(refused.value)


def test_the_secret_is_in_no_argument_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Sequence[str]] = []
    run = subprocess.run

    def noted(argv: Sequence[str], **options: object) -> object:
        started.append(argv)
        return run([sys.executable, "-c", "raise SystemExit(3)"], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", noted)
    with pytest.raises(ChannelError, match=r"failed \(exit 3\)"):
        deliver_in_time(Webhook("https://hooks.x.test/s3cr3t"), MESSAGE)
    assert "s3cr3t" not in str(started)


# -- the ledger's side -----------------------------------------------------------------------------


class Post:
    """Channels that accept messages, refuse them, or hang."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, Message]] = []
        self.refusing: set[str] = set()
        self.waiting = threading.Event()
        self.waiting.set()
        self.slow: set[str] = set()

    def __call__(self, channel: Channel, message: Message) -> None:
        if channel.name in self.slow:
            self.waiting.wait(60)
        if channel.name in self.refusing:
            raise ChannelError("It refuses.")
        self.taken.append((channel.name, message))

    def events(self, name: str) -> list[tuple[Event, str]]:
        return [
            (notice.event, notice.condition.key)
            for to, message in self.taken
            for notice in message.notices
            if to == name
        ]


BOTH: list[Channel] = [Webhook("http://w.test"), Slack("http://s.test")]


def look(
    outbox: Outbox, ledger: Ledger, now: float, *conditions: Condition, wait: bool = True
) -> Ledger:
    names = [channel.name for channel in BOTH]
    ledger = observe(read(write(ledger)), conditions, names, now, 3600.0)
    ledger = outbox.step(ledger, BOTH, now)
    if wait:
        assert outbox.wait(60)
    return ledger


def test_a_slow_channel_delays_neither_the_tick_nor_other_channels() -> None:
    post = Post()
    post.slow = {"webhook"}
    post.waiting.clear()
    outbox = Outbox(post)
    began = time.monotonic()
    ledger = look(outbox, Ledger(), NOW, CONDITION, wait=False)
    for n in range(5):
        ledger = look(outbox, ledger, NOW + n, CONDITION, wait=False)
    assert time.monotonic() - began < 5.0
    assert not outbox.wait(0.0)
    post.waiting.set()
    assert outbox.wait(60)
    look(outbox, ledger, NOW + 30, CONDITION)
    assert post.events("webhook") == post.events("slack") == [(Event.OPENED, "a")]


def test_a_refused_message_waits_and_is_sent_later() -> None:
    post = Post()
    post.refusing = {"webhook"}
    outbox = Outbox(post)
    ledger = look(outbox, Ledger(), NOW, CONDITION)
    ledger = look(outbox, ledger, NOW + 1, CONDITION)
    box = ledger.mailboxes["webhook"]
    assert (box.trouble, box.undelivered, box.failures) == ("It refuses.", 1, 1)
    assert not ledger.mailboxes["slack"].trouble
    post.refusing = set()
    ledger = look(outbox, ledger, NOW + 1 + BACKOFF_S, CONDITION)
    ledger = look(outbox, ledger, NOW + 2 + BACKOFF_S, CONDITION)
    assert ledger.mailboxes["webhook"].trouble == ""
    assert post.events("webhook") == [(Event.OPENED, "a")]


def test_a_restarted_process_repeats_the_message_with_its_id() -> None:
    post = Post()
    ledger = look(Outbox(post), Ledger(), NOW, CONDITION)
    look(Outbox(post), ledger, NOW + 30, CONDITION)
    ids = [message.id for name, message in post.taken if name == "webhook"]
    assert len(ids) == 2
    assert len(set(ids)) == 1


@given(lost=st.lists(st.booleans(), min_size=6, max_size=12), refused=st.sets(st.integers(0, 12)))
def test_lost_ledgers_never_repeat_a_notice(lost: list[bool], refused: set[int]) -> None:
    """Half of the ticks find the condition, then it is over; `lost` ticks do not keep their ledger."""
    post = Post()
    outbox, ledger, now = Outbox(post), Ledger(), NOW
    for n, is_lost in enumerate(lost):
        post.refusing = {"webhook", "slack"} if n in refused else set()
        conditions = [CONDITION] if n < len(lost) // 2 else []
        after = look(outbox, ledger, now, *conditions)
        ledger = ledger if is_lost else after
        now += CALM_S
    post.refusing = set()
    for _ in range(4):  # these ledgers are kept
        ledger = look(outbox, ledger, now)
        now += CALM_S
    for name in ("webhook", "slack"):
        events = [event for event, _ in post.events(name)]
        assert events.count(Event.OPENED) <= 1
        assert events.count(Event.RESOLVED) <= 1
        assert events.count(Event.OPENED) >= (not all(lost[: len(lost) // 2]) and not refused)


def test_a_channel_configured_again_receives_open_incidents() -> None:
    post = Post()
    outbox = Outbox(post)
    ledger = look(outbox, Ledger(), NOW, CONDITION)
    none = outbox.step(observe(ledger, [CONDITION], [], NOW + 1, 60.0), [], NOW + 1)
    look(outbox, none, NOW + 30, CONDITION)
    assert post.events("slack") == [(Event.OPENED, "a")] * 2

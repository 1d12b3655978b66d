"""Alert channels: Slack, a webhook, e-mail. A message may carry several notices.

A webhook's address is a secret, since it admits anyone who knows it. It is in no log and no error; the
sentence of a `ChannelError` names the setting instead. Deadlines are not enforced here: `outbox.py` sends each
message in a process that it can kill. When to alert is decided in `incidents.py`.
"""

from __future__ import annotations

import logging
import re
import smtplib
import socket
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from typing import Any

import httpx
import msgspec
import tenacity

from kalshi_platform.errors import PlatformError
from kalshi_platform.health.incidents import Condition, Event, Notice, Severity
from kalshi_platform.printable import printable, printable_lines
from kalshi_platform.settings import Settings

for _name in ("httpx", "httpcore"):  # httpx logs the whole address of every request
    logging.getLogger(_name).setLevel(logging.WARNING)

TIMEOUT_S = 4.0
"""Timeout of a single read or write; the outbox bounds the whole delivery."""
ATTEMPTS = 2
"""Attempts of one delivery; a message that fails stays in the mailbox for the next tick."""
MENTION = re.compile(r"@(?=channel|here|all|everyone)", re.IGNORECASE)
"""Mentions that notify a whole Slack channel."""
RUNBOOK = "docs/operations.md"
_PREFIXES = {Event.OPENED: "", Event.REMINDER: "STILL ", Event.RESOLVED: "RESOLVED "}


class ChannelError(PlatformError):
    """A channel did not accept a message; the sentence names the setting to check."""


class _Transient(ChannelError):
    """A transient failure: worth an immediate retry."""


@dataclass(frozen=True)
class Message:
    """One or more notices, the oldest first, as a channel sends them."""

    notices: tuple[Notice, ...]
    dropped: int = 0
    host: str = field(default_factory=socket.gethostname)
    id: str = ""
    """Equal for repeats of a message, so that a receiver can drop duplicates."""

    @property
    def subject(self) -> str:
        """The subject, on one line."""
        first = headline(self.notices[0])
        more = len(self.notices) - 1
        return f"kalshi_platform: {first}{f' (and {more} more)' if more else ''}"

    @property
    def text(self) -> str:
        """All notices as plain text."""
        parts = [describe(notice) for notice in self.notices]
        if self.dropped:
            parts.append(f"{self.dropped} older notices were not sent: too many were waiting.")
        return "\n\n".join(parts) + f"\n\nFrom kalshi_platform on {self.host}."


def headline(notice: Notice) -> str:
    """Severity and title of a notice, on one line."""
    condition = notice.condition
    return f"[{_PREFIXES[notice.event]}{condition.severity.upper()}] {printable(condition.title)}"


def describe(notice: Notice) -> str:
    """Describe a notice: what is wrong, since when, what to do, and where to look."""
    condition = notice.condition
    lines, sentence = [headline(notice)], printable_lines(condition.sentence)
    if notice.event is Event.RESOLVED:
        lines.append(
            f"Over since {_utc(notice.at)}; it lasted {_lasting(notice.at - condition.since)}."
        )
        lines.append(f"It was: {sentence}")
    else:
        lines.append(sentence)
        lines.append(f"Since {_utc(condition.since)} ({_lasting(notice.at - condition.since)}).")
    if condition.link:
        lines.append(f"See {printable(condition.link)}")
    if condition.section:
        lines.append(f'Runbook: {RUNBOOK}, "{condition.section}"')
    return "\n".join(lines)


# -- the channels ------------------------------------------------------------------------------


class Slack(msgspec.Struct, frozen=True, tag="slack"):
    """An incoming webhook of Slack or of a compatible service (Mattermost, Discord's /slack)."""

    url: str
    name: str = "slack"

    def __repr__(self) -> str:
        return "Slack()"

    @property
    def where(self) -> str:
        """The channel's name in a sentence, without a secret."""
        return _host_of("ALERT_SLACK_WEBHOOK_URL", self.url)

    def send(self, message: Message) -> None:
        """Send a message, escaped so that none of it is markup. Raises `ChannelError`."""
        text = message.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        body = {"text": MENTION.sub("@\u2060", text), "mrkdwn": False}
        _post(self.url, body, "ALERT_SLACK_WEBHOOK_URL", message.id)


class Webhook(msgspec.Struct, frozen=True, tag="webhook"):
    """JSON to the operator's own server; docs/operations.md lists the keys."""

    url: str
    name: str = "webhook"

    def __repr__(self) -> str:
        return "Webhook()"

    @property
    def where(self) -> str:
        """See `Slack`."""
        return _host_of("ALERT_WEBHOOK_URL", self.url)

    def send(self, message: Message) -> None:
        """Send a message. Raises `ChannelError`."""
        body = {
            "source": "kalshi_platform",
            "id": message.id,
            "host": message.host,
            "subject": message.subject,
            "text": message.text,
            "notices": [_plain(notice) for notice in message.notices],
        }
        _post(self.url, body, "ALERT_WEBHOOK_URL", message.id)


class Email(msgspec.Struct, frozen=True, tag="email"):
    """E-mail by SMTP, by default with STARTTLS."""

    host: str
    port: int
    security: str
    user: str
    password: str
    sender: str
    to: tuple[str, ...]
    name: str = "email"

    def __repr__(self) -> str:
        return f"Email({self.host!r}, {self.port}, to={len(self.to)})"

    def send(self, message: Message) -> None:
        """Send a message. Raises `ChannelError`."""
        mail = EmailMessage()
        mail["Subject"] = message.subject
        mail["From"] = self.sender
        mail["To"] = ", ".join(self.to)
        mail["Date"] = formatdate()
        domain = self.sender.rpartition("@")[2] or "localhost"
        mail["Message-ID"] = f"<{message.id}@{domain}>" if message.id else make_msgid(domain=domain)
        mail["Auto-Submitted"] = "auto-generated"
        mail.set_content(message.text)
        try:
            _retrying(lambda: self._deliver(mail))
        except ChannelError:
            raise
        except (smtplib.SMTPException, OSError, ValueError) as error:
            raise ChannelError(self._sentence(error)) from None

    def _deliver(self, mail: EmailMessage) -> None:
        """Send a mail over one SMTP connection."""
        tls = ssl.create_default_context()
        server: smtplib.SMTP
        try:
            if self.security == "tls":
                server = smtplib.SMTP_SSL(self.host, self.port, timeout=TIMEOUT_S, context=tls)
            else:
                server = smtplib.SMTP(self.host, self.port, timeout=TIMEOUT_S)
        except ssl.SSLError:
            raise
        except (OSError, smtplib.SMTPServerDisconnected) as error:
            raise _Transient(self._sentence(error)) from None
        with server:
            if self.security == "starttls":
                server.starttls(context=tls)
            if self.user:
                server.login(self.user, self.password)
            refused = server.send_message(mail)
        if refused:
            raise ChannelError(
                f"{self.where} refused {', '.join(sorted(refused))}. See ALERT_EMAIL_TO."
            )

    @property
    def where(self) -> str:
        """See `Slack`."""
        return f"The mail server {self.host}:{self.port}"

    def _sentence(self, error: Exception) -> str:
        """An SMTP error as a sentence that names the setting to check."""
        if isinstance(error, smtplib.SMTPAuthenticationError):
            return f"{self.where} refused SMTP_USER and SMTP_PASSWORD. Set them as it gave them."
        if isinstance(error, smtplib.SMTPResponseException):
            answer = error.smtp_error
            reason = answer.decode(errors="replace") if isinstance(answer, bytes) else str(answer)
            return (
                f"{self.where} said {error.smtp_code} {printable(' '.join(reason.split())[:500])}."
            )
        if isinstance(error, smtplib.SMTPRecipientsRefused):
            return f"{self.where} refused every address of ALERT_EMAIL_TO. Correct them."
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return f"{self.where} cannot be used ({printable(reason)}). See SMTP_HOST, SMTP_PORT, SMTP_SECURITY."


Channel = Slack | Webhook | Email
"""A destination of messages: `name` is used in logs and in the cursor, `where` in sentences, and `send` raises
`ChannelError` if the message was not accepted."""


def configured(settings: Settings) -> list[Channel]:
    """The channels that are configured."""
    found: list[Channel] = []
    if settings.alert_slack_webhook_url is not None:
        found.append(Slack(settings.alert_slack_webhook_url.get_secret_value()))
    if settings.alert_webhook_url is not None:
        found.append(Webhook(settings.alert_webhook_url.get_secret_value()))
    if settings.alert_email_to and settings.smtp_host and settings.alert_email_from:
        found.append(
            Email(
                settings.smtp_host,
                settings.smtp_port,
                settings.smtp_security,
                settings.smtp_user or "",
                settings.smtp_password.get_secret_value() if settings.smtp_password else "",
                settings.alert_email_from,
                settings.alert_email_to,
            )
        )
    return found


class Task(msgspec.Struct, frozen=True):
    """A message and its channel, as `outbox.py` passes them to `deliver.py`."""

    channel: Channel
    message: Message


def trial(now: float) -> Message:
    """The message that `doctor --test-alert` sends."""
    condition = Condition(
        key="test",
        title="This is a test",
        sentence="Nothing is wrong: kalshi-platform doctor was asked to send a test alert.",
        severity=Severity.WARNING,
        since=now,
        section="Alerts",
    )
    return Message((Notice(Event.OPENED, condition, now),), id=f"test-{now:.0f}")


# -- sending -------------------------------------------------------------------------------------


def _host_of(setting: str, url: str) -> str:
    return f"The host of {setting}, {httpx.URL(url).host},"


def _post(url: str, body: dict[str, Any], setting: str, message_id: str) -> None:
    """Post JSON. The answer's body is not read, since the status says whether the message was accepted."""
    where = _host_of(setting, url)
    headers = {"Idempotency-Key": message_id} if message_id else {}

    def once() -> None:
        try:
            with (
                httpx.Client(timeout=TIMEOUT_S, headers=headers) as client,
                client.stream("POST", url, json=body) as answer,
            ):
                status = answer.status_code
        except httpx.HTTPError as error:
            reason = str(error).replace(url, "…") or type(error).__name__
            raise _Transient(f"{where} cannot be reached ({printable(reason)}).") from None
        if status == httpx.codes.TOO_MANY_REQUESTS or status >= 500:
            raise _Transient(f"{where} answered HTTP {status}.")
        if httpx.codes.is_redirect(status):
            raise ChannelError(
                f"{where} answered HTTP {status}: redirects are not followed, for the message would reach another host. Set"
                f" {setting} to the address itself."
            )
        if not httpx.codes.is_success(status):
            raise ChannelError(f"{where} refused with HTTP {status}. Is {setting} still valid?")

    _retrying(once)


def _retrying(act: Any) -> None:
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_Transient),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_random(0.1, 0.5),
        reraise=True,
    )
    retrying(act)


def _plain(notice: Notice) -> dict[str, Any]:
    condition = notice.condition
    return {
        "event": notice.event.value,
        "key": condition.key,
        "severity": condition.severity.value,
        "title": condition.title,
        "sentence": condition.sentence,
        "since": datetime.fromtimestamp(condition.since, UTC).isoformat(timespec="seconds"),
        "at": datetime.fromtimestamp(notice.at, UTC).isoformat(timespec="seconds"),
        "link": condition.link,
        "runbook": f"{RUNBOOK}: {condition.section}" if condition.section else "",
    }


def _utc(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _lasting(seconds: float) -> str:
    seconds = max(seconds, 0.0)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"

"""Where alerts go: Slack, a webhook of one's own, e-mail. One message may carry several notices.

Addresses of webhooks are secrets: whoever knows them may write there. They are in no log and in no
error; the sentence of a `ChannelError` names the setting. A channel may take as long as it likes to fail:
`outbox.py` sends, and bounds it.
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
"""Of silence. A server that says something now and then is bounded by the outbox alone."""
ATTEMPTS = 2
"""In one go; what is not taken waits in the mailbox for the next look."""
MENTION = re.compile(r"@(?=channel|here|all|everyone)", re.IGNORECASE)
"""What makes Slack and its likes call everybody."""
RUNBOOK = "docs/operations.md"
_TOLD = {Event.OPENED: "", Event.REMINDER: "STILL ", Event.RESOLVED: "RESOLVED "}


class ChannelError(PlatformError):
    """A channel did not take a message; the sentence says which setting to look at."""


class _Passing(ChannelError):
    """Worth another try at once."""


@dataclass(frozen=True)
class Message:
    """What a channel is given: one or more notices, the oldest first."""

    notices: tuple[Notice, ...]
    dropped: int = 0
    host: str = field(default_factory=socket.gethostname)
    id: str = ""
    """The same where a message is repeated, for those who want to take each once."""

    @property
    def subject(self) -> str:
        """One line."""
        first = headline(self.notices[0])
        more = len(self.notices) - 1
        return f"kalshi_platform: {first}{f' (and {more} more)' if more else ''}"

    @property
    def text(self) -> str:
        """Everything, as plain text."""
        parts = [told(notice) for notice in self.notices]
        if self.dropped:
            parts.append(f"{self.dropped} older notices were not sent: too many had waited.")
        return "\n\n".join(parts) + f"\n\nFrom kalshi_platform on {self.host}."


def headline(notice: Notice) -> str:
    """One line: how bad, and what."""
    it = notice.condition
    return f"[{_TOLD[notice.event]}{it.severity.upper()}] {printable(it.title)}"


def told(notice: Notice) -> str:
    """What is wrong, since when, what to do, and where to look."""
    it = notice.condition
    lines, sentence = [headline(notice)], printable_lines(it.sentence)
    if notice.event is Event.RESOLVED:
        lines.append(f"Over since {_utc(notice.at)}; it lasted {_lasting(notice.at - it.since)}.")
        lines.append(f"It was: {sentence}")
    else:
        lines.append(sentence)
        lines.append(f"Since {_utc(it.since)} ({_lasting(notice.at - it.since)}).")
    if it.link:
        lines.append(f"See {printable(it.link)}")
    if it.section:
        lines.append(f'Runbook: {RUNBOOK}, "{it.section}"')
    return "\n".join(lines)


# -- the channels ------------------------------------------------------------------------------


class Slack(msgspec.Struct, frozen=True, tag="slack"):
    """An incoming webhook of Slack, or of what understands its messages (Mattermost, Discord's /slack)."""

    url: str
    name: str = "slack"

    def __repr__(self) -> str:
        return "Slack()"

    @property
    def where(self) -> str:
        """What it is, for a sentence, without a secret."""
        return _host_of("ALERT_SLACK_WEBHOOK_URL", self.url)

    def send(self, message: Message) -> None:
        """Raises `ChannelError`. The text is no markup, whatever is in it."""
        text = message.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        body = {"text": MENTION.sub("@\u2060", text), "mrkdwn": False}
        _post(self.url, body, "ALERT_SLACK_WEBHOOK_URL", message.id)


class Webhook(msgspec.Struct, frozen=True, tag="webhook"):
    """JSON to a server of one's own; docs/operations.md has the keys."""

    url: str
    name: str = "webhook"

    def __repr__(self) -> str:
        return "Webhook()"

    @property
    def where(self) -> str:
        """See `Slack`."""
        return _host_of("ALERT_WEBHOOK_URL", self.url)

    def send(self, message: Message) -> None:
        """Raises `ChannelError`."""
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
    """SMTP, by default with STARTTLS."""

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
        """Raises `ChannelError`."""
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
            raise _Passing(self._sentence(error)) from None
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
        if isinstance(error, smtplib.SMTPAuthenticationError):
            return f"{self.where} refused SMTP_USER and SMTP_PASSWORD. Set them as it gave them."
        if isinstance(error, smtplib.SMTPResponseException):
            said = error.smtp_error
            reason = said.decode(errors="replace") if isinstance(said, bytes) else str(said)
            return (
                f"{self.where} said {error.smtp_code} {printable(' '.join(reason.split())[:500])}."
            )
        if isinstance(error, smtplib.SMTPRecipientsRefused):
            return f"{self.where} refused every address of ALERT_EMAIL_TO. Correct them."
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return f"{self.where} cannot be used ({printable(reason)}). See SMTP_HOST, SMTP_PORT, SMTP_SECURITY."


Channel = Slack | Webhook | Email
"""Where a message goes: its `name` is as it is called in logs and in the cursor, `where` is for a sentence, and
`send` raises `ChannelError` where it was not taken."""


def configured(settings: Settings) -> list[Channel]:
    """The channels that the settings name."""
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
    """A message and its channel, as they go to another process."""

    channel: Channel
    message: Message


def trial(now: float) -> Message:
    """A message for trying a channel."""
    condition = Condition(
        key="test",
        title="This is a test",
        sentence="Nothing is wrong: somebody asked kalshi-platform doctor to send a test alert.",
        severity=Severity.WARNING,
        since=now,
        section="Alerts",
    )
    return Message((Notice(Event.OPENED, condition, now),), id=f"test-{now:.0f}")


# -- how -----------------------------------------------------------------------------------------


def _host_of(setting: str, url: str) -> str:
    return f"The host of {setting}, {httpx.URL(url).host},"


def _post(url: str, body: dict[str, Any], setting: str, message_id: str) -> None:
    """What the server answers is not read: its status says whether it took the message."""
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
            raise _Passing(f"{where} cannot be reached ({printable(reason)}).") from None
        if status == httpx.codes.TOO_MANY_REQUESTS or status >= 500:
            raise _Passing(f"{where} answered HTTP {status}.")
        if httpx.codes.is_redirect(status):
            raise ChannelError(
                f"{where} answered HTTP {status}: it wants the message elsewhere, which is not followed. Set"
                f" {setting} to the address itself."
            )
        if not httpx.codes.is_success(status):
            raise ChannelError(f"{where} refused with HTTP {status}. Is {setting} still valid?")

    _retrying(once)


def _retrying(act: Any) -> None:
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_Passing),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_random(0.1, 0.5),
        reraise=True,
    )
    retrying(act)


def _plain(notice: Notice) -> dict[str, Any]:
    it = notice.condition
    return {
        "event": notice.event.value,
        "key": it.key,
        "severity": it.severity.value,
        "title": it.title,
        "sentence": it.sentence,
        "since": datetime.fromtimestamp(it.since, UTC).isoformat(timespec="seconds"),
        "at": datetime.fromtimestamp(notice.at, UTC).isoformat(timespec="seconds"),
        "link": it.link,
        "runbook": f"{RUNBOOK}: {it.section}" if it.section else "",
    }


def _utc(at: float) -> str:
    return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _lasting(seconds: float) -> str:
    seconds = max(seconds, 0.0)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"

"""Messages reach real servers; an error about a server never shows its secret address."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from kalshi_platform import settings as platform_settings
from kalshi_platform.errors import SettingsError
from kalshi_platform.health import channels
from kalshi_platform.health.channels import ChannelError, Email, Message, Slack, Webhook
from kalshi_platform.health.incidents import Condition, Event, Notice, Severity
from kalshi_platform_tests.health.servers import Mail, Web, mail_server, web_server

CONDITION = Condition(
    key="feed:0",
    title="Feed of shard 0: streamer down",
    sentence="The streamer is down: process 7 is gone. See that <the daemon> runs & records.",
    severity=Severity.CRITICAL,
    since=1_800_000_000.0,
    link="http://127.0.0.1:3000/runs",
    section="The feed stands still",
)
OPENED = Notice(Event.OPENED, CONDITION, 1_800_000_090.0)
RESOLVED = Notice(Event.RESOLVED, CONDITION, 1_800_000_900.0)


@pytest.fixture
def web() -> Iterator[Web]:
    with web_server() as server:
        yield server


@pytest.fixture
def mail() -> Iterator[Mail]:
    with mail_server() as server:
        yield server


def email(port: int, **values: Any) -> Email:
    given = {"security": "none", "user": "", "password": ""} | values
    return Email("127.0.0.1", port, sender="platform@x.test", to=("a@x.test", "b@x.test"), **given)


def test_a_message_has_fault_start_remedy_and_link() -> None:
    text = Message((OPENED,), host="recorder-1").text
    assert "[CRITICAL] Feed of shard 0: streamer down" in text
    assert CONDITION.sentence in text
    assert "Since 2027-01-15 08:00:00 UTC (90 s)." in text
    assert "http://127.0.0.1:3000/runs" in text
    assert 'docs/operations.md, "The feed stands still"' in text
    assert "recorder-1" in text


def test_the_end_says_how_long_it_lasted() -> None:
    message = Message((RESOLVED,), host="recorder-1")
    assert message.subject == "kalshi_platform: [RESOLVED CRITICAL] Feed of shard 0: streamer down"
    assert "it lasted 15 min" in message.text


def test_several_notices_are_one_message() -> None:
    message = Message((OPENED, RESOLVED), dropped=3)
    assert message.subject.endswith("(and 1 more)")
    assert message.text.count("Feed of shard 0") == 2
    assert "3 older notices were not sent" in message.text


def test_slack_gets_its_own_escapes(web: Web) -> None:
    Slack(web.url).send(Message((OPENED,)))
    (body,) = web.bodies
    assert "See that &lt;the daemon&gt; runs &amp; records." in body["text"]


def test_a_webhook_gets_every_field(web: Web) -> None:
    Webhook(web.url).send(Message((OPENED, RESOLVED), host="recorder-1", id="4711"))
    (body,) = web.bodies
    assert (body["source"], body["host"]) == ("kalshi_platform", "recorder-1")
    assert body["id"] == web.headers["Idempotency-Key"] == "4711"
    assert body["notices"][0] == {
        "event": "opened",
        "key": "feed:0",
        "severity": "critical",
        "title": CONDITION.title,
        "sentence": CONDITION.sentence,
        "since": "2027-01-15T08:00:00+00:00",
        "at": "2027-01-15T08:01:30+00:00",
        "link": CONDITION.link,
        "runbook": "docs/operations.md: The feed stands still",
    }
    assert body["notices"][1]["event"] == "resolved"


def test_mail_reaches_every_address(mail: Mail) -> None:
    email(mail.port).send(Message((OPENED,), host="recorder-1", id="4711"))
    (message,) = mail.messages
    assert message["Message-ID"] == "<4711@x.test>"
    assert message["Subject"] == "kalshi_platform: [CRITICAL] Feed of shard 0: streamer down"
    assert mail.recipients == [["a@x.test", "b@x.test"]]
    assert CONDITION.sentence in message.get_content()


HOSTILE = msgspec.structs.replace(
    CONDITION,
    title="$x$ *b* [red] <script>\r\nBcc: all@x.test\x1b[31m \u202e",
    sentence="line one\nSince 1970: <!channel> @channel `|` \x00",
)


def test_foreign_text_is_no_markup_and_forges_no_line(web: Web, mail: Mail) -> None:
    message = Message((Notice(Event.OPENED, HOSTILE, 1_800_000_090.0),))
    for channel in (Slack(web.url), Webhook(web.url), email(mail.port)):
        channel.send(message)
    slack, _ = web.bodies
    assert slack["mrkdwn"] is False
    assert (
        "&lt;script&gt;\\r\\nBcc: all@x.test\\x1b[31m \\u202e\nline one\n  Since" in slack["text"]
    )
    assert "&lt;!channel&gt; @\u2060channel" in slack["text"]
    (sent,) = mail.messages
    assert sent["Bcc"] is None
    assert sent["Subject"].endswith("Bcc: all@x.test\\x1b[31m \\u202e")
    assert "\x1b" not in sent.get_content()


def test_redirects_are_not_followed(web: Web) -> None:
    web.statuses = [307]
    with pytest.raises(ChannelError, match="HTTP 307: redirects are not followed"):
        Webhook(web.url).send(Message((OPENED,)))
    assert web.asked == 1


def test_mail_with_a_password() -> None:
    with mail_server("me", "s3cr3t") as mail:
        email(mail.port, user="me", password="s3cr3t").send(Message((OPENED,)))
        assert len(mail.messages) == 1
        with pytest.raises(ChannelError, match="refused SMTP_USER and SMTP_PASSWORD") as refused:
            email(mail.port, user="me", password="wr0ng").send(Message((OPENED,)))
        assert "wr0ng" not in str(refused.value)


def test_a_server_without_starttls_is_named_and_gets_nothing(mail: Mail) -> None:
    with pytest.raises(ChannelError, match="SMTP_SECURITY"):
        email(mail.port, security="starttls").send(Message((OPENED,)))
    assert not mail.messages


def test_a_mail_server_that_refuses_is_quoted(mail: Mail) -> None:
    mail.answer = "554 Too many messages"
    with pytest.raises(ChannelError, match="said 554 Too many messages"):
        email(mail.port).send(Message((OPENED,)))


def test_a_busy_server_is_retried_and_one_that_refuses_is_not(web: Web) -> None:
    web.statuses = [503, 200]
    Slack(web.url).send(Message((OPENED,)))
    assert (web.asked, len(web.bodies)) == (2, 1)
    web.statuses = [404]
    with pytest.raises(ChannelError, match=r"HTTP 404\. Is ALERT_SLACK_WEBHOOK_URL still valid"):
        Slack(web.url).send(Message((OPENED,)))
    assert web.asked == 3


def test_settings_name_the_channels(web: Web) -> None:
    settings = platform_settings.load(
        _env_file=None,
        alert_slack_webhook_url=web.url,
        alert_webhook_url=web.url,
        alert_email_to="a@x.test, b@x.test",
        alert_email_from="platform@x.test",
        smtp_host="mail.x.test",
    )
    assert [channel.name for channel in channels.configured(settings)] == [
        "slack",
        "webhook",
        "email",
    ]
    assert "s3cr3t" not in repr(settings)
    assert not channels.configured(platform_settings.load(_env_file=None))


@pytest.mark.parametrize("name", ["alert_slack_webhook_url", "alert_webhook_url"])
def test_a_bad_address_is_refused_without_being_shown(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name.upper()} is not a URL") as refused:
        platform_settings.load(_env_file=None, **{name: "hooks.slack.com/s3cr3t"})
    assert "s3cr3t" not in str(refused.value)


def test_mail_without_a_server_is_refused() -> None:
    with pytest.raises(SettingsError, match="SMTP_HOST is not set"):
        platform_settings.load(_env_file=None, alert_email_to="a@x.test")

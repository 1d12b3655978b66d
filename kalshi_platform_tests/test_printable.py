"""Untrusted text is shown on a terminal and in a log without controlling either."""

from __future__ import annotations

import json

import pytest

from kalshi_platform.exchange.rest import refusal
from kalshi_platform.exchange.session import Session
from kalshi_platform.printable import printable

HOSTILE = "\x1b]0;owned\x07 line\r\nError: forged \u202e \x9b2J"


@pytest.mark.parametrize("text", ["", "KXFED-27-T0.5", "é ü 日本 👩‍💻 \\n", "a\u00a0b"])
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_control_characters_are_spelt_out() -> None:
    assert printable(HOSTILE) == r"\x1b]0;owned\x07 line\r\nError: forged \u202e \x9b2J"
    assert printable("\ud800") == r"\ud800"


def test_messages_of_the_exchange_are_escaped() -> None:
    session = Session(["A-1"])
    list(session.commands(0.0))
    error = {"type": "error", "id": 1, "msg": {"code": 99, "msg": HOSTILE * 1_000}}
    session.receive(json.dumps(error).encode(), 0.0)
    [warning] = session.warnings
    shown = [
        warning,
        str(session.ended),
        str(refusal(400, json.dumps({"msg": HOSTILE}).encode(), {})),
    ]
    for text in shown:
        assert "owned" in text
        assert printable(text) == text
        assert len(text) < 2_000

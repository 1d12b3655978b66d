"""Untrusted text is never markup: hostile tickers and titles pass through each output."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import sys
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from kalshi_platform import logs
from kalshi_platform.analytics import plots
from kalshi_platform.analytics.activity import Activity
from kalshi_platform.commands import doctor, sql, watch
from kalshi_platform.exchange.book import Book
from kalshi_platform.health.channels import Message
from kalshi_platform.health.incidents import Condition, Event, Notice, Severity
from kalshi_platform.orchestration import checks
from kalshi_platform.printable import from_markdown, markdown, printable
from kalshi_platform.qa import mm_inventory_qa
from kalshi_platform.schema import DEPTH, IMBALANCE, SPREADS

HOSTILE = (
    "$x$",
    r"$\frac{1}{$",
    "[red]x[/red]",
    "[/]",
    "<script>alert(1)</script>",
    "|a|b|",
    "`code`",
    "line\nend",
    "\x1b[31mred\x1b]0;title\x07",
    "\u200f\u202eright to left",
    "_hidden",
    "![x](http://x.test/p.png)",
    "# heading",
    "- item",
    "1. item",
    "&amp; &#60;",
    "x" * 5_000,
    "\ud800",
    "",
)
texts = st.sampled_from(HOSTILE) | st.text(
    st.sampled_from("$[]<>|`_*~#&\\{}()!-+.1a \n\t\r\x1b\x9b\u200f\u202e\u2028") | st.characters(),
    max_size=30,
)
HOUR = datetime(2026, 11, 20, 14, tzinfo=UTC)
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@given(texts)
def test_printable_text_is_one_line_without_control_characters(text: str) -> None:
    assert not UNSAFE.search(printable(text))


@given(texts)
def test_markdown_shows_the_text_itself(text: str) -> None:
    made = markdown(text)
    assert not UNSAFE.search(made)
    assert from_markdown(made) == printable(text).strip()
    unescaped = re.sub(r"\\[\\`*\[\]<>|~$&_#+\-.)]", "", made)
    assert not re.search(r"[`*\[\]<>|~$&]", unescaped)
    assert not re.match(r"[#+-]|[0-9]{1,2}[.)]", unescaped) or made[0] == "\\"


@pytest.mark.parametrize("text", ["the job stream_orderbook, kill -9 7; see 1.5 (a) #2", "a_b"])
def test_ordinary_sentences_stay_as_they_are_in_markdown(text: str) -> None:
    assert markdown(text) == text


def test_check_descriptions_are_escaped_where_they_are_made() -> None:
    for text in HOSTILE:
        results = (
            checks._passed("fresh", text),
            checks._failed("fresh", checks.WARN, text, {}),
        )
        assert {result.description for result in results} == {markdown(text)}


def plotted(tickers: list[str], dataset: Any) -> bytes:
    """The picture of an hour of these markets, with a state a minute."""
    rows = 4 * len(tickers)
    columns: dict[str, Any] = {}
    for field in dataset.arrow:
        if field.name == "market_ticker":
            columns[field.name] = np.repeat(np.array(tickers, dtype=object), 4)
        elif field.name == "verified":
            columns[field.name] = np.ones(rows, bool)
        elif pa.types.is_timestamp(field.type):
            start = int(HOUR.timestamp()) * 10**6
            columns[field.name] = pa.array(
                np.tile(start + np.arange(4) * 60_000_000, len(tickers)), pa.int64()
            ).cast(pa.timestamp("us", "UTC"))
        else:
            columns[field.name] = np.linspace(0.0, 900_000.0, rows)
    activity = SimpleNamespace(hour=HOUR, by_minute=np.ones(60), busiest=lambda: tickers)
    return plots.plot(dataset.name, cast(Activity, activity), pa.table(columns))


@pytest.mark.parametrize("dataset", [SPREADS, DEPTH, IMBALANCE], ids=lambda dataset: dataset.name)
@settings(max_examples=8)
@given(
    tickers=st.lists(
        texts.filter(lambda t: t.encode(errors="replace") == t.encode(errors="ignore")),
        min_size=1,
        max_size=3,
        unique=True,
    )
)
def test_every_ticker_is_drawn(dataset: Any, tickers: list[str]) -> None:
    assert plotted(tickers, dataset).startswith(b"\x89PNG")


@pytest.mark.parametrize("dataset", [SPREADS, DEPTH, IMBALANCE], ids=lambda dataset: dataset.name)
@pytest.mark.parametrize("ticker", [text for text in HOSTILE if text.isprintable() or "\n" in text])
def test_a_hostile_ticker_is_drawn_as_it_is(dataset: Any, ticker: str) -> None:
    assert plotted([ticker, "KXOTHER"], dataset).startswith(b"\x89PNG")


@given(texts, texts)
def test_a_log_record_is_one_line(message: str, name: str) -> None:
    record = logging.LogRecord("x", logging.ERROR, "x", 1, "%s of %s", (message, name), None)
    assert not UNSAFE.search(logs.TextFormatter().format(record))
    assert "\n" not in logs.JsonFormatter().format(record)


def test_a_traceback_in_the_log_forges_no_line() -> None:
    try:
        raise ValueError("first\n2026-11-20 INFO forged: \x1b[31m")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "x", 1, "said", (), sys.exc_info())
    first, *others = logs.TextFormatter().format(record).splitlines()
    assert first.endswith("x: said")
    assert "\x1b" not in "".join(others)
    assert not any(line.startswith("2026-11-20") for line in others)


@given(texts)
def test_tables_and_ladders_on_a_terminal_show_the_text(text: str) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=200)
    sql._print_rich(console, [text], [False], [[text]])
    console.print(watch._ladder(Book(text)))
    shown = cast(io.StringIO, console.file).getvalue()
    own = re.compile(r"\x1b\[[0-9;]*m|\n")  # the table's own style
    assert not UNSAFE.search(own.sub("", shown))
    assert printable(text)[:20].strip() in shown


@given(texts)
def test_doctor_qa_and_alerts_print_one_line(text: str) -> None:
    assert not UNSAFE.search(doctor.Finding(doctor.Mark.BAD, text, text).line("x"))
    assert not UNSAFE.search(mm_inventory_qa._text(text))
    notice = Notice(Event.OPENED, Condition("k", text, text, Severity.WARNING, 0.0), 1.0)
    message = Message((notice,))
    assert not UNSAFE.search(message.subject)
    assert not UNSAFE.search(message.text.replace("\n", ""))


def test_raw_sql_output_is_escaped_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body = "a,b\n\x1b[31mred\t\u202ex\n".encode()
    monkeypatch.setattr(sql, "_pieces", lambda _: iter([body[:6], body[6:]]))
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    sql._pass_through(cast(Any, None))
    sys.stdout.close()
    assert os.read(reader, 1000) == body
    os.close(reader)
    leader, follower = pty.openpty()
    monkeypatch.setattr(sys, "stdout", os.fdopen(follower, "w"))
    sql._pass_through(cast(Any, None))
    shown = os.read(leader, 1000).decode().replace("\r\n", "\n")
    assert shown.split("\n")[:2] == ["a,b", shown.split("\n")[1]]
    assert "\x1b" not in shown
    assert r"\x1b[31mred" in shown
    sys.stdout.close()
    os.close(leader)

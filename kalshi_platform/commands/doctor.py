"""`doctor`: look at everything that the platform stands on, and say what to do about what is wrong."""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import click

from kalshi_platform import settings as platform_settings
from kalshi_platform.errors import PlatformError, SettingsError
from kalshi_platform.exchange.connection import dial
from kalshi_platform.exchange.errors import Unreachable
from kalshi_platform.exchange.rest import COST_OF_GET, RestClient
from kalshi_platform.exchange.signing import Credentials, load_signer
from kalshi_platform.processes import Identity
from kalshi_platform.settings import Settings
from kalshi_platform.storage import migrations
from kalshi_platform.storage.clickhouse import MINIMUM_VERSION, connect, server_version
from kalshi_platform.storage.migrations import State

SKEW_BAD_S, SKEW_ODD_S = 5.0, 2.0
"""The exchange refuses signatures about 10 s off; the measurement itself is good to a second."""
FREE_BAD_BYTES, FREE_ODD_BYTES = 1 << 30, 10 << 30
REPORT_BAD_S = 15.0
"""A living streamer reports once a second."""
UNWRITTEN_BAD_S = 15.0
"""Frames that came so long before the last durable write are not being kept."""
READABLE_BY_OTHERS = 0o077


class Mark(Enum):
    """How a finding is printed; only BAD fails the run."""

    GOOD = "✓"
    ODD = "!"
    BAD = "✗"
    SKIPPED = "–"


@dataclass(frozen=True)
class Finding:
    """One line."""

    mark: Mark
    name: str
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.mark.value} {self.name} — {self.text}{' — ' if self.remedy else ''}{self.remedy}"


Result = tuple[Mark, str] | tuple[Mark, str, str]


@click.command()
def command() -> None:
    """Check settings, key, clock, exchange, ClickHouse, schema, disk and streamer; a line each.

    Exits 1 if any of them is wrong. Nothing is changed.
    """
    failed = False
    for finding in examine():
        click.echo(str(finding))
        failed |= finding.mark is Mark.BAD
    if failed:
        raise SystemExit(1)


def examine() -> Iterator[Finding]:
    """Every finding, in the order in which one thing stands on another."""
    try:
        settings = platform_settings.current()
    except SettingsError as error:
        yield Finding(Mark.BAD, "settings", str(error))
        return
    whose = "the exchange" if settings.has_key else "the simulator, as no PROD_KEYID is set"
    yield Finding(Mark.GOOD, "settings", f"recording {whose}; data in {settings.data_dir}")
    checks: tuple[tuple[str, Callable[[Settings], Result]], ...] = (
        ("key file", _key_file),
        ("clock", _clock),
        ("exchange REST", _rest),
        ("exchange WebSocket", _websocket),
        ("markets", _markets),
        ("ClickHouse", _clickhouse),
        ("schema", _schema),
        ("data folder", lambda s: _disk(s.data_dir, "KALSHI_DATA_DIR")),
        ("archive", lambda s: _disk(s.archive_dir, "PARQUET_DIR")),
        ("streamer", _streamer),
    )
    away: set[str] = set()
    for name, check in checks:
        stands_on = _STANDS_ON.get(name)
        if stands_on in away:
            away.add(name)
            yield Finding(Mark.SKIPPED, name, f"not looked at: see {stands_on}")
            continue
        try:
            finding = Finding(result[0], name, *result[1:]) if (result := check(settings)) else None
        except PlatformError as error:
            finding = Finding(Mark.BAD, name, str(error))
        if finding is not None:
            if finding.mark is Mark.BAD:
                away.add(name)
            yield finding


_STANDS_ON = {
    "exchange WebSocket": "exchange REST",
    "markets": "exchange REST",
    "schema": "ClickHouse",
}
"""What is not worth asking while something else is away."""

"""Watermarks: up to which hour each shard's journal is archived, and so which hours may be sealed.

    <data>/journal/shard-<k>/passed.json

Each shard records durably up to which hour the archive has its whole journal. An hour is sealed once the
watermark of every shard is beyond it. A shard that is down, or that is no longer configured and has not been
drained, keeps its hours unsealed, because its journal may have more rows of them. A shard whose journal is
archived completely and has no writer is *resting* and blocks no hour. All shards must run on machines with
one clock. Sealing itself belongs in `sealing`.
"""

from __future__ import annotations

import logging
import re
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from kalshi_platform import durable, typed_json
from kalshi_platform.journal import reader
from kalshi_platform.journal.reader import JournalError
from kalshi_platform.utc_hours import hour_of_ns

log = logging.getLogger(__name__)

FILE = "passed.json"
_FOLDER = re.compile(r"shard-(0|[1-9][0-9]*)")
BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)


class Watermark(msgspec.Struct, frozen=True):
    """One shard's watermark."""

    before: datetime
    """The archive has everything that the journal has of all hours before this one."""
    resting: bool = False
    """The archive has the whole journal, and no writer is registered."""


def shards(journals: Path) -> list[int]:
    """The shards that have a journal, configured or not; other folders are ignored.

    A folder that cannot be read counts: its content is unknown and must not be ignored.
    """
    numbers = (shard_of(name) for name in reader.names(journals))
    return sorted(k for k in numbers if k is not None and _has_journal(journals / f"shard-{k}"))


def shard_of(name: str) -> int | None:
    """The shard of a journal folder's name; None for another folder."""
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def _has_journal(folder: Path) -> bool:
    try:
        return bool(reader.segments(folder))
    except JournalError as error:
        log.error("%s", error)
        return True


def register(journals: Path, shard: int, *, empty: bool) -> None:
    """Register a shard's watermark before its first write. `empty`: the journal has no record.

    Hours that end before the first record is received do not wait for this shard.
    """
    known = _read(journals, shard)
    if empty or (known is not None and known.resting):
        # The watermark is durable before the clock is read again. An hour is sealed after it has ended, so
        # the sealing process sees this watermark.
        hour = None
        while hour != (now := _now()):
            hour = now
            _write(journals, shard, Watermark(hour))
    elif known is None:
        _write(journals, shard, Watermark(BEGINNING))


def advance(journals: Path, shard: int, hour: datetime) -> None:
    """Record that the archive has every row of the hours before `hour`."""
    _write(journals, shard, Watermark(hour))


def release(journals: Path, shard: int) -> None:
    """Record that the archive has the whole journal and no writer is left: the shard blocks no hour."""
    _write(journals, shard, Watermark(watermark_of(journals, shard).before, resting=True))


def watermark_of(journals: Path, shard: int) -> Watermark:
    """A shard's watermark; the beginning of time where none can be read."""
    return _read(journals, shard) or Watermark(BEGINNING)


def lowest(journals: Path, own: tuple[int, datetime] | None = None) -> datetime:
    """The lowest watermark of all shards: every earlier hour may be sealed.

    `own`: a shard, and the hour to which it will advance.
    """
    marks = {k: watermark_of(journals, k) for k in shards(journals)}
    if own is not None:
        marks[own[0]] = Watermark(own[1])
    return min((known.before for known in marks.values() if not known.resting), default=_now())


def blocking_shards(journals: Path, hour: datetime) -> list[int]:
    """The shards for which an hour waits."""
    return [
        k
        for k in shards(journals)
        if not (known := watermark_of(journals, k)).resting and known.before <= hour
    ]


def _now() -> datetime:
    return hour_of_ns(time.time_ns())  # the clock of the journal's records


def _read(journals: Path, shard: int) -> Watermark | None:
    path = _path(journals, shard)
    try:
        return typed_json.decode(path.read_bytes(), Watermark)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        log.warning(
            "%s is damaged (%s): no hour is sealed until its shard writes it again.", path, error
        )
        return None


def _write(journals: Path, shard: int, watermark: Watermark) -> None:
    durable.replace(_path(journals, shard), msgspec.json.encode(watermark))


def _path(journals: Path, shard: int) -> Path:
    return journals / f"shard-{shard}" / FILE

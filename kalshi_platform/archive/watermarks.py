"""How far each shard has come, and so which hours may be sealed: those that every journal has passed.

    <data>/journal/shard-<k>/passed.json

Each shard writes down, durably, up to which hour the archive has everything of its journal. A shard
that is down, or that is no longer configured and has not been drained, holds its hours open: nobody
else can know what its journal has of them. One whose journal the archive has whole, and to which
nobody writes, *rests*, and holds nothing. All shards are on machines of one clock.
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
NOTHING = datetime(1970, 1, 1, tzinfo=UTC)


class Watermark(msgspec.Struct, frozen=True):
    """What one shard says."""

    before: datetime
    """Of every earlier hour, the archive has what the journal has."""
    resting: bool = False
    """Of every hour, until somebody writes to the journal again."""


def shards(journals: Path) -> list[int]:
    """The shards of which a journal is kept, configured or not; folders of other names are passed over.

    A folder that may not be read is one: what it has is not known, and must not be passed over.
    """
    found = (shard_of(name) for name in reader.names(journals))
    return sorted(k for k in found if k is not None and _has_journal(journals / f"shard-{k}"))


def shard_of(name: str) -> int | None:
    """The shard whose journal is in the folder of this name; None for another folder."""
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def _has_journal(folder: Path) -> bool:
    try:
        return bool(reader.segments(folder))
    except JournalError as error:
        log.error("%s", error)
        return True


def arrive(journals: Path, shard: int, *, empty: bool) -> None:
    """Somebody is about to write to a journal; call before its first record. `empty`: it has none.

    An hour that is over before the first record comes need not wait for it.
    """
    known = _read(journals, shard)
    if empty or (known is not None and known.resting):
        # The mark is there before the clock is read again: whoever seals this hour, which is
        # after it has ended, sees it.
        hour = None
        while hour != (now := _now()):
            hour = now
            _write(journals, shard, Watermark(hour))
    elif known is None:
        _write(journals, shard, Watermark(NOTHING))


def advance(journals: Path, shard: int, hour: datetime) -> None:
    """The archive has everything that came before the first record of `hour`."""
    _write(journals, shard, Watermark(hour))


def rest(journals: Path, shard: int) -> None:
    """The archive has the whole journal, and nobody writes to it."""
    _write(journals, shard, Watermark(passed(journals, shard).before, resting=True))


def passed(journals: Path, shard: int) -> Watermark:
    """What a shard last said; nothing where it has said nothing that can be read."""
    return _read(journals, shard) or Watermark(NOTHING)


def everywhere(journals: Path) -> datetime:
    """Every earlier hour has been passed by every journal."""
    limits = [known.before for k in shards(journals) if not (known := passed(journals, k)).resting]
    return min(limits, default=_now())


def behind(journals: Path, hour: datetime) -> list[int]:
    """The shards that the hour waits for."""
    return [
        k
        for k in shards(journals)
        if not (known := passed(journals, k)).resting and known.before <= hour
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
            "%s is damaged (%s): its shard passes no hour until it writes it anew.", path, error
        )
        return None


def _write(journals: Path, shard: int, what: Watermark) -> None:
    durable.replace(_path(journals, shard), msgspec.json.encode(what))


def _path(journals: Path, shard: int) -> Path:
    return journals / f"shard-{shard}" / FILE

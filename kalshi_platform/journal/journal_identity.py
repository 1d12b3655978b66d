"""Which journal a folder holds, and how often a recorder has started on it: `journal.json`.

    {"format":2,"id":"…","epoch":5,"first":0,"starts":[…],"checksum":"…"}

The id is part of what makes loading idempotent, so it never changes by accident: a missing, damaged or
foreign file beside journal segments is recovered from what proves the id (the `started` notes in the
segments, the cursors of the loads), and is an error where nothing does. Each start of a recorder raises
the epoch, durably, before its first record; with a random token the epoch names that start, so that a
copy of the folder that starts elsewhere is told apart.
"""

from __future__ import annotations

import logging
import secrets
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from kalshi_platform import checked_json, durable, typed_json
from kalshi_platform.checked_json import CorruptFile, LaterFormat
from kalshi_platform.journal import reader as journal
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.reader import JournalError, LogOffset

log = logging.getLogger(__name__)

FILE = "journal.json"
FORMAT = 2
UNSEALED_FORMAT = 1
"""Written by versions without epochs: an id, and no checksum."""
STARTS_KEPT = 256
ADOPT = "kalshi-platform adopt"


class Start(msgspec.Struct, frozen=True, order=True):
    """One start of a recorder."""

    epoch: int
    token: str


class JournalIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What `journal.json` says."""

    format: int = FORMAT
    id: uuid.UUID
    epoch: int = 0
    first: int = 0
    """The first record that the journal ever had."""
    starts: tuple[Start, ...] = ()
    """The last starts, ascending; the last one is the present or the latest one."""
    adopted_from: uuid.UUID | None = None
    """The id that the journal had before it was made a recorder of its own."""


class Claim(msgspec.Struct, frozen=True):
    """Evidence outside `journal.json` of the journal's id, and of a start."""

    id: uuid.UUID
    start: Start


class LaterVersion(JournalError):
    """A file of the journal is whole, and this version does not understand it."""


class _Note(msgspec.Struct):
    kind: str = ""
    detail: msgspec.Raw = msgspec.Raw(b"{}")


class _Started(msgspec.Struct):
    journal: uuid.UUID | None = None
    epoch: int = 0
    start: str = ""


def read(folder: Path) -> JournalIdentity | None:
    """The identity in the folder; None where the file is missing. Raises `JournalError` for a damaged one."""
    path = folder / FILE
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise JournalError(
            f"{path} cannot be read ({error.strerror}). Make it readable for this user."
        ) from None
    try:
        found = checked_json.decode(text, JournalIdentity, path, FORMAT, checksum_optional=True)
    except CorruptFile as error:
        raise JournalError(f"{path} is damaged ({error}).") from None
    except LaterFormat as error:
        raise LaterVersion(str(error)) from None
    if found.format != UNSEALED_FORMAT and b'"checksum"' not in text:
        raise JournalError(f"{path} is damaged (it has no checksum).")
    return found


def establish(folder: Path, claims: Sequence[Claim] = ()) -> JournalIdentity:
    """The folder's identity, recovered where `journal.json` does not give it; a new one for a new folder.

    `claims`: what the cursors of the loads say. The caller holds the journal's lock. Raises
    `JournalError` where segments are there and nothing proves whose they are.
    """
    notes = started_notes(folder)
    newest = next(notes, None)
    evidence = [*([newest] if newest else []), *claims]
    try:
        known = read(folder)
        problem = "" if known else f"{folder / FILE} is missing."
    except LaterVersion:
        raise
    except JournalError as error:
        known, problem = None, str(error)
    if known is None and not evidence and not journal.segments(folder):
        if (folder / FILE).exists():
            raise JournalError(f"{problem} {_remedy(folder)}")
        return JournalIdentity(id=uuid.uuid4())
    if known and newest and newest.id not in {known.id, known.adopted_from}:
        problem = f"{folder / FILE} is of another journal, {known.id}."
    if known is None or problem:
        proved = _proved(newest, claims)
        if proved is None:
            raise JournalError(
                f"{problem} Nothing else in {folder} proves which journal this is. {_remedy(folder)}"
            )
        log.error("%s It is recovered: journal %s.", problem, proved)
        known = JournalIdentity(id=proved)
    if newest is not None and newest.start not in known.starts:
        evidence += notes  # the file is new, or an old copy
    of_this = [claim.start for claim in evidence if claim.id == known.id]
    starts = tuple(sorted({*known.starts, *of_this}))
    epoch = max([known.epoch, *(start.epoch for start in starts)])
    return msgspec.structs.replace(known, format=FORMAT, epoch=epoch, starts=starts)


def begin(folder: Path, known: JournalIdentity, epoch: int, first_n: int) -> JournalIdentity:
    """Write down a start of a recorder whose first record is `first_n`: its epoch is `epoch` or more.

    Durable on return. Raises `OSError` where the disk refuses.
    """
    start = Start(max(known.epoch + 1, epoch), secrets.token_hex(8))
    begun = msgspec.structs.replace(
        known,
        epoch=start.epoch,
        first=known.first if journal.segments(folder) else first_n,
        starts=(*known.starts, start)[-STARTS_KEPT:],
    )
    write(folder, begun)
    return begun


def write(folder: Path, identity: JournalIdentity) -> None:
    """Replace `journal.json`, durably. Raises `OSError`."""
    durable.replace(folder / FILE, checked_json.encode(identity))


def started_notes(folder: Path) -> Iterator[Claim]:
    """What the `started` notes at the beginning of segments say of the journal, the newest first.

    Notes of versions that did not write the id down are passed over, and so is what cannot be read.
    """
    for first_n in reversed(journal.segments(folder)):
        try:
            path = journal.segment_path(folder, first_n)
            block = next(journal.read_segment(path, LogOffset(first_n, 0, first_n), None), None)
        except (JournalError, OSError):
            continue
        if block is None or block.batch.column("kind")[0].as_py() != Kind.NOTE:
            continue
        if claim := _claim(block.batch.column("frame")[0].as_py()):
            yield claim


def _claim(frame: bytes) -> Claim | None:
    try:
        note = typed_json.decode(frame, _Note)
        if note.kind != "started":
            return None
        started = typed_json.decode(bytes(note.detail), _Started)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if started.journal is None:
        return None
    return Claim(started.journal, Start(started.epoch, started.start))


def _proved(newest: Claim | None, claims: Sequence[Claim]) -> uuid.UUID | None:
    """The one id that the evidence agrees on; None where there is none, or two that are equally good.

    The segments are what the journal is. Cursors that all name another id outvote them where there are
    two or more: the journal was made a recorder of its own and has not started since.
    """
    named = {claim.id for claim in claims}
    if newest is None:
        return named.pop() if len(named) == 1 else None
    if not named or newest.id in named:
        return newest.id
    return named.pop() if len(named) == 1 and len(claims) > 1 else None


def _remedy(folder: Path) -> str:
    return (
        "With a new identity, rows that the stores have would be stored again. Restore the file from a"
        f" backup of {folder}. Without one: {ADOPT}."
    )

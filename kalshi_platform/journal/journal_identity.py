"""The identity of a journal folder and the epochs of its recorder starts: `journal.json`.

    {"format":2,"id":"…","epoch":5,"first":0,"starts":[…],"checksum":"…"}

The id is part of every deduplication token, so it must never change by accident. Where the file is
missing, damaged or belongs to another journal, `establish` recovers the id from other evidence (the
`started` notes in the segments, the loaders' cursors) and raises an error where there is none. Each
recorder start raises the epoch, durably, before its first record. The epoch and a random token identify
that start, so a copy of the folder that is started elsewhere can be distinguished from the original.
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
"""Written by versions without epochs: an id without a checksum."""
STARTS_KEPT = 256
ADOPT = "kalshi-platform adopt"


class Start(msgspec.Struct, frozen=True, order=True):
    """One start of a recorder."""

    epoch: int
    token: str


class JournalIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """The content of `journal.json`."""

    format: int = FORMAT
    id: uuid.UUID
    epoch: int = 0
    first: int = 0
    """The first record that the journal ever had."""
    starts: tuple[Start, ...] = ()
    """The latest `STARTS_KEPT` starts, ascending; the last one is the current or most recent start."""
    adopted_from: uuid.UUID | None = None
    """The journal's id before `adopt` made it an independent recorder."""


class Claim(msgspec.Struct, frozen=True):
    """Evidence outside `journal.json` of the journal's id and of one start."""

    id: uuid.UUID
    start: Start


class LaterVersion(JournalError):
    """A journal file is intact but was written by a later version of the platform."""


class _Note(msgspec.Struct):
    kind: str = ""
    detail: msgspec.Raw = msgspec.Raw(b"{}")


class _Started(msgspec.Struct):
    journal: uuid.UUID | None = None
    epoch: int = 0
    start: str = ""


def read(folder: Path) -> JournalIdentity | None:
    """Read the folder's identity; None where the file is missing.

    Raises: `JournalError` for a damaged or unreadable file, `LaterVersion` for a later format.
    """
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
        identity = checked_json.decode(text, JournalIdentity, path, FORMAT, checksum_optional=True)
    except CorruptFile as error:
        raise JournalError(f"{path} is damaged ({error}).") from None
    except LaterFormat as error:
        raise LaterVersion(str(error)) from None
    if identity.format != UNSEALED_FORMAT and b'"checksum"' not in text:
        raise JournalError(f"{path} is damaged (it has no checksum).")
    return identity


def establish(folder: Path, claims: Sequence[Claim] = ()) -> JournalIdentity:
    """Return the folder's identity: from `journal.json`, recovered from evidence, or new for an empty folder.

    `claims`: the evidence in the loaders' cursors. The caller holds the journal's lock.

    Raises: `JournalError` where segments exist and nothing proves which journal they belong to.
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
        proved = _proven_id(newest, claims)
        if proved is None:
            raise JournalError(
                f"{problem} Nothing else in {folder} proves which journal this is. {_remedy(folder)}"
            )
        log.error("%s It is recovered: journal %s.", problem, proved)
        known = JournalIdentity(id=proved)
    if newest is not None and newest.start not in known.starts:
        evidence += notes  # the file was recovered or is an old copy: starts are missing from it
    proven_starts = [claim.start for claim in evidence if claim.id == known.id]
    starts = tuple(sorted({*known.starts, *proven_starts}))
    epoch = max([known.epoch, *(start.epoch for start in starts)])
    return msgspec.structs.replace(known, format=FORMAT, epoch=epoch, starts=starts)


def begin(folder: Path, known: JournalIdentity, epoch: int, first_n: int) -> JournalIdentity:
    """Register a recorder start whose first record is `first_n` and whose epoch is at least `epoch`.

    The file is durable on return. Raises: `OSError` where the disk refuses the write.
    """
    start = Start(max(known.epoch + 1, epoch), secrets.token_hex(8))
    identity = msgspec.structs.replace(
        known,
        epoch=start.epoch,
        first=known.first if journal.segments(folder) else first_n,
        starts=(*known.starts, start)[-STARTS_KEPT:],
    )
    write(folder, identity)
    return identity


def write(folder: Path, identity: JournalIdentity) -> None:
    """Replace `journal.json`, durably. Raises `OSError`."""
    durable.replace(folder / FILE, checked_json.encode(identity))


def started_notes(folder: Path) -> Iterator[Claim]:
    """Yield the claims of the `started` notes that open segments, newest first.

    Skips notes of versions that recorded no id, and segments that cannot be read: evidence is optional.
    """
    for first_n in reversed(journal.segments(folder)):
        try:
            path = journal.segment_path(folder, first_n)
            records = next(journal.read_segment(path, LogOffset(first_n, 0, first_n), None), None)
        except (JournalError, OSError):
            continue
        if records is None or records.batch.column("kind")[0].as_py() != Kind.NOTE:
            continue
        if claim := _claim(records.batch.column("frame")[0].as_py()):
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


def _proven_id(newest: Claim | None, claims: Sequence[Claim]) -> uuid.UUID | None:
    """The id that the evidence agrees on; None without evidence or where two ids are equally supported.

    The segments' own note wins unless two or more cursors all name one other id: then the journal was
    adopted (made an independent recorder) and has not started since.
    """
    named = {claim.id for claim in claims}
    if newest is None:
        return named.pop() if len(named) == 1 else None
    if not named or newest.id in named:
        return newest.id
    return named.pop() if len(named) == 1 and len(claims) > 1 else None


def _remedy(folder: Path) -> str:
    return (
        "With a new identity, rows that the stores already have would be stored a second time. Restore the"
        f" file from a backup of {folder}. Without one: {ADOPT}."
    )

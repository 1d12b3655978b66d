"""`journal.json`: after any damage the journal keeps its id, or an error says that nothing proves it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform import checked_json
from kalshi_platform.checked_json import CorruptFile
from kalshi_platform.journal import journal_identity
from kalshi_platform.journal.journal_identity import FILE, Claim, JournalIdentity, Start
from kalshi_platform.journal.kind import Kind
from kalshi_platform.journal.reader import NO_CONNECTION, JournalError
from kalshi_platform.journal.writer import StartPoint, Writer


def start(
    folder: Path, *, noted: bool = True, claims: list[Claim] | None = None
) -> JournalIdentity:
    """One start of a recorder that writes two records, its `started` note first."""
    writer = Writer(folder, claims=claims or [])
    newest = writer.identity.starts[-1]
    detail: dict[str, object] = {"version": "0"}
    if noted:
        detail |= {"journal": str(writer.id), "epoch": newest.epoch, "start": newest.token}
    writer.note("started", detail)
    writer.append(1, NO_CONNECTION, Kind.CONTROL, b"{}")
    writer.close()
    return writer.identity


def claim(identity: JournalIdentity) -> Claim:
    return Claim(identity.id, identity.starts[-1])


def test_each_start_raises_the_epoch_and_keeps_the_id(tmp_path: Path) -> None:
    identities = [start(tmp_path) for _ in range(3)]
    assert len({identity.id for identity in identities}) == 1
    assert [identity.epoch for identity in identities] == [1, 2, 3]
    assert identities[-1].starts == tuple(identity.starts[-1] for identity in identities)
    assert len({identity.starts[-1].token for identity in identities}) == 3
    assert json.loads((tmp_path / FILE).read_text())["epoch"] == 3


def test_the_epoch_is_durable_before_the_first_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: object) -> None:
        raise OSError(28, "No space left on device")

    start(tmp_path)
    monkeypatch.setattr(Writer, "_begin_segment", no_room)
    with pytest.raises(JournalError, match="No space is left"):
        Writer(tmp_path)
    monkeypatch.undo()
    assert start(tmp_path).epoch == 3


def test_a_file_of_a_version_without_epochs_reads_as_epoch_0(tmp_path: Path) -> None:
    known = uuid.uuid4()
    (tmp_path / FILE).write_text(json.dumps({"format": 1, "id": str(known)}) + "\n")
    identities = journal_identity.read(tmp_path)
    assert identities is not None
    assert (identities.id, identities.epoch, identities.starts) == (known, 0, ())
    after = start(tmp_path)
    assert (after.id, after.epoch) == (known, 1)


def altered(text: bytes) -> bytes:
    at = text.index(b'"epoch":') + 8
    return text[:at] + b"%d" % ((int(text[at : at + 1]) + 1) % 10) + text[at + 1 :]


OF_ANOTHER = checked_json.encode(JournalIdentity(id=uuid.UUID(int=9), epoch=40))
DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda _: None,
    "empty": lambda _: b"",
    "truncated": lambda text: text[:40],
    "altered": altered,
    "not UTF-8": lambda text: b"\xff\xfe\x00" + text,
    "not an object": lambda _: b"[1, 2]",
    "no id": lambda _: b'{"format":1}',
    "checksum taken out": lambda text: text.partition(b',"checksum"')[0] + b"}",
    "of another journal": lambda _: OF_ANOTHER,
}


def break_file(folder: Path, damage: str) -> None:
    path = folder / FILE
    after = DAMAGES[damage](path.read_bytes())
    if after is None:
        path.unlink()
    else:
        path.write_bytes(after)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_identity_is_recovered_from_started_notes(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "journal"
    before = [start(folder) for _ in range(3)][-1]
    break_file(folder, damage)
    after = start(folder)
    assert (after.id, after.epoch) == (before.id, 4)
    assert after.starts[:3] == before.starts
    assert f"It is recovered: journal {before.id}" in caplog.text


def test_an_old_copy_of_the_identity_does_not_lower_the_epoch(tmp_path: Path) -> None:
    start(tmp_path)
    old = (tmp_path / FILE).read_bytes()
    start(tmp_path)
    before = start(tmp_path)
    (tmp_path / FILE).write_bytes(old)
    after = start(tmp_path)
    assert after.epoch == 4
    assert after.starts[:-1] == before.starts


@pytest.mark.parametrize("damage", sorted(DAMAGES.keys() - {"of another journal"}))
def test_an_identity_is_recovered_from_cursors_alone(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    before = start(folder, noted=False)
    break_file(folder, damage)
    after = start(folder, claims=[claim(before), claim(before)])
    assert (after.id, after.epoch) == (before.id, 2)
    assert after.starts[0] == before.starts[0]


@pytest.mark.parametrize("damage", sorted(DAMAGES.keys() - {"of another journal"}))
def test_an_unprovable_identity_is_an_error_never_a_new_one(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    before = start(folder, noted=False)
    whole = (folder / FILE).read_bytes()
    break_file(folder, damage)
    left = {path: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
    with pytest.raises(
        JournalError, match=r"journal\.json .*Restore the file from a backup.*adopt"
    ):
        start(folder)
    assert left == {path: path.read_bytes() for path in folder.iterdir() if path.name != "lock"}
    (folder / FILE).write_bytes(whole)  # the remedy
    assert start(folder).id == before.id


def test_contradicting_cursors_prove_no_identity(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    before = start(folder, noted=False)
    (folder / FILE).unlink()
    other = Claim(uuid.uuid4(), Start(9, "x"))
    with pytest.raises(JournalError, match="proves which journal this is"):
        start(folder, claims=[claim(before), other])


def test_a_cursor_of_another_journal_does_not_outvote_the_segments(tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    before = start(folder)
    (folder / FILE).unlink()
    other = Claim(uuid.uuid4(), Start(9, "x"))
    after = start(folder, claims=[claim(before), other])
    assert (after.id, after.epoch) == (before.id, 2)


def test_an_identity_of_a_later_version_is_not_changed(tmp_path: Path) -> None:
    start(tmp_path)
    later = JournalIdentity(id=uuid.uuid4(), format=3)
    journal_identity.write(tmp_path, later)
    with pytest.raises(JournalError, match="a later version wrote it"):
        start(tmp_path)
    assert b'"format":3' in (tmp_path / FILE).read_bytes()


def test_a_damaged_identity_without_segments_is_an_error(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    with pytest.raises(JournalError, match="damaged"):
        Writer(tmp_path)


def test_a_chosen_start_is_recorded_with_its_epoch(tmp_path: Path) -> None:
    start(tmp_path)
    asked: list[tuple[int, int]] = []

    def beginning(known: JournalIdentity, free: int) -> StartPoint:
        asked.append((known.epoch, free))
        return StartPoint(500, epoch=7)

    writer = Writer(tmp_path, choose_start=beginning)
    writer.close()
    assert asked == [(1, 2)]
    assert (writer.began_n, writer.ended_n) == (500, 2)
    assert writer.identity.epoch == 7
    assert writer.identity.first == 0


@given(data=st.data())
def test_an_altered_byte_never_decodes_to_another_value(data: st.DataObject) -> None:
    state = JournalIdentity(id=uuid.UUID(int=7), epoch=12, starts=(Start(12, "ab"),))
    text = checked_json.encode(state)
    assert checked_json.decode(text, JournalIdentity, FILE, 2) == state
    at = data.draw(st.integers(0, len(text) - 1))
    changed = bytes([data.draw(st.integers(0, 255))])
    try:
        altered = text[:at] + changed + text[at + 1 :]
        decoded = checked_json.decode(altered, JournalIdentity, FILE, 2)
    except CorruptFile:
        return
    assert decoded == state  # the same byte, or another blank at the end

"""`journal.json`: whatever happens to it, the journal keeps its id or says that nothing proves it."""

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
from kalshi_platform.journal.writer import Beginning, Writer


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
    found = [start(tmp_path) for _ in range(3)]
    assert len({it.id for it in found}) == 1
    assert [it.epoch for it in found] == [1, 2, 3]
    assert found[-1].starts == tuple(it.starts[-1] for it in found)
    assert len({it.starts[-1].token for it in found}) == 3
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
    found = journal_identity.read(tmp_path)
    assert found is not None
    assert (found.id, found.epoch, found.starts) == (known, 0, ())
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
def test_a_broken_file_is_recovered_from_the_started_notes(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "journal"
    before = [start(folder) for _ in range(3)][-1]
    break_file(folder, damage)
    after = start(folder)
    assert (after.id, after.epoch) == (before.id, 4)
    assert after.starts[:3] == before.starts
    assert f"It is recovered: journal {before.id}" in caplog.text


def test_an_old_copy_of_the_file_does_not_take_the_epoch_back(tmp_path: Path) -> None:
    start(tmp_path)
    old = (tmp_path / FILE).read_bytes()
    start(tmp_path)
    before = start(tmp_path)
    (tmp_path / FILE).write_bytes(old)
    after = start(tmp_path)
    assert after.epoch == 4
    assert after.starts[:-1] == before.starts


@pytest.mark.parametrize("damage", sorted(DAMAGES.keys() - {"of another journal"}))
def test_what_only_the_cursors_prove_is_recovered_from_them(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "journal"
    before = start(folder, noted=False)
    break_file(folder, damage)
    after = start(folder, claims=[claim(before), claim(before)])
    assert (after.id, after.epoch) == (before.id, 2)
    assert after.starts[0] == before.starts[0]


@pytest.mark.parametrize("damage", sorted(DAMAGES.keys() - {"of another journal"}))
def test_what_nothing_proves_is_an_error_and_never_a_new_identity(
    damage: str, tmp_path: Path
) -> None:
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


def test_cursors_that_contradict_each_other_prove_nothing(tmp_path: Path) -> None:
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


def test_a_file_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    start(tmp_path)
    later = JournalIdentity(id=uuid.uuid4(), format=3)
    journal_identity.write(tmp_path, later)
    with pytest.raises(JournalError, match="a later version wrote it"):
        start(tmp_path)
    assert b'"format":3' in (tmp_path / FILE).read_bytes()


def test_a_damaged_file_in_a_folder_without_segments_is_an_error_too(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    with pytest.raises(JournalError, match="damaged"):
        Writer(tmp_path)


def test_a_beginning_elsewhere_is_noted_with_the_epoch_that_it_asks_for(tmp_path: Path) -> None:
    start(tmp_path)
    asked: list[tuple[int, int]] = []

    def beginning(known: JournalIdentity, free: int) -> Beginning:
        asked.append((known.epoch, free))
        return Beginning(500, epoch=7)

    writer = Writer(tmp_path, beginning=beginning)
    writer.close()
    assert asked == [(1, 2)]
    assert (writer.began_n, writer.ended_n) == (500, 2)
    assert writer.identity.epoch == 7
    assert writer.identity.first == 0


@given(data=st.data())
def test_no_altered_byte_of_a_checked_file_reads_as_something_else(data: st.DataObject) -> None:
    state = JournalIdentity(id=uuid.UUID(int=7), epoch=12, starts=(Start(12, "ab"),))
    text = checked_json.encode(state)
    assert checked_json.decode(text, JournalIdentity, FILE, 2) == state
    at = data.draw(st.integers(0, len(text) - 1))
    changed = bytes([data.draw(st.integers(0, 255))])
    try:
        altered = text[:at] + changed + text[at + 1 :]
        found = checked_json.decode(altered, JournalIdentity, FILE, 2)
    except CorruptFile:
        return
    assert found == state  # the same byte, or another blank at the end

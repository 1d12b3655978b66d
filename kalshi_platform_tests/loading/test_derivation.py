"""One derivation for all stores: each load gets the rows that it would have derived alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from kalshi_platform.loading import derivation
from kalshi_platform.loading.books import State
from kalshi_platform.loading.decode import Decoded
from kalshi_platform.loading.derivation import Derivation
from kalshi_platform.loading.derive import Rows, derive
from kalshi_platform.recording import journal
from kalshi_platform.recording.journal import Position
from kalshi_platform.recording.writer import Writer
from kalshi_platform_tests.loading.test_load import PATIENCE_S, journal_of, recording


def follow(
    shared: Derivation, name: str, at: tuple[Position, State], limit: Position, steps: int
) -> tuple[tuple[Position, State], list[dict[str, object]]]:
    """So many steps of one load, and the event rows that it got."""
    rows: list[dict[str, object]] = []
    for step in shared.steps(name, at[0], at[1], limit):
        rows += step.rows.tables["orderbook_events"].to_pylist()
        at = (step.end, step.state)
        steps -= 1
        if not steps:
            break
    return at, rows


@pytest.mark.parametrize("seed", range(12))
def test_loads_that_take_turns_in_any_way_get_the_same_rows(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over ends of hours, of segments and of what is kept, wherever they fall."""
    dice = random.Random(seed)
    monkeypatch.setattr(derivation, "CHUNK_RECORDS", dice.choice((10, 30, 80)))
    monkeypatch.setattr(derivation, "KEPT_RECORDS", 120)
    monkeypatch.setattr(derivation, "KEPT_STEPS", dice.choice((2, 4, 8)))
    folder = tmp_path / "journal"
    writer = journal_of(folder, recording(600, dice.choice((1.0, 60.0))), dice.randint(1, 40))
    start = (journal.beginning(folder), State())
    _, alone = follow(joined(folder, "alone"), "alone", start, writer.durable, -1)
    shared = joined(folder, "hot", "cold")
    at = {"hot": start, "cold": start}
    got: dict[str, list[dict[str, object]]] = {"hot": [], "cold": []}
    while any(position.n < writer.durable.n for position, _ in at.values()):
        name = dice.choice(("hot", "hot", "hot", "cold"))
        at[name], rows = follow(shared, name, at[name], writer.durable, dice.randint(1, 9))
        got[name] += rows
    writer.close()
    assert got["hot"] == alone
    assert got["cold"] == alone


def test_a_load_that_comes_to_the_same_place_derives_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derivation, "CHUNK_RECORDS", 30)
    folder = tmp_path / "journal"
    writer = journal_of(folder, recording(200))
    derived = counted(monkeypatch)
    shared = joined(folder, "hot", "cold")
    at = {name: (journal.beginning(folder), State()) for name in ("hot", "cold")}
    while at["cold"][0].n < writer.durable.n:
        for name in ("hot", "cold"):
            at[name], _ = follow(shared, name, at[name], writer.durable, 1)
    writer.close()
    assert len(derived) == len(set(derived))


def test_a_load_that_was_behind_meets_the_other_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derivation, "CHUNK_RECORDS", 30)
    folder = tmp_path / "journal"
    writer = Writer(folder)
    records = recording(600)
    derived = counted(monkeypatch)
    shared = joined(folder, "hot", "cold")
    at: dict[str, tuple[Position, State]] = {}
    for n, record in enumerate(records):
        writer.append(*record)
        if n % 17:
            continue
        writer.hand_over()
        assert writer.wait_durable(n + 1, PATIENCE_S)
        behind = n < 300
        for name in ("hot",) if behind else ("cold", "hot"):
            at.setdefault(name, (journal.beginning(folder), State()))
            at[name], _ = follow(shared, name, at[name], writer.durable, -1)
    writer.close()
    late = [first_n for first_n in derived if first_n > 400]
    assert len(late) == len(set(late))


def joined(folder: Path, *loads: str) -> Derivation:
    shared = Derivation(folder)
    for load in loads:
        shared.joins(load)
    return shared


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first records of all that is derived from now on."""
    derived: list[int] = []

    def counting(decoded: Decoded, state: State, shard: int) -> tuple[Rows, State]:
        derived.append(decoded.first_n)
        return derive(decoded, state, shard)

    monkeypatch.setattr(derivation, "derive", counting)
    return derived

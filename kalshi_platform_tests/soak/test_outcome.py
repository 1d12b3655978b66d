"""A soak is sound only where every promise was kept, and its page says which one was not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from kalshi_platform.settings import load
from kalshi_platform_tests.benchmarks.memory import BOUND_MIB
from kalshi_platform_tests.chaos.proof import DELTAS, LIVES, TRADES, Kept, Proof, doubled
from kalshi_platform_tests.soak.outcome import JUDGED_S, Load, Markets, Outcome
from kalshi_platform_tests.soak.report import page, write
from kalshi_platform_tests.soak.restarts import Restart, parts
from kalshi_platform_tests.soak.samples import Sample

BEGAN, RATE, EVERY_S = 3_600.0 * 400_000, 1_000.0, 10.0
SHARD = "streamer of shard 0"
PROOF = Proof(
    frames=60,
    kept={DELTAS: Kept(50, 50, 50), TRADES: Kept(6, 6, 6), LIVES: Kept(4, 4, 4)},
    rows_hot={"orderbook_events": 70},
    rows_cold={"orderbook_events": 70},
    doubled=0,
    unexplained=0,
    books_differ=0,
    connections=2,
    ends=2,
    spans=0,
    gaps=1,
    verdict="whole",
)


def looks(mib: list[float], rate: float = RATE) -> list[Sample]:
    """One every ten seconds; the streamer has that memory."""
    return [
        Sample(
            at=BEGAN + EVERY_S * n,
            mib={SHARD: memory},
            cpu_s={SHARD: 3.0 * n},
            lag={"clickhouse": 10 * n, "parquet": 100},
            late_s={"clickhouse": 1.0, "parquet": 30.0},
            sent=int(rate * EVERY_S * n),
            journalled=int(rate * EVERY_S * n),
            journal_bytes=n,
            disk_bytes=n,
            open_markets=5,
            followed=5,
        )
        for n, memory in enumerate(mib)
    ]


FLAT = [300.0] * 50
SOUND = Outcome(
    load=Load(minutes=8, rate=RATE, markets=5, rolling=2, rolling_s=60, shards=1, seed=1),
    samples=looks(FLAT),
    restarts=[Restart("daemon", "SIGTERM", BEGAN + 5.0, 2.0, 4.0)],
    shed_s=0.0,
    proof=PROOF,
    markets=Markets(opened=3, recorded=8, left=2, missed=frozenset()),
    trades_missing=0,
    trades_looked_at=6,
    hours_sealed=[],
    doctor_exit=0,
)


def proof(**found: Any) -> Outcome:
    return replace(SOUND, proof=replace(PROOF, **found))


BROKEN = {
    "lost in ClickHouse": proof(kept={DELTAS: Kept(50, 49, 50)}),
    "lost in Parquet": proof(kept={TRADES: Kept(6, 6, 5)}),
    "more than was journalled": proof(kept={LIVES: Kept(4, 5, 5)}),
    "doubled": proof(doubled=1),
    "unexplained": proof(unexplained=1),
    "another book": proof(books_differ=1),
    "a connection without an end": proof(ends=1),
    "too few frames": replace(SOUND, samples=looks(FLAT, rate=0.9 * RATE)),
    "a market that was not joined": replace(
        SOUND, markets=replace(SOUND.markets, missed=frozenset({"KXBTCUP-1"}))
    ),
    "a trade that is missing": replace(SOUND, trades_missing=1),
    "a part that does not record again": replace(
        SOUND, restarts=[Restart("ClickHouse", "SIGTERM", BEGAN + 5.0, None, 4.0)]
    ),
    "a part without supervision": replace(
        SOUND, restarts=[Restart("daemon", "SIGTERM", BEGAN + 5.0, 2.0, None)]
    ),
    "doctor": replace(SOUND, doctor_exit=1, doctor=["disk: it is full"]),
    "too much memory": replace(SOUND, samples=looks([*FLAT[1:], BOUND_MIB + 1])),
    "growing memory": replace(SOUND, samples=looks([300.0 + 2 * n for n in range(50)])),
}


def test_a_soak_that_kept_every_promise_is_sound() -> None:
    assert SOUND.sound, SOUND.promises
    assert "All promises were kept." in page(SOUND, "soak.png")


@pytest.mark.parametrize("what", BROKEN)
def test_one_broken_promise_is_unsound_and_on_the_page(what: str) -> None:
    outcome = BROKEN[what]
    assert not outcome.sound
    assert [kept for _, kept in outcome.promises.values()].count(False) == 1, outcome.promises
    text = page(outcome, "soak.png")
    assert text.count("| **no** |") == 1
    assert "**Not every promise was kept.**" in text


def test_memory_growth_is_tested_after_the_restarts_only() -> None:
    climbing = looks([100.0 + 4 * n for n in range(20)] + [180.0] * 60)
    late = replace(SOUND.restarts[0], at=climbing[20].at)
    settled = replace(SOUND, samples=climbing, restarts=[late])
    assert settled.steady_s >= JUDGED_S
    assert settled.sound, settled.promises
    short = replace(SOUND, samples=looks([300.0 + 5 * n for n in range(20)]))
    assert short.steady_s < JUDGED_S
    assert short.sound
    assert "Under 5 minutes growth is not tested" in page(short, "soak.png")


def test_what_the_seal_of_an_hour_takes_is_no_growth() -> None:
    begins = 3_600.0 - EVERY_S * 20
    sealing = [
        replace(it, at=it.at + begins) for it in looks([300.0] * 20 + [450.0] * 6 + [350.0] * 40)
    ]
    late = replace(SOUND.restarts[0], at=BEGAN + begins)
    turned = replace(SOUND, samples=sealing, restarts=[late])
    assert turned.steady[0].at == BEGAN + 3_600.0
    assert turned.steady_s >= JUDGED_S
    assert turned.sound, turned.promises


def test_every_shard_and_every_program_is_restarted() -> None:
    names = {part.name for part in parts(2)}
    assert {"streamer of shard 0", "streamer of shard 1", "daemon", "webserver"} < names
    assert {"ClickHouse", "everything"} < names


def test_the_picture_lies_beside_the_page(tmp_path: Path) -> None:
    write(SOUND, tmp_path / "soak.md")
    assert (tmp_path / "images" / "soak.png").stat().st_size > 10_000
    assert "images/soak.png" in (tmp_path / "soak.md").read_text()


def test_a_row_in_two_files_of_the_archive_counts_as_doubled(tmp_path: Path) -> None:
    settings = load(kalshi_data_dir=tmp_path)
    hour = settings.archive_dir / "trades" / "date=2026-11-22" / "hour=14"
    hour.mkdir(parents=True)
    pl.DataFrame({"trade_id": ["a", "b", "c"]}).write_parquet(hour / "part-1.parquet")
    assert doubled(settings, "trades") == 0
    pl.DataFrame({"trade_id": ["c", "d"]}).write_parquet(hour / "part-2.parquet")
    assert doubled(settings, "trades") == 1

"""Both engines read what the exporters write: their best prices equal ours after every event, and a backtest runs.

They are installed by `make engines`, in an environment of their own; without it these tests are skipped.
"""

from __future__ import annotations

import json
import random
import subprocess
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from kalshi_platform.archive import LocalArchive
from kalshi_platform.commands import export
from kalshi_platform.errors import RequestRefused
from kalshi_platform.journal.kind import Kind
from kalshi_platform.reading import Archive, EventKind
from kalshi_platform.reading.exporters import hftbacktest
from kalshi_platform.schema import MARKET_CATALOG
from kalshi_platform_tests import wire
from kalshi_platform_tests.analytics.test_against_reference import HOUR, HOUR_NS
from kalshi_platform_tests.reading.written import seal, write

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-engines" / "bin" / "python"
needs_engines = pytest.mark.skipif(
    not PYTHON.exists(), reason="`make engines` installs the backtesting engines"
)
TICKER = "KXTEST-26SEP21-T0.5"
START, END = HOUR, HOUR + timedelta(hours=10)
GAP = range(1_200, 1_260)
Tops = dict[int, tuple[float | None, float | None]]


def recorded(root: Path) -> Archive:
    """Ten hours over midnight, the first with an event each second and all with trades; a gap, and a market that ends."""
    rng, conn, at = random.Random(7), wire.conn_id(1), HOUR_NS
    records = [wire.connected(conn, at)]
    levels = {
        "yes": {p: 1_000 + p for p in range(4_000, 4_800, 100)},
        "no": {p: 1_000 + p for p in range(4_000, 5_000, 100)},
    }
    seq, trades = 1, 0
    records.append((at, conn, Kind.SNAPSHOT, wire.snapshot(TICKER, 1, levels["yes"], levels["no"])))
    beat = wire.note("heartbeat", {"state": "synced"})
    for second in [*range(1, 3_600), *range(3_600, 36_000, 20)]:
        at = HOUR_NS + second * wire.SECOND + rng.randrange(1, 900_000) * 1000
        if second % 20 == 0:
            records.append((at - 1000, conn, Kind.NOTE, beat))
        seq += 1
        side = rng.choice(("yes", "no"))
        if second == GAP.start:
            records.append((at, conn, Kind.NOTE, wire.note("gap", {"cause": "sequence"}, sid=1)))
        if second == GAP.stop:
            levels["yes"].pop(max(levels["yes"]))
            book = wire.snapshot(TICKER, seq, levels["yes"], levels["no"])
            records.append((at, conn, Kind.SNAPSHOT, book))
            continue
        top = 4_900 - 100 * (second // 700 % 5)
        price = rng.randrange(4_000, top if side == "yes" else 5_100, 50)
        held = levels[side].get(price, 0)
        qty = -held if held and rng.random() < 0.5 else rng.randrange(100, 9_000)
        levels[side][price] = held + qty
        if not levels[side][price]:
            del levels[side][price]
        records.append((at, conn, Kind.DELTA, wire.delta(TICKER, seq, side, price, qty)))
        if second % 7 == 0:
            trades += 1
            frame = wire.trade(TICKER, trades, 100 * rng.randrange(40, 48), 700)
            records.append((at + 50_000, conn, Kind.TRADE, frame))
        if second in {2_000, 2_100}:
            event = {2_000: "deactivated", 2_100: "activated"}[second]
            msg = {"market_ticker": TICKER, "event_type": event}
            text = json.dumps({"type": "market_lifecycle_v2", "sid": 3, "seq": second, "msg": msg})
            records.append((at + 60_000, conn, Kind.CONTROL, text.encode()))
    store = write(root, records)
    seal(store)
    _catalogue(store)
    return Archive(store)


def _catalogue(store: LocalArchive) -> None:
    row: dict[str, Any] = {
        field.name: None if field.nullable else "" for field in MARKET_CATALOG.arrow
    }
    grid = {"start": Decimal(0), "end": Decimal(1), "step": Decimal("0.005")}
    row |= {
        "market_ticker": TICKER,
        "title": "Will it?",
        "price_ranges": [grid],
        "open_time": START + timedelta(minutes=1),
        "close_time": END - timedelta(minutes=1),
        "settlement_ts": END + timedelta(hours=1),
        "settlement_value": Decimal("1.0000"),
        "result": "yes",
        "as_of": END + timedelta(hours=2),
    }
    schema = {
        name: pl.List(pl.Struct({k: pl.Decimal(9, 4) for k in grid})) for name in ("price_ranges",)
    }
    table = pl.DataFrame([row], schema_overrides=schema).to_arrow().cast(MARKET_CATALOG.arrow)
    store.write_whole(MARKET_CATALOG.name, "markets.parquet", table, level=1, sorted_by=())


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    return recorded(tmp_path_factory.mktemp("archive"))


def ours(archive: Archive, *, trades: bool) -> Tops:
    """Our best bid and ask after every event, by receive time; none while the book is stale."""
    found: Tops = {}
    for event, book in archive.replay(TICKER, START, END, allow_gaps=True, exact=False):
        if event.kind is EventKind.TRADE and not trades:
            continue
        bid = float(book.bid[0]) if book.verified and book.bid else None
        ask = float(book.ask[0]) if book.verified and book.ask else None
        new = trades or event.known_us not in found
        assert new or not book.verified, "events have receive times of their own, but for the gap"
        found[event.known_us] = (bid, ask)
    return found


def run(*args: str) -> dict[str, Any]:
    done = subprocess.run(
        [str(PYTHON), "-m", "kalshi_platform_tests.reading.run_engines", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    return found


def by_time(tops: list[list[Any]]) -> Tops:
    return {int(at): (bid, ask) for at, bid, ask in tops}


@needs_engines
def test_hftbacktest_has_our_best_prices_after_every_event(
    archive: Archive, tmp_path: Path
) -> None:
    exported = hftbacktest.export(archive, TICKER, START, END, tmp_path)
    assert [day.date for day in exported.days] == ["20260921", "20260922"]
    assert (exported.tick_size, exported.lot_size) == (0.005, 0.01)
    result = run("hftbacktest", str(tmp_path), TICKER)
    theirs, wanted = by_time(result["tops"]), ours(archive, trades=True)
    stale = [at for at, top in wanted.items() if top == (None, None)]
    assert len(stale) >= len(GAP)
    compared = {at: top for at, top in wanted.items() if at in theirs}
    assert {at: theirs[at] for at in compared} == compared
    # deltas of a stale book are left out of the export; the engine reports the rest
    assert len(wanted) - len(compared) <= len(stale) + 2
    assert len(compared) > 5_000
    assert result["position"] >= 0


def test_a_day_for_hftbacktest_is_as_its_page_says(archive: Archive, tmp_path: Path) -> None:
    exported = hftbacktest.export(archive, TICKER, START, END, tmp_path)
    for day in exported.days:
        rows = np.load(day.events)["data"]
        assert rows.dtype == hftbacktest.EVENT
        assert len(rows) == day.rows
        assert (np.diff(rows["exch_ts"]) >= 0).all()
        assert (np.diff(rows["local_ts"]) >= 0).all()
        assert (rows["exch_ts"] <= rows["local_ts"]).all()
        steps = rows["px"] / exported.tick_size
        assert np.abs(steps - np.round(steps)).max() < 1e-9
    last = np.load(exported.days[-1].end_of_day)["data"]
    book = archive.book(TICKER, END - timedelta(microseconds=1))
    bids = [(row["px"], row["qty"]) for row in last if row["ev"] & hftbacktest.BUY]
    asks = [(row["px"], row["qty"]) for row in last if row["ev"] & hftbacktest.SELL]
    assert bids == [(float(price), float(size)) for price, size in book.bids()]
    assert asks == [(float(price), float(size)) for price, size in book.asks()]
    said = json.loads(exported.sidecar.read_text())
    assert [gap["condition"] for gap in said["gaps"]] == ["stale"]
    assert said["terms"]["title"] == "Will it?"
    assert said["result"]["settlement_value"] == "1.0000"
    assert said["fees"]["taker_rate"] == "0.07"
    assert "never decreases" in said["exchange_time"]


@needs_engines
def test_nautilus_has_our_best_prices_after_every_event(archive: Archive, tmp_path: Path) -> None:
    us = [str(round(at.timestamp() * 1e6)) for at in (START, END)]
    location = str(archive)[9:-2]
    result = run("nautilus", str(tmp_path / "catalog"), TICKER, location, *us)
    theirs, wanted = by_time(result["tops"]), ours(archive, trades=False)
    compared = {at: top for at, top in wanted.items() if at in theirs}
    assert {at: theirs[at] for at in compared} == compared
    assert set(theirs) <= set(wanted)
    assert len(wanted) - len(compared) <= len(GAP) + 2
    assert len(compared) > 5_000
    instrument = result["instrument"]
    assert instrument["id"] == f"{TICKER}.KALSHI"
    assert instrument["price_increment"] == "0.0050"
    assert instrument["size_increment"] == "0.01"
    assert (
        result["status"] == ["TRADING", "PAUSE", "TRADING", "CLOSE"] or len(result["status"]) == 4
    )
    assert result["close"] == ["1.0000"]
    assert result["trades"] > 500
    ((status, filled),) = result["orders"]
    assert status in {"ACCEPTED", "FILLED", "PARTIALLY_FILLED"}
    assert float(filled) >= 0
    assert json.loads((tmp_path / "catalog" / f"{TICKER}.json").read_text())["deltas"] > 5_000


def test_the_command_writes_what_the_function_writes(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARQUET_DIR", str(archive)[9:-2])
    monkeypatch.setenv("KALSHI_DATA_DIR", str(tmp_path))
    span = ["--ticker", TICKER, "--from", "2026-09-21T15:00Z", "--to", "2026-09-21T16:00Z"]
    made = tmp_path / "made"
    done = CliRunner().invoke(
        export.command,
        ["--format", "hftbacktest", *span, "--to-dir", str(made)],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    hftbacktest.export(archive, TICKER, START, START + timedelta(hours=1), tmp_path / "again")
    for path in sorted((tmp_path / "again").iterdir()):
        assert (made / path.name).read_bytes() == path.read_bytes()
    refused = CliRunner().invoke(
        export.command, ["--format", "nautilus", *span, "--to-dir", str(made)]
    )
    assert isinstance(refused.exception, RequestRefused)
    assert 'pip install "nautilus_trader>=1.221,<1.222"' in str(refused.exception)
    for wrong in (
        ["--to", "x"],
        ["--public", "--format", "nautilus", "--to", "x"],
        ["--format", "nautilus", "--to", "x"],
    ):
        assert CliRunner().invoke(export.command, wrong).exit_code == 2

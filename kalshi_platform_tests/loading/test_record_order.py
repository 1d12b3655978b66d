"""Order and trust follow record numbers: frames of one read share a time, and clocks are set back."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kalshi_platform.analytics import replay
from kalshi_platform.analytics.hourly import compute_hour
from kalshi_platform.analytics.spreads import spreads
from kalshi_platform.archive import LocalArchive, compaction, hours, part_name
from kalshi_platform.clickhouse import queries
from kalshi_platform.clickhouse.client import Client, connect, insert_arrow
from kalshi_platform.exchange.book import delta_change, snapshot_ladder
from kalshi_platform.exchange.frames import decode_delta, decode_snapshot
from kalshi_platform.journal.kind import Kind
from kalshi_platform.loading.loader import Loader, Pace
from kalshi_platform.loading.rebuild import rebuild
from kalshi_platform.loading.sinks import ClickHouseSink, ParquetSink, by_hour
from kalshi_platform.quality import continuity
from kalshi_platform.schema import DATASETS, ORDERBOOK_EVENTS, STREAM_EVENTS, TABLES
from kalshi_platform.settings import Settings
from kalshi_platform.utc_hours import HOUR as ONE_HOUR
from kalshi_platform_tests import wire
from kalshi_platform_tests.analytics.test_against_reference import (
    HOUR,
    HOUR_NS,
    Script,
    derived,
    scripts,
)
from kalshi_platform_tests.clickhouse.tables import insert, settings_for
from kalshi_platform_tests.conftest import DATABASE_TIMEOUT_S
from kalshi_platform_tests.loading.test_loader import Dying, archived, journal_of, load_all
from kalshi_platform_tests.quality.test_parity import compared

PACE = Pace(rows=40, seconds=0.0, first_s=0.0)
CONN = wire.conn_id(1)
MINUTE = 60 * wire.SECOND
Book = dict[tuple[str, int], int]


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    """A client of the database, emptied."""
    with closing(connect(settings)) as client:
        for name in TABLES:
            client.command(f"TRUNCATE TABLE {name}")
        yield client


# -- frames of one read ----------------------------------------------------------------------------


def one_read(kind: str) -> list[wire.Record]:
    """A socket read with a book of A and an event that makes it stale, and deltas of A afterwards."""
    at = HOUR_NS + MINUTE
    a, b = wire.snapshot("A", 1, {4_500: 100}, {5_000: 100}), wire.snapshot("B", 2, {}, {})
    records = [
        wire.connected(CONN, at - 1),
        (at, CONN, Kind.SNAPSHOT, a),
        (at, CONN, Kind.SNAPSHOT, b),
    ]
    seq = 3
    if kind == "negative level":
        records.append((at, CONN, Kind.DELTA, wire.delta("A", seq, "yes", 4_400, -700)))
    else:
        note = wire.note("gap", {"cause": "sequence", "expected": 3, "got": 5}, sid=1)
        records.append((at, CONN, Kind.NOTE, note))
        seq = 5
    if kind == "resync":  # the books come back, and frames are missing once more
        for ticker, ladder in (("A", {4_600: 100}), ("B", {})):
            frame = wire.snapshot(ticker, seq, ladder, {5_000: 100})
            records.append((at, CONN, Kind.SNAPSHOT, frame))
            seq += 1
        note = wire.note("gap", {"cause": "sequence", "expected": seq, "got": seq + 2}, sid=1)
        records.append((at, CONN, Kind.NOTE, note))
        seq += 2
    for n in range(5):
        later = at + n * MINUTE  # the first of them in the same read
        records.append((later, CONN, Kind.DELTA, wire.delta("A", seq + n, "yes", 4_500 + n, 5)))
    for second in (3_590, 3_610):  # the recorder is there as the next hour begins
        beat = wire.note("heartbeat", {})
        records.append((HOUR_NS + second * wire.SECOND, bytes(16), Kind.NOTE, beat))
    return records


def archive_of(root: Path, records: Sequence[wire.Record]) -> LocalArchive:
    """The archive of these records, without running a loader."""
    archive = LocalArchive(root)
    for n, (name, table) in enumerate(derived(records)):
        for hour, part in by_hour(table, DATASETS[name].time):
            archive.write(name, hour, part_name(0, n, n + 1), [part], table.schema)
    return archive


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize("kind", ["gap", "resync", "negative level"])
def test_a_book_made_stale_within_one_read_is_not_verified(
    kind: str, compacted: bool, tmp_path: Path
) -> None:
    records = one_read(kind)
    archive = archive_of(tmp_path, records)
    report = hours.seal(archive, HOUR)
    if compacted:
        compaction.compact(archive, [HOUR], lambda _: None, _raise)
    assert report.verified_by_market["A"] == 0.0
    of = replay.read(archive, HOUR)
    rows = replay.after_events(of, tickers=["A"]).to_pylist()
    broken = max(r["record"] for r in rows if r["cause"] == "doubt")
    assert {r["verified"] for r in rows if r["record"] >= broken} == {False}
    assert [r["cause"] for r in rows if r["record"] >= broken][-5:] == ["delta"] * 5
    tops = [r for r in spreads(of).to_pylist() if r["market_ticker"] == "A"]
    assert not tops[-1]["verified"]
    assert tops == sorted(tops, key=lambda r: (r["record"], r["seq"]))
    (books,) = archive.read("book_checkpoints", HOUR + ONE_HOUR)
    verified = {r["market_ticker"]: r["verified"] for r in books.to_pylist()}
    assert verified["A"] is False


def _raise(hour: object, error: Exception) -> None:
    raise AssertionError(f"{hour}: {error}")


def test_trades_and_deltas_of_one_read_are_ordered(tmp_path: Path) -> None:
    dice, at, seqs = random.Random(2), HOUR_NS + MINUTE, {1: 1, 2: 0}
    records = [
        wire.connected(CONN, at),
        (at, CONN, int(Kind.SNAPSHOT), wire.snapshot("A", 1, {}, {})),
    ]
    for n in range(60):
        at += (n % 10 == 0) * wire.SECOND
        sid = dice.choice((1, 2))
        seqs[sid] += 1
        frame = (
            wire.delta("A", seqs[1], "yes", 4_500, 5)
            if sid == 1
            else wire.trade("A", seqs[2], 4_500, 5)
        )
        records.append((at, CONN, int(Kind.DELTA if sid == 1 else Kind.TRADE), frame))
    settings = settings_for("http://127.0.0.1:1", "none", kalshi_data_dir=tmp_path)
    writer = journal_of(settings.journal_dir(), records)
    archive = LocalArchive(settings.archive_dir)
    load_all(Loader(settings.journal_dir(), writer, ParquetSink(archive, 0, lambda _: None), PACE))
    writer.close()
    columns = ["shard", "record", "sid", "seq"]
    both = [
        archived(settings.archive_dir, name).select(columns)
        for name in ("orderbook_events", "trades")
    ]
    found = pl.concat(both).sort("shard", "record").select("sid", "seq").rows()
    assert found == [(1 + (k == Kind.TRADE), seq) for k, seq in _numbers(records)]


def _numbers(records: Sequence[wire.Record]) -> list[tuple[int, int]]:
    counts = {int(Kind.DELTA): 1, int(Kind.TRADE): 0}
    found = []
    for _, _, kind, _ in records:
        if kind in counts:
            counts[kind] += 1
            found.append((kind, counts[kind]))
    return found


def test_rolling_statistics_apply_a_snapshot_of_the_same_time(
    client: Client,
) -> None:
    """The best bid of before is gone, so the spread is 0.10 and not 0.02."""
    at = datetime.now(UTC) - timedelta(seconds=20)
    of = {"conn_id": _uuid(1), "sid": 1, "market_ticker": "T", "ingest_ts": at, "shard": 0}
    level = {**of, "market_id": _uuid(0)}
    rows: list[dict[str, Any]] = [
        {"type": "delta", "seq": 8, "record": 80, "side": "yes", "price": "0.48", "qty": 3, "size": 3},
        {"type": "snapshot", "seq": 9, "record": 81, "side": "yes", "price": "0.40", "qty": 5, "size": 5},
        {"type": "snapshot", "seq": 9, "record": 81, "side": "no", "price": "0.50", "qty": 5, "size": 5},
    ]  # fmt: skip
    numbers = ("price", "qty", "size")
    insert(
        client,
        ORDERBOOK_EVENTS,
        [{**level, **row, **{n: Decimal(row[n]) for n in numbers}} for row in rows],
    )
    insert(client, STREAM_EVENTS, [{**of, "kind": "snapshot", "seq": 9, "record": 81}])
    client.command(queries.text("latest_levels_from_events"))
    (got,) = client.query("SELECT * FROM rolling_stats(ticker = 'T', minutes = 1)").named_results()
    assert got["time_weighted_spread"] == pytest.approx(0.10)
    assert got["updates"] == 1


def test_a_gap_in_the_microsecond_of_a_snapshot_stays_open(client: Client) -> None:
    at = datetime.now(UTC)
    of = {"conn_id": _uuid(1), "sid": 1, "market_ticker": "T", "ingest_ts": at, "shard": 0}
    detail = '{"cause":"negative_level"}'
    rows = [
        {"kind": "snapshot", "seq": 1, "record": 5},
        {"kind": "gap", "record": 6, "detail": detail},
    ]
    insert(client, STREAM_EVENTS, [{**of, **row} for row in rows])
    (gap,) = continuity.gaps(client, at + timedelta(seconds=9)).named
    assert gap["ended_at"] is None
    insert(client, STREAM_EVENTS, [{**of, "kind": "snapshot", "seq": 3, "record": 7}])
    (gap,) = continuity.gaps(client, at + timedelta(seconds=9)).named
    assert gap["open_s"] == 0


def _uuid(number: int) -> str:
    return f"00000000-0000-0000-0000-{number:012d}"


# -- a clock that is set back ----------------------------------------------------------------------


def over_the_hour() -> list[wire.Record]:
    """Ten seconds after the hour the clock is set 20 s back; later deltas remove the best bid."""
    at = HOUR_NS - 10 * wire.SECOND
    frame = wire.snapshot("A", 1, {4_500: 100, 4_000: 100}, {5_000: 100})
    records = [wire.connected(CONN, at), (at, CONN, int(Kind.SNAPSHOT), frame)]
    steps = [
        (HOUR_NS - wire.SECOND, "yes", 3_900, 7),
        (HOUR_NS + wire.SECOND, "yes", 3_800, 7),
        (HOUR_NS + 10 * wire.SECOND, "no", 4_900, 7),
        (HOUR_NS - 10 * wire.SECOND, "yes", 4_500, -100),
        (HOUR_NS - 5 * wire.SECOND, "no", 4_800, 7),
        (HOUR_NS + 2 * wire.SECOND, "no", 4_700, 7),
        *((HOUR_NS + n * MINUTE, "no", 4_600, 7) for n in range(1, 80, 5)),
    ]
    for n, (at, side, price, qty) in enumerate(steps):
        records.append((at, CONN, int(Kind.DELTA), wire.delta("A", 2 + n, side, price, qty)))
    return records


def test_late_deltas_reach_the_book_of_the_earlier_hour(settings: Settings, client: Client) -> None:
    writer = journal_of(settings.journal_dir(), over_the_hour())
    archive = LocalArchive(settings.archive_dir)
    for store in (
        ParquetSink(archive, 0, lambda _: None),
        ClickHouseSink(settings, str(writer.id)),
    ):
        load_all(Loader(settings.journal_dir(), writer, store, PACE))
    writer.close()
    assert hours.is_sealed(archive, HOUR - ONE_HOUR)
    assert hours.is_sealed(archive, HOUR)
    assert [d.what for d in compared(settings, client).differences] == []
    compute_hour(settings, HOUR)
    at = HOUR + timedelta(minutes=30)
    asked = client.query(
        "SELECT max(price) FROM book_at(ticker = 'A', at = {at:DateTime64(6, 'UTC')}) WHERE side = 'yes'",
        parameters={"at": at},
    ).result_rows
    (tops,) = archive.read("spreads", HOUR)
    last = next(r for r in reversed(tops.to_pylist()) if r["ingest_ts"] <= at)
    assert (last["yes_bid"], last["verified"]) == (Decimal("0.4000"), True)
    assert asked == [(Decimal("0.4000"),)]
    before = {name: compaction.statistics_of(archive.files(name, HOUR), DATASETS[name]) for name in hours.RECORDED if archive.files(name, HOUR)}  # fmt: skip
    for compacted in (False, True):
        if compacted:
            compaction.compact(archive, [HOUR - ONE_HOUR, HOUR], lambda _: None, _raise)
        rebuild(settings, HOUR)
        after = {name: compaction.statistics_of(archive.files(name, HOUR), DATASETS[name]) for name in before}  # fmt: skip
        assert after == before
    assert [d.what for d in compared(settings, client).differences] == []


@pytest.mark.parametrize("kind", ["parquet", "clickhouse"])
def test_checkpoints_of_a_set_back_clock_are_stored_once(
    kind: str, settings: Settings, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kalshi_platform.loading.shared_rows.CHUNK_ROWS", 5)
    records = over_the_hour()
    writer = journal_of(settings.journal_dir(), records)
    dice = random.Random(7)
    archive = LocalArchive(settings.archive_dir)
    deaths = 0
    while True:
        store: ParquetSink | ClickHouseSink = (
            ParquetSink(archive, 0, lambda _: None)
            if kind == "parquet"
            else ClickHouseSink(settings, str(writer.id))
        )
        dying = Dying(store, dice.randint(1, 2), after=dice.random() < 0.5)
        load = Loader(settings.journal_dir(), writer, dying, Pace(dice.randint(2, 9), 0.0, 0.0))
        load.start()
        load.drain()
        load.join(DATABASE_TIMEOUT_S)
        if load.failure is None:
            break
        deaths += 1
    writer.close()
    assert deaths > 3
    wanted = pa.concat_tables(t for name, t in derived(records) if name == "book_checkpoints")
    keys = ["ts", "record", "side", "price", "size", "verified"]
    if kind == "parquet":
        found = archived(settings.archive_dir, "book_checkpoints")
    else:
        answer = client.query_arrow(f"SELECT {', '.join(keys)} FROM book_checkpoints")
        found = pl.DataFrame(answer)
    expected = pl.DataFrame(wanted).select(keys)
    # the hour begins, the clock is set back, comes to the hour again, and to the next one after a silence
    assert expected["record"].n_unique() == 4
    assert expected.filter(~pl.col("verified"))["record"].n_unique() == 1
    assert found.height == expected.height
    assert sorted(found.select("record", "ts").unique().rows()) == sorted(
        expected.select("record", "ts").unique().rows()
    )


# -- book_at against a walk through the journal ----------------------------------------------------


def walk(records: Sequence[wire.Record]) -> list[tuple[int, dict[str, Book]]]:
    """(receive time in µs, every book) after each record."""
    books: dict[str, tuple[bytes, Book]] = {}
    found = []
    for recv_ns, conn, kind, frame in records:
        if kind == Kind.SNAPSHOT:
            snapshot = decode_snapshot(frame)
            ladders = {s: snapshot_ladder(snapshot, s) for s in ("yes", "no")}
            levels = {(s, p): q for s, ladder in ladders.items() for p, q in ladder.items()}
            books[snapshot.market_ticker] = conn, levels
        elif kind == Kind.DELTA:
            delta = decode_delta(frame)
            change = delta_change(delta)
            of, levels = books.get(delta.market_ticker, (b"", {}))
            if of == conn:
                key = change.side, change.price
                size = levels.get(key, 0) + change.qty
                books[delta.market_ticker] = conn, {**levels, key: size}
        whole = {t: {k: q for k, q in levels.items() if q > 0} for t, (_, levels) in books.items()}
        found.append((recv_ns // 1000, whole))
    return found


def without_snapshot(records: Sequence[wire.Record]) -> set[str]:
    """The markets of which a connection had brought deltas and no snapshot when the clock was set back.

    They are in no checkpoint, so `book_at` knows them as they were when the clock first showed an instant.
    """
    books: dict[str, bytes] = {}
    waiting: set[str] = set()
    found: set[str] = set()
    last_ns = 0
    for recv_ns, conn, kind, frame in records:
        if recv_ns < last_ns:
            found |= waiting
        last_ns = recv_ns
        if kind == Kind.SNAPSHOT:
            ticker = decode_snapshot(frame).market_ticker
            books[ticker] = conn
            waiting.discard(ticker)
        elif kind == Kind.DELTA and books.get(decode_delta(frame).market_ticker) != conn:
            waiting.add(decode_delta(frame).market_ticker)
    return found


@given(script=scripts(), seed=st.integers(0, 99))
@hypothesis_settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_book_at_is_the_book_after_the_last_record(
    client: Client, script: Script, seed: int
) -> None:
    for name in ("orderbook_events", "book_checkpoints", "stream_events"):
        client.command(f"TRUNCATE TABLE {name}")
    for n, (name, table) in enumerate(derived(script.records)):
        insert_arrow(client, name, table, f"walk {seed} {n} {id(script)}")
    states = walk(script.records)
    dice = random.Random(seed)
    instants = {us + d for us, _ in states for d in (0, -1)}
    for at_us in dice.sample(sorted(instants), min(8, len(instants))):
        by_then = next((books for us, books in reversed(states) if us <= at_us), {})
        for ticker in sorted({"A-1", "B-2", "C-3"} - without_snapshot(script.records)):
            rows = client.query(
                "SELECT toString(side), toInt64(price * 10000), toInt64(size * 100) FROM book_at"
                f"(ticker = '{ticker}', at = fromUnixTimestamp64Micro({at_us}, 'UTC'))"
            ).result_rows
            got = {(side, price): size for side, price, size in rows}
            assert got == by_then.get(ticker, {}), (ticker, at_us)

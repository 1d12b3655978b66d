"""Spreads, depth and imbalance equal the slow reference: any stream, any cut, any order of rows."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kalshi_platform.analytics import ladder
from kalshi_platform.analytics.books import Books, books, books_in_groups
from kalshi_platform.analytics.depth import depth
from kalshi_platform.analytics.imbalance import imbalance
from kalshi_platform.analytics.spreads import spreads
from kalshi_platform.exchange.columnar import decode_range
from kalshi_platform.journal.kind import Kind
from kalshi_platform.loading.book_state import BookState
from kalshi_platform.loading.rows import build_rows
from kalshi_platform.loading.shared_rows import split_at_checkpoints
from kalshi_platform.loading.sinks import by_hour
from kalshi_platform.loading.state_files import checkpoint
from kalshi_platform.schema import DATASETS as SCHEMAS
from kalshi_platform_tests import wire
from kalshi_platform_tests.analytics import reference
from kalshi_platform_tests.properties import examples

FRAMES = Path(__file__).resolve().parents[3] / "shared" / "frames"
TICKERS = ("A-1", "B-2", "C-3")
HOUR = datetime(2026, 9, 21, 15, tzinfo=UTC)
HOUR_NS = int(HOUR.timestamp()) * wire.SECOND
PRICES = (100, 4_700, 4_750, 4_800, 4_900, 5_000, 5_100, 5_200, 5_213, 5_300, 9_950)
STEPS_US = (0, 0, 0, 1, 1, 300_000, 999_999, 1_000_000, 2_500_000)
"""0: frames of one read of the socket."""
BACK_S = (0.000001, 0.5, 4, 6_000)

RECORDED = ("orderbook_events", "book_checkpoints", "stream_events")
DATASETS: dict[str, tuple[Callable[[Books], pa.Table], Callable[..., list[dict[str, Any]]]]] = {
    "spreads": (spreads, reference.spreads),
    "depth": (depth, reference.depth),
    "imbalance": (imbalance, reference.imbalance),
}


@dataclass
class Script:
    """Records that a recorder could keep, around the beginning of an hour."""

    records: list[wire.Record] = field(default_factory=list)
    held: dict[tuple[str, str, int], int] = field(default_factory=dict)
    number: int = 0
    conn: bytes = b""
    seq: int = 0
    at: int = HOUR_NS - 8 * wire.SECOND
    based: set[str] = field(default_factory=set)

    def add(self, kind: int, frame: bytes) -> None:
        self.records.append((self.at, self.conn, kind, frame))

    def connect(self) -> None:
        self.number += 1
        self.conn, self.seq = wire.conn_id(self.number), 0
        self.based.clear()
        self.held.clear()
        self.records.append(wire.connected(self.conn, self.at))

    def delta(self, ticker: str, side: str, price: int, qty: int) -> None:
        self.seq += 1
        self.held[ticker, side, price] = self.held.get((ticker, side, price), 0) + qty
        self.add(Kind.DELTA, wire.delta(ticker, self.seq, side, price, qty))

    def snapshot(self, ticker: str, yes: wire.Levels, no: wire.Levels) -> None:
        self.seq += 1
        self.held = {key: size for key, size in self.held.items() if key[0] != ticker}
        self.held |= {(ticker, "yes", p): q for p, q in yes.items()}
        self.held |= {(ticker, "no", p): q for p, q in no.items()}
        self.based.add(ticker)
        self.add(Kind.SNAPSHOT, wire.snapshot(ticker, self.seq, yes, no))


KINDS = (
    *("delta",) * 12,
    *("snapshot",) * 3,
    *("gap", "doubt", "left", "reconnect", "negative", "set back"),
)


@st.composite
def scripts(draw: st.DrawFn, kinds: Sequence[str] = KINDS) -> Script:
    """Snapshots, deltas, gaps, breaks and departures of three markets, over some seconds."""
    script = Script()
    script.connect()
    for _ in range(draw(st.integers(1, 60))):
        script.at += 1000 * draw(st.sampled_from(STEPS_US))
        step, ticker = draw(st.sampled_from(kinds)), draw(st.sampled_from(TICKERS))
        side, price = draw(st.sampled_from(("yes", "no"))), draw(st.sampled_from(PRICES))
        held = max(script.held.get((ticker, side, price), 0), 0)
        if step == "delta":
            script.delta(
                ticker,
                side,
                price,
                draw(st.just(-held) if held and draw(st.booleans()) else st.integers(1, 900)),
            )
        elif step == "negative":
            script.delta(ticker, side, price, -held - 1)
        elif step == "snapshot":
            ladder = st.dictionaries(st.sampled_from(PRICES), st.integers(1, 999), max_size=8)
            script.snapshot(ticker, draw(ladder), draw(ladder))
        elif step == "set back":
            script.at -= round(draw(st.sampled_from(BACK_S)) * wire.SECOND)
        elif step == "gap":
            script.seq += 1
            script.add(Kind.NOTE, wire.note("gap", {"cause": "sequence"}, sid=1))
        elif step in {"doubt", "left"}:
            kind = "gap" if step == "doubt" else "left"
            script.add(Kind.NOTE, wire.note(kind, {"cause": "test"}, sid=1, ticker=ticker))
        else:
            # dead for a while when its end is written down, though never longer than since its last frame
            span_s = draw(st.sampled_from([0, 0.000001, 0.2]))
            script.at += round(span_s * 2 * wire.SECOND) + 1000
            script.add(Kind.NOTE, wire.note("disconnected", {"cause": "test", "span_s": span_s}))
            script.connect()
    return script


def left_and_set_back() -> Script:
    """A market is left, changes once more in the next hour, and the clock is set back to the hour before."""
    script = Script()
    script.connect()
    script.snapshot("A-1", {4_700: 100}, {})
    script.add(Kind.NOTE, wire.note("left", {"cause": "test"}, sid=1, ticker="A-1"))
    script.at = HOUR_NS + wire.SECOND // 2
    script.delta("A-1", "yes", 5_100, 100)
    script.at = HOUR_NS - 2 * wire.SECOND
    script.delta("A-1", "yes", 4_800, 50)
    return script


def succeeded_and_set_back() -> Script:
    """A book changes and ends in the next hour, the next one has no snapshot, and the clock is set back."""
    script = Script()
    script.connect()
    script.snapshot("A-1", {100: 100}, {})
    script.at = HOUR_NS + wire.SECOND // 2
    script.delta("A-1", "yes", 5_100, 100)
    script.add(Kind.NOTE, wire.note("disconnected", {"cause": "test", "span_s": 0}))
    script.at += 1000
    script.connect()
    script.delta("A-1", "yes", 4_800, 50)
    script.at = HOUR_NS - 2 * wire.SECOND
    script.delta("A-1", "yes", 4_900, 50)
    return script


def ended_an_hour_ago_and_set_back() -> Script:
    """A book ends in one hour, the recording enters the next, and the clock is set back by two."""
    script = Script()
    script.connect()
    script.snapshot("A-1", {4_700: 100}, {})
    script.at = HOUR_NS + wire.SECOND
    script.delta("A-1", "yes", 5_100, 100)
    script.add(Kind.NOTE, wire.note("disconnected", {"cause": "test", "span_s": 0}))
    script.at = HOUR_NS + 3_601 * wire.SECOND
    script.connect()
    script.at = HOUR_NS - 2 * wire.SECOND
    script.snapshot("B-2", {4_700: 100}, {})
    return script


def ended_in_the_next_hour() -> Script:
    """A connection dies before the hour's end, is ended after it, and the clock is set back."""
    script = Script()
    script.connect()
    script.snapshot("A-1", {4_700: 100}, {})
    script.at = HOUR_NS + 2_000
    script.add(Kind.NOTE, wire.note("disconnected", {"cause": "test", "span_s": 0.2}))
    script.connect()
    script.delta("A-1", "yes", 4_800, 50)
    script.at = HOUR_NS - 2 * wire.SECOND
    script.snapshot("B-2", {4_700: 100}, {})
    return script


def hour_tables(records: Sequence[wire.Record], hour: datetime) -> dict[str, pa.Table]:
    """The three recorded datasets of one hour, built as the loader builds them."""
    return of_hour(derived(records), hour)


def of_hour(made: Iterable[tuple[str, pa.Table]], hour: datetime) -> dict[str, pa.Table]:
    """What one hour has of the recorded datasets' tables."""
    tables: dict[str, list[pa.Table]] = {name: [] for name in RECORDED}
    for name, table in made:
        tables[name] += [part for at, part in by_hour(table, SCHEMAS[name].time) if at == hour]
    return {
        name: pa.concat_tables(parts).unify_dictionaries() if parts else None
        for name, parts in tables.items()
    }


def derived(records: Sequence[wire.Record]) -> Iterator[tuple[str, pa.Table]]:
    """The tables of the recorded datasets, range by range, checkpoints of new hours among them."""
    state = BookState()
    (block,) = wire.blocks(records)
    for piece, opens in split_at_checkpoints(block, state.clock):
        if opens is not None and state.clock.is_new_hour(opens):
            yield "book_checkpoints", checkpoint(state, opens)
        rows, state = build_rows(decode_range(piece), state)
        yield from ((name, rows.tables[name]) for name in RECORDED)


def computed(tables: dict[str, Any], hour: datetime = HOUR) -> Books:
    return books(
        hour,
        *(
            [tables[name]] if tables[name] is not None else []
            for name in ("orderbook_events", "book_checkpoints", "stream_events")
        ),
    )


def assert_equal(got: pa.Table, expected: list[dict[str, Any]]) -> None:
    rows = got.to_pylist()
    assert len(rows) == len(expected), (rows, expected)
    for row, wanted in zip(rows, expected, strict=True):
        assert row.keys() == wanted.keys()
        for name, value in wanted.items():
            if isinstance(value, Fraction):
                exact = float(value)
                # three roundings for the microprice, one for a ratio
                bound = 4 * np.spacing(exact) if name == "microprice" else 0
                assert abs(row[name] - exact) <= bound, (name, row, wanted)
            else:
                assert row[name] == value, (name, row, wanted)


@given(script=scripts())
@example(script=left_and_set_back())
@example(script=succeeded_and_set_back())
@example(script=ended_an_hour_ago_and_set_back())
@example(script=ended_in_the_next_hour())
@examples(80)
def test_an_hour_equals_the_reference(script: Script) -> None:
    made = list(derived(script.records))
    for hour in (HOUR - timedelta(hours=1), HOUR):
        states = reference.Replay(int(hour.timestamp()) * wire.SECOND).run(script.records)
        replayed = computed(of_hour(made, hour), hour)
        for compute, expected in DATASETS.values():
            assert_equal(compute(replayed), expected(states))


@given(script=scripts(), seed=st.integers(0, 9))
@examples(40)
def test_the_order_and_the_number_of_the_files_change_nothing(script: Script, seed: int) -> None:
    tables = hour_tables(script.records, HOUR)
    events = tables["orderbook_events"]
    if events is None:
        return
    whole = computed(tables)
    shuffled = events.take(np.random.default_rng(seed).permutation(events.num_rows))
    half = shuffled.num_rows // 2
    others = [
        [t] if t is not None else [] for t in (tables["book_checkpoints"], tables["stream_events"])
    ]
    pieces = books(HOUR, [shuffled[half:], shuffled[:half]], *others)
    for compute, _ in DATASETS.values():
        assert compute(pieces).equals(compute(whole))


JUDGED_LATER = {
    "verified",
    "cause",
    "seq",
    "conn_id",
    "sid",
    "ts",
    "ingest_ts",
    "known_at",
    "second",
}
"""Columns that may differ because a stale event is recorded later."""


def known(table: pa.Table, at: datetime) -> dict[str, dict[str, Any]]:
    """Each market's newest row that may be used at an instant."""
    rows = [row for row in table.to_pylist() if row["known_at"] <= at]
    return {
        row["market_ticker"]: {k: v for k, v in row.items() if k not in JUDGED_LATER}
        for row in rows
    }


def flows(table: pa.Table, at: datetime) -> list[tuple[str, datetime, Decimal]]:
    return [
        (row["market_ticker"], row["second"], row["ofi"])
        for row in table.to_pylist()
        if row["known_at"] <= at and row["ofi"]
    ]


@given(script=scripts(), data=st.data())
@examples(60)
def test_joined_on_known_at_nothing_is_seen_of_later(script: Script, data: st.DataObject) -> None:
    """At a random instant the whole hour shows what an hour that ends there shows."""
    at_us = data.draw(st.integers(0, max(script.at - HOUR_NS, 0) // 1000 + 2_000_000))
    at = HOUR + timedelta(microseconds=at_us)
    at_ns = HOUR_NS + 1000 * at_us
    beat = (
        at_ns,
        bytes(16),
        int(Kind.NOTE),
        wire.note("heartbeat", {}),
    )  # the hour has begun by then
    until = [*(r for r in script.records if r[0] <= at_ns), beat]
    records = [*until, *(r for r in script.records if r[0] > at_ns)]
    of_all, of_some = computed(hour_tables(records, HOUR)), computed(hour_tables(until, HOUR))
    for dataset, (compute, _) in DATASETS.items():
        whole, cut = compute(of_all), compute(of_some)
        seen, wanted = known(whole, at), known(cut, at)
        if dataset == "imbalance":
            assert flows(whole, at) == flows(cut, at)
            for row in (*seen.values(), *wanted.values()):
                del row["ofi"]  # of its own second alone
        assert seen == wanted, dataset


def test_an_hour_without_rows_has_none() -> None:
    for compute, _ in DATASETS.values():
        assert compute(books(HOUR, [])).num_rows == 0


def test_frames_of_one_matching_event_are_kept_and_share_ts() -> None:
    script = Script(at=HOUR_NS)
    script.connect()
    script.snapshot("A-1", {4_800: 100, 4_700: 100}, {5_100: 100})
    for price in (4_800, 4_700):
        script.at += 1000
        script.delta("A-1", "yes", price, -100)
    rows = spreads(computed(hour_tables(script.records, HOUR))).to_pylist()
    assert [str(r["yes_bid"]) for r in rows] == ["0.4800", "0.4700", "None"]
    assert rows[1]["ts"] == rows[2]["ts"]


def test_a_no_bid_is_a_yes_ask_and_counted_once() -> None:
    script = Script(at=HOUR_NS)
    script.connect()
    script.snapshot("A-1", {4_000: 300}, {5_500: 700})
    of = computed(hour_tables(script.records, HOUR))
    (spread,) = spreads(of).to_pylist()
    assert (str(spread["yes_ask"]), str(spread["spread"]), str(spread["mid"])) == (
        "0.4500",
        "0.0500",
        "0.42500",
    )
    assert spread["microprice"] == pytest.approx((0.40 * 7 + 0.45 * 3) / 10)
    (row,) = depth(of).to_pylist()
    assert (str(row["bid_size_all"]), str(row["ask_size_all"])) == ("3.00", "7.00")
    assert (str(row["bid_notional"]), str(row["ask_notional"])) == ("1.200000", "3.150000")
    (ratio,) = imbalance(of).to_pylist()
    assert ratio["imbalance_best"] == -0.4


@pytest.mark.skipif(not FRAMES.is_dir(), reason="the recorded frames are not beside the repository")
@pytest.mark.parametrize(
    "recording",
    ["ws_legacy_cents_2025-11-30.jsonl.gz", "ws_orderbook_12_markets_prod_2026-08-07.jsonl"],
)
def test_recorded_frames_equal_the_reference(recording: str) -> None:
    for hour, records in recorded(FRAMES / recording):
        states = reference.Replay(int(hour.timestamp()) * wire.SECOND).run(records)
        assert states
        replayed = computed(hour_tables(records, hour), hour)
        for compute, expected in DATASETS.values():
            assert_equal(compute(replayed), expected(states))


def recorded(path: Path) -> list[tuple[datetime, list[wire.Record]]]:
    """The recording's frames as journal records, with each hour that it touches."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = [line for line in raw.splitlines(keepends=True) if line.strip()]
    conn, at = wire.conn_id(7), HOUR_NS - 1_000 * wire.SECOND
    records: list[wire.Record] = [wire.connected(conn, at)]
    kinds = {"orderbook_delta": Kind.DELTA, "orderbook_snapshot": Kind.SNAPSHOT}
    for line in lines:
        at += 400_000_000  # the hour begins in the middle of the flow
        kind = kinds.get(json.loads(line).get("type", ""))
        if kind is not None:
            records.append((at, conn, kind, line))
    hours = {datetime.fromtimestamp(r[0] // wire.SECOND // 3600 * 3600, UTC) for r in records}
    return [(hour, records) for hour in sorted(hours)]


@given(script=scripts(), rows=st.integers(1, 40))
@examples(20)
def test_however_the_work_is_cut_the_rows_are_the_same(script: Script, rows: int) -> None:
    tables = hour_tables(script.records, HOUR)
    given_ = [
        [tables[name]] if tables[name] is not None else []
        for name in ("orderbook_events", "book_checkpoints", "stream_events")
    ]
    for compute, _ in DATASETS.values():
        whole = compute(books(HOUR, *given_)).to_pylist()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(ladder, "_WINDOW", 3)
            patched.setattr(ladder, "_CELLS", 32)
            groups = [compute(of).to_pylist() for of in books_in_groups(HOUR, *given_, rows=rows)]
        assert [row for group in groups for row in group] == whole
        tickers = [{row["market_ticker"] for row in group} for group in groups]
        assert sum(map(len, tickers)) == len(set().union(*tickers))

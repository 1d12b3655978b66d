"""An archived hour replays into the recorded books, after every event and at any instant."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.analytics import replay
from kalshi_platform.archive import LocalArchive
from kalshi_platform.errors import StoreRefused
from kalshi_platform.exchange.book import Book, delta_change
from kalshi_platform.exchange.book import SyncState as BookState
from kalshi_platform.exchange.frames import decode_delta, decode_head, decode_snapshot
from kalshi_platform.journal.kind import Kind
from kalshi_platform_tests import wire
from kalshi_platform_tests.analytics import reference
from kalshi_platform_tests.analytics.recording import HOUR as ARCHIVED
from kalshi_platform_tests.analytics.recording import record_hour
from kalshi_platform_tests.analytics.test_against_reference import (
    FRAMES,
    HOUR,
    HOUR_NS,
    Script,
    computed,
    hour_tables,
    recorded,
    scripts,
)
from kalshi_platform_tests.properties import examples

LEVELS = 3
Sides = tuple[dict[int, int], dict[int, int]]
"""Both ladders, YES and NO bids: price to size."""


def ladders_of(row: dict[str, Any], levels: int) -> list[list[tuple[Decimal, Decimal]]]:
    """The levels that a row of `after_events` has, bids and asks, the best first."""
    found = []
    for side in ("bid", "ask"):
        pairs = [
            (row[f"yes_{side}_{n}"], row[f"yes_{side}_size_{n}"]) for n in range(1, levels + 1)
        ]
        there = [pair for pair in pairs if pair != (None, None)]
        assert pairs[: len(there)] == there, "a level is missing among better ones"
        found.append(there)
    return found


def best_of(sides: Sides, levels: int) -> list[list[tuple[Decimal, Decimal]]]:
    """The same from whole ladders."""
    yes, no = sides
    asks = {10_000 - price: size for price, size in no.items()}
    return [
        [(reference.price(p), reference.size(q)) for p, q in ordered[:levels]]
        for ordered in (sorted(yes.items(), reverse=True), sorted(asks.items()))
    ]


def whole(table: pa.Table) -> dict[tuple[str, datetime], tuple[bool, datetime, Sides]]:
    """The books of `at_instants`, by market and instant."""
    found = {}
    rows = table.to_pylist()
    for key, of in groupby(rows, key=lambda r: (r["market_ticker"], r["at"])):
        levels = list(of)
        assert key not in found
        if levels[0]["side"] is None:
            assert len(levels) == 1
            assert levels[0]["price"] is None
            assert levels[0]["size"] is None
        ladders: Sides = ({}, {})
        for row in levels if levels[0]["side"] is not None else []:
            ladder = ladders[("yes", "no").index(row["side"])]
            ladder[int(row["price"] * 10_000)] = int(row["size"] * 100)
        found[key] = (levels[0]["verified"], levels[0]["last_event_ts"], ladders)
    assert rows == sorted(
        rows, key=lambda r: (r["market_ticker"], r["at"], r["side"] != "yes", r["price"] or 0)
    )
    return found


@given(script=scripts(), levels=st.sampled_from([1, LEVELS]))
@examples(80)
def test_ladders_after_every_event_equal_the_slow_replay(script: Script, levels: int) -> None:
    states = reference.Replay(HOUR_NS).run(script.records)
    rows = replay.after_events(computed(hour_tables(script.records, HOUR)), levels).to_pylist()
    assert len(rows) == len(states)
    for row, state in zip(rows, states, strict=True):
        known = ("market_ticker", "cause", "ts", "conn_id", "sid", "seq", "verified")
        wanted = (
            state.ticker,
            state.cause,
            state.ts,
            state.conn,
            state.sid,
            state.seq,
            state.verified,
        )
        assert tuple(row[name] for name in known) == wanted
        assert row["known_at"] == reference.EPOCH + timedelta(microseconds=state.clock_us)
        assert ladders_of(row, levels) == best_of((state.yes, state.no), levels)


@given(script=scripts(), offsets=st.lists(st.integers(0, 40_000_000), max_size=5))
@examples(60)
def test_at_any_instant_the_books_are_those_of_the_slow_replay(
    script: Script, offsets: list[int]
) -> None:
    states = reference.Replay(HOUR_NS).run(script.records)
    # the very instants of events too, and those beside them
    exact = [state.at_us - HOUR_NS // 1000 for state in states[::3]]
    instants = {
        HOUR + timedelta(microseconds=us)
        for it in exact
        for us in (it - 1, it)
        if 0 <= us < 3_600_000_000
    } | {HOUR + timedelta(microseconds=us) for us in offsets}
    got = whole(replay.at_instants(computed(hour_tables(script.records, HOUR)), instants))
    wanted: dict[tuple[str, datetime], tuple[bool, datetime, Sides]] = {}
    for state in states:
        for at in instants:
            us = (at - HOUR) // timedelta(microseconds=1) + HOUR_NS // 1000
            if state.at_us <= us:
                if state.cause == "doubt":
                    last = wanted[state.ticker, at][1]
                else:
                    last = reference.EPOCH + timedelta(microseconds=state.at_us)
                wanted[state.ticker, at] = (state.verified, last, (state.yes, state.no))
    assert got == wanted


# -- against exchange.book.Book ----------------------------------------------------------------


def by_book(records: Sequence[wire.Record], hour_ns: int) -> list[tuple[str, int, int, Sides]]:
    """(ticker, receive µs, seq, ladders) after each of the hour's frames, from `Book` alone."""
    books: dict[str, Book] = {}
    found = []
    for recv_ns, _, kind, frame in records:
        if kind == Kind.SNAPSHOT:
            snapshot = decode_snapshot(frame)
            ticker = snapshot.market_ticker
            books.setdefault(ticker, Book(ticker)).apply_snapshot(snapshot)
        elif kind == Kind.DELTA:
            delta = decode_delta(frame)
            ticker = delta.market_ticker
            if ticker not in books or books[ticker].state is BookState.WAITING:
                continue  # without a snapshot there is no book
            books[ticker].apply_delta(delta_change(delta))
        else:
            continue
        if hour_ns <= recv_ns < hour_ns + 3_600 * wire.SECOND:
            ladders = books[ticker].ladders
            sides = (dict(ladders["yes"]), dict(ladders["no"]))
            found.append((ticker, recv_ns // 1000, decode_head(frame).seq, sides))
    return sorted(found, key=lambda it: it[0])


def assert_as_by_book(records: Sequence[wire.Record], hour: datetime, levels: int) -> int:
    hour_ns = int(hour.timestamp()) * wire.SECOND
    wanted = by_book(records, hour_ns)
    of = computed(hour_tables(records, hour), hour)
    rows = replay.after_events(of, levels).to_pylist()
    events = [row for row in rows if row["cause"] in {"snapshot", "delta"}]
    assert [(r["market_ticker"], r["seq"]) for r in events] == [(t, seq) for t, _, seq, _ in wanted]
    for row, (_, _, _, sides) in zip(events, wanted, strict=True):
        assert ladders_of(row, levels) == best_of(sides, levels)
    some = wanted[:: max(len(wanted) // 40, 1)]
    instants = {datetime.fromtimestamp(0, UTC) + timedelta(microseconds=us) for _, us, _, _ in some}
    for (ticker, at), (_, _, sides) in whole(replay.at_instants(of, instants)).items():
        us = (at - reference.EPOCH) // timedelta(microseconds=1)
        seen = [found for t, when, _, found in wanted if t == ticker and when <= us]
        if seen:  # else it is as at the hour's beginning
            assert sides == seen[-1]
    return len(events)


@given(script=scripts(kinds=("delta", "delta", "delta", "snapshot", "gap")))
@examples(60)
def test_random_books_replay_by_the_exchanges_rules(script: Script) -> None:
    assert_as_by_book(script.records, HOUR, 10)


@pytest.mark.skipif(not FRAMES.is_dir(), reason="the recorded frames are not beside the repository")
@pytest.mark.parametrize(
    "recording",
    ["ws_legacy_cents_2025-11-30.jsonl.gz", "ws_orderbook_12_markets_prod_2026-08-07.jsonl"],
)
def test_recorded_frames_replay_by_the_exchanges_rules(recording: str) -> None:
    hours = recorded(FRAMES / recording)
    assert sum(assert_as_by_book(records, hour, 5) for hour, records in hours) > 100


# -- as a reader uses it -----------------------------------------------------------------------


def test_some_markets_read_alone_replay_as_they_do_among_all(tmp_path: Path) -> None:
    record_hour(tmp_path)
    everything = replay.read(LocalArchive(tmp_path), ARCHIVED)
    alone = replay.read(LocalArchive(tmp_path), ARCHIVED, ["M-1"])
    assert alone.tickers == ["M-1"]
    table = replay.after_events(alone, LEVELS)
    assert table.num_rows > 100
    among = replay.after_events(everything, LEVELS, ["M-1"])
    assert table.to_pylist() == among.to_pylist()
    assert not all(table["verified"].to_pylist()), "the gap in the recording is of all markets"
    instants = [ARCHIVED + timedelta(minutes=m) for m in (0, 20, 59)]
    books = replay.at_instants(alone, instants)
    assert books.to_pylist() == replay.at_instants(everything, instants, ["M-1"]).to_pylist()
    assert set(books["at"].to_pylist()) == set(instants)


def test_some_markets_after_the_others_are_all_of_them(tmp_path: Path) -> None:
    record_hour(tmp_path)
    everything = replay.after_events(
        replay.read(LocalArchive(tmp_path), ARCHIVED), LEVELS
    ).to_pylist()
    groups = [
        replay.after_events(of, LEVELS)
        for of in replay.read_in_groups(LocalArchive(tmp_path), ARCHIVED, 150)
    ]
    assert len(groups) == 3
    assert [row for group in groups for row in group.to_pylist()] == everything


def test_an_hour_of_no_market_that_is_known_replays_into_nothing(tmp_path: Path) -> None:
    record_hour(tmp_path)
    nothing = replay.read(LocalArchive(tmp_path), ARCHIVED, ["M-9"])
    assert replay.after_events(nothing, 2).num_rows == 0
    assert replay.at_instants(nothing, [ARCHIVED]).schema == replay.AT_INSTANTS


def test_what_cannot_be_answered_is_refused_by_name(tmp_path: Path) -> None:
    record_hour(tmp_path)
    of = replay.read(LocalArchive(tmp_path), ARCHIVED)
    with pytest.raises(StoreRefused, match="Nothing is recorded of the hour 2026-09-21 16:00"):
        replay.read(LocalArchive(tmp_path), ARCHIVED + timedelta(hours=1))
    with pytest.raises(ValueError, match="no time zone"):
        replay.read(LocalArchive(tmp_path), ARCHIVED.replace(tzinfo=None))
    with pytest.raises(ValueError, match="no time zone"):
        replay.at_instants(of, [ARCHIVED.replace(tzinfo=None)])
    with pytest.raises(ValueError, match="not within the hour"):
        replay.at_instants(of, [ARCHIVED + timedelta(hours=1)])
    with pytest.raises(ValueError, match="levels is 0"):
        replay.after_events(of, 0)

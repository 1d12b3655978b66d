"""The live views agree with their definitions on random books and random minutes of events."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest

from kalshi_platform.clickhouse.client import Client
from kalshi_platform.schema import LATEST_LEVELS, ORDERBOOK_EVENTS, STREAM_EVENTS
from kalshi_platform_tests.analytics import reference
from kalshi_platform_tests.clickhouse.tables import insert, migrated, uuid

CONN = uuid(1)
Event = tuple[datetime, int, str, str, int, int, int]
"""(ingest_ts, seq, type, side, price, qty, size after)"""


@pytest.fixture
def client(clickhouse_url: str, clickhouse_database: str) -> Iterator[Client]:
    """A client of a migrated database."""
    with migrated(clickhouse_url, clickhouse_database) as client:
        yield client


def answers(client: Client, sql: str) -> list[dict[str, Any]]:
    return list(client.query(sql).named_results())


def state(ticker: str, yes: dict[int, int], no: dict[int, int]) -> reference.After:
    return reference.After(ticker, "delta", None, 0, CONN, 1, 1, True, yes, no)


def test_live_depth_and_imbalance_are_those_of_the_definitions(client: Client) -> None:
    rng = random.Random(3)
    prices = [100, 4_700, 4_750, 4_800, 4_900, 5_000, 5_100, 5_213, 5_300, 9_950]
    books = {
        f"T{n}": [
            {p: rng.randrange(1, 10**6) for p in rng.sample(prices, rng.randrange(0, 8))}
            for _ in range(2)
        ]
        for n in range(12)
    }
    books["one side"] = [{4_800: 100, 4_700: 200}, {}]
    books["empty"] = [{}, {}]
    rows = [
        {
            "market_ticker": t,
            "market_id": uuid(2),
            "side": side,
            "price": reference.price(p),
            "size": reference.size(q),
            "version": 2,
        }
        for t, ladders in books.items()
        for side, ladder in zip(("yes", "no"), ladders, strict=True)
        for p, q in [*ladder.items(), (5_400, 0)]
    ]
    gone = [{**row, "size": Decimal(7), "version": 1} for row in rows]
    insert(client, LATEST_LEVELS, gone)
    insert(client, LATEST_LEVELS, rows)

    levels_of = {t: state(t, yes, no) for t, (yes, no) in books.items() if yes or no}
    depth = {row["market_ticker"]: row for row in answers(client, "SELECT * FROM live_depth")}
    assert depth.keys() == levels_of.keys()
    for ticker, levels in levels_of.items():
        (wanted,) = reference.depth([levels])
        del wanted["second"], wanted["verified"], wanted["known_at"]
        assert {name: depth[ticker][name] for name in wanted} == wanted
    found = {row["market_ticker"]: row for row in answers(client, "SELECT * FROM live_imbalance")}
    assert found.keys() == levels_of.keys()
    for ticker, levels in levels_of.items():
        (wanted,) = reference.imbalance([levels])
        for name in ("imbalance_best", "imbalance_5_levels", "imbalance_5c"):
            assert found[ticker][name] == pytest.approx(float(wanted[name]), abs=1e-15)


def minutes_of_events(
    rng: random.Random, begin: datetime, steps: int, *, snapshot_at: int
) -> list[Event]:
    """A book's events; at step `snapshot_at` a snapshot replaces the book."""
    prices = range(4_000, 4_950, 50)
    book: dict[tuple[str, int], int] = {}
    events: list[Event] = []
    at, seq = begin, 0
    for step in range(steps):
        at += timedelta(microseconds=rng.choice([0, 1, 400_000, 1_300_000]))
        seq += 1
        if step in {0, snapshot_at}:
            at += timedelta(microseconds=1)
            book = {
                (s, p): rng.randrange(1, 900) for s in ("yes", "no") for p in rng.sample(prices, 6)
            }
            events += [(at, seq, "snapshot", s, p, q, q) for (s, p), q in sorted(book.items())]
            continue
        key = rng.choice(("yes", "no")), rng.choice(prices)
        held = book.get(key, 0)
        qty = -held if held and rng.random() < 0.6 else rng.randrange(1, 500)
        book[key] = held + qty
        events.append((at, seq, "delta", *key, qty, held + qty))
    return events


def rolling(events: list[Event], since: datetime, until: datetime) -> dict[str, float]:
    """The definitions of `rolling_stats`, event by event."""
    book: dict[tuple[str, int], int] = {}
    states: list[tuple[datetime, Any]] = []
    seqs = set()
    last_seq = 0
    for at, seq, kind, side, price, _, size in events:
        if kind == "snapshot" and seq != last_seq:
            book = {}
        book[side, price], last_seq = size, seq
        yes, no = (
            [p for (s, p), q in book.items() if s == side and q > 0] for side in ("yes", "no")
        )
        top = (max(yes), 10_000 - max(no)) if yes and no else None
        states.append((max(at, since), top))
        if at >= since:
            seqs.add(seq)
    spans = [
        ((after - at).total_seconds(), top)
        for (at, top), (after, _) in pairwise([*states, (until, None)])
        if top is not None and after > at
    ]
    two_sided = sum(lasts for lasts, _ in spans)
    mids = [sum(top) / 20_000 for _, top in spans]
    return {
        "updates": len(seqs),
        "two_sided_seconds": two_sided,
        "time_weighted_spread": sum((a - b) / 10_000 * lasts for lasts, (b, a) in spans)
        / two_sided,
        "mid_low": min(mids),
        "mid_high": max(mids),
        "mid_range": max(mids) - min(mids),
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("minutes", [1, 5])
def test_rolling_statistics_are_those_of_the_definitions(
    client: Client, seed: int, minutes: int
) -> None:
    rng = random.Random(seed)
    began = datetime.now(UTC) - timedelta(seconds=150)
    # in half of the cases a snapshot falls into both spans, in the others the book is older than a minute
    events = minutes_of_events(rng, began, 250, snapshot_at=230 if seed % 2 else -1)
    events = [event for event in events if event[0] < datetime.now(UTC)]
    insert(
        client,
        ORDERBOOK_EVENTS,
        [
            {
                "market_ticker": "T",
                "market_id": uuid(2),
                "conn_id": CONN,
                "sid": 1,
                "ingest_ts": at,
                "seq": seq,
                "type": kind,
                "side": side,
                "price": reference.price(price),
                "qty": reference.size(qty),
                "size": reference.size(size),
            }
            for at, seq, kind, side, price, qty, size in events
        ],
    )
    snapshots = {(at, seq) for at, seq, kind, *_ in events if kind == "snapshot"}
    insert(
        client,
        STREAM_EVENTS,
        [
            {"market_ticker": "T", "ingest_ts": at, "kind": "snapshot", "conn_id": CONN, "seq": seq}
            for at, seq in snapshots
        ],
    )
    newest = max(seq for _, seq in snapshots)
    latest = {(side, price): size for _, seq, _, side, price, _, size in events if seq >= newest}
    insert(
        client,
        LATEST_LEVELS,
        [
            {
                "market_ticker": "T",
                "market_id": uuid(2),
                "side": side,
                "price": reference.price(p),
                "size": reference.size(q),
                "version": 1,
            }
            for (side, p), q in latest.items()
        ],
    )
    (got,) = answers(client, f"SELECT * FROM rolling_stats(ticker = 'T', minutes = {minutes})")
    until = got["since"] + timedelta(seconds=got["seconds"])
    assert abs((datetime.now(UTC) - until).total_seconds()) < 60
    newest_at = max(at for at, _ in snapshots)
    if newest_at > until - timedelta(minutes=minutes):
        assert got["since"] == newest_at
    else:
        assert got["seconds"] == pytest.approx(60 * minutes)
    for name, value in rolling(events, got["since"], until).items():
        assert float(got[name]) == pytest.approx(value, rel=1e-6, abs=1e-9), name
    assert got["updates_per_second"] == pytest.approx(got["updates"] / got["seconds"])


def test_a_market_without_events_has_one_row_that_says_so(client: Client) -> None:
    (got,) = answers(client, "SELECT * FROM rolling_stats(ticker = 'nothing', minutes = 1)")
    assert (got["updates"], got["two_sided_seconds"], got["mid_range"]) == (0, 0, None)

"""The views return the exchange's books: `book_at` is compared with a book kept in Python."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from kalshi_platform.clickhouse.client import Client
from kalshi_platform.schema import (
    BOOK_CHECKPOINTS,
    LATEST_LEVELS,
    ORDERBOOK_EVENTS,
    STREAM_EVENTS,
)
from kalshi_platform_tests.clickhouse.tables import insert, migrated, one_row, uuid

START = datetime(2026, 11, 22, 12, 40, tzinfo=UTC)
MARKETS = ("A", "B")
Book = dict[tuple[str, Decimal], Decimal]


@pytest.fixture
def client(clickhouse_url: str, clickhouse_database: str) -> Iterator[Client]:
    """A client of a migrated database."""
    with migrated(clickhouse_url, clickhouse_database) as client:
        yield client


class Recording:
    """A random recording of two markets, with their books after every event."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.events: list[dict[str, Any]] = []
        self.stream: list[dict[str, Any]] = []
        self.checkpoints: list[dict[str, Any]] = []
        self.books: dict[str, list[tuple[datetime, Book]]] = {m: [] for m in MARKETS}
        self._book: dict[str, Book | None] = dict.fromkeys(MARKETS)
        self._owner: dict[str, tuple[str, int, int]] = {}
        self._now = START
        self._conn = 0
        self._seq = 0
        self._reconnect()

    def run(self, steps: int) -> None:
        """Add `steps` random events."""
        for _ in range(steps):
            # now and then several events in one microsecond
            self._tick(timedelta(microseconds=self._random.choice([0, 1, 900_000, 40_000_000])))
            chance = self._random.random()
            market = self._random.choice(MARKETS)
            if chance < 0.01:
                self._reconnect()
            elif chance < 0.04:
                self._snapshot(market, empty=self._random.random() < 0.3)
            elif chance < 0.06:
                self._stream("ok", "", self._next_seq())
            else:
                self._delta(market)

    def _tick(self, step: timedelta) -> None:
        hour = self._now.replace(minute=0, second=0, microsecond=0) + timedelta(hours=1)
        self._now += step
        if self._now >= hour:
            for market in MARKETS:
                self._checkpoint(market, hour)

    def _checkpoint(self, market: str, hour: datetime) -> None:
        book = self._book[market]
        if book is None:
            return
        conn, sid, seq = self._owner[market]
        common = {"ts": hour, "conn_id": conn, "sid": sid, "seq": seq, "market_ticker": market}
        levels: list[dict[str, Any]] = [
            {"side": side, "price": price, "size": size} for (side, price), size in book.items()
        ]
        self.checkpoints += [
            {**common, "market_id": uuid(0), "verified": True, **level} for level in levels or [{}]
        ]

    def _reconnect(self) -> None:
        self._conn += 1
        self._seq = 0
        for market in MARKETS:
            self._snapshot(market, empty=False)

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq

    def _stream(self, kind: str, market: str, seq: int) -> None:
        self.stream.append(
            {
                "ingest_ts": self._now,
                "conn_id": uuid(self._conn),
                "sid": 1,
                "seq": seq,
                "kind": kind,
                "market_ticker": market,
            }
        )

    def _event(self, market: str, level: tuple[str, Decimal], **values: Any) -> None:
        self.events.append(
            {
                "conn_id": uuid(self._conn),
                "sid": 1,
                "market_id": uuid(0),
                "market_ticker": market,
                "side": level[0],
                "price": level[1],
                "ingest_ts": self._now,
                **values,
            }
        )

    def _level(self) -> tuple[str, Decimal]:
        return self._random.choice(("yes", "no")), Decimal(self._random.randint(1, 6)) / 100

    def _size(self) -> Decimal:
        return Decimal(self._random.randint(1, 9_999)) / 100

    def _snapshot(self, market: str, *, empty: bool) -> None:
        seq = self._next_seq()
        book = {} if empty else {self._level(): self._size() for _ in range(5)}
        for level, size in book.items():
            self._event(market, level, type="snapshot", seq=seq, qty=size, size=size)
        self._stream("snapshot", market, seq)
        self._changed(market, book, seq)

    def _delta(self, market: str) -> None:
        book = dict(self._book[market] or {})
        level, seq = self._level(), self._next_seq()
        before = book.pop(level, Decimal(0))
        size = Decimal(0) if before and self._random.random() < 0.4 else self._size()
        if size:
            book[level] = size
        self._event(market, level, type="delta", seq=seq, qty=size - before, size=size)
        self._changed(market, book, seq)

    def _changed(self, market: str, book: Book, seq: int) -> None:
        self._book[market] = book
        self._owner[market] = uuid(self._conn), 1, seq
        self.books[market].append((self._now, book))

    def at(self, market: str, at: datetime) -> Book:
        """The book kept in Python."""
        return next((book for ts, book in reversed(self.books[market]) if ts <= at), {})

    def moments(self, count: int) -> list[datetime]:
        """Instants before, after, on and between the events."""
        times = sorted({event["ingest_ts"] for event in self.events + self.stream})
        chosen = self._random.sample(times, min(count, len(times)))
        micro = timedelta(microseconds=1)
        hours = [c["ts"] for c in self.checkpoints]
        return [
            START - timedelta(days=1),
            self._now + timedelta(days=1),
            *sorted({h + d for h in hours for d in (-micro, timedelta(0), micro)}),
            *(t + d for t in chosen for d in (timedelta(0), -micro)),
        ]


def book_at(client: Client, market: str, at: datetime) -> Book:
    """The view's answer, each level once."""
    rows = client.query(
        "SELECT side, price, size FROM book_at(ticker = {ticker:String}, at = {at:String})",
        parameters={"ticker": market, "at": f"{at:%Y-%m-%d %H:%M:%S.%f}"},
    ).result_rows
    book = {(side, price): size for side, price, size in rows}
    assert len(book) == len(rows)
    return book


@pytest.mark.parametrize("seed", range(3))
def test_book_at_is_the_book_that_a_reader_of_every_event_had(client: Client, seed: int) -> None:
    recording = Recording(seed)
    recording.run(700)
    assert len({c["ts"] for c in recording.checkpoints}) >= 2
    insert(client, ORDERBOOK_EVENTS, recording.events)
    insert(client, STREAM_EVENTS, recording.stream)
    insert(client, BOOK_CHECKPOINTS, recording.checkpoints)
    for at in recording.moments(12):
        for market in MARKETS:
            assert book_at(client, market, at) == recording.at(market, at), (market, at)


def test_an_hour_stands_on_its_checkpoint_alone(client: Client) -> None:
    recording = Recording(99)
    recording.run(700)
    hour = max(c["ts"] for c in recording.checkpoints)
    insert(client, ORDERBOOK_EVENTS, [e for e in recording.events if e["ingest_ts"] >= hour])
    insert(client, STREAM_EVENTS, [e for e in recording.stream if e["ingest_ts"] >= hour])
    insert(client, BOOK_CHECKPOINTS, [c for c in recording.checkpoints if c["ts"] == hour])
    moments = [at for at in recording.moments(12) if at >= hour]
    assert len(moments) > 5
    for at in moments:
        for market in MARKETS:
            assert book_at(client, market, at) == recording.at(market, at), (market, at)


def test_an_empty_checkpoint_is_an_empty_book(client: Client) -> None:
    level = {"market_ticker": "A", "conn_id": uuid(1), "sid": 1, "market_id": uuid(0)}
    insert(
        client,
        ORDERBOOK_EVENTS,
        [
            {**level, "type": "delta", "side": "yes", "price": Decimal("0.5"), "seq": seq,
             "size": size, "ingest_ts": START.replace(minute=minute)}
            for seq, minute, size in ((2, 50, Decimal(3)), (4, 59, Decimal(0)))
        ],
    )  # fmt: skip
    insert(client, STREAM_EVENTS, [
        {**{k: level[k] for k in ("market_ticker", "conn_id", "sid")}, "kind": "snapshot", "seq": 1,
         "ingest_ts": START}
    ])  # fmt: skip
    hour = START.replace(hour=13, minute=0)
    insert(client, BOOK_CHECKPOINTS, [{**level, "ts": hour, "seq": 4}])
    assert book_at(client, "A", START.replace(minute=55)) == {("yes", Decimal("0.5")): Decimal(3)}
    assert book_at(client, "A", hour) == {}


def test_a_snapshot_at_the_hours_start_replaces_the_checkpoint(client: Client) -> None:
    hour = START.replace(hour=13, minute=0)
    common = {"market_ticker": "A", "conn_id": uuid(1), "sid": 1}
    old = {"side": "yes", "price": Decimal("0.5"), "size": Decimal(3)}
    new = {"side": "no", "price": Decimal("0.4"), "size": Decimal(7)}
    insert(
        client, BOOK_CHECKPOINTS, [{**common, **old, "market_id": uuid(0), "ts": hour, "seq": 8}]
    )
    assert book_at(client, "A", hour) == {("yes", Decimal("0.5")): Decimal(3)}
    insert(client, STREAM_EVENTS, [{**common, "kind": "snapshot", "seq": 9, "ingest_ts": hour}])
    insert(
        client,
        ORDERBOOK_EVENTS,
        [{**common, **new, "market_id": uuid(0), "type": "snapshot", "seq": 9, "ingest_ts": hour}],
    )
    assert book_at(client, "A", hour) == {("no", Decimal("0.4")): Decimal(7)}


def test_book_at_has_the_time_of_the_last_event(client: Client) -> None:
    recording = Recording(5)
    recording.run(50)
    insert(client, ORDERBOOK_EVENTS, recording.events)
    insert(client, STREAM_EVENTS, recording.stream)
    market = "A"
    last = max(e["ingest_ts"] for e in recording.events if e["market_ticker"] == market)
    assert one_row(
        client,
        "SELECT DISTINCT market_ticker, last_event_ts"
        f" FROM book_at(ticker = '{market}', at = '2030-01-01 00:00:00')",
    ) == (market, last)


def test_top_of_book_turns_no_bids_into_yes_asks(client: Client) -> None:
    def level(market: str, side: str, price: str, size: str, version: int = 1) -> dict[str, Any]:
        return {
            "market_id": uuid(1),
            "market_ticker": market,
            "side": side,
            "price": Decimal(price),
            "size": Decimal(size),
            "ingest_ts": START + timedelta(seconds=version),
            "version": version,
        }

    rows = [
        level("BOTH", "yes", "0.4000", "7.50"),
        level("BOTH", "yes", "0.3900", "90.00"),
        level("BOTH", "yes", "0.4100", "5.00"),
        level("BOTH", "no", "0.5799", "2.25"),
        level("BOTH", "no", "0.1000", "11.00"),
        level("ONE SIDE", "no", "0.9900", "1.00"),
        level("EMPTY", "yes", "0.5000", "0.00"),
    ]
    insert(client, LATEST_LEVELS, rows)
    insert(client, LATEST_LEVELS, [level("BOTH", "yes", "0.4100", "0.00", version=2)])
    found = client.query("SELECT * FROM top_of_book ORDER BY market_ticker")
    both, one_side = (dict(zip(found.column_names, row, strict=True)) for row in found.result_rows)
    assert both.pop("age_seconds") > 0
    assert both == {
        "market_ticker": "BOTH",
        "yes_bid": Decimal("0.4000"),
        "yes_bid_size": Decimal("7.50"),
        "yes_ask": Decimal("0.4201"),
        "yes_ask_size": Decimal("2.25"),
        "mid": Decimal("0.41005"),
        "spread": Decimal("0.0201"),
        "last_event_ts": START + timedelta(seconds=2),
    }
    assert one_side["yes_ask"] == Decimal("0.0100")
    assert [one_side[c] for c in ("yes_bid", "yes_bid_size", "mid", "spread")] == [None] * 4


def test_the_views_read_what_they_need_and_no_more(client: Client) -> None:
    """An hour's checkpoint bounds the read, however long the market has been recorded."""
    client.command(
        "INSERT INTO orderbook_events (type, conn_id, sid, seq, market_ticker, side, price, size,"
        " ingest_ts) SELECT 'delta', toUUID('" + uuid(1) + "'), 1, number + 1, 'A', 'yes', 0.5, 1,"
        " toDateTime64('2026-11-22 00:00:00', 6, 'UTC') + number / 10 FROM numbers(700000)"
    )
    hour = datetime(2026, 11, 22, 19, tzinfo=UTC)
    insert(client, BOOK_CHECKPOINTS, [
        {"ts": hour, "conn_id": uuid(1), "sid": 1, "seq": 684_000, "market_id": uuid(0),
         "market_ticker": "A", "side": "yes", "price": Decimal("0.5"), "size": Decimal(1)}
    ])  # fmt: skip
    answer = client.query(
        "SELECT * FROM book_at(ticker = 'A', at = '2026-11-22 19:10:00')"
        " SETTINGS force_primary_key = 1"
    )
    assert answer.row_count == 1
    assert int(answer.summary["read_rows"]) < 50_000

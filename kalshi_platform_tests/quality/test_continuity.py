"""The proof of a time span has the same findings as the proof of everything."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest

from kalshi_platform.clickhouse.client import Client
from kalshi_platform.quality import continuity
from kalshi_platform.quality.continuity import Proof, extent, prove
from kalshi_platform.schema import ORDERBOOK_EVENTS, STREAM_EVENTS
from kalshi_platform_tests.clickhouse.tables import insert, migrated, uuid

BEGUN = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=10)


@pytest.fixture(scope="module")
def database(clickhouse_url: str) -> Iterator[Client]:
    """A client of a migrated database for this module."""
    name = f"test_{uuid4().hex}"
    with migrated(clickhouse_url, name) as client:
        yield client
        client.command(f"DROP DATABASE {name} SYNC")


@pytest.fixture
def client(database: Client) -> Client:
    """The same with nothing in it."""
    for table in (ORDERBOOK_EVENTS.name, STREAM_EVENTS.name, "retention_changes"):
        database.command(f"TRUNCATE TABLE {table}")
    return database


@pytest.fixture(autouse=True)
def _large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table is a large one, of which three hours are proved."""
    monkeypatch.setattr(continuity, "WHOLE_EVENTS", 0)


def keep(client: Client, frames: dict[int, float]) -> None:
    """Deltas by number, each with the hour after BEGUN at which it came; and a last heartbeat."""
    of = {"conn_id": uuid(1), "sid": 1}

    def delta(seq: int, hours: float) -> dict[str, Any]:
        level = {"type": "delta", "market_id": uuid(9), "market_ticker": "A", "side": "yes"}
        return {**of, **level, "seq": seq, "price": Decimal("0.5"), "ingest_ts": at(hours)}

    insert(client, ORDERBOOK_EVENTS, [delta(seq, hours) for seq, hours in frames.items()])
    beginning = {**of, "kind": "subscribed", "ingest_ts": at(0)}
    heartbeat = {"conn_id": uuid(0), "kind": "heartbeat", "ingest_ts": at(10)}
    insert(client, STREAM_EVENTS, [beginning, heartbeat])


def at(hours: float) -> datetime:
    return BEGUN + timedelta(hours=hours)


def proved(client: Client, since: datetime | None = None) -> Proof:
    return prove(client, extent(client), since)


def test_a_small_table_is_proved_whole(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuity, "WHOLE_EVENTS", 100)
    keep(client, {1: 1, 2: 2, 4: 3})
    found = proved(client)
    assert (found.since, found.until, found.frames) == (at(0), at(10), 3)
    assert [row["unexplained_holes"] for row in found.offenders] == [1]


def test_of_a_large_table_the_newest_hours_are_read(client: Client) -> None:
    keep(client, {1: 1, 2: 2, 4: 5, 5: 8, 6: 9})
    found = proved(client)
    assert (found.since, found.frames, found.offenders) == (at(7), 2, ())


def test_a_connection_silent_before_the_window_is_proved_whole(client: Client) -> None:
    keep(client, {1: 1, 2: 2, 4: 3, 5: 8, 6: 9})
    found = proved(client)
    assert found.since == at(0)
    assert [row["unexplained_holes"] for row in found.offenders] == [1]


def test_what_is_unproved_is_read_too(client: Client) -> None:
    keep(client, {1: 1, 2: 2, 4: 3, 5: 8, 6: 9})
    found = proved(client, since=at(1.5))
    assert [row["unexplained_holes"] for row in found.offenders] == [1]


def test_a_hole_in_the_window_is_found(client: Client) -> None:
    keep(client, {1: 1, 2: 8, 4: 9})
    (row,) = proved(client).offenders
    assert (str(row["conn_id"]), row["sid"], row["unexplained_holes"]) == (uuid(1), 1, 1)


def test_a_frame_moved_over_the_windows_edge_by_the_clock_is_no_gap(
    client: Client,
) -> None:
    keep(client, {1: 1, 2: 7.1, 3: 6.9, 4: 7.2})
    found = proved(client)
    assert (found.since, found.offenders) == (at(0), ())


def test_what_only_one_table_has_yet_is_not_judged(client: Client) -> None:
    keep(client, {1: 8, 2: 9, 4: 10.1})  # 3 is an answer that stream_events does not have yet
    found = proved(client)
    assert (found.until, found.frames, found.offenders) == (at(10), 2, ())


def test_what_retention_takes_at_this_moment_is_not_judged(client: Client) -> None:
    keep(client, {100: 8.0, 101: 9.0})  # 1 to 99 were taken; the row of the subscription not yet
    client.command("TRUNCATE TABLE stream_events")
    subscribed = {"kind": "subscribed", "conn_id": uuid(1), "sid": 1, "ingest_ts": at(-15)}
    heartbeat = {"conn_id": uuid(0), "kind": "heartbeat", "ingest_ts": at(10)}
    insert(client, STREAM_EVENTS, [subscribed, heartbeat])
    assert [row["unexplained_holes"] for row in proved(client, since=at(-80)).offenders] == [99]
    client.command("INSERT INTO retention_changes (taken_before) SELECT now() - toIntervalDay(1)")
    found = proved(client, since=at(-80))
    assert (found.frames, found.offenders) == (2, ())


def test_half_a_window_is_missing_if_the_connection_continued(client: Client) -> None:
    """The last number before the window is compared with the first one in it."""
    keep(client, {seq: 5.9 + seq / 10 for seq in range(1, 40)})
    client.command("DELETE FROM stream_events WHERE kind = 'subscribed'")
    client.command("DELETE FROM orderbook_events WHERE seq BETWEEN 12 AND 25")
    assert [row["unexplained_holes"] for row in proved(client).offenders] == [14]


def test_a_quiet_subscription_of_an_open_connection_is_no_gap(client: Client) -> None:
    """Its last number is older than what is read before the window."""
    keep(client, {1: 1, 2: 6.9, 3: 8})
    level = {"type": "delta", "market_id": uuid(9), "market_ticker": "A", "side": "yes"}
    quiet = {"conn_id": uuid(1), "sid": 2, "price": Decimal("0.5"), **level}
    rows = [{**quiet, "seq": seq, "ingest_ts": at(hours)} for seq, hours in ((1, 1), (2, 9))]
    insert(client, ORDERBOOK_EVENTS, rows)
    found = proved(client)
    assert (found.since, found.offenders) == (at(7), ())

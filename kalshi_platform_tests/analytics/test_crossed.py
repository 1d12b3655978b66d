"""Which crossed states count: verified ones that last beyond one matching event."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import polars as pl

from kalshi_platform.analytics.crossed import COLUMNS, lasting
from kalshi_platform.schema import SPREADS

HOUR = datetime(2026, 11, 22, 14, tzinfo=UTC)
TYPES = pl.Schema(pl.DataFrame(SPREADS.arrow.empty_table()).select(COLUMNS).schema)
TYPES.update(market_ticker=pl.String(), conn_id=pl.String())


def at(seconds: float) -> datetime:
    return HOUR + timedelta(seconds=seconds)


def state(
    seconds: float,
    bid: str | None,
    ask: str | None,
    *,
    ts: float | None = None,
    ticker: str = "A",
    verified: bool = True,
) -> dict[str, Any]:
    """A state that begins `seconds` into the hour; `ts` likewise, by default at the same time."""
    return {
        "market_ticker": ticker,
        "conn_id": "c",
        "sid": 1,
        "seq": int(seconds),
        "ts": at(seconds if ts is None else ts),
        "ingest_ts": at(seconds),
        "verified": verified,
        "yes_bid": Decimal(bid) if bid else None,
        "yes_ask": Decimal(ask) if ask else None,
    }


def found(*states: dict[str, Any], until: float = 1000.0) -> list[tuple[str, float, float, bool]]:
    """(market, seconds into the hour, seconds that it lasted, whether it lasts still)."""
    frame = lasting(pl.DataFrame(list(states), schema=TYPES), at(until), 5.0)
    return [
        (row["market_ticker"], (row["since"] - HOUR).total_seconds(), row["lasted_s"], row["lasts"])
        for row in frame.to_dicts()
    ]


def test_a_lasting_crossed_state_is_reported_from_its_first_instant() -> None:
    assert found(
        state(0, "0.40", "0.50"),
        state(10, "0.55", "0.50"),
        state(14, "0.55", "0.55"),  # locked counts as crossed
        state(20, "0.40", "0.50"),
    ) == [("A", 10.0, 10.0, False)]


def test_a_state_that_still_holds_lasts_until_now() -> None:
    assert found(state(10, "0.55", "0.50"), until=40) == [("A", 10.0, 30.0, True)]


def test_short_unverified_and_one_sided_states_do_not_count() -> None:
    assert found(state(0, "0.55", "0.50"), state(4, "0.40", "0.50")) == []
    assert found(state(0, "0.55", "0.50", verified=False)) == []
    assert found(state(0, "0.55", None), state(60, None, "0.01")) == []


def test_states_within_one_matching_event_do_not_count() -> None:
    assert found(state(0, "0.55", "0.50"), state(60, "0.40", "0.50", ts=0)) == []


def test_states_without_an_exchange_time_are_states() -> None:
    first = state(0, "0.55", "0.50") | {"ts": None}
    second = state(60, "0.40", "0.50") | {"ts": None}
    assert found(first, second) == [("A", 0.0, 60.0, False)]


def test_a_state_holds_until_the_end_of_its_hour_at_most() -> None:
    assert found(state(3590, "0.55", "0.50"), until=9000) == [("A", 3590.0, 10.0, False)]
    assert found(
        state(3590, "0.55", "0.50"),
        state(3600, "0.55", "0.50"),
        state(3605, "0.4", "0.5"),
        until=9000,
    ) == [("A", 3590.0, 15.0, False)]


def test_markets_are_separate_and_the_longest_comes_first() -> None:
    assert found(
        state(0, "0.55", "0.50"),
        state(10, "0.40", "0.50"),
        state(0, "0.55", "0.50", ticker="B"),
        state(30, "0.40", "0.50", ticker="B"),
    ) == [("B", 0.0, 30.0, False), ("A", 0.0, 10.0, False)]

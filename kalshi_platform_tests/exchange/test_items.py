"""An unreadable item costs only itself: the other items of its page are kept, and it is reported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kalshi_platform.exchange.errors import ExchangeError
from kalshi_platform.exchange.items import Unreadable
from kalshi_platform.exchange.rest import Params, RestClient
from kalshi_platform.inventory import positions
from kalshi_platform.inventory.positions import Held
from kalshi_platform.recorder import market_catalog
from kalshi_platform.recorder.universe import MarketSelection, Universe
from kalshi_platform.settings import Exchange
from kalshi_platform_tests.properties import examples

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)


class Pages(RestClient):
    """A client that receives these pages, selected by the last segment of the path."""

    def __init__(self, pages: Mapping[str, Any]) -> None:
        nowhere = Exchange("ws://127.0.0.1:1", "http://127.0.0.1:1", "id", Path("none"), True)
        super().__init__(nowhere, signed=False)
        self._pages_by_end = pages

    def _fetch(self, path: str, params: Params) -> bytes:
        body = self._pages_by_end[path.rpartition("/")[2]]
        if "fills" in body and params.get("ticker"):
            body = {
                "fills": [row for row in body["fills"] if _ticker(row) in {params["ticker"], None}]
            }
        return json.dumps({"cursor": ""} | body).encode()


def _ticker(item: Any) -> Any:
    return item.get("ticker") if isinstance(item, dict) else None


def market(number: int, **others: Any) -> dict[str, Any]:
    return {
        "ticker": f"KXA-1-T{number}",
        "event_ticker": "KXA-1",
        "status": "active",
        "title": "Title",
        "open_time": "2026-11-01T00:00:00Z",
        "close_time": "2027-01-01T00:00:00Z",
        "volume_fp": "12.30",
        "result": "",
        "settlement_value_dollars": None,
        "price_ranges": [{"start": "0.0000", "end": "1.0000", "step": "0.0100"}],
    } | others


def position(number: int, held: str = "5.00", **others: Any) -> dict[str, Any]:
    return {
        "ticker": f"KXA-1-T{number}",
        "position_fp": held,
        "market_exposure_dollars": "2.500000",
    } | others


def fill(number: int, **others: Any) -> dict[str, Any]:
    return {
        "fill_id": f"fill-{number}",
        "order_id": "order",
        "ticker": f"KXA-1-T{number}",
        "outcome_side": "yes",
        "count_fp": "5.00",
        "yes_price_dollars": "0.5000",
        "no_price_dollars": "0.5000",
        "created_time": (NOW - timedelta(hours=1)).isoformat(),
        "is_taker": True,
        "fee_cost": "0.010000",
    } | others


@pytest.mark.parametrize(
    ("field", "value", "kept"),
    [
        ("result", None, True),
        ("title", None, True),
        ("close_time", "", True),
        ("close_time", "2027-01-01T00:00:00", True),
        ("settlement_value_dollars", "0.333333", True),
        ("settlement_value_dollars", "123456.0000", True),
        ("volume_fp", "", True),
        ("volume_fp", "12.3456", True),
        ("price_ranges", [{"start": "0"}], True),
        ("status", None, False),
        ("event_ticker", 7, False),
    ],
)
def test_an_unreadable_market_field_is_reported_and_costs_no_page(
    field: str, value: Any, kept: bool
) -> None:
    reports: list[Unreadable] = []
    rest = Pages({"markets": {"markets": [market(1), market(2, **{field: value}), market(3)]}})
    found = rest.markets(report=reports.append)
    assert [row.ticker for row in found if row.ticker != "KXA-1-T2"] == ["KXA-1-T1", "KXA-1-T3"]
    assert len(found) == (3 if kept else 2)
    (odd,) = reports
    assert (odd.ticker, odd.field, odd.left_out) == ("KXA-1-T2", field, not kept)
    assert json.dumps(value) in str(odd)
    universe = Universe(MarketSelection(series=("KXA",)))
    universe.apply_list(found, NOW.timestamp())
    assert {"KXA-1-T1", "KXA-1-T3"} <= set(universe.wanted(NOW.timestamp()))
    assert market_catalog._table(found, NOW).num_rows == len(found)


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["", "0.333333", "-1", "1e9", "9" * 40, "0001-01-01T00:00:00+14:00"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def odd(draw: st.DrawFn, whole: dict[str, Any]) -> Any:
    """Anything in place of an item, or of some of its fields."""
    if draw(st.booleans()):
        return draw(anything)
    fields = draw(st.dictionaries(st.sampled_from(sorted(whole)), anything, min_size=1, max_size=3))
    gone = draw(st.sets(st.sampled_from(sorted(whole)), max_size=1))
    return {name: value for name, value in (whole | fields).items() if name not in gone}


@given(odd(market(2)))
@examples(100)
def test_any_unreadable_market_costs_only_itself(item: Any) -> None:
    rest = Pages({"markets": {"markets": [market(1), item, market(3)]}})
    found = rest.markets(report=lambda _: None)
    assert {found[0].ticker, found[-1].ticker} == {"KXA-1-T1", "KXA-1-T3"}
    assert len(found) in {2, 3}
    universe = Universe(MarketSelection(series=("KXA",), tickers=("KXA-1-T3",)))
    universe.apply_list(found, NOW.timestamp())
    assert {"KXA-1-T1", "KXA-1-T3"} <= set(universe.wanted(NOW.timestamp()))
    assert market_catalog._table(found, NOW).num_rows == len(found)


def take(pages: Mapping[str, Any], known: Mapping[str, Held | None]) -> positions.Report:
    return positions.take(
        Pages({"user_data_timestamp": {"as_of_time": NOW.isoformat()}} | dict(pages)),
        known,
        sleep=lambda _: None,
        clock=lambda: NOW,
    )


def pages(held: list[Any], filled: list[Any], settled: list[Any] = []) -> dict[str, Any]:  # noqa: B006
    return {
        "positions": {"market_positions": held},
        "fills": {"fills": filled},
        "settlements": {"settlements": settled},
    }


BEFORE = Held(Decimal(0), NOW - timedelta(hours=2))


@given(odd(position(2)))
@examples(100)
def test_an_unreadable_position_is_never_taken_as_flat(item: Any) -> None:
    known = {f"KXA-1-T{n}": BEFORE for n in (1, 2, 3, 4)}
    found = take(pages([position(1), item, position(3, "-2.00")], [fill(1)]), known)
    held = {row.market_ticker: row.position for row in found.snapshots}
    assert held["KXA-1-T3"] == Decimal("-2.00") or _ticker(item) == "KXA-1-T3"
    assert held["KXA-1-T1"] == Decimal("5.00") or _ticker(item) == "KXA-1-T1"
    if any(row.left_out for row in found.unreadable):
        flat = {row.market_ticker for row in found.snapshots if row.source != "positions"}
        assert not flat
        assert {"KXA-1-T2", "KXA-1-T4"} <= found.left_out.keys()
        assert "incomplete" in found.left_out["KXA-1-T4"]


@given(odd(fill(2)))
@examples(100)
@example(fill(2) | {"ticker": "0", "count_fp": None})
def test_an_unreadable_fill_is_never_taken_as_flat(item: Any) -> None:
    known = {f"KXA-1-T{n}": BEFORE for n in (1, 2)}
    try:
        found = take(pages([position(1)], [item, fill(1)]), known)
    except ExchangeError as error:  # a fill dated later than the positions
        assert "would be old" in str(error)
        return
    if not (odd_fills := [row for row in found.unreadable if row.left_out]):
        return
    held = {row.market_ticker: row for row in found.snapshots}
    tickers = {row.ticker for row in odd_fills}
    assert not held.keys() & tickers
    if "" in tickers:  # the fill's ticker cannot be read: it may belong to any market
        assert not held
    if tickers == {"KXA-1-T2"}:
        assert held["KXA-1-T1"].position == Decimal("5.00")


def test_a_fill_without_a_time_leaves_its_market_out() -> None:
    timeless = {name: value for name, value in fill(2).items() if name != "created_time"}
    known = {"KXA-1-T1": BEFORE, "KXA-1-T2": BEFORE}
    found = take(pages([position(1)], [timeless, fill(1)]), known)
    assert [row.market_ticker for row in found.snapshots] == ["KXA-1-T1"]
    assert found.left_out == {"KXA-1-T2": "a fill cannot be read"}
    (odd_one,) = found.unreadable
    assert str(odd_one) == (
        "GET /portfolio/fills: KXA-1-T2: created_time is missing; the item is left out."
    )

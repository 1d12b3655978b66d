"""The order flow: seeded, exact, never crossed for long, and alive."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalshi_platform.simulator.book import NO, YES, Book
from kalshi_platform.simulator.grid import STRUCTURES, covering, grid
from kalshi_platform.simulator.orderflow import OrderFlow


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_grid_mirrors_itself_around_fifty_cents(structure: str) -> None:
    prices = grid(structure).prices
    assert [10_000 - price for price in reversed(prices)] == list(prices)


def test_a_tapered_grid_is_fine_at_the_edges_only() -> None:
    texts = grid("tapered_deci_cent").texts
    assert {"0.0990", "0.1000", "0.1100", "0.9010"} <= set(texts)
    assert "0.1010" not in texts


def test_the_coarsest_grid_that_fits_is_found() -> None:
    assert covering(frozenset({100, 9900})).name == "linear_cent"
    assert covering(frozenset({10, 5000})).name == "deci_cent"
    assert covering(frozenset({1, 5010})).name == "center_deci_edge_centi_cent"
    assert covering(frozenset({5001})).name == ""


@given(st.text(min_size=1, max_size=8), st.sampled_from(STRUCTURES))
@settings(max_examples=25, deadline=None)
def test_books_stay_exact_and_uncrossed_under_any_seed(seed: str, structure: str) -> None:
    book = Book(grid(structure))
    flow = OrderFlow(book.grid, seed)
    shadow: dict[tuple[int, int], int] = {}

    def remember(changes: list[tuple[int, int, int]]) -> None:
        for side, level, qty in changes:
            shadow[side, level] = shadow.get((side, level), 0) + qty

    remember(flow.opening(book))
    for _ in range(400):
        changes, _ = flow.step(book)
        assert changes
        assert all(qty for _, _, qty in changes)
        remember(changes)
        assert not book.crossed
    for side in (YES, NO):
        kept = {level: size for level, size in enumerate(book.sizes[side]) if size}
        assert kept == {level: size for (s, level), size in shadow.items() if s == side and size}
        assert book.best[side] == max(kept, default=-1)


def test_the_same_seed_gives_the_same_steps() -> None:
    def steps(seed: str) -> list[object]:
        book = Book(grid("deci_cent"))
        flow = OrderFlow(book.grid, seed)
        return [flow.opening(book), *(flow.step(book) for _ in range(300))]

    assert steps("a") == steps("a")
    assert steps("a") != steps("b")


def test_the_flow_has_what_real_flow_has() -> None:
    book = Book(grid("linear_cent"))
    flow = OrderFlow(book.grid, "lively")
    opening = flow.opening(book)
    events = [flow.step(book) for _ in range(5_000)]
    changes = [change for event, _ in events for change in event]
    assert any(qty > 0 for _, _, qty in changes)
    assert any(qty < 0 for _, _, qty in changes)
    assert any(qty % 100 for _, _, qty in changes), "no fractional sizes"
    assert max(qty for _, _, qty in opening) > 20_000_00, "no large level"
    sweeps = [(event, prints) for event, prints in events if prints]
    assert any(len(event) > 1 for event, _ in sweeps), "no order took several levels"
    for event, prints in sweeps:
        assert [-qty for _, _, qty in event] == [match.qty for match in prints]


def test_a_level_cannot_hold_less_than_nothing() -> None:
    book = Book(grid("linear_cent"))
    book.change(YES, 10, 500)
    with pytest.raises(ValueError, match="less than nothing"):
        book.change(YES, 10, -501)

"""The levels of all books; consecutive states share unchanged levels."""

from __future__ import annotations

import itertools

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.loading import book_state, sorted_levels
from kalshi_platform.loading.book_state import Ladders, level_number
from kalshi_platform.loading.sorted_levels import PACKED, SortedLevels

MARKETS, PRICES = range(6), (0, 100, 4_800, 10_000)
Sizes = dict[tuple[int, str, int], int]
levels = st.tuples(
    st.sampled_from(MARKETS), st.sampled_from(("yes", "no")), st.sampled_from(PRICES)
)


@given(
    st.lists(
        st.tuples(
            st.dictionaries(levels, st.integers(0, 9), max_size=12),
            st.sets(st.sampled_from(MARKETS), max_size=2),
        ),
        max_size=20,
    ),
    st.sampled_from([0, 5, 1 << 15]),
    st.sampled_from([1, 3, 1 << 16]),
    st.sets(levels),
    st.sets(st.sampled_from(MARKETS)),
)
def test_levels_are_the_last_written_after_any_merges(
    changes: list[tuple[Sizes, set[int]]],
    kept_apart: int,
    of_a_leaf: int,
    asked: set[tuple[int, str, int]],
    of: set[int],
) -> None:
    ladders, sizes = Ladders(), Sizes()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(book_state, "RECENT_LEVELS", kept_apart)
        patched.setattr(sorted_levels, "LEAF_LEVELS", of_a_leaf)
        for changed, renewed in changes:
            before, expected = ladders, dict(sizes)
            ladders = ladders.changed(packed(changed), pl.Series(list(renewed), dtype=pl.Int64))
            sizes = {level: size for level, size in sizes.items() if level[0] not in renewed}
            sizes = {level: size for level, size in (sizes | changed).items() if size}
            assert rows(before.all()) == rows(packed(expected))  # states do not change each other
            assert ladders.all().equals(packed(sizes).sort("level"))
            assert_leaves_of(ladders.base, of_a_leaf)
    heights = [sum(level[0] == market for level in sizes) for market in MARKETS]
    assert ladders.heights(pl.Series(list(MARKETS), dtype=pl.Int64)).tolist() == heights
    assert ladders.heights(pl.Series([5, 0, 3], dtype=pl.Int64)).tolist() == [
        heights[market] for market in (5, 0, 3)
    ]
    found = ladders.of(
        packed(dict.fromkeys(asked, 1))["level"], pl.Series(list(of), dtype=pl.Int64)
    )
    assert found.height == found["level"].n_unique()
    assert rows(found) == rows(
        packed({it: size for it, size in sizes.items() if it in asked or it[0] in of})
    )


def assert_leaves_of(base: SortedLevels, most: int) -> None:
    heights = [leaf.height for leaf in base.leaves]
    assert all(0 < height <= most for height in heights)
    assert all(one + next_one > most for one, next_one in itertools.pairwise(heights))
    assert base.height == sum(heights)


def packed(sizes: Sizes) -> pl.DataFrame:
    return (
        pl.DataFrame(
            [(*level, size) for level, size in sizes.items()],
            schema={"market": pl.Int64, "side": pl.String, "price": pl.Int64, "size": pl.Int64},
            orient="row",
        )
        .select(level_number().alias("level"), "size")
        .cast(PACKED)
    )


def rows(frame: pl.DataFrame) -> list[tuple[int, int]]:
    return sorted(frame.select(PACKED.names()).iter_rows())


def test_consecutive_states_share_unchanged_levels() -> None:
    all_levels = {(market, "yes", price): 1 for market in range(20_000) for price in (1, 2, 3)}
    first = Ladders().changed(packed(all_levels), pl.Series([], dtype=pl.Int64))
    then = first.changed(packed({(7, "yes", 2): 0, (8, "no", 5): 4}), pl.Series([9]))
    assert then.base is first.base
    assert then.recent.height == 5


def test_a_merge_shares_the_leaves_that_have_no_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorted_levels, "LEAF_LEVELS", 1_000)
    before = SortedLevels.of(numbered_levels(range(0, 20_000, 2)))
    at_an_end = before.changed(numbered_levels(range(20_000, 40_000)))
    amid = at_an_end.changed(numbered_levels([1, 20_000, 7_001]))
    new = [leaf for leaf in at_an_end.leaves if all(leaf is not old for old in before.leaves)]
    assert len(before.leaves) == 10
    assert (
        len(new) <= 1 + 20_000 / 1_000 + 1
    )  # the last one, which was full, and what came behind it
    assert len({*map(id, amid.leaves)} - {*map(id, at_an_end.leaves)}) <= 6  # three, each in two
    assert pl.concat(before.leaves).equals(numbered_levels(range(0, 20_000, 2)))


def test_a_leaf_keeps_no_other_levels_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice would hold all that it was cut from, also when its neighbours have been replaced."""
    monkeypatch.setattr(sorted_levels, "LEAF_LEVELS", 1_000)
    leaves = SortedLevels().changed(numbered_levels(range(10_000))).leaves
    places = sorted(leaf["level"].to_numpy().ctypes.data for leaf in leaves)
    assert len(leaves) == 10
    assert 8_000 not in np.diff(places)


def numbered_levels(levels: range | list[int]) -> pl.DataFrame:
    return pl.DataFrame({"level": sorted(levels), "size": [1] * len(levels)}, schema=PACKED)

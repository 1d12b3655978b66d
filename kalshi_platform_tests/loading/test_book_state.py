"""The levels of all books, of which states share what has not changed for a while."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.loading import book_state
from kalshi_platform.loading.book_state import PACKED, Ladders, level_number

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
    st.sampled_from([1, 3, 1 << 18]),
    st.sets(levels),
    st.sets(st.sampled_from(MARKETS)),
)
def test_levels_are_what_was_put_there_last_however_often_they_are_merged(
    changes: list[tuple[Sizes, set[int]]],
    kept_apart: int,
    merged_at_once: int,
    asked: set[tuple[int, str, int]],
    of: set[int],
) -> None:
    ladders, sizes = Ladders(), Sizes()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(book_state, "RECENT_LEVELS", kept_apart)
        patched.setattr(book_state, "MERGED_LEVELS", merged_at_once)
        for changed, renewed in changes:
            before, expected = ladders, dict(sizes)
            ladders = ladders.changed(packed(changed), pl.Series(list(renewed), dtype=pl.Int64))
            sizes = {level: size for level, size in sizes.items() if level[0] not in renewed}
            sizes = {level: size for level, size in (sizes | changed).items() if size}
            assert rows(before.all()) == rows(packed(expected))  # states do not change each other
            assert ladders.all().equals(packed(sizes).sort("level"))
    heights = [sum(level[0] == market for level in sizes) for market in MARKETS]
    assert ladders.heights(pl.Series(list(MARKETS), dtype=pl.Int64)).tolist() == heights
    for rows_at_a_time in (1, 3, 100):
        batches = list(ladders.batches(rows_at_a_time))
        assert pl.concat(batches).equals(ladders.all())
    found = ladders.of(
        packed(dict.fromkeys(asked, 1))["level"], pl.Series(list(of), dtype=pl.Int64)
    )
    assert found.height == found["level"].n_unique()
    assert rows(found) == rows(
        packed({it: size for it, size in sizes.items() if it in asked or it[0] in of})
    )


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


def test_states_that_follow_each_other_share_the_levels_that_did_not_change() -> None:
    all_levels = {(market, "yes", price): 1 for market in range(20_000) for price in (1, 2, 3)}
    first = Ladders().changed(packed(all_levels), pl.Series([], dtype=pl.Int64))
    then = first.changed(packed({(7, "yes", 2): 0, (8, "no", 5): 4}), pl.Series([9]))
    assert then.base is first.base
    assert then.recent.height == 5

"""`NumberSet` behaves as Python's own sets do."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kalshi_platform.exchange.columnar_numbers import NumberSet, gaps_between, merge_ranges

NUMBER = st.one_of(
    st.integers(0, 200),
    st.integers((1 << 20) - 70, (1 << 20) + 70),  # across the end of a block
    st.sampled_from([63, 64, 65, (1 << 40), (1 << 64) - 1]),
)
SETS = st.lists(NUMBER, max_size=30)


def numbers(*batches: list[int]) -> NumberSet:
    made = NumberSet()
    for batch in batches:
        made.add(np.array(batch, dtype=np.uint64))
        made.compress_idle()
    return made


def members(of: NumberSet) -> set[int]:
    return {n for first, end in of.runs() for n in range(first, end)}


@hypothesis_settings(max_examples=50)
@given(one=SETS, more=SETS, other=SETS, a=NUMBER, b=NUMBER)
def test_number_sets_equal_python_sets(
    one: list[int], more: list[int], other: list[int], a: int, b: int
) -> None:
    here, there = numbers(one, more, []), numbers(other)
    wanted = {*one, *more}
    assert members(here) == wanted
    assert (len(here), bool(here)) == (len(wanted), bool(wanted))
    if wanted:
        assert (here.first, here.last) == (min(wanted), max(wanted))
    assert here.count(a, b) == sum(a <= n < b for n in wanted)
    assert members(here.difference(there)) == wanted - set(other)
    assert members(here.before(a)) == {n for n in wanted if n < a}
    there.update(here)
    assert members(there) == wanted | set(other)
    assert members(here) == wanted


@given(ranges=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=8))
def test_merged_ranges_and_gaps_partition_the_whole(
    ranges: list[tuple[int, int]],
) -> None:
    wanted = {n for first, end in ranges for n in range(first, end)}
    joined = merge_ranges(ranges)
    assert [n for first, end in joined for n in range(first, end)] == sorted(wanted)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(joined))
    left = [n for first, end in gaps_between(joined, 5, 25) for n in range(first, end)]
    assert left == [n for n in range(5, 25) if n not in wanted]


def test_a_month_of_numbers_takes_little_memory() -> None:
    made = NumberSet()
    for start in range(0, 64 << 20, 1 << 20):
        made.add(np.arange(start, start + (1 << 20), dtype=np.uint64))
        made.compress_idle()
    made.compress_idle()
    made.compress_idle()
    assert len(made) == 64 << 20
    assert not made._open
    assert sum(map(len, made._compressed.values())) < 64 * 1024

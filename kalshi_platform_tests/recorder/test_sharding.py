"""The share of part shard: part market in exactly one, evenly, and changing N moves the minimum."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kalshi_platform.recorder.sharding import shard_of, share

TICKERS = st.text(min_size=1, max_size=40)


@given(st.lists(TICKERS, unique=True, max_size=40), st.integers(1, 12))
def test_every_market_is_in_exactly_one_share_in_order(tickers: list[str], shards: int) -> None:
    shares = [share(tickers, shard, shards) for shard in range(shards)]
    assert sorted(ticker for part in shares for ticker in part) == sorted(tickers)
    for part in shares:
        assert part == [ticker for ticker in tickers if ticker in set(part)]


@given(TICKERS, st.integers(1, 12))
def test_an_added_shard_moves_markets_only_to_itself(ticker: str, shards: int) -> None:
    assert shard_of(ticker, shards + 1) in {shard_of(ticker, shards), shards}


def test_shares_are_even_and_an_added_shard_moves_few() -> None:
    tickers = [f"KXHIGHNY-26NOV{day:02d}-T{degrees}" for day in range(50) for degrees in range(80)]
    for shards in (2, 3, 4, 8):
        counts = [len(share(tickers, shard, shards)) for shard in range(shards)]
        assert max(abs(count * shards / len(tickers) - 1) for count in counts) < 0.15
        moved = sum(shard_of(t, shards) != shard_of(t, shards + 1) for t in tickers)
        assert abs(moved * (shards + 1) / len(tickers) - 1) < 0.15


def test_the_share_is_the_same_in_every_version() -> None:
    """A different result would move every market at an upgrade."""
    tickers = ["KXHIGHNY-26NOV24-T50", "KXBTCD-26NOV2417-T90000", "SIM-1", "A-1"]
    assert [shard_of(ticker, 4) for ticker in tickers] == [2, 0, 1, 3]

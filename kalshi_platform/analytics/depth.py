"""Compute the dataset `depth`: the sizes that rest on both sides, once a second if they changed."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from kalshi_platform.analytics.books import Books
from kalshi_platform.analytics.columns import Array, Bools, Ints, decimals, names, times
from kalshi_platform.analytics.frames import NONE, SECOND_US
from kalshi_platform.analytics.ladder import CENTS, Side
from kalshi_platform.exchange.numbers import ONE_DOLLAR
from kalshi_platform.schema import DEPTH, NOTIONAL, PRICE, QTY


def depth(books: Books) -> pa.Table:
    """Make one row for every second at whose end a market's depth differs from its row before.

    A second without a row has the depth of the newest row before it; the first row of a market is that of its
    first second in the hour. `second` is the second's first instant, of receive time; the state is that after
    its last frame. The row is known at the second's end, `known_at`: a join on `second` would look up to a
    second into the future.

        bid size within n cents = sum of the sizes of YES bids at yes_bid - n cents and above
        ask size within n cents = sum of the sizes of YES asks at yes_ask + n cents and below
        notional = sum of size * YES price over all levels of the side: the dollars paid if the
                   whole side is taken                                    [contracts, dollars; exact]

    Asks are the NO bids, each at 1 - its price. An empty side has sizes, levels and notional of 0 and
    no best price. `verified` holds for the second's end.
    """
    sides, at = books.sides, books.seconds
    notional = {
        "bid": sides["bid"].value,
        "ask": sides["ask"].all * ONE_DOLLAR - sides["ask"].value,
    }
    numbers: list[Array] = [books.frames.verified[at]]
    for name, side in sides.items():
        numbers += [side.price, *side.within.values(), side.all, side.levels, notional[name]]
    rows = np.flatnonzero(changed(books, numbers))
    at = at[rows]
    second = books.frames.clock_us[at] // SECOND_US * SECOND_US
    columns = [
        names(books.frames.market[at], books.tickers),
        times(second),
        pa.array(books.frames.verified[at]),
    ]
    for name, side in sides.items():
        columns += _side(side, notional[name], rows, ask=name == "ask")
    columns.append(times(second + SECOND_US))
    return pa.Table.from_arrays(columns, schema=DEPTH.arrow)


def changed(books: Books, numbers: list[Array]) -> Bools:
    """Whether any of the numbers, one per second, differs from the market's previous second."""
    market = books.frames.market[books.seconds]
    differs = np.ones(len(market), dtype=np.bool_)
    differs[1:] = market[1:] != market[:-1]
    for values in numbers:
        differs[1:] |= values[1:] != values[:-1]
    return differs


def _side(side: Side, notional: Ints, rows: Ints, *, ask: bool) -> list[pa.Array]:
    best = side.price[rows]
    price = ONE_DOLLAR - best if ask else best
    return [
        decimals(price, PRICE, best != NONE),
        *(decimals(side.within[cents][rows], QTY) for cents in (0, *CENTS)),
        decimals(side.all[rows], QTY),
        pa.array(side.levels[rows], pa.uint32()),
        decimals(notional[rows], NOTIONAL),
    ]

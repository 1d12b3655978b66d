"""Compute the dataset `imbalance`: the imbalance of resting sizes, and the order-flow imbalance, per second."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from kalshi_platform.analytics.best import Best
from kalshi_platform.analytics.books import Books
from kalshi_platform.analytics.columns import Array, Bools, Ints, decimals, floats, names, times
from kalshi_platform.analytics.depth import changed
from kalshi_platform.analytics.frames import DELTA, SECOND_US
from kalshi_platform.schema import IMBALANCE, QTY

CENTS = 5


def imbalance(books: Books) -> pa.Table:
    """Make one row for every second in which an imbalance changed or the order-flow imbalance was not 0.

    A second without a row had the imbalances of the row before and an order-flow imbalance of 0.
    `second` is the second's first instant, of receive time; the row is known at its end, `known_at`.

        imbalance = (B - A) / (B + A), from -1 to 1; B and A are the sizes of bids and asks at the best,
                    over the 5 best levels, within 5 cents of the best, at the end of the second.
                    Float64: the nearest to the exact ratio. 1 or -1 if one side is empty, null
                    if both are
        ofi       = sum of e_n over the second's frames                        [contracts, exact]
        e_n       = [Pb_n >= Pb_n-1] qb_n - [Pb_n <= Pb_n-1] qb_n-1
                  - [Pa_n <= Pa_n-1] qa_n + [Pa_n >= Pa_n-1] qa_n-1

    with best prices Pb, Pa and their sizes qb, qa after the n-th frame: Cont, Kukanov and Stoikov,
    "The price impact of order book events", Journal of Financial Econometrics 12 (2014), section 2.
    Positive: buying pressure. An empty side counts as the worst of all prices with size 0. Only deltas are
    order flow: the changes that a snapshot or a checkpoint shows happened earlier, unseen.

    `verified`: the book was synced throughout the second, from the frame before it on.
    """
    at = books.seconds
    bid, ask = books.sides["bid"], books.sides["ask"]
    pairs = [
        (bid.within[0], ask.within[0]),
        (bid.over, ask.over),
        (bid.within[CENTS], ask.within[CENTS]),
    ]
    ratios = [((b - a) / np.where(b + a > 0, b + a, 1), b + a > 0) for b, a in pairs]
    flow = _order_flow(books)
    verified = _throughout(books)
    values: list[Array] = [verified, *(column for ratio in ratios for column in ratio)]
    rows = np.flatnonzero(changed(books, values) | (flow != 0))
    at = at[rows]
    second = books.frames.clock_us[at] // SECOND_US * SECOND_US
    return pa.Table.from_arrays(
        [
            names(books.frames.market[at], books.tickers),
            times(second),
            pa.array(verified[rows]),
            *(floats(ratio[rows], valid[rows]) for ratio, valid in ratios),
            decimals(flow[rows], QTY),
            times(second + SECOND_US),
        ],
        schema=IMBALANCE.arrow,
    )


def _order_flow(books: Books) -> Ints:
    """Return the sum of e_n over each second."""
    # Asks are NO bids: a YES ask price falls where the NO bid's rises, so both sides count alike.
    flow = _pressure(books.best_yes) - _pressure(books.best_no)
    flow[books.frames.cause != DELTA] = 0
    return _per_second(books, flow)


def _pressure(best: Best) -> Ints:
    """Return what each frame added to a side of bids at its best price; 0 if nothing changed there."""
    price, size = best.price, best.size
    added = np.zeros(len(price), dtype=np.int64)
    added[1:] = np.where(price[1:] >= price[:-1], size[1:], 0)
    added[1:] -= np.where(price[1:] <= price[:-1], size[:-1], 0)
    return added


def _throughout(books: Books) -> Bools:
    """Whether every state of each second was verified, including the one before its first frame."""
    verified, begins = books.frames.verified, books.frames.begins
    before = np.append(True, verified[:-1]) | begins
    stale = ~(verified & before)
    return np.asarray(_per_second(books, stale.astype(np.int64)) == 0)


def _per_second(books: Books, values: Ints) -> Ints:
    if not len(values):
        return values
    first = np.append(0, books.seconds[:-1] + 1)
    return np.asarray(np.add.reduceat(values, first), dtype=np.int64)

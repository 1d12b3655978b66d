"""Compute the dataset `spreads`: every change of a market's best prices and of the sizes there."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from kalshi_platform.analytics.best import Best
from kalshi_platform.analytics.books import Books
from kalshi_platform.analytics.columns import NO_TIME, Bools, decimals, floats, names, times
from kalshi_platform.analytics.frames import CAUSES, NONE
from kalshi_platform.exchange.numbers import ONE_DOLLAR
from kalshi_platform.schema import MID, PRICE, QTY, SPREADS


def spreads(books: Books) -> pa.Table:
    """Make one row for every change of best bid, best ask, their sizes, or `verified`.

    Between two rows nothing changed, so the newest row at or before an instant is the state then. Each
    hour can be read alone: its first row of a market is the opening state, of cause `checkpoint` if the book
    is older than the hour. From a row of cause `doubt` on the book is not verified; its prices are those
    of the row before. A `snapshot` may make it verified again and change no price. Only rows of `snapshot`
    and `delta` can be moves of the market.

    `known_at` is the receive time, or that of an earlier row if the clock was set back: it never decreases.

    A market's rows are ordered by `shard, record, seq`: a row of cause `doubt` has the record of its event and
    seq 0, a checkpoint the record from which on it holds.

    Every frame's state is kept. The deltas of one matching event are separate frames that
    share the exchange time `ts`: states between the first and the last of them are transient. To
    leave them out, keep the last row of each (market_ticker, ts) that is not null.

        yes_bid = highest YES bid;  yes_ask = 1 - highest NO bid, of the NO bid's size      [dollars]
        spread = yes_ask - yes_bid;  mid = (yes_bid + yes_ask) / 2             [dollars, exact]
        microprice = (yes_bid * ask size + yes_ask * bid size) / (bid size + ask size)
                                                                              [dollars, Float64]

    The microprice is the mid weighted by size: what Gatheral and Oomen ("Zero-intelligence realized
    variance estimation", Finance and Stochastics 14, 2010) call micro-price and Stoikov ("The
    micro-price", Quantitative Finance 18, 2018) the weighted mid. It is not Stoikov's own estimator,
    which needs a model fitted to the market. An empty side is null, and so is every value that needs it.
    """
    frames, bid, ask = books.frames, books.best_yes, books.best_no
    rows = np.flatnonzero(_changed(books, bid, ask))
    bid_price, bid_size = bid.price[rows], bid.size[rows]
    ask_price, ask_size = ONE_DOLLAR - ask.price[rows], ask.size[rows]
    has_bid, has_ask = bid.price[rows] != NONE, ask.price[rows] != NONE
    both = has_bid & has_ask
    weight = np.where(both, bid_size + ask_size, 1)
    microprice = (bid_price * ask_size + ask_price * bid_size) / weight / ONE_DOLLAR
    book = frames.book[rows]
    return pa.Table.from_arrays(
        [
            names(frames.market[rows], books.tickers),
            times(frames.ts[rows], frames.ts[rows] != NO_TIME),
            times(frames.ingest_us[rows]),
            names(books.book_conn[book], books.conns),
            pa.array(books.book_sid[book], pa.uint32()),
            pa.array(frames.seq[rows], pa.uint64()),
            names(frames.cause[rows].astype(np.int32), CAUSES),
            pa.array(frames.verified[rows]),
            decimals(bid_price, PRICE, has_bid),
            decimals(bid_size, QTY, has_bid),
            decimals(ask_price, PRICE, has_ask),
            decimals(ask_size, QTY, has_ask),
            decimals(ask_price - bid_price, PRICE, both),
            decimals((bid_price + ask_price) * 5, MID, both),
            floats(microprice, both),
            times(frames.clock_us[rows]),
            *books.places(rows),
        ],
        schema=SPREADS.arrow,
    )


def _changed(books: Books, *sides: Best) -> Bools:
    """Whether a frame changed the top of its market's book."""
    frames = books.frames
    changed = frames.begins.copy()
    for values in [frames.verified, *(column for s in sides for column in (s.price, s.size))]:
        changed[1:] |= values[1:] != values[:-1]
    return changed

"""Look at a recorded market: when its book was synced, minute bars, and the book after its last event.

python examples/research.py data/parquet [TICKER]
"""

import sys
from datetime import timedelta

from kalshi_platform.archive import archive_at
from kalshi_platform.reading import Archive


def main(location: str, ticker: str | None = None) -> None:
    store = archive_at(location)
    start = store.hours("orderbook_events")[-1]
    if ticker is None:
        (ticker, *_) = next(iter(store.read("orderbook_events", start, ["market_ticker"])))[
            0
        ].to_pylist()
    archive = Archive(store)
    covered = archive.coverage(ticker, start, start + timedelta(hours=1))
    print(covered)
    synced = covered.filter(covered["condition"] == "synced").to_dicts()[-1]
    print(archive.bars(ticker, synced["start"], synced["end"], every="1m"))
    book = None
    for _, book in archive.replay(ticker, synced["start"], synced["end"]):  # noqa: B007 - the last one
        pass
    if book is not None:
        print(f"{ticker}: the book after the last event")
        for name, levels in (("bid", book.bids()), ("ask", book.asks())):
            for price, size in levels:
                print(f"{name} {price} {size}")


if __name__ == "__main__":
    main(*sys.argv[1:])

"""The archive as an API: whole spans of recorded markets, without a server.

    from kalshi_platform.reading import Archive

    archive = Archive("data/parquet")                     # or s3://bucket/prefix
    archive.coverage(ticker, start, end)                  # look here first
    archive.top(ticker, start, end, every="1s")           # Polars frames
    for event, book in archive.replay([a, b], start, end): ...

    archive           the class `Archive`
    arguments         what callers pass, checked
    covered           the hours of a span, and when each book was synced
    change_tables     top of the book, depth and imbalance over hours
    bars              open, high, low and close of mid and trades
    event_stream      replay: events of several markets in one order
    events, market_book
                      what a replay yields

Imports neither Dagster, nor the embedded engine, nor a client of ClickHouse. How an hour's books are rebuilt belongs in
`analytics`, how files are found and read in `archive`.
"""

from kalshi_platform.errors import NotCovered, RequestRefused
from kalshi_platform.reading.archive import Archive
from kalshi_platform.reading.covered import Condition
from kalshi_platform.reading.events import Event, EventKind
from kalshi_platform.reading.market_book import MarketBook

__all__ = [
    "Archive",
    "Condition",
    "Event",
    "EventKind",
    "MarketBook",
    "NotCovered",
    "RequestRefused",
]

"""One market: what is fixed about it, its book, and where it is in its life."""

from __future__ import annotations

from dataclasses import dataclass, field

from kalshi_platform.simulator.book import NO, YES, Book, BookView
from kalshi_platform.simulator.grid import Grid

INITIALIZED = "initialized"
ACTIVE = "active"
INACTIVE = "inactive"
CLOSED = "closed"
DETERMINED = "determined"
FINALIZED = "finalized"


@dataclass(frozen=True)
class Listing:
    """What is fixed about a market. Times are Unix nanoseconds."""

    ticker: str
    event_ticker: str
    series_ticker: str
    title: str
    subtitle: str
    grid: Grid
    created_ns: int
    open_ns: int
    close_ns: int
    weight: float
    """Its share of the order flow, beside the other markets' weights."""
    sides: tuple[int, ...] = (YES, NO)
    """The sides of the book that have orders at the opening."""
    rolling: bool = False


@dataclass
class Market:
    """One market as it is now. Volumes are 1e-2 contracts, money 1e-4 dollars."""

    listing: Listing
    market_id: str
    book: Book
    status: str = INITIALIZED
    result: str = ""
    last_price: int = 0
    last_qty: int = 0
    volume: int = 0
    turnover: int = 0
    """Sum of price times quantity of all trades, in 1e-6 dollars."""
    open_interest: int = 0
    updated_us: int = 0
    """When something of it changed that is not trading."""
    halted: bool = False
    """Left out of the order flow for now, while it stays open."""
    settled_ns: int | None = None
    wire_head: str = field(init=False, repr=False)
    """How every order-book message of this market begins."""

    def __post_init__(self) -> None:
        self.wire_head = f'{{"market_ticker":"{self.ticker}","market_id":"{self.market_id}"'

    @property
    def ticker(self) -> str:
        """The market's ticker."""
        return self.listing.ticker

    def view(self) -> BookView:
        """The book now, as plain numbers."""
        return BookView(self.market_id, self.book.ladder(YES), self.book.ladder(NO))

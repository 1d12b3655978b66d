"""One market: its fixed properties, its book and its status. What changes it is in `exchange`."""

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
    """The fixed properties of a market. Times are Unix nanoseconds."""

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
    """Its weight in the order flow, relative to the other markets'."""
    sides: tuple[int, ...] = (YES, NO)
    """The sides of the book that have orders at the opening."""
    rolling: bool = False


@dataclass
class Market:
    """The current state of a market. Volumes are 1e-2 contracts, money 1e-4 dollars."""

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
    """When a property other than its trading last changed."""
    clock: int = 0
    """The clock of the last change of its book, the same on every connection; 0: none yet.

    It goes on from one change to the next and skips a value for each trade.
    """
    halted: bool = False
    """Excluded from the order flow for now, while it stays open."""
    settled_ns: int | None = None
    wire_head: str = field(init=False, repr=False)
    """The prefix of every order-book message of this market."""

    def __post_init__(self) -> None:
        self.wire_head = f'{{"market_ticker":"{self.ticker}","market_id":"{self.market_id}"'

    @property
    def ticker(self) -> str:
        """The market's ticker."""
        return self.listing.ticker

    def view(self) -> BookView:
        """Return the current book as plain numbers."""
        return BookView(self.market_id, self.book.ladder(YES), self.book.ladder(NO))

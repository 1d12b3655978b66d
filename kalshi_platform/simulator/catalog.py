"""List series, events and markets: long-lived ones, and rolling ones that open and close repeatedly.

Long-lived markets close at the end of next year, so their tickers stay the same for a year.
Rolling series list a market ahead, open it when the one before it closes, and so on; their
boundaries lie on the clock, so a restarted simulator lists the same tickers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from kalshi_platform.simulator.book import NO, YES
from kalshi_platform.simulator.grid import grid
from kalshi_platform.simulator.market import Listing

SECOND = 1_000_000_000
_BOTH, _ONE_SIDED, _EMPTY = (YES, NO), (YES,), ()


@dataclass(frozen=True)
class Series:
    """A series of events."""

    ticker: str
    title: str
    category: str
    structure: str
    rolling: bool = False
    maker_fees: bool = False

    @property
    def fee_type(self) -> str:
        """The exchange's name of the fee's formula."""
        return "quadratic_with_maker_fees" if self.maker_fees else "quadratic"

    @property
    def tags(self) -> tuple[str, ...]:
        """What the series is about, besides its category."""
        return ("Up or down",) if self.rolling else ("Annual",)


LONG_LIVED = (
    Series("KXFED", "Federal funds rate", "Economics", "tapered_deci_cent"),
    Series(
        "KXHIGHNY",
        "Highest temperature in New York",
        "Climate and Weather",
        "linear_cent",
        maker_fees=True,
    ),
    Series("KXCHAMP", "Championship winner", "Sports", "linear_cent"),
    Series("KXBTCMAXY", "How high Bitcoin gets", "Crypto", "deci_cent"),
    Series("KXINXY", "S&P 500 at the end of the year", "Financials", "center_deci_edge_centi_cent"),
)
ROLLING = tuple(
    Series(
        f"KX{coin}UP",
        f"{name} up or down",
        "Crypto",
        structure,
        rolling=True,
        maker_fees=coin == "BTC",
    )
    for coin, name, structure in (
        ("BTC", "Bitcoin", "tapered_deci_cent"),
        ("ETH", "Ethereum", "linear_cent"),
        ("SOL", "Solana", "linear_cent"),
        ("XRP", "XRP", "deci_cent"),
        ("DOGE", "Dogecoin", "linear_cent"),
    )
)
FEE_TYPES = {series.ticker: series.fee_type for series in (*LONG_LIVED, *ROLLING)}
"""The formula of the fees of each series."""
_MARKETS_PER_EVENT = 8


def _weight(rank: int) -> float:
    """Zipf's law: the k-th market has 1/k of the first one's activity."""
    return 1.0 / (rank + 1)


def long_lived(count: int, now_ns: int, first_rank: int) -> Iterator[Listing]:
    """Return `count` markets that are open now and stay open."""
    year = datetime.fromtimestamp(now_ns / SECOND, UTC).year
    open_ns = int(datetime(year, 1, 1, tzinfo=UTC).timestamp()) * SECOND
    close_ns = int(datetime(year + 2, 1, 1, tzinfo=UTC).timestamp()) * SECOND
    for index in range(count):
        series = LONG_LIVED[index % len(LONG_LIVED)]
        strike = index // len(LONG_LIVED)
        group, member = divmod(strike, _MARKETS_PER_EVENT)
        event = f"{series.ticker}-{(year + 1) % 100:02d}" + (f"G{group}" if group else "")
        yield Listing(
            ticker=f"{event}-T{member}.5",
            event_ticker=event,
            series_ticker=series.ticker,
            title=f"{series.title}, {year + 1}: above {member}.5?",
            subtitle=f"Above {member}.5",
            grid=grid(series.structure),
            created_ns=open_ns - 3600 * SECOND,
            open_ns=open_ns,
            close_ns=close_ns,
            weight=_weight(first_rank + index),
            # a long tail of thin books, as on the real exchange
            sides=_EMPTY if index % 19 == 17 else _ONE_SIDED if index % 11 == 9 else _BOTH,
        )


@dataclass(frozen=True)
class Slot:
    """A slot of the rolling catalogue, with exactly one open market at any time."""

    index: int
    slots: int
    lifetime_ns: int

    @property
    def series(self) -> Series:
        """The series that the slot's markets belong to."""
        return ROLLING[self.index % len(ROLLING)]

    def opening_at_or_before(self, now_ns: int) -> int:
        """Return when the market that is open at `now_ns` opened. Coins are staggered over a lifetime."""
        coins = min(self.slots, len(ROLLING))
        phase = self.lifetime_ns * (self.index % len(ROLLING)) // coins
        phase -= phase % SECOND if self.lifetime_ns >= 60 * SECOND else 0
        return now_ns - (now_ns - phase) % self.lifetime_ns

    def listing(self, open_ns: int) -> Listing:
        """Return the slot's market that opens at that time; it is listed one lifetime ahead."""
        close_ns = open_ns + self.lifetime_ns
        close = datetime.fromtimestamp(close_ns // SECOND, UTC)
        stamp = close.strftime("%y%b%d%H%M%S").upper()
        if close_ns % SECOND:
            stamp += f"{close_ns % SECOND // 1_000_000:03d}"
        event = f"{self.series.ticker}-{stamp}"
        strike = self.index // len(ROLLING)
        return Listing(
            ticker=f"{event}-T{strike}",
            event_ticker=event,
            series_ticker=self.series.ticker,
            title=f"{self.series.title} at {close:%H:%M:%S} UTC?",
            subtitle=f"Target {strike}",
            grid=grid(self.series.structure),
            created_ns=open_ns - self.lifetime_ns,
            open_ns=open_ns,
            close_ns=close_ns,
            weight=_weight(self.index),
            rolling=True,
        )

"""Typed responses of the REST interface: the fields that the platform reads, and error responses.

Numbers stay exact: dollars and contracts are the wire's decimal strings (`numbers` converts them to
integers), cents and times are whole numbers. Fields that are not named here are ignored. Fetching and
retrying belong in `rest`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

import msgspec

from kalshi_platform.exchange.frames import DecodeError
from kalshi_platform.printable import printable

Number = Annotated[str, msgspec.Meta(pattern=r"^-?[0-9]{1,14}(\.[0-9]{1,12})?$")]
"""A decimal number as text, as `numbers.fixed_point` takes it."""
Dollars = Annotated[str, msgspec.Meta(pattern=r"^-?[0-9]{1,5}(\.[0-9]{1,4}0{0,8})?$")]
"""A number with at most 4 decimals, which the price columns hold exactly."""
Contracts = Annotated[str, msgspec.Meta(pattern=r"^-?[0-9]{1,14}(\.[0-9]{1,2}0{0,10})?$")]
"""A number with at most 2 decimals."""
Instant = Annotated[datetime, msgspec.Meta(tz=True)]
"""A time with a time zone."""


class Response(msgspec.Struct, frozen=True, kw_only=True):
    """A response, or an object within one."""


# -- the exchange ------------------------------------------------------------------------------


class ExchangeStatus(Response, frozen=True):
    """Whether the exchange is up, and whether orders are matched."""

    exchange_active: bool
    trading_active: bool


class Schedule(Response, frozen=True):
    """Trading hours for each weekday (00:00 to 00:00 is all day) and maintenance windows."""

    standard_hours: list[dict[str, Any]] = []
    maintenance_windows: list[dict[str, Any]] = []


class Bucket(Response, frozen=True):
    """A token bucket: a request costs 10 tokens unless documented otherwise."""

    bucket_capacity: int
    refill_rate: int
    """Tokens a second."""


class Limits(Response, frozen=True):
    """The rate limits of this account."""

    read: Bucket
    write: Bucket
    usage_tier: str = ""


# -- markets -----------------------------------------------------------------------------------


class PriceRange(Response, frozen=True):
    """Prices from `start` to `end` dollars lie on a grid of `step`."""

    start: Dollars
    end: Dollars
    step: Dollars


class Market(Response, frozen=True):
    """A market. Prices in dollars, sizes in contracts; without a bid the best bid is "0.0000"."""

    ticker: str
    event_ticker: str
    status: str
    """initialized, inactive, active, closed, determined, disputed, amended or finalized."""
    market_type: str = ""
    title: str = ""
    yes_sub_title: str = ""
    open_time: Instant | None = None
    close_time: Instant | None = None
    latest_expiration_time: Instant | None = None
    yes_bid_dollars: Dollars | None = None
    yes_ask_dollars: Dollars | None = None
    yes_bid_size_fp: Contracts | None = None
    yes_ask_size_fp: Contracts | None = None
    no_bid_dollars: Dollars | None = None
    no_ask_dollars: Dollars | None = None
    last_price_dollars: Dollars | None = None
    volume_fp: Contracts | None = None
    open_interest_fp: Contracts | None = None
    price_level_structure: str = ""
    """An opaque name of the price grid; `price_ranges` is the grid."""
    price_ranges: list[PriceRange] | None = None
    result: str = ""
    """yes, no, scalar, or empty while it is open."""
    settlement_value_dollars: Dollars | None = None
    settlement_ts: Instant | None = None


class Event(Response, frozen=True):
    """An event, with its markets where the request included them."""

    event_ticker: str
    series_ticker: str
    title: str = ""
    sub_title: str = ""
    category: str = ""
    mutually_exclusive: bool = False
    markets: list[Market] | None = None


class Series(Response, frozen=True):
    """A series of events."""

    ticker: str
    title: str = ""
    category: str = ""
    frequency: str = ""
    fee_type: str = ""
    fee_multiplier: Decimal | None = None


class Orderbook(Response, frozen=True):
    """Two ladders of bids, (dollars, contracts), ascending: the best bid is the last."""

    yes_dollars: list[tuple[Dollars, Contracts]] | None = None
    no_dollars: list[tuple[Dollars, Contracts]] | None = None


class Trade(Response, frozen=True):
    """A public trade."""

    trade_id: str
    ticker: str
    count_fp: str
    yes_price_dollars: str
    no_price_dollars: str
    created_time: Instant
    taker_outcome_side: str = ""
    taker_book_side: str = ""
    is_block_trade: bool = False


# -- the portfolio -----------------------------------------------------------------------------


class Position(Response, frozen=True):
    """The account's position in a market, in contracts: YES positive, NO negative."""

    ticker: str
    position_fp: Number
    market_exposure_dollars: Number | None = None
    realized_pnl_dollars: str | None = None
    fees_paid_dollars: str | None = None
    total_traded_dollars: str | None = None
    last_updated_ts: Instant | None = None
    exchange_index: int | None = None


class Fill(Response, frozen=True):
    """A fill of the account. `outcome_side` yes adds `count_fp` to the position, no subtracts it."""

    fill_id: str
    order_id: str
    ticker: str
    outcome_side: Literal["yes", "no"]
    count_fp: Number
    yes_price_dollars: str
    no_price_dollars: str
    created_time: Instant
    is_taker: bool
    fee_cost: str
    """Dollars, 6 decimals."""
    book_side: str = ""
    subaccount_number: int | None = None
    exchange_index: int | None = None


class Settlement(Response, frozen=True):
    """A settled market in which the account held a position."""

    ticker: str
    event_ticker: str
    market_result: str
    """yes, no, scalar or void."""
    yes_count_fp: str
    no_count_fp: str
    yes_total_cost_dollars: str
    no_total_cost_dollars: str
    fee_cost: str
    revenue: int
    """Cents."""
    settled_time: Instant
    value: int | None = None
    """Cents."""


class Balance(Response, frozen=True):
    """The account's money."""

    balance_dollars: str
    balance: int
    """Cents, truncated; `balance_dollars` is exact."""
    portfolio_value: int
    """Cents."""
    updated_ts: int
    """Unix seconds."""


# -- refusals ----------------------------------------------------------------------------------


KEY_REFUSALS = frozenset(
    [
        ("header_timestamp_expired", ""),
        ("signature_is_missing_from_headers", ""),
        ("authentication_error", "INCORRECT_API_KEY_SIGNATURE"),
        ("authentication_error", "NOT_FOUND"),
    ]
)
"""(code, details) of the exchange's refusals of a key, signature or clock: the only final refusals."""


@dataclass(frozen=True)
class Refusal:
    """The reason in an error response."""

    code: str = ""
    message: str = ""
    details: str = ""

    @property
    def concerns_key(self) -> bool:
        """Whether the exchange itself refused the key, its signature or the clock."""
        return (self.code, self.details) in KEY_REFUSALS

    def __str__(self) -> str:
        parts = dict.fromkeys(part for part in (self.code, self.message, self.details) if part)
        return printable(": ".join(parts))


def decode_refusal(body: bytes | bytearray) -> Refusal:
    """Decode an error response in any of the exchange's four shapes.

    {"error": {"code", "message", "details"}}, the same without "error", {"msg": …} and
    {"error": "too many requests"}. Of anything else (a proxy's page) the first words become the message.
    """
    try:
        answer = msgspec.json.decode(body)
    except DecodeError:
        return Refusal(message=" ".join(body[:200].decode(errors="replace").split()))
    if not isinstance(answer, dict):
        return Refusal(message=str(answer)[:200])
    error = answer.get("error", answer)
    if not isinstance(error, dict):
        return Refusal(message=str(error)[:200])
    message = error.get("message") or error.get("msg")
    return Refusal(
        *(str(part or "") for part in (error.get("code"), message, error.get("details")))
    )

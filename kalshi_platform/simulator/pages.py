"""The exchange's own pages: markets, events, series, trades, books and the account.

Each page takes a request and returns what is to be JSON, or raises `Rejected`. Routes, signatures
and faults are in rest.py. The shapes are those of the recorded answers of the real exchange.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from kalshi_platform.exchange.numbers import ONE_DOLLAR, contracts, dollars
from kalshi_platform.simulator import market as life
from kalshi_platform.simulator.book import NO, YES, BookView
from kalshi_platform.simulator.exchange import Exchange, settlement_value
from kalshi_platform.simulator.frames import rfc3339
from kalshi_platform.simulator.market import Market
from kalshi_platform.simulator.portfolio import Holding, Portfolio
from kalshi_platform.simulator.venue import Venue

BASE = "/trade-api/v2"
_STATUS_FILTER = {
    "unopened": {life.INITIALIZED},
    "open": {life.ACTIVE},
    "paused": {"inactive"},
    "closed": {life.CLOSED, life.DETERMINED},
    "settled": {life.FINALIZED},
}


_SECOND = 1_000_000_000
_TIMES: dict[str, Callable[[Market], int | None]] = {
    "created": lambda item: item.listing.created_ns,
    "close": lambda item: item.listing.close_ns,
    "settled": lambda item: item.settled_ns,
    "updated": lambda item: item.updated_us * 1000,
}


class Rejected(Exception):
    """The request is answered with an error, in one of the exchange's shapes."""

    def __init__(self, status: int, body: object) -> None:
        super().__init__(str(body))
        self.status = status
        self.body = body


class Pages:
    """The pages of the exchange. Holds the cache of the order books."""

    def __init__(self, venue: Venue) -> None:
        self._venue = venue
        self._exchange = venue.exchange
        self._cache: dict[str, tuple[float, bytes]] = {}

    # exchange and account

    def exchange_status(self, _: Request) -> object:
        """Return whether the exchange trades; it does not while paused or under maintenance."""
        return {
            "exchange_active": not self._venue.maintained,
            "trading_active": self._venue.trading,
        }

    def exchange_schedule(self, _: Request) -> object:
        """Return a schedule that is always open but for the last maintenance, if there was one."""
        always = [{"open_time": "00:00", "close_time": "00:00"}]
        days = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
        week = {"start_time": "2021-01-01T00:00:00Z", "end_time": "2099-01-01T00:00:00Z"}
        hours = {**week, **dict.fromkeys(days, always)}
        window = self._exchange.maintenance if isinstance(self._exchange, Exchange) else None
        windows = [
            {"start_datetime": _time(begin_ns), "end_datetime": _time(end_ns)}
            for begin_ns, end_ns in filter(None, [window])
        ]
        return {"schedule": {"standard_hours": [hours], "maintenance_windows": windows}}

    def user_data_timestamp(self, _: Request) -> object:
        """Return the time as of which the portfolio pages hold."""
        portfolio = self._portfolio
        frozen = portfolio.frozen_us if portfolio is not None else None
        return {"as_of_time": rfc3339(time.time_ns() // 1000 if frozen is None else frozen)}

    def historical_cutoff(self, _: Request) -> object:
        """Return the time before which data would be under /historical: 90 days ago."""
        cutoff = rfc3339((self._exchange.now_ns // 1_000_000_000 - 90 * 86_400) * 1_000_000)
        names = ("market_settled_ts", "trades_created_ts", "orders_updated_ts")
        return dict.fromkeys(names, cutoff)

    def balance(self, _: Request) -> object:
        """An account with nothing in it."""
        return {
            "balance": 0,
            "balance_breakdown": [{"balance": "0.0000", "exchange_index": 0}],
            "balance_dollars": "0.0000",
            "portfolio_value": 0,
            "updated_ts": int(time.time()),
        }

    @property
    def _portfolio(self) -> Portfolio | None:
        return self._exchange.portfolio if isinstance(self._exchange, Exchange) else None

    def positions(self, request: Request) -> object:
        """Return the positions in markets that are not settled."""
        ticker = request.query_params.get("ticker")
        held = [
            (name, holding)
            for name, holding in (self._portfolio.holdings() if self._portfolio else {}).items()
            if ticker in {None, name}
        ]
        page, cursor = _page(request, held, "GetPositions", 1000, lambda item: item[0])
        return {
            "cursor": cursor,
            "event_positions": [],
            "market_positions": [_position(name, holding) for name, holding in page],
        }

    def fills(self, request: Request) -> object:
        """Our fills, newest first, page by page."""
        ticker = request.query_params.get("ticker")
        low, high = _second(request, "min_ts"), _second(request, "max_ts")
        found = [
            each
            for each in reversed(self._portfolio.fills if self._portfolio else [])
            if (ticker in {None, each.order.market.ticker})
            and (low is None or each.ts_us >= low * 1_000_000)
            and (high is None or each.ts_us <= high * 1_000_000)
        ]
        page, cursor = _page(request, found, "GetFills", 1000, lambda item: item.fill_id)
        return {"cursor": cursor, "fills": [item.texts() for item in page]}

    def orders(self, request: Request) -> object:
        """Return our resting orders, page by page."""
        found = self._portfolio.orders() if self._portfolio else []
        page, cursor = _page(request, found, "GetOrders", 1000, lambda item: item.order_id)
        return {"cursor": cursor, "orders": [item.texts() for item in page]}

    def settlements(self, request: Request) -> object:
        """Our markets that were settled, newest first, page by page."""
        ticker = request.query_params.get("ticker")
        found = [
            each
            for each in reversed(self._portfolio.settled if self._portfolio else [])
            if ticker in {None, each.market.ticker}
        ]
        page, cursor = _page(
            request, found, "GetSettlements", 1000, lambda item: item.market.ticker
        )
        return {"cursor": cursor, "settlements": [item.texts() for item in page]}

    def limits(self, _: Request) -> object:
        """Token buckets of the basic tier; the simulator does not enforce them."""
        return {
            "grants": [],
            "read": {"bucket_capacity": 200, "refill_rate": 200},
            "usage_tier": "basic",
            "write": {"bucket_capacity": 100, "refill_rate": 100},
        }

    def endpoint_costs(self, _: Request) -> object:
        """Return the cost of a request."""
        order = {"cost": 2, "method": "GET", "path": f"{BASE}/portfolio/orders/:order_id"}
        return {"default_cost": 10, "endpoint_costs": [order]}

    # markets

    def markets(self, request: Request) -> object:
        """Markets by status, series, event, tickers and times, page by page."""
        query = request.query_params
        found: Iterable[Market] = self._exchange.markets()
        if tickers := query.get("tickers"):
            wanted = set(tickers.split(","))
            found = (market for market in found if market.ticker in wanted)
        if status := query.get("status"):
            if status not in _STATUS_FILTER:
                raise Rejected(
                    400,
                    _bad_request(
                        f"status {status!r} is not one of unopened, open, paused, closed, settled"
                    ),
                )
            found = (market for market in found if market.status in _STATUS_FILTER[status])
        if series := query.get("series_ticker"):
            found = (market for market in found if market.listing.series_ticker == series)
        if event := query.get("event_ticker"):
            found = (market for market in found if market.listing.event_ticker == event)
        if query.get("mve_filter") == "only":
            found = ()  # there are no multivariate markets here
        for name, time_ns in _TIMES.items():
            low, high = _second(request, f"min_{name}_ts"), _second(request, f"max_{name}_ts")
            if low is not None or high is not None:
                found = [market for market in found if _between(time_ns(market), low, high)]
        page, cursor = _page(request, list(found), "GetMarkets", 1000, lambda item: item.ticker)
        return {"cursor": cursor, "markets": [_market(item) for item in page]}

    def market(self, request: Request) -> object:
        """One market."""
        return {"market": _market(self._find(request))}

    def _find(self, request: Request) -> Market:
        found = self._exchange.market(request.path_params["ticker"])
        if found is None:
            raise Rejected(404, NOT_FOUND)
        return found

    def events(self, request: Request) -> object:
        """Events by series and status, page by page."""
        query = request.query_params
        by_event: dict[str, list[Market]] = {}
        for market in self._exchange.markets():
            if (
                query.get("series_ticker", market.listing.series_ticker)
                == market.listing.series_ticker
            ):
                by_event.setdefault(market.listing.event_ticker, []).append(market)
        if status := query.get("status"):
            wanted = _STATUS_FILTER.get(status, set())
            by_event = {
                name: members
                for name, members in by_event.items()
                if any(market.status in wanted for market in members)
            }
        page, cursor = _page(request, list(by_event), "GetEvents", 200, lambda name: name)
        nested = query.get("with_nested_markets") == "true"
        return {"cursor": cursor, "events": [_event(by_event[name], nested) for name in page]}

    def event(self, request: Request) -> object:
        """One event with its markets."""
        name = request.path_params["event"]
        members = [m for m in self._exchange.markets() if m.listing.event_ticker == name]
        if not members:
            raise Rejected(404, NOT_FOUND)
        return {"event": _event(members, False), "markets": [_market(market) for market in members]}

    def series_list(self, request: Request) -> object:
        """Every series."""
        category = request.query_params.get("category")
        return {
            "series": [
                _series(listed_series)
                for listed_series in self._exchange.series
                if category is None or listed_series.category == category
            ]
        }

    def series(self, request: Request) -> object:
        """One series."""
        for listed_series in self._exchange.series:
            if listed_series.ticker == request.path_params["series"]:
                return {"series": _series(listed_series)}
        raise Rejected(404, NOT_FOUND)

    def trades(self, request: Request) -> object:
        """The last trades, newest first, page by page."""
        ticker = request.query_params.get("ticker")
        low, high = _second(request, "min_ts"), _second(request, "max_ts")
        found = [
            trade
            for trade in reversed(self._exchange.trades)
            if (ticker is None or trade.market.ticker == ticker)
            and (low is None or trade.ts_us >= low * 1_000_000)
            and (high is None or trade.ts_us <= high * 1_000_000)
        ]
        page, cursor = _page(request, found, "GetTrades", 1000, lambda item: item.trade_id)
        return {"cursor": cursor, "trades": [item.rest() for item in page]}

    # order books, cached as the real ones are

    def orderbook(self, request: Request) -> object:
        """One book, cached."""
        depth = _number(request, "depth", "GetMarketOrderbook", default=0, low=0, high=100)
        found = self._find(request)
        return self._cached(
            f"{found.ticker}?{depth}", lambda: {"orderbook_fp": _orderbook(found.view(), depth)}
        )

    def orderbooks(self, request: Request) -> object:
        """Up to 100 books, cached."""
        tickers = [
            ticker
            for value in request.query_params.getlist("tickers")
            for ticker in value.split(",")
            if ticker
        ]
        if not 1 <= len(tickers) <= 100:
            raise Rejected(
                400, _failed("GetMarketOrderbooks", "Tickers", "lte" if tickers else "required")
            )
        found = [self._exchange.market(ticker) for ticker in tickers]
        if None in found:
            raise Rejected(404, NOT_FOUND)
        return self._cached(
            "&".join(tickers),
            lambda: {
                "orderbooks": [
                    {"ticker": market.ticker, "orderbook_fp": _orderbook(market.view(), 0)}
                    for market in found
                    if market is not None
                ]
            },
        )

    def _cached(self, key: str, make: Callable[[], object]) -> Response:
        now = time.monotonic()
        until, body = self._cache.get(key, (0.0, b""))
        # a stale book does not change while the fault lasts; one that was never requested is read now
        fresh = now < until or (body and now < self._venue.stale_until)
        if not fresh:
            self._cache = {name: kept for name, kept in self._cache.items() if kept[0] > now}
            body = msgspec.json.encode(make())
            self._cache[key] = (now + self._venue.config.rest_cache_seconds, body)
        headers = {
            "cache-control": f"max-age={self._venue.config.rest_cache_seconds:.0f}",
            "x-cache": "Hit from simulator" if fresh else "Miss from simulator",
        }
        return Response(body, headers=headers, media_type="application/json")


NOT_FOUND = {"error": {"code": "not_found", "message": "not found"}}


def _bad_request(details: str) -> dict[str, str]:
    return {"code": "bad_request", "message": "bad request", "details": details}


def _failed(request: str, field: str, tag: str) -> dict[str, str]:
    return {
        "msg": f"Parameter validation failed for {request}: Key: '{request}Params.{field}'"
        f" Error:Field validation for '{field}' failed on the '{tag}' tag"
    }


def _number(
    request: Request, name: str, operation: str, *, default: int, low: int, high: int
) -> int:
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        value = int(text)
    except ValueError:
        raise Rejected(400, _bad_request(f"{name} {text!r} is not a number")) from None
    if not low <= value <= high:
        raise Rejected(400, _failed(operation, name.title(), "lte" if value > high else "gte"))
    return value


def _second(request: Request, name: str) -> int | None:
    """Return a time in whole seconds from the query, None if it is missing."""
    if name not in request.query_params:
        return None
    return _number(request, name, "GetMarkets", default=0, low=0, high=2**53)


def _between(time_ns: int | None, low: int | None, high: int | None) -> bool:
    """Whether a time lies between whole seconds, both included; a missing time does not."""
    if time_ns is None:
        return False
    return (low or 0) <= time_ns / _SECOND and (high is None or time_ns <= high * _SECOND)


def _page(
    request: Request, found: list[Any], operation: str, most: int, name: Callable[[Any], str]
) -> tuple[list[Any], str]:
    """Return one page and the cursor of the next, '' at the end. A cursor is the id of the last item."""
    limit = _number(request, "limit", operation, default=100, low=1, high=most)
    cursor = request.query_params.get("cursor", "")
    # an unknown cursor starts at the first page, as on the real exchange
    start = next(
        (at + 1 for at, market in enumerate(found) if cursor and name(market) == cursor), 0
    )
    page = found[start : start + limit]
    return page, name(page[-1]) if start + limit < len(found) else ""


def _orderbook(view: BookView, depth: int) -> dict[str, list[tuple[str, str]]]:
    """The best `depth` levels, ascending; 0 means all."""
    texts = view.texts()
    return {f"{side}_dollars": texts[side][-depth:] for side in ("yes", "no")}


def _time(ns: int) -> str:
    return rfc3339(ns // 1000)


def _position(ticker: str, held: Holding) -> dict[str, Any]:
    return {
        "ticker": ticker,
        "exchange_index": 0,
        "position_fp": contracts(held.position),
        "market_exposure_dollars": f"{held.cost / 1_000_000:.6f}",
        "realized_pnl_dollars": "0.000000",
        "fees_paid_dollars": "0.000000",
        "total_traded_dollars": f"{held.traded / 1_000_000:.6f}",
        "last_updated_ts": rfc3339(held.updated_us),
    }


def _market(each: Market) -> dict[str, Any]:
    listing, book = each.listing, each.book
    yes, no = book.best
    prices = listing.grid.prices
    yes_bid = prices[yes] if yes >= 0 else 0
    no_bid = prices[no] if no >= 0 else 0
    settled = (
        {"settlement_value_dollars": settlement_value(each)}
        if each.status in {life.DETERMINED, life.FINALIZED}
        else {}
    )
    if each.settled_ns is not None:
        settled["settlement_ts"] = _time(each.settled_ns)
    return {
        "can_close_early": False,
        "close_time": _time(listing.close_ns),
        "created_time": _time(listing.created_ns),
        "event_ticker": listing.event_ticker,
        "exchange_index": 0,
        "expected_expiration_time": _time(listing.close_ns),
        "expiration_time": _time(listing.close_ns),
        "expiration_value": "",
        "last_price_dollars": dollars(each.last_price),
        "latest_expiration_time": _time(listing.close_ns),
        "market_type": "binary",
        "no_ask_dollars": dollars(ONE_DOLLAR - yes_bid),
        "no_bid_dollars": dollars(no_bid),
        "no_sub_title": listing.subtitle,
        "notional_value_dollars": "1.0000",
        "open_interest_fp": contracts(each.open_interest),
        "open_time": _time(listing.open_ns),
        "price_level_structure": listing.grid.name,
        "price_ranges": [
            {"start": dollars(r.start), "end": dollars(r.end), "step": dollars(r.step)}
            for r in listing.grid.ranges
        ],
        "result": each.result,
        "rules_primary": f"If {listing.subtitle.lower()}, then the market resolves to Yes.",
        "rules_secondary": "",
        "settlement_timer_seconds": 5,
        "status": each.status,
        "strike_type": "greater",
        "ticker": listing.ticker,
        "title": listing.title,
        "updated_time": rfc3339(each.updated_us),
        "volume_24h_fp": contracts(each.volume),
        "volume_fp": contracts(each.volume),
        "yes_ask_dollars": dollars(ONE_DOLLAR - no_bid),
        "yes_ask_size_fp": contracts(book.sizes[NO][no] if no >= 0 else 0),
        "yes_bid_dollars": dollars(yes_bid),
        "yes_bid_size_fp": contracts(book.sizes[YES][yes] if yes >= 0 else 0),
        "yes_sub_title": listing.subtitle,
        **settled,
    }


def _event(members: list[Market], nested: bool) -> dict[str, Any]:
    listing = members[0].listing
    event: dict[str, Any] = {
        "event_ticker": listing.event_ticker,
        "series_ticker": listing.series_ticker,
        "title": listing.title,
        "sub_title": listing.subtitle,
        "mutually_exclusive": False,
        "collateral_return_type": "MECNET",
        "strike_date": _time(listing.close_ns),
    }
    if nested:
        event["markets"] = [_market(market) for market in members]
    return event


def _series(each: Any) -> dict[str, Any]:
    return {
        "ticker": each.ticker,
        "title": each.title,
        "category": each.category,
        "frequency": "custom" if each.rolling else "annual",
        "fee_type": "quadratic",
        "fee_multiplier": 1,
        "tags": [],
        "settlement_sources": [],
    }

"""The exchange's own pages: markets, events, series, trades and books. portfolio_pages.py has the account's.

Each page takes a query and returns what is to be JSON, or raises `Rejected`. Routes, signatures
and faults are in rest.py. The shapes are those of the recorded answers of the real exchange and of
the official client's models.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from kalshi_platform.exchange.numbers import ONE_DOLLAR, contracts, dollars
from kalshi_platform.simulator import market as life
from kalshi_platform.simulator.book import NO, YES, BookView
from kalshi_platform.simulator.catalog import Series
from kalshi_platform.simulator.exchange import Exchange, settlement_value
from kalshi_platform.simulator.frames import rfc3339
from kalshi_platform.simulator.market import Market
from kalshi_platform.simulator.query import Query, Rejected, bad_request, between, failed
from kalshi_platform.simulator.venue import Venue

BASE = "/trade-api/v2"
_STATUS_FILTER = {
    "unopened": {life.INITIALIZED},
    "open": {life.ACTIVE},
    "paused": {"inactive"},
    "closed": {life.CLOSED, life.DETERMINED},
    "settled": {life.FINALIZED},
}


_TIMES: dict[str, Callable[[Market], int | None]] = {
    "created": lambda item: item.listing.created_ns,
    "close": lambda item: item.listing.close_ns,
    "settled": lambda item: item.settled_ns,
    "updated": lambda item: item.updated_us * 1000,
}
_STATUSES_WITH = {
    "created": {"unopened", "open"},
    "close": {"closed"},
    "settled": {"settled"},
    "updated": set[str](),
}
"""The statuses that can be combined with times of a kind."""


class Pages:
    """The pages of the exchange. Holds the cache of the order books."""

    def __init__(self, venue: Venue) -> None:
        self._venue = venue
        self._exchange = venue.exchange
        self._cache: dict[str, tuple[float, bytes]] = {}

    # exchange

    def exchange_status(self, _: Query) -> object:
        """Return whether the exchange trades; it does not while paused or under maintenance."""
        active = {
            "exchange_active": not self._venue.maintained,
            "trading_active": self._venue.trading,
            "intra_exchange_transfers_active": False,
        }
        shard = {"exchange_index": 0, "description": "The only shard", **active}
        return {**active, "exchange_index_statuses": [shard]}

    def exchange_schedule(self, _: Query) -> object:
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

    def historical_cutoff(self, _: Query) -> object:
        """Return the time before which data would be under /historical: 90 days ago."""
        cutoff = rfc3339((self._exchange.now_ns // 1_000_000_000 - 90 * 86_400) * 1_000_000)
        names = (
            "market_settled_ts",
            "trades_created_ts",
            "orders_updated_ts",
            "market_positions_last_updated_ts",
        )
        return dict.fromkeys(names, cutoff)

    # markets

    def markets(self, query: Query) -> object:
        """Markets by status, series, event, tickers and times, page by page."""
        found: Iterable[Market] = self._exchange.markets()
        if tickers := set(query.texts("tickers")):
            found = (market for market in found if market.ticker in tickers)
        if status := query.choice("status", _STATUS_FILTER):
            found = (market for market in found if market.status in _STATUS_FILTER[status])
        if series := query.text("series_ticker"):
            found = (market for market in found if market.listing.series_ticker == series)
        if events := set(query.texts("event_ticker")):
            found = (market for market in found if market.listing.event_ticker in events)
        if query.choice("mve_filter", ("only", "exclude")) == "only":
            found = ()  # there are no multivariate markets here
        times = {name: query.seconds(name, "GetMarkets") for name in _TIMES}
        times = {name: edges for name, edges in times.items() if edges != (None, None)}
        _check_times(list(times), status)
        for name, edges in times.items():
            time_ns = _TIMES[name]
            found = [
                market
                for market in found
                if (at_ns := time_ns(market)) is not None and between(at_ns // 1000, edges)
            ]
        page, cursor = query.page(list(found), "GetMarkets", 1000, lambda item: item.ticker)
        return {"cursor": cursor, "markets": [_market(item) for item in page]}

    def market(self, query: Query) -> object:
        """One market."""
        return {"market": _market(self._find(query))}

    def _find(self, query: Query) -> Market:
        found = self._exchange.market(query.path["ticker"])
        if found is None:
            raise Rejected(404, NOT_FOUND)
        return found

    def events(self, query: Query) -> object:
        """Events by series, tickers, status and times, page by page."""
        by_event: dict[str, list[Market]] = {}
        for market in self._exchange.markets():
            by_event.setdefault(market.listing.event_ticker, []).append(market)
        series, tickers = query.text("series_ticker"), set(query.texts("tickers"))
        status = query.choice("status", [name for name in _STATUS_FILTER if name != "paused"])
        close_s = query.second("min_close_ts", "GetEvents")
        updated_s = query.second("min_updated_ts", "GetEvents")
        found = [
            name
            for name, members in by_event.items()
            if (series in {None, members[0].listing.series_ticker})
            and (not tickers or name in tickers)
            and (status is None or any(m.status in _STATUS_FILTER[status] for m in members))
            and any(between(m.listing.close_ns // 1000, (close_s, None)) for m in members)
            and any(between(m.updated_us, (updated_s, None)) for m in members)
        ]
        nested = query.flag("with_nested_markets")
        page, cursor = query.page(found, "GetEvents", 200, lambda name: name)
        categories = self._categories()
        return {
            "cursor": cursor,
            "events": [_event(by_event[name], categories, nested) for name in page],
        }

    def event(self, query: Query) -> object:
        """One event and its markets: in it `with_nested_markets`, else beside it."""
        name, nested = query.path["event"], query.flag("with_nested_markets")
        members = [m for m in self._exchange.markets() if m.listing.event_ticker == name]
        if not members:
            raise Rejected(404, NOT_FOUND)
        beside = [] if nested else [_market(market) for market in members]
        return {"event": _event(members, self._categories(), nested), "markets": beside}

    def _categories(self) -> dict[str, str]:
        """The category of each series."""
        return {listed.ticker: listed.category for listed in self._exchange.series}

    def series_list(self, query: Query) -> object:
        """Every series, by category and tags."""
        category, tags = query.text("category"), set(query.texts("tags"))
        volume = query.flag("include_volume")
        return {
            "series": [
                self._series(listed, volume)
                for listed in self._exchange.series
                if category in {None, listed.category} and (not tags or tags & set(listed.tags))
            ]
        }

    def series(self, query: Query) -> object:
        """One series."""
        volume = query.flag("include_volume")
        for listed in self._exchange.series:
            if listed.ticker == query.path["series"]:
                return {"series": self._series(listed, volume)}
        raise Rejected(404, NOT_FOUND)

    def _series(self, listed: Series, volume: bool) -> dict[str, Any]:
        series: dict[str, Any] = {
            "ticker": listed.ticker,
            "title": listed.title,
            "category": listed.category,
            "categories": [listed.category],
            "frequency": "custom" if listed.rolling else "annual",
            "fee_type": listed.fee_type,
            "fee_multiplier": 1,
            "tags": list(listed.tags),
            "settlement_sources": _SOURCES,
            "contract_url": f"{_CONTRACTS}/{listed.ticker}.pdf",
            "contract_terms_url": f"{_CONTRACTS}/{listed.ticker}-terms.pdf",
            "additional_prohibitions": [],
            "exchange_index": 0,
        }
        if volume:
            traded = sum(
                market.volume
                for market in self._exchange.markets()
                if market.listing.series_ticker == listed.ticker
            )
            series["volume_fp"] = contracts(traded)
        return series

    def trades(self, query: Query) -> object:
        """The last trades, newest first, page by page."""
        ticker, edges = query.text("ticker"), query.seconds("", "GetTrades")
        block = query.flag("is_block_trade")  # there are none
        found = [
            trade
            for trade in reversed(self._exchange.trades)
            if ticker in {None, trade.market.ticker} and between(trade.ts_us, edges) and not block
        ]
        page, cursor = query.page(found, "GetTrades", 1000, lambda item: item.trade_id)
        return {"cursor": cursor, "trades": [item.rest() for item in page]}

    # order books, cached as the real ones are

    def orderbook(self, query: Query) -> object:
        """One book, cached."""
        depth = query.number("depth", "GetMarketOrderbook", default=0, low=0, high=100)
        found = self._find(query)
        return self._cached(
            f"{found.ticker}?{depth}", lambda: {"orderbook_fp": _orderbook(found.view(), depth)}
        )

    def orderbooks(self, query: Query) -> object:
        """Up to 100 books, cached."""
        tickers = query.texts("tickers")
        if not 1 <= len(tickers) <= 100:
            raise failed("GetMarketOrderbooks", "Tickers", "lte" if tickers else "required")
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


_CONTRACTS = "https://simulator.invalid/contracts"
_SOURCES = [{"name": "The simulator", "url": "https://simulator.invalid"}]


def _check_times(names: list[str], status: str | None) -> None:
    """Raises Rejected where times of a kind cannot be combined with others or with a status."""
    if len(names) > 1:
        raise bad_request(f"times of {' and '.join(names)} cannot be combined")
    for name in names:
        if status is not None and status not in _STATUSES_WITH[name]:
            raise bad_request(f"times of {name} cannot be combined with status {status!r}")


def _orderbook(view: BookView, depth: int) -> dict[str, list[tuple[str, str]]]:
    """The best `depth` levels, ascending; 0 means all."""
    texts = view.texts()
    return {f"{side}_dollars": texts[side][-depth:] for side in ("yes", "no")}


def _time(ns: int) -> str:
    return rfc3339(ns // 1000)


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
        "occurrence_datetime": _time(listing.close_ns),
        "open_interest_fp": contracts(each.open_interest),
        "open_time": _time(listing.open_ns),
        # of a day ago, of which the simulator keeps nothing: as the real ones of a market's first day
        "previous_price_dollars": dollars(0),
        "previous_yes_ask_dollars": dollars(0),
        "previous_yes_bid_dollars": dollars(0),
        "price_level_structure": listing.grid.name,
        "price_ranges": [
            {"start": dollars(r.start), "end": dollars(r.end), "step": dollars(r.step)}
            for r in listing.grid.ranges
        ],
        "result": each.result,
        "rules_primary": f"If {listing.subtitle.lower()}, then the market resolves to Yes.",
        "rules_secondary": "",
        "settlement_bounds_type": "default",
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


def _event(members: list[Market], categories: Mapping[str, str], nested: bool) -> dict[str, Any]:
    listing = members[0].listing
    event: dict[str, Any] = {
        "event_ticker": listing.event_ticker,
        "series_ticker": listing.series_ticker,
        "title": listing.title,
        "sub_title": listing.subtitle,
        "category": categories[listing.series_ticker],
        "mutually_exclusive": False,
        "collateral_return_type": "MECNET",
        "strike_date": _time(listing.close_ns),
        "settlement_sources": _SOURCES,
        "last_updated_ts": rfc3339(max(market.updated_us for market in members)),
        "exchange_index": 0,
    }
    if nested:
        event["markets"] = [_market(market) for market in members]
    return event

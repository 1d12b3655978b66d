"""The REST interface: routes, signatures and faults, and the simulator's own pages.

Under /trade-api/v2 everything is as on the real exchange, its four error shapes, its caches and
its signatures included; the pages are in pages.py. Under /simulator is what no exchange has: the
truth, faults and a pause.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kalshi_platform import typed_json
from kalshi_platform.browsers import OwnPagesOnly
from kalshi_platform.simulator import orders
from kalshi_platform.simulator.errors import SimulatorError
from kalshi_platform.simulator.exchange import Exchange
from kalshi_platform.simulator.faults import Fault
from kalshi_platform.simulator.pages import BASE, NOT_FOUND, Pages
from kalshi_platform.simulator.portfolio_pages import PortfolioPages
from kalshi_platform.simulator.query import Query, Rejected
from kalshi_platform.simulator.venue import Venue

Endpoint = Callable[[Request], Awaitable[Response]]
Page = Callable[[Query], object]


def application(venue: Venue, *, loopback: bool = True) -> Starlette:
    """Build the application with all pages of one venue; `loopback`: it listens on that interface alone."""
    return Starlette(
        routes=[*_exchange_routes(venue), *_simulator_routes(venue)],
        middleware=[Middleware(OwnPagesOnly, loopback=loopback)],
        lifespan=_lifespan(venue),
        exception_handlers={404: _no_such_page, 405: _no_such_page},
    )


def _lifespan(venue: Venue) -> Callable[[Starlette], Any]:
    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        yield {"venue": venue}  # websocket.ClientSocket reads it from there

    return lifespan


async def _no_such_page(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    return _json(NOT_FOUND, status)


def _json(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        msgspec.json.encode(body), status, headers=headers, media_type="application/json"
    )


# the exchange's own pages


def _exchange_routes(venue: Venue) -> list[Route]:
    pages, account = Pages(venue), PortfolioPages(venue.exchange)
    public: dict[str, Page] = {
        "/exchange/status": pages.exchange_status,
        "/exchange/schedule": pages.exchange_schedule,
        "/exchange/user_data_timestamp": account.user_data_timestamp,
        "/historical/cutoff": pages.historical_cutoff,
        "/markets": pages.markets,
        "/markets/trades": pages.trades,
        "/markets/orderbooks": pages.orderbooks,
        "/markets/{ticker}": pages.market,
        "/markets/{ticker}/orderbook": pages.orderbook,
        "/events": pages.events,
        "/events/{event}": pages.event,
        "/series": pages.series_list,
        "/series/{series}": pages.series,
    }
    private: dict[str, Page] = {
        "/portfolio/balance": account.balance,
        "/portfolio/positions": account.positions,
        "/portfolio/fills": account.fills,
        "/portfolio/orders": account.orders,
        "/portfolio/orders/{order_id}": account.order,
        "/portfolio/settlements": account.settlements,
        "/account/limits": account.limits,
        "/account/endpoint_costs": account.endpoint_costs,
    }
    return [
        Route(BASE + path, _guarded(venue, page, signed), methods=["GET"])
        for pages_of, signed in ((public, False), (private, True))
        for path, page in pages_of.items()
    ]


def _guarded(venue: Venue, page: Page, signed: bool) -> Endpoint:
    async def endpoint(request: Request) -> Response:
        fault = venue.rest_fault()
        if fault is not None:
            return _json(fault[1], fault[0])
        if signed:
            now_ms = time.time_ns() // 1_000_000
            path = request.url.path
            refusal = venue.keys.refusal(request.headers, request.method, path, now_ms)
            if refusal is not None:
                return _json(refusal, 401)
        query = Query(request.query_params, request.path_params)
        try:
            answer = page(query)
            query.refuse_unread()
        except Rejected as rejected:
            return _json(rejected.body, rejected.status)
        return answer if isinstance(answer, Response) else _json(answer)

    return endpoint


# the simulator's own pages


class _PortfolioOrder(msgspec.Struct):
    frozen: bool


class _FaultOrder(msgspec.Struct):
    fault: str | None = None
    faults: list[str] = []


def _simulator_routes(venue: Venue) -> list[Route]:
    async def books(_: Request) -> Response:
        at = datetime.fromtimestamp(venue.exchange.now_ns / 1e9, UTC).isoformat()
        return _json({"paused": venue.paused, "at": at, "books": venue.books()})

    async def state(_: Request) -> Response:
        return _json(venue.state())

    async def faults(request: Request) -> Response:
        try:
            order = typed_json.decode(await request.body(), _FaultOrder)
            asked = [Fault.parse(text) for text in [*order.faults, *filter(None, [order.fault])]]
            if not asked:
                raise SimulatorError('Name a fault: {"fault": "gap:3"}.')
            for fault in asked:
                venue.inject(fault)
        except msgspec.DecodeError as error:
            return _json({"error": f'Not understood ({error}). Send {{"fault": "gap:3"}}.'}, 400)
        except SimulatorError as error:
            return _json({"error": str(error)}, 400)
        return _json({"accepted": [fault.name for fault in asked]})

    async def pause(_: Request) -> Response:
        venue.pause()
        return _json({"paused": True})

    async def resume(_: Request) -> Response:
        venue.resume()
        return _json({"paused": False})

    async def account(request: Request) -> Response:
        query = request.query_params
        try:
            after, busiest = int(query.get("after_fill", "0")), int(query.get("busiest", "0"))
        except ValueError:
            return _json({"error": "after_fill and busiest are whole numbers."}, 400)
        tickers = [ticker for ticker in query.get("tickers", "").split(",") if ticker]
        if not isinstance(venue.exchange, Exchange):
            return _json({"error": "A replay has no account."}, 409)
        return _json(
            orders.account(venue.exchange, after_fill=after, tickers=tickers, busiest=busiest)
        )

    async def order_entry(request: Request) -> Response:
        try:
            wanted = typed_json.decode(await request.body(), list[orders.Request])
        except msgspec.DecodeError as error:
            return _json({"error": f"Not understood ({error}). Send a list of requests."}, 400)
        if not isinstance(venue.exchange, Exchange) or not venue.trading:
            return _json({"error": "There is no trading now."}, 409)
        return _json(venue.ordered(wanted))

    async def portfolio(request: Request) -> Response:
        try:
            order = typed_json.decode(await request.body(), _PortfolioOrder)
        except msgspec.DecodeError as error:
            return _json({"error": f'Not understood ({error}). Send {{"frozen": true}}.'}, 400)
        if not isinstance(venue.exchange, Exchange):
            return _json({"error": "A replay has no account."}, 409)
        venue.exchange.portfolio.frozen_us = time.time_ns() // 1000 if order.frozen else None
        return _json({"frozen": order.frozen})

    return [
        Route("/simulator/account", account, methods=["GET"]),
        Route("/simulator/orders", order_entry, methods=["POST"]),
        Route("/simulator/portfolio", portfolio, methods=["POST"]),
        Route("/simulator/books", books, methods=["GET"]),
        Route("/simulator/state", state, methods=["GET"]),
        Route("/simulator/faults", faults, methods=["POST"]),
        Route("/simulator/pause", pause, methods=["POST"]),
        Route("/simulator/resume", resume, methods=["POST"]),
    ]

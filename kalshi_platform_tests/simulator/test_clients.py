"""Other people's clients on the simulator, as they are: only hosts and keys are set.

The official REST client refuses an answer that misses a field or has one of another type. For each page that the
simulator has, its call is found by the page's path, made with every parameter that it takes, and the answer is
searched for fields that the client's models do not know.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import json
import re
import time
import typing
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import kalshi_python_sync
import pytest
from kalshi_python_sync.exceptions import ApiException
from pydantic import BaseModel
from pykalshi.aclient import AsyncKalshiClient
from pykalshi.afeed import AsyncFeed
from pykalshi.orderbook import OrderbookManager
from starlette.routing import Route

from kalshi_platform.simulator import rest
from kalshi_platform.simulator.book import NO, YES
from kalshi_platform.simulator.config import SimulatorConfig
from kalshi_platform.simulator.exchange import Exchange
from kalshi_platform.simulator.keys import KeyRing
from kalshi_platform.simulator.market import Market
from kalshi_platform.simulator.pages import BASE
from kalshi_platform.simulator.portfolio import OwnFill
from kalshi_platform.simulator.server import Simulator, running
from kalshi_platform.simulator.venue import Venue
from kalshi_platform_tests.simulator_fixtures import StartSimulator

PATIENCE_SECONDS = 90
ALL_STATUSES = {"resting", "executed", "canceled"}


@pytest.fixture(scope="module")
def traded(simulator_key_file: Path) -> Iterator[Simulator]:
    """A simulator whose account has orders of every status, fills, positions and settlements."""
    config = SimulatorConfig(
        markets=8,
        rolling_markets=3,
        rolling_seconds=4.0,
        rate=3_000,
        rest_cache_seconds=0,
        key_file=simulator_key_file,
    )
    with running(config) as simulator:
        until = time.monotonic() + PATIENCE_SECONDS
        for number in itertools.count():
            if simulator._call(lambda venue, number=number: _trade(venue.exchange, number)):  # type: ignore[misc]
                break
            assert time.monotonic() < until
            time.sleep(0.02)
        simulator.pause()
        yield simulator


def _trade(exchange: Exchange, number: int) -> bool:
    """Bid the best price on each side of each market and cancel some; returns whether there is enough of all."""
    account = exchange.portfolio
    for place, market in enumerate(exchange.markets()):
        for side in (YES, NO):
            best = market.book.best[side]
            if market.status == "active" and 0 <= best <= market.book.room(side):
                account.place(
                    market,
                    side=side,
                    price=market.listing.grid.prices[best],
                    qty=150,
                    client_order_id=f"{number}-{place}-{side}",
                    at_ns=exchange.now_ns,
                )
    for order in account.orders()[:-30:3]:
        account.cancel(order.client_order_id, exchange.now_ns)
    return (
        {order.status for order in account.all_orders()} == ALL_STATUSES
        and any(settled.holding.position for settled in account.settled)
        and any(held.realized for held in account.traded())
        and len({fill.order.market.ticker for fill in account.fills}) > 2
        and len(exchange.trades) > 10
    )


@pytest.fixture(scope="module")
def official(traded: Simulator) -> Any:
    """The official client, with nothing set but the host and the key."""
    configuration = kalshi_python_sync.Configuration(host=traded.rest_url)
    configuration.api_key_id = traded.key_id
    configuration.private_key_pem = traded.key_file.read_text()
    return kalshi_python_sync.KalshiClient(configuration)


def _shape(path: str) -> str:
    return re.sub(r"\{\w+\}", "{}", path)


def _calls() -> dict[str, Callable[..., Any]]:
    """The GET calls of the official client, by the shape of their path."""
    found: dict[str, Callable[..., Any]] = {}
    for _, api in inspect.getmembers(kalshi_python_sync, inspect.isclass):
        if not api.__module__.startswith("kalshi_python_sync.api."):
            continue
        for name, call in inspect.getmembers(api, inspect.isfunction):
            serialize = getattr(api, f"_{name}_serialize", None)
            if serialize is None:
                continue
            source = inspect.getsource(serialize)
            (path,) = re.findall(r"resource_path='([^']+)'", source)
            if "method='GET'" in source:
                found[_shape(path)] = call
    return found


def _served() -> list[str]:
    """The paths of the exchange's pages in the simulator."""
    config = SimulatorConfig(markets=1, rolling_markets=0)
    exchange = Exchange(
        markets=1, rate=0, seed=1, now_ns=10**18, rolling_markets=0, rolling_seconds=60
    )
    routes = rest.application(Venue(config, exchange, KeyRing(10))).routes
    paths = [route.path for route in routes if isinstance(route, Route)]
    return [path.removeprefix(BASE) for path in paths if path.startswith(BASE)]


CALLS = _calls()
PAGES = _served()
REFUSED = {
    ("/events", "with_milestones"),
    ("/series", "include_product_metadata"),
    ("/series", "min_updated_ts"),
}
"""Parameters of the exchange that the simulator does not have."""


def _values(simulator: Simulator, page: str) -> dict[str, Any]:
    """A value for each parameter of the official client, by name, with which that page finds something."""

    def one_of_each(venue: Venue) -> tuple[Market, OwnFill]:
        assert isinstance(venue.exchange, Exchange)
        market = next(m for m in venue.exchange.markets() if not m.listing.rolling)
        return market, venue.exchange.portfolio.fills[0]

    market, fill = simulator._call(one_of_each)
    return {
        "ticker": market.ticker,
        "tickers": {
            "/events": market.listing.event_ticker,
            "/markets/orderbooks": [market.ticker],
        }.get(page, market.ticker),
        "event_ticker": market.listing.event_ticker,
        "series_ticker": market.listing.series_ticker,
        "order_id": fill.order.order_id,
        "category": "Economics",
        "tags": "Annual",
        "limit": 2,
        "cursor": "",
        "depth": 2,
        "status": "resting" if page == "/portfolio/orders" else "open",
        "mve_filter": "exclude",
        "count_filter": "position",
        "settlement_status": "all",
        "subaccount": 0,
        "exchange_index": 0,
        "with_nested_markets": True,
        "with_milestones": True,
        "include_volume": True,
        "include_product_metadata": True,
        "is_block_trade": False,
        **{f"min_{name}_ts": 0 for name in ("created", "updated", "close", "settled")},
        **{f"max_{name}_ts": 2**33 for name in ("created", "updated", "close", "settled")},
        "min_ts": 0,
        "max_ts": 2**33,
    }


def _parameters(call: Callable[..., Any]) -> tuple[list[str], list[str]]:
    """The required and the optional parameters of a call."""
    parameters = inspect.signature(call).parameters.values()
    named = [one for one in parameters if one.name != "self" and not one.name.startswith("_")]
    return (
        [one.name for one in named if one.default is inspect.Parameter.empty],
        [one.name for one in named if one.default is not inspect.Parameter.empty],
    )


def _raw(official: Any, call: Callable[..., Any], **values: Any) -> Any:
    """Make a call; the answer has been validated against the client's models. Returns its JSON as sent."""
    answer = getattr(official, f"{call.__name__}_with_http_info")(**values)
    return answer.data, json.loads(answer.raw_data)


def _invented(value: Any, kind: Any, where: str) -> Iterator[str]:
    """The fields of a JSON value that its model does not know."""
    models = [kind, *_leaves(kind)]
    model = next((m for m in models if inspect.isclass(m) and issubclass(m, BaseModel)), None)
    if model is None:
        return
    for item in value if isinstance(value, list) else [value]:
        for name, held in (item or {}).items():
            fields = {field.alias or key: field for key, field in model.model_fields.items()}
            if name not in fields:
                yield f"{where}.{name}"
            else:
                yield from _invented(held, fields[name].annotation, f"{where}.{name}")


def _leaves(kind: Any) -> Iterator[Any]:
    for part in typing.get_args(kind):
        yield part
        yield from _leaves(part)


@pytest.mark.parametrize("page", PAGES)
def test_each_page_satisfies_the_official_clients_models(
    page: str, traded: Simulator, official: Any
) -> None:
    assert _shape(page) in CALLS, "the exchange has no such page"
    call = CALLS[_shape(page)]
    required, _ = _parameters(call)
    values = _values(traded, page)
    model, raw = _raw(official, call, **{name: values[name] for name in required})
    assert list(_invented(raw, type(model), page)) == []
    for name, found in raw.items():
        empty = {"grants", "maintenance_windows"}
        assert found or name in empty or not isinstance(found, list), f"{name} proves nothing"


@pytest.mark.parametrize("page", PAGES)
def test_each_parameter_is_read_or_refused_by_its_name(
    page: str, traded: Simulator, official: Any
) -> None:
    call = CALLS[_shape(page)]
    required, optional = _parameters(call)
    values = _values(traded, page)
    given = {name: values[name] for name in required}
    for name in optional:
        value = values[name]
        if (page, name) in REFUSED:
            with pytest.raises(ApiException) as refused:
                _raw(official, call, **given, **{name: value})
            assert refused.value.status == 400
            assert name in str(refused.value.body)
        else:
            model, raw = _raw(official, call, **given, **{name: value})
            assert list(_invented(raw, type(model), page)) == []


def test_every_status_of_a_market_satisfies_the_models(traded: Simulator, official: Any) -> None:
    seen = set()
    for status in ("unopened", "open", "closed", "settled"):
        markets = official.get_markets(status=status, limit=1000).markets
        seen |= {market.status for market in markets}
        assert {official.get_market(market.ticker).market.status for market in markets} <= seen
    assert seen >= {"initialized", "active", "finalized"}


def test_orders_are_filtered_by_market_event_status_and_time(official: Any) -> None:
    everything = _all(official.get_orders, "orders")
    assert {order.status.value for order in everything} == ALL_STATUSES
    ticker = everything[0].ticker
    event = official.get_market(ticker).market.event_ticker
    second = int(everything[len(everything) // 2].created_time.timestamp())
    cases: list[tuple[Callable[[Any], bool], dict[str, Any]]] = [
        (lambda order: order.ticker == ticker, {"ticker": ticker}),
        (lambda order: order.ticker.startswith(f"{event}-"), {"event_ticker": event}),
        (lambda order: order.status.value == "canceled", {"status": "canceled"}),
        (lambda order: order.created_time.timestamp() >= second, {"min_ts": second}),
        (lambda order: order.created_time.timestamp() <= second, {"max_ts": second}),
    ]
    for wanted, filters in cases:
        found = _all(functools.partial(official.get_orders, **filters), "orders")
        assert [order.order_id for order in found] == [
            order.order_id for order in everything if wanted(order)
        ], filters
        assert found, filters
    with pytest.raises(ApiException, match="no-such-status"):
        official.get_orders(status="no-such-status")


def test_orders_agree_with_their_fills(official: Any) -> None:
    fills = _all(official.get_fills, "fills")
    orders = {order.order_id: order for order in _all(official.get_orders, "orders")}
    assert len({fill.fill_id for fill in fills}) == len(fills)
    order_id = fills[0].order_id
    own = official.get_fills(order_id=order_id, limit=1000).fills
    assert own == [fill for fill in fills if fill.order_id == order_id]
    assert official.get_order(order_id).order == orders[order_id]
    of_order: dict[str, list[Any]] = {order_id: [] for order_id in orders}
    for fill in fills:
        of_order[fill.order_id].append(fill)
    for order_id, order in orders.items():
        own = of_order[order_id]
        count = sum(Decimal(fill.count_fp) for fill in own)
        cost = sum(
            Decimal(fill.count_fp) * Decimal(getattr(fill, f"{order.outcome_side}_price_dollars"))
            for fill in own
        )
        assert Decimal(order.fill_count_fp) == count
        assert Decimal(order.maker_fill_cost_dollars) == cost
        assert Decimal(order.maker_fees_dollars) == sum(Decimal(fill.fee_cost) for fill in own)
        remaining = Decimal(order.remaining_count_fp)
        if order.status.value == "canceled":
            assert remaining == 0
        else:
            assert count + remaining == Decimal(order.initial_count_fp)
        assert (order.status.value == "executed") == (count == Decimal(order.initial_count_fp))


def _all(call: Callable[..., Any], name: str) -> list[Any]:
    """Every item of every page."""
    items: list[Any] = []
    cursor = ""
    while True:
        page = call(limit=100, cursor=cursor)
        items += getattr(page, name)
        cursor = page.cursor
        if not cursor:
            return items


def test_nested_markets_are_in_the_event_and_else_beside_it(official: Any) -> None:
    for listed in official.get_events(with_nested_markets=True).events:
        nested = official.get_event(listed.event_ticker, with_nested_markets=True)
        beside = official.get_event(listed.event_ticker)
        assert nested.markets == []
        assert beside.event.markets is None
        assert [market.ticker for market in nested.event.markets] == [
            market.ticker for market in beside.markets
        ]
        assert listed.markets == nested.event.markets == beside.markets
    assert all(event.markets is None for event in official.get_events().events)


def test_a_websocket_client_keeps_the_simulators_books(
    start_simulator: StartSimulator, caplog: pytest.LogCaptureFixture
) -> None:
    simulator = start_simulator(markets=6, rolling_markets=0, rate=1_000)
    asyncio.run(asyncio.wait_for(_follow(simulator), PATIENCE_SECONDS))
    # the client logs what its models refuse, and goes on
    assert [record.message for record in caplog.records if "validate" in record.message] == []


async def _follow(simulator: Simulator) -> None:
    client = AsyncKalshiClient(
        api_key_id=simulator.key_id,
        private_key_path=str(simulator.key_file),
        api_base=simulator.rest_url,
    )
    feed = AsyncFeed(client)
    feed._ws_url = simulator.ws_url  # it has no option for the host
    tickers = list(simulator.books())
    for channel in ("orderbook_delta", "trade", "ticker", "market_lifecycle_v2"):
        feed.subscribe(channel, market_tickers=tickers)
    books = {ticker: OrderbookManager(ticker) for ticker in tickers}
    kinds: dict[str, int] = {}
    deltas = 0
    async for msg in feed:
        kinds[type(msg).__name__] = kinds.get(type(msg).__name__, 0) + 1
        if hasattr(msg, "yes_dollars_fp"):
            books[msg.market_ticker].apply_snapshot(msg.yes_dollars_fp, msg.no_dollars_fp)
        elif hasattr(msg, "delta_fp"):
            books[msg.market_ticker].apply_delta(msg.side, msg.price_dollars, msg.delta_fp)
            deltas += 1
            if deltas == 500:
                await asyncio.to_thread(simulator.pause)
        if deltas >= 500 and _same(books, simulator):
            break
    await feed.disconnect()
    await client.aclose()
    assert kinds.keys() >= {"OrderbookSnapshotMessage", "TradeMessage", "TickerMessage"}
    assert feed.reconnect_count == 0


def _same(books: dict[str, Any], simulator: Simulator) -> bool:
    """Whether the client's books are the simulator's, level by level."""
    return all(
        {price: Decimal(qty) for price, qty in getattr(books[ticker], side).items()}
        == {price: Decimal(qty) for price, qty in view.texts()[side]}
        for ticker, view in simulator.books().items()
        for side in ("yes", "no")
    )

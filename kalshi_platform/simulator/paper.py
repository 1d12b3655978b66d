"""The paper market maker: quotes simulated markets, gets filled, and records it with the library.

It shows what a healthy engine's tables look like, and, when it misbehaves on request, what each fault
looks like. Its orders go to the simulator's own pages, which no exchange has: it takes no URL and no
key, and there is nothing that it could send anywhere else.
"""

from __future__ import annotations

import itertools
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Any, Protocol, Self

import httpx
import msgspec

from kalshi_platform import __version__, typed_json
from kalshi_platform.errors import PlatformError
from kalshi_platform.inventory.live_orders import LiveOrders
from kalshi_platform.inventory.recorder import (
    NO_DECISION,
    ActionType,
    Quoted,
    Recorder,
    Sent,
    Sink,
)
from kalshi_platform.inventory.rows import DECISIONS, ORDER_ACTIONS, POSITION_SNAPSHOTS
from kalshi_platform.inventory.semantics import (
    Contract,
    Inventory,
    OrderStatus,
    Quote,
    Reconciled,
    WorkingOrder,
    inventory,
)
from kalshi_platform.inventory.values import NOTHING
from kalshi_platform.simulator.orders import Account, AccountFill, Answered, Request, Top

ENGINE_VERSION = f"paper-{__version__}"
MOST_HELD = Decimal(40)
"""Position limit in contracts, long or short; beyond it the side that adds is not quoted."""
SIZES = tuple(map(Decimal, ("10.00", "7.50", "5.00", "3.25", "2.00")))
"""Contracts of a quote, by market in turn; with fractions, to test them."""
SNAPSHOT_EVERY_NS = 60 * 1_000_000_000
"""A position is written when it changes, and at least this often."""


class PaperError(PlatformError):
    """The paper market maker cannot go on."""


class Misbehaviour(Enum):
    """Mistakes that the paper market maker can make."""

    ROLLED = "rolled"
    """inv_before := inv_after_est of the decision before."""
    PHANTOM = "phantom"
    """Exposure from orders that do not exist."""
    MISSED_FILL = "missed-fill"
    """Fills that the engine never receives."""
    NO_ACTIONS = "no-actions"
    """Orders that are sent and not recorded."""
    STALE = "stale"
    """Frozen portfolio pages, and no snapshots."""


class Gateway(Protocol):
    """Access to a simulated exchange."""

    def account(self, after_fill: int, tickers: Sequence[str], busiest: int) -> Account:
        """Return the account at one instant."""

    def send(self, requests: Sequence[Request]) -> list[Answered]:
        """Carry requests out."""

    def freeze(self, frozen: bool) -> None:
        """Freeze the portfolio pages, or continue them."""


class SimulatorGateway:
    """Client of the simulator's own pages on the loopback address; it can reach nothing else."""

    def __init__(self, port: int) -> None:
        self._where = f"the simulator on port {port}"
        self._http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}/simulator", timeout=10.0, trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def where(self) -> httpx.URL:
        """The base address of all its requests."""
        return self._http.base_url

    def account(self, after_fill: int, tickers: Sequence[str], busiest: int) -> Account:
        """Return the account at one instant. Raises `PaperError`."""
        params: dict[str, str | int] = {"after_fill": after_fill, "busiest": busiest}
        if tickers:
            params["tickers"] = ",".join(tickers)
        answer = self._ask("GET", "/account", params=params)
        return typed_json.decode(answer, Account)

    def send(self, requests: Sequence[Request]) -> list[Answered]:
        """Carry requests out. Raises `PaperError`."""
        body = msgspec.json.encode(list(requests))
        return typed_json.decode(self._ask("POST", "/orders", content=body), list[Answered])

    def freeze(self, frozen: bool) -> None:
        """Freeze the portfolio pages, or continue them. Raises `PaperError`."""
        self._ask("POST", "/portfolio", content=json.dumps({"frozen": frozen}))

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def _ask(self, method: str, path: str, **more: Any) -> bytes:
        try:
            answer = self._http.request(method, path, **more)
        except httpx.TransportError as error:
            raise PaperError(
                f"{self._where.capitalize()} cannot be reached ({error})."
                " Start it: kalshi-platform simulate."
            ) from error
        if answer.status_code != httpx.codes.OK:
            raise PaperError(
                f"{self._where.capitalize()} refused {path} (HTTP {answer.status_code}):"
                f" {answer.text[:200]}"
            )
        return answer.content


class Tampering:
    """A sink that falsifies rows, which the library itself does not let an engine do."""

    def __init__(self, inner: Sink, fault: Misbehaviour) -> None:
        self._inner = inner
        self._fault = fault
        self._estimates: dict[str, float] = {}

    def put(self, table: str, row: Mapping[str, Any]) -> None:
        """Pass a row on, false or not at all."""
        if self._fault is Misbehaviour.NO_ACTIONS and table == ORDER_ACTIONS.name:
            return
        if self._fault is Misbehaviour.STALE and table == POSITION_SNAPSHOTS.name:
            return
        if table == DECISIONS.name:
            row = self._falsified(dict(row))
        self._inner.put(table, row)

    def _falsified(self, row: dict[str, Any]) -> dict[str, Any]:
        if self._fault is Misbehaviour.ROLLED:
            ticker = row["market_ticker"]
            change = row["inv_after_est"] - row["inv_before"]
            row["inv_before"] = self._estimates.get(ticker, row["inv_before"])
            row["inv_after_est"] = self._estimates[ticker] = row["inv_before"] + change
        elif self._fault is Misbehaviour.PHANTOM:
            row["open_orders_count"] = 0
            for name in ("yes_bid", "yes_ask", "no_bid", "no_ask"):
                row[f"open_{name}_size"] = 0.0
            row["pos_open_exposure"] = 7.0
            row["pos_total_est"] = row["pos_filled"] + 7.0
        return row


@dataclass(frozen=True)
class _Wish:
    """Where to quote one market; None: not at all on that side."""

    bid: Decimal | None
    ask: Decimal | None
    codes: tuple[str, ...]


@dataclass(frozen=True)
class _Resting:
    """An order of ours as the last account had it."""

    client_order_id: str
    price: Decimal
    remaining: Decimal


class PaperMarketMaker:
    """One engine. `begin` once, `loop` again and again, `end` once."""

    def __init__(
        self,
        gateway: Gateway,
        recorder: Recorder,
        *,
        markets: int = 5,
        missed_fills: bool = False,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._gateway = gateway
        self._recorder = recorder
        self._markets = markets
        self._missed_fills = missed_fills
        self._clock_ns = clock_ns
        self._prefix = f"paper-{uuid.uuid4().hex[:8]}"
        self._names = itertools.count(1)
        self._epoch = ""
        self._last_fill = 0
        self._tickers: list[str] = []
        self._held: dict[str, Reconciled] = {}
        self._orders = LiveOrders()
        self._reported: dict[str, tuple[str, int]] = {}
        """The exchange's last word on each market, and when it was written."""
        self.decisions = 0
        self.fills = 0

    def begin(self) -> None:
        """Choose the markets, take over the positions, cancel orders that an earlier engine left."""
        account = self._gateway.account(0, (), self._markets)
        self._epoch, self._last_fill = account.epoch, account.last_fill
        self._tickers = [top.ticker for top in account.tops]
        self._held.clear()
        self._reported.clear()
        self._orders = LiveOrders()
        if not self._tickers:
            raise PaperError("The simulator has no market that stays open. Give it more markets.")
        for ticker in self._tickers:
            self._held[ticker] = Reconciled.from_exchange(
                ticker, account.positions.get(ticker, "0"), self._now()
            )
            sent = self._recorder.action(
                ticker, f"{self._prefix}-all", ActionType.CANCEL, request={"cancel": "all"}
            )
            mine = [order for order in account.orders if order.ticker == ticker]
            answers = self._send(
                [_cancel(order.client_order_id, ticker, order.remaining) for order in mine]
            )
            self._recorder.response(
                sent, "canceled", latency_ms=0.0, response={"canceled": len(answers)}
            )

    def loop(self) -> None:
        """Read the account, record its changes, decide for every market, act."""
        account = self._gateway.account(self._last_fill, self._tickers, 0)
        if account.epoch != self._epoch:
            raise PaperError("The simulator was restarted: its positions are gone.")
        for fill in account.fills:
            self._take(fill)
        self._last_fill = account.last_fill
        self._note_ends(account)
        self._report(account)
        for index, top in enumerate(account.tops):
            if top.active:
                self._quote(top, account, SIZES[index % len(SIZES)])

    def end(self) -> None:
        """Cancel every order, and record it."""
        account = self._gateway.account(self._last_fill, self._tickers, 0)
        for order in account.orders:
            if order.ticker in self._held:
                self._act(
                    [_cancel(order.client_order_id, order.ticker, order.remaining)], NO_DECISION
                )

    # -- changes of the account ----------------------------------------------------------------

    def _take(self, fill: AccountFill) -> None:
        if fill.ticker not in self._held:
            return  # an order of another engine's
        self.fills += 1
        contract = Contract(fill.outcome_side)
        count, at = Decimal(fill.count), datetime.fromtimestamp(fill.ts_us / 1e6, UTC)
        order = None
        if fill.client_order_id in self._orders:
            order = self._orders.filled(fill.client_order_id, count)
        if self._missed_fills and self.fills % 3 == 1:
            return
        self._held[fill.ticker] = self._held[fill.ticker].filled(contract, count, at)
        self._recorder.fill(
            fill.ticker,
            fill.fill_id,
            contract,
            count,
            Decimal(fill.price),
            at=at,
            exchange_order_id=fill.order_id,
            client_order_id=fill.client_order_id,
            raw=msgspec.to_builtins(fill),
        )
        if order is not None and order.status is not None:
            self._recorder.order_changed(order.sent, order.status)

    def _note_ends(self, account: Account) -> None:
        """Record orders that the exchange has canceled by itself, as at a market's close."""
        there = {order.client_order_id for order in account.orders}
        for ticker in self._tickers:
            for order in self._orders.live(ticker):
                if order.sent.client_order_id not in there:
                    self._orders.heard(order.sent.client_order_id, OrderStatus.CANCELED)
                    self._recorder.order_changed(order.sent, OrderStatus.CANCELED)

    def _report(self, account: Account) -> None:
        now = self._clock_ns()
        for ticker in self._tickers:
            said = account.positions.get(ticker, "0.00")
            before = self._reported.get(ticker)
            if before is None or before[0] != said or now - before[1] >= SNAPSHOT_EVERY_NS:
                self._reported[ticker] = (said, now)
                reported = Reconciled.from_exchange(ticker, said, self._now())
                raw = {"ticker": ticker, "position_fp": said, "as_of": account.as_of}
                self._recorder.snapshot(reported, source="account", raw=raw)

    # -- decisions and orders ------------------------------------------------------------------

    def _quote(self, top: Top, account: Account, size: Decimal) -> None:
        resting = {
            order.quote: _Resting(
                order.client_order_id, Decimal(order.price), Decimal(order.remaining)
            )
            for order in account.orders
            if order.ticker == top.ticker
        }
        now = inventory(
            self._held[top.ticker],
            [
                WorkingOrder(order.client_order_id, Contract.YES, Quote(quote), order.remaining)
                for quote, order in resting.items()
            ],
        )
        wish = _wish(top, now, size, resting)
        decided = self._recorder.decision(
            now,
            _quoted(top, wish, size),
            expected_change=Decimal(1) if now.pos_filled <= 0 else Decimal(-1),
            allowed=not wish.codes,
            block_stage="risk" if wish.codes else "",
            block_codes=wish.codes,
            reason_codes=wish.codes[:1],
        )
        self.decisions += 1
        requests = [
            request
            for quote, price in ((Quote.BID, wish.bid), (Quote.ASK, wish.ask))
            if (request := self._request(top.ticker, quote, price, size, resting)) is not None
        ]
        self._act(requests, decided.decision_id)

    def _request(
        self,
        ticker: str,
        quote: Quote,
        price: Decimal | None,
        size: Decimal,
        resting: Mapping[str, _Resting],
    ) -> Request | None:
        mine = resting.get(quote.value)
        if price is None:
            return _cancel(mine.client_order_id, ticker, str(mine.remaining)) if mine else None
        if mine is not None and mine.price == price:
            return None
        return Request(
            client_order_id=f"{self._prefix}-{next(self._names)}",
            ticker=ticker,
            action="place",
            quote=quote.value,
            price=str(price),
            count=str(size),
            replace_of=mine.client_order_id if mine is not None else "",
        )

    def _act(self, requests: Sequence[Request], decision_id: uuid.UUID) -> None:
        sent = [self._recorded(request, decision_id) for request in requests]
        for action, request in zip(sent, requests, strict=True):
            if request.action == "place":
                replaced = request.replace_of if request.replace_of in self._orders else ""
                quote, size = Quote(request.quote), Decimal(request.count)
                self._orders.placed(action, Contract.YES, quote, size, replaces=replaced)
        begun = self._clock_ns()
        answers = self._send(requests)
        latency_ms = (self._clock_ns() - begun) / 1e6
        for action, answer in zip(sent, answers, strict=True):
            self._recorder.response(
                action,
                answer.status,
                exchange_order_id=answer.order_id,
                reject_reason=answer.reject_reason,
                latency_ms=latency_ms,
                response=msgspec.to_builtins(answer),
            )
        for request, answer in zip(requests, answers, strict=True):
            is_refused_cancel = request.action == "cancel" and answer.status == "rejected"
            if request.client_order_id in self._orders and not is_refused_cancel:
                self._orders.heard(request.client_order_id, answer.status)

    def _recorded(self, request: Request, decision_id: uuid.UUID) -> Sent:
        kind = ActionType.REPLACE if request.replace_of else ActionType(request.action)
        return self._recorder.action(
            request.ticker,
            request.client_order_id,
            kind,
            decision_id=decision_id,
            quote=Quote(request.quote),
            contract=Contract.YES,
            price=Decimal(request.price),
            size=Decimal(request.count),
            replace_of=request.replace_of,
            request=msgspec.to_builtins(request),
        )

    def _send(self, requests: Sequence[Request]) -> list[Answered]:
        return self._gateway.send(requests) if requests else []

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock_ns() / 1e9, UTC)


def _cancel(client_order_id: str, ticker: str, remaining: str) -> Request:
    return Request(client_order_id=client_order_id, ticker=ticker, action="cancel", count=remaining)


def _wish(top: Top, now: Inventory, size: Decimal, resting: Mapping[str, _Resting]) -> _Wish:
    """Return quotes at the best price, or a tick better if there is room; never beyond the limit."""
    if top.bid is None or top.ask is None:
        return _Wish(None, None, ("no_market",))
    bid, ask, tick = Decimal(top.bid), Decimal(top.ask), Decimal(top.tick)
    codes: list[str] = []
    room = ask - bid > 2 * tick
    ours = resting.get("bid")
    wanted_bid: Decimal | None = bid + tick if room and (ours is None or ours.price < bid) else bid
    ours = resting.get("ask")
    wanted_ask: Decimal | None = ask - tick if room and (ours is None or ours.price > ask) else ask
    if now.pos_filled + size > MOST_HELD:
        wanted_bid, codes = None, [*codes, "max_long"]
    if now.pos_filled - size < -MOST_HELD:
        wanted_ask, codes = None, [*codes, "max_short"]
    return _Wish(wanted_bid, wanted_ask, tuple(codes))


def _quoted(top: Top, wish: _Wish, size: Decimal) -> Quoted:
    bid = float(top.bid) if top.bid is not None else NOTHING
    ask = float(top.ask) if top.ask is not None else NOTHING
    return Quoted(
        bb_px=bid,
        ba_px=ask,
        fair=(bid + ask) / 2,
        target_bid_px=float(wish.bid) if wish.bid is not None else NOTHING,
        target_ask_px=float(wish.ask) if wish.ask is not None else NOTHING,
        target_bid_sz=float(size) if wish.bid is not None else 0.0,
        target_ask_sz=float(size) if wish.ask is not None else 0.0,
        params={"most_held": str(MOST_HELD), "size": str(size)},
    )

"""A small exchange and engines that keep their books right, in simulated time: hours of trading in a
second, the same from the same seed.

One `Market` holds the account's true position, its resting orders, takers who fill them, and the
platform's collector of positions. Each `Engine` quotes both sides, hears what the exchange does some
milliseconds later, and writes a decision in each loop. What they write are rows of the five mm_* tables.
Engines that do one thing wrong are in faults.py.

Sizes are hundredths of a contract and times milliseconds from the market's begin, both integers.
"""

from __future__ import annotations

import heapq
import json
import random
import uuid
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pyarrow as pa

from kalshi_platform.clickhouse.client import Client, insert_arrow
from kalshi_platform.inventory.rows import TABLES

SECOND = 1000
MINUTE = 60 * SECOND
NO_ID = str(uuid.UUID(int=0))

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Options of a market and its engines; healthy with any values."""

    minutes: float = 20.0
    loop_ms: int = 1000
    jitter: float = 0.1
    snapshot_every: int = 5 * MINUTE
    taker_every: int = 12 * SECOND
    """Mean time between takers who hit our orders."""
    price_every: int = 8 * SECOND
    cancel_ack: tuple[int, int] = (45, 255)
    exchange_cancels_every: int = 0
    """Mean time between orders that the exchange cancels or lets expire by itself; 0 is never."""
    settles_at: int = 0
    """When the market settles; 0 is not at all."""
    result: str = "yes"
    quote_sizes: tuple[int, int] = (300, 1200)
    whole: bool = False
    """Whether orders and fills are of whole contracts, and so of few different amounts."""
    fills_at: str = "exchange"
    """Whose time a fill's row carries: the exchange's, or the engine's when it heard of it."""
    no_bids: bool = False
    """Whether the engine sells YES as bids for NO."""
    records_events: bool = True
    """Whether the engine records executed and partially_filled beside its fills."""
    records_all_fills: bool = False
    """Whether it also records the fills of the account's other engines."""
    skew_ms: int = 0
    """How far the engine's clock is ahead of the exchange's and the collector's."""
    begins_with: int = 0
    taped: bool = True
    """Whether the platform records the market's public trades."""
    rejects: float = 0.01
    replaces: float = 0.25
    hesitates: float = 0.5
    """How often a side without an order stays without one for another loop."""


class Order:
    """An order of ours: what the exchange has of it, and what its engine knows."""

    def __init__(self, engine: Engine, name: str, sign: int, price: int, size: int) -> None:
        self.engine = engine
        self.client_order_id = name
        self.sign = sign
        self.no_bid = sign < 0 and engine.options.no_bids
        self.price = price
        self.size = size
        self.action_id = ""
        self.remaining = 0
        """At the exchange; 0 before it rests and after it has ended."""
        self.seen = size
        """What the engine counts."""
        self.leaving = False
        """Whether a request to cancel or replace it is on its way."""
        self.forgotten = False
        """Counted, and looked after no more."""
        self.replaces: Order | None = None
        self.reduced = 0
        """What the exchange took from the order that this one replaced."""

    @property
    def side(self) -> str:
        return "bid" if self.sign > 0 or self.no_bid else "ask"

    @property
    def api_side(self) -> str:
        return "no" if self.no_bid else "yes"

    @property
    def api_price(self) -> float:
        return (100 - self.price if self.no_bid else self.price) / 100


@dataclass(frozen=True)
class Fill:
    """A fill of one of our orders, as the exchange made it."""

    fill_id: str
    at: int
    order: Order
    signed: int
    whole: bool
    """Whether the order has ended with it."""
    planted: bool = False
    """Whether a fault asked for it."""


@dataclass(frozen=True)
class Word:
    """A message of the exchange about an order: an answer, or unsolicited."""

    order: Order
    action_id: str
    """What it answers; the order's own place where it answers nothing."""
    status: str
    sent: int
    reduced: int = 0
    """What it took off the order."""
    reason: str = ""
    asked: str = ""
    """What was rejected."""


class Engine:
    """A market maker in one market that keeps its books right.

    What it hears comes through `hears_*`; faults override them, and `tampers`, which may change a
    decision before it is written.
    """

    loses_remainder = False
    """Whether an order that was canceled leaves the books with all that was still counted of it. A right
    engine takes off what the exchange took off: the fill of the rest may still be on its way.
    """

    def __init__(self, market: Market, name: str, options: Options) -> None:
        self.market = market
        self.name = name
        self.options = options
        self.rng = market.rng
        self.position = market.position
        self.live: dict[str, Order] = {}
        self.quoting = True
        self.stopped = False
        self.last_action = -MINUTE
        market.engines.append(self)
        market.at(self.rng.randint(200, 900), self.loop)

    # -- its loop --------------------------------------------------------------------------------

    def loop(self, t: int) -> None:
        """Decide, record, act."""
        if self.stopped:
            return
        self.decides(t)
        self.acts(t)
        jitter = int(self.options.loop_ms * self.options.jitter)
        self.market.at(t + self.options.loop_ms + self.rng.randint(-jitter, jitter), self.loop)

    def decides(self, t: int) -> None:
        yes_bid = yes_ask = no_bid = 0
        for order in self.live.values():
            if order.sign > 0:
                yes_bid += order.seen
            elif order.no_bid:
                no_bid += order.seen
            else:
                yes_ask += order.seen
        exposure = yes_bid - yes_ask - no_bid
        market = self.market
        row: Row = {
            "decision_id": market.uuid(),
            "bb_px": (market.price - 1) / 100,
            "ba_px": (market.price + 1) / 100,
            "inv_before": self.position / 100,
            "inv_after_est": (self.position + self.rng.choice((0, 0, 500, -500))) / 100,
            "pos_filled": self.position / 100,
            "pos_open_exposure": exposure / 100,
            "pos_total_est": (self.position + exposure) / 100,
            "open_orders_count": len(self.live),
            "open_yes_bid_size": yes_bid / 100,
            "open_yes_ask_size": yes_ask / 100,
            "open_no_bid_size": no_bid / 100,
            "open_no_ask_size": 0.0,
            "allowed": int(self.quoting),
            "block_codes": [] if self.quoting else ["market_closed"],
            "inv_convention": "yes_positive",
        }
        self.tampers(t, row)
        self.write("mm_decisions", t, row)

    def tampers(self, t: int, row: Row) -> None:
        """Nothing: a right engine writes what it has."""

    def acts(self, t: int) -> None:
        if not self.quoting:
            return
        for sign in (1, -1):
            order = next(
                (each for each in self.live.values() if each.sign == sign and not each.forgotten),
                None,
            )
            if self.position * sign >= 4000:
                if order is not None and not order.leaving:
                    self.cancels(t + 1, order)
            elif order is None:
                if self.rng.random() >= self.options.hesitates:
                    self.places(t + 2, sign)
            elif not order.leaving and order.price != self.market.price - sign:
                drawn = self.rng.random()
                if drawn < self.options.replaces:
                    self.replaces(t + 3, order)
                elif drawn < self.options.replaces * 1.3 and order.seen > 200:
                    self.decreases(t + 3, order)
                else:
                    self.cancels(t + 1, order)

    # -- what it asks ----------------------------------------------------------------------------

    def new_order(self, sign: int) -> Order:
        size = self.rng.randint(*self.options.quote_sizes)
        if self.options.whole:
            size -= size % 100
        return Order(self, self.market.name("o"), sign, self.market.price - sign, size)

    def places(self, t: int, sign: int) -> None:
        order = self.new_order(sign)
        self.live[order.client_order_id] = order
        order.action_id = self.asks(t, "place", order, order.size)
        self.market.at(t + self.rng.randint(10, 60), self.market.takes_place, order, t)

    def cancels(self, t: int, order: Order) -> None:
        order.leaving = True
        action_id = self.asks(t, "cancel", order, order.seen)
        whole = self.rng.randint(*self.options.cancel_ack)
        at = t + self.rng.randint(whole // 4, whole // 2)
        takes = partial(self.market.takes_cancel, back=t + whole)
        self.market.at(at, takes, order, action_id, t)

    def replaces(self, t: int, order: Order) -> None:
        order.leaving = True
        new = self.new_order(order.sign)
        new.replaces = order
        new.action_id = self.asks(t, "replace", new, new.size, order.client_order_id)
        self.market.at(t + self.rng.randint(10, 60), self.market.takes_replace, order, new, t)

    def decreases(self, t: int, order: Order) -> None:
        order.leaving = True
        size = self.rng.randint(50, order.seen - 50)
        action_id = self.asks(t, "replace", order, size, order.client_order_id)
        at = t + self.rng.randint(10, 60)
        self.market.at(at, self.market.takes_decrease, order, size, action_id, t)

    def asks(self, t: int, kind: str, order: Order, size: int, replaced: str = "") -> str:
        action_id = self.market.name("a")
        self.last_action = t
        self.write(
            "mm_order_actions",
            t,
            {
                "action_id": action_id,
                "client_order_id": order.client_order_id,
                "action_type": kind,
                "side": order.side,
                "api_side": order.api_side,
                "price": order.api_price,
                "price_cents": order.api_price * 100,
                "size": size / 100,
                "replace_of_client_order_id": replaced,
                "request_json": '{"post_only":true}',
            },
        )
        return action_id

    # -- what it hears ---------------------------------------------------------------------------

    def hears_fill(self, t: int, fill: Fill) -> None:
        """Book a fill of the account: its own, or another engine's."""
        if fill.order.engine is self or self.options.records_all_fills:
            self.records_fill(t, fill)
        self.books(t, fill)
        if fill.order.engine is self:
            self.reduces(t, fill)

    def books(self, t: int, fill: Fill) -> None:
        self.position += fill.signed

    def reduces(self, t: int, fill: Fill) -> None:
        order = fill.order
        self._confirms(order)
        self._takes_off(order, abs(fill.signed))
        if self.options.records_events:
            status = "executed" if fill.whole else "partially_filled"
            self.records_word(t, Word(order, order.action_id, status, t))

    def records_fill(self, t: int, fill: Fill, **others: Any) -> None:
        order, yes = fill.order, fill.signed > 0
        moment = datetime.fromtimestamp((self.market.start_ms + fill.at) / 1000, UTC)
        raw = {
            "fill_id": fill.fill_id,
            "order_id": f"x-{order.client_order_id}",
            "outcome_side": "yes" if yes else "no",
            "count_fp": f"{abs(fill.signed) / 100:.2f}",
            "created_time": moment.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z",
        }
        row: Row = {
            "exchange_order_id": f"x-{order.client_order_id}",
            "client_order_id": order.client_order_id,
            "side": "yes" if yes else "no",
            "price": (order.price if yes else 100 - order.price) / 100,
            "price_cents": float(order.price if yes else 100 - order.price),
            "size": abs(fill.signed) / 100,
            "fill_id": fill.fill_id,
            "raw_json": json.dumps(raw),
        } | others
        ts = fill.at if self.options.fills_at == "exchange" else None
        self.write("mm_fills", t, row, ts=ts)

    def records_word(self, t: int, word: Word) -> None:
        order = word.order
        self.write(
            "mm_order_responses",
            t,
            {
                "action_id": word.action_id,
                "client_order_id": order.client_order_id,
                "status": word.status,
                "exchange_order_id": f"x-{order.client_order_id}",
                "reject_reason": word.reason,
                "latency_ms": float(t - word.sent),
                "response_json": f'{{"status":"{word.status}","remaining_count_fp":"{order.remaining / 100:.2f}"}}',
            },
        )

    def hears_resting(self, t: int, word: Word) -> None:
        self.records_word(t, word)
        self._confirms(word.order)

    def hears_decreased(self, t: int, word: Word) -> None:
        self.records_word(t, word)
        word.order.leaving = False
        self._takes_off(word.order, word.reduced)

    def hears_rejected(self, t: int, word: Word) -> None:
        self.records_word(t, word)
        order = word.order
        if word.asked == "place":
            self.live.pop(order.client_order_id, None)
        elif order.replaces is not None:
            order.replaces.leaving = False
        else:
            order.leaving = False

    def hears_end(self, t: int, word: Word) -> None:
        """An order was canceled, at our request or by the exchange, or expired."""
        self.records_word(t, word)
        self._takes_off(word.order, word.order.seen if self.loses_remainder else word.reduced)

    def hears_close(self, t: int) -> None:
        self.quoting = False

    def hears_settlement(self, t: int) -> None:
        """The market has settled: what was held is cash now."""
        raw = json.dumps({"result": self.options.result, "value": 100})
        row = {"pos_filled": 0.0, "avg_cost": 0.0, "source": "settlement", "raw_json": raw}
        self.write("mm_position_snapshots", t, row)
        self.position = 0

    def _takes_off(self, order: Order, size: int) -> None:
        order.seen -= size
        if order.seen <= 0:
            self.live.pop(order.client_order_id, None)

    def _confirms(self, order: Order) -> None:
        """A replacement has come into being: the order before it is gone."""
        before, order.replaces = order.replaces, None
        if before is not None:
            self._takes_off(before, order.reduced)
            self.live[order.client_order_id] = order

    def write(self, table: str, t: int, row: Row, *, ts: int | None = None) -> None:
        own = {"engine_instance_id": self.name, "market_ticker": self.market.ticker}
        at = t + self.options.skew_ms if ts is None else ts
        self.market.rows.append((table, t, {"ts": at, **own, **row}))


class Market:
    """One market at the exchange: the truth, and the rows that were written about it."""

    def __init__(self, ticker: str, seed: int, start_ms: int, options: Options) -> None:
        self.ticker = ticker
        self.rng = random.Random(f"{seed} {options}")
        self.start_ms = start_ms
        self.options = options
        self.end = int(options.minutes * MINUTE)
        self.position = options.begins_with
        self.price = self.rng.randint(30, 70)
        self.open = True
        self.settled = False
        self.rejecting = False
        self.collecting = True
        self.fills: list[Fill] = []
        self.engines: list[Engine] = []
        self.rows: list[tuple[str, int, Row]] = []
        """Table, when it was written in true time, and the row; `ts` from the market's begin."""
        self.tape: list[tuple[int, str, int]] = []
        """Of each public trade: when, its id, and its size, signed as the maker's."""
        self._events: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._n = 0
        self._prefix = f"{zlib.crc32(ticker.encode()):08x}-0000-4000-8000-"
        self.at(0, self._collects, 0)
        self.at(self._later(options.taker_every), self._trades)
        self.at(self._later(options.price_every), self._moves)
        if options.exchange_cancels_every:
            self.at(self._later(options.exchange_cancels_every), self._clears)
        if options.settles_at:
            self.at(options.settles_at - MINUTE, self.closes)
            self.at(options.settles_at, self.settles)

    def run(self) -> Market:
        """Run the simulation."""
        while self._events and self._events[0][0] <= self.end:
            t, _, happens, more = heapq.heappop(self._events)
            happens(t, *more)
        return self

    def at(self, t: int, happens: Callable[..., None], *more: Any) -> None:
        self._n += 1
        heapq.heappush(self._events, (t, self._n, happens, more))

    def name(self, kind: str) -> str:
        self._n += 1
        return f"{self.ticker}-{kind}{self._n}"

    def uuid(self) -> str:
        self._n += 1
        return f"{self._prefix}{self._n:012x}"

    # -- orders ----------------------------------------------------------------------------------

    def takes_place(self, t: int, order: Order, sent: int) -> None:
        back = t + self.rng.randint(10, 60)
        if not self.open or self.rejecting or self.rng.random() < self.options.rejects:
            reason = "post_only_cross" if self.open else "market_closed"
            self.rejects(back, order, order.action_id, sent, reason, asked="place")
            return
        order.remaining = order.size
        self.at(back, order.engine.hears_resting, Word(order, order.action_id, "resting", sent))

    def takes_cancel(self, t: int, order: Order, action_id: str, sent: int, *, back: int) -> None:
        if order.remaining:
            self._ends(order, back, action_id, sent, "canceled")
        else:
            self.rejects(back, order, action_id, sent, "order_not_found")

    def takes_replace(self, t: int, order: Order, new: Order, sent: int) -> None:
        back = t + self.rng.randint(10, 60)
        if not order.remaining or not self.open:
            self.rejects(back, new, new.action_id, sent, "order_not_found", asked="replace")
            return
        new.reduced, order.remaining = order.remaining, 0
        new.remaining = new.size
        self.at(back, new.engine.hears_resting, Word(new, new.action_id, "resting", sent))

    def takes_decrease(self, t: int, order: Order, size: int, action_id: str, sent: int) -> None:
        back = t + self.rng.randint(10, 60)
        if not order.remaining:
            self.rejects(back, order, action_id, sent, "order_not_found")
            return
        reduced = max(order.remaining - size, 0)
        order.remaining -= reduced
        word = Word(order, action_id, "resting", sent, reduced)
        self.at(back, order.engine.hears_decreased, word)

    def rejects(
        self, back: int, order: Order, action_id: str, sent: int, reason: str, *, asked: str = ""
    ) -> None:
        word = Word(order, action_id, "rejected", sent, reason=reason, asked=asked)
        self.at(back, order.engine.hears_rejected, word)

    def ends(self, t: int, order: Order, status: str = "canceled") -> None:
        """The exchange cancels an order, or lets it expire, by itself."""
        self._ends(order, t + self.rng.randint(5, 80), order.action_id, t, status)

    def _ends(self, order: Order, back: int, action_id: str, sent: int, status: str) -> None:
        reduced, order.remaining = order.remaining, 0
        self.at(back, order.engine.hears_end, Word(order, action_id, status, sent, reduced))

    def resting(self, sign: int | None = None) -> list[Order]:
        """The orders that rest at the exchange."""
        return [
            order
            for engine in self.engines
            for order in engine.live.values()
            if order.remaining and (sign is None or order.sign == sign)
        ]

    def fill(self, t: int, order: Order, size: int, *, planted: bool = False) -> None:
        """A taker fills so much of an order."""
        order.remaining -= size
        self.position += order.sign * size
        whole = order.remaining == 0
        fill = Fill(self.name("f"), t, order, order.sign * size, whole, planted)
        self.fills.append(fill)
        self.prints(t, fill.fill_id, fill.signed)
        for engine in self.engines:
            self.at(t + self.rng.randint(5, 80), engine.hears_fill, fill)

    def prints(self, t: int, trade_id: str, signed: int) -> None:
        """A public trade."""
        if self.options.taped:
            self.tape.append((t, trade_id, signed))

    def plant_fill(self, t: int, engine: Engine, sign: int, size: int) -> None:
        """Fill exactly so much of an engine's order, as soon as one of that sign is large enough."""
        for order in self.resting(sign):
            if order.engine is engine and order.remaining > size and not order.leaving:
                self.fill(t, order, size, planted=True)
                return
        self.at(t + 150, self.plant_fill, engine, sign, size)

    # -- what happens by itself ------------------------------------------------------------------

    def _later(self, mean: int) -> int:
        return 1 + int(self.rng.expovariate(1 / mean))

    def _trades(self, t: int) -> None:
        for order in self.resting(self.rng.choice((1, -1)))[:1]:
            part = self.rng.randint(1, order.remaining)
            if self.options.whole and order.remaining > 100:
                part = max(part - part % 100, 100)
            self.fill(t, order, order.remaining if self.rng.random() < 0.3 else part)
        self.at(t + self._later(self.options.taker_every), self._trades)

    def _moves(self, t: int) -> None:
        self.price = min(max(self.price + self.rng.choice((-2, -1, 1, 2)), 10), 90)
        self.at(t + self._later(self.options.price_every), self._moves)

    def _clears(self, t: int) -> None:
        if resting := self.resting():
            self.ends(t, self.rng.choice(resting), self.rng.choice(("canceled", "expired")))
        self.at(t + self._later(self.options.exchange_cancels_every), self._clears)

    def closes(self, t: int) -> None:
        self.open = False
        for order in self.resting():
            self.ends(t, order)
        for engine in self.engines:
            self.at(t + self.rng.randint(5, 80), engine.hears_close)

    def settles(self, t: int) -> None:
        self.position = 0
        self.settled = True
        for engine in self.engines:
            self.at(t + self.rng.randint(50, 900), engine.hears_settlement)

    # -- the collector ---------------------------------------------------------------------------

    def _collects(self, t: int, attempt: int) -> None:
        """Begin a report; busy markets get up to five looks, and are left out then."""
        if attempt == 0:
            self.at(t + self.options.snapshot_every, self._collects, 0)
        if not self.collecting:
            return
        if self.fills and self.fills[-1].at > t - 2 * SECOND:
            self._again(t, attempt)
        else:
            self.at(t + 200, self._reads, t, attempt)

    def _reads(self, t: int, begun: int, attempt: int) -> None:
        if self.fills and self.fills[-1].at > begun:
            self._again(t, attempt)
            return
        row = {
            "ts": begun,
            "engine_instance_id": "platform",
            "market_ticker": self.ticker,
            "pos_filled": self.position / 100,
            "avg_cost": 0.0,
            "source": "settlements" if self.settled else "positions",
            "raw_json": json.dumps({"settled_time": ""}) if self.settled else "{}",
        }
        self.rows.append(("mm_position_snapshots", t, row))

    def _again(self, t: int, attempt: int) -> None:
        if attempt < 4:
            self.at(t + SECOND, self._collects, attempt + 1)


# -- into the tables -------------------------------------------------------------------------------

_EMPTY: dict[Any, Any] = {pa.string(): "", pa.float64(): 0.0, pa.uint32(): 0, pa.uint8(): 0}


def _filler(kind: pa.DataType, name: str) -> Any:
    if name == "decision_id":
        return NO_ID
    return [] if pa.types.is_list(kind) else _EMPTY[kind]


def insert(
    client: Client, markets: Iterable[Market], after: int = -1, until: int | None = None
) -> None:
    """Insert what was written in (after, until], each table's rows in one batch."""
    markets = list(markets)
    rows: dict[str, list[Row]] = {table: [] for table in TABLES}
    for market in markets:
        for table, t, row in market.rows:
            if after < t and (until is None or t <= until):
                rows[table].append({**row, "ts": row["ts"] + market.start_ms})
    for table, found in rows.items():
        schema = TABLES[table].arrow
        columns = [
            pa.array([row.get(field.name, filler) for row in found], field.type)
            for field in schema
            for filler in (_filler(field.type, field.name) if field.name != "ts" else None,)
        ]
        arrow = pa.Table.from_arrays(columns, schema=schema)
        insert_arrow(client, table, arrow, f"{table} {after} {until} {uuid.uuid4()}")
    taped = [
        (
            trade_id,
            market.ticker,
            abs(signed) / 100,
            "no" if signed > 0 else "yes",
            datetime.fromtimestamp((market.start_ms + t) / 1000, UTC),
        )
        for market in markets
        for t, trade_id, signed in market.tape
        if after < t and (until is None or t <= until)
    ]
    if taped:
        columns_of_tape = ("trade_id", "market_ticker", "qty", "taker_outcome_side", "ts")
        client.insert(
            "trades",
            [[*row, row[-1]] for row in taped],
            column_names=[*columns_of_tape, "ingest_ts"],
        )

"""The library for engines: records decisions, requests, answers, fills and positions as rows.

    recorder = Recorder("mm-1", "2.4.0", settings=settings, spool=Path("spool"))
    held = Reconciled.from_exchange("KXRAIN-26NOV22", "12.00", as_of)
    now = inventory(held, live_orders)               # computed again in each loop
    decision = recorder.decision(now, Quoted(…), expected_change=Decimal("0"))
    action = recorder.action(decision.decision_id, …)
    recorder.response(action, …)

No call waits for a disk or a database (spool.py does that). A value that cannot be a row is refused at the call, in
the engine's own thread (values.py): `WrongType` is a `TypeError`, `BadValue` a `ValueError`. Inventory is never rolled
forward: `inv_before` is the reconciled position, and no argument takes another one.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from kalshi_platform.inventory import values
from kalshi_platform.inventory.rows import (
    DECISIONS,
    FILLS,
    ORDER_ACTIONS,
    ORDER_RESPONSES,
    POSITION_SNAPSHOTS,
    SETTLEMENTS,
)
from kalshi_platform.inventory.semantics import (
    Contract,
    Inventory,
    OrderStatus,
    Quote,
    Reconciled,
    Result,
)
from kalshi_platform.inventory.spool import Spool, Status
from kalshi_platform.inventory.values import NOTHING, BadValue, InventoryError
from kalshi_platform.settings import Settings

EARLIEST_NS, LATEST_NS = (int(at.timestamp()) * 10**9 for at in (values.EARLIEST, values.LATEST))
NO_DECISION = uuid.UUID(int=0)


class ActionType(Enum):
    """The kind of a request to the exchange."""

    PLACE = "place"
    CANCEL = "cancel"
    REPLACE = "replace"


_PRICES = ("bb_px", "ba_px", "fair", "target_bid_px", "target_ask_px")
_SIZES = ("target_bid_sz", "target_ask_sz")


@dataclass(frozen=True)
class Quoted:
    """The market's best prices and the engine's target quotes, on the YES side.

    Each number is finite, given as float, int, Decimal or a NumPy scalar; a price that does not exist is NaN or None.

    Args:
        bb_px: Best bid, dollars.
        ba_px: Best ask, dollars.
        fair: The engine's fair price, dollars.
        target_bid_px: Where it wants to bid, dollars.
        target_ask_px: Where it wants to offer, dollars.
        target_bid_sz: How much it wants to bid, contracts; 0 or more.
        target_ask_sz: How much it wants to offer, contracts; 0 or more.
        params: The engine's own parameters, kept as JSON.

    Raises:
        WrongType: A value is no number.
        BadValue: A value is infinite, or a size negative.
    """

    bb_px: float = NOTHING
    ba_px: float = NOTHING
    fair: float = NOTHING
    target_bid_px: float = NOTHING
    target_ask_px: float = NOTHING
    target_bid_sz: float = 0.0
    target_ask_sz: float = 0.0
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in _PRICES:
            price = getattr(self, name)
            if type(price) is not float or math.isinf(price):
                object.__setattr__(self, name, values.real_or_nothing(name, price))
        for name in _SIZES:
            size = getattr(self, name)
            if type(size) is not float or not 0 <= size < math.inf:
                object.__setattr__(self, name, values.real_amount(name, size))


@dataclass(frozen=True)
class Decided:
    """A recorded decision."""

    decision_id: uuid.UUID
    ts: datetime
    inventory: Inventory


@dataclass(frozen=True)
class Sent:
    """A recorded action, to which the response belongs."""

    action_id: uuid.UUID
    ts: datetime
    market_ticker: str
    client_order_id: str


class Sink(Protocol):
    """Takes rows: a spool, or a test's list."""

    def put(self, table: str, row: Mapping[str, Any]) -> None:
        """Take one row, without waiting.

        Args:
            table: The table's name.
            row: Column to value.
        """


class Recorder:
    """Records what one engine does. Its methods may be called from any thread.

    A call that raises has recorded nothing.

    Raises:
        WrongType: Of every method (a `TypeError`): no row can hold an argument.
        BadValue: Of every method (a `ValueError`): no row can hold an argument's value.
        InventoryError: Of every method: rows have no place left, on the disk nor in memory.
    """

    def __init__(
        self,
        engine_instance_id: str,
        engine_version: str,
        *,
        settings: Settings | None = None,
        spool: Path | None = None,
        sink: Sink | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """Open the spool of an engine, or take another sink.

        Args:
            engine_instance_id: Which engine; the same after a restart.
            engine_version: Its version, for the rows.
            settings: Where ClickHouse is.
            spool: A folder of this engine's own, where rows wait for ClickHouse.
            sink: Takes the rows in the place of `settings` and `spool`: for replays and tests.
            clock_ns: The machine's clock, ns since 1970: for replays.

        Raises:
            InventoryError: Another engine has the folder, or neither a sink nor both of `settings` and `spool` are given.
        """
        self._own = {
            "engine_instance_id": values.text("engine_instance_id", engine_instance_id),
            "engine_version": values.text("engine_version", engine_version),
        }
        self._clock_ns = clock_ns
        self._spool: Spool | None = None
        if sink is None:
            if settings is None or spool is None:
                raise InventoryError("A recorder needs settings and a spool folder. Give both.")
            sink = self._spool = Spool(spool, settings)
        self._sink = sink

    # -- what happens ----------------------------------------------------------------------------

    def decision(
        self,
        inventory: Inventory,
        quoted: Quoted,
        *,
        expected_change: Decimal = Decimal(0),
        allowed: bool = True,
        block_stage: str | None = "",
        block_codes: Sequence[str] = (),
        reason_codes: Sequence[str] = (),
    ) -> Decided:
        """Record a decision: one row of `mm_decisions`.

        Args:
            inventory: What the engine holds and has resting at this moment, from `inventory()`.
            quoted: The market, and what the engine wants.
            expected_change: What the engine expects the decision to add to the position, contracts.
            allowed: Whether quoting was allowed.
            block_stage: Where it was blocked.
            block_codes: Why it was blocked, one or more codes; none where it was allowed.
            reason_codes: Why the engine decides so.

        Returns:
            The decision's id and time, for the actions that follow from it.

        Raises:
            BadValue: Quoting was blocked without a code, or allowed with one.
        """
        values.one_of("inventory", inventory, Inventory)
        values.one_of("quoted", quoted, Quoted)
        change = values.exact("expected_change", expected_change)
        is_allowed = values.flag("allowed", allowed)
        codes = values.texts("block_codes", block_codes)
        if is_allowed == bool(codes):
            raise BadValue(
                f"A decision has allowed={is_allowed} and block_codes {codes}: what is not"
                " allowed has a code, and what is allowed has none."
            )
        now = self._now()
        decided = Decided(uuid.uuid4(), now, inventory)
        resting, exposure = inventory.resting, inventory.pos_open_exposure
        filled = float(inventory.pos_filled)
        row: dict[str, Any] = {
            "ts": now,
            "decision_id": str(decided.decision_id),
            **self._own,
            "market_ticker": inventory.position.market_ticker,
            "bb_px": quoted.bb_px,
            "ba_px": quoted.ba_px,
            "mid": (quoted.bb_px + quoted.ba_px) / 2,
            "spread": quoted.ba_px - quoted.bb_px,
            "fair": quoted.fair,
            "target_bid_px": quoted.target_bid_px,
            "target_ask_px": quoted.target_ask_px,
            "target_bid_sz": quoted.target_bid_sz,
            "target_ask_sz": quoted.target_ask_sz,
            "inv_before": filled,
            "inv_after_est": float(inventory.pos_filled + change),
            "params_json": values.json_object("params", quoted.params),
            "pos_filled": filled,
            "pos_open_exposure": float(exposure),
            "pos_total_est": float(inventory.pos_filled + exposure),
            "open_orders_count": resting.open_orders_count,
            "open_yes_bid_size": float(resting.open_yes_bid_size),
            "open_yes_ask_size": float(resting.open_yes_ask_size),
            "open_no_bid_size": float(resting.open_no_bid_size),
            "open_no_ask_size": float(resting.open_no_ask_size),
            "allowed": int(is_allowed),
            "block_stage": values.optional_text("block_stage", block_stage),
            "block_codes": codes,
            "reason_codes": values.texts("reason_codes", reason_codes),
            "inv_convention": inventory.position.convention,
        }
        self._sink.put(DECISIONS.name, row)
        return decided

    def action(
        self,
        market_ticker: str,
        client_order_id: str,
        kind: ActionType,
        *,
        decision_id: uuid.UUID | str | None = NO_DECISION,
        quote: Quote | None = None,
        contract: Contract | None = None,
        price: Decimal = Decimal(0),
        size: Decimal = Decimal(0),
        replace_of: str | None = "",
        order_group_id: str | None = None,
        subaccount: int | None = None,
        request: Mapping[str, Any] | None = None,
    ) -> Sent:
        """Record a request, just before it is sent: one row of `mm_order_actions`.

        From this moment on the order is live: count it among the working orders until its end is known, or the estimated
        position moves when no action does.

        Args:
            market_ticker: The market.
            client_order_id: The order's id, which the engine gives.
            kind: Place, cancel or replace.
            decision_id: The decision that it follows from.
            quote: Bid or ask; needed but for a cancel.
            contract: YES or NO; needed but for a cancel.
            price: Dollars, on `contract`'s scale.
            size: Contracts; of a cancel the remaining size that it takes away.
            replace_of: Of a replace, the id of the order that it replaces.
            order_group_id: The exchange's order group; goes into the request's JSON.
            subaccount: The exchange's subaccount; goes into the request's JSON.
            request: The request as sent, kept as JSON.

        Returns:
            The action, to which `response` belongs.

        Raises:
            BadValue: A place or replace has no size, quote or contract; or `replace_of` is missing, or given without need.
        """
        values.member("kind", kind, ActionType)
        sent = Sent(
            uuid.uuid4(),
            self._now(),
            values.text("market_ticker", market_ticker),
            values.text("client_order_id", client_order_id),
        )
        dollars, contracts = values.dollars("price", price), values.amount("size", size)
        replaced = values.optional_text("replace_of", replace_of)
        if kind is not ActionType.CANCEL and not contracts:
            raise BadValue(
                f"A {kind.value} of order {sent.client_order_id} has size 0: give its contracts."
            )
        if (kind is ActionType.REPLACE) != bool(replaced):
            raise BadValue(
                f"A {kind.value} of order {sent.client_order_id} has replace_of {values.shown(replaced)}:"
                " a replace names the order that it replaces, and nothing else names one."
            )
        if quote is not None:
            values.member("quote", quote, Quote)
        if contract is not None:
            values.member("contract", contract, Contract)
        if kind is not ActionType.CANCEL and (quote is None or contract is None):
            raise BadValue(
                f"A {kind.value} of order {sent.client_order_id} has quote {quote} and contract {contract}:"
                " give both."
            )
        self._sink.put(
            ORDER_ACTIONS.name,
            {
                "ts": sent.ts,
                "action_id": str(sent.action_id),
                "decision_id": values.identity("decision_id", decision_id),
                **self._own,
                "market_ticker": sent.market_ticker,
                "client_order_id": sent.client_order_id,
                "action_type": kind.value,
                "side": quote.value if quote else "",
                "api_side": contract.value if contract else "",
                "price": float(dollars),
                "price_cents": float(dollars * 100),
                "size": float(contracts),
                "replace_of_client_order_id": replaced,
                "request_json": _with("request", request, order_group_id, subaccount),
            },
        )
        return sent

    def decrease(
        self,
        market_ticker: str,
        client_order_id: str,
        remaining: Decimal,
        *,
        quote: Quote,
        contract: Contract,
        price: Decimal,
        decision_id: uuid.UUID | str | None = NO_DECISION,
        request: Mapping[str, Any] | None = None,
    ) -> Sent:
        """Record a request to take size from an order that keeps its place: a replace of the order by itself.

        Args:
            market_ticker: The market.
            client_order_id: The order.
            remaining: What it keeps, contracts; more than 0.
            quote: Bid or ask.
            contract: YES or NO.
            price: Dollars, on `contract`'s scale.
            decision_id: The decision that it follows from.
            request: The request as sent, kept as JSON.

        Returns:
            The action, to which `response` belongs.

        Raises:
            BadValue: `remaining` is 0 or less.
        """
        return self.action(
            market_ticker,
            client_order_id,
            ActionType.REPLACE,
            decision_id=decision_id,
            quote=quote,
            contract=contract,
            price=price,
            size=values.count("remaining", remaining),
            replace_of=client_order_id,
            request=request,
        )

    def response(
        self,
        sent: Sent,
        status: OrderStatus | str,
        *,
        exchange_order_id: str | None = "",
        reject_reason: str | None = "",
        latency_ms: float,
        response: Mapping[str, Any] | None = None,
    ) -> None:
        """Record what the exchange answered to an action: one row of `mm_order_responses`.

        Args:
            sent: What `action` or `decrease` returned.
            status: The order's status after it.
            exchange_order_id: The exchange's id of the order.
            reject_reason: Why it was rejected.
            latency_ms: From the request to its answer, milliseconds.
            response: The answer as received, kept as JSON.

        Raises:
            BadValue: `status` is none of `OrderStatus`.
        """
        self._answered(
            sent,
            status,
            exchange_order_id=exchange_order_id,
            reject_reason=reject_reason,
            latency_ms=values.real("latency_ms", latency_ms),
            response=response,
        )

    def order_changed(
        self,
        sent: Sent,
        status: OrderStatus | str,
        *,
        exchange_order_id: str | None = "",
        reject_reason: str | None = "",
        response: Mapping[str, Any] | None = None,
    ) -> None:
        """Record what became of an order without a request: filled, canceled or expired by the exchange.

        The row of `mm_order_responses` has a `latency_ms` of NaN, as nothing was asked.

        Args:
            sent: The order's own place or replace.
            status: The order's status now.
            exchange_order_id: The exchange's id of the order.
            reject_reason: Why it was rejected.
            response: The message as received, kept as JSON.

        Raises:
            BadValue: `status` is none of `OrderStatus`.
        """
        self._answered(
            sent,
            status,
            exchange_order_id=exchange_order_id,
            reject_reason=reject_reason,
            latency_ms=NOTHING,
            response=response,
        )

    def _answered(
        self,
        sent: Sent,
        status: OrderStatus | str,
        *,
        exchange_order_id: str | None,
        reject_reason: str | None,
        latency_ms: float,
        response: Mapping[str, Any] | None,
    ) -> None:
        values.one_of("sent", sent, Sent)
        self._sink.put(
            ORDER_RESPONSES.name,
            {
                "ts": self._now(),
                "action_id": values.text("sent.action_id", sent.action_id),
                **self._own,
                "market_ticker": values.text("sent.market_ticker", sent.market_ticker),
                "client_order_id": values.text("sent.client_order_id", sent.client_order_id),
                "status": values.member_or_text("status", status, OrderStatus).value,
                "exchange_order_id": values.optional_text("exchange_order_id", exchange_order_id),
                "reject_reason": values.optional_text("reject_reason", reject_reason),
                "latency_ms": latency_ms,
                "response_json": values.json_object("response", response),
            },
        )

    def fill(
        self,
        market_ticker: str,
        fill_id: str,
        contract: Contract,
        size: Decimal,
        price: Decimal,
        *,
        at: datetime,
        exchange_order_id: str | None = "",
        client_order_id: str | None = "",
        fee: Decimal = Decimal(0),
        decision_id: uuid.UUID | str | None = NO_DECISION,
        subaccount: int | None = None,
        raw: Mapping[str, Any] | None = None,
    ) -> None:
        """Record a fill: one row of `mm_fills`. Outcome side YES adds to the position, NO takes from it.

        Args:
            market_ticker: The market.
            fill_id: The exchange's id of the fill.
            contract: The fill's outcome side.
            size: Contracts; more than 0.
            price: Dollars, on `contract`'s scale.
            at: The exchange's time, with a time zone.
            exchange_order_id: The exchange's id of the order.
            client_order_id: The engine's id of the order.
            fee: Dollars.
            decision_id: The decision that the order followed from.
            subaccount: The exchange's subaccount; goes into the fill's JSON.
            raw: The exchange's own message, kept as JSON.

        Raises:
            BadValue: `raw` has an `outcome_side` that is not `contract`.
        """
        values.member("contract", contract, Contract)
        side = raw.get("outcome_side") if isinstance(raw, Mapping) else None
        if side is not None and side != contract.value:
            raise BadValue(
                f"contract is {contract}, and raw has outcome_side {values.shown(side)}: give what the"
                " exchange says."
            )
        dollars = values.dollars("price", price)
        self._sink.put(
            FILLS.name,
            {
                "ts": values.moment("at", at),
                **self._own,
                "market_ticker": values.text("market_ticker", market_ticker),
                "exchange_order_id": values.optional_text("exchange_order_id", exchange_order_id),
                "client_order_id": values.optional_text("client_order_id", client_order_id),
                "side": contract.value,
                "price": float(dollars),
                "price_cents": float(dollars * 100),
                "size": float(values.count("size", size)),
                "fee": float(values.exact("fee", fee)),
                "decision_id": values.identity("decision_id", decision_id),
                "fill_id": values.text("fill_id", fill_id),
                "raw_json": _with("raw", raw, None, subaccount),
            },
        )

    def snapshot(
        self,
        position: Reconciled,
        *,
        source: str,
        avg_cost: Decimal = Decimal(0),
        raw: Mapping[str, Any] | None = None,
    ) -> None:
        """Record a position as the exchange reported it, at the moment in which the engine takes it over.

        Args:
            position: The position, from `Reconciled.from_exchange`.
            source: Where the report came from, such as "portfolio".
            avg_cost: Average cost of a contract, dollars.
            raw: The report as received, kept as JSON.

        Raises:
            BadValue: `source` is empty, or `avg_cost` negative.
        """
        values.one_of("position", position, Reconciled)
        self._sink.put(
            POSITION_SNAPSHOTS.name,
            {
                "ts": self._now(),
                **self._own,
                "market_ticker": position.market_ticker,
                "pos_filled": float(position.position),
                "avg_cost": float(values.amount("avg_cost", avg_cost)),
                "source": values.text("source", source),
                "raw_json": values.json_object("raw", raw),
            },
        )

    def settled(
        self,
        position: Reconciled,
        result: Result | str,
        *,
        value: Decimal | None = None,
        at: datetime,
        raw: Mapping[str, Any] | None = None,
    ) -> Reconciled:
        """Record that a market was settled or voided: one row of `mm_position_snapshots`.

        Args:
            position: The position before it.
            result: The market's result.
            value: What a YES contract was paid, dollars, where the exchange reports it.
            at: When, with a time zone.
            raw: The exchange's own message, kept as JSON.

        Returns:
            The position after it: none.

        Raises:
            BadValue: `result` is none of `Result`, or `value` not from 0 to 1 dollar.
        """
        values.one_of("position", position, Reconciled)
        said: dict[str, Any] = {
            "result": values.member_or_text("result", result, Result).value,
            "value": None if value is None else str(values.dollars("value", value)),
            "settled_time": values.moment("at", at).isoformat(),
            "held": str(position.position),
        }
        after = position.settled(at)
        content = said if raw is None else {**said, "settlement": raw}
        self.snapshot(after, source=SETTLEMENTS, raw=content)
        return after

    # -- on their way ----------------------------------------------------------------------------

    @property
    def trouble(self) -> str | None:
        """Why rows do not reach ClickHouse at the moment; None when all is well."""
        return self._spool.trouble if self._spool is not None else None

    def status(self) -> Status:
        """Report how far behind ClickHouse is, and what was set aside. Asks neither disk nor database.

        Returns:
            Rows and files that wait, the age of the oldest in seconds, and rows that ClickHouse refused.

        Raises:
            InventoryError: The recorder has a sink of its own.
        """
        if self._spool is None:
            raise InventoryError(
                "This recorder has a sink and no spool: ask the sink how far its rows are."
            )
        return self._spool.status()

    def drain(self, timeout_s: float = 10.0) -> bool:
        """Wait until ClickHouse has every row that it takes.

        Args:
            timeout_s: Seconds to wait.

        Returns:
            False when rows still wait after that.
        """
        return self._spool is None or self._spool.drain(timeout_s)

    def close(self, timeout_s: float = 5.0) -> int:
        """End. What ClickHouse has not taken waits on disk; the next recorder on the folder sends it.

        Args:
            timeout_s: Seconds to wait for ClickHouse.

        Returns:
            How many files wait on disk.
        """
        return 0 if self._spool is None else self._spool.close(timeout_s)

    def _now(self) -> datetime:
        now_ns = self._clock_ns()
        if not EARLIEST_NS <= now_ns < LATEST_NS:
            raise BadValue(
                f"The clock says {values.shown(now_ns)} ns since 1970, which is not between 2000 and 2099:"
                " set the machine's clock."
            )
        return datetime.fromtimestamp(now_ns // 1_000_000 / 1000, UTC)


def _with(
    name: str,
    content: Mapping[str, Any] | None,
    order_group_id: str | None,
    subaccount: int | None,
) -> str:
    """A request or a fill as JSON, with the exchange's own names for its order group and subaccount."""
    extra: dict[str, Any] = {}
    if order_group_id is not None:
        extra["order_group_id"] = values.text("order_group_id", order_group_id)
    if subaccount is not None:
        extra["subaccount"] = values.whole("subaccount", subaccount)
    if not extra:
        return values.json_object(name, content)
    given = values.one_of(name, content if content is not None else {}, Mapping)  # type: ignore[type-abstract]
    for key, value in extra.items():
        if key in given and given[key] != value:
            raise BadValue(
                f"{name} has {key} {values.shown(given[key])}, and the argument says {values.shown(value)}:"
                " give it once."
            )
    return values.json_object(name, {**given, **extra})

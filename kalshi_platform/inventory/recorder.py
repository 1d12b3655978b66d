"""The library for engines: what a market maker decides, asks, hears, gets and holds, as rows.

    recorder = Recorder("mm-1", "2.4.0", settings=settings, spool=Path("spool"))
    held = Reconciled.from_exchange("KXRAIN-26NOV22", "12.00", as_of)
    now = inventory(held, live_orders)               # anew in each loop
    decision = recorder.decision(now, Quoted(…), expected_change=Decimal("0"))
    action = recorder.action(decision.decision_id, …)
    recorder.response(action, …)

No call waits for a disk or a database (spool.py does that). Inventory is never rolled forward:
`inv_before` is the reconciled position, and nothing here takes another one.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import msgspec

from kalshi_platform.inventory.rows import (
    DECISIONS,
    FILLS,
    ORDER_ACTIONS,
    ORDER_RESPONSES,
    POSITION_SNAPSHOTS,
)
from kalshi_platform.inventory.semantics import (
    INV_CONVENTION,
    Contract,
    Inventory,
    InventoryError,
    Quote,
    Reconciled,
)
from kalshi_platform.inventory.spool import Spool
from kalshi_platform.settings import Settings

NOTHING = float("nan")
"""A price that there is not: no best bid, no target."""
NO_DECISION = uuid.UUID(int=0)


class ActionType(Enum):
    """What is asked of the exchange."""

    PLACE = "place"
    CANCEL = "cancel"
    REPLACE = "replace"


@dataclass(frozen=True)
class Quoted:
    """The market as it is and as the engine wants to quote it. Dollars, contracts; YES side."""

    bb_px: float = NOTHING
    ba_px: float = NOTHING
    fair: float = NOTHING
    target_bid_px: float = NOTHING
    target_ask_px: float = NOTHING
    target_bid_sz: float = 0.0
    target_ask_sz: float = 0.0
    params: Mapping[str, Any] = field(default_factory=dict)


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
    """Where rows go."""

    def put(self, table: str, row: Mapping[str, Any]) -> None:
        """Take one row, without waiting."""


class Recorder:
    """Records what one engine does. Its methods may be called from any thread."""

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
        """Give `settings` (where ClickHouse is) and `spool` (a folder of this engine's own).

        `sink` takes the rows in their place, and `clock_ns` the machine's clock: for replays.
        Raises `InventoryError` when another engine has the folder.
        """
        self._own = {"engine_instance_id": engine_instance_id, "engine_version": engine_version}
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
        block_stage: str = "",
        block_codes: Sequence[str] = (),
        reason_codes: Sequence[str] = (),
    ) -> Decided:
        """A decision. `expected_change` is what the engine expects it to add to the position.

        Raises `InventoryError` where quoting was blocked without a code, or allowed with one.
        """
        if allowed == bool(block_codes):
            raise InventoryError(
                f"A decision has allowed={allowed} and block_codes {list(block_codes)}: what is not"
                " allowed has a code, and what is allowed has none."
            )
        now = self._now()
        decided = Decided(uuid.uuid4(), now, inventory)
        resting = inventory.resting
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
            "inv_after_est": float(inventory.pos_filled + expected_change),
            "params_json": _json(quoted.params),
            "pos_filled": filled,
            "pos_open_exposure": float(inventory.pos_open_exposure),
            "pos_total_est": float(inventory.pos_total_est),
            "open_orders_count": resting.open_orders_count,
            "open_yes_bid_size": float(resting.open_yes_bid_size),
            "open_yes_ask_size": float(resting.open_yes_ask_size),
            "open_no_bid_size": float(resting.open_no_bid_size),
            "open_no_ask_size": float(resting.open_no_ask_size),
            "allowed": int(allowed),
            "block_stage": block_stage,
            "block_codes": list(block_codes),
            "reason_codes": list(reason_codes),
            "inv_convention": INV_CONVENTION,
        }
        self._sink.put(DECISIONS.name, row)
        return decided

    def action(
        self,
        market_ticker: str,
        client_order_id: str,
        kind: ActionType,
        *,
        decision_id: uuid.UUID = NO_DECISION,
        quote: Quote | None = None,
        contract: Contract | None = None,
        price: Decimal = Decimal(0),
        size: Decimal = Decimal(0),
        replace_of: str = "",
        request: Mapping[str, Any] | None = None,
    ) -> Sent:
        """A request, to be recorded just before it is sent. Price in dollars on `contract`'s scale.

        From this moment on the order is live: count it among the working orders until its end is
        known, or the estimated position moves when no action does.
        """
        sent = Sent(uuid.uuid4(), self._now(), market_ticker, client_order_id)
        self._sink.put(
            ORDER_ACTIONS.name,
            {
                "ts": sent.ts,
                "action_id": str(sent.action_id),
                "decision_id": str(decision_id),
                **self._own,
                "market_ticker": market_ticker,
                "client_order_id": client_order_id,
                "action_type": kind.value,
                "side": quote.value if quote else "",
                "api_side": contract.value if contract else "",
                "price": float(price),
                "price_cents": float(price * 100),
                "size": float(size),
                "replace_of_client_order_id": replace_of,
                "request_json": _json(request or {}),
            },
        )
        return sent

    def response(
        self,
        sent: Sent,
        status: str,
        *,
        exchange_order_id: str = "",
        reject_reason: str = "",
        latency_ms: float,
        response: Mapping[str, Any] | None = None,
    ) -> None:
        """What the exchange answered to an action."""
        self._sink.put(
            ORDER_RESPONSES.name,
            {
                "ts": self._now(),
                "action_id": str(sent.action_id),
                **self._own,
                "market_ticker": sent.market_ticker,
                "client_order_id": sent.client_order_id,
                "status": status,
                "exchange_order_id": exchange_order_id,
                "reject_reason": reject_reason,
                "latency_ms": latency_ms,
                "response_json": _json(response or {}),
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
        exchange_order_id: str = "",
        client_order_id: str = "",
        fee: Decimal = Decimal(0),
        decision_id: uuid.UUID = NO_DECISION,
        raw: Mapping[str, Any] | None = None,
    ) -> None:
        """A fill, at the exchange's time `at`; outcome side YES adds, NO takes away."""
        self._sink.put(
            FILLS.name,
            {
                "ts": _milliseconds(at),
                **self._own,
                "market_ticker": market_ticker,
                "exchange_order_id": exchange_order_id,
                "client_order_id": client_order_id,
                "side": contract.value,
                "price": float(price),
                "price_cents": float(price * 100),
                "size": float(size),
                "fee": float(fee),
                "decision_id": str(decision_id),
                "fill_id": fill_id,
                "raw_json": _json(raw or {}),
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
        """A position as the exchange reported it, in the moment in which the engine takes it over."""
        self._sink.put(
            POSITION_SNAPSHOTS.name,
            {
                "ts": self._now(),
                **self._own,
                "market_ticker": position.market_ticker,
                "pos_filled": float(position.position),
                "avg_cost": float(avg_cost),
                "source": source,
                "raw_json": _json(raw or {}),
            },
        )

    # -- on their way ----------------------------------------------------------------------------

    @property
    def trouble(self) -> str | None:
        """Why rows are not getting on at the moment; None when all is well."""
        return self._spool.trouble if self._spool is not None else None

    def drain(self, timeout_s: float = 10.0) -> bool:
        """Wait until ClickHouse has everything; False when it has not in time."""
        return self._spool is None or self._spool.drain(timeout_s)

    def close(self, timeout_s: float = 5.0) -> int:
        """End; what ClickHouse has not taken waits on disk. Returns how many files do."""
        return 0 if self._spool is None else self._spool.close(timeout_s)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock_ns() // 1_000_000 / 1000, UTC)


def _milliseconds(at: datetime) -> datetime:
    return at.astimezone(UTC).replace(microsecond=at.microsecond // 1000 * 1000)


def _json(content: Mapping[str, Any]) -> str:
    return msgspec.json.encode(content).decode()

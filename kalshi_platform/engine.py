"""The public face for a market maker's engine: the inventory recorder, its arguments, and live orders.

    from kalshi_platform.engine import Quoted, Reconciled, Recorder, inventory

Loads neither Dagster nor the embedded ClickHouse. See docs/inventory.md and examples/engine.py.
"""

from kalshi_platform.inventory.live_orders import LiveOrder, LiveOrders
from kalshi_platform.inventory.recorder import ActionType, Decided, Quoted, Recorder, Sent
from kalshi_platform.inventory.semantics import (
    Contract,
    Inventory,
    OrderStatus,
    Quote,
    Reconciled,
    Result,
    WorkingOrder,
    inventory,
    sign,
)
from kalshi_platform.inventory.spool import Status
from kalshi_platform.inventory.values import NOTHING, BadValue, InventoryError, WrongType

__all__ = [
    "NOTHING",
    "ActionType",
    "BadValue",
    "Contract",
    "Decided",
    "Inventory",
    "InventoryError",
    "LiveOrder",
    "LiveOrders",
    "OrderStatus",
    "Quote",
    "Quoted",
    "Reconciled",
    "Recorder",
    "Result",
    "Sent",
    "Status",
    "WorkingOrder",
    "WrongType",
    "inventory",
    "sign",
]

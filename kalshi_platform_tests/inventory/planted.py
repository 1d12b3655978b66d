"""Rows of a market maker, planted by hand: a healthy engine, and anything that is wrong with it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from kalshi_platform.clickhouse.client import Client

TICKER = "KXPLANTED-26NOV22"
_NAMESPACE = uuid.UUID(int=5)


def ago(seconds: float) -> datetime:
    """A moment before the test began."""
    return Planted.begun - timedelta(seconds=seconds)


class Planted:
    """The tables of one database, for one test."""

    begun = datetime.now(UTC).replace(microsecond=0)
    """What `ago` counts from: when the newest was made. The modules are read long before the last of
    their tests runs, and the checks look two hours back.
    """

    def __init__(self, client: Client) -> None:
        Planted.begun = datetime.now(UTC).replace(microsecond=0)
        self.client = client
        self._n = 0

    def decision(
        self, at: datetime, filled: float = 0.0, exposure: float = 0.0, **others: Any
    ) -> None:
        """A decision in order, but for what `others` says."""
        self._insert(
            "mm_decisions",
            {
                "ts": at,
                "decision_id": self._id(),
                "engine_instance_id": "engine-1",
                "market_ticker": TICKER,
                "inv_before": filled,
                "inv_after_est": filled + exposure,
                "pos_filled": filled,
                "pos_open_exposure": exposure,
                "pos_total_est": filled + exposure,
                "open_orders_count": int(exposure != 0),
                "open_yes_bid_size": max(exposure, 0.0),
                "open_yes_ask_size": max(-exposure, 0.0),
                "inv_convention": "yes_positive",
                **others,
            },
        )

    def action(self, at: datetime, **others: Any) -> None:
        """An order sent."""
        row = {
            "ts": at,
            "engine_instance_id": "engine-1",
            "action_id": str(self._id()),
            "market_ticker": TICKER,
            "client_order_id": f"order-{self._n}",
            "action_type": "place",
            "side": "bid",
            "api_side": "yes",
            "price": 0.45,
            "size": 10.0,
            "request_json": '{"post_only":true}',
        }
        self._insert("mm_order_actions", {**row, **others})

    def response(self, at: datetime, **others: Any) -> None:
        """An answer to an order."""
        row = {
            "ts": at,
            "engine_instance_id": "engine-1",
            "action_id": "unheard-of",
            "market_ticker": TICKER,
            "status": "resting",
        }
        self._insert("mm_order_responses", {**row, **others})

    def fill(self, at: datetime, signed: float, **others: Any) -> None:
        """A fill that the engine recorded."""
        row = {
            "ts": at,
            "market_ticker": TICKER,
            "side": "yes" if signed > 0 else "no",
            "size": abs(signed),
            "fill_id": str(self._id()),
        }
        self._insert("mm_fills", {**row, **others})

    def snapshot(self, at: datetime, position: float, **others: Any) -> None:
        """What the exchange said."""
        row = {"ts": at, "market_ticker": TICKER, "pos_filled": position, "source": "positions"}
        self._insert("mm_position_snapshots", {**row, **others})

    def trade(self, at: datetime, trade_id: str, **others: Any) -> None:
        """A public trade, as the platform records it."""
        row = {"ts": at, "ingest_ts": at, "market_ticker": TICKER, "trade_id": trade_id}
        self._insert("trades", {**row, **others})

    def event(self, at: datetime, kind: str, detail: Mapping[str, Any]) -> None:
        """Something that happened to the recording."""
        self._insert("stream_events", {"ingest_ts": at, "kind": kind, "detail": json.dumps(detail)})

    def _id(self) -> uuid.UUID:
        self._n += 1
        return uuid.uuid5(_NAMESPACE, str(self._n))

    def _insert(self, table: str, row: Mapping[str, Any]) -> None:
        self.client.insert(table, [list(row.values())], column_names=list(row))

"""A recorder in fifty lines, for the tests: what a client that trusts the wire makes of it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from kalshi_platform.exchange.numbers import price_units, qty_units
from kalshi_platform.simulator.book import BookView
from kalshi_platform.simulator.wire import CURRENT, Wire

SEQUENCED = {"orderbook_delta", "trade", "market_lifecycle_v2"}


class Ledger:
    """Takes frames in order; fails on a gap in seq, a stray delta, a negative level or a false clock.

    A clock is false if it falls, if a delta has not a higher one than its snapshot, or if two
    different books have the same one. Each frame is returned without its time of sending.
    """

    def __init__(self, *, use_yes_price: bool = False, wire: Wire = CURRENT) -> None:
        self._use_yes_price = use_yes_price
        self._wire = wire
        self._sent_ms = 0
        self.clocks: dict[str, int] = {}
        """The clock of each market's last change or snapshot."""
        self._snapshots: dict[str, int] = {}
        self.channels: dict[int, str] = {}
        self.seqs: dict[int, int] = {}
        self.books: dict[str, dict[str, dict[int, int]]] = {}
        self.market_ids: dict[str, str] = {}
        self.kinds: Counter[str] = Counter()
        self.replies: Counter[int] = Counter()
        self.frames: list[dict[str, Any]] = []

    def feed(self, raw: bytes) -> dict[str, Any]:
        """One frame of the wire."""
        assert raw.endswith(b"}\n")
        assert raw.count(b"\n") == 1
        frame: dict[str, Any] = json.loads(raw)
        kind, sid = frame["type"], frame.get("sid")
        self._sent(frame)
        self.frames.append(frame)
        self.kinds[kind] += 1
        if "id" in frame:
            self.replies[frame["id"]] += 1
        if kind == "subscribed":
            assert "seq" not in frame
            self.channels[frame["msg"]["sid"]] = frame["msg"]["channel"]
            self.seqs.pop(frame["msg"]["sid"], None)
        elif sid is not None:
            if self.channels[sid] in SEQUENCED:
                assert frame["seq"] == self.seqs.get(sid, 0) + 1, frame
                self.seqs[sid] = frame["seq"]
            else:
                assert "seq" not in frame
        if kind == "orderbook_snapshot":
            self._snapshot(frame["msg"])
        elif kind == "orderbook_delta":
            self._delta(frame["msg"])
        return frame

    def _sent(self, frame: dict[str, Any]) -> None:
        if self._wire is Wire.AUGUST:
            assert "sending_ts_ms" not in frame
            return
        sent_ms = frame.pop("sending_ts_ms")
        msg = frame.get("msg")
        happened_ms = msg.get("ts_ms", 0) if isinstance(msg, dict) else 0
        assert sent_ms >= max(self._sent_ms, happened_ms), frame
        self._sent_ms = sent_ms

    def _clock(self, msg: dict[str, Any], *, at_least: int) -> None:
        if self._wire is Wire.AUGUST:
            assert "clock" not in msg
            return
        assert msg["clock"] >= max(self.clocks.get(msg["market_ticker"], 0), at_least), msg
        self.clocks[msg["market_ticker"]] = msg["clock"]

    def _price(self, side: str, dollars: str) -> int:
        price = price_units(dollars)
        return 10_000 - price if self._use_yes_price and side == "no" else price

    def _snapshot(self, msg: dict[str, Any]) -> None:
        assert "ts" not in msg
        ticker = msg["market_ticker"]
        clock, held = self.clocks.get(ticker), self.books.get(ticker)
        self._clock(msg, at_least=0)
        self._snapshots[ticker] = self.clocks.get(ticker, 0)
        self.market_ids[msg["market_ticker"]] = msg["market_id"]
        self.books[msg["market_ticker"]] = {
            side: {
                self._price(side, price): qty_units(qty)
                for price, qty in msg.get(f"{side}_dollars_fp", [])
            }
            for side in ("yes", "no")
        }
        assert [] not in msg.values()  # the key of an empty side is absent
        if clock is not None and self.clocks[ticker] == clock:
            assert held == self.books[ticker], msg

    def _delta(self, msg: dict[str, Any]) -> None:
        self._clock(msg, at_least=self._snapshots[msg["market_ticker"]] + 1)
        ladder = self.books[msg["market_ticker"]][msg["side"]]
        assert self.market_ids[msg["market_ticker"]] == msg["market_id"]
        price = self._price(msg["side"], msg["price_dollars"])
        size = ladder.pop(price, 0) + qty_units(msg["delta_fp"])
        assert size >= 0, msg
        if size:
            ladder[price] = size

    def view(self, ticker: str) -> BookView:
        """What this client holds a market's book to be."""
        book = self.books[ticker]
        return BookView(self.market_ids[ticker], book["yes"], book["no"])

"""Compute the three datasets slowly: one frame after the other, with dictionaries and fractions.

It reads journal records and shares no code with `kalshi_platform.analytics`: books are replayed from
the wire, and every figure comes straight from its definition.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import groupby
from typing import Any

from kalshi_platform.exchange.book import delta_change, snapshot_ladder
from kalshi_platform.exchange.frames import decode_delta, decode_head, decode_snapshot
from kalshi_platform.journal.kind import Kind
from kalshi_platform_tests.wire import Record

HOUR_US = 3_600_000_000
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
Ladder = dict[int, int]


@dataclass(frozen=True)
class After:
    """A market after one frame."""

    ticker: str
    cause: str
    ts: datetime | None
    at_us: int
    conn: str
    sid: int
    seq: int
    verified: bool
    yes: Ladder
    no: Ladder
    record: int | None = None
    clock_us: int = 0
    """Receive time that never steps back within the market."""

    @property
    def bid(self) -> tuple[int, int] | None:
        """Best YES bid and its size."""
        return max(self.yes.items()) if self.yes else None

    @property
    def ask(self) -> tuple[int, int] | None:
        """Best YES ask and its size."""
        best = max(self.no.items()) if self.no else None
        return (10_000 - best[0], best[1]) if best else None


class Replay:
    """Applies journal records in order; `states` are the hour's rows as its readers must see them."""

    def __init__(self, hour_ns: int) -> None:
        self.states: list[After] = []
        self._hour_us = hour_ns // 1000
        self._in_hour = False
        self._record = 0
        self._newest_us = 0
        self._clocks: dict[str, int] = {}
        self._markets: dict[str, dict[str, Any]] = {}
        self._last_seq: dict[tuple[str, int], int] = {}
        self._open: set[str] = set()

    def run(self, records: Iterable[Record]) -> list[After]:
        """All states whose rows are the hour's, by market."""
        last_us = 0
        for self._record, (recv_ns, conn_bytes, kind, frame) in enumerate(records):
            us, conn = recv_ns // 1000, str(uuid.UUID(bytes=conn_bytes))
            self._in_hour = us // HOUR_US * HOUR_US == self._hour_us
            opens = last_us and (us < last_us or us // HOUR_US != last_us // HOUR_US)
            if self._in_hour and opens and us // HOUR_US > self._newest_us // HOUR_US:
                self._begin_hour()
            elif self._in_hour and opens:
                self._begin_again(us)
            last_us, self._newest_us = us, max(self._newest_us, us)
            if kind == Kind.NOTE:
                self._note(us, conn, json.loads(frame))
            else:
                head = decode_head(frame)
                self._last_seq[conn, head.sid] = head.seq
                if kind == Kind.SNAPSHOT:
                    self._snapshot(us, conn, frame)
                elif kind == Kind.DELTA:
                    self._delta(us, conn, frame)
        return sorted(self.states, key=lambda state: state.ticker)

    def _begin_hour(self) -> None:
        based = {t: it for t, it in sorted(self._markets.items()) if it["newest"] == it["conn"]}
        outage = not any(it["conn"] in self._open for it in based.values())
        ended = max((it["ended"] for it in based.values() if not it["left"]), default=0)
        for ticker, it in based.items():
            if it["conn"] in self._open and not it["left"]:
                seq = self._last_seq[it["conn"], it["sid"]]
                self._add(ticker, "checkpoint", None, self._hour_us, seq)
            elif outage and not it["left"] and it["ended"] == ended:
                self._add(ticker, "checkpoint", None, self._hour_us, 0)

    def _begin_again(self, us: int) -> None:
        """The clock shows an earlier time: every known book gets a checkpoint again."""
        for ticker, it in sorted(self._markets.items()):
            is_open = it["newest"] in self._open
            forgotten = (
                it["left"] and not is_open and it["ended"] < self._newest_us // HOUR_US * HOUR_US
            )
            if forgotten or not (is_open or it["ended"] >= self._hour_us):
                continue
            if it["newest"] != it["conn"]:
                # the market's book is another, without a snapshot: of this one the hour has what it had
                before = [state for state in self.states if state.ticker == ticker]
                if before and before[-1].verified:
                    self._clocks[ticker] = max(self._clocks[ticker], us)
                    stale_state = replace(
                        before[-1],
                        cause="doubt",
                        ts=None,
                        at_us=self._clocks[ticker],
                        clock_us=self._clocks[ticker],
                        seq=0,
                        record=self._record,
                        verified=False,
                    )
                    self.states.append(stale_state)
            else:
                it["verified"] &= is_open and not it["left"]
                seq = self._last_seq[it["conn"], it["sid"]] if is_open else 0
                self._add(ticker, "checkpoint", None, us, seq)

    def _snapshot(self, us: int, conn: str, frame: bytes) -> None:
        snapshot, head = decode_snapshot(frame), decode_head(frame)
        self._markets[snapshot.market_ticker] = {
            "conn": conn,
            "sid": head.sid,
            "newest": conn,
            "verified": True,
            "left": False,
            "ended": 0,
            "known": False,
            "yes": dict(snapshot_ladder(snapshot, "yes")),
            "no": dict(snapshot_ladder(snapshot, "no")),
        }
        self._add(snapshot.market_ticker, "snapshot", None, us, head.seq)

    def _delta(self, us: int, conn: str, frame: bytes) -> None:
        delta, head = decode_delta(frame), decode_head(frame)
        it = self._markets.get(delta.market_ticker)
        if (
            it is not None and it["newest"] != conn
        ):  # a book without a snapshot: nothing can be said of it
            it |= {"newest": conn, "left": False, "ended": 0}
        if it is None or it["conn"] != conn:
            return
        change = delta_change(delta)
        size = it[change.side].get(change.price, 0) + change.qty
        if size < 0:
            self._stale(us, delta.market_ticker)
        it[change.side] = {**it[change.side], change.price: size}
        ts = None if delta.ts is None else datetime.fromisoformat(delta.ts)
        self._add(delta.market_ticker, "delta", ts, us, head.seq)

    def _note(self, us: int, conn: str, note: dict[str, Any]) -> None:
        kind, ticker = note["kind"], note["market_ticker"]
        if kind == "connected":
            self._open.add(conn)
        elif kind == "disconnected":
            self._open.discard(conn)
            self._ended(us, *(t for t, it in self._markets.items() if it["newest"] == conn))
            heard_us = us - round(note["detail"].get("span_s", 0) * 1_000_000)
            # an end that is written down in a later hour is known in the hour that it was in
            self._in_hour |= heard_us // HOUR_US * HOUR_US == self._hour_us
            since = max(heard_us, self._hour_us)
            self._stale(since, *(t for t, it in self._markets.items() if it["conn"] == conn))
        elif kind == "left" and ticker in self._markets:
            self._markets[ticker]["left"] = True
            self._ended(us, ticker)
            self._stale(us, ticker)
        elif kind == "gap" and ticker:
            self._stale(us, ticker)
        elif kind in {"gap", "unsubscribed"}:
            of = (conn, note["sid"])
            self._stale(
                us, *(t for t, it in self._markets.items() if (it["conn"], it["sid"]) == of)
            )

    def _ended(self, us: int, *tickers: str) -> None:
        for ticker in tickers:
            it = self._markets[ticker]
            it["ended"] = it["ended"] or max(us, self._newest_us)

    def _stale(self, us: int, *tickers: str) -> None:
        for ticker in tickers:
            it = self._markets.get(ticker)
            if it is not None and it["verified"]:
                it["verified"] = False
                self._add(ticker, "doubt", None, us, 0)

    def _add(self, ticker: str, cause: str, ts: datetime | None, us: int, seq: int) -> None:
        it = self._markets[ticker]
        yes, no = ({p: q for p, q in it[side].items() if q > 0} for side in ("yes", "no"))
        it["known"] |= self._in_hour and cause in {"snapshot", "checkpoint"}
        if self._in_hour and it["known"]:
            clock = self._clocks[ticker] = max(self._clocks.get(ticker, 0), us)
            at = clock if cause == "doubt" else us
            after = After(
                *(ticker, cause, ts, at, it["conn"], it["sid"], seq, it["verified"]),
                yes=yes,
                no=no,
                record=self._record,
                clock_us=clock,
            )
            self.states.append(after)


# -- the datasets from the states --------------------------------------------------------------


def spreads(states: Sequence[After]) -> list[dict[str, Any]]:
    """What `spreads` must hold."""
    rows = []
    for _, of_market in groupby(states, key=lambda s: s.ticker):
        before: Any = None
        clock_us = 0
        for state in of_market:
            now = (state.bid, state.ask, state.verified)
            clock_us = max(clock_us, state.at_us)
            if now != before:
                known_at = EPOCH + timedelta(microseconds=clock_us)
                rows.append({**_spread_row(state), "known_at": known_at})
            before = now
    return rows


def _spread_row(state: After) -> dict[str, Any]:
    bid, ask = state.bid, state.ask
    row: dict[str, Any] = {
        "market_ticker": state.ticker,
        "ts": state.ts,
        "ingest_ts": EPOCH + timedelta(microseconds=state.at_us),
        "conn_id": state.conn,
        "sid": state.sid,
        "seq": state.seq,
        "cause": state.cause,
        "verified": state.verified,
        "yes_bid": price(bid[0]) if bid else None,
        "yes_bid_size": size(bid[1]) if bid else None,
        "yes_ask": price(ask[0]) if ask else None,
        "yes_ask_size": size(ask[1]) if ask else None,
        "spread": None,
        "mid": None,
        "microprice": None,
        "shard": 0,
        "record": state.record,
    }
    if bid and ask:
        row["spread"] = price(ask[0] - bid[0])
        row["mid"] = Decimal(bid[0] + ask[0]).scaleb(-4) / 2
        weighted = Fraction(bid[0] * ask[1] + ask[0] * bid[1], bid[1] + ask[1])
        row["microprice"] = weighted / 10_000
    return row


def depth(states: Sequence[After]) -> list[dict[str, Any]]:
    """What `depth` must hold."""
    rows = []
    for _, of_market in groupby(states, key=lambda s: s.ticker):
        before: Any = None
        for second, frames in _seconds(of_market):
            row = _depth_row(frames[-1])
            if row != before:
                rows.append({"second": second, **row, "known_at": second + timedelta(seconds=1)})
            before = row
    return rows


def _depth_row(state: After) -> dict[str, Any]:
    row: dict[str, Any] = {"market_ticker": state.ticker, "verified": state.verified}
    for side, ladder in (("bid", state.yes), ("ask", {10_000 - p: q for p, q in state.no.items()})):
        best = (max if side == "bid" else min)(ladder) if ladder else None
        row[f"yes_{side}"] = None if best is None else price(best)
        for name, cents in {"": 0, "_1c": 1, "_2c": 2, "_5c": 5, "_10c": 10}.items():
            row[f"{side}_size{name}"] = size(_within(ladder, best, cents))
        row[f"{side}_size_all"] = size(sum(ladder.values()))
        row[f"{side}_levels"] = len(ladder)
        row[f"{side}_notional"] = sum((price(p) * size(q) for p, q in ladder.items()), Decimal(0))
    return row


def _within(ladder: Ladder, best: int | None, cents: int) -> int:
    return 0 if best is None else sum(q for p, q in ladder.items() if abs(p - best) <= 100 * cents)


def imbalance(states: Sequence[After]) -> list[dict[str, Any]]:
    """What `imbalance` must hold."""
    rows = []
    for _, of_market in groupby(states, key=lambda s: s.ticker):
        before: Any = None
        last: After | None = None
        for second, frames in _seconds(of_market):
            flow, verified = 0, last is None or last.verified
            for frame in frames:
                if last is not None and frame.cause == "delta":
                    flow += order_flow(last, frame)
                verified = verified and frame.verified
                last = frame
            row = _imbalance_row(frames[-1], verified=verified)
            if row != before or flow:
                known_at = second + timedelta(seconds=1)
                rows.append({"second": second, **row, "ofi": size(flow), "known_at": known_at})
            before = row
    return rows


def _imbalance_row(state: After, *, verified: bool) -> dict[str, Any]:
    yes, no = state.yes, state.no
    five = [sum(ladder[p] for p in sorted(ladder, reverse=True)[:5]) for ladder in (yes, no)]
    return {
        "market_ticker": state.ticker,
        "verified": verified,
        "imbalance_best": _ratio(*(_within(s, max(s, default=None), 0) for s in (yes, no))),
        "imbalance_5_levels": _ratio(*five),
        "imbalance_5c": _ratio(*(_within(s, max(s, default=None), 5) for s in (yes, no))),
    }


def order_flow(before: After, after: After) -> int:
    """e_n of Cont, Kukanov and Stoikov, from YES prices."""
    worst_bid, worst_ask = (-1, 0), (99_999, 0)
    (pb, qb), (pb0, qb0) = after.bid or worst_bid, before.bid or worst_bid
    (pa, qa), (pa0, qa0) = after.ask or worst_ask, before.ask or worst_ask
    flow = 0
    if pb >= pb0:
        flow += qb
    if pb <= pb0:
        flow -= qb0
    if pa <= pa0:
        flow -= qa
    if pa >= pa0:
        flow += qa0
    return flow


def _ratio(bid: int, ask: int) -> Fraction | None:
    return Fraction(bid - ask, bid + ask) if bid + ask else None


def _seconds(states: Iterable[After]) -> list[tuple[datetime, list[After]]]:
    return [
        (EPOCH + timedelta(seconds=second), list(frames))
        for second, frames in groupby(states, key=lambda s: s.clock_us // 1_000_000)
    ]


def price(units: int) -> Decimal:
    """1e-4 dollars to dollars."""
    return Decimal(units).scaleb(-4)


def size(units: int) -> Decimal:
    """1e-2 contracts to contracts."""
    return Decimal(units).scaleb(-2)

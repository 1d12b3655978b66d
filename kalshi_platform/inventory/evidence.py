"""Read the rows recorded around breaks: one query for each table, for all markets with breaks at once.

Nothing is classified here; explain.py does that. Amounts are signed contracts, YES positive.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from operator import attrgetter, itemgetter
from statistics import median
from typing import Any, NamedTuple, TypeVar

from kalshi_platform.clickhouse.client import Client, translated
from kalshi_platform.inventory import audit
from kalshi_platform.inventory.audit import moment
from kalshi_platform.inventory.tables import STREAM_EVENTS, TAPE

BEFORE = timedelta(days=1)
"""How long before the window an order may have been sent."""
MOST_ROWS = 20_000
"""Rows of one market and table; of more, the newest are read."""
_MOST = "{most:UInt32} BY market_ticker"
_TRADE_ID = "coalesce(nullIf(JSONExtractString(raw_json, 'trade_id'), ''), fill_id)"
"""A fill's trade id: the exchange gives a fill and its trade the same id, and has sent it under either name."""

SAME = 1e-6
_FOLLOWS = timedelta(minutes=1)
"""A clock skew larger than this is not detected from how pos_filled follows the fills."""
STEADY = timedelta(seconds=1.5)
"""The skew of a wrong clock is constant, except for the duration of the engine's loop."""

_ENDED = {"canceled", "cancelled", "expired", "executed", "filled", "not found"}
_AT = attrgetter("at")
_T = TypeVar("_T")


def between(
    rows: Sequence[_T], begin: datetime, end: datetime, at: Callable[[_T], datetime] = _AT
) -> Sequence[_T]:
    """Return the rows of a time span, both ends included; rows must be in the order of time."""
    return rows[bisect_left(rows, begin, key=at) : bisect_right(rows, end, key=at)]


class Report(NamedTuple):
    """A position as the exchange reported it."""

    at: datetime
    position: float
    source: str
    result: str

    @property
    def settles(self) -> bool:
        """Whether it reports a settlement."""
        return self.source.lower().startswith("settle") or self.source == "market_catalog"


class Fill(NamedTuple):
    """A fill; one that was recorded several times appears once."""

    at: datetime
    """By the exchange's clock, if that was recorded."""
    recorded_at: datetime
    """By the clock that wrote the row."""
    amount: float
    fill_id: str
    order_id: str
    engine: str
    worded: bool
    """Whether its row has the exchange's own value of the side."""
    trade_id: str
    """The exchange's id of the trade, which the public tape has, too."""


class Tape(NamedTuple):
    """The market's public trades, as far as the platform recorded them."""

    own: frozenset[str] = frozenset()
    """Trade ids of recorded fills that are among the public trades."""
    first: datetime = datetime.max.replace(tzinfo=UTC)
    last: datetime = datetime.min.replace(tzinfo=UTC)
    """By the exchange's clock; trades before or after them are unknown."""

    def has(self, fill: Fill) -> bool:
        """Whether the fill is a public trade, so that it happened."""
        return fill.trade_id in self.own

    def lacks(self, fill: Fill) -> bool:
        """Whether the fill did not happen: the tape covers its time and does not have it.

        Ids are comparable only if the tape has any of the market's fills.
        """
        return bool(self.own) and not self.has(fill) and self.first <= fill.at <= self.last


class Action(NamedTuple):
    """A request to the exchange."""

    at: datetime
    engine: str
    action_id: str
    kind: str
    order_id: str
    former_id: str
    side: str
    contract: str
    size: float
    price: float
    request: str

    @property
    def amount(self) -> float:
        """What the order adds if all of it fills."""
        sense = 1 if self.side in {"bid", "buy"} else -1 if self.side in {"ask", "sell"} else 0
        return sense * (-1 if self.contract == "no" else 1) * self.size


class Answer(NamedTuple):
    """The exchange's answer about an order."""

    at: datetime
    engine: str
    action_id: str
    order_id: str
    status: str
    reason: str


class Moved(NamedTuple):
    """A decision whose pos_filled differs from that of the engine's previous decision."""

    at: datetime
    engine: str
    by: float
    expected: bool
    """Whether it equals what the previous decision expected."""


class Decision(NamedTuple):
    """A decision at the moment of a finding, or the last one of its second."""

    at: datetime
    engine: str
    block_codes: Sequence[str]
    convention: str
    resting: float
    """Sum of the four resting sizes, signed."""


@dataclass
class Order:
    """An order, reconstructed from its actions, answers and fills."""

    order_id: str
    engine: str
    began_at: datetime
    remaining: float
    """What it still adds if all of it fills; after its end, what remained."""
    ended_at: datetime | None = None
    how: str = ""
    """The status that ended it."""

    def ends(self, at: datetime, how: str) -> None:
        """Record its end; the first report counts."""
        if self.ended_at is None:
            self.ended_at, self.how = at, how

    def takes(self, amount: float) -> None:
        """Subtract a fill from what remains."""
        left = max(abs(self.remaining) - abs(amount), 0.0)
        self.remaining = round(left if self.remaining > 0 else -left, 6)


@dataclass(frozen=True)
class Market:
    """All rows recorded of one market, each table in the order of time."""

    reports: Sequence[Report] = ()
    fills: Sequence[Fill] = ()
    actions: Sequence[Action] = ()
    answers: Sequence[Answer] = ()
    moved: Sequence[Moved] = ()
    decisions: Sequence[Decision] = ()
    orders: Sequence[Order] = field(default=())
    tape: Tape = Tape()  # noqa: RUF009 - immutable

    def settlement(self, until: datetime) -> Report | None:
        """Return the market's settlement, if there was one by then."""
        return next((report for report in self._settlements if report.at <= until), None)

    def decision(self, at: datetime, engine: str | None) -> Decision | None:
        """Return the last decision within the second of a finding."""
        second = at.replace(microsecond=0)
        of_engine = [
            decision
            for decision in between(self.decisions, second, at + timedelta(seconds=1))
            if decision.at < at + timedelta(seconds=1) and engine in {None, decision.engine}
        ]
        before = [decision for decision in of_engine if decision.at <= at]
        found = before or of_engine
        return found[-1] if found else None

    @cached_property
    def unrecorded(self) -> Sequence[tuple[datetime, Report, float]]:
        """For each report: since when, and the amount that no recorded fill since then accounts for."""
        found = []
        plain = [report for report in self.reports if not report.settles]
        filled = [0.0, *itertools.accumulate(fill.amount for fill in self.fills)]
        until = [filled[bisect_right(self.fills, report.at, key=_AT)] for report in plain]
        for (before, already), (after, then) in itertools.pairwise(zip(plain, until, strict=True)):
            beyond = round(after.position - before.position - (then - already), 6)
            if beyond:
                found.append((before.at, after, beyond))
        return found

    @cached_property
    def rolled(self) -> Sequence[Moved]:
        """Moves of pos_filled to what the previous decision expected, without a fill nearby."""
        return [
            move
            for move in self.moved
            if move.expected
            and not between(self.fills, move.at - audit.REACHES, move.at + audit.REACHES)
        ]

    @cached_property
    def ended(self) -> Sequence[Order]:
        """Orders that have ended, by the time of their end."""
        return sorted(
            (order for order in self.orders if order.ended_at), key=attrgetter("ended_at")
        )

    @cached_property
    def resting(self) -> Sequence[Order]:
        """Orders that have not ended, by the time they were sent."""
        return [order for order in self.orders if order.ended_at is None]

    @cached_property
    def order_ids(self) -> frozenset[str]:
        """Ids of all orders with an action."""
        return frozenset(order.order_id for order in self.orders)

    def orphans(self, begin: datetime, end: datetime) -> int:
        """Count the answers in a time span to actions that were never recorded."""
        return sum(
            answer.action_id not in self._action_ids for answer in between(self.answers, begin, end)
        )

    @cached_property
    def _settlements(self) -> Sequence[Report]:
        return [report for report in self.reports if report.settles]

    @cached_property
    def _action_ids(self) -> frozenset[str]:
        return frozenset(action.action_id for action in self.actions)


def gather(
    client: Client,
    tables: frozenset[str],
    values: Mapping[str, Any],
    start: datetime,
    seconds: Mapping[str, Iterable[datetime]],
) -> dict[str, Market]:
    """Read the rows of the markets in `seconds`; of the decisions those at these times, and the
    last one of each engine within these seconds.
    """
    if not seconds:
        return {}
    moments = {at for moments in seconds.values() for at in moments}
    bound = {
        "markets": sorted(seconds),
        "since": moment(start),
        "early": moment(start - BEFORE),
        "most": MOST_ROWS,
        "seconds": sorted({int(at.timestamp()) for at in moments}),
        "moments": sorted({_milliseconds(at) for at in moments}),
    }

    def rows(
        table: str, columns: str, more: str = "", by: str = _MOST
    ) -> dict[str, list[tuple[Any, ...]]]:
        if table not in tables:
            return {}
        sql = (
            f"SELECT market_ticker, {columns} FROM {table}"  # noqa: S608 - texts of this module
            " WHERE market_ticker IN {markets:Array(String)} AND ts >= {early:DateTime64(3, 'UTC')}"
            f" {more} ORDER BY market_ticker, ts DESC LIMIT {by}"
        )
        with translated():
            found = client.query(sql, parameters=bound).result_rows
        return {
            str(ticker): [tuple(row[1:]) for row in of_market][::-1]
            for ticker, of_market in itertools.groupby(found, key=itemgetter(0))
        }

    reports = rows(
        audit.SNAPSHOTS,
        "toDateTime64(ts, 3, 'UTC'), pos_filled, toString(source),"
        " JSONExtractString(raw_json, 'market_result'), JSONExtractString(raw_json, 'result'),"
        " toDateTime64(parseDateTime64BestEffortOrNull("
        "JSONExtractString(raw_json, 'settled_time'), 3, 'UTC'), 3, 'UTC')",
        "AND isFinite(pos_filled)",
    )
    fills = rows(
        "mm_fills",
        "toDateTime64(coalesce(parseDateTime64BestEffortOrNull("
        "JSONExtractString(raw_json, 'created_time'), 3, 'UTC'), toDateTime64(ts, 3, 'UTC')), 3, 'UTC'),"
        " toDateTime64(ts, 3, 'UTC'), ifNull(toFloat64OrNull(JSONExtractString(raw_json, 'count_fp')), size)"
        " * if(coalesce(nullIf(JSONExtractString(raw_json, 'outcome_side'), ''), toString(side)) = 'yes',"
        " 1, -1), fill_id, client_order_id,"
        " toString(engine_instance_id), JSONExtractString(raw_json, 'outcome_side') != '',"
        f" {_TRADE_ID}, exchange_order_id",
        "AND isFinite(size)",
    )
    actions = rows(
        audit.ACTIONS,
        "toDateTime64(ts, 3, 'UTC'), toString(engine_instance_id), action_id, toString(action_type),"
        " client_order_id, replace_of_client_order_id, toString(side), toString(api_side), size,"
        " price, substring(request_json, 1, 1000)",
        "AND isFinite(size)",
    )
    answers = rows(
        "mm_order_responses",
        "toDateTime64(ts, 3, 'UTC'), toString(engine_instance_id), action_id, client_order_id,"
        " if(status = 'rejected' AND reject_reason ILIKE '%not%found%', 'not found', lower(status)),"
        " toString(reject_reason)",
    )
    decisions = rows(
        audit.DECISIONS,
        "toDateTime64(ts, 3, 'UTC'), toString(engine_instance_id), block_codes,"
        " toString(inv_convention),"
        " open_yes_bid_size + open_no_ask_size - open_yes_ask_size - open_no_bid_size",
        "AND ts >= {since:DateTime64(3, 'UTC')} AND toUnixTimestamp(ts) IN {seconds:Array(UInt32)}",
        "1 BY market_ticker, engine_instance_id, if(toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC')) IN"
        " {moments:Array(Int64)}, toUnixTimestamp64Milli(toDateTime64(ts, 3, 'UTC')), toUnixTimestamp(ts))",
    )
    moved = _moved(client, bound)
    tape = _tape(client, bound) if {TAPE, STREAM_EVENTS, "mm_fills"} <= tables else {}
    catalog = dict(
        zip(values.get("settled_tickers", ()), values.get("settled_at", ()), strict=True)
    )
    markets = {}
    for ticker in seconds:
        known = [Action(*row) for row in actions.get(ticker, ())]
        answered = [Answer(*row) for row in answers.get(ticker, ())]
        filled = _once(fills.get(ticker, ()))
        markets[ticker] = Market(
            reports=_reports(reports.get(ticker, ()), catalog.get(ticker)),
            fills=filled,
            actions=known,
            answers=answered,
            moved=moved.get(ticker, ()),
            decisions=[Decision(*row) for row in decisions.get(ticker, ())],
            orders=_orders(known, answered, filled),
            tape=tape.get(ticker, Tape()),
        )
    return markets


def _moved(client: Client, bound: Mapping[str, Any]) -> dict[str, list[Moved]]:
    sql = """
        SELECT market_ticker, ts, engine, by, expected
        FROM
        (
            SELECT
                market_ticker,
                toDateTime64(ts, 3, 'UTC') AS ts,
                toString(engine_instance_id) AS engine,
                round(pos_filled - lagInFrame(pos_filled) OVER by_time, 6) AS by,
                abs(pos_filled - lagInFrame(inv_after_est) OVER by_time) < 1e-6 AS expected,
                row_number() OVER by_time > 1 AS has_previous
            FROM mm_decisions
            WHERE market_ticker IN {markets:Array(String)} AND ts >= {since:DateTime64(3, 'UTC')}
                AND isFinite(pos_filled)
            WINDOW by_time AS (PARTITION BY market_ticker, engine_instance_id ORDER BY ts, decision_id
                ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING)
        )
        WHERE has_previous AND by != 0
        ORDER BY market_ticker, ts DESC
        LIMIT {most:UInt32} BY market_ticker
    """
    with translated():
        rows = client.query(sql, parameters=dict(bound)).result_rows
    return {
        str(ticker): [Moved(row[1], row[2], row[3], bool(row[4])) for row in of_market][::-1]
        for ticker, of_market in itertools.groupby(rows, key=itemgetter(0))
    }


def _tape(client: Client, bound: Mapping[str, Any]) -> dict[str, Tape]:
    """Return the tape by market. If a trade backfill failed since then, no tape counts as complete."""
    failed_backfills = """
        SELECT count()
        FROM stream_events
        WHERE ingest_ts >= {early:DateTime64(3, 'UTC')} AND kind = 'recovered'
            AND JSONExtractString(detail, 'reason') != ''
    """
    sql = f"""
        SELECT market_ticker, groupUniqArrayIf({{most:UInt32}})(trade_id, trade_id IN
            (
                SELECT {_TRADE_ID}
                FROM mm_fills
                WHERE market_ticker IN {{markets:Array(String)}} AND ts >= {{early:DateTime64(3, 'UTC')}}
            )), toDateTime64(min(ts), 3, 'UTC'), toDateTime64(max(ts), 3, 'UTC')
        FROM {TAPE}
        WHERE market_ticker IN {{markets:Array(String)}} AND ingest_ts >= {{early:DateTime64(3, 'UTC')}}
        GROUP BY market_ticker
    """  # noqa: S608 - texts of this module
    with translated():
        rows = client.query(sql, parameters=dict(bound)).result_rows
        ((failures,),) = client.query(failed_backfills, parameters=dict(bound)).result_rows
    return {
        str(ticker): Tape(frozenset(own)) if failures else Tape(frozenset(own), *span)
        for ticker, own, *span in rows
    }


def _milliseconds(at: datetime) -> int:
    return (at - datetime.fromtimestamp(0, UTC)) // timedelta(milliseconds=1)


def _reports(rows: Iterable[tuple[Any, ...]], settled_ms: int | None) -> list[Report]:
    found = []
    for at, position, source, market_result, result, settled_at in rows:
        report = Report(at, position, source, market_result or result)
        if report.settles and settled_at is not None:
            report = report._replace(at=min(at, settled_at))
        found.append(report)
    if settled_ms is not None:
        at = datetime.fromtimestamp(settled_ms / 1000, UTC)
        found.append(Report(at, 0.0, "market_catalog", ""))
    return sorted(found, key=attrgetter("at"))


def _once(rows: Iterable[tuple[Any, ...]]) -> list[Fill]:
    found: dict[Any, Fill] = {}
    for *columns, exchange_order_id in rows:
        fill = Fill(*columns)
        key = fill.fill_id or (fill.recorded_at, exchange_order_id, abs(fill.amount))
        found.setdefault(key, fill)
    return sorted(found.values(), key=attrgetter("at"))


def _orders(
    actions: Sequence[Action], answers: Sequence[Answer], fills: Sequence[Fill]
) -> list[Order]:
    """Reconstruct the orders, with what remains of each or remained at its end."""
    refused = {
        answer.action_id: answer for answer in answers if answer.status in {"rejected", "not found"}
    }
    asked = {action.action_id: action for action in actions}
    orders: dict[tuple[str, str], Order] = {}
    decreased: dict[tuple[str, str], datetime] = {}
    replaced: dict[str, Order] = {}
    for action in actions:
        key = (action.engine, action.order_id)
        if action.kind == "cancel":
            continue
        if key not in orders:
            orders[key] = Order(action.order_id, action.engine, action.at, action.amount)
            if action.action_id in refused:
                orders[key].ends(refused[action.action_id].at, "rejected")
        elif action.action_id not in refused:
            orders[key].remaining = action.amount
            decreased[key] = action.at
        if action.former_id != action.order_id and (action.engine, action.former_id) in orders:
            replaced[action.action_id] = orders[action.engine, action.former_id]
    for answer in answers:
        action_of = asked.get(answer.action_id)
        order_id = answer.order_id or (action_of.order_id if action_of is not None else "")
        if answer.action_id in replaced and answer.status != "rejected":
            replaced[answer.action_id].ends(answer.at, "replaced")
        order = orders.get((answer.engine, order_id))
        if order is not None and answer.status in _ENDED:
            order.ends(answer.at, answer.status)
    owners = {order_id: key for key in orders for order_id in key[1:]}
    for fill in fills:
        key = owners.get(fill.order_id, ("", ""))
        if key in orders and fill.at > decreased.get(key, fill.at - STEADY):
            orders[key].takes(fill.amount)
    return sorted(orders.values(), key=attrgetter("began_at"))


def skew(markets: Iterable[Market], engine: str) -> timedelta | None:
    """Return how far an engine's clock is ahead of the exchange's, if the skew is constant; else None.

    It is computed from fills whose rows have both clocks; otherwise from when pos_filled followed each fill.
    """
    markets = list(markets)
    written = [
        fill.recorded_at - fill.at
        for market in markets
        for fill in market.fills
        if fill.engine == engine and fill.recorded_at != fill.at
    ]
    followed = [span for market in markets for span in _followed(market, engine)]
    for spans in (written, followed):
        steady = _steady(spans)
        if steady is not None:
            return steady
    return None


def _followed(market: Market, engine: str) -> Iterable[timedelta]:
    """Yield how long after each fill pos_filled moved by its amount: the closest move, each move once."""
    left: dict[float, list[datetime]] = {}
    for move in market.moved:
        if move.engine == engine:
            left.setdefault(round(move.by, 6), []).append(move.at)
    for fill in market.fills:
        moves = left.get(round(fill.amount, 6), [])
        after = bisect_left(moves, fill.at)
        near = range(max(after - 1, 0), min(after + 1, len(moves)))
        closest = min(near, key=lambda place: abs(moves[place] - fill.at), default=None)
        if closest is not None and abs(moves[closest] - fill.at) <= _FOLLOWS:
            yield moves.pop(closest) - fill.at


def _steady(spans: Sequence[timedelta]) -> timedelta | None:
    if len(spans) < 2:
        return None
    seconds = [span.total_seconds() for span in spans]
    middle = median(seconds)
    near = [value for value in seconds if abs(value - middle) <= STEADY.total_seconds()]
    if len(near) * 4 < len(seconds) * 3 or abs(middle) <= audit.REACHES.total_seconds():
        return None
    return timedelta(seconds=middle)

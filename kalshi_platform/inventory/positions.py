"""Positions as the exchange reports them: ground truth for `mm_position_snapshots`.

A report counts only when it is no older than our last fill, and when nothing was filled around it. A
report that fails raises, and nothing is written: it never means flat. Positions and fills are read one by
one: what cannot be read makes the report incomplete, which is said, and the markets that can be read are
kept. A market that a whole report leaves out is flat only where a settlement or the fills say so; one that
an incomplete report leaves out is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pyarrow as pa

from kalshi_platform import __version__
from kalshi_platform.clickhouse.client import Client, insert_arrow, translated
from kalshi_platform.exchange.answers import Fill, Position, Settlement
from kalshi_platform.exchange.errors import ExchangeError
from kalshi_platform.exchange.items import Tell, Unreadable
from kalshi_platform.exchange.rest import RestClient
from kalshi_platform.inventory.audit import DECISIONS, SNAPSHOTS
from kalshi_platform.inventory.rows import POSITION_SNAPSHOTS, SETTLEMENTS
from kalshi_platform.inventory.tables import usable

ENGINE = "platform"
"""`engine_instance_id` of the snapshots taken here."""

QUIET = timedelta(seconds=2)
"""A market that was filled so recently is left for another look: its engine may not know yet."""
ATTEMPTS = 5
PAUSE_S = 1.0
RECENT = timedelta(minutes=2)
"""How far back fills are read to see what is quiet."""
KNOWN_DAYS = 7
"""Markets with decisions so recent are asked about even when they were never held."""


NO_WORD = "the report leaves it out, but no fill or settlement says flat"
INCOMPLETE = "the report is incomplete: a position in it cannot be read, which may be this one"


class PositionsBehind(ExchangeError):
    """The exchange's portfolio pages have not caught up with our last fill."""


@dataclass(frozen=True)
class Held:
    """What was known of a market before."""

    position: Decimal
    at: datetime


@dataclass(frozen=True)
class Snapshot:
    """One market's position, as the exchange said."""

    market_ticker: str
    position: Decimal
    """Contracts, YES positive, NO negative; exact."""
    at: datetime
    source: str
    """positions, settlements, or absent: left out by a whole report, and the fills agree."""
    avg_cost: Decimal = Decimal(0)
    """Dollars for each contract held; 0 where none is."""
    raw_json: str = ""


@dataclass(frozen=True)
class Report:
    """A report: whole, but for what is `unreadable`."""

    snapshots: tuple[Snapshot, ...]
    left_out: Mapping[str, str]
    """Markets without a snapshot this time, and why."""
    as_of: datetime | None
    """Up to when the exchange says that its portfolio pages are true."""
    unreadable: tuple[Unreadable, ...] = ()
    """What of the exchange's pages could not be read. The report is incomplete then: no market that it
    leaves out is taken for flat."""


def take(
    rest: RestClient,
    known: Mapping[str, Held | None] | None = None,
    *,
    attempts: int = ATTEMPTS,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Report:
    """Read a report. `known` are markets that may be left out of it, with what they held before.

    Raises `PositionsBehind` where the pages do not catch up with our last fill, and `ExchangeError`
    for whatever the exchange refuses.
    """
    known = known or {}
    done: dict[str, Snapshot] = {}
    left_out: dict[str, str] = {}
    as_of: datetime | None = None
    unreadable: dict[Unreadable, None] = {}
    for attempt in range(attempts):
        if attempt:
            sleep(PAUSE_S)
        begun = clock()
        of_positions, of_fills = list[Unreadable](), list[Unreadable]()
        before = _recent(rest, begun, of_fills.append)
        as_of = rest.user_data_timestamp()
        if before and as_of < before[0].created_time:
            left_out = {"": _behind(as_of, before[0].created_time)}
            continue
        found = {it.ticker: (it, raw) for it, raw in rest.positions_as_sent(of_positions.append)}
        after = _recent(rest, begun, of_fills.append)
        busy = _busy(before, after, begun)
        left_out = dict.fromkeys(busy, "it was filled at that moment")
        left_out |= dict.fromkeys(
            _unsure(of_fills, {*found, *known} - busy), "a fill cannot be read"
        )
        for ticker, (position, raw) in found.items():
            if ticker not in left_out:
                done[ticker] = _reported(position, raw, begun)
        whole = not _left_out(of_positions)
        for ticker in [t for t in known if t not in found and t not in left_out]:
            held = known[ticker]
            snapshot = _absent(rest, ticker, held, begun, of_fills.append) if whole else None
            if snapshot is None:
                left_out[ticker] = NO_WORD if whole else INCOMPLETE
            else:
                done[ticker] = snapshot
        unreadable |= dict.fromkeys([*of_positions, *of_fills])
        if not busy:
            break
    behind = left_out.pop("", None)
    if behind is not None and not done:
        raise PositionsBehind(behind)
    for ticker in done:
        left_out.pop(ticker, None)
    snapshots = tuple(done[ticker] for ticker in sorted(done))
    return Report(snapshots, left_out, as_of, tuple(unreadable))


def _left_out(found: Sequence[Unreadable]) -> list[Unreadable]:
    """Of what cannot be read the whole items: of the others the rest was used."""
    return [each for each in found if each.left_out]


def _unsure(fills: Sequence[Unreadable], tickers: set[str]) -> set[str]:
    """Markets with a fill that cannot be read, so that when it was is not known; all, where not even its market is."""
    doubtful = {fill.ticker for fill in _left_out(fills)}
    return tickers if "" in doubtful else tickers & doubtful


def known_markets(client: Client) -> dict[str, Held | None]:
    """Markets with recent decisions or a snapshot, and the newest snapshot of each."""
    there = usable(client)
    known: dict[str, Held | None] = {}
    with translated():
        if DECISIONS in there:
            rows = client.query(
                "SELECT DISTINCT market_ticker FROM mm_decisions"
                " WHERE ts >= now() - toIntervalDay({days:UInt32})",
                parameters={"days": KNOWN_DAYS},
            ).result_rows
            known.update({str(ticker): None for (ticker,) in rows})
        if SNAPSHOTS in there:
            rows = client.query(
                "SELECT market_ticker, argMax(pos_filled, (ts, source, engine_instance_id)), max(ts)"
                " FROM mm_position_snapshots GROUP BY market_ticker"
                " HAVING max(ts) >= now() - toIntervalDay({days:UInt32})"
                " OR argMax(pos_filled, (ts, source, engine_instance_id)) != 0",
                parameters={"days": KNOWN_DAYS},
            ).result_rows
            for ticker, position, at in rows:
                known[str(ticker)] = Held(Decimal(repr(position)), at)
    return known


def store(client: Client, report: Report) -> None:
    """Write a report's snapshots. The same report twice is stored once."""
    rows = [
        {
            "ts": each.at.replace(microsecond=each.at.microsecond // 1000 * 1000),
            "engine_instance_id": ENGINE,
            "engine_version": __version__,
            "market_ticker": each.market_ticker,
            "pos_filled": float(each.position),
            "avg_cost": float(each.avg_cost),
            "source": each.source,
            "raw_json": each.raw_json,
        }
        for each in report.snapshots
    ]
    if rows:
        token = f"positions {max(each.at for each in report.snapshots).isoformat()} {len(rows)}"
        table = pa.Table.from_pylist(rows, schema=POSITION_SNAPSHOTS.arrow)
        insert_arrow(client, SNAPSHOTS, table, token, log_comment="mm_position_snapshots")


def _recent(rest: RestClient, now: datetime, tell: Tell) -> list[Fill]:
    """Our fills of the last minutes, newest first; at least the newest of all, where there is one."""
    floor = now - RECENT
    fills: list[Fill] = []
    for fill in rest.fills(tell=tell):
        fills.append(fill)
        if fill.created_time < floor:
            break
    return sorted(fills, key=lambda fill: fill.created_time, reverse=True)


def _busy(before: Sequence[Fill], after: Sequence[Fill], begun: datetime) -> set[str]:
    """Markets that were filled shortly before, or while the report was read."""
    seen = {fill.fill_id for fill in before}
    new = {fill.ticker for fill in after if fill.fill_id not in seen}
    return new | {fill.ticker for fill in before if fill.created_time > begun - QUIET}


def _reported(position: Position, raw: str, at: datetime) -> Snapshot:
    held = Decimal(position.position_fp)
    cost = Decimal(0)
    if held and position.market_exposure_dollars is not None:
        cost = abs(Decimal(position.market_exposure_dollars)) / abs(held)
    return Snapshot(position.ticker, held, at, "positions", cost, raw)


def _absent(
    rest: RestClient, ticker: str, held: Held | None, at: datetime, tell: Tell
) -> Snapshot | None:
    """Whether a market that a whole report left out is flat; None where nothing says so.

    A fill or a settlement that cannot be read says nothing, and is told.
    """
    unreadable: list[Unreadable] = []
    position = held.position if held is not None else Decimal(0)
    since = int((held.at - timedelta(seconds=1)).timestamp()) if held is not None else None
    for fill in rest.fills(ticker=ticker, min_ts=since, tell=unreadable.append):
        if held is None or fill.created_time > held.at:
            position += _signed(fill)
    settlement = None
    if position:
        settlement = next(iter(rest.settlements(ticker=ticker, tell=unreadable.append)), None)
    for each in unreadable:
        tell(each)
    if _left_out(unreadable):
        return None
    if not position:
        return Snapshot(ticker, Decimal(0), at, "absent", raw_json="{}")
    if settlement is None:
        return None
    return Snapshot(ticker, Decimal(0), at, SETTLEMENTS, raw_json=_encoded(settlement))


def _signed(fill: Fill) -> Decimal:
    count = Decimal(fill.count_fp)
    return count if fill.outcome_side == "yes" else -count


def _encoded(settlement: Settlement) -> str:
    return msgspec.json.encode(settlement).decode()


def _behind(as_of: datetime, fill: datetime) -> str:
    return (
        f"The exchange's portfolio pages are as of {as_of:%H:%M:%S.%f} UTC, and our last fill was at"
        f" {fill:%H:%M:%S.%f}: a position from them would be old. Nothing was written; try again"
        " later."
    )


def as_rows(report: Report) -> list[dict[str, Any]]:
    """The report's snapshots as plain values, for a table."""
    return [
        {
            "market_ticker": each.market_ticker,
            "position": str(each.position),
            "avg_cost": f"{each.avg_cost:.4f}",
            "source": each.source,
        }
        for each in report.snapshots
    ]

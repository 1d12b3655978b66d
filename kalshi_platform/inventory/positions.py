"""Read the exchange's positions for `mm_position_snapshots`.

A report is used only if it is not older than our last fill, and only for markets that were not filled during the
reading. If the reading fails, it raises and nothing is written: a failure never means flat. Positions and fills
are decoded one by one: an item that cannot be read makes the report incomplete, which is reported, and the other
markets are kept. A market that is not in a complete report is flat only if a settlement or the fills say so; one
that is not in an incomplete report gets no snapshot.
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
from kalshi_platform.exchange.items import ReportUnreadable, Unreadable
from kalshi_platform.exchange.rest import RestClient
from kalshi_platform.inventory.audit import DECISIONS, SNAPSHOTS
from kalshi_platform.inventory.rows import POSITION_SNAPSHOTS, SETTLEMENTS
from kalshi_platform.inventory.tables import usable

ENGINE = "platform"
"""`engine_instance_id` of the snapshots taken here."""

QUIET = timedelta(seconds=2)
"""A market filled this recently is read again: its engine may not know of the fill yet."""
ATTEMPTS = 5
PAUSE_S = 1.0
RECENT = timedelta(minutes=2)
"""How far back fills are read to find the markets without recent fills."""
KNOWN_DAYS = 7
"""Markets with decisions this recent are included even if they were never held."""


NOT_PROVED_FLAT = "the report leaves it out, but no fill or settlement says flat"
INCOMPLETE = "the report is incomplete: a position in it cannot be read, which may be this one"


class PositionsBehind(ExchangeError):
    """The exchange's portfolio pages have not caught up with our last fill."""


@dataclass(frozen=True)
class Held:
    """A market's position by its newest snapshot."""

    position: Decimal
    at: datetime


@dataclass(frozen=True)
class Snapshot:
    """One market's position as the exchange reported it."""

    market_ticker: str
    position: Decimal
    """Contracts, YES positive, NO negative; exact."""
    at: datetime
    source: str
    """`positions`, `settlements`, or `absent`: not in a complete report, and the fills agree that it is flat."""
    avg_cost: Decimal = Decimal(0)
    """Dollars for each contract held; 0 if none is."""
    raw_json: str = ""


@dataclass(frozen=True)
class Report:
    """A report: complete except for the items in `unreadable`."""

    snapshots: tuple[Snapshot, ...]
    left_out: Mapping[str, str]
    """Markets without a snapshot this time, with the reason."""
    as_of: datetime | None
    """The time as of which the exchange's portfolio pages hold."""
    unreadable: tuple[Unreadable, ...] = ()
    """Items of the exchange's pages that could not be read. The report is incomplete then, and no missing
    market counts as flat."""


def take(
    rest: RestClient,
    known: Mapping[str, Held | None] | None = None,
    *,
    attempts: int = ATTEMPTS,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Report:
    """Read a report. `known` are markets that it may lack, with their positions before.

    Raises `PositionsBehind` if the pages do not catch up with our last fill, and `ExchangeError`
    for everything that the exchange refuses.
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
        found = {p.ticker: (p, raw) for p, raw in rest.positions_as_sent(of_positions.append)}
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
                left_out[ticker] = NOT_PROVED_FLAT if whole else INCOMPLETE
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
    """Return the unreadable items that were left out; of the others only a field was unreadable."""
    return [item for item in found if item.left_out]


def _unsure(fills: Sequence[Unreadable], tickers: set[str]) -> set[str]:
    """Return the markets with a fill of unknown time, because it cannot be read; all, if its market is unknown, too."""
    uncertain = {fill.ticker for fill in _left_out(fills)}
    return tickers if "" in uncertain else tickers & uncertain


def known_markets(client: Client) -> dict[str, Held | None]:
    """Return the markets with recent decisions or a snapshot, and the newest snapshot of each."""
    tables = usable(client)
    known: dict[str, Held | None] = {}
    with translated():
        if DECISIONS in tables:
            rows = client.query(
                "SELECT DISTINCT market_ticker FROM mm_decisions"
                " WHERE ts >= now() - toIntervalDay({days:UInt32})",
                parameters={"days": KNOWN_DAYS},
            ).result_rows
            known.update({str(ticker): None for (ticker,) in rows})
        if SNAPSHOTS in tables:
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
            "ts": snapshot.at.replace(microsecond=snapshot.at.microsecond // 1000 * 1000),
            "engine_instance_id": ENGINE,
            "engine_version": __version__,
            "market_ticker": snapshot.market_ticker,
            "pos_filled": float(snapshot.position),
            "avg_cost": float(snapshot.avg_cost),
            "source": snapshot.source,
            "raw_json": snapshot.raw_json,
        }
        for snapshot in report.snapshots
    ]
    if rows:
        token = (
            f"positions {max(snapshot.at for snapshot in report.snapshots).isoformat()} {len(rows)}"
        )
        table = pa.Table.from_pylist(rows, schema=POSITION_SNAPSHOTS.arrow)
        insert_arrow(client, SNAPSHOTS, table, token, log_comment="mm_position_snapshots")


def _recent(rest: RestClient, now: datetime, report_unreadable: ReportUnreadable) -> list[Fill]:
    """Return our fills of the last minutes, newest first; at least the newest fill, if there is any."""
    floor = now - RECENT
    fills: list[Fill] = []
    for fill in rest.fills(report=report_unreadable):
        fills.append(fill)
        if fill.created_time < floor:
            break
    return sorted(fills, key=lambda fill: fill.created_time, reverse=True)


def _busy(before: Sequence[Fill], after: Sequence[Fill], begun: datetime) -> set[str]:
    """Return the markets that were filled shortly before, or during the reading."""
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
    rest: RestClient,
    ticker: str,
    held: Held | None,
    at: datetime,
    report_unreadable: ReportUnreadable,
) -> Snapshot | None:
    """Return a flat snapshot for a market that a complete report lacks; None if nothing proves that it is flat.

    A fill or a settlement that cannot be read proves nothing, and is reported to `report_unreadable`.
    """
    unreadable: list[Unreadable] = []
    position = held.position if held is not None else Decimal(0)
    since = int((held.at - timedelta(seconds=1)).timestamp()) if held is not None else None
    for fill in rest.fills(ticker=ticker, min_ts=since, report=unreadable.append):
        if held is None or fill.created_time > held.at:
            position += _signed(fill)
    settlement = None
    if position:
        settlement = next(iter(rest.settlements(ticker=ticker, report=unreadable.append)), None)
    for item in unreadable:
        report_unreadable(item)
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
    """Return the report's snapshots as plain values, for a table."""
    return [
        {
            "market_ticker": snapshot.market_ticker,
            "position": str(snapshot.position),
            "avg_cost": f"{snapshot.avg_cost:.4f}",
            "source": snapshot.source,
        }
        for snapshot in report.snapshots
    ]

"""Export for NautilusTrader: a `ParquetDataCatalog` that the engine itself writes.

The engine must be installed beside the platform: `pip install "nautilus_trader>=1.221,<1.222"`. 1.221 is the newest that
Python 3.11 takes; later ones need Python 3.12.

    instrument      `{TICKER}.KALSHI`, a `BinaryOption` in YES terms; increments from the market's price ranges
    book            `OrderBookDelta`: a snapshot is a CLEAR and its levels with F_SNAPSHOT; an event's last one has F_LAST
    trades          `TradeTick`, with the taker as aggressor
    status          `InstrumentStatus` at open, pause and close
    close           `InstrumentClose` at the settlement value

`ts_event` is the exchange's time by the rule of `levels.EXCHANGE_TIME_RULE`, `ts_init` the receive time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

from nautilus_trader.backtest.models import FeeModel
from nautilus_trader.core.nautilus_pyo3 import FIXED_PRECISION
from nautilus_trader.model.currencies import USD
from nautilus_trader.model.data import (
    BookOrder,
    InstrumentClose,
    InstrumentStatus,
    OrderBookDelta,
    TradeTick,
)
from nautilus_trader.model.enums import (
    AggressorSide,
    AssetClass,
    BookAction,
    InstrumentCloseType,
    LiquiditySide,
    MarketStatusAction,
    OrderSide,
    RecordFlag,
)
from nautilus_trader.model.identifiers import InstrumentId, Symbol, TradeId, Venue
from nautilus_trader.model.instruments import BinaryOption
from nautilus_trader.model.objects import Money, Price, Quantity
from nautilus_trader.persistence.catalog import ParquetDataCatalog

from kalshi_platform.exchange.fees import trade_fee
from kalshi_platform.exchange.numbers import ONE_DOLLAR, PRICE_SCALE, QTY_SCALE
from kalshi_platform.reading.archive import Archive
from kalshi_platform.reading.arguments import microseconds_of, span, ticker_of
from kalshi_platform.reading.events import EventKind
from kalshi_platform.reading.exporters import sidecar
from kalshi_platform.reading.exporters.levels import BookChange, Level, YesBook, changes
from kalshi_platform.reading.exporters.sidecar import Terms

VENUE = Venue("KALSHI")
BATCH = 100_000
"""Objects that are held before they are written."""
_LAST, _SNAPSHOT = int(RecordFlag.F_LAST), int(RecordFlag.F_SNAPSHOT)
_NEVER_NS = 253_402_300_799 * 10**9
"""The end of the year 9999: a market without a known end does not expire in a backtest."""
_STATUS = {
    "activated": MarketStatusAction.TRADING,
    "deactivated": MarketStatusAction.PAUSE,
    "determined": MarketStatusAction.CLOSE,
}


class KalshiFeeModel(FeeModel):  # type: ignore[misc]
    """The exchange's trading fees for NautilusTrader.

    The engine keeps dollars in cents and rounds a fill's fee to them; `trade_fee` computes it exactly.
    """

    def __init__(self, fee_type: str = "quadratic", multiplier: Decimal = Decimal(1)) -> None:
        """Take the terms of a series.

        Args:
            fee_type: The series' fee type.
            multiplier: The series' fee multiplier.
        """
        self._fee_type, self._multiplier = fee_type, multiplier

    def get_commission(self, order: Any, fill_qty: Any, fill_px: Any, instrument: Any) -> Any:
        """Compute the fee of a fill, as the engine asks for it.

        Args:
            order: The order.
            fill_qty: Contracts.
            fill_px: Dollars.
            instrument: The market.

        Returns:
            The fee.
        """
        fee = trade_fee(
            fill_px.as_decimal(),
            fill_qty.as_decimal(),
            taker=order.liquidity_side != LiquiditySide.MAKER,
            fee_type=self._fee_type,
            multiplier=self._multiplier,
        )
        return Money(fee, instrument.quote_currency)


@dataclass(frozen=True)
class Exported:
    """What was written."""

    instrument_id: str
    catalog: Path
    sidecar: Path
    deltas: int
    trades: int


def export(
    archive: Archive, ticker: str, start: datetime, end: datetime, folder: str | Path
) -> Exported:
    """Write a market for NautilusTrader. Spans that are not synced become a cleared book.

    Args:
        archive: The archive.
        ticker: The market.
        start: The first instant, in receive time.
        end: The instant after the last.
        folder: The catalog's folder; made if it is not there.

    Returns:
        What was written.

    Raises:
        RequestRefused: An argument is wrong, or the archive has nothing of it; the sentence says what to do.
        StoreError: The archive cannot be read.
    """
    name, when, target = ticker_of(ticker), span(start, end), Path(folder)
    terms = sidecar.terms_of(archive, name)
    instrument = instrument_of(terms, microseconds_of(when[0]) * 1000)
    made = objects(archive, instrument.id, name, *when)
    first = next(made, None)  # what the archive does not have is refused before anything is written
    target.mkdir(parents=True, exist_ok=True)
    catalog = ParquetDataCatalog(str(target))
    catalog.write_data([instrument])
    counts = {OrderBookDelta: 0, TradeTick: 0}
    held: dict[type, list[Any]] = {OrderBookDelta: [], TradeTick: []}

    def flush(kind: type) -> None:
        if held[kind]:
            catalog.write_data(held[kind], skip_disjoint_check=True)
            counts[kind] += len(held[kind])
            held[kind] = []

    for group in [first] if first else []:
        held[type(group[0])] += group
    for group in made:
        kind = type(group[0])
        # Files are named for their first and last receive time: none begins at the instant that ended one.
        if len(held[kind]) >= BATCH and group[0].ts_init > held[kind][-1].ts_init:
            flush(kind)
        held[kind] += group
    for kind in held:
        flush(kind)
    status = [*_status(archive, instrument.id, terms, when)]
    for events in (status, [*_close(instrument.id, terms, when)]):
        if events:
            catalog.write_data(events)
    path = target / f"{name}.json"
    sidecar.write(
        path,
        archive,
        terms,
        when,
        [],
        engine="nautilus_trader 1.221",
        instrument_id=str(instrument.id),
        price_increment=str(instrument.price_increment),
        size_increment=str(instrument.size_increment),
        deltas=counts[OrderBookDelta],
        trades=counts[TradeTick],
    )
    return Exported(str(instrument.id), target, path, counts[OrderBookDelta], counts[TradeTick])


def instrument_of(terms: Terms, start_ns: int) -> Any:
    """Make a market's instrument. Without terms its step is a cent, and it never expires."""

    def ns(name: str, default: int) -> int:
        at = terms.row.get(name)
        return default if at is None else microseconds_of(at) * 1000

    return BinaryOption(
        instrument_id=InstrumentId(Symbol(terms.ticker), VENUE),
        raw_symbol=Symbol(terms.ticker),
        asset_class=AssetClass.ALTERNATIVE,
        currency=USD,
        price_precision=PRICE_SCALE,
        price_increment=_price(terms.tick),
        size_precision=QTY_SCALE,
        size_increment=_quantity(1),
        activation_ns=ns("open_time", start_ns),
        expiration_ns=ns("close_time", _NEVER_NS),
        ts_event=start_ns,
        ts_init=start_ns,
        outcome="Yes",
        description=terms.row.get("title") or None,
    )


def objects(
    archive: Archive, instrument_id: Any, ticker: str, start: datetime, end: datetime
) -> Iterator[list[Any]]:
    """Yield the deltas of each event, or its trade."""
    book = YesBook()
    for change in changes(archive, ticker, start, end):
        times = (change.exchange_us * 1000, change.known_us * 1000)
        if change.event.kind is EventKind.TRADE:
            yield [_trade(change, instrument_id, *times)]
            continue
        deltas = list(_deltas(change, book, instrument_id, *times))
        book.apply(change)
        if deltas:
            yield deltas


def _trade(change: BookChange, instrument_id: Any, ts_event: int, ts_init: int) -> Any:
    event = change.event
    buys = event.side == "yes"
    return TradeTick(
        instrument_id,
        _price(event.price_units if buys else ONE_DOLLAR - event.price_units),
        _quantity(event.qty_units),
        AggressorSide.BUYER if buys else AggressorSide.SELLER,
        TradeId(event.trade_id[:36] or f"record-{event.record}"),
        ts_event,
        ts_init,
    )


def _deltas(
    change: BookChange, book: YesBook, instrument_id: Any, ts_event: int, ts_init: int
) -> Iterator[Any]:
    levels = change.levels
    if not change.whole:  # what removes a level that is not there changes nothing
        levels = tuple(one for one in levels if one.size or (one.bid, one.price) in book.sizes)
    flags = _SNAPSHOT if change.whole else 0
    sequence = change.event.record or 0

    def delta(action: Any, order: Any, *, last: bool) -> Any:
        marks = flags | (_LAST if last else 0)
        return OrderBookDelta(instrument_id, action, order, marks, sequence, ts_event, ts_init)

    if change.whole:
        yield delta(BookAction.CLEAR, None, last=not levels)
    for level in levels:
        action = BookAction.ADD if change.whole else BookAction.UPDATE
        if not level.size:
            action = BookAction.DELETE
        yield delta(action, _order(level), last=level is levels[-1])


def _order(level: Level) -> Any:
    side = OrderSide.BUY if level.bid else OrderSide.SELL
    return BookOrder(side, _price(level.price), _quantity(level.size), level.price)


@cache
def _price(units: int) -> Any:
    return Price.from_raw(units * 10 ** (FIXED_PRECISION - PRICE_SCALE), PRICE_SCALE)


def _quantity(units: int) -> Any:
    return Quantity.from_raw(units * 10 ** (FIXED_PRECISION - QTY_SCALE), QTY_SCALE)


def _status(
    archive: Archive, instrument_id: Any, terms: Terms, when: tuple[datetime, datetime]
) -> list[Any]:
    """Return what the terms and the lifecycle events of the span say of trading, by receive time."""
    found = [
        (terms.row[name], terms.row[name], action, name)
        for name, action in (
            ("open_time", MarketStatusAction.TRADING),
            ("close_time", MarketStatusAction.CLOSE),
        )
        if terms.row.get(name) is not None and when[0] <= terms.row[name] < when[1]
    ]
    for row in archive.lifecycle(terms.ticker, *when, allow_gaps=True).to_dicts():
        if row["event_type"] in _STATUS:
            at = row["known_at"]
            found.append((at, at, _STATUS[row["event_type"]], row["event_type"]))
    return [
        InstrumentStatus(
            instrument_id,
            action,
            microseconds_of(event) * 1000,
            microseconds_of(init) * 1000,
            reason,
        )
        for init, event, action, reason in sorted(found, key=lambda one: one[0])
    ]


def _close(instrument_id: Any, terms: Terms, when: tuple[datetime, datetime]) -> Sequence[Any]:
    """Return the close at the settlement value, where the terms have it: at the settlement, or at the span's end before."""
    value, at = terms.row.get("settlement_value"), terms.row.get("settlement_ts")
    if value is None:
        return []
    ns = max(microseconds_of(at or when[1]), microseconds_of(when[1])) * 1000
    price = _price(int(value * ONE_DOLLAR))
    kind = InstrumentCloseType.CONTRACT_EXPIRED
    return [InstrumentClose(instrument_id, price, kind, ns, ns)]

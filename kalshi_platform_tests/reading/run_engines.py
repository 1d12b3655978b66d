"""Runs in the environment of `make engines`: each engine reads an export, and says what its book was after every event.

    python -m kalshi_platform_tests.reading.run_engines hftbacktest DIR TICKER
    python -m kalshi_platform_tests.reading.run_engines nautilus DIR TICKER ARCHIVE START_US END_US

Prints one JSON object: `tops`, a list of [receive time in µs, best bid, best ask] with null for an empty side, and what a
backtest with one resting order came to.
"""

from __future__ import annotations

import json
import math
import sys
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from kalshi_platform.reading import Archive
from kalshi_platform.reading.arguments import EPOCH

Top = list[float | int | None]
ORDER_QTY = 5.0


def hftbacktest(folder: Path, ticker: str) -> dict[str, Any]:
    """Feed every day, each after the end-of-day book of the one before, and once more with a resting order."""
    from hftbacktest import GTC, LIMIT, BacktestAsset, HashMapMarketDepthBacktest
    from numba import njit

    sidecar = json.loads((folder / f"{ticker}.json").read_text())

    def backtest(days: list[dict[str, Any]], snapshot: str | None) -> Any:
        asset = (
            BacktestAsset()
            .data([str(folder / day["events"]) for day in days])
            .linear_asset(1.0)
            .constant_order_latency(1_000_000, 1_000_000)
            .risk_adverse_queue_model()
            .no_partial_fill_exchange()
            .trading_value_fee_model(0.0, 0.0)
            .tick_size(sidecar["tick_size"])
            .lot_size(sidecar["lot_size"])
        )
        if snapshot is not None:
            asset = asset.initial_snapshot(str(folder / snapshot))
        return HashMapMarketDepthBacktest([asset])

    def feed(hbt: Any, out: Any) -> Any:
        n = 0
        while hbt.wait_next_feed(False, 10**18) == 2:
            depth = hbt.depth(0)
            out[n, 0], out[n, 1], out[n, 2] = hbt.current_timestamp, depth.best_bid, depth.best_ask
            n += 1
        return n

    def rest(hbt: Any, price: Any) -> Any:
        hbt.elapse(60_000_000_000)
        hbt.submit_buy_order(0, 1, price, ORDER_QTY, GTC, LIMIT, False)
        while hbt.elapse(1_000_000_000) == 0:
            pass
        return hbt.position(0)

    days = sidecar["files"]
    rows = sum(day["rows"] for day in days)
    tops: list[Top] = []
    for number, day in enumerate(days):
        out = np.full((rows + 1, 3), np.nan)
        before = days[number - 1]["end_of_day"] if number else None
        # The times do not fit a float: they are counted from the first.
        hbt = backtest([day], before)
        n = njit(feed)(hbt, out)
        tops += [[ns_to_us(at), *(known(px) for px in row)] for at, *row in out[:n].tolist()]
    lowest = min(top[1] for top in tops if top[1] is not None)
    position = njit(rest)(backtest(days, None), lowest)
    return {"tops": tops, "position": position}


def ns_to_us(ns: float) -> int:
    return round(ns / 1000)


def known(price: float) -> float | None:
    return None if math.isnan(price) else round(price, 4)


def nautilus(folder: Path, ticker: str, archive: str, start: int, end: int) -> dict[str, Any]:
    """Write a catalog, read it back, apply every delta to the engine's book, and run its backtest."""
    from nautilus_trader.model.book import OrderBook
    from nautilus_trader.model.enums import BookType, RecordFlag
    from nautilus_trader.persistence.catalog import ParquetDataCatalog

    from kalshi_platform.reading.exporters.nautilus import export

    begin, until = (EPOCH + timedelta(microseconds=us) for us in (start, end))
    written = export(Archive(archive), ticker, begin, until, folder)
    catalog = ParquetDataCatalog(str(folder))
    (instrument,) = catalog.instruments()
    deltas = catalog.order_book_deltas(instrument_ids=[written.instrument_id])
    book = OrderBook(instrument.id, BookType.L2_MBP)
    tops: list[Top] = []
    for delta in deltas:
        book.apply_delta(delta)
        if delta.flags & int(RecordFlag.F_LAST):
            best = (book.best_bid_price(), book.best_ask_price())
            prices = [None if price is None else round(float(price), 4) for price in best]
            tops.append([delta.ts_init // 1000, *prices])
    return {
        "tops": tops,
        "instrument": instrument.to_dict(instrument),
        "trades": len(catalog.trade_ticks(instrument_ids=[written.instrument_id])),
        "status": [str(one.action) for one in catalog.instrument_status()],
        "close": [str(one.close_price) for one in catalog.instrument_closes()],
        **backtest(catalog, instrument, deltas),
    }


def backtest(catalog: Any, instrument: Any, deltas: Any) -> dict[str, Any]:
    """Rest one order at the best bid of the first snapshot until the market's end."""
    from nautilus_trader.backtest.engine import BacktestEngine, BacktestEngineConfig
    from nautilus_trader.config import LoggingConfig
    from nautilus_trader.model.book import OrderBook
    from nautilus_trader.model.currencies import USD
    from nautilus_trader.model.enums import AccountType, BookType, OmsType, OrderSide
    from nautilus_trader.model.objects import Money
    from nautilus_trader.trading.strategy import Strategy

    from kalshi_platform.reading.exporters.nautilus import VENUE, KalshiFeeModel

    class Resting(Strategy):  # type: ignore[misc]
        def on_start(self) -> None:
            self.subscribe_order_book_deltas(instrument.id, BookType.L2_MBP)
            self.sent = False
            self.book = OrderBook(instrument.id, BookType.L2_MBP)

        def on_order_book_deltas(self, deltas: Any) -> None:
            self.book.apply_deltas(deltas)
            bid = self.book.best_bid_price()
            if not self.sent and bid is not None:
                self.sent = True
                qty = instrument.make_qty(ORDER_QTY)
                order = self.order_factory.limit(instrument.id, OrderSide.BUY, qty, bid)
                self.submit_order(order)

    engine = BacktestEngine(BacktestEngineConfig(logging=LoggingConfig(bypass_logging=True)))
    engine.add_venue(
        venue=VENUE,
        oms_type=OmsType.NETTING,
        account_type=AccountType.CASH,
        starting_balances=[Money(1_000, USD)],
        book_type=BookType.L2_MBP,
        fee_model=KalshiFeeModel("quadratic_with_maker_fees", Decimal(1)),
    )
    engine.add_instrument(instrument)
    engine.add_data(deltas)
    engine.add_data(catalog.trade_ticks(instrument_ids=[str(instrument.id)]))
    engine.add_strategy(Resting())
    engine.run()
    orders = engine.cache.orders()
    account = engine.cache.account_for_venue(VENUE)
    return {
        "orders": [(str(one.status_string()), str(one.filled_qty)) for one in orders],
        "balance": str(account.balance_total(USD)),
        "fees": [str(money) for one in orders for money in one.commissions()],
    }


def main() -> None:
    """Run the engine that the arguments name."""
    engine, folder, ticker, *more = sys.argv[1:]
    if engine == "hftbacktest":
        result = hftbacktest(Path(folder), ticker)
    else:
        result = nautilus(Path(folder), ticker, more[0], int(more[1]), int(more[2]))
    json.dump(result, sys.stdout, default=str)


if __name__ == "__main__":
    main()

"""How long a decision call takes, with the spool running and ClickHouse unreachable."""

from __future__ import annotations

import statistics
import tempfile
import time
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

from kalshi_platform import settings as platform_settings
from kalshi_platform.engine import (
    Contract,
    Quote,
    Quoted,
    Reconciled,
    Recorder,
    WorkingOrder,
    inventory,
)
from kalshi_platform_tests.benchmarks.figures import Figure, number

NOWHERE = "http://127.0.0.1:9"
DECISIONS = 20_000


def figure() -> Figure:
    """The median of the decisions, inventory and quote included."""
    held = Reconciled.from_exchange("T", "-3.50", datetime.now(UTC))
    live = [
        WorkingOrder(name, Contract.YES, quote, Decimal("2.25"))
        for name, quote in (("o", Quote.BID), ("p", Quote.ASK))
    ]
    settings = platform_settings.load(_env_file=None, clickhouse_url=NOWHERE)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        recorder = Recorder("bench", "1", settings=settings, spool=Path(folder) / "spool")
        took = []
        for _ in range(DECISIONS):
            began = time.perf_counter_ns()
            recorder.decision(
                inventory(held, live),
                Quoted(
                    *(0.44, 0.46, 0.45, 0.44, 0.46, 5.0, 5.0), params={"most": 40, "size": "5.00"}
                ),
                reason_codes=["joined"],
            )
            took.append((time.perf_counter_ns() - began) / 1000)
        recorder.close(0.0)
    beside = f"p99 {number(statistics.quantiles(took, n=100)[-1])} µs"
    return Figure(
        "a decision of an engine, recorded",
        statistics.median(took),
        "µs",
        at_most=50.0,
        beside=beside,
    )

"""The paper market maker: an hour of it is healthy, and each way to misbehave turns its check red."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import pyarrow as pa
import pytest

from kalshi_platform.clickhouse.client import insert_arrow
from kalshi_platform.errors import SettingsError
from kalshi_platform.inventory import audit, breaks
from kalshi_platform.inventory.audit import Parameters, Status
from kalshi_platform.inventory.kinds import Kind
from kalshi_platform.inventory.recorder import Recorder
from kalshi_platform.inventory.rows import TABLES
from kalshi_platform.inventory.semantics import OrderStatus
from kalshi_platform.simulator import orders
from kalshi_platform.simulator.exchange import Exchange
from kalshi_platform.simulator.orders import Account, Answered, Request
from kalshi_platform.simulator.paper import (
    Misbehaviour,
    PaperMarketMaker,
    SimulatorGateway,
    Tampering,
)
from kalshi_platform.simulator.server import Simulator
from kalshi_platform_tests.inventory.conftest import Run
from kalshi_platform_tests.inventory.planted import Planted

SECOND = 1_000_000_000


class Replay:
    """A simulated exchange and an engine on it, on a clock of their own that ends now."""

    def __init__(self, seconds: int, *, rate: float, seed: int = 1) -> None:
        self.now_ns = time.time_ns() - seconds * SECOND
        self.end_ns = self.now_ns + seconds * SECOND
        self.rows: dict[str, list[Mapping[str, Any]]] = {name: [] for name in TABLES}
        self.frozen = False
        self.exchange = Exchange(
            markets=5,
            rate=rate,
            seed=seed,
            now_ns=self.now_ns,
            rolling_markets=0,
            rolling_seconds=300,
        )

    def put(self, table: str, row: Mapping[str, Any]) -> None:
        self.rows[table].append(row)

    def account(self, after_fill: int, tickers: Sequence[str], busiest: int) -> Account:
        self.pass_by(3_000_000)
        return orders.account(
            self.exchange, after_fill=after_fill, tickers=tickers, busiest=busiest
        )

    def send(self, requests: Sequence[Request]) -> list[Answered]:
        self.pass_by(2_000_000)
        answers = orders.execute(self.exchange, requests, self.now_ns)
        self.pass_by(2_000_000)
        return answers

    def freeze(self, frozen: bool) -> None:
        self.frozen = frozen

    def pass_by(self, ns: int) -> None:
        self.now_ns += ns
        self.exchange.advance(self.now_ns)

    def run(
        self, fault: Misbehaviour | None = None, interval_ns: int = 500_000_000
    ) -> PaperMarketMaker:
        recorder = Recorder(
            "paper-test",
            "test",
            sink=self if fault is None else Tampering(self, fault),
            clock_ns=lambda: self.now_ns,
        )
        maker = PaperMarketMaker(
            self,
            recorder,
            markets=5,
            missed_fills=fault is Misbehaviour.MISSED_FILL,
            clock_ns=lambda: self.now_ns,
        )
        maker.begin()
        while self.now_ns < self.end_ns:
            self.pass_by(interval_ns)
            maker.loop()
        maker.end()
        return maker

    def keep(self, planted: Planted) -> None:
        for name, rows in self.rows.items():
            table = pa.Table.from_pylist(rows, schema=TABLES[name].arrow)
            insert_arrow(planted.client, name, table, f"replay {name}")


def test_an_hour_of_the_healthy_market_maker_has_no_anomaly(planted: Planted) -> None:
    replay = Replay(3600, rate=10.0)
    maker = replay.run()
    replay.keep(planted)
    assert maker.decisions > 30_000
    assert maker.fills > 100
    statuses = {row["status"] for row in replay.rows["mm_order_responses"]}
    assert statuses >= {"resting", "partially_filled", "executed"}
    assert statuses <= {status.value for status in OrderStatus}
    for outcome in audit.sweep(planted.client, audit.CHECKS, Parameters()):
        assert outcome.status is Status.CLEAR, (outcome.check.name, outcome.rows[:3])
    assert breaks.update(planted.client, audit.CHECKS, Parameters()) == []


@pytest.mark.parametrize(
    ("fault", "check", "kind"),
    [
        (Misbehaviour.ROLLED, audit.ROLLED, Kind.ROLLED),
        (Misbehaviour.PHANTOM, audit.EXPOSURE, Kind.UNKNOWN_ORDER),
        (Misbehaviour.MISSED_FILL, audit.DIVERGENCE, Kind.MISSING_FILL),
        (Misbehaviour.NO_ACTIONS, audit.DRIFT, Kind.UNKNOWN_ORDER),
        (Misbehaviour.STALE, audit.FRESH, Kind.STALE_SNAPSHOT),
    ],
)
def test_each_misbehaviour_turns_its_check_red_and_is_named(
    planted: Planted, fault: Misbehaviour, check: audit.Check, kind: str
) -> None:
    replay = Replay(900, rate=20.0)
    replay.run(fault, interval_ns=2 * SECOND)
    replay.keep(planted)
    red = {
        outcome.check.name
        for outcome in audit.sweep(planted.client, audit.CHECKS, Parameters())
        if outcome.status is Status.ANOMALIES
    }
    assert check.name in red
    found = breaks.examine(planted.client, [check], Parameters())
    assert kind in {each.kind for each in found}, [each.explanation for each in found]


def test_it_takes_no_url_and_refuses_to_run_beside_a_real_key(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not [word for word in run("paper-mm", "--help").output.split() if "url" in word.lower()]
    with SimulatorGateway(1) as gateway:
        assert str(gateway.where).startswith("http://127.0.0.1:1/simulator")
    monkeypatch.setenv("PROD_KEYID", "a-key")
    monkeypatch.setenv("PROD_KEYFILE", "key.pem")
    result = run("paper-mm")
    assert result.exit_code == 1
    assert isinstance(result.exception, SettingsError)
    assert "PROD_KEYID is set" in str(result.exception)


def test_the_real_pages_of_an_exchange_do_not_take_its_orders(simulator: Simulator) -> None:
    orders_page = f"{simulator.rest_url}/portfolio/orders"
    assert httpx.post(orders_page, json=[], trust_env=False, timeout=60).status_code in {404, 405}
    assert (
        httpx.post(f"{simulator.rest_url}/simulator/orders", json=[], timeout=60).status_code == 404
    )

"""`paper-mm`: run a paper market maker in the foreground, against the simulator only."""

from __future__ import annotations

import signal
import threading
import time
import uuid

import click

from kalshi_platform import settings as platform_settings
from kalshi_platform.errors import SettingsError
from kalshi_platform.inventory.recorder import Recorder
from kalshi_platform.inventory.spool import Spool, folder_of
from kalshi_platform.simulator.paper import (
    ENGINE_VERSION,
    Misbehaviour,
    PaperError,
    PaperMarketMaker,
    SimulatorGateway,
    Tampering,
)

PATIENCE_S = 30.0
"""Seconds to wait for the simulator at the start."""
STATUS_S = 60.0
"""Seconds between two status lines."""
END_S = 1.5
"""Seconds to wait for ClickHouse at the end; rows that it has not accepted stay in the spool."""


@click.command("paper-mm")
@click.option(
    "--port",
    type=click.IntRange(1, 65_535),
    help="Port of the simulator.  [default: SIMULATOR_PORT]",
)
@click.option("--markets", default=5, show_default=True, type=click.IntRange(1, 100))
@click.option(
    "--interval",
    default=0.5,
    show_default=True,
    type=click.FloatRange(min=0.05),
    help="Seconds between two decisions of a market.",
)
@click.option(
    "--misbehave",
    type=click.Choice([kind.value for kind in Misbehaviour]),
    help="Make one deliberate mistake, for the checks to find.",
)
@click.option("--seconds", type=click.FloatRange(min=0.1), help="Stop after this many seconds.")
def command(
    *, port: int | None, markets: int, interval: float, misbehave: str | None, seconds: float | None
) -> None:
    """Quote the simulator's markets, get filled, and record every decision in the mm_* tables.

    It connects to the simulator on this machine only. Ctrl-C cancels its orders and ends it.
    """
    settings = platform_settings.current()
    if settings.has_key:
        raise SettingsError(
            "PROD_KEYID is set: paper decisions do not belong beside those of a real market maker."
            " Unset PROD_KEYID and PROD_KEYFILE."
        )
    if not settings.use_clickhouse:
        raise SettingsError("USE_CLICKHOUSE is 0: the market maker's tables are in ClickHouse.")
    fault = Misbehaviour(misbehave) if misbehave else None
    gateway = SimulatorGateway(port if port is not None else settings.simulator_port)
    spool = Spool(folder_of(settings), settings)
    recorder = Recorder(
        f"paper-{uuid.uuid4().hex[:8]}",
        ENGINE_VERSION,
        sink=spool if fault is None else Tampering(spool, fault),
    )
    maker = PaperMarketMaker(
        gateway, recorder, markets=markets, missed_fills=fault is Misbehaviour.MISSED_FILL
    )
    ending = threading.Event()
    former = {
        number: signal.signal(number, lambda *_: ending.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        _begin(maker, ending)
        gateway.freeze(fault is Misbehaviour.STALE)
        click.echo(f"Quoting {markets} SIMULATED markets.")
        _run(gateway, maker, spool, ending=ending, interval=interval, seconds=seconds)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        left = spool.close(END_S)
        gateway.close()
    click.echo(
        f"Ended: {maker.decisions} decisions, {maker.fills} fills"
        + (f"; {left} files wait for ClickHouse in the spool." if left else ".")
    )


def _begin(maker: PaperMarketMaker, ending: threading.Event) -> None:
    """Start the market maker; waits for the simulator up to PATIENCE_S."""
    patient_until = time.monotonic() + PATIENCE_S
    while True:
        try:
            maker.begin()
        except PaperError:
            if ending.wait(0.5):
                return
            if time.monotonic() > patient_until:
                raise
        else:
            return


def _run(
    gateway: SimulatorGateway,
    maker: PaperMarketMaker,
    spool: Spool,
    *,
    ending: threading.Event,
    interval: float,
    seconds: float | None,
) -> None:
    """Decide at the interval until a signal or the time limit, then cancel all orders."""
    begun = reported_at = time.monotonic()
    while not ending.wait(interval):
        try:
            maker.loop()
        except PaperError as error:
            click.echo(f"{error} Waiting for it.")
            _begin(maker, ending)
        now = time.monotonic()
        if now - reported_at >= STATUS_S:
            reported_at = now
            trouble = f" {spool.trouble}" if spool.trouble else ""
            click.echo(f"{maker.decisions} decisions, {maker.fills} fills.{trouble}")
        if seconds is not None and now - begun >= seconds:
            break
    try:
        maker.end()
        gateway.freeze(False)
    except PaperError as error:
        click.echo(f"Its orders remain in the simulator: {error}", err=True)

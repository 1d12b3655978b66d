"""`simulate`: run the exchange simulator in the foreground."""

from __future__ import annotations

from pathlib import Path

import click

from kalshi_platform import settings
from kalshi_platform.simulator.wire import CURRENT, Wire


@click.command("simulate")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65_535), help="0: any free one.  [default: SIMULATOR_PORT]"
)
@click.option("--markets", type=click.IntRange(min=1), help="[default: SIMULATOR_MARKETS]")
@click.option(
    "--rate",
    type=click.FloatRange(min=0),
    help="Order-book deltas a second, over all markets.  [default: SIMULATOR_RATE]",
)
@click.option("--seed", default=1, show_default=True, help="Same seed, same order flow.")
@click.option(
    "--rolling-markets",
    type=click.IntRange(min=0),
    help="Markets that open and close all the time.  [default: one in eight]",
)
@click.option(
    "--rolling-seconds",
    default=300.0,
    show_default=True,
    type=click.FloatRange(min=1),
    help="Lifetime of a rolling market.",
)
@click.option(
    "--fault",
    "faults",
    multiple=True,
    metavar="NAME[:ARG][@SECONDS]",
    help="Inject a fault, e.g. gap:3@10. Repeatable; docs/simulator.md lists them.",
)
@click.option(
    "--replay",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Send the recorded frames of FILE (.jsonl or .jsonl.gz) instead.",
)
@click.option(
    "--replay-speed",
    type=click.FloatRange(min=0, min_open=True),
    metavar="X",
    help="1: as recorded, 10: ten times as fast.  [default: as fast as the client reads]",
)
@click.option(
    "--wire",
    type=click.Choice([known.value for known in Wire]),
    default=CURRENT.value,
    show_default=True,
    help="Form of the messages; 2026-08: no clock, no sending_ts_ms, microseconds.",
)
def command(
    *,
    host: str,
    port: int | None,
    markets: int | None,
    rate: float | None,
    seed: int,
    rolling_markets: int | None,
    rolling_seconds: float,
    faults: tuple[str, ...],
    replay: Path | None,
    replay_speed: float | None,
    wire: str,
) -> None:
    """Run the exchange simulator in the foreground. Ctrl-C ends it."""
    from kalshi_platform.simulator.config import SimulatorConfig
    from kalshi_platform.simulator.faults import Fault
    from kalshi_platform.simulator.server import Simulator

    current = settings.current()
    simulator = Simulator(
        SimulatorConfig(
            host=host,
            port=current.simulator_port if port is None else port,
            markets=markets or current.simulator_markets,
            rate=current.simulator_rate if rate is None else rate,
            seed=seed,
            rolling_markets=rolling_markets,
            rolling_seconds=rolling_seconds,
            # not `current.exchange.key_file`, which is the real key if one is configured
            key_file=current.data_dir / "simulator" / "key.pem",
            faults=tuple(Fault.parse(text) for text in faults),
            replay=replay,
            replay_speed=replay_speed,
            wire=Wire(wire),
        )
    )

    def ready() -> None:
        click.echo(f"WebSocket  {simulator.ws_url}")
        click.echo(f"REST       {simulator.rest_url}")
        click.echo(f"Control    {simulator.control_url}/state")
        click.echo(f"Key id     {simulator.key_id}")
        click.echo(f"Key file   {simulator.key_file}")

    simulator.serve_forever(ready)

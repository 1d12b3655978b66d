"""How much the platform writes a day: `python -m kalshi_platform_tests.benchmarks.growth --minutes 10`.

Runs all of it (`up`) on an empty folder for some minutes against the simulator, and scales what was written
to a day. Simulated order flow is not the exchange's, an hour that was not sealed is not compacted, and ten
minutes have two runs of what runs every five: orders of magnitude, not promises. On a machine that records
already, `kalshi-platform doctor` says the real rates.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import click

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import queries
from kalshi_platform.clickhouse.client import connect, translated
from kalshi_platform.clickhouse.hot_retention import RETAINED
from kalshi_platform.health import health_report
from kalshi_platform.health.metrics import folder_bytes
from kalshi_platform.settings import Settings

DAY_S = 86_400.0
START_S = 600.0


@dataclass(frozen=True)
class Written:
    """Sizes at an instant."""

    at: float
    events: int
    bytes: dict[str, int]


@click.command()
@click.option("--minutes", default=10.0, show_default=True, type=click.FloatRange(min=1))
@click.option("--rate", default=200.0, show_default=True, help="Order-book deltas a second.")
@click.option("--markets", default=40, show_default=True, help="Simulated markets.")
def main(minutes: float, rate: float, markets: int) -> None:
    """Run the platform for some minutes and print what it writes a day."""
    with tempfile.TemporaryDirectory(prefix="kalshi-growth-") as folder:
        ui, clickhouse, simulator = (_free_port() for _ in range(3))
        chosen = {
            "KALSHI_DATA_DIR": folder,
            "EMBEDDED_CLICKHOUSE_PORT": str(clickhouse),
            "SIMULATOR_PORT": str(simulator),
            "SIMULATOR_RATE": str(rate),
            "SIMULATOR_MARKETS": str(markets),
        }
        settings = platform_settings.load(
            _env_file=None, **{k.lower(): v for k, v in chosen.items()}
        )
        argv = [sys.executable, "-m", "kalshi_platform", "up", "--port", str(ui)]
        log = Path(folder) / "up.log"
        with log.open("wb") as output:
            platform = subprocess.Popen(
                argv, env={**os.environ, **chosen}, stdout=output, stderr=output, cwd=folder
            )
        try:
            _wait_for_frames(settings, platform, log)
            before = _written(settings)
            time.sleep(minutes * 60)
            after = _written(settings)
        finally:
            platform.send_signal(signal.SIGINT)
            platform.wait(60)
    _report(before, after)


def _wait_for_frames(settings: Settings, platform: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until it has recorded for half a minute, so that the start is not counted."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and platform.poll() is None:
        try:
            health = health_report.read(settings.journal_dir(0)) or {}
        except (OSError, ValueError):
            health = {}
        if health.get("frames"):
            time.sleep(30)
            return
        time.sleep(1)
    raise click.ClickException(f"Nothing was recorded. It said:\n{log.read_text()[-2000:]}")


def _written(settings: Settings) -> Written:
    with closing(connect(settings)) as client, translated(settings):
        events = client.command("SELECT count() FROM orderbook_events")
        rows = client.query(
            queries.text("growth/hot_tables"), parameters={"tables": list(RETAINED)}
        ).result_rows
    return Written(
        time.time(),
        int(str(events)),
        {
            "journal": folder_bytes(settings.journal_dir(0).parent),
            "ClickHouse, hot tables": sum(int(row[1]) for row in rows),
            "Parquet, not compacted": folder_bytes(settings.archive_dir),
            "Dagster": folder_bytes(settings.data_dir / "dagster"),
            "logs": folder_bytes(settings.data_dir / "logs"),
        },
    )


def _report(before: Written, after: Written) -> None:
    seconds = after.at - before.at
    events = after.events - before.events
    click.echo(
        f"{seconds / 60:.1f} minutes, {events:,} rows, {events / seconds:,.0f} rows a second"
    )
    for what, size in after.bytes.items():
        grown = size - before.bytes[what]
        day = grown / seconds * DAY_S
        click.echo(
            f"{what:<24} {grown / 1e6:9.2f} MB  {grown / max(events, 1):8.1f} bytes a row"
            f"  {day / 1e9:8.3f} GB a day"
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()

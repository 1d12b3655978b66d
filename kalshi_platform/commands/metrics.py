"""`metrics`: serve the Prometheus endpoint in the foreground."""

from __future__ import annotations

import signal
import threading

import click

from kalshi_platform import settings as platform_settings
from kalshi_platform.health.metrics import serve


@click.command()
@click.option("--host", help="Address to listen on  [default: METRICS_HOST, 127.0.0.1]")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    help="Port  [default: METRICS_PORT, else 9464; 0 takes a free one]",
)
def command(host: str | None, port: int | None) -> None:
    """Serve metrics of every shard to Prometheus, until Ctrl-C. Reads files; writes nothing.

    `up` starts it by itself if METRICS_PORT is set.
    """
    settings = platform_settings.load()
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    host = host or settings.metrics_host
    wanted = port if port is not None else settings.metrics_port or 9464
    thread, server = serve(settings, host, wanted)
    shown = f"[{host}]" if ":" in host else host
    click.echo(f"Metrics of {settings.data_dir} are at http://{shown}:{server.server_port}/metrics")
    stopping.wait()
    server.shutdown()
    server.server_close()
    thread.join(timeout=2.0)

"""The console script `kalshi-platform`: finds the command and prints a `PlatformError` as one line.

A command's module is imported when it is called, so that `sql` does not wait for Dagster to import.
"""

from __future__ import annotations

import importlib
import logging
import sys
from contextlib import suppress

import click

from kalshi_platform import __version__, allocators, logs, processes
from kalshi_platform import settings as platform_settings
from kalshi_platform.errors import PlatformError, SettingsError
from kalshi_platform.printable import printable

COMMANDS = {
    "up": "Everything: ClickHouse, migrations, the Dagster UI and the streamer.",
    "stream": "Capture and load in the foreground, without Dagster.",
    "watch": "Show the live feed of a few markets; nothing is stored.",
    "migrate": "Bring the ClickHouse schema up to date.",
    "sql": "Run SQL and print a table.",
    "qa": "Check the market maker's inventory against the exchange's.",
    "compact": "Make each sealed hour of the archive one sorted file.",
    "proof": "Compare journal, ClickHouse and Parquet, number by number.",
    "restore": "Load the archive's hours back into ClickHouse.",
    "adopt": "Make this data folder a recorder of its own, with a new identity.",
    "export": "Hours of the archive for publication, or markets for a backtesting engine.",
    "clickhouse": "The embedded ClickHouse in the foreground.",
    "simulate": "The exchange simulator in the foreground.",
    "metrics": "Serve metrics of every shard to Prometheus.",
    "paper-mm": "A market maker on paper, for the simulator only.",
    "doctor": "Check everything: settings, exchange, ClickHouse, disk, streamer, Dagster, alerts.",
}
SERVICES = frozenset({"up", "stream", "clickhouse", "simulate", "metrics", "paper-mm"})
"""Commands that run until they are stopped, and log. The others print an answer and exit."""


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"kalshi_platform.commands.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kalshi-platform")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Record Kalshi's order books without loss, and query them."""
    with suppress(SettingsError):  # the command itself reports it
        settings = platform_settings.current()
        if settings.log_format == "json" or ctx.invoked_subcommand in SERVICES:
            logs.configure(settings)


def run() -> None:
    """Run the command line; a `PlatformError` exits 1 with one line on stderr."""
    streams = sys.argv[1:2] == ["stream"]
    if streams:
        allocators.return_freed_memory()
    status = _status()
    if streams:
        processes.exit_now(status)
    sys.exit(status)


def _status() -> int | str | None:
    try:
        main()
    except PlatformError as error:
        if _in_json():
            logging.getLogger(logs.PLATFORM).error("%s", error)
        else:
            click.echo(printable(f"Error: {error}"), err=True)
        return 1
    except SystemExit as ended:  # click always ends by raising it
        return ended.code
    return 0


def _in_json() -> bool:
    try:
        return platform_settings.current().log_format == "json"
    except SettingsError:
        return False

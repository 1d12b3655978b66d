"""The console script: finds the command, and turns what a person can mend into one line.

Commands are loaded when they are called, so that `sql` does not wait for Dagster to import.
"""

from __future__ import annotations

import importlib
import sys

import click

from kalshi_platform import __version__
from kalshi_platform.errors import PlatformError
from kalshi_platform.printable import printable

COMMANDS = {
    "up": "Everything: ClickHouse, migrations, the Dagster UI and the streamer.",
    "stream": "Capture and load in the foreground, without Dagster.",
    "watch": "The live wire of one market; nothing is written.",
    "migrate": "Bring the ClickHouse schema up to date.",
    "sql": "Run SQL and print a table.",
    "qa": "The market maker's inventory: does it hold what it believes to hold?",
    "compact": "Make each sealed hour of the archive one sorted file.",
    "restore": "Bring the archive's hours back into ClickHouse.",
    "export": "Hours of the archive for publication, without what is your own.",
    "clickhouse": "The embedded ClickHouse in the foreground.",
    "simulate": "The exchange simulator in the foreground.",
    "paper-mm": "A market maker on paper, for the simulator only.",
    "doctor": "Check settings, key, clock, exchange, ClickHouse, disk and schema.",
}


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
def main() -> None:
    """Record the Kalshi order book without loss, and ask it anything."""


def run() -> None:
    """Run the command line; exits 1 with one line on stderr for what the user can mend."""
    try:
        main()
    except PlatformError as error:
        click.echo(printable(f"Error: {error}"), err=True)
        sys.exit(1)

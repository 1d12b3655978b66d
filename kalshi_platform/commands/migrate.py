"""`migrate`: bring the ClickHouse schema up to date, or say how it stands."""

from __future__ import annotations

import click

from kalshi_platform import settings as platform_settings
from kalshi_platform.storage import migrations
from kalshi_platform.storage.clickhouse import connect
from kalshi_platform.storage.migrations import State


@click.command()
@click.option("--status", is_flag=True, help="Say how each migration stands; change nothing.")
def command(*, status: bool) -> None:
    """Create the database where it is missing and apply the pending migrations, in order.

    It may run as often as you like, from any folder.
    """
    settings = platform_settings.current()
    if not status:
        for migration in migrations.migrate(settings):
            click.echo(f"applied {migration}")
    client = connect(settings)
    try:
        stand = migrations.standing(client)
    finally:
        client.close()
    if status:
        for one in stand:
            when = f"  {one.applied_at:%Y-%m-%d %H:%M:%S} UTC" if one.applied_at else ""
            click.echo(f"{one}  {one.state.value}{when}")
        return
    for one in stand:
        if one.state is State.UNKNOWN:
            click.echo(f"note: {one} was {one.state.value} of the platform", err=True)
    click.echo(
        f"{settings.clickhouse_database} is up to date:"
        f" {sum(one.state is State.APPLIED for one in stand)} migrations,"
        f" {settings.hot_retention_days} days kept"
    )

"""`migrate`: bring the ClickHouse schema up to date, or say how it stands."""

from __future__ import annotations

from contextlib import closing

import click

from kalshi_platform import settings as platform_settings
from kalshi_platform.clickhouse import hot_retention, migrations
from kalshi_platform.clickhouse.client import Client, connect
from kalshi_platform.clickhouse.migrations import State
from kalshi_platform.settings import Settings


@click.command()
@click.option(
    "--status",
    is_flag=True,
    help="Say how each migration stands and what HOT_RETENTION_DAYS would delete; change nothing.",
)
@click.option(
    "--apply-retention",
    is_flag=True,
    help="Make HOT_RETENTION_DAYS the tables' retention also where it is not set and only the default.",
)
@click.option(
    "--accept-changed",
    is_flag=True,
    help="Take a migration that has changed since it was applied, where the tables are as expected.",
)
def command(*, status: bool, apply_retention: bool, accept_changed: bool) -> None:
    """Create the database where it is missing and apply the pending migrations, in order.

    It may run as often as you like. Tables and views of our names that are not the platform's are
    refused before anything is changed. A retention that is there is shortened only where
    HOT_RETENTION_DAYS is set, or with --apply-retention; what that deletes is said first.
    """
    if status and (apply_retention or accept_changed):
        raise click.UsageError("Give --status alone: it changes nothing.")
    settings = platform_settings.current()
    if not status:
        for migration in migrations.migrate(
            settings,
            apply_retention=apply_retention,
            accept_changed=accept_changed,
            tell=click.echo,
        ):
            click.echo(f"applied {migration}")
    with closing(connect(settings, log_comment="migrate")) as client:
        if status:
            _status(client, settings)
            return
        stand = migrations.standing(client)
        kept = hot_retention.in_words(hot_retention.kept(client).values())
    for one in stand:
        if one.state is State.UNKNOWN:
            click.echo(f"note: {one} was {one.state.value} of the platform", err=True)
    applied = sum(one.state is State.APPLIED for one in stand)
    click.echo(f"{settings.clickhouse_database} is up to date: {applied} migrations, {kept} kept")


def _status(client: Client, settings: Settings) -> None:
    for one in migrations.standing(client):
        when = f"  {one.applied_at:%Y-%m-%d %H:%M:%S} UTC" if one.applied_at else ""
        click.echo(f"{one}  {one.state.value}{when}")
    for name in migrations.missing_tables(client):
        click.echo(f"{name}  missing: kalshi-platform migrate makes it again, empty")
    given = "" if settings.hot_retention_given else " (the default, which shortens nothing)"
    for change in hot_retention.changes(client, settings.hot_retention_days):
        click.echo(f"HOT_RETENTION_DAYS={settings.hot_retention_days}{given}: {change}")

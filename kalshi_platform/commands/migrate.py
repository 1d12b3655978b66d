"""`migrate`: bring the ClickHouse schema up to date, or show its status."""

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
    help="Show each migration's state and what HOT_RETENTION_DAYS would delete; change nothing.",
)
@click.option(
    "--apply-retention",
    is_flag=True,
    help="Apply HOT_RETENTION_DAYS to the tables even if it is not set and has its default.",
)
@click.option(
    "--accept-changed",
    is_flag=True,
    help="Accept a migration that has changed since it was applied, if the tables are as expected.",
)
def command(*, status: bool, apply_retention: bool, accept_changed: bool) -> None:
    """Create the database if it is missing and apply the pending migrations, in order.

    It may run any number of times. Tables and views that have the platform's names but belong to another
    owner are refused before anything is changed. An existing retention is shortened only if
    HOT_RETENTION_DAYS is set, or with --apply-retention; what that deletes is printed first.
    """
    if status and (apply_retention or accept_changed):
        raise click.UsageError("Give --status alone: it changes nothing.")
    settings = platform_settings.current()
    if not status:
        for migration in migrations.migrate(
            settings,
            apply_retention=apply_retention,
            accept_changed=accept_changed,
            notify=click.echo,
        ):
            click.echo(f"applied {migration}")
    with closing(connect(settings, log_comment="migrate")) as client:
        if status:
            _status(client, settings)
            return
        standing = migrations.standing(client)
        kept = hot_retention.in_words(hot_retention.kept(client).values())
    for entry in standing:
        if entry.state is State.UNKNOWN:
            click.echo(f"note: {entry} was {entry.state.value} of the platform", err=True)
    applied = sum(entry.state is State.APPLIED for entry in standing)
    click.echo(f"{settings.clickhouse_database} is up to date: {applied} migrations, {kept} kept")


def _status(client: Client, settings: Settings) -> None:
    for entry in migrations.standing(client):
        when = f"  {entry.applied_at:%Y-%m-%d %H:%M:%S} UTC" if entry.applied_at else ""
        click.echo(f"{entry}  {entry.state.value}{when}")
    for name in migrations.missing_tables(client):
        click.echo(f"{name}  missing: kalshi-platform migrate creates it again, empty")
    given = "" if settings.hot_retention_given else " (the default, which shortens nothing)"
    for change in hot_retention.changes(client, settings.hot_retention_days):
        click.echo(f"HOT_RETENTION_DAYS={settings.hot_retention_days}{given}: {change}")

"""`adopt`: give the journals of this data folder a new identity, so that they belong to a new recorder."""

from __future__ import annotations

import click

from kalshi_platform import settings as platform_settings
from kalshi_platform.errors import SettingsError
from kalshi_platform.loading import adoption


@click.command()
@click.option(
    "--shard",
    type=click.IntRange(0),
    help="Only this shard's journal.  [default: every shard that has a folder]",
)
def command(shard: int | None) -> None:
    """Give this data folder's journals a new identity: it becomes a recorder of its own.

    For a copy of a data folder that is to record beside the original, for a journal that was restored
    or lost, and for one whose identity cannot be proved. Stop the recorder first; every store that it
    loads into must be reachable. Rows that a store has are not loaded again; rows that it lacks are loaded
    after the next start, under the new identity.
    """
    settings = platform_settings.load()
    journals = settings.journals_dir
    found = [k for k in range(settings.stream_shards) if settings.journal_dir(k).is_dir()]
    shards = found if shard is None else [shard]
    if not shards:
        raise SettingsError(
            f"There is no journal in {journals}. Set KALSHI_DATA_DIR to the recorder's folder, or name the"
            " shard whose journal is lost: --shard."
        )
    for number in shards:
        result = adoption.adopt(settings, number)
        places = "; ".join(f"{place} from record {n}" for place, n in result.points.items())
        click.echo(
            f"Shard {number}: journal {result.before or 'without identity'} is journal {result.after} now."
            + (f" It is loaded into {places}." if places else "")
        )

"""`adopt`: make the journals of this data folder those of a recorder of its own."""

from __future__ import annotations

import click

from kalshi_platform import settings as platform_settings
from kalshi_platform.errors import SettingsError
from kalshi_platform.loading import adoption


@click.command()
@click.option(
    "--shard",
    type=click.IntRange(0),
    help="This shard's journal alone.  [default: every shard that has a folder]",
)
def command(shard: int | None) -> None:
    """Make this data folder a recorder of its own: a new journal identity.

    For a copy of a data folder that is to record beside the original, for a journal that was restored
    or lost, and for one whose identity nothing proves. Stop the recorder first; every store that it loads
    into must answer. Rows that a store has are not loaded again, and rows that it lacks are loaded by the
    next start, which goes on with the new identity.
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
    for each in shards:
        done = adoption.adopt(settings, each)
        places = "; ".join(f"{place} from record {n}" for place, n in done.points.items())
        click.echo(
            f"Shard {each}: journal {done.before or 'without identity'} is journal {done.after} now."
            + (f" It is loaded into {places}." if places else "")
        )

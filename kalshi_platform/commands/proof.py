"""`proof`: compare journal, ClickHouse and Parquet, sequence number by sequence number."""

from __future__ import annotations

import sys

import click
import msgspec

from kalshi_platform import settings as platform_settings
from kalshi_platform.archive import archive_at, open_archive
from kalshi_platform.loading.restore import parse_hours
from kalshi_platform.printable import printable
from kalshi_platform.quality.proof import Counts, Proof, SubscriptionProof, prove

EXIT_CODES = {"whole": 0, "not judged": 1, "not whole": 2}
_COLUMNS = (
    ("frames", "frames"),
    ("deltas", "deltas"),
    ("trades", "trades"),
    ("snapshots", "snapshots"),
    ("others", "others"),
    ("missing", "missing"),
    ("unexplained", "unexplained"),
    ("missing levels", "missing_levels"),
    ("doubled", "doubled"),
    ("repeated", "repeated"),
)
_SHOWN = 50


@click.command()
@click.option("--hours", help="2026-11-22-14, or 2026-11-22-14..2026-11-23-02; default: all.")
@click.option(
    "--from", "location", help="The archive, a folder or s3://bucket/prefix  [default: PARQUET_DIR]"
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print everything, with each subscription, as JSON."
)
def command(hours: str | None, location: str | None, *, as_json: bool) -> None:
    """Check that no row is lost or stored twice: compares journal, ClickHouse and Parquet.

    Exit status 0: whole. 2: not whole, and the subscriptions are named. 1: not checked, since something could
    not be read. It may run beside the platform, and changes nothing.
    """
    settings = platform_settings.load()
    span = parse_hours(hours) if hours else None
    archive = archive_at(location) if location else open_archive(settings)
    found = prove(settings, archive, span, _progress)
    _clear()
    if as_json:
        report = {"verdict": found.verdict, **msgspec.to_builtins(found)}
        click.echo(msgspec.json.format(msgspec.json.encode(report), indent=1).decode())
    else:
        _print(found)
    sys.exit(EXIT_CODES[found.verdict])


def _print(found: Proof) -> None:
    """Print the comparison as a table, with the subscriptions that are not whole."""
    for journal in found.journals:
        missing = ", ".join(
            f"{n:,} not in {store}" for store, n in journal.missing_records.items() if n
        )
        click.echo(
            f"shard {journal.shard}: journal records {journal.first_record:,} to {journal.end_record:,} compared"
            + (f"; {missing}" if missing else "")
        )
    places = {"journal": found.journal, **found.stores}
    _table(["", *(title for title, _ in _COLUMNS)], [_row(n, c) for n, c in places.items()])
    offenders = [entry for entry in found.subscriptions if not entry.is_whole]
    for offender in offenders[:_SHOWN]:
        _offender(offender)
    if len(offenders) > _SHOWN:
        click.echo(f"… and {len(offenders) - _SHOWN:,} more; --json has all.")
    for sentence in found.unjudged:
        click.echo(f"note: {printable(sentence)}")
    for sentence in found.failed:
        click.echo(f"could not be read: {printable(sentence)}", err=True)
    whole = len(found.subscriptions) - len(offenders)
    span = f", {found.since} to {found.until}" if found.since else ""
    click.echo(
        f"{found.verdict.capitalize()}: {whole:,} of {len(found.subscriptions):,} subscriptions are whole{span}."
        f"{_advice(found)}"
    )


def _offender(subscription: SubscriptionProof) -> None:
    """Print the faults of a subscription in each store."""
    for store, counts in subscription.stores.items():
        if counts.is_whole:
            continue
        faults = ", ".join(
            f"{n:,} {title}" for title, name in _COLUMNS[5:9] if (n := getattr(counts, name))
        )
        missing = ", ".join(
            str(a) if a == b else f"{a} to {b}" for a, b in subscription.ranges.get(store, [])
        )
        click.echo(
            f"{subscription.conn_id} sid {subscription.sid} ({subscription.first} to {subscription.last}): {store}: {faults}"
            + (f"; lacks {missing}" if missing else "")
        )


def _advice(found: Proof) -> str:
    """The remedy for a store that is not whole."""
    hot, cold = found.stores.get("clickhouse"), found.stores.get("parquet")
    if cold is not None and not cold.is_whole:
        return (
            " Materialise the archive's hours again while the journal has them, then run kalshi-platform"
            " restore."
        )
    if hot is not None and not hot.is_whole:
        return (
            " Run kalshi-platform restore: it inserts what ClickHouse lacks of the archive, and names the hours"
            " that need --replace."
        )
    return ""


def _row(name: str, counts: Counts) -> list[str]:
    judged = name != "journal"
    return [
        name,
        *(
            f"{getattr(counts, field):,}" if judged or number < 5 or field == "repeated" else ""
            for number, (_, field) in enumerate(_COLUMNS)
        ),
    ]


def _table(titles: list[str], rows: list[list[str]]) -> None:
    lines = [titles, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        click.echo("  ".join(cells).rstrip())


def _progress(step: str, done: int, total: int) -> None:
    """Show the progress on a terminal, in one line that is overwritten."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{step}: {done:,} of {total:,}", nl=False, err=True)


def _clear() -> None:
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", nl=False, err=True)

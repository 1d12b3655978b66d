"""What a file for each day would save over one for each hour: `python -m kalshi_platform_tests.benchmarks.day_files`.

A made-up day of 24 hours is compacted hour by hour, and once more as a whole.
"""

from __future__ import annotations

import tempfile
from datetime import timedelta
from pathlib import Path

import click

from kalshi_platform.archive import File, LocalArchive, compaction
from kalshi_platform.schema import ORDERBOOK_EVENTS
from kalshi_platform_tests.benchmarks.analytics import HOUR, synthetic_hour
from kalshi_platform_tests.benchmarks.figures import Figure, show


def figures(events: int = 50_000, markets: int = 50) -> list[Figure]:
    """Bytes an event of hour files and of a day file; `events` and `markets` are those of an hour."""
    midnight = HOUR.replace(hour=0)
    hours = [midnight + timedelta(hours=n) for n in range(24)]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = 0
        parts: list[File] = []
        for number, hour in enumerate(hours):
            synthetic_hour(root, events, markets, seed=number, hour=hour)
            of_hour = LocalArchive(root).files(ORDERBOOK_EVENTS.name, hour)
            _, file = compaction.build(of_hour, ORDERBOOK_EVENTS, _room(root, hour.isoformat()))
            size += file.bytes
            parts += of_hour
        content, whole = compaction.build(parts, ORDERBOOK_EVENTS, _room(root, "day"))
    return [
        Figure("24 hour files", size / content.rows, "bytes an event"),
        Figure("one day file", whole.bytes / content.rows, "bytes an event"),
    ]


def _room(root: Path, name: str) -> Path:
    path = root / "built" / name
    path.mkdir(parents=True)
    return path


@click.command(help=__doc__)
@click.option("--events", default=50_000, show_default=True, help="Of an hour.")
@click.option("--markets", default=50, show_default=True)
def main(events: int, markets: int) -> None:
    """Build both, and compare."""
    show(figures(events, markets))


if __name__ == "__main__":
    main()

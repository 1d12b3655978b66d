"""Which shards are to be supervised: the configured ones, and former ones that are not drained."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import msgspec

from kalshi_platform import typed_json
from kalshi_platform.archive import watermarks
from kalshi_platform.health import health_report


def supervised(journals: Path, configured: int, stores: Collection[str]) -> list[int]:
    """The shards that somebody has to look after: the configured ones, and who is `left_over`."""
    return [*range(configured), *left_over(journals, configured, stores)]


def left_over(journals: Path, configured: int, stores: Collection[str]) -> list[int]:
    """The shards that are no longer configured and have not been drained: a store may lack records."""
    return [
        k
        for k in watermarks.shards(journals)
        if k >= configured and not _ended_whole(journals / f"shard-{k}", stores)
    ]


def _ended_whole(folder: Path, stores: Collection[str]) -> bool:
    """Whether the last streamer of a journal stopped with everything in every store."""
    try:
        said = typed_json.convert(health_report.read(folder), _Stopped)
    except (OSError, ValueError):
        return False
    return said.state == "stopped" and all(
        (store := said.stores.get(name)) is not None and store.lag == 0 for name in stores
    )


class _Lag(msgspec.Struct):
    lag: int


class _Stopped(msgspec.Struct):
    """What is looked at of a streamer's report."""

    state: str
    stores: dict[str, _Lag]

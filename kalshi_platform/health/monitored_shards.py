"""Which shards are supervised: the configured ones, and former ones that are not drained yet.

A shard is drained when its streamer stopped with every record in every store.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import msgspec

from kalshi_platform import typed_json
from kalshi_platform.archive import watermarks
from kalshi_platform.health import health_report


def supervised(journals: Path, configured: int, stores: Collection[str]) -> list[int]:
    """The configured shards and those that `left_over` returns."""
    return [*range(configured), *left_over(journals, configured, stores)]


def left_over(journals: Path, configured: int, stores: Collection[str]) -> list[int]:
    """The shards that are no longer configured but not drained: a store may lack their records."""
    return [
        k
        for k in watermarks.shards(journals)
        if k >= configured and not _drained(journals / f"shard-{k}", stores)
    ]


def _drained(folder: Path, stores: Collection[str]) -> bool:
    """Whether a journal's last streamer stopped with every record in every store."""
    try:
        report = typed_json.convert(health_report.read(folder), _Report)
    except (OSError, ValueError):
        return False
    return report.state == "stopped" and all(
        (store := report.stores.get(name)) is not None and store.lag == 0 for name in stores
    )


class _Lag(msgspec.Struct):
    lag: int


class _Report(msgspec.Struct):
    """The part of a health report that is read here."""

    state: str
    stores: dict[str, _Lag]

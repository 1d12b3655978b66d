"""The files of a local archive, for tests that look at them or harm them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from kalshi_platform.storage.archive import LocalArchive


def paths(root: Path, dataset: str, hour: datetime) -> list[Path]:
    """The Parquet files of an hour, by name."""
    return [Path(file.path) for file in LocalArchive(root).files(dataset, hour)]

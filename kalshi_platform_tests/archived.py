"""The files of a local archive, for tests that read them, damage them, or convert them to an old version."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import msgspec
import pyarrow.parquet as pq

from kalshi_platform.archive import (
    LocalArchive,
    Part,
    batches,
    checksum,
    hours,
    local_file,
    write_durably,
)
from kalshi_platform.schema import DATASETS, LATER

NOT_YET = frozenset(name for group in LATER for name in group)
"""The columns that versions without record numbers did not have."""


def paths(root: Path, dataset: str, hour: datetime) -> list[Path]:
    """The Parquet files of an hour, by name."""
    return [Path(file.path) for file in LocalArchive(root).files(dataset, hour)]


def without_records(root: Path, hour: datetime, parts: int | None = None) -> None:
    """Rewrite an hour, or its first `parts` parts, as versions without record numbers wrote it.

    The manifest is rewritten too: its checksum covers the remaining columns only.
    """
    archive = LocalArchive(root)
    for name in hours.RECORDED:
        total, found = checksum.Content(), []
        for n, path in enumerate(paths(root, name, hour)):
            (table,) = batches(local_file(path), DATASETS[name].arrow)
            if parts is None or n < parts:
                table = table.drop_columns([c for c in table.column_names if c in NOT_YET])
                write_durably(path, [table], table.schema)
                assert not NOT_YET & {*pq.read_schema(path).names}
            total += checksum.content(table)
            found.append(Part(path.name, table.num_rows, path.stat().st_size))
        if (manifest := archive.read_manifest(name, hour)) is not None:
            text = checksum.text(total.total)
            archive.write_manifest(msgspec.structs.replace(manifest, checksum=text, parts=found))

"""The Parquet archive: where an hour is, and how a file gets there whole or not at all.

layout      names and hours
files       one Parquet file, written and read
interface   what an archive does: `Archive`, and an hour's `Manifest`
local       on a local disk
objects     on object storage
troubles    what an object store's errors mean
opening     the archive that the settings name
"""

from kalshi_platform.archive.interface import Archive, Listed, Manifest, Part, Sort
from kalshi_platform.archive.layout import (
    ASIDE,
    FROM_CLICKHOUSE,
    MANIFEST,
    hour_path,
    part_name,
    part_range,
)
from kalshi_platform.archive.local import (
    LocalArchive,
    durably,
    stage_manifest,
    write_durably,
)
from kalshi_platform.archive.object_storage import ObjectArchive
from kalshi_platform.archive.opening import archive_at, open_archive
from kalshi_platform.archive.parquet import (
    File,
    batches,
    local_file,
    rows_of,
    table_of,
)

__all__ = [
    "ASIDE",
    "FROM_CLICKHOUSE",
    "MANIFEST",
    "Archive",
    "File",
    "Listed",
    "LocalArchive",
    "Manifest",
    "ObjectArchive",
    "Part",
    "Sort",
    "archive_at",
    "batches",
    "durably",
    "hour_path",
    "local_file",
    "open_archive",
    "part_name",
    "part_range",
    "rows_of",
    "stage_manifest",
    "table_of",
    "write_durably",
]

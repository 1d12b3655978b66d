"""The Parquet archive: hourly files, each written completely or not at all.

layout                  names and hours
parquet                 one Parquet file, written and read
interface               what an archive does: `Archive`, and an hour's `Manifest`
local                   the archive on a local disk
object_storage          the archive on object storage
object_storage_errors   the meaning of an object store's errors
opening                 the archive that the settings name
watermarks, sealing     which hours are complete, and sealing them
hours, coverage         what an hour holds and how well it is recorded
compaction, export      one sorted file per hour; public copies
row_statistics          number, checksum, markets and time span of rows (`checksum`)
archive_identity        which archive this is
archive_ledger          how far it holds each journal
atomic_swap             two folders exchange their names in one step

What the rows mean belongs in `loading`; replaying them belongs in `analytics.replay`.
"""

from kalshi_platform.archive.interface import Archive, Listed, Manifest, Part, Sort
from kalshi_platform.archive.layout import (
    ASIDE,
    FROM_CLICKHOUSE,
    HOUR_STATES,
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
    RowGroup,
    batches,
    local_file,
    row_group,
    row_groups,
    rows_of,
    table_of,
)

__all__ = [
    "ASIDE",
    "FROM_CLICKHOUSE",
    "HOUR_STATES",
    "MANIFEST",
    "Archive",
    "File",
    "Listed",
    "LocalArchive",
    "Manifest",
    "ObjectArchive",
    "Part",
    "RowGroup",
    "Sort",
    "archive_at",
    "batches",
    "durably",
    "hour_path",
    "local_file",
    "open_archive",
    "part_name",
    "part_range",
    "row_group",
    "row_groups",
    "rows_of",
    "stage_manifest",
    "table_of",
    "write_durably",
]

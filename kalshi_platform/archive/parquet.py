"""One Parquet file of the archive: writing it with the archive's encodings, and reading it.

Names and hours belong in `layout`, durability in `local`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from kalshi_platform.archive.object_storage_errors import object_store_error
from kalshi_platform.errors import StoreError, StoreRefused, StoreUnavailable

ROW_GROUP_ROWS = 262_144
GROUP_BYTES = 64 << 20
"""Row groups are read together up to this size: frames are long."""
_WITHOUT_STATISTICS = {"conn_id", "sid", "market_id", "type", "side", "client_order_id", "frame"}
"""Columns with few distinct values or without a useful order: minimum and maximum help no reader."""
_PART_LEVEL = 3
_FRAME_PART_LEVEL = 1
"""zstd's level for a part, and for the frames of one, which are the most bytes: compaction compresses them again."""
_FRAME_PAGE_BYTES = 64 << 20
"""A page of frames is a row group of them: zstd compresses page by page, and frames resemble each other."""
Add = Callable[[pa.Table], None]
"""Appends a table's rows to a file being written."""
_LOCAL = fs.LocalFileSystem()


@dataclass(frozen=True)
class File:
    """A file of an hour, as it was when listed."""

    path: str
    """Absolute path or URL."""
    bytes: int
    version: str
    """Changes whenever the file is written again."""
    filesystem: fs.FileSystem = field(default_factory=lambda: _LOCAL, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The file name."""
        return self.path.rpartition("/")[2]

    @property
    def key(self) -> str:
        """The path as its file system expects it, without a scheme."""
        return self.path.rpartition("://")[2]


def local_file(path: Path) -> File:
    """Describe a file of a local disk. Raises: `FileNotFoundError`."""
    stat = path.stat()
    return File(str(path), stat.st_size, f"{stat.st_ino}:{stat.st_mtime_ns}")


@contextmanager
def parquet_writer(
    path: Path, schema: pa.Schema, *, level: int = _PART_LEVEL, sorted_by: Sequence[str] = ()
) -> Iterator[Add]:
    """Open a Parquet file for writing table by table.

    `level` is zstd's; `sorted_by` names the columns by which the rows are sorted, for the footer.

    Raises: `OSError` where the disk refuses.
    """
    delta = ["seq", "ts", "ingest_ts", "recv_ts", "record", "clock", "sent_ts"]
    encodings = {n: "DELTA_BINARY_PACKED" for n in delta if n in schema.names}
    levels: int | dict[str, int] = level
    if "frame" in schema.names:
        if level > _PART_LEVEL:
            encodings["frame"] = "DELTA_BYTE_ARRAY"
        levels = dict.fromkeys(schema.names, level if level > _PART_LEVEL else _FRAME_PART_LEVEL)
    names = [f.name for f in schema if pa.types.is_dictionary(f.type)] + [
        *("price", "qty", "size", "yes_price", "no_price")
    ]
    with pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=levels,
        data_page_size=_FRAME_PAGE_BYTES if "frame" in schema.names else None,
        use_dictionary=[n for n in names if n in schema.names],
        column_encoding=encodings,
        store_decimal_as_integer=True,
        write_statistics=[n for n in schema.names if n not in _WITHOUT_STATISTICS],
        sorting_columns=[
            pq.SortingColumn(schema.get_field_index(n), nulls_first=True) for n in sorted_by
        ]
        or None,
        data_page_version="2.0",
        # With a stored Arrow schema, Arrow reads dictionaries and ignores the statistics of their columns.
        store_schema=False,
    ) as writer:
        yield lambda table: writer.write_table(table, row_group_size=ROW_GROUP_ROWS)


def table_of(
    file: File,
    schema: pa.Schema,
    columns: list[str] | None = None,
    tickers: Collection[str] | None = None,
) -> pa.Table:
    """Read a file's rows with the types of `schema`; with `tickers` only those markets, "" for rows of none.

    A nullable column that the file lacks is read as null.

    Raises: `StoreRefused` where the file cannot be read, `StoreUnavailable` where it was removed meanwhile.
    """
    dictionaries = _dictionaries(schema)
    wanted = None
    if tickers is not None:
        # Arrow ignores the statistics of a column that is read as a dictionary.
        dictionaries.remove("market_ticker")
        wanted = pc.field("market_ticker").isin(sorted(tickers))
    try:
        table = pq.read_table(
            file.key,
            columns=columns,
            schema=_readable(schema, dictionaries),
            partitioning=None,
            filters=wanted,
            read_dictionary=dictionaries,
            filesystem=file.filesystem,
        )
        return table.cast(pa.schema([schema.field(name) for name in table.column_names]))
    except (pa.ArrowException, OSError, ValueError) as error:  # a null where none may be
        raise unreadable(file, error) from None


def batches(
    file: File,
    schema: pa.Schema,
    rows: int = ROW_GROUP_ROWS,
    *,
    columns: list[str] | None = None,
) -> Iterator[pa.Table]:
    """Yield a file's rows, at most `rows` at a time. Handles missing columns, and raises, as `table_of` does.

    A column that `schema` lacks is refused, because writing the rows again would drop it. `columns` restricts
    reading to those columns, which must be all of the schema.
    """
    try:
        with (
            file.filesystem.open_input_file(file.key) as source,
            pq.ParquetFile(source, read_dictionary=_dictionaries(schema)) as parquet,
        ):
            for groups in _groups(parquet.metadata, rows):
                for batch in parquet.iter_batches(
                    batch_size=rows, row_groups=groups, columns=columns
                ):
                    yield _conform(pa.Table.from_batches([batch]), file, schema)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, error) from None


def _conform(table: pa.Table, file: File, schema: pa.Schema) -> pa.Table:
    if table.schema.names != schema.names:
        if unknown := sorted({*table.schema.names} - {*schema.names}):
            raise StoreRefused(
                f"{file.path} has the columns {', '.join(unknown)}, which this version does not know: a"
                " later version wrote it. Install that version."
            )
        for field in schema:
            if field.name in table.schema.names:
                continue
            if not field.nullable:
                raise pa.ArrowInvalid(f"the column {field.name} is missing")
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
        table = table.select(schema.names)
    return table.cast(schema)


def _readable(schema: pa.Schema, dictionaries: Sequence[str]) -> pa.Schema:
    """The schema with plain types for dictionary columns that are not in `dictionaries`."""
    return pa.schema(
        [
            f.with_type(f.type.value_type)
            if pa.types.is_dictionary(f.type) and f.name not in dictionaries
            else f
            for f in schema
        ]
    )


def _groups(footer: pq.FileMetaData, rows: int) -> Iterator[list[int]]:
    """Yield sets of row groups with at most `rows` rows and GROUP_BYTES together (or a single group): each set is
    one fetch."""
    groups: list[int] = []
    held, size = 0, 0
    for group in range(footer.num_row_groups):
        more, larger = footer.row_group(group).num_rows, footer.row_group(group).total_byte_size
        if groups and (held + more > rows or size + larger > GROUP_BYTES):
            yield groups
            groups, held, size = [], 0, 0
        groups.append(group)
        held += more
        size += larger
    if groups:
        yield groups


Key = tuple[int, ...]


@dataclass(frozen=True)
class RowGroup:
    """A row group of a file, with bounds of its rows' keys: `low` is at or below each of them, `high` at or above."""

    low: Key
    high: Key
    file: File
    index: int


def row_groups(file: File, keys: Sequence[str]) -> list[RowGroup]:
    """The row groups of a file with the bounds of these columns, from its footer. Raises: as `table_of` does."""
    found = []
    try:
        footer = pq.read_metadata(file.key, filesystem=file.filesystem)
        for index in range(footer.num_row_groups):
            group = footer.row_group(index)
            columns = {group.column(n).path_in_schema: n for n in range(group.num_columns)}
            bounds = [group.column(columns[key]).statistics for key in keys]
            if group.num_rows:
                low, high = tuple(b.min for b in bounds), tuple(b.max for b in bounds)
                found.append(RowGroup(low, high, file, index))
    except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
        raise unreadable(file, error) from None
    return found


def row_group(group: RowGroup, schema: pa.Schema) -> pa.Table:
    """The rows of one row group. Raises: as `table_of` does."""
    file = group.file
    try:
        with (
            file.filesystem.open_input_file(file.key) as source,
            pq.ParquetFile(source, read_dictionary=_dictionaries(schema)) as parquet,
        ):
            return _conform(parquet.read_row_group(group.index), file, schema)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, error) from None


def rows_of(file: File) -> int:
    """The number of rows in a file, from its footer. Raises: as `table_of` does."""
    try:
        return int(pq.read_metadata(file.key, filesystem=file.filesystem).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, error) from None


def _dictionaries(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if pa.types.is_dictionary(field.type)]


def unreadable(file: File, error: Exception) -> StoreError:
    """Translate the error of a file that could not be read."""
    if isinstance(error, OSError) and (trouble := object_store_error(file.path, error)):
        return trouble
    if isinstance(error, FileNotFoundError):
        return StoreUnavailable(
            f"{file.path} was removed while its hour was read: the hour was compacted or rebuilt. Read it again."
        )
    return StoreRefused(
        f"{file.path} cannot be read ({error}). Materialise that hour again: it is rebuilt from the"
        " journal while that is kept, else from ClickHouse."
    )

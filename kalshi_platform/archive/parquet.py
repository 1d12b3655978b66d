"""One Parquet file of the archive: written in the archive's encodings, read wherever it is."""

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
_NOT_LOOKED_FOR = {"conn_id", "sid", "market_id", "type", "side", "client_order_id", "shard"}
"""Columns of one or few values, or of values without an order: their least and greatest help no reader."""
Add = Callable[[pa.Table], None]
"""Puts a table's rows into a file that is being written."""
_LOCAL = fs.LocalFileSystem()


@dataclass(frozen=True)
class File:
    """A file of an hour, as it was when it was listed."""

    path: str
    """For people and for readers: absolute, or a URL."""
    bytes: int
    version: str
    """Another one whenever the file has been written anew."""
    filesystem: fs.FileSystem = field(default_factory=lambda: _LOCAL, repr=False, compare=False)

    @property
    def name(self) -> str:
        """The last piece of the path."""
        return self.path.rpartition("/")[2]

    @property
    def key(self) -> str:
        """The path as its file system wants it."""
        return self.path.rpartition("://")[2]


def local_file(path: Path) -> File:
    """A file of a local disk. Raises `FileNotFoundError`."""
    stat = path.stat()
    return File(str(path), stat.st_size, f"{stat.st_ino}:{stat.st_mtime_ns}")


@contextmanager
def parquet_writer(
    path: Path, schema: pa.Schema, *, level: int = 3, sorted_by: Sequence[str] = ()
) -> Iterator[Add]:
    """A Parquet file that takes table after table; `OSError` where the disk does not take it.

    `level` is zstd's; `sorted_by` names the columns that the rows are sorted by, for the footer.
    """
    delta = ["seq", "ts", "ingest_ts", "record"]
    names = [f.name for f in schema if pa.types.is_dictionary(f.type)] + [
        *("price", "qty", "size", "yes_price", "no_price")
    ]
    with pq.ParquetWriter(
        path,
        schema,
        compression="zstd",
        compression_level=level,
        use_dictionary=[n for n in names if n in schema.names],
        column_encoding={n: "DELTA_BINARY_PACKED" for n in delta if n in schema.names},
        store_decimal_as_integer=True,
        write_statistics=[n for n in schema.names if n not in _NOT_LOOKED_FOR],
        sorting_columns=[
            pq.SortingColumn(schema.get_field_index(n), nulls_first=True) for n in sorted_by
        ]
        or None,
        data_page_version="2.0",
        # Arrow's own schema would name the dictionaries, and for those it ignores the statistics.
        store_schema=False,
    ) as writer:
        yield lambda table: writer.write_table(table, row_group_size=ROW_GROUP_ROWS)


def table_of(
    file: File,
    schema: pa.Schema,
    columns: list[str] | None = None,
    tickers: Collection[str] | None = None,
) -> pa.Table:
    """A file's rows as `schema` has them; with `tickers` of those markets alone, "" for rows of none.

    A column that the file was written without is null where it may be. Raises `StoreRefused` where it cannot be read, `StoreUnavailable` where it went meanwhile.
    """
    dictionaries = _dictionaries(schema)
    wanted = None
    if tickers is not None:
        # Of a column that is read as a dictionary Arrow does not use the statistics.
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
    """A file's rows, at most `rows` at a time. Reads missing columns, and raises, as `table_of` does.

    A column that `schema` does not have is refused, for whoever writes these rows again would drop it;
    `columns` reads only those, and they must be all of the schema.
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
                    yield _conformed(pa.Table.from_batches([batch]), file, schema)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, error) from None


def _conformed(table: pa.Table, file: File, schema: pa.Schema) -> pa.Table:
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
    """The schema with the columns of texts that are not to be read as dictionaries in plain."""
    return pa.schema(
        [
            f.with_type(f.type.value_type)
            if pa.types.is_dictionary(f.type) and f.name not in dictionaries
            else f
            for f in schema
        ]
    )


def _groups(footer: pq.FileMetaData, rows: int) -> Iterator[list[int]]:
    """Row groups of at most `rows` rows together, or one: what is asked for at once is fetched at once."""
    groups: list[int] = []
    held = 0
    for group in range(footer.num_row_groups):
        more = footer.row_group(group).num_rows
        if groups and held + more > rows:
            yield groups
            groups, held = [], 0
        groups.append(group)
        held += more
    if groups:
        yield groups


def rows_of(file: File) -> int:
    """How many rows a file has, by its footer. Raises as `table_of` does."""
    try:
        return int(pq.read_metadata(file.key, filesystem=file.filesystem).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(file, error) from None


def _dictionaries(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema if pa.types.is_dictionary(field.type)]


def unreadable(file: File, error: Exception) -> StoreError:
    """What to say of a file that could not be read."""
    if isinstance(error, OSError) and (trouble := object_store_error(file.path, error)):
        return trouble
    if isinstance(error, FileNotFoundError):
        return StoreUnavailable(
            f"{file.path} went while its hour was read: the hour was compacted or rebuilt. Read it again."
        )
    return StoreRefused(
        f"{file.path} cannot be read ({error}). Materialise that hour again: it is rebuilt from the"
        " journal while that is kept, else from ClickHouse."
    )

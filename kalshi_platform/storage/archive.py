"""The Parquet archive on disk: where an hour is, and how a file gets there whole or not at all.

    <root>/<dataset>/date=YYYY-MM-DD/hour=HH/part-<shard>-<first n>-<end n>.parquet
    <root>/<dataset>/date=YYYY-MM-DD/hour=HH/hour-<digest of the file>.parquet    once compacted
    <root>/<dataset>/date=YYYY-MM-DD/hour=HH/_manifest.json
    <root>/.aside/    hours being built, hours replaced a moment ago, locks: no reader looks there

Files are written under a name that no reader globs, synced, then renamed: a reader sees each row
once, whenever it looks and whatever was killed. Names follow from the journal range alone, so
writing a range again replaces the file with itself. A whole hour is replaced by exchanging its folder
(`replace_hour`). What the rows mean is not known here.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import filelock
import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kalshi_platform.storage import swap
from kalshi_platform.storage.errors import StoreError, StoreRefused, StoreUnavailable
from kalshi_platform.storage.schema import DATASETS

HOUR = timedelta(hours=1)
MANIFEST = "_manifest.json"
ASIDE = ".aside"
GRACE_S = 60.0
"""A replaced hour is kept for so long: whoever was just listing it lists all of it."""
_NOT_LOOKED_FOR = {"conn_id", "market_id", "client_order_id"}
"""Columns of one value, or of values without an order: their least and greatest help no reader."""
ROW_GROUP_ROWS = 262_144
_TRANSIENT = {"ENOSPC", "EDQUOT", "EIO", "EAGAIN", "ETIMEDOUT", "ESTALE"}


class Part(msgspec.Struct, frozen=True):
    """One file of an hour."""

    file: str
    rows: int
    bytes: int


class Manifest(msgspec.Struct, frozen=True):
    """What is known of one dataset's hour. Times are ISO 8601, UTC."""

    dataset: str
    hour: str
    complete: bool
    """The streamer has passed the hour: nothing more is expected."""
    rows: int
    bytes: int
    markets: int
    gaps: int
    verified_seconds: float | None
    """Market-seconds with a book that can be believed."""
    coverage: float | None
    """The same over the market-seconds that were followed, 0 to 1."""
    first: str | None
    last: str | None
    checksum: str
    parts: list[Part]
    verified_by_market: dict[str, float] = {}
    """`verified_seconds` of each market."""
    compacted: bool = False
    """The hour is one sorted file, which `parts` names."""
    merged: list[str] = []
    """Names of the parts whose rows the compacted file took in: they are not to be written again."""


def floor_hour(at: datetime) -> datetime:
    """The hour that `at` is in."""
    return at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def hour_of_ns(ns: int) -> datetime:
    """The hour of a time in ns since the epoch."""
    return datetime.fromtimestamp(ns // 3_600_000_000_000 * 3600, UTC)


def hour_start_ns(hour: datetime) -> int:
    """An hour's first instant in ns since the epoch."""
    return int(hour.timestamp()) * 1_000_000_000


def hour_folder(root: Path, dataset: str, hour: datetime) -> Path:
    """Where a dataset's hour is."""
    return root / dataset / f"date={hour:%Y-%m-%d}" / f"hour={hour:%H}"


def hours(root: Path, dataset: str) -> list[datetime]:
    """The hours of which the archive holds files, ascending."""
    found = set()
    for folder in (root / dataset).glob("date=*/hour=*"):
        if any(folder.glob("*.parquet")):
            day, hour = folder.parent.name.removeprefix("date="), folder.name.removeprefix("hour=")
            found.add(datetime.strptime(f"{day} {hour}", "%Y-%m-%d %H").replace(tzinfo=UTC))
    return sorted(found)


def first_day(root: Path) -> date | None:
    """The first day of which the archive has anything; None for an empty one."""
    days = [folder.name.removeprefix("date=") for folder in root.glob("*/date=*")]
    return date.fromisoformat(min(days)) if days else None


def files(root: Path, dataset: str, hour: datetime) -> list[Path]:
    """The Parquet files of an hour, by name."""
    return sorted(hour_folder(root, dataset, hour).glob("*.parquet"))


def part_name(shard: int, first_n: int, end_n: int) -> str:
    """Name of the file that holds the rows of journal records first_n to end_n - 1."""
    return f"part-{shard}-{first_n:015d}-{end_n:015d}.parquet"


def part_range(name: str) -> tuple[int, int, int] | None:
    """(shard, first_n, end_n) of a part's name; None for a file of another origin."""
    pieces = name.removesuffix(".parquet").split("-")
    if len(pieces) != 4 or pieces[0] != "part" or not all(p.isdigit() for p in pieces[1:]):
        return None
    return int(pieces[1]), int(pieces[2]), int(pieces[3])


def write(
    path: Path,
    tables: Iterable[pa.Table],
    schema: pa.Schema,
    *,
    level: int = 3,
    sorted_by: Sequence[str] = (),
) -> int:
    """Write one Parquet file, whole or not at all; returns its bytes. All else is as in `writing`."""
    with writing(path, schema, level=level, sorted_by=sorted_by) as add:
        for table in tables:
            add(table)
    return path.stat().st_size


@contextmanager
def writing(
    path: Path, schema: pa.Schema, *, level: int = 3, sorted_by: Sequence[str] = ()
) -> Iterator[Callable[[pa.Table], None]]:
    """A Parquet file that takes table after table, and is there once the block is left without an error.

    `level` is zstd's; `sorted_by` names the columns that the rows are sorted by, for the footer. Raises
    `StoreUnavailable` where the disk is full or failing, `StoreRefused` where it may not be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    delta = ["seq", "ts", "ingest_ts"]
    names = [f.name for f in schema if pa.types.is_dictionary(f.type)] + [
        *("price", "qty", "size", "yes_price", "no_price")
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(
            temporary,
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
        _settle(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _disk_error(path, error) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_manifest(root: Path, manifest: Manifest, folder: Path | None = None) -> None:
    """Put an hour's manifest beside its files, or into the `folder` that will be the hour's."""
    if folder is None:
        folder = hour_folder(root, manifest.dataset, datetime.fromisoformat(manifest.hour))
    path = folder / MANIFEST
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
        _settle(temporary, path)
    except OSError as error:
        raise _disk_error(path, error) from None


def read_manifest(root: Path, dataset: str, hour: datetime) -> Manifest | None:
    """An hour's manifest, or None where it has none. Raises `StoreRefused` for a damaged one."""
    path = hour_folder(root, dataset, hour) / MANIFEST
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise StoreRefused(
            f"{path} is damaged ({error}). Materialise the hour again to make a new one."
        ) from None


def read(
    root: Path,
    dataset: str,
    hour: datetime,
    columns: list[str] | None = None,
    tickers: Collection[str] | None = None,
) -> Iterator[pa.Table]:
    """The rows of an hour, file by file; with `tickers` of those markets alone, "" for rows of none.

    Raises `StoreRefused` naming a file that cannot be read, `StoreUnavailable` one that went meanwhile.
    """
    schema = DATASETS[dataset].arrow
    dictionaries = [field.name for field in schema if pa.types.is_dictionary(field.type)]
    wanted = None
    if tickers is not None:
        # Of a column that is read as a dictionary Arrow does not use the statistics.
        dictionaries.remove("market_ticker")
        wanted = pc.field("market_ticker").isin(sorted(tickers))
    for path in files(root, dataset, hour):
        try:
            table = pq.read_table(
                path,
                columns=columns,
                partitioning=None,
                filters=wanted,
                read_dictionary=dictionaries,
            )
            yield table.cast(pa.schema([schema.field(name) for name in table.column_names]))
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from None


def batches(path: Path, schema: pa.Schema, rows: int = ROW_GROUP_ROWS) -> Iterator[pa.Table]:
    """A file's rows, at most `rows` at a time. Raises `StoreRefused` where it cannot be read."""
    dictionaries = [field.name for field in schema if pa.types.is_dictionary(field.type)]
    try:
        with pq.ParquetFile(path, read_dictionary=dictionaries) as file:
            for batch in file.iter_batches(batch_size=rows):
                yield pa.Table.from_batches([batch]).cast(schema)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def is_empty(path: Path) -> bool:
    """Whether a file has no rows. Raises `StoreRefused` where it cannot be read."""
    try:
        return bool(pq.read_metadata(path).num_rows == 0)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


# -- a whole hour replaced ---------------------------------------------------------------------


@contextmanager
def changing(root: Path, timeout_s: float = 60.0) -> Iterator[None]:
    """Whoever changes an hour that is sealed holds this: a late row, a rebuild, a compaction's swap.

    The kernel drops it when its holder dies. Raises `StoreUnavailable` when it is not to be had.
    """
    with _locked(root, "changing.lock", timeout_s, "Sealed hours are being changed"):
        yield


@contextmanager
def compacting(root: Path) -> Iterator[None]:
    """Held by the one compaction of an archive. Raises `StoreUnavailable` while another runs."""
    with _locked(root, "compaction.lock", 0, "Another compaction is at work"):
        yield


@contextmanager
def _locked(root: Path, name: str, timeout_s: float, what: str) -> Iterator[None]:
    path = root / ASIDE / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path, timeout=timeout_s, thread_local=False)
        lock.acquire()
    except filelock.Timeout:
        raise StoreUnavailable(
            f"{what} in {root} ({path} is held). Try again when that is done."
        ) from None
    except OSError as error:
        raise _disk_error(path, error) from None
    try:
        yield
    finally:
        lock.release()


def staging(root: Path, dataset: str, hour: datetime) -> Path:
    """A new empty folder in which a dataset's hour can be built, on the archive's file system."""
    path = root / ASIDE / dataset / f"{hour:%Y-%m-%d-%H}-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise _disk_error(path, error) from None
    return path


def replace_hour(root: Path, dataset: str, hour: datetime, staged: Path) -> None:
    """Make the staged folder the hour's, in one step; what was there lies aside until `sweep`.

    Everything in `staged` must be durable, and the caller must hold `changing`. A reader that listed
    the hour before and opens it after finds no such file, and has to list again.
    """
    folder = hour_folder(root, dataset, hour)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            swap.exchange(staged, folder)
        else:
            staged.rename(folder)
        _sync(folder.parent)
        _sync(staged.parent)
    except OSError as error:
        raise _disk_error(folder, error) from None


def sweep(root: Path) -> None:
    """Remove what lies aside for longer than the grace; the caller must hold both locks.

    It is either a replaced hour or the unfinished work of somebody who was killed.
    """
    for path in (root / ASIDE).glob("*/*"):
        try:
            if time.time() - path.stat().st_ctime > GRACE_S:  # an exchange sets it
                shutil.rmtree(path)
        except OSError as error:
            raise _disk_error(path, error) from None


def _unreadable(path: Path, error: Exception) -> StoreError:
    if isinstance(error, FileNotFoundError):
        return StoreUnavailable(
            f"{path} went while its hour was read: the hour was compacted or rebuilt. Read it again."
        )
    return StoreRefused(
        f"{path} cannot be read ({error}). Materialise that hour again: it is rebuilt from the"
        " journal while that is kept, else from ClickHouse."
    )


def _settle(temporary: Path, path: Path) -> None:
    """Make a finished file durable, then visible."""
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _disk_error(path: Path, error: OSError) -> StoreUnavailable | StoreRefused:
    name = errno.errorcode.get(error.errno or 0, "")
    if name in _TRANSIENT:
        what = (
            "No space is left"
            if name in {"ENOSPC", "EDQUOT"}
            else f"The disk failed ({error.strerror})"
        )
        return StoreUnavailable(
            f"{what} for {path}. Make room; the load goes on by itself.", name=name
        )
    return StoreRefused(
        f"{path} cannot be written ({error.strerror}). Set PARQUET_DIR to a folder that this user can write.",
        name=name,
    )

"""The interface of an archive, on a local disk or on object storage.

Every implementation guarantees two things. A file exists completely or not at all. And a reader that globs
the hive layout gets each row once, at any time and after any kill. What the rows mean is not known here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path

import msgspec
import pyarrow as pa

from kalshi_platform import typed_json
from kalshi_platform.archive.parquet import Add, File, table_of
from kalshi_platform.errors import StoreRefused
from kalshi_platform.schema import DATASETS


class Part(msgspec.Struct, frozen=True):
    """One file of an hour."""

    file: str
    rows: int
    bytes: int


class Manifest(msgspec.Struct, frozen=True):
    """The description of one dataset's sealed hour, stored beside its files. Times are ISO 8601, UTC."""

    dataset: str
    hour: str
    complete: bool
    """The hour is sealed: no more rows are expected."""
    rows: int
    bytes: int
    markets: int
    gaps: int
    verified_seconds: float | None
    """Market-seconds with a synced book."""
    coverage: float | None
    """`verified_seconds` divided by the followed market-seconds, 0 to 1."""
    first: str | None
    last: str | None
    checksum: str
    parts: list[Part]
    verified_by_market: dict[str, float] = {}
    """`verified_seconds` of each market."""
    compacted: bool = False
    """The hour is one sorted file, which `parts` names."""
    merged: list[str] = []
    """Names of the parts merged into the compacted file: they must not be written again."""
    computed_from: str = ""
    """Of a computed dataset: the content of the sealed hour that it was computed from (`hours.content_of`)."""


def encoded(manifest: Manifest) -> bytes:
    """Encode a manifest as indented JSON."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1)


def decoded(text: bytes, path: str) -> Manifest:
    """Decode a manifest that was read from `path`. Raises: `StoreRefused` for a damaged one."""
    try:
        return typed_json.decode(text, Manifest)
    except msgspec.DecodeError as error:
        raise StoreRefused(
            f"{path} is damaged ({error}). Materialise the hour again to make a new one."
        ) from None


Sort = Callable[[Sequence[File], Path], Path]


@dataclass(frozen=True)
class Listed:
    """The files of one dataset's hour."""

    files: tuple[File, ...]
    """The platform's Parquet files, by name."""
    manifest: File | None
    foreign: tuple[File, ...] = ()
    """Parquet files of other names: a reader that globs the folder takes their rows for the hour's."""

    def refuse_foreign(self, where: str) -> None:
        """Refuse an hour that has Parquet files of other names.

        Args:
            where: The hour's folder, for the sentence.

        Raises:
            StoreRefused: There are foreign files.
        """
        if self.foreign:
            names = ", ".join(file.name for file in self.foreign)
            raise StoreRefused(
                f"{where} has Parquet files that are not the platform's ({names}): readers of the archive take"
                " their rows for the hour's. Move them out of the archive."
            )


class Archive(ABC):
    """An archive. `str` of it is what its readers call it: a folder, or a URL.

    `dataset` is a name of `kalshi_platform.schema.DATASETS`, and `hour` the first instant of an hour, in UTC.

    Raises:
        StoreUnavailable: Of every method: a retry may succeed.
        StoreRefused: Of every method: a retry cannot succeed before a person acts.
    """

    swaps_hours = True
    """Whether a whole hour can be replaced in one step. Where it cannot, an hour is sorted
    before it is sent, and nothing is left to compact."""

    # -- what there is -------------------------------------------------------------------------

    @abstractmethod
    def hours(self, dataset: str) -> list[datetime]:
        """List the hours of a dataset.

        Args:
            dataset: The dataset's name.

        Returns:
            The hours of which the archive holds files, ascending.
        """

    @abstractmethod
    def first_day(self) -> date | None:
        """Find the first day of which the archive has anything.

        Returns:
            The day, in UTC; None for an empty archive.
        """

    @abstractmethod
    def listed(self, dataset: str, hour: datetime) -> Listed:
        """List what there is of an hour.

        Args:
            dataset: The dataset's name.
            hour: The hour's first instant.

        Returns:
            Its files, its manifest and files of other names; empty where there is nothing.
        """

    def files(self, dataset: str, hour: datetime) -> list[File]:
        """List the platform's Parquet files of an hour.

        Args:
            dataset: The dataset's name.
            hour: The hour's first instant.

        Returns:
            The files, by name.
        """
        return list(self.listed(dataset, hour).files)

    @abstractmethod
    def listing(
        self, dataset: str, first: datetime | None = None, last: datetime | None = None
    ) -> Mapping[datetime, Listed]:
        """List what there is of the hours of a span.

        Args:
            dataset: The dataset's name.
            first: The first hour, included; None: from the beginning.
            last: The last hour, included; None: to the end.

        Returns:
            The hours of which there are files or a manifest, with what there is.
        """

    @abstractmethod
    def foreign(self) -> Iterator[str]:
        """List what does not belong to the archive.

        Returns:
            Names below the archive's root that are not the platform's; of a folder its name, without its content.
        """

    @abstractmethod
    def read_manifest(self, dataset: str, hour: datetime) -> Manifest | None:
        """Read an hour's manifest.

        Args:
            dataset: The dataset's name.
            hour: The hour's first instant.

        Returns:
            The manifest; None for an hour that is not sealed.

        Raises:
            StoreRefused: The manifest is damaged.
        """

    @abstractmethod
    def where(self, dataset: str, hour: datetime) -> str:
        """Name the folder of a dataset's hour.

        Args:
            dataset: The dataset's name.
            hour: The hour's first instant.

        Returns:
            A path or a URL, for people and for readers.
        """

    def read(
        self,
        dataset: str,
        hour: datetime,
        columns: list[str] | None = None,
        tickers: Collection[str] | None = None,
    ) -> Iterator[pa.Table]:
        """Read the rows of an hour, file by file.

        Args:
            dataset: The dataset's name.
            hour: The hour's first instant.
            columns: The columns wanted; None: all.
            tickers: The markets wanted, "" for rows of no market; None: all. Row groups without them are not read.

        Yields:
            A table for each file, with the dataset's own Arrow types. Columns that a file of an older version lacks are null.

        Raises:
            StoreRefused: A file cannot be read; the sentence names it.
            StoreUnavailable: A file was removed between the listing and the read.
        """
        for file in self.files(dataset, hour):
            yield table_of(file, DATASETS[dataset].arrow, columns, tickers)

    # -- one file --------------------------------------------------------------------------------

    def write(
        self,
        dataset: str,
        hour: datetime,
        name: str,
        tables: Iterable[pa.Table],
        schema: pa.Schema,
    ) -> None:
        """Write one file of an hour, whole or not at all, in the place of one of that name.

        Args:
            dataset: The dataset's name.
            hour: The hour's first instant.
            name: The file's name.
            tables: The rows, table after table.
            schema: The Arrow schema of the file.
        """
        with self.writing(dataset, hour, name, schema) as add:
            for table in tables:
                add(table)

    @abstractmethod
    def writing(
        self, dataset: str, hour: datetime, name: str, schema: pa.Schema
    ) -> AbstractContextManager[Add]:
        """Open a file of an hour that takes table after table.

        Args:
            dataset: The dataset's name.
            hour: The hour's first instant.
            name: The file's name.
            schema: The Arrow schema of the file.

        Returns:
            A context that gives the function to add a table with. The file exists once the block ends without an error.
        """

    @abstractmethod
    def remove(self, file: File) -> None:
        """Remove a file; one that does not exist is no error.

        Args:
            file: The file, as `files` lists it.
        """

    @abstractmethod
    def set_aside(self, file: File) -> None:
        """Give a damaged or superseded file a name that no reader globs, so that it is not lost.

        Args:
            file: The file, as `files` lists it.
        """

    @abstractmethod
    def write_manifest(self, manifest: Manifest) -> None:
        """Put an hour's manifest beside its files.

        Args:
            manifest: The manifest, which names its dataset and its hour.
        """

    @abstractmethod
    def remove_hour(self, dataset: str, hour: datetime) -> None:
        """Remove an hour's files and its manifest.

        Args:
            dataset: The dataset's name.
            hour: The hour's first instant.
        """

    # -- a dataset without hours ---------------------------------------------------------------

    @abstractmethod
    def whole(self, dataset: str, name: str) -> File | None:
        """Find the one file of a dataset that has no hours.

        Args:
            dataset: The dataset's name.
            name: The file's name.

        Returns:
            The file; None where it has not been written yet.
        """

    @abstractmethod
    def write_whole(
        self,
        dataset: str,
        name: str,
        table: pa.Table,
        *,
        level: int = 3,
        sorted_by: Sequence[str] = (),
    ) -> File:
        """Write the one file of a dataset that has no hours, whole or not at all, in the place of the former one.

        Args:
            dataset: The dataset's name.
            name: The file's name.
            table: All its rows.
            level: zstd's compression level.
            sorted_by: The columns that the rows are sorted by.

        Returns:
            The file as written.
        """

    # -- metadata: small files that no reader of rows looks at ---------------------------------------

    @abstractmethod
    def read_metadata(self, name: str) -> bytes | None:
        """Read a metadata file.

        Args:
            name: Its path below the root.

        Returns:
            Its content; None where it does not exist.
        """

    @abstractmethod
    def write_metadata(self, name: str, content: bytes) -> None:
        """Write a metadata file, whole or not at all. The root must exist.

        Args:
            name: Its path below the root.
            content: Its content.
        """

    @abstractmethod
    def remove_metadata(self, name: str) -> None:
        """Remove a metadata file; one that does not exist is no error.

        Args:
            name: Its path below the root.
        """

    @abstractmethod
    def metadata_files(self, folder: str, suffix: str = ".json") -> list[str]:
        """List the metadata files of a folder.

        Args:
            folder: A folder one level below the root.
            suffix: How their names end.

        Returns:
            Their paths below the root.
        """

    @abstractmethod
    def metadata_lock(self) -> AbstractContextManager[None]:
        """Hold the lock for reading a metadata file and writing it again.

        Returns:
            A context that excludes all other processes on the same local folder.
        """

    # -- identity --------------------------------------------------------------------------------

    @abstractmethod
    def identity(self) -> str | None:
        """Read which archive this is.

        Returns:
            The identity; None where none is written.

        Raises:
            StoreRefused: The file is damaged, or a later version wrote it.
        """

    @abstractmethod
    def identify(self, known: str | None = None) -> str:
        """Give the archive an identity where it has none, and make its folder.

        Args:
            known: The identity that it had, where its file was lost.

        Returns:
            The identity that it has now.
        """

    @abstractmethod
    def require_identity(self, identity: str) -> None:
        """Refuse any other archive.

        Args:
            identity: The identity that this archive must have.

        Raises:
            StoreUnavailable: This archive has another identity or none, as a folder that is not mounted.
        """

    @abstractmethod
    def expect(self, identity: str) -> None:
        """From now on require an identity before and after each file is written.

        Args:
            identity: The identity that this archive must have.
        """

    @abstractmethod
    def look(self) -> None:
        """Check that the archive can be reached; cheap enough for once a second.

        Raises:
            StoreError: It cannot be reached, or lacks the expected identity.
        """

    @abstractmethod
    def is_empty(self) -> bool:
        """Check whether the archive holds anything.

        Returns:
            True where there is nothing of any dataset.
        """

    # -- sending ---------------------------------------------------------------------------

    @abstractmethod
    def sending(
        self, dataset: str, hour: datetime, sort: Sort
    ) -> AbstractContextManager[list[str]]:
        """Bring what waits of an hour to where readers look.

        Where parts are written to where readers look, nothing waits.

        Args:
            dataset: The dataset's name.
            hour: The hour's first instant.
            sort: Makes one sorted file of the given files in the given folder, and returns its path.

        Returns:
            A context that gives the names of the parts in the sorted file, which the block must write into the hour's
            manifest. The parts are removed once the block ends without an error; after a kill they are sent again.
        """

    # -- a whole hour replaced -----------------------------------------------------------------

    @abstractmethod
    def changing(self, timeout_s: float = 60.0) -> AbstractContextManager[None]:
        """Hold the lock for changing an hour that is sealed: a late row, a rebuild, a compaction.

        Args:
            timeout_s: Seconds to wait for it.

        Returns:
            A context that holds the lock. The kernel releases it when the process dies.

        Raises:
            StoreUnavailable: Another process held the lock all the time.
        """

    @abstractmethod
    def compacting(self) -> AbstractContextManager[None]:
        """Hold the lock of the one compaction of an archive.

        Returns:
            A context that holds the lock.

        Raises:
            StoreUnavailable: Another compaction runs.
        """

    @abstractmethod
    def staging(self, dataset: str, hour: datetime) -> Path:
        """Make an empty folder in which a dataset's hour can be built.

        Args:
            dataset: The dataset's name.
            hour: The hour's first instant.

        Returns:
            The folder, on a local disk.
        """

    @abstractmethod
    def replace_hour(self, dataset: str, hour: datetime, staged: Path) -> None:
        """Make the content of a folder the hour. The caller must hold `changing`.

        Where the hour has that content already, byte for byte, no reader is disturbed.

        Args:
            dataset: The dataset's name.
            hour: The hour's first instant.
            staged: The folder that `staging` made.
        """

    @abstractmethod
    def sweep(self) -> None:
        """Remove what a killed process left half built. The caller must hold both locks."""

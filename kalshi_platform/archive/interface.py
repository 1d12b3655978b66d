"""What an archive does, wherever it is.

Two promises hold for every implementation. A file is there whole or not at all. And whoever globs the
hive layout gets each row once, whenever it looks and whatever was killed. What the rows mean is not
known here.
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


def encoded(manifest: Manifest) -> bytes:
    """A manifest as it is kept: JSON, for people too."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1)


def decoded(text: bytes, path: str) -> Manifest:
    """The manifest that was read from `path`. Raises `StoreRefused` for a damaged one."""
    try:
        return typed_json.decode(text, Manifest)
    except msgspec.DecodeError as error:
        raise StoreRefused(
            f"{path} is damaged ({error}). Materialise the hour again to make a new one."
        ) from None


Sort = Callable[[Sequence[File], Path], Path]


@dataclass(frozen=True)
class Listed:
    """What there is of one dataset's hour."""

    files: tuple[File, ...]
    """Our Parquet files, by name."""
    manifest: File | None
    foreign: tuple[File, ...] = ()
    """Parquet files of other names: whoever globs the folder reads their rows as the hour's."""

    def insist_on_ours(self, where: str) -> None:
        """Raises `StoreRefused` where there are foreign files."""
        if self.foreign:
            names = ", ".join(file.name for file in self.foreign)
            raise StoreRefused(
                f"{where} has Parquet files that are not the platform's ({names}): readers of the archive take"
                " their rows for the hour's. Move them out of the archive."
            )


class Archive(ABC):
    """An archive. `str` of it is what its readers call it: a folder, or a URL.

    Every method raises `StoreUnavailable` where another try may help, `StoreRefused` where none will.
    """

    exchanges = True
    """Whether a whole hour can be exchanged for another in one step. Where it cannot, an hour is sorted
    before it is sent, and nothing is left to compact."""

    # -- what there is -------------------------------------------------------------------------

    @abstractmethod
    def hours(self, dataset: str) -> list[datetime]:
        """The hours of which the archive holds files, ascending."""

    @abstractmethod
    def first_day(self) -> date | None:
        """The first day of which the archive has anything; None for an empty one."""

    @abstractmethod
    def listed(self, dataset: str, hour: datetime) -> Listed:
        """What there is of an hour."""

    def files(self, dataset: str, hour: datetime) -> list[File]:
        """Our Parquet files of an hour, by name."""
        return list(self.listed(dataset, hour).files)

    @abstractmethod
    def listing(
        self, dataset: str, first: datetime | None = None, last: datetime | None = None
    ) -> Mapping[datetime, Listed]:
        """The hours from `first` to `last`, both included, of which there are files or a manifest."""

    @abstractmethod
    def foreign(self) -> Iterator[str]:
        """Names below the archive's root that are not ours, of folders without what is in them."""

    @abstractmethod
    def read_manifest(self, dataset: str, hour: datetime) -> Manifest | None:
        """An hour's manifest, or None where it has none. Raises `StoreRefused` for a damaged one."""

    @abstractmethod
    def where(self, dataset: str, hour: datetime) -> str:
        """The folder of a dataset's hour, for people and for readers."""

    def read(
        self,
        dataset: str,
        hour: datetime,
        columns: list[str] | None = None,
        tickers: Collection[str] | None = None,
    ) -> Iterator[pa.Table]:
        """The rows of an hour, file by file; with `tickers` of those markets alone, "" for rows of none.

        Raises `StoreRefused` naming a file that cannot be read, `StoreUnavailable` one that went
        meanwhile.
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
        """Write one file of an hour, whole or not at all, over one of that name."""
        with self.writing(dataset, hour, name, schema) as add:
            for table in tables:
                add(table)

    @abstractmethod
    def writing(
        self, dataset: str, hour: datetime, name: str, schema: pa.Schema
    ) -> AbstractContextManager[Add]:
        """A file of an hour that takes table after table, and is there once the block is left without an error."""

    @abstractmethod
    def remove(self, file: File) -> None:
        """Remove a file; where it has gone already, that is well."""

    @abstractmethod
    def put_aside(self, file: File) -> None:
        """Give a file, damaged or superseded, a name that no reader globs, so that it is not lost."""

    @abstractmethod
    def write_manifest(self, manifest: Manifest) -> None:
        """Put an hour's manifest beside its files."""

    @abstractmethod
    def remove_hour(self, dataset: str, hour: datetime) -> None:
        """Remove an hour's files and its manifest."""

    # -- a dataset without hours ---------------------------------------------------------------

    @abstractmethod
    def whole(self, dataset: str, name: str) -> File | None:
        """The one file of a dataset that has no hours; None where it has not been written yet."""

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
        """Write that file, whole or not at all, over the one of before.

        `level` is zstd's; `sorted_by` names the columns that the rows are sorted by.
        """

    # -- metadata: small files that no reader of rows looks at ---------------------------------------

    @abstractmethod
    def read_metadata(self, name: str) -> bytes | None:
        """The metadata file of a path below the root; None where it is missing."""

    @abstractmethod
    def write_metadata(self, name: str, content: bytes) -> None:
        """Write that file, whole or not at all. The root must be there."""

    @abstractmethod
    def metadata_files(self, folder: str) -> list[str]:
        """The paths of the metadata files in a folder, which is one level below the root."""

    @abstractmethod
    def locking_metadata(self) -> AbstractContextManager[None]:
        """Held to read a metadata file and write it again. Excludes whoever shares the local folder."""

    # -- identity --------------------------------------------------------------------------------

    @abstractmethod
    def identity(self) -> str | None:
        """Which archive this is; None where it says nothing. Raises `StoreRefused` for a damaged file, or a later
        version's."""

    @abstractmethod
    def identify(self, known: str | None = None) -> str:
        """Give the archive an identity where it has none, and the folder too; returns what it has then.

        `known`: the identity that it had, where its file was lost.
        """

    @abstractmethod
    def insist_on(self, identity: str) -> None:
        """Raise `StoreUnavailable` where this is not the archive of that identity, nor any."""

    @abstractmethod
    def expect(self, identity: str) -> None:
        """From now on insist on that identity before and after each file is written."""

    @abstractmethod
    def look(self) -> None:
        """Raise `StoreError` where it cannot be had, or an identity is expected and not there.

        It is asked every second.
        """

    @abstractmethod
    def is_empty(self) -> bool:
        """Whether there is nothing of any dataset."""

    # -- sending ---------------------------------------------------------------------------

    @abstractmethod
    def sending(
        self, dataset: str, hour: datetime, sort: Sort
    ) -> AbstractContextManager[list[str]]:
        """Bring what waits of an hour to where readers look; gives the names of the parts in its sorted file.

        `sort` makes the files that it is given one sorted file in a folder, and names that. In the block
        those names are to be written down in the hour's manifest: what was sent is forgotten once it is
        left without an error, and sent again where somebody was killed before. Where parts are written to
        where readers look, nothing waits.
        """

    # -- a whole hour replaced -----------------------------------------------------------------

    @abstractmethod
    def changing(self, timeout_s: float = 60.0) -> AbstractContextManager[None]:
        """Whoever changes an hour that is sealed holds this: a late row, a rebuild, a compaction.

        It falls when its holder dies. Raises `StoreUnavailable` when it is not to be had.
        """

    @abstractmethod
    def compacting(self) -> AbstractContextManager[None]:
        """Held by the one compaction of an archive. Raises `StoreUnavailable` while another runs."""

    @abstractmethod
    def staging(self, dataset: str, hour: datetime) -> Path:
        """A new empty folder of a local disk, in which a dataset's hour can be built."""

    @abstractmethod
    def replace_hour(self, dataset: str, hour: datetime, staged: Path) -> None:
        """Make what is in the staged folder the hour, which the caller must hold `changing` for.

        Where that is what the hour is already, byte for byte, no reader is disturbed.
        """

    @abstractmethod
    def sweep(self) -> None:
        """Remove what somebody who was killed left half built; the caller must hold both locks."""

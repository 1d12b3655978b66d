"""The archive on object storage: S3, or whatever speaks its language.

A store of objects takes one object whole or not at all, and lists what it has; it cannot rename, and
cannot exchange many objects for one. Between the arrival of a compacted hour and the removal of its parts
a reader would see rows twice, in the other order none. So nothing is ever exchanged here:

- Parts *wait* on the local disk, below `waiting`, in the archive's own layout.
- When an hour is sealed, its parts become one sorted file there, which is *sent* as one object,
  `hour-sorted.parquet`. It is compacted before anybody sees it, and is not touched again.
- Rows that come late are one more object, under the name of their part.

Every step that a reader can see is the arrival of one object with rows that were not there before. An hour
that is open is therefore not in the bucket; it is in ClickHouse, and below `waiting`.

A kill repeats and never doubles: parts that are to become the sorted object are set apart first, by one
rename, and go when the object has been read back and the hour's manifest names them as merged. Until then
the same parts make the same rows under the same name, and one that is written again replaces itself where
it is. Locks and parts are local, so whoever writes shares the data folder: the shards' streamers,
rebuilds. Readers may be anywhere.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from kalshi_platform.archive import archive_identity, checksum
from kalshi_platform.archive.interface import (
    Archive,
    Listed,
    Manifest,
    Sort,
    decoded,
    encoded,
)
from kalshi_platform.archive.layout import (
    BESIDE,
    MANIFEST,
    PARQUET,
    day_of_name,
    hour_of_path,
    hour_path,
    is_data,
    is_temporary,
    part_range,
)
from kalshi_platform.archive.local import (
    LocalArchive,
    disk_error,
    durably,
    write_durably,
)
from kalshi_platform.archive.object_storage_errors import no_such_bucket, object_store_error
from kalshi_platform.archive.parquet import Add, File, batches, local_file
from kalshi_platform.durable import sync
from kalshi_platform.errors import StoreRefused
from kalshi_platform.schema import DATASETS
from kalshi_platform.utc_hours import floor_hour

SCHEME = "s3://"
SORTED = "hour-sorted.parquet"
"""The one object that an hour's parts become."""
LEAVING = ".leaving"
REPLACED = ".replaced"
PROBE = ".probe"
BLOCK = 32 << 20
"""Bytes of an object that are held against its file at a time."""
KILLED_S = 86_400.0
"""Nothing is exchanged here, so what lies aside is work under way, which may take long, or of somebody killed."""
DAYS_LISTED_SINGLY = 45
"""Of a longer span the whole dataset is listed: a thousand objects come with one request."""


class ObjectArchive(Archive):
    """An archive below `s3://<bucket>/<prefix>`; `base` is that without the scheme."""

    exchanges = False

    def __init__(self, base: str, filesystem: fs.FileSystem, waiting: Path) -> None:
        self._base = base
        self._filesystem = filesystem
        self._waiting = LocalArchive(waiting)
        self._leaving = LocalArchive(waiting / LEAVING)
        self._expected = False

    def __str__(self) -> str:
        return f"{SCHEME}{self._base}"

    # -- what there is -------------------------------------------------------------------------

    def hours(self, dataset: str) -> list[datetime]:
        """See `Archive`. Those that wait are among them."""
        return [hour for hour, listed in self.listing(dataset).items() if listed.files]

    def first_day(self) -> date | None:
        """See `Archive`."""
        days = [day_of_name(name) for name in self._names_of_days()]
        known = [day for day in (*days, self._waiting.first_day()) if day is not None]
        return min(known, default=None)

    def _names_of_days(self) -> Iterator[str]:
        for dataset in self._list(self._base):
            if dataset.type is fs.FileType.Directory and dataset.base_name in DATASETS:
                for day in self._list(dataset.path):
                    yield day.base_name

    def listed(self, dataset: str, hour: datetime) -> Listed:
        """See `Archive`. Of an hour of which nothing has been sent yet, the parts that wait."""
        here = self._here(dataset, hour)  # first: what is sent meanwhile is found there
        sent = self._sent(dataset, hour)
        return sent if sent.files else replace(sent, files=tuple(here))

    def foreign(self) -> Iterator[str]:
        """See `Archive`. The bucket's names; one request for a thousand of them."""
        beside = (info.base_name for info in self._list(self._base))
        yield from sorted(name for name in beside if name not in {*DATASETS, *BESIDE, PROBE})
        for dataset in DATASETS:
            for info in self._list(f"{self._base}/{dataset}", recursive=True):
                if info.type is fs.FileType.File and not _is_ours(info.path):
                    yield info.path.removeprefix(f"{self._base}/")

    def listing(
        self, dataset: str, first: datetime | None = None, last: datetime | None = None
    ) -> Mapping[datetime, Listed]:
        """See `Archive`. An hour of which something waits has no manifest yet, or no longer."""
        waiting = {
            hour
            for room in (self._waiting, self._leaving)
            for hour in room.hours(dataset)
            if (first is None or hour >= first) and (last is None or hour <= last)
        }
        here = {hour: self._here(dataset, hour) for hour in waiting}
        found: dict[datetime, list[File]] = {}
        for folder in self._folders(dataset, first, last):
            for info in self._list(folder, recursive=True):
                hour = hour_of_path(info.path.rpartition("/")[0])
                inside = hour is not None and (first or hour) <= hour <= (last or hour)
                if hour is not None and inside and (file := self._file(info)):
                    found.setdefault(hour, []).append(file)
        listed = {hour: _sorted_out(files) for hour, files in found.items()}
        for hour, parts in here.items():
            if parts:
                there = listed.get(hour, Listed((), None))
                listed[hour] = replace(there, files=there.files or tuple(parts), manifest=None)
        return dict(sorted(listed.items()))

    def _folders(
        self, dataset: str, first: datetime | None, last: datetime | None
    ) -> Iterator[str]:
        """What to list for a span: an hour, some days, or everything."""
        if first is not None and first == last:
            yield f"{self._base}/{hour_path(dataset, first)}"
            return
        today = floor_hour(datetime.now(UTC))
        days = ((last or today).date() - first.date()).days + 1 if first else None
        if first is None or days is None or days > DAYS_LISTED_SINGLY:
            yield f"{self._base}/{dataset}"
            return
        for n in range(days):
            yield f"{self._base}/{dataset}/date={first.date() + timedelta(days=n)}"

    def read_manifest(self, dataset: str, hour: datetime) -> Manifest | None:
        """See `Archive`."""
        key = f"{self._key(dataset, hour)}/{MANIFEST}"
        try:
            with self._asking(key), self._filesystem.open_input_stream(key) as stream:
                text = stream.read()
        except FileNotFoundError:
            return None
        return decoded(text, f"{SCHEME}{key}")

    def where(self, dataset: str, hour: datetime) -> str:
        """See `Archive`."""
        return f"{SCHEME}{self._key(dataset, hour)}"

    # -- one file --------------------------------------------------------------------------------

    @contextmanager
    def writing(self, dataset: str, hour: datetime, name: str, schema: pa.Schema) -> Iterator[Add]:
        """See `Archive`. A part waits for `send`; a file of another name goes there at once."""
        if part_range(name):
            leaves = (self._leaving.folder(dataset, hour) / name).exists()
            room = self._leaving if leaves else self._waiting
            with self._waiting.guarded(), room.writing(dataset, hour, name, schema) as add:
                yield add
            return
        with self._scratch(dataset, hour) as folder:
            with durably(folder / name, schema) as add:
                yield add
            self._send(folder / name, f"{self._key(dataset, hour)}/{name}")

    def remove(self, file: File) -> None:
        """See `Archive`."""
        if not file.path.startswith(SCHEME):
            self._waiting.remove(file)
            return
        try:
            with self._asking(file.key):
                self._filesystem.delete_file(file.key)
        except FileNotFoundError:
            pass

    def put_aside(self, file: File) -> None:
        """See `Archive`."""
        if not file.path.startswith(SCHEME):
            path = Path(file.path)
            target = self._waiting.root / REPLACED / f"{uuid.uuid4().hex[:8]}-{file.name}"
            try:
                target.parent.mkdir(exist_ok=True)
                path.rename(target)
            except OSError as error:
                raise disk_error(path, error) from None
            return
        folder = file.key.rpartition("/")[0]
        with self._asking(file.key):
            self._filesystem.move(file.key, f"{folder}/.{file.name}.replaced")

    def write_manifest(self, manifest: Manifest) -> None:
        """See `Archive`."""
        hour = datetime.fromisoformat(manifest.hour)
        self._put_bytes(encoded(manifest), f"{self._key(manifest.dataset, hour)}/{MANIFEST}")

    def remove_hour(self, dataset: str, hour: datetime) -> None:
        """See `Archive`."""
        listed = self._sent(dataset, hour)
        for file in (*listed.files, listed.manifest):
            if file is not None:
                self.remove(file)

    def probe(self) -> None:
        """Put one object, read it, remove it. Raises what the store has against it."""
        key = f"{self._base}/{PROBE}"
        self._put_bytes(b"kalshi_platform doctor", key)
        with self._asking(key):
            with self._filesystem.open_input_stream(key) as stream:
                stream.read()
            self._filesystem.delete_file(key)
            self._filesystem.get_file_info(fs.FileSelector(self._base, allow_not_found=True))

    # -- a dataset without hours ---------------------------------------------------------------

    def whole(self, dataset: str, name: str) -> File | None:
        """See `Archive`."""
        key = f"{self._base}/{dataset}/{name}"
        with self._asking(key):
            info = self._filesystem.get_file_info(key)
        return self._file(info)

    def write_whole(
        self,
        dataset: str,
        name: str,
        table: pa.Table,
        *,
        level: int = 3,
        sorted_by: Sequence[str] = (),
    ) -> File:
        """See `Archive`."""
        key = f"{self._base}/{dataset}/{name}"
        with self._scratch(dataset, floor_hour(datetime.now(UTC))) as folder:
            write_durably(folder / name, [table], table.schema, level=level, sorted_by=sorted_by)
            self._send(folder / name, key)
        with self._asking(key):
            info = self._filesystem.get_file_info(key)
        return self._known(info)

    # -- metadata ------------------------------------------------------------------------------

    def read_metadata(self, name: str) -> bytes | None:
        """See `Archive`."""
        key = f"{self._base}/{name}"
        try:
            with self._asking(key), self._filesystem.open_input_stream(key) as stream:
                content: bytes = stream.read()
        except FileNotFoundError:
            return None
        return content

    def write_metadata(self, name: str, content: bytes) -> None:
        """See `Archive`."""
        self._put_bytes(content, f"{self._base}/{name}")

    def metadata_files(self, folder: str) -> list[str]:
        """See `Archive`."""
        found = self._list(f"{self._base}/{folder}")
        return sorted(f"{folder}/{info.base_name}" for info in found if info.extension == "json")

    def locking_metadata(self) -> AbstractContextManager[None]:
        """See `Archive`."""
        return self._waiting.locking_metadata()

    # -- identity --------------------------------------------------------------------------------

    def identity(self) -> str | None:
        """See `Archive`. The bucket's; what waits for it has the same."""
        text = self.read_metadata(archive_identity.FILE)
        return None if text is None else archive_identity.decode(text, str(self))

    def identify(self, known: str | None = None) -> str:
        """See `Archive`. The folder of what waits goes first: of two processes one makes it."""
        there = self.identity()
        here = self._waiting.identify(known or there)
        if there == here:
            return here
        if there is None:
            self.write_metadata(archive_identity.FILE, archive_identity.encode(here))
            return here
        if not (self._waiting.is_empty() and self._leaving.is_empty()):
            raise StoreRefused(
                f"{self._waiting} holds hours that wait for another archive ({here}) than {self} ({there})."
                " Set PARQUET_DIR to that one until they are sent, or move the folder away."
            )
        with self._waiting.locking_metadata():
            self._waiting.write_metadata(archive_identity.FILE, archive_identity.encode(there))
        return there

    def insist_on(self, identity: str) -> None:
        """See `Archive`."""
        self._waiting.insist_on(identity)
        if (found := self.identity()) != identity:
            if found is None:
                self._insist_on_bucket()
            raise archive_identity.gone(str(self), found)

    def expect(self, identity: str) -> None:
        """See `Archive`. Each write is held against the folder of what waits: the bucket costs a request."""
        self._waiting.expect(identity)
        self._expected = True

    def look(self) -> None:
        """See `Archive`. One request while it is there."""
        self._waiting.look()
        if self._is_there(f"{self._base}/{archive_identity.FILE}"):
            return
        self._insist_on_bucket()
        if self._expected:
            raise archive_identity.gone(str(self), None)

    def _insist_on_bucket(self) -> None:
        bucket = self._base.partition("/")[0]
        with self._asking(bucket):
            found = self._filesystem.get_file_info(bucket).type
        if found is fs.FileType.NotFound:
            raise no_such_bucket(f"{SCHEME}{bucket}")

    def is_empty(self) -> bool:
        """See `Archive`."""
        here = self._waiting.is_empty() and self._leaving.is_empty()
        return here and not any(self._list(f"{self._base}/{name}") for name in DATASETS)

    # -- sending -------------------------------------------------------------------------------

    @contextmanager
    def sending(self, dataset: str, hour: datetime, sort: Sort) -> Iterator[list[str]]:
        """See `Archive`. The caller must hold `changing` where somebody else may send."""
        key = f"{self._key(dataset, hour)}/{SORTED}"
        if (
            not self._leaving.files(dataset, hour)
            and self._waiting.files(dataset, hour)
            and not self._is_there(key)
        ):
            self._set_apart(dataset, hour)
        parts = self._leaving.files(dataset, hour)
        if parts:
            with self._scratch(dataset, hour) as folder:
                self._send(sort(parts, folder), key)
        late = self._waiting.files(dataset, hour)
        for part in late:  # an object each, as it is
            self._send(Path(part.path), f"{self._key(dataset, hour)}/{part.name}")
        yield [part.name for part in parts]
        for part in late:
            self._waiting.remove(part)
        if parts:
            self._let_go(dataset, hour)

    def _set_apart(self, dataset: str, hour: datetime) -> None:
        """From here on, no part joins those that are about to be sent."""
        source, target = (room.folder(dataset, hour) for room in (self._waiting, self._leaving))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
            sync(target.parent)
            sync(source.parent)
        except OSError as error:
            raise disk_error(target, error) from None

    def _let_go(self, dataset: str, hour: datetime) -> None:
        """Remove the parts that have arrived: all at once, for some of them would make another object."""
        folder, target = self._leaving.folder(dataset, hour), self.staging(dataset, hour)
        try:
            folder.rename(target)
            sync(folder.parent)
            shutil.rmtree(target)
        except OSError as error:
            raise disk_error(folder, error) from None

    # -- a whole hour replaced -----------------------------------------------------------------

    def changing(self, timeout_s: float = 60.0) -> AbstractContextManager[None]:
        """See `Archive`. Whoever shares the data folder is excluded."""
        return self._waiting.changing(timeout_s)

    def compacting(self) -> AbstractContextManager[None]:
        """See `Archive`."""
        return self._waiting.compacting()

    def staging(self, dataset: str, hour: datetime) -> Path:
        """See `Archive`."""
        return self._waiting.staging(dataset, hour)

    def replace_hour(self, dataset: str, hour: datetime, staged: Path) -> None:
        """See `Archive`. For an hour whose object is lost or damaged: what has the same rows stays.

        Raises `StoreRefused` for an hour of several objects, which nothing can exchange in one step.
        """
        (path,) = staged.glob("*.parquet")
        there = self._sent(dataset, hour).files
        if len(there) > 1:
            raise StoreRefused(
                f"{self.where(dataset, hour)} has {len(there)} objects, which cannot be exchanged for one in one"
                " step. Rename those that are damaged, then materialise the hour again."
            )
        if not there or not _reads_as(there[0], path, dataset):
            self._send(path, there[0].key if there else f"{self._key(dataset, hour)}/{SORTED}")
        shutil.rmtree(staged)

    def sweep(self) -> None:
        """See `Archive`."""
        self._waiting.sweep(KILLED_S)

    # -- asking the store ------------------------------------------------------------------------

    def _key(self, dataset: str, hour: datetime) -> str:
        return f"{self._base}/{hour_path(dataset, hour)}"

    def _here(self, dataset: str, hour: datetime) -> list[File]:
        rooms = (self._waiting, self._leaving)
        return sorted(
            (file for room in rooms for file in room.files(dataset, hour)), key=lambda f: f.name
        )

    def _sent(self, dataset: str, hour: datetime) -> Listed:
        infos = self._list(self._key(dataset, hour))
        return _sorted_out([file for info in infos if (file := self._file(info))])

    def _list(self, folder: str, *, recursive: bool = False) -> list[fs.FileInfo]:
        with self._asking(folder):
            return list(
                self._filesystem.get_file_info(
                    fs.FileSelector(folder, recursive=recursive, allow_not_found=True)
                )
            )

    def _file(self, info: fs.FileInfo) -> File | None:
        looked_at = info.base_name == MANIFEST or info.base_name.endswith(PARQUET)
        return self._known(info) if info.type is fs.FileType.File and looked_at else None

    def _known(self, info: fs.FileInfo) -> File:
        return File(f"{SCHEME}{info.path}", info.size, str(info.mtime_ns), self._filesystem)

    def _is_there(self, key: str) -> bool:
        with self._asking(key):
            return bool(self._filesystem.get_file_info(key).type is fs.FileType.File)

    @contextmanager
    def _scratch(self, dataset: str, hour: datetime) -> Iterator[Path]:
        """A folder of a local disk, for the time of the block."""
        folder = self.staging(dataset, hour)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def _send(self, path: Path, key: str) -> None:
        """Make a file the object, and read it back; where it is that already, no reader is disturbed."""
        if self._holds(key, path):
            return
        self._put(path, key)
        if not self._holds(key, path):
            raise StoreRefused(
                f"{SCHEME}{key} does not read as it was sent. The rows are kept in {self._waiting}. Does"
                " something else write there?"
            )

    def _holds(self, key: str, path: Path) -> bool:
        """Whether the object is there and is the file, byte for byte."""
        with self._asking(key):
            info = self._filesystem.get_file_info(key)
            if info.type is not fs.FileType.File or info.size != path.stat().st_size:
                return False
            with self._filesystem.open_input_stream(key) as there, path.open("rb") as here:
                while block := here.read(BLOCK):
                    if there.read(len(block)) != block:
                        return False
        return True

    def _put(self, path: Path, key: str) -> None:
        """Send a file; it is there whole or not at all."""
        try:
            source = pa.memory_map(str(path))
        except OSError as error:
            raise disk_error(path, error) from None
        with source:
            self._put_bytes(source.read_buffer(), key)

    def _put_bytes(self, content: pa.Buffer | bytes, key: str) -> None:
        with self._asking(key):
            stream = self._filesystem.open_output_stream(key)
            stream.write(content)
            stream.close()  # in no `finally`: of an upload that failed, closing would make an object

    @contextmanager
    def _asking(self, key: str) -> Iterator[None]:
        """Errors of the store as ours; `FileNotFoundError` as it is."""
        try:
            yield
        except OSError as error:
            trouble = object_store_error(f"{SCHEME}{key}", error)
            if trouble is None:
                raise
            raise trouble from None


def _sorted_out(files: Sequence[File]) -> Listed:
    manifest = [file for file in files if file.name == MANIFEST]
    parquet = sorted((f for f in files if f.name != MANIFEST), key=lambda file: file.name)
    return Listed(
        tuple(file for file in parquet if is_data(file.name)),
        manifest[0] if manifest else None,
        tuple(file for file in parquet if not is_data(file.name)),
    )


def _is_ours(key: str) -> bool:
    """Whether an object below a dataset is ours, by its name and place."""
    folder, _, name = key.rpartition("/")
    if hour_of_path(folder) is not None:
        return is_data(name) or name == MANIFEST or is_temporary(name)
    return folder.rpartition("/")[2] in DATASETS and name.endswith(PARQUET)


def _content(file: File, dataset: str) -> tuple[int, str]:
    rows, total = 0, 0
    for table in batches(file, DATASETS[dataset].arrow):
        rows += table.num_rows
        total += checksum.rows_checksum(table)
    return rows, checksum.text(total % 2**64)


def _reads_as(there: File, path: Path, dataset: str) -> bool:
    try:
        return _content(there, dataset) == _content(local_file(path), dataset)
    except StoreRefused:
        return False  # damaged

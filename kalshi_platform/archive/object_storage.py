"""The archive on object storage: S3 or a compatible store.

An object store writes one object completely or not at all and lists its objects, but it can neither rename
nor swap several objects for one. Uploading a compacted hour and then deleting its parts would show readers
rows twice, the other order none. So nothing is ever replaced here:

- Parts *wait* on the local disk, below `waiting`, in the archive's own layout.
- When an hour is sealed, its parts are merged into one sorted file there, which is *sent* as one object,
  `hour-sorted.parquet`. It is compacted before readers see it and is not changed afterwards.
- Late rows become one more object each, under the name of their part.

So every step that a reader can see is one new object with new rows. An open hour is therefore not in the
bucket, but in ClickHouse and below `waiting`.

A kill may repeat work and never duplicates rows. The parts to be merged are first moved to `.leaving` by one
rename. They are removed only after the object was read back and the hour's manifest names them as merged.
Until then the same parts give the same rows under the same name, and a part that is written again replaces
itself in place. Locks and waiting parts are local, so all writers (the shards' streamers, rebuilds) must share
the data folder. Readers may be anywhere. The meaning of a store's errors belongs in `object_storage_errors`.
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

from kalshi_platform import durable
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
    ALLOWED_AT_ROOT,
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
from kalshi_platform.errors import StoreRefused
from kalshi_platform.schema import DATASETS
from kalshi_platform.utc_hours import floor_hour

SCHEME = "s3://"
SORTED = "hour-sorted.parquet"
"""The object into which an hour's parts are merged."""
OUTGOING = ".leaving"
REPLACED = ".replaced"
PROBE = ".probe"
COMPARE_BYTES = 32 << 20
"""Bytes of an object compared with its file at a time."""
ABANDONED_AFTER_S = 86_400.0
"""Work in `.aside` older than this was left by a killed process; younger work may still be in progress."""
MAX_DAYS_LISTED_SINGLY = 45
"""For longer spans the whole dataset is listed: one request returns a thousand objects."""


class ObjectArchive(Archive):
    """An archive below `s3://<bucket>/<prefix>`; `base` is the URL without the scheme."""

    swaps_hours = False

    def __init__(self, base: str, filesystem: fs.FileSystem, waiting: Path) -> None:
        self._base = base
        self._filesystem = filesystem
        self._waiting = LocalArchive(waiting)
        self._outgoing = LocalArchive(waiting / OUTGOING)
        self._expected = False

    def __str__(self) -> str:
        return f"{SCHEME}{self._base}"

    # -- what there is -------------------------------------------------------------------------

    def hours(self, dataset: str) -> list[datetime]:
        """See `Archive`. Includes hours with waiting parts."""
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
        """See `Archive`. For an hour without objects, the waiting parts."""
        parts = self._local_parts(
            dataset, hour
        )  # first: parts sent meanwhile are in the next listing
        sent = self._sent(dataset, hour)
        return sent if sent.files else replace(sent, files=tuple(parts))

    def foreign(self) -> Iterator[str]:
        """See `Archive`. Lists the bucket, a thousand names per request."""
        names = (info.base_name for info in self._list(self._base))
        yield from sorted(
            name for name in names if name not in {*DATASETS, *ALLOWED_AT_ROOT, PROBE}
        )
        for dataset in DATASETS:
            for info in self._list(f"{self._base}/{dataset}", recursive=True):
                if info.type is fs.FileType.File and not _is_ours(info.path):
                    yield info.path.removeprefix(f"{self._base}/")

    def listing(
        self, dataset: str, first: datetime | None = None, last: datetime | None = None
    ) -> Mapping[datetime, Listed]:
        """See `Archive`. An hour with waiting parts counts as unsealed."""
        waiting = {
            hour
            for local in (self._waiting, self._outgoing)
            for hour in local.hours(dataset)
            if (first is None or hour >= first) and (last is None or hour <= last)
        }
        local_parts = {hour: self._local_parts(dataset, hour) for hour in waiting}
        objects: dict[datetime, list[File]] = {}
        for folder in self._folders(dataset, first, last):
            for info in self._list(folder, recursive=True):
                hour = hour_of_path(info.path.rpartition("/")[0])
                inside = hour is not None and (first or hour) <= hour <= (last or hour)
                if hour is not None and inside and (file := self._file(info)):
                    objects.setdefault(hour, []).append(file)
        listed = {hour: _classify(files) for hour, files in objects.items()}
        for hour, parts in local_parts.items():
            if parts:
                sent = listed.get(hour, Listed((), None))
                listed[hour] = replace(sent, files=sent.files or tuple(parts), manifest=None)
        return dict(sorted(listed.items()))

    def _folders(
        self, dataset: str, first: datetime | None, last: datetime | None
    ) -> Iterator[str]:
        """The folders to list for a span: one hour, single days, or the whole dataset."""
        if first is not None and first == last:
            yield f"{self._base}/{hour_path(dataset, first)}"
            return
        today = floor_hour(datetime.now(UTC))
        days = ((last or today).date() - first.date()).days + 1 if first else None
        if first is None or days is None or days > MAX_DAYS_LISTED_SINGLY:
            yield f"{self._base}/{dataset}"
            return
        for n in range(days):
            yield f"{self._base}/{dataset}/date={first.date() + timedelta(days=n)}"

    def read_manifest(self, dataset: str, hour: datetime) -> Manifest | None:
        """See `Archive`."""
        key = f"{self._key(dataset, hour)}/{MANIFEST}"
        try:
            with self._translated(key), self._filesystem.open_input_stream(key) as stream:
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
        """See `Archive`. A part waits locally for `sending`; any other file is sent at once."""
        if part_range(name):
            is_outgoing = (self._outgoing.folder(dataset, hour) / name).exists()
            local = self._outgoing if is_outgoing else self._waiting
            with (
                self._waiting.checking_identity(),
                local.writing(dataset, hour, name, schema) as add,
            ):
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
            with self._translated(file.key):
                self._filesystem.delete_file(file.key)
        except FileNotFoundError:
            pass

    def set_aside(self, file: File) -> None:
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
        with self._translated(file.key):
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
        """Write, read and delete one object. Raises: the store's error where one of these fails."""
        key = f"{self._base}/{PROBE}"
        self._put_bytes(b"kalshi_platform doctor", key)
        with self._translated(key):
            with self._filesystem.open_input_stream(key) as stream:
                stream.read()
            self._filesystem.delete_file(key)
            self._filesystem.get_file_info(fs.FileSelector(self._base, allow_not_found=True))

    # -- a dataset without hours ---------------------------------------------------------------

    def whole(self, dataset: str, name: str) -> File | None:
        """See `Archive`."""
        key = f"{self._base}/{dataset}/{name}"
        with self._translated(key):
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
        with self._translated(key):
            info = self._filesystem.get_file_info(key)
        return self._known(info)

    # -- metadata ------------------------------------------------------------------------------

    def read_metadata(self, name: str) -> bytes | None:
        """See `Archive`."""
        key = f"{self._base}/{name}"
        try:
            with self._translated(key), self._filesystem.open_input_stream(key) as stream:
                content: bytes = stream.read()
        except FileNotFoundError:
            return None
        return content

    def write_metadata(self, name: str, content: bytes) -> None:
        """See `Archive`."""
        self._put_bytes(content, f"{self._base}/{name}")

    def remove_metadata(self, name: str) -> None:
        """See `Archive`."""
        key = f"{self._base}/{name}"
        try:
            with self._translated(key):
                self._filesystem.delete_file(key)
        except FileNotFoundError:
            pass

    def metadata_files(self, folder: str, suffix: str = ".json") -> list[str]:
        """See `Archive`."""
        names = (info.base_name for info in self._list(f"{self._base}/{folder}"))
        return sorted(f"{folder}/{name}" for name in names if name.endswith(suffix))

    def metadata_lock(self) -> AbstractContextManager[None]:
        """See `Archive`."""
        return self._waiting.metadata_lock()

    # -- identity --------------------------------------------------------------------------------

    def identity(self) -> str | None:
        """See `Archive`. The bucket's identity; the local folder of waiting parts has the same."""
        text = self.read_metadata(archive_identity.FILE)
        return None if text is None else archive_identity.decode(text, str(self))

    def identify(self, known: str | None = None) -> str:
        """See `Archive`. The local folder comes first: its lock decides between two processes."""
        sent_files = self.identity()
        here = self._waiting.identify(known or sent_files)
        if sent_files == here:
            return here
        if sent_files is None:
            self.write_metadata(archive_identity.FILE, archive_identity.encode(here))
            return here
        if not (self._waiting.is_empty() and self._outgoing.is_empty()):
            raise StoreRefused(
                f"{self._waiting} holds hours that wait for another archive ({here}) than {self} ({sent_files})."
                " Set PARQUET_DIR to that one until they are sent, or move the folder away."
            )
        with self._waiting.metadata_lock():
            self._waiting.write_metadata(archive_identity.FILE, archive_identity.encode(sent_files))
        return sent_files

    def require_identity(self, identity: str) -> None:
        """See `Archive`."""
        self._waiting.require_identity(identity)
        if (actual := self.identity()) != identity:
            if actual is None:
                self._require_bucket()
            raise archive_identity.archive_gone(str(self), actual)

    def expect(self, identity: str) -> None:
        """See `Archive`. Writes check the local folder's identity, as the bucket's would cost a request each."""
        self._waiting.expect(identity)
        self._expected = True

    def look(self) -> None:
        """See `Archive`. One request while the archive is reachable."""
        self._waiting.look()
        if self._exists(f"{self._base}/{archive_identity.FILE}"):
            return
        self._require_bucket()
        if self._expected:
            raise archive_identity.archive_gone(str(self), None)

    def _require_bucket(self) -> None:
        bucket = self._base.partition("/")[0]
        with self._translated(bucket):
            kind = self._filesystem.get_file_info(bucket).type
        if kind is fs.FileType.NotFound:
            raise no_such_bucket(f"{SCHEME}{bucket}")

    def is_empty(self) -> bool:
        """See `Archive`."""
        empty = self._waiting.is_empty() and self._outgoing.is_empty()
        return empty and not any(self._list(f"{self._base}/{name}") for name in DATASETS)

    # -- sending -------------------------------------------------------------------------------

    @contextmanager
    def sending(self, dataset: str, hour: datetime, sort: Sort) -> Iterator[list[str]]:
        """See `Archive`. The caller must hold `changing` where another process may send."""
        key = f"{self._key(dataset, hour)}/{SORTED}"
        if (
            not self._outgoing.files(dataset, hour)
            and self._waiting.files(dataset, hour)
            and not self._exists(key)
        ):
            self._move_to_outgoing(dataset, hour)
        parts = self._outgoing.files(dataset, hour)
        if parts:
            with self._scratch(dataset, hour) as folder:
                self._send(sort(parts, folder), key)
        late = self._waiting.files(dataset, hour)
        for part in late:  # one object each, unmerged
            self._send(Path(part.path), f"{self._key(dataset, hour)}/{part.name}")
        yield [part.name for part in parts]
        for part in late:
            self._waiting.remove(part)
        if parts:
            self._remove_sent(dataset, hour)

    def _move_to_outgoing(self, dataset: str, hour: datetime) -> None:
        """Fix the set of parts to merge: later parts are written to `waiting` and become late rows."""
        source, target = (local.folder(dataset, hour) for local in (self._waiting, self._outgoing))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
            durable.sync(target.parent)
            durable.sync(source.parent)
        except OSError as error:
            raise disk_error(target, error) from None

    def _remove_sent(self, dataset: str, hour: datetime) -> None:
        """Remove the sent parts atomically: a subset of them would be merged into a different object."""
        folder, target = self._outgoing.folder(dataset, hour), self.staging(dataset, hour)
        try:
            folder.rename(target)
            durable.sync(folder.parent)
            shutil.rmtree(target)
        except OSError as error:
            raise disk_error(folder, error) from None

    # -- a whole hour replaced -----------------------------------------------------------------

    def changing(self, timeout_s: float = 60.0) -> AbstractContextManager[None]:
        """See `Archive`. Excludes all processes that share the data folder."""
        return self._waiting.changing(timeout_s)

    def compacting(self) -> AbstractContextManager[None]:
        """See `Archive`."""
        return self._waiting.compacting()

    def staging(self, dataset: str, hour: datetime) -> Path:
        """See `Archive`."""
        return self._waiting.staging(dataset, hour)

    def replace_hour(self, dataset: str, hour: datetime, staged: Path) -> None:
        """See `Archive`. For an hour whose object is lost or damaged; an object with the same rows stays.

        Raises: `StoreRefused` for an hour of several objects, which cannot be replaced in one step.
        """
        (path,) = staged.glob("*.parquet")
        sent_files = self._sent(dataset, hour).files
        if len(sent_files) > 1:
            raise StoreRefused(
                f"{self.where(dataset, hour)} has {len(sent_files)} objects, which cannot be replaced by one in one"
                " step. Rename those that are damaged, then materialise the hour again."
            )
        if not sent_files or not _same_rows(sent_files[0], path, dataset):
            self._send(
                path, sent_files[0].key if sent_files else f"{self._key(dataset, hour)}/{SORTED}"
            )
        shutil.rmtree(staged)

    def sweep(self) -> None:
        """See `Archive`."""
        self._waiting.sweep(ABANDONED_AFTER_S)

    # -- access to the store ---------------------------------------------------------------------

    def _key(self, dataset: str, hour: datetime) -> str:
        return f"{self._base}/{hour_path(dataset, hour)}"

    def _local_parts(self, dataset: str, hour: datetime) -> list[File]:
        rooms = (self._waiting, self._outgoing)
        return sorted(
            (file for local in rooms for file in local.files(dataset, hour)), key=lambda f: f.name
        )

    def _sent(self, dataset: str, hour: datetime) -> Listed:
        infos = self._list(self._key(dataset, hour))
        return _classify([file for info in infos if (file := self._file(info))])

    def _list(self, folder: str, *, recursive: bool = False) -> list[fs.FileInfo]:
        with self._translated(folder):
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

    def _exists(self, key: str) -> bool:
        with self._translated(key):
            return bool(self._filesystem.get_file_info(key).type is fs.FileType.File)

    @contextmanager
    def _scratch(self, dataset: str, hour: datetime) -> Iterator[Path]:
        """A temporary local folder."""
        folder = self.staging(dataset, hour)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def _send(self, path: Path, key: str) -> None:
        """Upload a file and read it back; do nothing where the object equals the file already."""
        if self._matches(key, path):
            return
        self._put(path, key)
        if not self._matches(key, path):
            raise StoreRefused(
                f"{SCHEME}{key} does not read as it was sent. The rows are kept in {self._waiting}. Does"
                " something else write there?"
            )

    def _matches(self, key: str, path: Path) -> bool:
        """Whether the object exists and equals the file, byte for byte."""
        with self._translated(key):
            info = self._filesystem.get_file_info(key)
            if info.type is not fs.FileType.File or info.size != path.stat().st_size:
                return False
            with self._filesystem.open_input_stream(key) as sent_files, path.open("rb") as here:
                while block := here.read(COMPARE_BYTES):
                    if sent_files.read(len(block)) != block:
                        return False
        return True

    def _put(self, path: Path, key: str) -> None:
        """Upload a file, completely or not at all."""
        try:
            source = pa.memory_map(str(path))
        except OSError as error:
            raise disk_error(path, error) from None
        with source:
            self._put_bytes(source.read_buffer(), key)

    def _put_bytes(self, content: pa.Buffer | bytes, key: str) -> None:
        with self._translated(key):
            stream = self._filesystem.open_output_stream(key)
            stream.write(content)
            stream.close()  # not in a `finally`: closing a failed upload would create an object

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        """Translate errors of the store; pass `FileNotFoundError` on."""
        try:
            yield
        except OSError as error:
            trouble = object_store_error(f"{SCHEME}{key}", error)
            if trouble is None:
                raise
            raise trouble from None


def _classify(files: Sequence[File]) -> Listed:
    manifest = [file for file in files if file.name == MANIFEST]
    parquet = sorted((f for f in files if f.name != MANIFEST), key=lambda file: file.name)
    return Listed(
        tuple(file for file in parquet if is_data(file.name)),
        manifest[0] if manifest else None,
        tuple(file for file in parquet if not is_data(file.name)),
    )


def _is_ours(key: str) -> bool:
    """Whether an object below a dataset belongs to the archive, by its name and folder."""
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


def _same_rows(sent_files: File, path: Path, dataset: str) -> bool:
    try:
        return _content(sent_files, dataset) == _content(local_file(path), dataset)
    except StoreRefused:
        return False  # damaged

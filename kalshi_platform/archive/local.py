"""The archive on a local disk.

    <root>/.aside/    hours being built, hours just replaced, locks; no reader globs it

Files are written under a name that no reader globs, synced, then renamed. A part's name is derived from its
journal range alone, so writing a range again replaces the file with an equal one. A whole hour is replaced by
swapping its folder. Names belong in `layout`, the file format in `parquet`.
"""

from __future__ import annotations

import errno
import filecmp
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import date, datetime
from pathlib import Path

import filelock
import pyarrow as pa

from kalshi_platform import durable
from kalshi_platform.archive import archive_identity, atomic_swap
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
    ASIDE,
    MANIFEST,
    PARQUET,
    day_of_name,
    hour_of_path,
    hour_path,
    is_data,
    is_temporary,
)
from kalshi_platform.archive.parquet import Add, File, local_file, parquet_writer
from kalshi_platform.errors import StoreRefused, StoreUnavailable
from kalshi_platform.schema import DATASETS

GRACE_S = 60.0
"""How long a replaced hour is kept, so that a reader that is listing it lists all of it."""
METADATA_LOCK_TIMEOUT_S = 10.0
LISTINGS = 20
"""Attempts to list a folder whose files disappear between listing and inspection."""
_NEW_FOLDER = re.compile(r"[0-9]{4}(?:-[0-9]{2}){3}-[0-9a-f]{8}")
"""Names that `new_folder` creates and that a swap leaves in `.aside`."""
_NO_FOLDER = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
_TRANSIENT = {"ENOSPC", "EDQUOT", "EIO", "EAGAIN", "ETIMEDOUT", "ESTALE"}


class LocalArchive(Archive):
    """An archive below a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._expected: str | None = None

    def __str__(self) -> str:
        return str(self.root)

    def folder(self, dataset: str, hour: datetime) -> Path:
        """The folder of a dataset's hour."""
        return self.root / hour_path(dataset, hour)

    # -- what there is -------------------------------------------------------------------------

    def hours(self, dataset: str) -> list[datetime]:
        """See `Archive`."""
        return [hour for hour, folder in self._folders(dataset) if _has_data(folder)]

    def first_day(self) -> date | None:
        """See `Archive`. Uses names alone and lists only the folders of the datasets."""
        days = (
            day_of_name(name) for dataset in DATASETS for name in _file_names(self.root / dataset)
        )
        return min((day for day in days if day is not None), default=None)

    def _folders(
        self, dataset: str, first: datetime | None = None, last: datetime | None = None
    ) -> Iterator[tuple[datetime, Path]]:
        """Yield the folders of a span's hours, ascending, without listing other days."""
        for name in sorted(_file_names(self.root / dataset)):
            day = day_of_name(name)
            if day is None or (first and day < first.date()) or (last and day > last.date()):
                continue
            for below in sorted(_file_names(self.root / dataset / name)):
                hour = hour_of_path(f"{name}/{below}")
                if hour is None or (first and hour < first) or (last and hour > last):
                    continue
                yield hour, self.root / dataset / name / below

    def listed(self, dataset: str, hour: datetime) -> Listed:
        """See `Archive`."""
        return _listed(self.folder(dataset, hour))

    def listing(
        self, dataset: str, first: datetime | None = None, last: datetime | None = None
    ) -> Mapping[datetime, Listed]:
        """See `Archive`."""
        hours = {}
        for hour, folder in self._folders(dataset, first, last):
            listed = _listed(folder)
            if listed.files or listed.manifest:
                hours[hour] = listed
        return hours

    def foreign(self) -> Iterator[str]:
        """See `Archive`."""
        for name in sorted(_file_names(self.root)):
            folder = self.root / name
            if name not in DATASETS:
                if name not in ALLOWED_AT_ROOT:
                    yield name
                continue
            for below in sorted(_file_names(folder)):
                if day_of_name(below) is not None:
                    yield from self._foreign_of_day(f"{name}/{below}")
                elif not below.endswith(PARQUET) and not is_temporary(below):
                    yield f"{name}/{below}"

    def _foreign_of_day(self, day: str) -> Iterator[str]:
        if not (self.root / day).is_dir():
            yield day
        for name in sorted(_file_names(self.root / day)):
            path = f"{day}/{name}"
            if hour_of_path(path) is None or not (self.root / path).is_dir():
                yield path
                continue
            for below in sorted(_file_names(self.root / path)):
                if not (is_data(below) or below == MANIFEST or is_temporary(below)):
                    yield f"{path}/{below}"

    def read_manifest(self, dataset: str, hour: datetime) -> Manifest | None:
        """See `Archive`."""
        path = self.folder(dataset, hour) / MANIFEST
        try:
            return decoded(path.read_bytes(), str(path))
        except FileNotFoundError:
            return None

    def where(self, dataset: str, hour: datetime) -> str:
        """See `Archive`."""
        return str(self.folder(dataset, hour))

    # -- one file --------------------------------------------------------------------------------

    @contextmanager
    def writing(self, dataset: str, hour: datetime, name: str, schema: pa.Schema) -> Iterator[Add]:
        """See `Archive`."""
        with self.checking_identity(), durably(self.folder(dataset, hour) / name, schema) as add:
            yield add

    def remove(self, file: File) -> None:
        """See `Archive`."""
        path = Path(file.path)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(path, error) from None

    def set_aside(self, file: File) -> None:
        """See `Archive`."""
        path = Path(file.path)
        try:
            path.rename(path.with_name(f".{path.name}.replaced"))
        except OSError as error:
            raise disk_error(path, error) from None

    def write_manifest(self, manifest: Manifest) -> None:
        """See `Archive`."""
        hour = datetime.fromisoformat(manifest.hour)
        with self.checking_identity():
            stage_manifest(self.folder(manifest.dataset, hour), manifest)

    def remove_hour(self, dataset: str, hour: datetime) -> None:
        """See `Archive`."""
        for file in self.files(dataset, hour):
            self.remove(file)
        (self.folder(dataset, hour) / MANIFEST).unlink(missing_ok=True)

    # -- a dataset without hours ---------------------------------------------------------------

    def whole(self, dataset: str, name: str) -> File | None:
        """See `Archive`."""
        try:
            return local_file(self.root / dataset / name)
        except FileNotFoundError:
            return None

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
        path = self.root / dataset / name
        with self.checking_identity():
            write_durably(path, [table], table.schema, level=level, sorted_by=sorted_by)
        return local_file(path)

    # -- metadata ------------------------------------------------------------------------------

    def read_metadata(self, name: str) -> bytes | None:
        """See `Archive`."""
        path = self.root / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise disk_error(path, error) from None

    def write_metadata(self, name: str, content: bytes) -> None:
        """See `Archive`."""
        path = self.root / name
        try:
            if path.parent != self.root:
                path.parent.mkdir(exist_ok=True)
            durable.replace(path, content)
        except FileNotFoundError:
            raise archive_identity.archive_gone(str(self), None) from None
        except OSError as error:
            raise disk_error(path, error) from None

    def remove_metadata(self, name: str) -> None:
        """See `Archive`."""
        path = self.root / name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise disk_error(path, error) from None

    def metadata_files(self, folder: str, suffix: str = ".json") -> list[str]:
        """See `Archive`."""
        return sorted(f"{folder}/{path.name}" for path in (self.root / folder).glob(f"*{suffix}"))

    def metadata_lock(self) -> AbstractContextManager[None]:
        """See `Archive`."""
        if not self.root.is_dir():
            raise archive_identity.archive_gone(str(self), None)
        path = self.root / ASIDE / "metadata.lock"
        return locked(path, METADATA_LOCK_TIMEOUT_S, f"Another recorder writes its state in {self}")

    # -- identity --------------------------------------------------------------------------------

    def identity(self) -> str | None:
        """See `Archive`."""
        text = self.read_metadata(archive_identity.FILE)
        return None if text is None else archive_identity.decode(text, self._identity_path)

    def identify(self, known: str | None = None) -> str:
        """See `Archive`. Two processes at once get the same identity."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(self.root, error) from None
        with self.metadata_lock():
            if (existing := self.identity()) is not None:
                return existing
            identity = known or archive_identity.new_identity()
            self.write_metadata(archive_identity.FILE, archive_identity.encode(identity))
            return identity

    def require_identity(self, identity: str) -> None:
        """See `Archive`."""
        actual = self.identity()
        if actual != identity:
            raise archive_identity.archive_gone(str(self), actual)

    def expect(self, identity: str) -> None:
        """See `Archive`."""
        self._expected = identity

    def is_empty(self) -> bool:
        """See `Archive`."""
        return not any(any((self.root / name).glob("*")) for name in DATASETS)

    @contextmanager
    def checking_identity(self) -> Iterator[None]:
        """Check the identity before and after a block that creates folders: they must not replace the archive."""
        self.look()
        yield
        self.look()

    def look(self) -> None:
        """See `Archive`."""
        if self._expected is not None:
            self.require_identity(self._expected)

    @property
    def _identity_path(self) -> str:
        return str(self.root / archive_identity.FILE)

    # -- sending -------------------------------------------------------------------------------

    def sending(
        self, dataset: str, hour: datetime, sort: Sort
    ) -> AbstractContextManager[list[str]]:
        """See `Archive`."""
        return nullcontext([])

    # -- a whole hour replaced -----------------------------------------------------------------

    @contextmanager
    def changing(self, timeout_s: float = 60.0) -> Iterator[None]:
        """See `Archive`."""
        self.look()
        path = self.root / ASIDE / "changing.lock"
        with locked(path, timeout_s, f"Sealed hours are being changed in {self}"):
            yield

    @contextmanager
    def compacting(self) -> Iterator[None]:
        """See `Archive`."""
        path = self.root / ASIDE / "compaction.lock"
        with locked(path, 0, f"Another compaction is running in {self}"):
            yield

    def staging(self, dataset: str, hour: datetime) -> Path:
        """See `Archive`. The folder is on the archive's own file system."""
        return new_folder(self.root / ASIDE, dataset, hour)

    def replace_hour(self, dataset: str, hour: datetime, staged: Path) -> None:
        """See `Archive`. Atomic; the old content is kept in `.aside` until `sweep`.

        Everything in `staged` must be durable. A reader that listed the hour before and opens it afterwards
        finds no such file and has to list again.
        """
        folder = self.folder(dataset, hour)
        if _same_files(staged, folder):
            return
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            if folder.exists():
                _move_foreign_files(folder, staged)
                atomic_swap.swap(staged, folder)
            else:
                staged.rename(folder)
            durable.sync(folder.parent)
            durable.sync(staged.parent)
        except OSError as error:
            raise disk_error(folder, error) from None

    def sweep(self, grace_s: float | None = None) -> None:
        """See `Archive`. Removes what has been in `.aside` for longer than the grace period."""
        grace_s = GRACE_S if grace_s is None else grace_s
        for path in (self.root / ASIDE).glob("*/*"):
            if not _NEW_FOLDER.fullmatch(path.name):
                continue
            try:
                if time.time() - path.stat().st_ctime > grace_s:  # a swap sets the ctime
                    shutil.rmtree(path)
            except OSError as error:
                raise disk_error(path, error) from None


def _listed(folder: Path) -> Listed:
    """List a folder; list it again where it was swapped meanwhile, so that no file is missed."""
    for _ in range(LISTINGS):
        try:
            names = sorted(name for name in _file_names(folder) if name.endswith(PARQUET))
            data = [local_file(folder / name) for name in names if is_data(name)]
            others = [folder / name for name in names if not is_data(name)]
            manifest = folder / MANIFEST
            return Listed(
                tuple(data),
                local_file(manifest) if manifest.exists() else None,
                tuple(local_file(path) for path in others if path.is_file()),
            )
        except FileNotFoundError as error:
            gone = error.filename
    raise StoreUnavailable(f"{gone} is listed in its folder but cannot be opened there. Remove it.")


def _file_names(folder: Path) -> list[str]:
    """The names in a folder, unordered; empty for a missing folder or a dangling link.

    Raises: `StoreRefused` for a folder without read permission.
    """
    try:
        return [path.name for path in folder.iterdir()]
    except OSError as error:
        if error.errno in _NO_FOLDER:
            return []
        raise StoreRefused(
            f"{folder} cannot be read ({error.strerror}). Make it readable for this user.",
            name=errno.errorcode.get(error.errno or 0, ""),
        ) from None


def _has_data(folder: Path) -> bool:
    return any(is_data(name) for name in _file_names(folder))


def _move_foreign_files(folder: Path, staged: Path) -> None:
    """Move foreign files to the new folder, so that they keep their path when the folders are swapped."""
    for name in _file_names(folder):
        ours = is_data(name) or name == MANIFEST or is_temporary(name)
        if not ours and not (staged / name).exists():
            (folder / name).rename(staged / name)


def _same_files(staged: Path, folder: Path) -> bool:
    names = sorted(name for name in _file_names(staged) if is_data(name))
    if names != sorted(name for name in _file_names(folder) if is_data(name)):
        return False
    return all(filecmp.cmp(staged / name, folder / name, shallow=False) for name in names)


# -- local files, including those of a staged hour -------------------------------------------------


@contextmanager
def durably(
    path: Path, schema: pa.Schema, *, level: int = 3, sorted_by: Sequence[str] = ()
) -> Iterator[Add]:
    """Open a Parquet file for writing table by table; it exists once the block ends without an error.

    Parameters are those of `parquet_writer`.

    Raises: `StoreUnavailable` where the disk is full or failing, `StoreRefused` without write permission.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with parquet_writer(temporary, schema, level=level, sorted_by=sorted_by) as add:
            yield add
        durable.publish(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(path, error) from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_durably(
    path: Path,
    tables: Iterable[pa.Table],
    schema: pa.Schema,
    *,
    level: int = 3,
    sorted_by: Sequence[str] = (),
) -> int:
    """Write one Parquet file, completely or not at all; return its size in bytes. Raises: as `durably`."""
    with durably(path, schema, level=level, sorted_by=sorted_by) as add:
        for table in tables:
            add(table)
    return path.stat().st_size


def stage_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest into the folder that is, or will become, the hour's. Raises: as `write_durably`."""
    path = folder / MANIFEST
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(encoded(manifest))
        durable.publish(temporary, path)
    except OSError as error:
        raise disk_error(path, error) from None


def new_folder(aside: Path, dataset: str, hour: datetime) -> Path:
    """Create a new empty folder below `aside`. Raises: as `write_durably`."""
    path = aside / dataset / f"{hour:%Y-%m-%d-%H}-{uuid.uuid4().hex[:8]}"
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise disk_error(path, error) from None
    return path


@contextmanager
def locked(path: Path, timeout_s: float, what: str) -> Iterator[None]:
    """Hold a file lock, which the kernel releases when the process dies.

    Raises: `StoreUnavailable` on time-out; `what` says what the holder of the lock does.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path, timeout=timeout_s, thread_local=False)
        lock.acquire()
    except filelock.Timeout:
        raise StoreUnavailable(f"{what} ({path} is held). Try again when that is done.") from None
    except OSError as error:
        raise disk_error(path, error) from None
    try:
        yield
    finally:
        lock.release()


def disk_error(path: Path, error: OSError) -> StoreUnavailable | StoreRefused:
    """Translate the error of a file that could not be written."""
    name = errno.errorcode.get(error.errno or 0, "")
    if name in _TRANSIENT:
        what = (
            "No space is left"
            if name in {"ENOSPC", "EDQUOT"}
            else f"The disk failed ({error.strerror})"
        )
        return StoreUnavailable(
            f"{what} for {path}. Make room; loading resumes by itself.", name=name
        )
    return StoreRefused(
        f"{path} cannot be written ({error.strerror}). Set PARQUET_DIR (KALSHI_DATA_DIR, where the archive is on"
        " object storage) to a folder that this user can write.",
        name=name,
    )

"""A local spool between an engine and ClickHouse: rows are written to files, and inserted when ClickHouse answers.

`put` only appends to a list in memory. Once a second a thread writes the collected rows to a file. Another thread
inserts: it joins waiting files of a table, oldest first, into one insert of bounded size, and removes them when their
rows have been found in ClickHouse. While ClickHouse is unreachable the files wait, even after the engine has ended:
the next engine on the folder sends them. A kill can lose the rows since the last file, at most `flush_s`.

    once        The files of an insert are recorded before it (`joined-<table>.json`), and the insert's token is
                computed from their names: after a kill the same files are sent under the same token. Files of an
                earlier engine that are not recorded are first looked up in ClickHouse, by key.
    set aside   A row that the table cannot hold is moved to the folder `refused`, in a separate file with the
                reason beside it (rows.py detects it, or ClickHouse refuses it and takes other rows of that table).
                So is a file that cannot be read. The other rows are sent. If ClickHouse has taken no other row of
                the table, the table is at fault, and its rows wait.
    bounds      `MOST_ROWS` and `MOST_BYTES` in memory, `MOST_FILES` and `MOST_DISK` in the folder. Beyond the
                folder's, rows stay in memory; beyond the memory's, `put` raises: no row is dropped.

No error ends a thread: `trouble` names it, and the work is retried. What a row may contain is in rows.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform import backoff, durable, typed_json
from kalshi_platform.clickhouse.client import Client, connect, translated
from kalshi_platform.errors import StoreError, StoreRefused, StoreUnavailable
from kalshi_platform.inventory.rows import TABLES
from kalshi_platform.inventory.values import InventoryError, shown
from kalshi_platform.settings import Settings

if TYPE_CHECKING:
    from kalshi_platform.clickhouse.verified_inserts import Insert

FLUSH_S = 1.0
MOST_ROWS, MOST_BYTES = 100_000, 256 << 20
"""In memory, while the disk takes nothing; beyond these bounds `put` raises."""
ROW_BYTES = 2_000
"""About the bytes of a row in memory, without its JSON."""
MOST_FILES, MOST_DISK = 500_000, 10 << 30
"""In the folder, including set-aside files: two days without ClickHouse, at two files a second."""
MOST_IN_A_FILE = 100_000
MOST_JOINED_ROWS, MOST_JOINED_BYTES = 50_000, 64 << 20
"""In one insert; a larger file is sent alone."""
COUNTED = 10_000
"""How many files of an earlier engine are opened at a time, to count their rows."""
BACKOFF_S, BACKOFF_LIMIT_S = 0.5, 15.0
REFUSED_IN_A_ROW = 16
"""After this many single rows refused and none taken, the table counts as refusing."""
OF_THE_TABLE = frozenset({60, 81, 16, 164, 192, 193, 194, 497, 516})
"""ClickHouse's error codes that no row causes: table, database, column, rights, user, password."""
SUFFIX, TORN, DAMAGED, WHY = ".arrow", ".tmp", ".damaged", ".txt"
_ENDS = {SUFFIX, TORN, f"{SUFFIX}{DAMAGED}"}
LOCK, REFUSED = "spool.lock", "refused"
REMEDY = (
    "Repair the cause of the refusal, or the rows, and move the .arrow files back into the spool's folder: they are"
    " sent again. Remove what is not wanted."
)
_SENDING = "kalshi_platform.clickhouse.verified_inserts"
"""Imported late, because it loads Polars, which an engine's import should not."""
_TYPE_OF_TS = (
    "SELECT type FROM system.columns"
    " WHERE database = currentDatabase() AND table = {table:String} AND name = 'ts'"
)
_FINE = re.compile(r"DateTime64\([3-9]")
_JSON = ("params_json", "request_json", "response_json", "raw_json")
_NAME = re.compile(rf"[0-9]{{20}}-[0-9a-f]{{32}}-[0-9]{{8}}-(?:{'|'.join(TABLES)})")
_JOINED = re.compile(rf"joined-(?:{'|'.join(TABLES)})\.(?:json|tmp)")

log = logging.getLogger(__name__)


def folder_of(settings: Settings) -> Path:
    """Return the spool folder of the platform's own market maker."""
    return settings.data_dir / "market_maker"


def is_of_a_spool(name: str) -> bool:
    """Whether a name in a spool's folder is one that a spool creates."""
    stem, _, end = name.partition(".")
    return (
        name in {LOCK, REFUSED}
        or bool(_JOINED.fullmatch(name))
        or (bool(_NAME.fullmatch(stem)) and f".{end}" in _ENDS)
    )


@dataclass(frozen=True)
class Status:
    """The status of a spool."""

    oldest_age_s: float
    """Age of the oldest row that is not in ClickHouse, since it was recorded (for an earlier engine's row: since it
    was written to disk); 0 if none waits."""
    rows_waiting: int
    """In memory and in files. An earlier engine's rows count once the sender has opened their files."""
    files_waiting: int
    rows_set_aside: int
    files_set_aside: int
    """Files in `refused`: each has rows of one file, or could not be read."""
    trouble: str | None
    """Current errors, as sentences; None if there are none."""


@dataclass(frozen=True)
class Refused:
    """The content of a spool's folder `refused`."""

    files: int
    rows: int
    why: str
    """The reason of the newest file."""


@dataclass(frozen=True)
class _File:
    """A waiting file."""

    table: str
    rows: int | None
    """None: of an earlier engine, not opened yet."""
    size: int
    since: float
    """Time of its oldest row, on the monotonic clock."""


class _Joined(msgspec.Struct):
    """The files of an insert in progress."""

    files: list[str]


class Spool:
    """Rows waiting for ClickHouse. `put` may be called from any thread, and never waits."""

    def __init__(self, folder: Path, settings: Settings, *, flush_s: float = FLUSH_S) -> None:
        """Lock the folder. Raises `InventoryError` if another engine holds it, or if it is read-only."""
        importlib.import_module(_SENDING)  # now, so that the first trades do not wait for it
        self._folder = folder
        self._settings = settings
        self._flush_s = flush_s
        self._lock = _taken(folder)
        self._run = uuid.uuid4().hex
        self._number = 0
        self._rows: dict[str, list[Mapping[str, Any]]] = {name: [] for name in TABLES}
        self._since: dict[str, float] = {}
        """Time of the oldest row in memory, by table."""
        self._waiting = 0
        self._bytes = 0
        self._guard = threading.Condition()
        self._closing = False
        self._urgent = False
        self._stop_sending = threading.Event()
        self._spooled = threading.Event()
        self._known: dict[str, _File] = {}
        """Waiting files, by stem, oldest first."""
        self._fresh: set[str] = set()
        """Files of this engine that were never sent."""
        self._accepting: set[str] = set()
        """Tables whose rows ClickHouse has taken since the start."""
        self._sifted: set[str] = set()
        """Files whose invalid rows are already set aside."""
        self._begun: dict[str, list[str]] = {}
        """The files of the insert in progress, by table, as in its manifest."""
        self._in_seconds: dict[str, bool] = {}
        """Whether a table has times in whole seconds, as found on this connection."""
        self._problems: list[Exception] = []
        """Errors of this pass of the sender."""
        self._disk_trouble: str | None = None
        self._store_trouble: str | None = None
        for torn in self._ours(
            TORN
        ):  # left by a kill during the write; its rows were still in memory
            torn.unlink()
        for name in TABLES:
            with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):  # looked up by key
                self._begun[name] = typed_json.decode(
                    self._manifest(name).read_bytes(), _Joined
                ).files
        foreign = sorted(p.name for p in folder.glob(f"*{SUFFIX}") if not _NAME.fullmatch(p.stem))
        if foreign:
            log.warning("Spool %s: passed over, for they are not its own: %s.", folder, foreign)
        self._count_refused()
        self._look()
        self._spooled.set()
        self._writer = threading.Thread(target=self._write_on, name="mm-spool", daemon=True)
        self._sender = threading.Thread(target=self._send_on, name="mm-insert", daemon=True)
        self._writer.start()
        self._sender.start()

    def put(self, table: str, row: Mapping[str, Any]) -> None:
        """Take one row. Raises `InventoryError` if there is no space for it, or if the spool is closed."""
        rows, size = self._rows[table], _size(row)
        with self._guard:
            if self._closing:
                raise InventoryError(
                    f"The spool {self._folder} is closed: a row of {table} was not taken."
                    " Record before close()."
                )
            if self._waiting >= MOST_ROWS or self._bytes + size > MOST_BYTES:
                raise InventoryError(
                    f"{self._waiting:,} rows wait for the disk under {self._folder}: {self._disk_trouble}"
                    " Make room there; no further row is taken until then."
                )
            if not rows:
                self._since[table] = time.monotonic()
            rows.append(row)
            self._waiting += 1
            self._bytes += size

    @property
    def trouble(self) -> str | None:
        """Current errors, as sentences; None if there are none."""
        parts = [self._disk_trouble, self._store_trouble, self._said_of_refused()]
        return " ".join(part for part in parts if part) or None

    def status(self) -> Status:
        """Return how far behind ClickHouse is, and what was set aside. Reads neither disk nor database."""
        with self._guard:
            files = list(self._known.values())
            since = [file.since for file in files]
            since += [self._since[name] for name, rows in self._rows.items() if rows]
            return Status(
                max(0.0, time.monotonic() - min(since)) if since else 0.0,
                self._waiting + sum(file.rows or 0 for file in files),
                len(files),
                self._refused.rows,
                self._refused.files,
                self.trouble,
            )

    @property
    def files(self) -> list[Path]:
        """Return the waiting files, oldest first."""
        return self._ours(SUFFIX)

    @property
    def _has_sent_all(self) -> bool:
        return not self._known and not self.files  # listing many files takes a while

    def _ours(self, suffix: str) -> list[Path]:
        """Return the files that a spool has written, by name; others in the folder are never sent or removed."""
        return sorted(p for p in self._folder.glob(f"*{suffix}") if _NAME.fullmatch(p.stem))

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until every row is on disk; False after the timeout."""
        return self._wait_until(lambda: not self._waiting, timeout_s)

    def drain(self, timeout_s: float = 10.0) -> bool:
        """Wait until ClickHouse has every row that it takes; False after the timeout."""
        return self._wait_until(lambda: not self._waiting and self._has_sent_all, timeout_s)

    def close(self, timeout_s: float = 5.0) -> int:
        """Write the remaining rows to disk, try to send them, and end. Return how many files wait for the next start.

        Raises `InventoryError` when the disk would not take the rest.
        """
        with self._guard:
            self._closing = True
            self._guard.notify_all()
        self._writer.join(timeout_s + 5.0)
        self._wait_until(lambda: self._has_sent_all, timeout_s)
        self._stop_sending.set()
        self._spooled.set()
        self._sender.join(5.0)
        lost = self._waiting
        self._lock.release()
        if lost:
            raise InventoryError(
                f"{lost:,} rows could not be written to {self._folder}: {self._disk_trouble}"
            )
        return len(self.files)

    def _wait_until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not done():
            if time.monotonic() >= deadline:
                return False
            with self._guard:
                self._urgent = True
                self._guard.notify_all()
            self._spooled.set()
            time.sleep(0.02)
        return True

    # -- to disk -------------------------------------------------------------------------------

    def _write_on(self) -> None:
        while True:
            with self._guard:
                self._guard.wait_for(lambda: self._closing or self._urgent, self._flush_s)
                closing, self._urgent = self._closing, False
                batches = {name: rows[:MOST_IN_A_FILE] for name, rows in self._rows.items() if rows}
            try:
                for name, rows in batches.items():
                    self._keep(name, rows)
            except Exception as error:  # noqa: BLE001 - the writer goes on whatever it meets, and says it
                self._disk_trouble = _of_the_disk(error)
                log.error("Spool %s: %s", self._folder, self._disk_trouble)
                if closing:
                    return
                time.sleep(self._flush_s)
            else:
                self._disk_trouble = None
                if closing and not self._waiting:
                    return

    def _keep(self, name: str, rows: list[Mapping[str, Any]]) -> None:
        """Write rows to a file, and remove them from memory."""
        if len(self._known) >= MOST_FILES or self._on_disk() >= MOST_DISK:
            raise OSError(
                0,
                f"{len(self._known):,} files wait, and {self._on_disk():,} bytes are in the folder",
            )
        self._number += 1
        # time first: files of an earlier engine are older, and are sent first
        stem = f"{time.time_ns():020d}-{self._run}-{self._number:08d}-{name}"
        path = self._folder / f"{stem}{SUFFIX}"
        table = self._table(name, rows, path)
        taken = time.monotonic()
        with self._guard:
            since = self._since[name]
            self._fresh.add(stem)
        size, in_memory = 0, sum(map(_size, rows))
        if table.num_rows:
            _write(path, table)
            size = path.stat().st_size
        with self._guard:
            del self._rows[name][: len(rows)]
            self._since[name] = taken
            self._waiting -= len(rows)
            self._bytes -= in_memory
            if table.num_rows:
                self._known[stem] = _File(name, table.num_rows, size, since)
        self._spooled.set()

    def _table(self, name: str, rows: list[Mapping[str, Any]], path: Path) -> pa.Table:
        """Convert the rows to Arrow. Rows that cannot be converted are set aside as JSON."""
        schema = TABLES[name].arrow
        try:
            return pa.Table.from_pylist(rows, schema=schema)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            good: list[pa.Table] = []
            wrong: list[tuple[Mapping[str, Any], str]] = []
            for row in rows:
                try:
                    good.append(pa.Table.from_pylist([row], schema=schema))
                except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
                    wrong.append((row, str(error)))
            why = [
                f"row {n} of {path.stem}: {shown(reason)}" for n, (_, reason) in enumerate(wrong)
            ]
            lines = "".join(
                f"{json.dumps(dict(row), default=shown)}\n" for row, _ in wrong
            ).encode()
            aside = self._folder / REFUSED / f"{path.stem}.jsonl"
            self._set_aside(aside, len(wrong), why, lambda: durable.replace(aside, lines))
            return pa.concat_tables(good) if good else schema.empty_table()

    def _on_disk(self) -> int:
        return self._refused_bytes + sum(file.size for file in list(self._known.values()))

    # -- set aside -----------------------------------------------------------------------------

    def _set_aside(
        self, path: Path, rows: int, why: Sequence[str], keep: Callable[[], None]
    ) -> None:
        """Write rows that are not sent to `refused`, with the reasons beside them. Raises `OSError`."""
        path.parent.mkdir(mode=0o750, exist_ok=True)
        durable.replace(path.with_suffix(WHY), "".join(f"{line}\n" for line in why).encode())
        keep()
        log.error("%s: %s rows are set aside, not in ClickHouse: %s", path, rows, why[0])
        self._count_refused()

    def _set_rows_aside(self, path: Path, wrong: Mapping[int, str]) -> None:
        """Set aside the rows of a file with these numbers."""
        numbers = sorted(wrong)
        rows = _opened(path).take(pa.array(numbers, pa.int64()))
        aside = self._folder / REFUSED / path.name
        why = [f"row {n} of {path.stem}: {wrong[n]}" for n in numbers]
        self._set_aside(aside, len(numbers), why, lambda: _write(aside, rows))

    def _set_whole_aside(self, path: Path, why: str) -> None:
        """Set aside a file that cannot be read."""
        aside = self._folder / REFUSED / path.name
        self._set_aside(
            aside, 1, [f"{path.name} cannot be read: {why}"], lambda: _move(path, aside)
        )
        with self._guard:
            self._known.pop(path.stem, None)
            self._fresh.discard(path.stem)

    def _count_refused(self) -> None:
        self._refused = refused_in(self._folder)
        self._refused_bytes = sum(path.stat().st_size for path in _refused_files(self._folder))

    def _said_of_refused(self) -> str | None:
        found = self._refused
        return f"{said_of(found, self._folder)} {REMEDY}" if found.files else None

    # -- to ClickHouse -------------------------------------------------------------------------

    def _send_on(self) -> None:
        client: Client | None = None
        failures = 0
        while not self._stop_sending.is_set():
            self._spooled.clear()
            try:
                self._look()
                self._count()
                if self._known:
                    if client is None:
                        client = connect(self._settings, log_comment="market maker")
                        self._in_seconds.clear()
                    self._send(client)
                    if failures:
                        log.warning("ClickHouse takes the market maker's rows again.")
                failures, self._store_trouble = 0, None
            except Exception as error:
                said = _of_sending(error)
                if said != self._store_trouble:
                    is_foreseen = isinstance(error, StoreError)
                    log.warning(
                        "%s The rows wait in %s.",
                        said,
                        self._folder,
                        exc_info=None if is_foreseen else error,
                    )
                self._store_trouble = said
                if client is not None:
                    with contextlib.suppress(Exception):
                        client.close()
                client = None
                failures += 1
                self._stop_sending.wait(backoff.wait_s(failures, BACKOFF_S, BACKOFF_LIMIT_S))
            else:
                self._spooled.wait(self._flush_s)
        if client is not None:
            with contextlib.suppress(Exception):
                client.close()

    def _look(self) -> None:
        """Find new files: an earlier engine's, and those that a person has moved back."""
        with self._guard:
            before = set(self._known)
        there = {path.stem: path for path in self.files}
        gone = [stem for stem in before if stem not in there]
        new = {stem: path for stem, path in there.items() if stem not in before}
        now, wall_ns = time.monotonic(), time.time_ns()
        found = {}
        for stem, path in new.items():
            with contextlib.suppress(FileNotFoundError):
                age = max(0, wall_ns - int(stem[:20])) / 1e9
                name = stem.rpartition("-")[2]
                found[stem] = _File(name, None, path.stat().st_size, now - age)
        with self._guard:
            for stem in gone:
                self._known.pop(stem, None)
                self._fresh.discard(stem)
            self._known = {**found, **self._known}

    def _count(self) -> None:
        """Count the rows of an earlier engine's files, and the files that are still set aside: a person may have moved some."""
        with self._guard:
            uncounted = [stem for stem, file in self._known.items() if file.rows is None]
        for stem in uncounted[:COUNTED]:
            rows = _rows_in(self._folder / f"{stem}{SUFFIX}")
            with self._guard:
                if stem in self._known:
                    self._known[stem] = replace(self._known[stem], rows=rows)
        if self._refused.files:
            with contextlib.suppress(OSError):  # sending does not wait for it
                self._count_refused()

    def _send(self, client: Client) -> None:
        """Send all waiting files. After the others are sent, raise the first error."""
        waiting: dict[str, list[str]] = {name: [] for name in TABLES}
        with self._guard:
            for stem in sorted(self._known):
                waiting[self._known[stem].table].append(stem)
        self._problems = []
        failed_groups: list[tuple[_Group, Exception]] = []
        for name, stems in waiting.items():
            for group in self._groups(name, stems):
                if self._stop_sending.is_set():
                    return
                try:
                    self._insert(client, group)
                except StoreUnavailable:
                    raise
                except Exception as error:  # noqa: BLE001 - the other tables go on; it is raised at the end
                    if _is_of_the_table(error):
                        self._problems.append(error)
                        break
                    failed_groups.append((group, error))
        for group, reason in failed_groups:
            self._sift(client, group)
            if any(path.exists() for path in group.paths):
                self._problems.append(reason)
        if self._problems:
            raise self._problems[0]

    def _groups(self, name: str, stems: Sequence[str]) -> Iterator[_Group]:
        """Yield the waiting files of a table in groups: first those of an interrupted insert."""
        group = _Group(name, is_under_way=True)
        begun = self._begun.get(name, [])
        for stem in begun if set(begun) <= set(stems) else ():
            self._add(group, stem)
        if begun and [path.stem for path in group.paths] == begun:
            yield group
        elif begun:  # some were removed since, or by a person: the others are looked up by key
            self._end(name)
            begun = []
        group = _Group(name)
        for stem in stems:
            if stem in begun or self._add(group, stem):
                continue
            yield group
            group = _Group(name)
            self._add(group, stem)
        if group.paths:
            yield group

    def _add(self, group: _Group, stem: str) -> bool:
        """Add a file's rows to a group; False if there is no room for them."""
        path = self._folder / f"{stem}{SUFFIX}"
        known = self._known.get(stem)
        if group.paths and not group.is_under_way and known is not None and group.is_full(known):
            return False
        rows = self._read(group.name, path)
        if rows is not None:
            group.add(path, rows)
        return True

    def _read(self, name: str, path: Path) -> pa.Table | None:
        """Return the rows of a file that the table can hold, and set the others aside; None if there are none."""
        try:
            return self._good_rows(name, path)
        except FileNotFoundError:  # a person has moved it
            return None
        except OSError as error:  # the other files are still sent
            self._problems.append(StoreUnavailable(f"{path}: {error.strerror or error}."))
            return None

    def _good_rows(self, name: str, path: Path) -> pa.Table | None:
        try:
            rows, wrong = TABLES[name].sifted(_opened(path))
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            self._set_whole_aside(path, shown(str(error)))  # a damaged file may raise anything
            return None
        if wrong and path.stem not in self._sifted:
            self._set_rows_aside(path, wrong)
            self._sifted.add(path.stem)
        if not rows.num_rows:
            self._remove([path])
            return None
        return rows

    def _insert(self, client: Client, group: _Group) -> None:
        """Send a group, verify that its rows are in ClickHouse, and remove its files."""
        from kalshi_platform.clickhouse import verified_inserts

        name, stems = group.name, [path.stem for path in group.paths]
        it = self._as_insert(client, name, group.rows, group.token)
        if not group.is_under_way and not self._fresh.issuperset(stems):
            missing = verified_inserts.missing(client, it)
            if len(missing) != it.rows.num_rows:
                self._insert_part(client, it, missing)
                self._accepting.add(name)
                self._remove(group.paths)
                return
        if not group.is_under_way:
            durable.replace(self._manifest(name), msgspec.json.encode(_Joined(stems)))
            self._begun[name] = stems
        self._fresh.difference_update(stems)
        try:
            verified_inserts.insert(client, it)
        except Exception as error:
            if not isinstance(error, StoreUnavailable) and not _is_of_the_table(error):
                self._end(name)  # none of it is there, or it is looked up by key
            raise
        self._accepting.add(name)
        self._end(name)
        self._remove(group.paths)

    def _as_insert(self, client: Client, name: str, rows: pa.Table, token: str) -> Insert:
        """Truncate times to the table's precision: an engine's own table may have whole seconds."""
        from kalshi_platform.clickhouse import verified_inserts

        if name not in self._in_seconds:
            with translated():
                found = client.query(_TYPE_OF_TS, parameters={"table": name}).result_rows
            self._in_seconds[name] = bool(found) and _FINE.search(str(found[0][0])) is None
        if self._in_seconds[name]:
            at = rows.column_names.index("ts")
            seconds = pc.floor_temporal(rows["ts"], unit="second")
            rows = rows.set_column(at, rows.schema.field("ts"), seconds)
        return verified_inserts.Insert(name, rows, token, TABLES[name].key)

    def _insert_part(self, client: Client, it: Insert, numbers: Sequence[int]) -> None:
        from kalshi_platform.clickhouse import verified_inserts

        if numbers:
            digest = hashlib.blake2b(repr(list(numbers)).encode(), digest_size=8).hexdigest()
            part = it.rows.take(pa.array(numbers, pa.int64()))
            verified_inserts.insert(client, replace(it, rows=part, token=f"{it.token}:{digest}"))

    def _sift(self, client: Client, group: _Group) -> None:
        """Send the files of a refused group one by one, and set aside the rows that ClickHouse refuses."""
        for path in group.paths:
            if self._stop_sending.is_set():
                return
            rows = self._read(group.name, path)
            if rows is None:
                continue
            try:
                self._sift_file(client, group.name, path, rows)
            except StoreUnavailable:
                raise
            except Exception as error:  # noqa: BLE001 - the other files go on; it is tried again
                self._problems.append(error)

    def _sift_file(self, client: Client, name: str, path: Path, rows: pa.Table) -> None:
        refused = self._refused_rows(client, name, path.stem, rows)
        if refused:
            if name not in self._accepting:
                return  # it has taken none: the table is at fault
            _, wrong = TABLES[name].sifted(_opened(path))
            right = [n for n in range(rows.num_rows + len(wrong)) if n not in wrong]
            self._set_rows_aside(path, wrong | {right[n]: why for n, why in refused.items()})
        self._remove([path])

    def _refused_rows(
        self, client: Client, name: str, token: str, rows: pa.Table
    ) -> Mapping[int, str]:
        """Insert rows by bisection; return which of them ClickHouse refuses, and why."""
        from kalshi_platform.clickhouse import verified_inserts

        it = self._as_insert(client, name, rows, token)
        parts = [verified_inserts.missing(client, it)]
        refused: dict[int, str] = {}
        while parts and (name in self._accepting or len(refused) < REFUSED_IN_A_ROW):
            numbers = parts.pop()
            try:
                self._insert_part(client, it, numbers)
            except StoreRefused as error:
                if _is_of_the_table(error):
                    raise
                half = len(numbers) // 2
                if half:
                    parts += [numbers[half:], numbers[:half]]
                else:
                    refused[numbers[0]] = str(error)
            else:
                if numbers:
                    self._accepting.add(name)
        return refused

    def _manifest(self, name: str) -> Path:
        return self._folder / f"joined-{name}.json"

    def _end(self, name: str) -> None:
        """Remove the record of an insert in progress, durably, before its files are removed or sent in another group."""
        self._begun.pop(name, None)
        self._manifest(name).unlink(missing_ok=True)
        durable.sync(self._folder)

    def _remove(self, paths: Sequence[Path]) -> None:
        """Remove files whose rows are all in ClickHouse or set aside."""
        for path in paths:
            path.unlink(missing_ok=True)
            self._sifted.discard(path.stem)
            with self._guard:
                self._known.pop(path.stem, None)
                self._fresh.discard(path.stem)


@dataclass
class _Group:
    """Files of a table that are sent in one insert."""

    name: str
    is_under_way: bool = False
    """Whether it was sent before with an unknown result."""
    paths: list[Path] = field(default_factory=list)
    tables: list[pa.Table] = field(default_factory=list)
    count: int = 0
    size: int = 0

    def add(self, path: Path, rows: pa.Table) -> None:
        """Add a file."""
        self.paths.append(path)
        self.tables.append(rows)
        self.count += rows.num_rows
        self.size += rows.nbytes

    def is_full(self, file: _File) -> bool:
        """Whether the insert would exceed its bounds with this file."""
        return (
            self.count + (file.rows or 0) > MOST_JOINED_ROWS
            or self.size + file.size > MOST_JOINED_BYTES
        )

    @property
    def rows(self) -> pa.Table:
        """All rows, in the files' order."""
        return pa.concat_tables(self.tables)

    @property
    def token(self) -> str:
        """The insert's deduplication token, a function of the files' names."""
        first, *more = [path.stem for path in self.paths]
        if not more:
            return first
        digest = hashlib.blake2b("\n".join(more).encode(), digest_size=8).hexdigest()
        return f"{first}+{len(more)}:{digest}"


# -- what was set aside ------------------------------------------------------------------------


def refused_in(folder: Path) -> Refused:
    """The content of a spool's folder `refused`. Raises `OSError` where it cannot be read."""
    kept = [path for path in _refused_files(folder) if path.suffix != WHY]
    reasons = [said for path in kept if (said := path.with_suffix(WHY)).exists()]
    newest = max(reasons, key=lambda path: path.stat().st_mtime_ns, default=None)
    why = (
        newest.read_text(errors="replace").partition("\n")[0] if newest is not None else "no reason"
    )
    return Refused(len(kept), sum(_rows_in(path) for path in kept), why)


def said_of(found: Refused, folder: Path) -> str:
    """Describe the set-aside files in a sentence."""
    return (
        f"{found.rows:,} rows in {found.files:,} files are set aside in {folder / REFUSED}, and are not in"
        f" ClickHouse; the newest: {found.why}."
    )


def oldest_in(folder: Path) -> tuple[int, float]:
    """Return (the number of files waiting in a spool's folder, the age of the oldest in seconds)."""
    stems = sorted(p.stem for p in folder.glob(f"*{SUFFIX}") if _NAME.fullmatch(p.stem))
    if not stems:
        return 0, 0.0
    return len(stems), max(0.0, (time.time_ns() - int(stems[0][:20])) / 1e9)


def _refused_files(folder: Path) -> list[Path]:
    aside = folder / REFUSED
    return sorted(path for path in aside.iterdir() if path.is_file()) if aside.is_dir() else []


def _rows_in(path: Path) -> int:
    """Return the number of rows of a file; one that cannot be read counts as one."""
    try:
        if path.suffix == ".jsonl":
            return path.read_bytes().count(b"\n")
        return int(_opened(path).num_rows)
    except Exception:  # noqa: BLE001 - a damaged file may raise anything
        return 1


# -- files -------------------------------------------------------------------------------------


def _opened(path: Path) -> pa.Table:
    with pa.OSFile(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def _move(path: Path, to: Path) -> None:
    path.rename(to)
    durable.sync(to.parent)


def _write(path: Path, table: pa.Table) -> None:
    """Write a file durably and atomically."""
    draft = path.with_suffix(TORN)
    with draft.open("wb") as file, pa.ipc.new_file(file, table.schema) as stream:
        stream.write_table(table)
    durable.publish(draft, path)


def _size(row: Mapping[str, Any]) -> int:
    """Estimate the bytes of a row in memory; only its JSON can be large."""
    return ROW_BYTES + sum(len(row[name]) for name in _JSON if isinstance(row.get(name), str))


def _is_of_the_table(error: Exception) -> bool:
    """Whether the error is not a row's: it is the table's, the rights', or the connection's."""
    return isinstance(error, StoreRefused) and (error.code in OF_THE_TABLE or error.code is None)


def _of_the_disk(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"the disk refuses: {error.strerror or error}."
    return f"rows cannot be written ({type(error).__name__}: {shown(str(error))})."


def _of_sending(error: Exception) -> str:
    if isinstance(error, StoreError):
        return str(error)
    return f"Rows cannot be sent ({type(error).__name__}: {shown(str(error))})."


def _taken(folder: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(folder / LOCK)
    try:
        folder.mkdir(mode=0o750, parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InventoryError(
            f"Another engine writes to the spool {folder}. Give each engine a folder of its own."
        ) from None
    except OSError as error:
        raise InventoryError(
            f"The spool {folder} cannot be written ({error.strerror}). Give a folder that can."
        ) from None
    return lock

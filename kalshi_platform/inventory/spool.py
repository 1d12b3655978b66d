"""A local spool between an engine and ClickHouse: rows in, files on disk, inserts when it answers.

`put` only appends to a list in memory. One thread writes what has come to a file, once a second;
another inserts the files in order and removes each when its rows have been seen in ClickHouse. A file is
one insert, and its name is the insert's token: however often it is sent, its rows are stored once. With
ClickHouse away the files wait, past the end of the engine too: the next engine on the folder sends them.

What a kill can take is what has come since the last file, at most `flush_s`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock
import pyarrow as pa

from kalshi_platform.durable import sync
from kalshi_platform.inventory.rows import TABLES
from kalshi_platform.inventory.semantics import InventoryError
from kalshi_platform.settings import Settings
from kalshi_platform.storage import verified_inserts
from kalshi_platform.storage.clickhouse import Client, connect
from kalshi_platform.storage.errors import StoreError, StoreUnavailable
from kalshi_platform.storage.verified_inserts import Insert

FLUSH_S = 1.0
MOST_ROWS = 1_000_000
"""In memory, while the disk takes nothing; beyond that `put` refuses."""
MOST_IN_A_FILE = 100_000
BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0, 15.0)
SUFFIX, TORN, DAMAGED = ".arrow", ".tmp", ".damaged"
_ENDS = {SUFFIX, TORN, f"{SUFFIX}{DAMAGED}"}
LOCK = "spool.lock"
_NAME = re.compile(rf"[0-9]{{20}}-[0-9a-f]{{32}}-[0-9]{{8}}-(?:{'|'.join(TABLES)})")

log = logging.getLogger(__name__)


def folder_of(settings: Settings) -> Path:
    """The spool of the platform's own market maker."""
    return settings.data_dir / "market_maker"


def is_of_a_spool(name: str) -> bool:
    """Whether a file in a spool's folder is its own, by its name."""
    stem, _, end = name.partition(".")
    return name == LOCK or (bool(_NAME.fullmatch(stem)) and f".{end}" in _ENDS)


class Spool:
    """Rows on their way to ClickHouse. `put` may be called from any thread, and never waits."""

    def __init__(self, folder: Path, settings: Settings, *, flush_s: float = FLUSH_S) -> None:
        """Take the folder. Raises `InventoryError` when another engine has it, or it is read-only."""
        self._folder = folder
        self._settings = settings
        self._flush_s = flush_s
        self._lock = _taken(folder)
        self._run = uuid.uuid4().hex
        self._number = 0
        self._rows: dict[str, list[Mapping[str, Any]]] = {name: [] for name in TABLES}
        self._waiting = 0
        self._guard = threading.Condition()
        self._closing = False
        self._urgent = False
        self._stop_sending = threading.Event()
        self._spooled = threading.Event()
        self.trouble: str | None = None
        """Why rows are not getting on at the moment, as a sentence; None when all is well."""
        for torn in self._ours(TORN):  # a kill in mid-write; its rows were still in memory
            torn.unlink()
        foreign = sorted(p.name for p in folder.glob(f"*{SUFFIX}") if p not in self.files)
        if foreign:
            log.warning("Spool %s: passed over, for they are not its own: %s.", folder, foreign)
        self._spooled.set()
        self._writer = threading.Thread(target=self._write_on, name="mm-spool", daemon=True)
        self._sender = threading.Thread(target=self._send_on, name="mm-insert", daemon=True)
        self._writer.start()
        self._sender.start()

    def put(self, table: str, row: Mapping[str, Any]) -> None:
        """Take one row. Raises `InventoryError` when a million rows wait for the disk."""
        with self._guard:
            if self._waiting >= MOST_ROWS:
                raise InventoryError(
                    f"{self._waiting:,} rows wait for the disk under {self._folder}: {self.trouble}"
                    " Make room there; no further row is taken until then."
                )
            self._rows[table].append(row)
            self._waiting += 1

    @property
    def files(self) -> list[Path]:
        """What waits for ClickHouse, oldest first."""
        return self._ours(SUFFIX)

    def _ours(self, suffix: str) -> list[Path]:
        """The files that a spool has written, by name; others in the folder are not ours to send or remove."""
        return sorted(p for p in self._folder.glob(f"*{suffix}") if _NAME.fullmatch(p.stem))

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until everything that has come is on disk; False when it is not in time."""
        return self._wait_until(lambda: not self._waiting, timeout_s)

    def drain(self, timeout_s: float = 10.0) -> bool:
        """Wait until ClickHouse has everything that has come; False when it has not in time."""
        return self._wait_until(lambda: not self._waiting and not self.files, timeout_s)

    def close(self, timeout_s: float = 5.0) -> int:
        """Write the rest to disk, try to send it, end. Returns how many files wait for another start.

        Raises `InventoryError` when the disk would not take the rest.
        """
        with self._guard:
            self._closing = True
            self._guard.notify_all()
        self._writer.join(timeout_s + 5.0)
        self._wait_until(lambda: not self.files, timeout_s)
        self._stop_sending.set()
        self._spooled.set()
        self._sender.join(5.0)
        lost = self._waiting
        self._lock.release()
        if lost:
            raise InventoryError(
                f"{lost:,} rows could not be written to {self._folder}: {self.trouble}"
            )
        return len(self.files)

    def _wait_until(self, done: Any, timeout_s: float) -> bool:
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
                    self._write(name, rows)
                    with self._guard:
                        del self._rows[name][: len(rows)]
                        self._waiting -= len(rows)
                    self._spooled.set()
            except OSError as error:
                self.trouble = f"the disk refuses: {error.strerror}."
                log.error("Spool %s: %s", self._folder, self.trouble)
                if closing:
                    return
                time.sleep(self._flush_s)
            else:
                if closing and not self._waiting:
                    return

    def _write(self, name: str, rows: list[Mapping[str, Any]]) -> None:
        table = pa.Table.from_pylist(rows, schema=TABLES[name].arrow)
        self._number += 1
        # time first: the files of an engine before this one are older, and go first
        stem = f"{time.time_ns():020d}-{self._run}-{self._number:08d}-{name}"
        draft = self._folder / f"{stem}{TORN}"
        with draft.open("wb") as file:
            with pa.ipc.new_file(file, table.schema) as stream:
                stream.write_table(table)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(self._folder / f"{stem}{SUFFIX}")
        sync(self._folder)

    # -- to ClickHouse -------------------------------------------------------------------------

    def _send_on(self) -> None:
        client: Client | None = None
        failures = 0
        while not self._stop_sending.is_set():
            self._spooled.clear()
            try:
                if self.files:
                    client = client or connect(self._settings, log_comment="market maker")
                    self._send(client)
                    if failures:
                        log.warning("ClickHouse takes the market maker's rows again.")
                    failures, self.trouble = 0, None
            except StoreError as error:
                if str(error) != self.trouble:
                    log.warning("%s The rows wait in %s.", error, self._folder)
                self.trouble = str(error)
                if client is not None:
                    with contextlib.suppress(StoreError):
                        client.close()
                client = None
                wait = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
                failures += 1
                self._stop_sending.wait(wait)
            else:
                self._spooled.wait(self._flush_s)
        if client is not None:
            client.close()

    def _send(self, client: Client) -> None:
        refused: StoreError | None = None
        stuck: set[str] = set()
        for path in self.files:
            if self._stop_sending.is_set():
                return
            name = path.stem.rpartition("-")[2]
            if name in stuck:
                continue  # in order within a table; the others go on
            try:
                rows = _rows_of(path)
                if rows is None:
                    continue
                verified_inserts.insert(client, Insert(name, rows, path.stem, TABLES[name].key))
            except StoreError as error:
                stuck.add(name)
                refused = error
            else:
                path.unlink()
        if refused is not None:
            raise refused


def _rows_of(path: Path) -> pa.Table | None:
    """What a file holds. One that is damaged is set aside, and the others do not wait for it: None.

    Raises `StoreUnavailable` where the disk does not give it.
    """
    try:
        with pa.OSFile(str(path)) as file:
            return pa.ipc.open_file(file).read_all()
    except (pa.ArrowException, OSError) as error:  # Arrow's own are OSErrors without a number, too
        if isinstance(error, OSError) and error.errno is not None:
            raise StoreUnavailable(f"{path} cannot be read ({error.strerror}).") from None
        aside = path.rename(path.with_name(f"{path.name}{DAMAGED}"))
        log.error(
            "%s is damaged (%s): its rows are not in ClickHouse. The file is kept as %s; rename it back where it"
            " can be mended.",
            path,
            error,
            aside.name,
        )
        return None


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

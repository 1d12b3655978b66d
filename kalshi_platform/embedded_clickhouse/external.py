"""Tables whose rows come with a query, as files of a form: ClickHouse's external data.

Each is a temporary table in memory on the query's own connection, so no other request can see it, and it is dropped
with the query. Its columns may be names and types only, its format must be on the list. The memory of one request's
tables and of all requests' together is bounded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from kalshi_platform.embedded_clickhouse.answers import ClickHouseError
from kalshi_platform.embedded_clickhouse.statement import split_at_commas

REQUEST_BYTES = 256 * 1024 * 1024
"""Memory of one request's tables."""
TOTAL_BYTES = 1024 * 1024 * 1024
"""Memory of all requests' tables together."""
PATIENCE_S = 30.0
"""Seconds that a request waits for other requests' tables to be dropped."""


@dataclass(frozen=True)
class Table:
    """An external table of a request."""

    name: str
    columns: str
    """Names and types, as in CREATE TABLE."""
    format: str
    data: IO[bytes]


def tables(files: Mapping[str, IO[bytes]], options: dict[str, str]) -> tuple[Table, ...]:
    """The tables of a form's files; takes their `NAME_structure`, `NAME_types` and `NAME_format` out of the options.

    Raises `ClickHouseError` for a file without columns.
    """
    return tuple(_table(name, data, options) for name, data in files.items())


def _table(name: str, data: IO[bytes], options: dict[str, str]) -> Table:
    structure, types, data_format = (
        options.pop(f"{name}_{part}", "").strip() for part in ("structure", "types", "format")
    )
    if not structure and not types:
        raise ClickHouseError(
            36,
            "BAD_ARGUMENTS",
            f"The external table {name} has no columns: give {name}_structure (names and types) or {name}_types",
        )
    numbered = (f"_{n} {kind}" for n, kind in enumerate(split_at_commas(types), 1))
    return Table(name, structure or ", ".join(numbered), data_format or "TabSeparated", data)


class Memory:
    """The memory of all requests' tables. Thread-safe."""

    def __init__(self, total: int = TOTAL_BYTES, patience_s: float = PATIENCE_S) -> None:
        self._free = total
        self._patience_s = patience_s
        self._changed = threading.Condition()

    @contextmanager
    def reserved(self) -> Iterator[Reservation]:
        """Context manager: the memory of one request's tables. Raises `ClickHouseError` if there is none in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._free >= REQUEST_BYTES, self._patience_s):
                raise ClickHouseError(
                    241,
                    "MEMORY_LIMIT_EXCEEDED",
                    f"The external tables of running queries hold {TOTAL_BYTES // 2**20} MiB: send the query again"
                    " when some of them have ended",
                )
            self._free -= REQUEST_BYTES
        reservation = Reservation(self)
        try:
            yield reservation
        finally:
            self.give_back(reservation.size)

    def give_back(self, size: int) -> None:
        """Make reserved memory available."""
        with self._changed:
            self._free += size
            self._changed.notify_all()


class Reservation:
    """What one request has reserved: at first all that it may use, then what its tables hold."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.size = REQUEST_BYTES
        self.tables: list[str] = []
        """The tables that were created, as quoted names."""

    def shrink(self, size: int) -> None:
        """Give back all but `size` bytes."""
        kept = min(size, self.size)
        self._memory.give_back(self.size - kept)
        self.size = kept

"""Detection of spoiled parts, whose files are not what was written, and their removal at the start.

The engine does not abort a merge whose writes fail (a full disk, a quota): it activates the new part with short or
empty files, and deletes the parts from which it was merged. Therefore the engine keeps those sources for
`SOURCES_KEPT_S`, its failed writes are monitored (failed_writes.py), and spoiled parts are found by comparing file
sizes with each part's `checksums.txt`. Once a spoiled part is active, the process ends, since its memory no longer
matches its disk. At the next start the part is moved to the table's `detached` folder before the engine opens the
data folder, and the engine uses the part's sources instead.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lz4.block
import zstandard

from kalshi_platform import durable

log = logging.getLogger(__name__)

SOURCES_KEPT_S = 480
"""Seconds for which the sources of a merge are kept: ClickHouse's default, which chDB lacks."""
SET_ASIDE = "broken-on-start_"
"""ClickHouse's prefix for a part that it sets aside at its start."""

_PART = re.compile(r"[0-9A-Za-z-]+_(?P<first>\d+)_(?P<last>\d+)_\d+(?:_\d+)?")
_CHECKSUMS = "checksums.txt"
_HEAD, _VERSION = b"checksums format version: ", b"4\n"
_HASH_BYTES = 16
_COLUMNS = "columns.txt"
LONGEST_BLOCK_BYTES = 64 * 1024 * 1024
"""Longest decompressed block of a `checksums.txt`; the engine's are at most 1 MiB."""
UNLISTED = frozenset(
    {_COLUMNS, "columns_substreams.txt", "default_compression_codec.txt", "metadata_version.txt"}
)
"""Files that `checksums.txt` does not list; none may be empty, and only the first is in every part."""


class UnknownFormat(ValueError):
    """A list of checksums in an unknown format."""


@dataclass(frozen=True)
class Spoiled:
    """A part that cannot be read completely."""

    path: Path
    why: str


def spoiled(path: Path) -> Iterator[Spoiled]:
    """The spoiled parts of the data folder `path`, ordered by name.

    It may run beside the engine: a part that the engine removes meanwhile is skipped.
    """
    tables = (table for some in _folders(path / "engine" / "store") for table in _folders(some))
    for part in (part for table in tables for part in _folders(table)):
        if _PART.fullmatch(part.name):
            try:
                why = _fault(part)
            except FileNotFoundError as missing:
                if not part.exists():
                    continue
                why = f"{Path(missing.filename).name} is missing"
            if why:
                yield Spoiled(part, why)


def _folders(path: Path) -> list[Path]:
    """The folders in a folder, sorted; empty if it was removed meanwhile."""
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir())
    except FileNotFoundError:
        return []


def set_aside(path: Path) -> None:
    """Move the spoiled parts of the data folder `path` away before the engine opens it, and log each.

    Raises `OSError` if one cannot be moved.
    """
    for found in list(spoiled(path)):
        table = found.path.parent
        detached = table / "detached"
        detached.mkdir(mode=0o750, exist_ok=True)
        target = detached / f"{SET_ASIDE}{found.path.name}"
        number = 0
        while target.exists():
            number += 1
            target = detached / f"{SET_ASIDE}{found.path.name}_try{number}"
        found.path.rename(target)
        durable.sync(detached)
        durable.sync(table)
        sources = sum(_within(other.name, found.path.name) for other in table.iterdir())
        log.error(
            "A part of a table cannot be read, as after a failed write (%s), and was moved to %s. %s",
            found.why,
            target,
            f"{sources or 'No'} parts of the same blocks take its place;"
            " `kalshi-platform proof` says whether rows are missing.",
        )


def _within(name: str, made: str) -> bool:
    """Whether the blocks of the part `name` are among those of the part `made`."""
    one, other = _PART.fullmatch(name), _PART.fullmatch(made)
    if one is None or other is None or name.partition("_")[0] != made.partition("_")[0]:
        return False
    return int(one["first"]) >= int(other["first"]) and int(one["last"]) <= int(other["last"])


def _fault(part: Path) -> str:
    """The fault of a part's files; empty if there is none. Raises `FileNotFoundError`."""
    for name in sorted(UNLISTED):
        file = part / name
        if (name == _COLUMNS or file.exists()) and not file.stat().st_size:
            return f"{name} is empty"
    try:
        listed = sizes((part / _CHECKSUMS).read_bytes())
    except UnknownFormat:
        return ""  # an unknown format is left to the engine
    except ValueError as error:
        return f"{_CHECKSUMS}: {error}"
    for name, size in listed.items():
        file = part / name
        if file.is_dir():  # a projection
            if why := _fault(file):
                return f"{name}: {why}"
        elif (found := file.stat().st_size) != size:
            return f"{name} has {found:,} bytes of {size:,}"
    return ""


def sizes(checksums: bytes) -> dict[str, int]:
    """The size of each file that a `checksums.txt` lists.

    Version 4: a line of text, then compressed blocks, which hold for each file its name, size and hash, and if it is
    compressed also its decompressed size and hash. Raises `UnknownFormat` for another version, and `ValueError` if
    bytes are missing.
    """
    if not checksums.startswith(_HEAD):
        raise ValueError("its first line is incomplete")
    if not checksums.startswith(_VERSION, len(_HEAD)):
        raise UnknownFormat("not of version 4")
    reader = _Reader(b"".join(_unpacked(checksums[len(_HEAD + _VERSION) :])))
    found = {}
    for _ in range(reader.number()):
        name = reader.take(reader.number()).decode()
        found[name] = reader.number()
        reader.take(_HASH_BYTES)
        if reader.take(1) != b"\0":
            reader.number()
            reader.take(_HASH_BYTES)
    return found


def _unpacked(data: bytes) -> Iterator[bytes]:
    """Decompress ClickHouse's blocks: hash, method, both sizes, data."""
    reader = _Reader(data)
    while not reader.at_end():
        reader.take(_HASH_BYTES)
        method = reader.take(1)[0]
        packed, plain = (int.from_bytes(reader.take(4), "little") for _ in range(2))
        block = reader.take(packed - 9)
        if plain > LONGEST_BLOCK_BYTES:
            raise ValueError(f"a block of {plain:,} bytes")
        try:
            if method == 0x02:
                yield block
            elif method == 0x82:
                yield lz4.block.decompress(block, uncompressed_size=plain)
            elif method == 0x90:
                yield zstandard.ZstdDecompressor().decompress(block, max_output_size=plain)
            else:
                raise UnknownFormat(f"the compression {method:#x} is unknown")
        except (lz4.block.LZ4BlockError, zstandard.ZstdError) as error:
            raise ValueError(str(error)) from error


class _Reader:
    """Reads bytes in order. Raises `ValueError` if they end too early."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def at_end(self) -> bool:
        return self._at == len(self._data)

    def take(self, count: int) -> bytes:
        end = self._at + count
        if count < 0 or end > len(self._data):
            raise ValueError("it ends too early")
        piece = self._data[self._at : end]
        self._at = end
        return piece

    def number(self) -> int:
        """Read a variable-length integer: seven bits per byte, the lowest first."""
        value, shift = 0, 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

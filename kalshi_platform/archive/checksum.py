"""A checksum of rows that is independent of their order, their files and their encoding.

Every row is hashed to a 64-bit number from the exact values of its columns; the sum over all rows (mod 2**64)
is the checksum. Two stores hold the same rows if count and checksum agree. The hash is splitmix64 (Steele,
Lea and Flood, "Fast splittable pseudorandom number generators", 2014).

Some columns were added later than the others (`schema.LATER`). A row without them has the checksum that it had
before these columns existed, so manifests from that time stay valid.
Counting markets and times belongs in `row_statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kalshi_platform.schema import LATER

U64 = npt.NDArray[np.uint64]
_NULL = np.uint64(0x9E3779B97F4A7C15)
HASHED_VALUES = 4096
LONG_BYTES = 4096
_LATER = frozenset(name for group in LATER for name in group)
_NONE = (0,) * len(LATER)


@dataclass(frozen=True)
class Content:
    """Count and checksums of rows. Those of a union are the sum of those of its parts."""

    rows: int = 0
    total: int = 0
    """The checksum."""
    earlier: tuple[int, ...] = _NONE
    """The checksums without the columns of each group of `LATER` and of those after it."""
    filled: tuple[int, ...] = _NONE
    """For each group of `LATER`, the number of rows that have any of its columns."""

    def __add__(self, other: Content) -> Content:
        return Content(
            self.rows + other.rows,
            (self.total + other.total) % 2**64,
            tuple((a + b) % 2**64 for a, b in zip(self.earlier, other.earlier, strict=True)),
            tuple(a + b for a, b in zip(self.filled, other.filled, strict=True)),
        )

    def agrees_with(self, other: Content) -> bool:
        """Whether both are the same rows, in the columns that `comparable` allows."""
        groups = comparable(self, other)
        return (self.rows, self._sum(groups)) == (other.rows, other._sum(groups))

    def _sum(self, groups: int) -> int:
        """The checksum with the first `groups` groups of `LATER`."""
        return (*self.earlier, self.total)[groups]


def comparable(one: Content, other: Content) -> int:
    """How many groups of `LATER`, from the first on, can be compared between two stores of the same rows.

    A group that is in more rows of one store cannot: that one was rebuilt since the columns exist, the other not.
    """
    for k, (a, b) in enumerate(zip(one.filled, other.filled, strict=True)):
        in_all = a == one.rows and b == other.rows
        if not in_all and (a, one.rows) != (b, other.rows):
            return k
    return len(LATER)


def rows_checksum(table: pa.Table) -> int:
    """Checksum of a table; the checksum of a union is the sum (mod 2**64) of those of its parts."""
    return content(table).total


def content(table: pa.Table) -> Content:
    """Count and checksums of a table."""
    if not table.num_rows:
        return Content()
    rows = row_numbers(table, groups=0)
    sums, filled = [int(rows.sum(dtype=np.uint64))], []
    for group in LATER:
        rows, valid = _with_group(rows, table, group)
        sums.append(int(rows.sum(dtype=np.uint64)))
        filled.append(valid)
    return Content(table.num_rows, sums[-1], tuple(sums[:-1]), tuple(filled))


def row_numbers(table: pa.Table, *, groups: int = len(LATER)) -> U64:
    """The hash of each row, with the first `groups` groups of `LATER` where their columns are not null."""
    rows: U64 = np.zeros(table.num_rows, dtype=np.uint64)
    if not table.num_rows:
        return rows
    for name in table.column_names:
        if name not in _LATER:
            rows = _mix_column(rows, name, table[name])
    for group in LATER[:groups]:
        rows, _ = _with_group(rows, table, group)
    return rows


def _with_group(rows: U64, table: pa.Table, group: Sequence[str]) -> tuple[U64, int]:
    """Mix a group's columns into the row hashes where they are not null; also count the rows that have any."""
    some: npt.NDArray[np.bool_] = np.zeros(table.num_rows, dtype=np.bool_)
    for name in group:
        if name not in table.column_names or table[name].null_count == table.num_rows:
            continue
        mixed = _mix_column(rows, name, table[name])
        if not table[name].null_count:
            rows = mixed
            some[:] = True
            continue
        valid = table[name].is_valid().to_numpy()
        rows = np.where(valid, mixed, rows)
        some |= valid
    return rows, int(np.count_nonzero(some))


def _mix_column(rows: U64, name: str, column: pa.ChunkedArray) -> U64:
    """Mix a column's values into the row hashes."""
    salt = np.uint64(int.from_bytes(blake2b(name.encode(), digest_size=8).digest()))
    with np.errstate(over="ignore"):
        return _mix(rows * np.uint64(31) + (_values(column) ^ salt))


def text(checksum: int) -> str:
    """Format a checksum as 16 hexadecimal digits."""
    return f"{checksum:016x}"


def _mix(x: U64) -> U64:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _values(column: pa.ChunkedArray) -> U64:
    """One 64-bit number per row; equal values give equal numbers, whatever their encoding."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    kind = array.type
    if pa.types.is_dictionary(kind):
        array = array.cast(kind.value_type)
        kind = array.type
    if pa.types.is_binary(kind):
        values = _bytes_hashes(array)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        encoded = array.dictionary_encode()
        digests = [_digest(value) for value in encoded.dictionary.to_pylist()]
        codes = encoded.indices.fill_null(0).to_numpy(zero_copy_only=False)
        values = np.array(digests or [0], dtype=np.uint64)[codes]
    elif pa.types.is_decimal(kind):
        # An unscaled value below 2**63 is the low word of the 128-bit integer.
        words = np.frombuffer(array.buffers()[1], dtype=np.uint64)
        values = words[2 * array.offset : 2 * (array.offset + len(array)) : 2]
    elif pa.types.is_floating(kind):
        floats = array.cast(pa.float64()).fill_null(0.0).to_numpy(zero_copy_only=False)
        values = (floats + 0.0).view(np.uint64)  # + 0.0 maps -0.0 to 0.0
    else:
        if pa.types.is_boolean(kind):
            array = array.cast(pa.uint8())
        elif pa.types.is_timestamp(kind):
            unit = kind.unit if kind.unit == "ns" else "us"
            array = array.cast(pa.timestamp(unit, kind.tz)).cast(pa.int64())
        values = array.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64).view(np.uint64)
    if array.null_count:
        values = np.where(array.is_valid().to_numpy(zero_copy_only=False), values, _NULL)
    numbers: U64 = values
    return numbers


def _bytes_hashes(array: pa.Array) -> U64:
    """A hash of each value's bytes; equal wherever the bytes lie. Blocks that fit a processor's cache at a time."""
    array = array.fill_null(b"")
    hashes = np.zeros(len(array), np.uint64)
    for start in range(0, len(array), HASHED_VALUES):
        hashes[start : start + HASHED_VALUES] = _hashes_of_block(array.slice(start, HASHED_VALUES))
    return hashes


def _hashes_of_block(array: pa.Array) -> U64:
    """Mix in eight bytes of all values at a time, from their beginnings.

    Values longer than LONG_BYTES are hashed one by one: few are, and each would take steps of its own.
    """
    offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset :][: len(array) + 1]
    begin, size = offsets[:-1].astype(np.int64), np.diff(offsets).astype(np.int64)
    hashes = size.astype(np.uint64)
    if not size.max(initial=0):
        return hashes
    low, high = int(offsets[0]), int(offsets[-1])
    data = np.zeros(high - low + 8, np.uint8)
    data[: high - low] = np.frombuffer(array.buffers()[2], np.uint8)[low:high]
    words = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))
    begin -= low
    long = size > LONG_BYTES
    for row in np.flatnonzero(long):
        value = data[begin[row] : begin[row] + size[row]].tobytes()
        hashes[row] = int.from_bytes(blake2b(value, digest_size=8).digest())
    rows = np.flatnonzero(~long & (size > 0))
    at = 0
    with np.errstate(over="ignore"):
        while len(rows):
            left = size[rows] - at
            word = words[begin[rows] + at]
            if (short := left < 8).any():
                bits = np.where(short, left, 0).astype(np.uint64) * np.uint64(8)
                word = np.where(short, word & ((np.uint64(1) << bits) - np.uint64(1)), word)
            hashes[rows] = _mix(hashes[rows] * np.uint64(31) + word)
            at += 8
            rows = rows[left > 8]
    return hashes


def _digest(value: str) -> int:
    return int.from_bytes(blake2b(value.encode(), digest_size=8).digest())

"""A checksum of rows that is independent of their order, their files and their encoding.

Every row is hashed to a 64-bit number from the exact values of its columns; the sum over all rows (mod 2**64)
is the checksum. Two stores hold the same rows if count and checksum agree. The hash is splitmix64 (Steele,
Lea and Flood, "Fast splittable pseudorandom number generators", 2014).

`shard` and `record` were added later than the other columns. A row without them has the checksum that it had
before these columns existed, so manifests from that time stay valid. Counting markets and times belongs in
`row_statistics`.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kalshi_platform.schema import PLACE

U64 = npt.NDArray[np.uint64]
_NULL = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Content:
    """Count and checksums of rows. Those of a union are the sum of those of its parts."""

    rows: int = 0
    total: int = 0
    """The checksum."""
    placeless: int = 0
    """The checksum without `shard` and `record`."""
    placed: int = 0
    """The number of rows with a `record`."""

    def __add__(self, other: Content) -> Content:
        return Content(
            self.rows + other.rows,
            (self.total + other.total) % 2**64,
            (self.placeless + other.placeless) % 2**64,
            self.placed + other.placed,
        )

    def agrees_with(self, other: Content) -> bool:
        """Whether both are the same rows.

        `shard` and `record` are compared only where both sides have them for equally many rows: one store
        may have been rebuilt since these columns exist, the other not.
        """
        if self.placed != other.placed:
            return (self.rows, self.placeless) == (other.rows, other.placeless)
        return (self.rows, self.total) == (other.rows, other.total)


def rows_checksum(table: pa.Table) -> int:
    """Checksum of a table; the checksum of a union is the sum (mod 2**64) of those of its parts."""
    return content(table).total


def content(table: pa.Table) -> Content:
    """Count and checksums of a table."""
    if not table.num_rows:
        return Content()
    rows = row_numbers(table, placed=False)
    placeless = int(rows.sum(dtype=np.uint64))
    rows = _placed(rows, table)
    has_record = "record" in table.column_names
    placed = table.num_rows - table["record"].null_count if has_record else 0
    return Content(table.num_rows, int(rows.sum(dtype=np.uint64)), placeless, placed)


def row_numbers(table: pa.Table, *, placed: bool = True) -> U64:
    """The hash of each row; `placed`: including `shard` and `record` where they are not null."""
    rows: U64 = np.zeros(table.num_rows, dtype=np.uint64)
    if not table.num_rows:
        return rows
    for name in table.column_names:
        if name not in PLACE:
            rows = _mix_column(rows, name, table[name])
    return _placed(rows, table) if placed else rows


def _placed(rows: U64, table: pa.Table) -> U64:
    """Mix `shard` and `record` into the row hashes where they are not null."""
    for name in PLACE:
        if name not in table.column_names or table[name].null_count == table.num_rows:
            continue
        mixed = _mix_column(rows, name, table[name])
        valid = table[name].is_valid().to_numpy() if table[name].null_count else True
        rows = np.where(valid, mixed, rows)
    return rows


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
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
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
            array = array.cast(pa.timestamp("us", kind.tz)).cast(pa.int64())
        values = array.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64).view(np.uint64)
    if array.null_count:
        values = np.where(array.is_valid().to_numpy(zero_copy_only=False), values, _NULL)
    numbers: U64 = values
    return numbers


def _digest(value: str) -> int:
    return int.from_bytes(blake2b(value.encode(), digest_size=8).digest())

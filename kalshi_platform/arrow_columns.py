"""Conversion of Polars columns to the Arrow types of `schema`, exactly and without a loop per row.

Only types are converted here; which columns a table has is in `schema.py`.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from kalshi_platform.schema import NAME, PRICE, QTY, TIME


def names(values: pl.Series) -> pa.Array:
    """Text with few distinct values, dictionary-encoded."""
    encoded = values.to_arrow().cast(pa.string()).dictionary_encode()
    if encoded.null_count:
        return encoded.cast(NAME)
    return pa.DictionaryArray.from_arrays(encoded.indices.cast(pa.int32()), encoded.dictionary)


def codes(values: pl.Series) -> pl.Series:
    """An integer code for each value, from 0, in order of first appearance."""
    return pl.Series(values.to_arrow().dictionary_encode().indices).cast(pl.Int64)


def text(values: pl.Series) -> pa.Array:
    """Text with many distinct values, as plain strings."""
    return values.to_arrow().cast(pa.string())


def prices(values: pl.Series) -> pa.Array:
    """Integers in 1e-4 dollars to Decimal(9, 4)."""
    return _decimal(values, PRICE)


def quantities(values: pl.Series) -> pa.Array:
    """Integers in 1e-2 contracts to Decimal(18, 2)."""
    return _decimal(values, QTY)


def times(values_ns: pl.Series) -> pa.Array:
    """Nanoseconds since the epoch to microsecond timestamps in UTC, rounded down."""
    return pa.array((values_ns // 1000).to_numpy(), pa.int64()).cast(TIME)


def microseconds(at: pa.ChunkedArray) -> pa.ChunkedArray:
    """Times to the microsecond, rounded down: Python's datetimes have no nanoseconds."""
    return pc.floor_temporal(at, unit="microsecond").cast(TIME) if at.type.unit == "ns" else at


def place(records: pl.Series, shard: int) -> tuple[pa.Array, pa.Array]:
    """The columns `shard` and `record` of rows that were built from these journal records."""
    return pa.repeat(pa.scalar(shard, pa.uint32()), len(records)), records.to_arrow()


def _decimal(values: pl.Series, dtype: pa.Decimal128Type) -> pa.Array:
    """Unscaled integers as 128-bit decimals: the low word, and its sign extended into the high one."""
    low = values.fill_null(0).cast(pl.Int64).to_numpy()
    words = np.empty((len(low), 2), dtype=np.int64)
    words[:, 0] = low
    words[:, 1] = low >> 63
    validity = None
    if values.null_count():
        validity = pa.array(values.is_not_null().to_numpy()).buffers()[1]
    return pa.Array.from_buffers(dtype, len(low), [validity, pa.py_buffer(words)])

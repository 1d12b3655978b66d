"""Convert numpy arrays to Arrow columns of `kalshi_platform.schema` and back, exactly and without a loop per row.

Only conversions; which columns a dataset has is in the schema.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from kalshi_platform.schema import TIME

Array = npt.NDArray[Any]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
NO_TIME = np.iinfo(np.int64).min


def decimals(unscaled: Ints, kind: pa.Decimal128Type, valid: Bools | None = None) -> pa.Array:
    """Convert unscaled integers to 128-bit decimals; null where not `valid`.

    Raises ValueError if a value has more digits than the type.
    """
    if valid is not None and valid.all():
        valid = None
    low = unscaled if valid is None else np.where(valid, unscaled, 0)
    lowest, highest = int(low.min(initial=0)), int(low.max(initial=0))
    if max(highest, -lowest) >= 10**kind.precision:
        raise ValueError(f"a value has more than the {kind.precision} digits of {kind}")
    words = np.zeros((len(low), 2), dtype=np.int64)
    words[:, 0] = low
    if lowest < 0:
        words[:, 1] = low >> 63  # the sign, carried into the high word
    validity = None if valid is None else pa.py_buffer(np.packbits(valid, bitorder="little"))
    return pa.Array.from_buffers(kind, len(low), [validity, pa.py_buffer(words)])


def times(us: Ints, valid: Bools | None = None) -> pa.Array:
    """Convert µs since the epoch to timestamps, UTC; null where not `valid`."""
    return pa.array(us, pa.int64(), mask=None if valid is None else ~valid).cast(TIME)


def floats(values: Floats, valid: Bools) -> pa.Array:
    """Convert floats; null where not `valid`."""
    return pa.array(values, pa.float64(), mask=~valid)


def names(codes: npt.NDArray[np.int32], values: list[str], valid: Bools | None = None) -> pa.Array:
    """Make a dictionary-encoded text column from codes into `values`; null where not `valid`."""
    return pa.DictionaryArray.from_arrays(
        pa.array(codes, pa.int32(), mask=None if valid is None else ~valid),
        pa.array(values, pa.string()),
    )


def unscaled(column: pa.ChunkedArray) -> Ints:
    """Return the unscaled integers of decimals; 0 for null. They fit 64 bits: precision is 18 at most."""
    parts = [np.empty(0, dtype=np.int64)]
    for chunk in column.chunks:
        words = np.frombuffer(chunk.buffers()[1], dtype=np.int64)
        low = words[2 * chunk.offset : 2 * (chunk.offset + len(chunk)) : 2]
        valid = chunk.is_valid().to_numpy(zero_copy_only=False) if chunk.null_count else True
        parts.append(np.where(valid, low, 0))
    return np.concatenate(parts)


def microseconds(column: pa.ChunkedArray) -> Ints:
    """Return the times as µs since the epoch; NO_TIME for null."""
    us = column.cast(pa.timestamp("us", "UTC")).cast(pa.int64())
    return np.asarray(us.fill_null(NO_TIME).to_numpy(), dtype=np.int64)
